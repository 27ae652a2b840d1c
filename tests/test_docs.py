"""What the documents tell a reader holds: their code runs, their commands parse, their links lead somewhere."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import re
import shlex
import tomllib
import warnings
from pathlib import Path

import pytest
import torch

import bench.report
import bench.run
import hjepa_fast as hf
from hjepa_fast import cli
from hjepa_fast.schemes import SCHEMES

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [
    *PAGES,
    *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md", "examples/README.md")),
    *sorted((ROOT / "bench/results").rglob("*.md")),
]
TEXTS = [text for text in TEXTS if text.exists()]
NEEDS = "# needs "
"""A block that starts so says what it needs that is not everywhere. It is compiled, and not run."""

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
texts = pytest.mark.parametrize("text", TEXTS, ids=lambda text: str(text.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


@pages
def test_blocks_of_code_run_one_after_the_other(page, monkeypatch, tmp_path):
    # what is said of graphs does not depend on who makes code of them, and compiling that code takes minutes
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "documents"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for index, block in enumerate(blocks(page, "python")):
            code = compile(block, f"{page.name}, block {index}", "exec")
            if not block.startswith(NEEDS):
                exec(code, names)


def test_there_are_blocks():
    assert sum(len(blocks(page, "python")) for page in PAGES) >= 20
    assert blocks(README, "python")


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


# Commands


def commands(page: Path) -> list[list[str]]:
    """The words of every command in the page's blocks for a shell."""
    found = []
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = next((n for n, word in enumerate(words) if word in ("&&", ";", "|")), len(words))
                found.append(words[:end])
                words = words[end + 1 :]
    return found


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


def variables() -> set[str]:
    return set(re.findall(r"^([A-Z_]+) \?=", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


def extras() -> set[str]:
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"])


def parse(parser: argparse.ArgumentParser, words: list[str]) -> None:
    try:
        parser.parse_args(words)
    except SystemExit:
        pytest.fail(f"{parser.prog} does not take {shlex.join(words)}")


def check_python(words: list[str]) -> None:
    """The words after `python`."""
    if "-m" not in words:
        assert (ROOT / words[0]).exists(), f"{words[0]} is not there"
        return
    module, rest = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
    if module == "hjepa_fast":
        parse(cli.build_parser(), rest)
    elif module == "bench.run":
        parse(bench.run._parser(), rest)
    elif module in ("pip", "pytest"):
        check_command([module, *rest])
    else:
        assert module == "venv" or importlib.util.find_spec(module), f"no module {module}"


def check_command(words: list[str]) -> None:
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    command, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if command == "hjepa-fast":
        parse(cli.build_parser(), rest)
    elif command == "make":
        for word in rest:
            name, set_to, _ = word.partition("=")
            assert name in (variables() if set_to else targets()), f"make knows no {name}"
    elif command.startswith("python") or command == "torchrun":
        check_python(rest)
    elif command == "pip":
        for named in re.findall(r"\[([a-z,]+)\]", " ".join(rest)):
            assert set(named.split(",")) <= extras(), f"no extra {named}"
    elif command == "pytest":
        for word in rest:
            assert word.startswith("-") or (ROOT / word).exists(), f"{word} is not there"
    else:
        assert command in ("git", "cd", "."), f"a document has a command that is not known here: {shlex.join(words)}"


@texts
def test_commands_parse(text):
    for words in commands(text):
        check_command(words)


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    found = set()
    for action in parser._actions:
        found |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            found |= set().union(*map(options_of, action.choices.values()))
    return found


@texts
def test_options_and_targets_in_sentences_are_there(text):
    known = options_of(cli.build_parser()) | options_of(bench.run._parser())
    known |= {"--no-build-isolation", "--no-deps", "--benchmark-only", "--nproc-per-node"}  # of pip, pytest, torchrun
    for quoted in re.findall(r"`([^`\n]+)`", prose(text)):
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", quoted))
        assert named <= known, f"`{quoted}` names {named - known}"
        if quoted.startswith("make "):
            check_command([word for word in shlex.split(quoted) if "..." not in word])


# Links


def anchors(text: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@texts
def test_links_lead_somewhere(text):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (text.parent / path).resolve() if path else text
        assert file.exists(), f"{text.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{file.name} has no heading for #{anchor}"


@texts
def test_paths_in_sentences_are_there(text):
    if text.is_relative_to(ROOT / "bench/results"):
        return
    for path in re.findall(r"`((?:csrc|tests|bench|docs|examples|hjepa_fast)/[\w./-]+)`", prose(text)):
        made = ("bench/local", "hjepa_fast/_C")
        assert (ROOT / path).exists() or path.startswith(made), f"{text.name} names {path}"


def test_the_reference_has_every_public_name():
    text = "\n".join(blocks(ROOT / "docs/api.md", "{eval-rst}"))
    named = set(re.findall(r"auto(?:function|class):: (\w+)$", text, re.M))
    assert set(hf.__all__) - {"diagnostics"} <= named
    assert "automodule:: hjepa_fast.diagnostics" in text


# What is said twice, here and in the code


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_the_table_of_integrators_is_that_of_the_code():
    text = prose(ROOT / "docs/integrators.md").split("## The table")[1].split("\n## ")[0]
    found = {row[0].strip('"'): row[1:4] for row in rows(text) if row[0].startswith('"')}
    assert set(found) == set(SCHEMES)
    for name, (order, symplectic, reversible) in found.items():
        general, separable = SCHEMES[name].general, SCHEMES[name].separable
        assert order.split()[0] == str(general.order)
        if separable.order != general.order:
            assert order == f"{general.order} ({separable.order} if separable)"
        for said, of_any, of_separable in (
            (symplectic, general.symplectic, separable.symplectic),
            (reversible, general.reversible, separable.reversible),
        ):
            assert said == {(True, True): "yes", (False, False): "no", (False, True): "only if separable"}[of_any, of_separable]


@pytest.mark.parametrize("page", [README, ROOT / "docs/performance.md"], ids=lambda page: page.stem)
def test_the_first_table_of_speeds_is_that_of_the_results(page):
    """Ratios against the committed results, to the digits that are shown."""
    results = (ROOT / "bench/results/quick-cpu.md").read_text(encoding="utf-8")
    table = rows(results.split("\n\n")[3])
    header, measured = table[0], {row[0]: row for row in table[2:]}
    columns = ("eager", "jax", "compiled")
    compared = set()
    for row in rows(prose(page)):
        named = re.fullmatch(r"(rollout|training step), batch (\d+)", row[0])
        if not named:
            continue
        case = measured[f"{named[1].split()[0]}-b{named[2]}-t15"]
        for said, column in zip(row[1:4], columns, strict=True):
            exact, digits = float(case[header.index(column)].strip("x")), len(said.partition(".")[2])
            assert abs(float(said) - exact) <= 0.5001 * 10**-digits, f"{row[0]}: {column} is {exact}, {page.name} says {said}"
            compared.add((row[0], column))
    assert len(compared) == 12


def test_the_results_of_the_demo_are_those_that_were_measured():
    """Every row of the demo's tables that a page shows is a row of one of its summaries."""
    summaries = sorted((ROOT / "bench/results/demo").rglob("*.md"))
    known = [row for summary in summaries for row in rows(summary.read_text(encoding="utf-8"))]
    page = prose(ROOT / "docs/results.md").split("## Published")[0]
    shown = [row for row in rows(page) if not set(row[0]) <= {"-"}]
    assert len(shown) >= 8
    for row in shown:
        assert row in known, f"no summary of the demo has {row}"


def test_the_environment_variables_are_those_that_are_read():
    sources = [ROOT / "setup.py", *(ROOT / "hjepa_fast").rglob("*.py")]
    read = {name for file in sources for name in re.findall(r'"(HJEPA_FAST_[A-Z0-9_]+)"', file.read_text(encoding="utf-8"))}
    table = prose(ROOT / "docs/gpu.md").split("## Environment variables")[1].split("\n## ")[0]
    assert {row[0].strip("`") for row in rows(table) if "HJEPA_FAST" in row[0]} == read
