"""The fuzzer of tests/tools: some of its calls, and whether it notices what it is there for."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch

import hjepa_fast as hf
from tools import fuzz

CRASHES = """
import os, sys, time
sys.path[:0] = {path!r}
from tools import fuzz
draw = fuzz.draw
def with_faults(seed):
    call = draw(0)
    call.make = {{1: os.abort, 2: lambda: time.sleep(60), 3: lambda: 1 / 0}}.get(seed, lambda: None)
    return call
fuzz.draw = with_faults
fuzz.calls(int(sys.argv[1]), int(sys.argv[3]))
"""


def some_calls() -> list[fuzz.Call]:
    """Of which it is known whether they are valid."""
    calls = (fuzz.draw(seed) for seed in itertools.count())
    return list(itertools.islice((call for call in calls if call.valid is not None), 60))


def test_some_calls():
    calls = some_calls()
    verdicts = [fuzz.judge(call) for call in calls]
    assert [(str(call), verdict) for call, verdict in zip(calls, verdicts, strict=True) if not verdict.in_order] == []
    outcomes = [verdict.outcome for verdict in verdicts]
    assert outcomes.count("right") > 5
    assert outcomes.count("refused") > 5


def off_by_a_hundredth(out):
    return out._replace(states=out.states * 1.01)


def without_gradient(out):
    return out._replace(states=out.states.detach().requires_grad_(out.states.requires_grad))


def raising(error):
    def change(_):
        raise error

    return change


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        (off_by_a_hundredth, "wrong value"),
        (without_gradient, "wrong gradient"),
        (lambda out: out._replace(states=out.states[..., :1]), "wrong shape"),
        (raising(KeyError("weight")), "undocumented class of error"),
        (raising(RuntimeError("mat1 and mat2 shapes cannot be multiplied")), "not the library's own message"),
    ],
)
def test_faults_are_found(change, outcome, monkeypatch):
    """In what the library returns, unless it is asked as the oracle."""
    real = hf.rollout

    def faulty(*arguments, **options):
        out = real(*arguments, **options)
        return out if options.get("backend") == "reference" else change(out)

    monkeypatch.setattr(hf, "rollout", faulty)
    calls = [call for call in some_calls() if call.function == "rollout" and call.valid]
    assert outcome in [fuzz.judge(call).outcome for call in calls]


def test_accepted_and_refused_wrongly(monkeypatch):
    calls = [call for call in some_calls() if call.function == "rollout"]
    monkeypatch.setattr(hf, "rollout", lambda *_, **__: hf.Rollout(torch.zeros(1), None))
    assert "invalid arguments accepted" in [fuzz.judge(call).outcome for call in calls if not call.valid]
    monkeypatch.setattr(hf, "rollout", lambda *_, **__: hf.LatentHNN(3))  # raises an error of the library's own
    assert {fuzz.judge(call).outcome for call in calls if call.valid} == {"valid arguments refused"}


def test_crashes_and_hangs_are_found_and_survived(tmp_path, monkeypatch, capsys):
    script = tmp_path / "script.py"
    script.write_text(CRASHES.format(path=sys.path))
    monkeypatch.setattr(fuzz, "LIMIT", 6.0)
    assert fuzz.fuzz(5, 0, str(script)) == 3
    out = capsys.readouterr().out
    assert "seed 1: exit status -6" in out
    assert "seed 2: more than 6 s" in out
    assert "seed 3: undocumented class of error" in out
    assert "5 calls from 0 on" in out
