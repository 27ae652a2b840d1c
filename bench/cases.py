"""Every benchmark case, named once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import pairwise
from typing import Any

from .zoo import ZOO as REPLICAS

STANDARD = ("eager", "manual", "jax", "baseline")
EXTENDED = (*STANDARD, "func", "compiled")
"""With the slow ones: compiling 15 unrolled steps takes minutes on two cores."""
LATENT_SIZES = (64, 256, 1024, 4096, 16384)
WITHOUT_ROLLOUT = ("matching", "residual")
"""Kinds whose call is one gradient of H at given states."""
SLOPE_STEPS = (15, 115)
"""Numbers of steps whose difference in time gives the cost of a step alone, without the products at both ends of a rollout."""


@dataclass(frozen=True)
class Case:
    """One problem, the same weights and inputs for every contestant."""

    name: str
    kind: str
    """"rollout" (no gradients), "training" (forward, loss with energy term, backward), or "backward", which is that of
    "training" alone; "matching" is a training step on the vector field at every state, and "residual" one on the residual of
    the implicit midpoint rule between two states, both with no rollout; "zoo" is one of a public repository's model, in
    `zoo.py`."""
    batch: int
    n_steps: int = 15
    latent_dim: int = 1024
    hidden_dims: tuple[int, ...] = (512, 512, 256)
    activation: str = "softplus"
    separable: bool = False
    """H = T(p) + V(q), two networks of these widths, instead of one of q and p."""
    quadratic: bool = False
    """Of a separable H: T = |p|^2 / 2 instead of a network, and V has sum_i k_i q_i^2 / 2 besides its own."""
    mechanical: bool = False
    """H = p^T M^-1(q) p / 2 + V(q) of angles q, a network of these widths for V and one for the Cholesky factor of M^-1; under
    "rk4", as Symplectic ODE-Net is trained."""
    dtype: str = "float32"
    precision: str = "highest"
    """Of float32 products, as in `torch.set_float32_matmul_precision`."""
    states: str = "all"
    """"all" or "final", as in `hjepa_fast.rollout`."""
    memory: tuple[str, ...] = ("store",)
    """What ours keeps for the backward pass; each is a contestant."""
    integrators: tuple[str, ...] = ("leapfrog",)
    """What ours runs; each is a contestant, checked against its own reference. Rivals run the published leapfrog step."""
    dt: float = 0.875
    """Exact in bfloat16 too."""
    rivals: tuple[str, ...] = STANDARD
    backends: str = "every"
    """Of ours: "every" one that is there, or only the one that "auto" takes."""

    @staticmethod
    def arithmetic_of(dtype: str, precision: str) -> str:
        """What products are computed in: a dtype's name, or "tf32"."""
        return "tf32" if dtype == "float32" and precision == "high" else dtype

    @property
    def arithmetic(self) -> str:
        return self.arithmetic_of(self.dtype, self.precision)

    @property
    def replica(self) -> str:
        """Of a "zoo" case its key in `zoo.ZOO`."""
        return self.name.removeprefix(ZOO_PREFIX)

    @property
    def matches(self) -> bool:
        """Whether a call is one gradient of H at given states, instead of a rollout."""
        return self.kind in WITHOUT_ROLLOUT

    @property
    def passes(self) -> int:
        """How often each product is made, if none is repeated: each has two in the backward pass."""
        return {"rollout": 1, "backward": 2}.get(self.kind, 3)

    @property
    def gradients(self) -> int:
        """Of networks in one call of the published leapfrog; of a separable H the last kick of a step is the first of the
        next, and T = |p|^2 / 2 has no network."""
        if self.matches:
            return 1
        return 3 * self.n_steps if not self.separable else (1 if self.quadratic else 2) * self.n_steps + 1

    @property
    def flops(self) -> int:
        """Of one call under the published leapfrog, by count, two for each multiplication: what the problem needs at least.

        A gradient of H at one sample goes through the layers after the first one forward and back, 2 sum h_l h_{l+1}
        multiplications. It then moves q or p, and with it the first pre-activation, in one of two ways:

            pair    W_q^T and then W_p, 2 h_1 d multiplications a move (d of q alone)
            dense   their product K = W_p W_q^T, h_1^2 a move, and h_1^2 d once a call to make K, however large the batch

        The one with fewer multiplications in the whole call counts. In "matching" and "residual" nothing is moved, and a
        gradient goes through the first layer forward and back. Training counts three times as much, since each product has
        two in the backward pass. What is not counted: the first pre-activation of the initial states, the states made from
        hidden ones, energies, activations, and what is computed twice.
        """
        h, d = self.hidden_dims, self.latent_dim // 2
        gradients = self.batch * self.gradients
        through = 2 * gradients * sum(a * b for a, b in pairwise(h))
        if self.matches:
            coupling = gradients * 2 * h[0] * (d if self.separable else 2 * d)
        else:
            pair = gradients * 2 * h[0] * d
            dense = gradients * h[0] * h[0] + h[0] * h[0] * d
            coupling = min(pair, dense)
        return 2 * self.passes * (through + coupling)

    @property
    def eager_flops(self) -> int:
        """Of one call of the published code: three gradients a step, each through every layer, first one included."""
        inputs = self.latent_dim // 2 if self.separable else self.latent_dim
        networks = 2 if self.mechanical or (self.separable and not self.quadratic) else 1
        layers = networks * sum(a * b for a, b in pairwise((inputs, *self.hidden_dims)))
        return self.passes * self.batch * self.eager_gradients * 4 * layers

    @property
    def eager_bytes(self) -> int:
        """That a call of the published code holds at its largest, about: states, and what their backward pass needs."""
        numbers = 2 * self.latent_dim * (self.n_steps + 1)  # the states, one by one and together
        if self.passes > 1:
            # found by counting: five numbers a hidden unit and two an entry of z for each gradient, two more for the squares
            # of a quadratic term; the second half of the sum is targets and loss
            an_entry = 4 if self.quadratic else 2
            numbers += self.eager_gradients * (5 * sum(self.hidden_dims) + an_entry * self.latent_dim) + numbers
        return 4 * self.batch * numbers

    @property
    def eager_gradients(self) -> int:
        """Of H in one call of the published code."""
        return 1 if self.matches else (4 if self.mechanical else 3) * self.n_steps

    @property
    def problem(self) -> Case:
        """What is computed, whoever takes part."""
        return replace(self, memory=("store",), integrators=("leapfrog",), rivals=(), backends="every")

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


def _mechanical(kind: str, width: int) -> Case:
    """A double pendulum's: four features, windows of five steps."""
    return Case(
        f"mechanical-{width}-{kind}-b64-t5", kind, 64, 5, 4, (width, width), "tanh", mechanical=True, integrators=("rk4",),
        dt=0.0625, rivals=("eager",),
    )  # fmt: skip


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

GRID_PREFIX = "small-"
"""Of the names of the grid's cells."""
_GRID: dict[str, dict[str, Any]] = {
    **{
        "-".join(map(str, widths)): {"latent_dim": widths[0], "hidden_dims": widths[1:], "activation": activation}
        for widths, activation in (
            ((2, 200, 200), "tanh"),
            ((4, 200, 200), "tanh"),
            ((20, 200, 200), "tanh"),
            ((64, 256, 256), "tanh"),
            ((192, 256, 256), "softplus"),
            ((1024, 512, 512, 256), "softplus"),
        )
    },
    "hamjepa": {
        **{"latent_dim": 1024, "hidden_dims": (256, 256), "activation": "gelu"},
        **{"separable": True, "quadratic": True},
    },
}
"""Networks of public repositories, the published one, and HamJEPA's H = |p|^2 / 2 + f(q) + sum_i k_i q_i^2 / 2."""
_MATCHED = {"2-200-200": 750, "4-200-200": 200, "20-200-200": 200, "64-256-256": 1000}
"""Those that are trained on derivatives or single steps, and the batch that they are trained with."""
GRID_BATCHES, GRID_STEPS = (1, 32, 1000, 10000), (1, 15, 100)


def _step_size(activation: str, n_steps: int) -> float:
    """Shorter where the network's motion is chaotic, so that rounding does not grow beyond what is checked."""
    long = n_steps > 15
    return {"tanh": 0.0625 if long else 0.125, "gelu": 0.125 if long else 0.875, "softplus": 0.875}[activation]


def _in_grid(network: str, kind: str, batch: int, n_steps: int) -> Case:
    """`small-<network>-rollout-b32-t15`, `small-<network>-matching-b32` and the like."""
    name = f"{GRID_PREFIX}{network}-{kind}-b{batch}" + ("" if kind in WITHOUT_ROLLOUT else f"-t{n_steps}")
    compiled = ("compiled",) if n_steps == 1 else ()  # more steps take more than a minute to compile
    dt = _step_size(_GRID[network]["activation"], n_steps)
    rivals = ("eager", "manual", "jax", *compiled)
    return Case(name, kind, batch, n_steps, **_GRID[network], dt=dt, rivals=rivals, backends="auto")


GRID = tuple(
    _in_grid(network, kind, batch, n_steps)
    for network in _GRID
    for kinds, batches, steps in (
        (("rollout", "training"), GRID_BATCHES, GRID_STEPS),
        (WITHOUT_ROLLOUT, (1, 32, _MATCHED[network], 10000) if network in _MATCHED else (), (1,)),
    )
    for kind in kinds
    for batch in batches
    for n_steps in steps
)
"""Every cell in which ours is to be at least as fast as the best rival."""
MOST_SECONDS, MOST_BYTES, ASSUMED_RATE = 8.0, 8e9, 1e11
"""Of one call of the published code, and the operations a second that its seconds are estimated with."""


def impractical(case: Case) -> str:
    """Why a cell of the grid is not measured, from counts alone, so that every machine has the same ones; empty if it is."""
    seconds = case.eager_flops / ASSUMED_RATE
    if seconds > MOST_SECONDS:
        return f"one call of the published code takes about {seconds:.0f} s at {ASSUMED_RATE / 1e9:.0f} GFLOP/s"
    if case.eager_bytes > MOST_BYTES:
        return f"one call of the published code holds about {case.eager_bytes / 1e9:.0f} GB"
    return ""


ZOO_PREFIX = "zoo-"
ZOO = tuple(
    Case(
        f"{ZOO_PREFIX}{name}", "zoo", entry.rows, entry.n_steps, entry.dim, entry.hidden, entry.activation,
        dtype=entry.dtype, rivals=("eager",), backends="auto",
    )
    for name, entry in REPLICAS.items()
)  # fmt: skip
"""Public repositories' models in their own sizes, against their own way of training."""
SMALL = tuple(case for case in GRID if not impractical(case))
"""The cells that can be measured in a sensible time and memory."""
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
    *ZOO,
    *(_mechanical(kind, width) for kind in ("rollout", "training") for width in (50, 100, 300)),
    *SMALL,
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
            ("rollout", (1, 8, 32, 64, 128, 256, 1024, 4096, 16384), ("float32", "tf32"), (*STANDARD, "func")),
            # JAX keeps bfloat16 where the others do not
            ("rollout", (1, 8, 32, 64, 128, 256, 1024, 4096, 16384), ("bfloat16",), ("eager", "manual", "baseline")),
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
