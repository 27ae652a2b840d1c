"""The operators as PyTorch citizens: opcheck, torch.compile, export, autocast, DDP, and what they refuse."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
import torch._dynamo.testing
import torch.multiprocessing as multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.adamw import adamw

import hjepa_fast as hf
from hjepa_fast import hamiltonian, ops
from hjepa_fast.hidden_space import coupling
from hjepa_fast.testing import BOUNDED_SLOPES, make_hnn, make_states

FUSED = ("torch", "cpp")
MEMORY = ("store", "recompute", "checkpoint")


def gradients(hnn, z0, dt, n_steps, seed=5, **options):
    """States and energy, and the gradients of a random linear function of them, as one flat list."""
    out = hf.rollout(hnn, z0, dt, n_steps, energy=True, **options)
    generator = torch.Generator().manual_seed(seed)
    weighted = sum((x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum() for x in out[:2])
    inputs = [t for t in (z0, dt, *hnn.parameters()) if isinstance(t, torch.Tensor) and t.requires_grad]
    return [*out[:2], *torch.autograd.grad(weighted, inputs, allow_unused=True, materialize_grads=True)]


def assert_all_close(found, expected, **tolerance):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("integrator", ["leapfrog", "euler"])
@pytest.mark.parametrize("states", ["all", "final"])
def test_values_and_gradients_match_the_reference(backend, memory, integrator, states):
    for activation, widths in itertools.product(BOUNDED_SLOPES, [(), (5,), (7, 6), (6, 5, 9)]):
        hnn = make_hnn(6, widths, activation)
        z0 = make_states(3, 6).requires_grad_()
        dt = torch.linspace(0.2, 0.6, 5, dtype=torch.float64).requires_grad_()
        options = {"integrator": integrator, "states": states}
        found = gradients(hnn, z0, dt, 5, backend=backend, memory=memory, **options)
        assert_all_close(found, gradients(hnn, z0, dt, 5, backend="reference", **options), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backend", FUSED)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_odd_shapes_match_the_reference(backend, data):
    """Any width, depth, batch, number of steps, latent size, layout of z0 and shape of dt."""
    draw = data.draw
    d, batch, n_steps = draw(st.integers(1, 19)), draw(st.integers(0, 9)), draw(st.integers(0, 6))
    hnn = make_hnn(2 * d, draw(st.lists(st.integers(1, 37), max_size=4)), draw(st.sampled_from(BOUNDED_SLOPES)))
    z0 = make_states(2 * d, batch).T if draw(st.booleans()) else make_states(batch, 2 * d)
    shape = draw(st.sampled_from([(), (n_steps,), (batch, 1), (batch, n_steps)]))
    z0, dt = z0.requires_grad_(), (make_states(*shape, seed=3) * 0.3).requires_grad_()
    options = {"integrator": draw(st.sampled_from(["leapfrog", "euler"])), "states": draw(st.sampled_from(["all", "final"]))}
    found = gradients(hnn, z0, dt, n_steps, backend=backend, memory=draw(st.sampled_from(MEMORY)), **options)
    assert_all_close(found, gradients(hnn, z0, dt, n_steps, backend="reference", **options), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("memory", MEMORY)
def test_float32_error_is_at_most_twice_the_reference(backend, memory):
    """States, energies and each gradient against float64, on the paper's widths."""
    hnn = make_hnn(64, (512, 512, 256), dtype=torch.float32)
    exact = make_hnn(64, (512, 512, 256))
    z0, dt = make_states(9, 64).requires_grad_(), torch.full((9, 15), 0.7, dtype=torch.float64, requires_grad=True)
    z32, dt32 = (t.detach().float().requires_grad_() for t in (z0, dt))
    truth = gradients(exact, z0, dt, 15, backend="reference")
    eager = gradients(hnn, z32, dt32, 15, backend="reference")
    fused = gradients(hnn, z32, dt32, 15, backend=backend, memory=memory)
    for f, e, t in zip(fused, eager, truth, strict=True):
        error, allowed = (x.double().sub(t).norm() / t.norm() for x in (f, e))
        assert error <= 2 * allowed + 1e-7


@pytest.mark.parametrize("backend", FUSED)
def test_bfloat16_error_is_at_most_twice_the_reference(backend):
    hnn = make_hnn(64, (128, 128, 64), dtype=torch.bfloat16)
    exact = make_hnn(64, (128, 128, 64))
    exact.load_state_dict({k: v.double() for k, v in hnn.state_dict().items()})
    z0 = make_states(9, 64, dtype=torch.bfloat16).requires_grad_()
    truth = gradients(exact, z0.detach().double().requires_grad_(), 0.5, 5, backend="reference")
    eager = gradients(hnn, z0, 0.5, 5, backend="reference")
    fused = gradients(hnn, z0, 0.5, 5, backend=backend)
    for f, e, t in zip(fused, eager, truth, strict=True):
        assert f.dtype == torch.bfloat16
        error, allowed = (x.double().sub(t).norm() / t.norm() for x in (f, e))
        assert error <= 2 * allowed + 2**-8


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("memory", [*MEMORY, "none"])
def test_opcheck(backend, memory):
    H = hamiltonian.from_module(make_hnn(6, (5, 4), dtype=torch.float32))
    driven = [("pair", "rayleigh,1,,0")] if memory in ("store", "recompute", "none") else []
    for how, drive in [("dense", ""), ("pair", ""), *driven]:
        z0 = make_states(3, 6, dtype=torch.float32).requires_grad_(memory != "none")
        externals = [torch.full((1, 1, 3), 0.1), torch.rand(3, 4, 3)] if drive else []
        parameters = [p.detach().requires_grad_(memory != "none") for p in (*H.tensors, *externals)]
        dt = torch.full((1, 1), 0.3, requires_grad=memory != "none")
        attributes = (
            4, ops.text_of(H.terms), ops.softplus_of(H.terms), "leapfrog", how, True, True, memory, 1e-6, 50, True, 1.0,
            backend, drive,
        )  # fmt: skip
        torch.library.opcheck(torch.ops.hjepa_fast.rollout.default, (z0, parameters, dt, *attributes))
        if memory != "none":
            z0, dt, *parameters = (t.detach() for t in (z0, dt, *parameters))
            states, energy, tape, kept, *_ = torch.ops.hjepa_fast.rollout(z0, parameters, dt, *attributes)
            cotangents = torch.randn_like(states), torch.randn_like(energy)
            torch.library.opcheck(
                torch.ops.hjepa_fast.rollout_backward.default,
                (*cotangents, tape, kept, z0, parameters, dt, True, *attributes),
                test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
            )


@pytest.mark.parametrize("backend", FUSED)
def test_gradients_that_are_not_needed_are_not_given(backend):
    hnn = make_hnn(6, (5, 4)).requires_grad_(False)
    z0 = make_states(3, 6).requires_grad_()
    found = gradients(hnn, z0, 0.3, 4, backend=backend)
    assert_all_close(found, gradients(hnn, z0, 0.3, 4, backend="reference"))
    hnn.net[2].bias.requires_grad_()
    found = gradients(hnn, z0.detach(), 0.3, 4, backend=backend)
    assert len(found) == 3
    assert_all_close(found, gradients(hnn, z0.detach(), 0.3, 4, backend="reference"))


@pytest.mark.parametrize("backend", FUSED)
def test_states_or_energy_alone_can_be_differentiated(backend):
    hnn = make_hnn(6, (5, 4))
    z0 = make_states(3, 6).requires_grad_()
    for which in ("states", "energy"):
        grads = [
            torch.autograd.grad(getattr(hf.rollout(hnn, z0, 0.3, 4, energy=True, backend=b), which).square().sum(), z0)[0]
            for b in (backend, "reference")
        ]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", FUSED)
def test_a_second_derivative(backend):
    hnn, z0 = make_hnn(6, (5,)), make_states(3, 6).requires_grad_()
    found = []
    for b in (backend, "reference"):
        loss = hf.rollout(hnn, z0, 0.3, 2, backend=b).states.sin().sum()
        (first,) = torch.autograd.grad(loss, z0, create_graph=True)
        found.append(torch.autograd.grad(first.sum(), [z0, *hnn.parameters()], allow_unused=True, materialize_grads=True))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y)


def test_what_is_kept_for_the_backward_pass(monkeypatch):
    """Numbers per sample, by the definitions of the modes; none without gradients."""
    hnn, z0 = make_hnn(6, (8, 4)), make_states(3, 6).requires_grad_()

    def kept(memory):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel() if t.shape[:1] == (3,) else 0), lambda _: None
        ):
            hf.rollout(hnn, z0, 0.3, 16, backend="torch", memory=memory)
        return (sum(sizes) - z0.numel()) // 3

    h, sub_steps = 8, 3 * 16
    monkeypatch.setattr(coupling, "forced", "pair")
    assert kept("store") == sub_steps * (8 + 4 + 8)
    assert kept("recompute") == sub_steps * h
    assert kept("checkpoint") == 4 * (h + 6)
    monkeypatch.setattr(coupling, "forced", "dense")
    assert kept("store") == sub_steps * (8 + 4 + 8) + 16 * 2 * h
    assert kept("recompute") == sub_steps * h + 16 * 2 * h
    assert kept("checkpoint") == 4 * 3 * h
    with torch.no_grad():
        assert not hf.rollout(hnn, z0, 0.3, 4).states.requires_grad


class TrainingStep:
    """Rollout, loss with the energy term, backward and AdamW, as one function of a batch."""

    def __init__(self, backend):
        torch.manual_seed(3)
        self.model = hf.SymplecticIntegrator(hf.LatentHNN(8, (16, 12)), dt=0.5, backend=backend)
        self.params = list(self.model.parameters())
        self.moments = [[torch.zeros_like(p) for p in self.params] for _ in range(2)]
        self.counts = [torch.zeros(()) for _ in self.params]

    def __call__(self, batch):
        model = self.model
        out = hf.rollout(model.hnn, batch[:, 0], model.step_size, 5, energy=True, backend=model.backend)
        loss = (out.states[:, 1:] - batch[:, 1:]).square().mean() + 0.3 * (out.energy[:, 1:] - out.energy[:, :1]).abs().mean()
        grads = torch.autograd.grad(loss, self.params)
        with torch.no_grad():  # the function behind torch.optim.AdamW, whose own step breaks the graph on purpose
            adamw(
                self.params, list(grads), *self.moments, [], self.counts, foreach=False, capturable=False, amsgrad=False,
                beta1=0.9, beta2=0.999, lr=1e-2, weight_decay=1e-5, eps=1e-3, maximize=False,
            )  # fmt: skip
        return loss.detach()


@pytest.mark.parametrize(("backend", "compiler"), [("torch", "aot_eager"), ("cpp", "aot_eager"), ("cpp", "inductor")])
def test_a_whole_training_step_compiles_into_one_graph(backend, compiler):
    eager, step = TrainingStep(backend), TrainingStep(backend)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(step, fullgraph=True, backend=compiler)
        for size in (4, 7, 5, 4):
            batch = make_states(size, 6, 8, dtype=torch.float32, seed=size)
            torch.testing.assert_close(compiled(batch), eager(batch), rtol=1e-5, atol=1e-6)
    assert_all_close(step.params, eager.params, rtol=1e-3, atol=1e-5)


def test_compiled_loss_and_ordinary_backward():
    """What most training loops do: the compiled function gives a loss, the loop calls backward and the optimizer."""
    torch.manual_seed(3)
    model = hf.SymplecticIntegrator(hf.LatentHNN(8, (16, 12)), dt=0.5)
    batch = make_states(4, 6, 8, dtype=torch.float32)

    def loss_of(batch):
        out = hf.rollout(model.hnn, batch[:, 0], model.step_size, 5, energy=True)
        return (out.states - batch).square().mean() + (out.energy - out.energy[:, :1]).abs().mean()

    results = []
    for function in (loss_of, torch.compile(loss_of, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        loss = function(batch)
        loss.backward()
        results.append([loss.detach(), *[p.grad.clone() for p in model.parameters()]])
    assert_all_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_dynamic_batches_do_not_recompile():
    hnn = make_hnn(8, (16,), dtype=torch.float32)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda z: hf.leapfrog(hnn, z, 0.3, 4).square().sum(), backend=counter, dynamic=True)
    for batch in (3, 5, 8, 13):
        compiled(make_states(batch, 8, dtype=torch.float32))
    assert counter.frame_count == 1


def test_export():
    class Predictor(nn.Module):
        def __init__(self):
            super().__init__()
            self.integrator = hf.SymplecticIntegrator(make_hnn(8, (16,), dtype=torch.float32), dt=0.4)

        def forward(self, z):
            return self.integrator.rollout(z, 6)

    module, z = Predictor(), make_states(5, 8, dtype=torch.float32)
    program = torch.export.export(module, (z,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert "hjepa_fast.rollout" in program.graph_module.code
    other = make_states(11, 8, dtype=torch.float32)
    torch.testing.assert_close(program.module()(other), module(other))


@pytest.mark.parametrize("backend", FUSED)
def test_autocast_keeps_float32(backend):
    hnn, z0 = make_hnn(8, (16,), dtype=torch.float32), make_states(5, 8, dtype=torch.float32).requires_grad_()
    plain = gradients(hnn, z0, 0.4, 5, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = hf.rollout(hnn, z0, 0.4, 5, energy=True, backend=backend)
        low = nn.functional.linear(z0, hnn.net[0].weight)
        inside = gradients(hnn, z0, 0.4, 5, backend=backend)
    assert low.dtype == torch.bfloat16
    assert out.states.dtype == torch.float32
    assert_all_close(inside, plain)


@pytest.mark.parametrize("backend", FUSED)
def test_no_grad_and_inference_mode(backend):
    hnn, z0 = make_hnn(8, (16,)), make_states(5, 8)
    expected = hf.rollout(hnn, z0, 0.4, 5, energy=True, backend="reference")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = hf.rollout(hnn, z0, 0.4, 5, energy=True, backend=backend)
            assert not out.states.requires_grad
            assert_all_close(out, expected)


def _ddp_worker(rank, folder, whole):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = hf.SymplecticIntegrator(hf.LatentHNN(8, (16,)), dt=0.5)
    parallel = nn.parallel.DistributedDataParallel(model)
    batch = whole[rank::2]
    parallel(batch[:, 0], 5).sub(batch).square().mean().backward()
    torch.save([p.grad for p in model.parameters()], f"{folder}/grads{rank}.pt")
    torch.distributed.barrier()
    # gloo's destructor waits for a thread of its own with the interpreter's lock held, which that thread may be waiting for
    os._exit(0)


def test_ddp_on_two_processes_averages_gradients(tmp_path):
    whole = make_states(6, 6, 8, dtype=torch.float32)
    multiprocessing.spawn(_ddp_worker, (str(tmp_path), whole), nprocs=2)
    torch.manual_seed(0)
    model = hf.SymplecticIntegrator(hf.LatentHNN(8, (16,)), dt=0.5)
    model(whole[:, 0], 5).sub(whole).square().mean().backward()
    for rank in range(2):
        grads = torch.load(tmp_path / f"grads{rank}.pt")
        assert_all_close(grads, [p.grad for p in model.parameters()], rtol=1e-4, atol=1e-6)


def test_the_state_never_decides_the_size_of_the_loop():
    """With the final state only, the operator's kept numbers do not depend on the latent size."""
    sizes = set()
    for d in (4, 64):
        H = hamiltonian.from_module(make_hnn(d, (8, 4)))
        attributes = (
            9, ops.text_of(H.terms), ops.softplus_of(H.terms), "leapfrog", "dense", False, False, "store", 1e-6, 50, True, 1.0,
            "torch", "",
        )  # fmt: skip
        dt = torch.full((1, 1), 0.1, dtype=torch.float64)
        _, _, tape, kept, *_ = torch.ops.hjepa_fast.rollout(make_states(2, d), H.tensors, dt, *attributes)
        sizes.add((tape.shape, kept.shape))
    assert len(sizes) == 1


def test_backends_are_named_with_what_they_lack(monkeypatch):
    from hjepa_fast.backends import cpp

    assert hf.available_backends()["reference"] == "available"
    monkeypatch.setattr(cpp, "available", lambda: False)
    hnn, z0 = make_hnn(4, (6,)), make_states(3, 4)
    with pytest.raises(RuntimeError, match='backend "cpp" is not there'):
        hf.rollout(hnn, z0, 0.1, 2, backend="cpp")
    torch.testing.assert_close(hf.leapfrog(hnn, z0, 0.1, 2), hf.rollout(hnn, z0, 0.1, 2, backend="torch").states)
    assert hf.available_backends()["cpp"] != "available"


def test_backends_tell_what_auto_takes_for_given_states(monkeypatch):
    """And nothing else: what runs, and what is refused, is the same."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from hjepa_fast.backends import cpp, cuda, triton

    z0 = make_states(2, 3, 4)
    monkeypatch.setattr(cuda, "available", lambda: False)  # where it is, "auto" takes it
    for built, choice in ((True, "cpp"), (False, "torch")):
        monkeypatch.setattr(cpp, "available", lambda built=built: built)
        found = hf.available_backends(z0)
        assert found["auto"] == choice
        assert found["reference"] == found["torch"] == "available"
        assert (found["cpp"] == "available") is built
        assert found.keys() - {"auto"} == hf.available_backends().keys()
    with FakeTensorMode():
        on_gpu = torch.empty(5, 4, device="cuda")
    monkeypatch.setattr(cpp, "available", lambda: True)
    for there, choice in ((True, "triton"), (False, "torch")):
        monkeypatch.setattr(triton, "available", lambda there=there: there)
        found = hf.available_backends(on_gpu)
        assert found["auto"] == choice
        assert (found["triton"] == "available") is there
        assert "runs on the CPU, z0 is on cuda" in found["cpp"]


def test_prediction_follows_weights_changed_behind_pytorchs_back():
    """The product K is remembered between calls; any change of the weights, however made, must be seen."""
    hnn, z0 = make_hnn(6, (5, 4)), make_states(3, 6)
    with torch.no_grad():
        for change in (
            lambda w: None,
            lambda w: w.data.mul_(1.5),
            lambda w: w.detach().numpy().__imul__(0.5),
            lambda w: w.neg_(),
        ):
            change(hnn.net[0].weight)
            expected = hf.rollout(hnn, z0, 0.3, 4, backend="reference").states
            for _ in range(2):
                torch.testing.assert_close(hf.rollout(hnn, z0, 0.3, 4, backend="torch").states, expected)


@pytest.mark.parametrize("name", ["dt", "omega", "tolerance", "max_evaluations"])
def test_numbers_may_change_between_calls_of_a_compiled_graph(name):
    hnn, z = make_hnn(4, (5,)), make_states(3, 4)

    def run(z, x):
        options = {"dt": 0.1, "integrator": {"dt": "leapfrog", "omega": "tao"}.get(name, "implicit-midpoint"), name: x}
        return hf.rollout(hnn, z, n_steps=2, **options).states

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for x in {"tolerance": (1e-4, 1e-6, 1e-8), "max_evaluations": (30, 40, 50)}.get(name, (0.1, 0.2, 0.3, 1)):
        torch.testing.assert_close(compiled(z, x), run(z, x))


def test_a_horizon_may_grow_in_a_compiled_graph():
    hnn, z = make_hnn(4, (5,)), make_states(3, 4)
    compiled = torch.compile(lambda z, n: hf.leapfrog(hnn, z, 0.1, n), fullgraph=True, backend="aot_eager")
    for n in range(1, 12):  # more than the graphs that PyTorch makes of one function
        torch.testing.assert_close(compiled(z, n), hf.leapfrog(hnn, z, 0.1, n))


@pytest.mark.parametrize("make", [lambda: hf.LatentHNN(4, (8,)), lambda: hf.SeparableHNN(4, (8,), quadratic=True)])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_latents_of_autocast(make, low):
    """They come out of other layers in a low precision; the rollout runs in float32, as it does without autocast."""
    hnn, z = make(), torch.randn(3, 4).to(low)
    expected = hf.leapfrog(hnn, z.float(), 0.1, 3)
    leaf = z.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(hf.leapfrog(hnn, z, 0.1, 3), expected, rtol=0, atol=0)
        assert hf.energy(hnn, z).dtype == hnn(z).dtype
        hf.SymplecticIntegrator(hnn)(leaf, 2).sum().backward()
    assert leaf.grad.dtype == low
    assert all(p.grad.dtype == torch.float32 for p in hnn.parameters() if p.requires_grad and p.grad is not None)
    with pytest.raises(TypeError, match="share one dtype|must be float32"):
        hf.leapfrog(hnn, z, 0.1, 3)
