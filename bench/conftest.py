"""Benchmarks run only when asked for: `pytest bench`, or `pytest --benchmark-only`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from . import cases
from .measure import checked
from .rivals import entrants

HERE = Path(__file__).parent
LONGEST_CALL = 5.0
"""Seconds; a rival that takes longer is skipped with its time."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    asked = [(config.invocation_params.dir / arg.partition("::")[0]).resolve() for arg in config.invocation_params.args]
    named = any(path == HERE or HERE in path.parents for path in asked)
    return None if named or config.getoption("benchmark_only", default=False) else True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every contestant of the quick cases of the module's KIND, grouped by case."""
    pairs = [
        pytest.param(case, name, id=f"{case.name}-{name}", marks=pytest.mark.benchmark(group=case.name))
        for case in cases.QUICK  # in full float32 all of them
        if case.kind == metafunc.module.KIND
        for name in entrants(case, DEVICE)[0]
    ]
    metafunc.parametrize(("case", "name"), pairs)


@pytest.fixture
def contestant_run(case: cases.Case, name: str) -> Callable[[], object]:
    """A contestant's call, already found right; it returns when its work is done."""
    _, contestants, _, left_out = checked(case, {name: entrants(case, DEVICE)[0][name]}, DEVICE, LONGEST_CALL)
    if not contestants:
        pytest.skip(left_out[name])
    (contestant,) = contestants
    if DEVICE.type == "cpu":
        return contestant.run

    def run() -> None:
        contestant.run()
        torch.cuda.synchronize()

    return run
