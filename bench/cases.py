"""Every benchmark case, named once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import pairwise
from typing import Any

STANDARD = ("eager", "manual", "jax", "baseline")
EXTENDED = (*STANDARD, "func", "compiled")
"""With the slow ones: compiling 15 unrolled steps takes minutes on two cores."""
LATENT_SIZES = (64, 256, 1024, 4096, 16384)
SLOPE_STEPS = (15, 115)
"""Numbers of steps whose difference in time gives the cost of a step alone, without the products at both ends of a rollout."""


@dataclass(frozen=True)
class Case:
    """One problem, the same weights and inputs for every contestant."""

    name: str
    kind: str
    """"rollout" (no gradients), "training" (forward, loss with energy term, backward), or "backward", which is that of
    "training" alone; "matching" is a training step on the vector field at every state, with no rollout."""
    batch: int
    n_steps: int = 15
    latent_dim: int = 1024
    hidden_dims: tuple[int, ...] = (512, 512, 256)
    activation: str = "softplus"
    separable: bool = False
    """H = T(p) + V(q), two networks of these widths, instead of one of q and p."""
    dtype: str = "float32"
    precision: str = "highest"
    """Of float32 products, as in `torch.set_float32_matmul_precision`."""
    states: str = "all"
    """"all" or "final", as in `hjepa_fast.rollout`."""
    memory: tuple[str, ...] = ("store",)
    """What ours keeps for the backward pass; each is a contestant."""
    integrators: tuple[str, ...] = ("leapfrog",)
    """What ours runs; each is a contestant, checked against its own reference. Rivals run the published leapfrog step."""
    rivals: tuple[str, ...] = STANDARD

    @staticmethod
    def arithmetic_of(dtype: str, precision: str) -> str:
        """What products are computed in: a dtype's name, or "tf32"."""
        return "tf32" if dtype == "float32" and precision == "high" else dtype

    @property
    def arithmetic(self) -> str:
        return self.arithmetic_of(self.dtype, self.precision)

    @property
    def gradients_a_step(self) -> int:
        """Of the leapfrog step; for a separable H the last one of a step is the first of the next."""
        return 2 if self.separable else 3

    @property
    def gradient_flops(self) -> int:
        """Of one gradient of H, or of a term of it, for one sample in the hidden space: the product with K, and every later
        layer forward and back."""
        h = self.hidden_dims
        return 2 * (h[0] * h[0] + 2 * sum(a * b for a, b in pairwise(h)))

    @property
    def flops(self) -> int:
        """Of one call under the published leapfrog, by count: the gradients in the hidden space, and in training their
        backward pass, of which each product has two. What surrounds the steps, and what is computed twice, is not counted."""
        if self.kind == "matching":  # forward and back through all layers, and twice that in the backward pass
            return 3 * self.batch * 2 * 2 * sum(a * b for a, b in pairwise((self.latent_dim, *self.hidden_dims)))
        passes = {"rollout": 1, "training": 3, "backward": 2}[self.kind]
        return passes * self.gradients_a_step * self.n_steps * self.batch * self.gradient_flops

    @property
    def problem(self) -> Case:
        """What is computed, whoever takes part."""
        return replace(self, memory=("store",), integrators=("leapfrog",), rivals=())

    @classmethod
    def of(cls, stored: dict[str, Any]) -> Case:
        """A case of a results file; what an earlier version did not store has its default.

        Raises
        ------
        TypeError
            There is a field that this version does not know.
        """
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()})


def _named(kind: str, batch: int, n_steps: int = 15) -> str:
    return f"{kind}-b{batch}-t{n_steps}"


def _memory(n_steps: int) -> Case:
    return Case(f"memory-t{n_steps}", "training", 32, n_steps, memory=("store", "recompute", "checkpoint"), rivals=("eager",))


INTEGRATORS = ("leapfrog", "implicit-leapfrog", "implicit-midpoint", "yoshida4", "tao", "rk4")


def _integrators(kind: str, names: tuple[str, ...] = INTEGRATORS) -> Case:
    return Case(f"integrators-{kind}-b32-t15", kind, 32, integrators=names, rivals=("eager",))


def _reversible(n_steps: int) -> Case:
    return Case(
        f"reversible-t{n_steps}", "training", 32, n_steps, states="final", integrators=("implicit-leapfrog",),
        memory=("store", "checkpoint", "reversible"), rivals=(),
    )  # fmt: skip


def _separable(kind: str, batch: int) -> Case:
    return Case(f"separable-{kind}-b{batch}-t15", kind, batch, separable=True, rivals=("eager",))


def _matching(batch: int, latent_dim: int, *hidden_dims: int) -> Case:
    """Networks of public repositories that learn from derivatives, and the published one."""
    name = f"matching-{'-'.join(map(str, (latent_dim, *hidden_dims)))}-b{batch}"
    activation = "softplus" if latent_dim == 1024 else "tanh"
    return Case(name, "matching", batch, 1, latent_dim, hidden_dims, activation, rivals=("eager", "manual", "jax"))


MATCHING = (_matching(750, 2, 200, 200), _matching(200, 8, 200, 200), _matching(32, 1024, 512, 512, 256))


def _bfloat16(batch: int) -> Case:
    return Case(f"bfloat16-b{batch}-t15", "rollout", batch, dtype="bfloat16", rivals=("eager", "eager-float32", "manual"))


QUICK = (
    *(Case(_named("rollout", batch), "rollout", batch, rivals=EXTENDED) for batch in (1, 32, 1024)),
    Case(_named("training", 32), "training", 32, rivals=EXTENDED),
    _bfloat16(256),
    _memory(15),
    _integrators("rollout"),
    # the float64 references of the other implicit ones, by nested autograd, take longer than all else
    _integrators("training", ("leapfrog", "implicit-leapfrog")),
    _separable("rollout", 32),
    _separable("training", 32),
    *MATCHING,
)
"""The table of ratios."""
FULL = (
    *(_integrators(case.kind) if len(case.integrators) > 1 else case for case in QUICK),
    *(Case(_named("rollout", batch), "rollout", batch) for batch in (8, 256, 4096)),
    *(Case(_named("rollout", batch, n), "rollout", batch, n) for batch in (1, 32) for n in (1, 100)),
    *(Case(_named("training", batch), "training", batch) for batch in (1, 8, 256, 1024)),
    *(Case(_named("training", 32, n), "training", 32, n) for n in (1, 100)),
    *(
        Case(f"final-d{d}-t{n}", "rollout", 32, n, latent_dim=d, states="final", rivals=("eager", "jax"))
        for d in LATENT_SIZES
        for n in SLOPE_STEPS
    ),
    _bfloat16(1024),
    *(_memory(n) for n in (50, 150)),
    _matching(1, 2, 200, 200),
    _matching(10000, 2, 200, 200),
    _matching(1000, 64, 256, 256),
    _matching(256, 1024, 512, 512, 256),
    *(_reversible(n) for n in (32, 128)),
)


def _on_gpu(kind: str, batch: int, arithmetic: str, rivals: tuple[str, ...]) -> Case:
    dtype, precision = {"tf32": ("float32", "high")}.get(arithmetic, (arithmetic, "highest"))
    name = _named(kind, batch) if arithmetic == "float32" else f"{arithmetic}-{_named(kind, batch)}"
    return Case(name, kind, batch, dtype=dtype, precision=precision, rivals=rivals)


_COMPILED = {("rollout", 1), ("rollout", 32), ("training", 32)}
"""Where torch.compile takes part, in float32: it takes its minutes for every shape anew."""
GPU = (
    *(
        _on_gpu(kind, batch, arithmetic, EXTENDED if (kind, batch) in _COMPILED and arithmetic == "float32" else rivals)
        for kind, batches, arithmetics, rivals in (
            ("rollout", (1, 8, 32, 64, 256, 1024, 4096, 16384), ("float32", "tf32"), (*STANDARD, "func")),
            # JAX keeps bfloat16 where the others do not
            ("rollout", (1, 8, 32, 64, 256, 1024, 4096, 16384), ("bfloat16",), ("eager", "manual", "baseline")),
            ("training", (32, 1024, 4096), ("float32", "tf32"), (*STANDARD, "func")),
            ("backward", (1, 32, 1024, 4096), ("float32", "tf32"), ("eager", "manual", "baseline")),
        )
        for batch in batches
        for arithmetic in arithmetics
    ),
    _integrators("rollout"),
    _integrators("training"),
)
"""What a GPU is measured by."""


def of_device(kind: str) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """The cases of a quick run on a "cpu" or "cuda", and every case."""
    if kind != "cuda":
        return QUICK, FULL
    names = {case.name for case in GPU}
    return GPU, (*GPU, *(case for case in FULL if case.name not in names))


def select(subset: tuple[Case, ...], pattern: str | None = None) -> tuple[Case, ...]:
    """The case of this name, or else those whose name contains the pattern or matches it as a shell pattern."""
    exact = tuple(c for c in subset if c.name == pattern)
    return exact or tuple(c for c in subset if pattern is None or pattern in c.name or fnmatch(c.name, pattern))
