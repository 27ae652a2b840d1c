"""Training steps, forward, loss with energy term and backward: `pytest bench/bench_training.py --benchmark-only`."""

from collections.abc import Callable

KIND = "training"


def test_training_step(benchmark: Callable[..., object], contestant_run: Callable[[], object]) -> None:
    benchmark(contestant_run)
