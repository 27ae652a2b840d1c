"""The functions a user calls: what they take and give; they read the Hamiltonian and hand on."""

from __future__ import annotations

import functools
from typing import Any, Literal, Unpack, overload

from torch import Tensor, nn

from . import driven, hamiltonian, rolling, validation
from .backends import cpp, cuda, triton
from .names import Backend, Integrator, Memory, Options, States, Unconverged
from .ports import PortHNN
from .rolling import BACKENDS, INTEGRATORS, MEMORY, Rollout, Solve, choose_backend

__all__ = [
    "BACKENDS", "INTEGRATORS", "MEMORY", "Backend", "Rollout", "Solve", "available_backends", "choose_backend", "energy",
    "leapfrog", "rollout",
]  # fmt: skip


@overload
def rollout(
    hnn: nn.Module, z0: Tensor, dt: float | Tensor, n_steps: int, *, energy: Literal[True], **options: Unpack[Options]
) -> Rollout[Tensor]: ...
@overload
def rollout(
    hnn: nn.Module, z0: Tensor, dt: float | Tensor, n_steps: int, *, energy: Literal[False] = False, **options: Unpack[Options]
) -> Rollout[None]: ...
@overload
def rollout(
    hnn: nn.Module, z0: Tensor, dt: float | Tensor, n_steps: int, *, energy: bool, **options: Unpack[Options]
) -> Rollout: ...
def rollout(
    hnn: nn.Module,
    z0: Tensor,
    dt: float | Tensor,
    n_steps: int,
    *,
    integrator: Integrator = "leapfrog",
    energy: bool = False,
    states: States = "all",
    memory: Memory = "store",
    backend: Backend = "auto",
    tolerance: float | None = None,
    max_evaluations: int = 50,
    unconverged: Unconverged = "raise",
    omega: float = 1.0,
    control: Tensor | None = None,
    condition: Tensor | None = None,
) -> Rollout[Any]:
    """Roll an MLP Hamiltonian's dynamics q' = dH/dp, p' = -dH/dq forward in time, all steps in one call.

    Parameters
    ----------
    hnn : nn.Module
        Is, or holds as `.net`, an `nn.Sequential` of Linear layers with one smooth activation between
        them and one output; or a `SeparableHNN`. Its own forward(z) must compute that and nothing else (or say
        `forward_is_net = True`), and no hooks may stand around it. Any other module that gives one number a state is
        run by nested autograd with backend "reference", which "auto" then takes, with a warning.
    z0 : Tensor [..., 2d]
        Initial states z = [q, p]: float32, float64 or bfloat16, of the network's dtype and device.
    dt : float or Tensor
        Step size; a tensor may require grad. 0-d for all, [n_steps] per step, [..., 1] per sample, [..., n_steps] both.
    n_steps : int
        Number of steps, >= 0.
    integrator : str
        Symplectic and reversible for any H: "implicit-leapfrog" (order 2), "implicit-midpoint" (2), "yoshida4", "suzuki4",
        "yoshida6" (compositions of the first; with "-midpoint" appended, of the second). Symplectic: "symplectic-euler" (1).
        "tao" (2, explicit, symplectic for two coupled copies of the state). "leapfrog" is H-JEPA's Algorithm 1: symplectic
        only for a separable H, of order 1 for any other. "euler" (1) and "rk4" (4) are not symplectic. `schemes.SCHEMES`
        has their sources. For a `SeparableHNN` those that can be are explicit: "implicit-leapfrog" is "leapfrog".
    energy : bool
        Also return H at every state.
    states : str
        "all", or "final": then what the call costs depends on the latent size only at its two ends.
    memory : str
        What is kept for the backward pass: "store" (every layer's values), "recompute" (the first layer's at each
        sub-step), "checkpoint" (the first layer's, every sqrt(n_steps) steps). Less memory, more time; same gradients.
        "reversible" keeps at most eight states of a rollout, however long, and rebuilds the others by stepping back, which
        takes a reversible integrator; where that turns out to have lost accuracy it warns and computes those steps again.
        A `SeparableHNN` takes "reversible" for "checkpoint" where the integrator is not reversible. Where "store" would take
        more than half a GiB the C++ backend keeps no layer's values and goes forward again, a few rows at a time.
    tolerance : float, optional
        Of implicit integrators: the largest residual (see `Solve`) that counts as solved; by default four units of rounding.
    max_evaluations : int
        Of implicit integrators: the most gradients of H that one implicit point may take.
    unconverged : str
        What a point that is not solved leads to: "raise", or "flag", which leaves it to the caller to look at `.solve`. Then a
        warning tells of inexact gradients on a CPU alone, since on a device the host would wait for what it says.
    omega : float
        Of "tao": how strongly its two copies of the state are coupled.
    control : Tensor [..., m] or [..., n_steps, m], optional
        u, held throughout, or over each step where it has more dimensions than z0: through the port of a `PortHNN`, or as an
        input of H (`control_dim`). The energy of H(z, u) at a state is that under the step which starts there, and at the last
        state under the last step.
    condition : Tensor [..., c], optional
        An input of H (`condition_dim`) that holds throughout. Leading sizes of z0, control and condition are broadcast.
    backend : str
        "auto" (the fastest that is there, see `available_backends`; if that is plain PyTorch because something that can be
        installed is missing, one warning in a process says what), "cpp", "triton", "cuda", "torch", or "reference" (nested
        autograd, of any module; it knows no `memory`). Whatever the backend, tangents (forward mode) and second derivatives
        run in PyTorch operations, on the states themselves, and not in graphs of torch.compile.
        "triton" runs a rollout as one kernel each way, and leaves "rk4", "tao" and float64 to PyTorch operations; "cuda"
        runs "leapfrog" and "euler" as one kernel each way, for at most 400 samples in float32 or bfloat16, and leaves
        everything else to "triton", or to "torch" where that is missing. A `SeparableHNN` runs in "cpp", or in PyTorch
        operations: on a GPU, under "tao", and under integrators that stay implicit for it.
        A product of float32 in "triton" is three of TF32, as exact, or one under `torch.set_float32_matmul_precision("high")`.

    Returns
    -------
    Rollout
        `.states` [..., n_steps + 1, 2d] (or [..., 2d]) and `.energy` [..., n_steps + 1] or None, both differentiable with
        respect to z0, dt and every parameter of `hnn`; `.solve`.

    Raises
    ------
    TypeError, ValueError
        An argument that cannot be used; the message shows it. `NotFusedError` is both: a backend other than "reference" was
        asked for by name, and the module is none of those that it can run.
    ConvergenceError
        dt is too large for an implicit integrator; the message names the largest residual. Tangents and second derivatives
        take plain iteration to converge.
    RuntimeError
        A backend asked for by name that is not there.

    Notes
    -----
    A row's result depends on the batch it is in, and gradients of parameters on the number of threads, to rounding: sums
    are taken in another order. A row that is not finite leaves the other rows' states as they are, but makes every
    parameter's gradient not finite. Rows that start out not finite do not raise an error, from implicit integrators either.
    Under autocast a rollout runs in float32.
    """
    validation.check_choice(backend, BACKENDS, "backend")
    hnn = getattr(hnn, "_orig_mod", hnn)  # of torch.compile
    if isinstance(hnn, PortHNN) or control is not None or condition is not None:
        run = functools.partial(
            rolling.rollout, integrator=integrator, memory=memory, backend=backend, tolerance=tolerance,
            max_evaluations=max_evaluations, unconverged=unconverged, omega=omega,
        )  # fmt: skip
        return driven.with_inputs(hnn, z0, dt, n_steps, control, condition, run, energy, states)
    mlp = hamiltonian.of_any_module(hnn, z0, backend)
    return rolling.rollout(
        mlp, z0, dt, n_steps, integrator=integrator, energy=energy, states=states, memory=memory, backend=backend,
        tolerance=tolerance, max_evaluations=max_evaluations, unconverged=unconverged, omega=omega,
    )  # fmt: skip


def available_backends(z0: Tensor | None = None) -> dict[str, str]:
    """Every backend's name, and "available" or what it lacks.

    Parameters
    ----------
    z0 : Tensor [..., 2d], optional
        Initial states, of which only shape and device count. Then a backend that cannot run them says so, and "auto" names
        the one that `rollout` would take.
    """
    if z0 is not None:
        if not isinstance(z0, Tensor) or z0.ndim == 0:
            raise TypeError(f"z0 must be a tensor [..., 2d], found {z0!r}")
        return {name: _state(name, z0.reshape(-1, z0.shape[-1])) for name in BACKENDS}
    optional = {
        name: "available" if module.available() else module.why_not()
        for name, module in (("cpp", cpp), ("triton", triton), ("cuda", cuda))
    }
    return {"reference": "available", "torch": "available", **optional}


def _state(backend: str, z0: Tensor) -> str:
    try:
        choice = choose_backend(backend, z0)
    except RuntimeError as error:
        return str(error)
    return choice if backend == "auto" else "available"


def leapfrog(
    hnn: nn.Module,
    z0: Tensor,
    dt: float | Tensor,
    n_steps: int,
    control: Tensor | None = None,
    condition: Tensor | None = None,
) -> Tensor:
    """Leapfrog trajectory of an MLP Hamiltonian: kick, drift, kick (H-JEPA, Algorithm 1).

    p' = p - dt/2 Hq(q, p);  q+ = q + dt Hp(q, p');  p+ = p' - dt/2 Hq(q+, p').

    Arguments as for `rollout`. Returns the states [..., n_steps + 1, 2d], z0 first.
    """
    return rollout(hnn, z0, dt, n_steps, integrator="leapfrog", control=control, condition=condition).states


def energy(hnn: nn.Module, z: Tensor, *, control: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
    """H(z) of an MLP Hamiltonian: [..., 2d] to [...], differentiable; H(z, u, c) where it takes a control or a condition.

    Raises
    ------
    TypeError, ValueError
        As for `rollout`.
    """
    hnn = getattr(hnn, "_orig_mod", hnn)  # of torch.compile
    x = driven.given(hnn, z, "reference", control, condition)
    rows = x.z.reshape(-1, x.z.shape[-1])
    return x.under(x.control).energy(rows).reshape(x.z.shape[:-1])
