"""Rollouts without gradients: `pytest bench/bench_rollout.py --benchmark-only`."""

from collections.abc import Callable

KIND = "rollout"


def test_rollout(benchmark: Callable[..., object], contestant_run: Callable[[], object]) -> None:
    benchmark(contestant_run)
