"""A module is computed exactly: read into the fused operators where its forward is its layers, else run as it is, and said."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.utils.parametrizations as parametrizations
from torch import nn
from torch.nn.utils import prune

import hjepa_fast as hf
from hjepa_fast import reader
from hjepa_fast.errors import NotFusedError
from hjepa_fast.testing import make_states

Z = torch.tensor([[0.3, -0.2, 0.5, 0.1], [-0.4, 0.6, 0.2, -0.7], [0.1, 0.9, -0.3, 0.4]], dtype=torch.float64)


def textbook(module: nn.Module, z: torch.Tensor, dt: float = 0.1, n: int = 2) -> torch.Tensor:
    """The published step as anyone would write it, on the module's own forward."""
    q, p = z.chunk(2, -1)

    def gradients() -> tuple[torch.Tensor, torch.Tensor]:
        a, b = q.detach() if not q.requires_grad else q.view_as(q), p.detach() if not p.requires_grad else p.view_as(p)
        a, b = (x if x.requires_grad else x.requires_grad_() for x in (a, b))
        return torch.autograd.grad(module(torch.cat((a, b), -1)).sum(), (a, b), create_graph=True)

    for _ in range(n):
        p = p - dt / 2 * gradients()[0]
        q = q + dt * gradients()[1]
        p = p - dt / 2 * gradients()[0]
    return torch.cat((q, p), -1)


def mlp(*between: nn.Module) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), *between, nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1)).double()


class Holder(nn.Module):
    def __init__(self, net: nn.Module | None = None, **attributes: object) -> None:
        super().__init__()
        self.net = mlp() if net is None else net
        for name, value in attributes.items():
            setattr(self, name, value)


def holding(forward: object, **attributes: object) -> nn.Module:
    return type("Own", (Holder,), {"forward": forward})(**attributes)


class Plain(Holder):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """H(x)."""
        return self.net(x)


class Squeezed(Holder):
    def forward(self, z):
        energy = self.net(z)
        return energy.squeeze(-1)


class Indexed(Holder):
    def forward(self, z):
        return self.net(z)[:, 0]


class Checks(Holder):
    def forward(self, z):
        if z.ndim != 2 or z.shape[-1] != 4 or z.dtype != torch.float64:
            raise ValueError("no")
        q, p = z.chunk(2, dim=-1)
        return self.net(torch.cat([q, p], dim=-1)).view(-1)


class Loops(Holder):
    def forward(self, z):
        h = z.to(self.net[0].weight.dtype) if hasattr(self, "never") else z.contiguous()
        for layer in self.net:
            h = layer(h)
        return h


class Counts(Holder):
    calls = 0

    def forward(self, z):
        self.calls += 1
        return self.net(z)


class Super(nn.Sequential):
    def forward(self, input):
        return super().forward(input).flatten()


class Promises(Holder):
    forward_is_net = True

    def forward(self, q, p):
        return self.net(torch.cat((q, p), -1))


class Field(Holder):
    """As in hamiltonian-nn: forward gives the vector field."""

    def forward(self, z):
        with torch.enable_grad():
            z = z.requires_grad_() if z.is_leaf else z
            Hq, Hp = torch.autograd.grad(self.net(z).sum(), z, create_graph=True)[0].chunk(2, -1)
        return torch.cat((Hp, -Hq), -1)


def wrapped(wrap) -> nn.Module:
    module = Plain()
    for layer in module.net:
        if isinstance(layer, nn.Linear):
            wrap(layer)
    return module


READ = {
    "plain": Plain,
    "squeezed": Squeezed,
    "indexed": Indexed,
    "checks its argument": Checks,
    "loops over its layers": Loops,
    "counts its calls": Counts,
    "subclass of Sequential": lambda: Super(*mlp()),
    "a Sequential of Sequentials": lambda: nn.Sequential(mlp()[:2], nn.Identity(), nn.Sequential(mlp()[2:4], mlp()[4])),
    "Identity": lambda: mlp(nn.Identity()),
    "Identity, in a loop over the layers": lambda: Loops(mlp(nn.Identity(), nn.Dropout(0.0))),
    "nested, in a loop over the layers": lambda: Loops(nn.Sequential(mlp()[:3], mlp()[3:])),
    "Dropout that is off": lambda: mlp(nn.Dropout(0.5)).eval(),
    "Dropout(0)": lambda: mlp(nn.Dropout(0.0)),
    "Flatten": lambda: nn.Sequential(nn.Flatten(), *mlp(), nn.Flatten(0)),
    "weight_norm": lambda: wrapped(parametrizations.weight_norm),
    "older weight_norm": lambda: wrapped(lambda layer: warnings.simplefilter("ignore") or nn.utils.weight_norm(layer)),
    "older spectral_norm, eval": lambda: wrapped(nn.utils.spectral_norm).eval(),
    "pruned": lambda: wrapped(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
    "torch.compile": lambda: torch.compile(Plain()),
    "compiled in place": lambda: (m := Plain(), m.compile())[0],
}


def gradients_of(states: torch.Tensor, module: nn.Module) -> list[torch.Tensor]:
    wanted = [p for p in module.parameters() if p.requires_grad]
    found = torch.autograd.grad(states.square().sum(), wanted, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True)]


def assert_is_textbook(module: nn.Module) -> None:
    keys, original = module.state_dict().keys(), getattr(module, "_orig_mod", module)
    states = hf.rollout(module, Z, 0.1, 2).states[:, -1]
    original._compiled_call_impl = None  # the textbook's nested autograd is not for graphs
    expected = textbook(original, Z)
    torch.testing.assert_close(states, expected, rtol=1e-12, atol=1e-13)
    for found, wanted in zip(gradients_of(states, module), gradients_of(expected, module), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(hf.energy(module, Z), original(Z).reshape(3), rtol=1e-12, atol=1e-13)
    assert module.state_dict().keys() == keys


@pytest.mark.parametrize("kind", READ)
def test_what_is_read_is_the_module(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        module = READ[kind]()
        warnings.simplefilter("error", UserWarning)
        assert_is_textbook(module)
        hf.rollout(module, Z, 0.1, 2, backend="torch")


def test_a_wrapper_that_changes_its_weights_at_every_call_does_so_once_a_rollout():
    module = wrapped(nn.utils.spectral_norm)  # training mode: a power iteration at every forward
    twin = copy.deepcopy(module)
    states = hf.rollout(module, Z, 0.1, 2).states[:, -1]
    twin(Z)
    for (name, mine), theirs in zip(module.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)
    torch.testing.assert_close(states, textbook(twin.eval(), Z))


def test_reading_leaves_the_module_alone():
    module = Counts()
    before = dict(module.__dict__)
    hf.leapfrog(module, Z, 0.1, 1)
    assert module.__dict__ == before
    assert module.calls == 0


class Scaled(Holder):
    def __init__(self, scale=1.0):
        super().__init__(scale=nn.Parameter(torch.tensor(scale).double()))

    def forward(self, z):
        return self.net(z) * self.scale


class Normalised(Holder):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4).double())
        self.register_buffer("std", torch.ones(4).double())

    def forward(self, z):
        return self.net((z - self.mean) / self.std)


class PlusQuadratic(Holder):
    def __init__(self):
        super().__init__(alpha=nn.Parameter(torch.zeros(()).double()))

    def forward(self, z):
        return self.net(z) + 0.5 * self.alpha * (z * z).sum(-1, keepdim=True)


class OrderPQ(Holder):
    def forward(self, z):
        q, p = z.chunk(2, -1)
        return self.net(torch.cat((p, q), -1))


class Clamps(Holder):
    def forward(self, z):
        return self.net(z.clamp(-10, 10))


class Flagged(Holder):
    """A branch that is not taken until something else sets the flag."""

    doubled = False

    def forward(self, z):
        if self.doubled:
            return 2 * self.net(z)
        return self.net(z)


class LooksAtTheBatch(Holder):
    def forward(self, z):
        return 2 * self.net(z) if len(z) == 1 or z.shape[0] > 500 else self.net(z)


class Calls(Plain):
    def __call__(self, z):
        return 3 * super().__call__(z)


class NetOfTheDay(nn.Module):
    """`.net` is not what forward calls."""

    def __init__(self):
        super().__init__()
        self.net, self.other = mlp(), mlp()
        self.other[0].weight.data.mul_(2)

    def forward(self, z):
        return self.other(z)


class SkipsALayer(Holder):
    def forward(self, z):
        return self.net[4](self.net[3](self.net[2](self.net[0](z))))


class LeavesOutTheLast(Holder):
    """In a network of which a layer computes nothing the others would still be as many as were run."""

    def forward(self, z):
        return self.net[3](self.net[2](self.net[1](self.net[0](z))))[:, :1]


class Reversed(Holder):
    def forward(self, z):
        return self.net(z).flip(0).flip(0)


class PartlyHeadless(Holder):
    def forward(self, z):
        return self.net(z)[..., 0] + self.net(z)[..., -1]


class Separate(nn.Module):
    """As in hamiltonian-nn: no container at all."""

    def __init__(self):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(4, 6).double(), nn.Linear(6, 1, bias=False).double()

    def forward(self, z):
        return self.linear2(torch.tanh(self.linear1(z)))


class LoRA(nn.Linear):
    def __init__(self, i, o):
        super().__init__(i, o, dtype=torch.float64)
        self.A, self.B = nn.Parameter(torch.randn(2, i).double()), nn.Parameter(torch.randn(o, 2).double())

    def forward(self, x):
        return super().forward(x) + x @ self.A.T @ self.B.T


class ThreeTimes(nn.Sequential):
    def forward(self, x):
        return 3 * super().forward(x)


class IteratesOtherwise(nn.Sequential):
    def __iter__(self):
        return iter(list(super().__iter__())[:3])


class OwnSeparable(hf.SeparableHNN):
    def forward(self, z):
        return 2 * super().forward(z)


def hooked(register, of="module"):
    def make() -> nn.Module:
        module = Plain()
        target = {"module": module, "net": module.net, "layer": module.net[0], "activation": module.net[1]}[of]
        register(target)
        return module

    return make


def replaced(of):
    def make() -> nn.Module:
        module = Plain()
        target = {"module": module, "net": module.net, "layer": module.net[0]}[of]
        function = type(target).forward
        target.forward = lambda x: 4 * function(target, x)
        return module

    return make


NOT_READ = {
    "a scale that is 1": Scaled,
    "a scale": lambda: Scaled(3.0),
    "statistics that are neutral": Normalised,
    "a coefficient that is 0": PlusQuadratic,
    "the order (p, q)": OrderPQ,
    "a clamp": Clamps,
    "a look at the size of the batch": LooksAtTheBatch,
    "another network": NetOfTheDay,
    "a layer left out": SkipsALayer,
    "the last layer left out": lambda: LeavesOutTheLast(
        nn.Sequential(nn.Linear(4, 5), nn.Identity(), nn.Tanh(), nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    ),
    "a dance that PyTorch would undo": Reversed,
    "the sum of two outputs": PartlyHeadless,
    "a __call__": Calls,
    "no container": Separate,
    "a Sequential with a forward": lambda: ThreeTimes(*mlp()),
    "a Sequential that iterates otherwise": lambda: nn.Sequential(IteratesOtherwise(*mlp()[:4]), nn.Linear(3, 1).double()),
    "a Sequential with a forward inside": lambda: nn.Sequential(ThreeTimes(mlp()[:2]), *mlp()[2:]),
    "such a Sequential as .net": lambda: Plain(ThreeTimes(*mlp())),
    "a layer with more than its weight": lambda: nn.Sequential(LoRA(4, 5), nn.Tanh(), nn.Linear(5, 1).double()),
    "another activation": lambda: nn.Sequential(nn.Linear(4, 5), nn.Mish(), nn.Linear(5, 1)).double(),
    "a layer norm": lambda: mlp(nn.LayerNorm(5)).double(),
    "a separable H with a forward of its own": lambda: OwnSeparable(4, (5,), (3,)).double(),
    "a hook": hooked(lambda m: m.register_forward_hook(lambda *a: 3 * a[2])),
    "a pre-hook": hooked(lambda m: m.register_forward_pre_hook(lambda m, a: (2 * a[0],))),
    "a hook of .net": hooked(lambda m: m.register_forward_hook(lambda *a: 3 * a[2]), "net"),
    "a hook of a layer": hooked(lambda m: m.register_forward_hook(lambda *a: 3 * a[2]), "layer"),
    "a hook of an activation": hooked(lambda m: m.register_forward_pre_hook(lambda m, a: (2 * a[0],)), "activation"),
    "a backward hook": hooked(lambda m: m.register_full_backward_hook(lambda m, gi, go: (2 * gi[0],)), "layer"),
    "another forward": replaced("module"),
    "another forward of .net": replaced("net"),
    "another forward of a layer": replaced("layer"),
}


@pytest.mark.parametrize("kind", NOT_READ)
def test_what_is_not_read_is_run_as_it_is_and_said(kind):
    module = NOT_READ[kind]()
    with pytest.warns(UserWarning, match="nested autograd"):
        hf.leapfrog(module, Z, 0.1, 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*nested autograd")
        states, expected = hf.leapfrog(module, Z, 0.1, 2)[:, -1], textbook(module, Z)
    torch.testing.assert_close(states, expected, rtol=1e-12, atol=1e-13)
    for found, wanted in zip(gradients_of(states, module), gradients_of(expected, module), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(hf.energy(module, Z), module(Z).reshape(3))
    with pytest.raises(NotFusedError, match=r'backend "torch" would compute something else; for the fused backends'):
        hf.rollout(module, Z, 0.1, 1, backend="torch")


def test_asked_for_by_name_it_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf.rollout(Scaled(2.0), Z, 0.1, 1, backend="reference")


@pytest.mark.filterwarnings("ignore:.*nested autograd")
def test_a_compiled_module_that_is_not_read_runs_outside_its_graph():
    module = Scaled(2.0)
    expected = textbook(module, Z)
    torch.testing.assert_close(hf.leapfrog(torch.compile(module), Z, 0.1, 2)[:, -1], expected)
    module.compile()
    torch.testing.assert_close(hf.leapfrog(module, Z, 0.1, 2)[:, -1], expected)


def test_the_warning_points_at_the_call():
    with pytest.warns(UserWarning, match="Scaled.forward does more than run its .net: it calculates with a tensor") as record:
        hf.leapfrog(Scaled(), Z, 0.1, 1)
    assert record[0].filename == __file__


def test_a_gradient_reaches_a_scale_that_is_1():
    module = Scaled()
    with pytest.warns(UserWarning, match="nested autograd"):
        hf.leapfrog(module, Z, 0.1, 3).square().sum().backward()
    assert module.scale.grad.abs() > 0


# Nothing is remembered of what may change


def sets_flag(m):
    m.doubled = True


def replaces_net(m):
    m.net = ThreeTimes(*mlp())


def replaces_forward_of_a_layer(m):
    layer = m.net[0]
    layer.forward = lambda x: 0 * nn.functional.linear(x, layer.weight)


def replaces_forward_of_its_class(m):
    type(m).forward = lambda self, z: 6 * self.net(z)


def becomes_another_class(m):
    m.__class__, m.scale = Scaled, nn.Parameter(torch.tensor(2.0).double())


LATER = {
    "a flag": (Flagged, sets_flag),
    "a hook": (Plain, lambda m: m.register_forward_hook(lambda *a: 3 * a[2])),
    "a forward": (Plain, lambda m: setattr(m, "forward", lambda x: 5 * m.net(x))),
    "a forward of a layer": (Plain, replaces_forward_of_a_layer),
    "another .net": (Plain, replaces_net),
    "another layer": (Plain, lambda m: m.net.__setitem__(1, nn.Mish())),
    "another class": (Plain, becomes_another_class),
    "the function of its class": (type("Passing", (Plain,), {}), replaces_forward_of_its_class),
    "an attribute in the way of .net": (Plain, lambda m: m.__dict__.update(net=ThreeTimes(*mlp()))),
}  # fmt: skip


@pytest.mark.parametrize("kind", LATER)
def test_a_change_after_the_first_call_is_seen(kind):
    make, change = LATER[kind]
    module = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf.leapfrog(module, Z, 0.1, 1)
    change(module)
    with pytest.warns(UserWarning, match="nested autograd"):
        states = hf.leapfrog(module, Z, 0.1, 2)[:, -1]
    torch.testing.assert_close(states, textbook(module, Z), rtol=1e-12, atol=1e-13)


def test_a_weight_that_is_no_parameter_is_read_anew():
    """As of a network whose weights another one gives."""
    net, separable = mlp(), hf.SeparableHNN(4, (3,), quadratic=True).double()
    given = net[0].weight.detach().clone()
    del net[0].weight, separable.stiffness
    for factor in (1.0, 2.0):
        net[0].weight, separable.stiffness = factor * given, factor * torch.ones(2).double()
        for H in (net, hf.Term(net, "z"), separable):
            torch.testing.assert_close(hf.leapfrog(H, Z, 0.1, 2)[:, -1], textbook(H, Z), rtol=1e-12, atol=1e-13)


def test_a_first_call_that_is_not_finite_proves_nothing():
    kind = type("Later", (Holder,), {"forward": lambda self, z: self.scale * self.net(z)})
    module = kind(scale=5.0)
    for z in (torch.full_like(Z, torch.nan), Z):
        with pytest.warns(UserWarning, match="nested autograd"):
            states = hf.leapfrog(module, z, 0.1, 2)[:, -1]
    torch.testing.assert_close(states, textbook(module, Z), rtol=1e-12, atol=1e-13)


def test_a_forward_for_one_size_is_followed_anew_for_another():
    class First4(Holder):
        def forward(self, z):
            return self.net(z[:, 0:4])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf.leapfrog(First4(), Z, 0.1, 1)
    wide = First4(nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 1)).double())
    with pytest.raises(NotFusedError, match="z reaches .net in another order, or in part"):
        hf.rollout(wide, torch.zeros(2, 6).double(), 0.1, 1, backend="torch")


def test_hooks_for_all_modules():
    module, handle = Plain(), nn.modules.module.register_module_forward_hook(lambda *a: None)
    try:
        with pytest.warns(UserWarning, match="a forward hook for all modules is registered"):
            hf.leapfrog(module, Z, 0.1, 1)
    finally:
        handle.remove()
    with torch.utils.flop_counter.FlopCounterMode(display=False), warnings.catch_warnings():
        warnings.simplefilter("error")
        hf.leapfrog(module, Z, 0.1, 1)  # its hooks are PyTorch's own and only look on


# What is no Hamiltonian


def test_a_vector_field_of_its_net():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = hf.leapfrog(Field(), Z, 0.1, 2)
    torch.testing.assert_close(found, hf.leapfrog(mlp(), Z, 0.1, 2))


class Damped(Field):
    def __init__(self, g):
        super().__init__(friction=nn.Parameter(torch.tensor(g).double()))

    def forward(self, z):
        field = super().forward(z)
        return field - self.friction * torch.cat((torch.zeros_like(z[:, :2]), z[:, 2:]), -1)


class OtherSign(Field):
    def forward(self, z):
        return -super().forward(z)


class Force(Holder):
    def forward(self, t, z):
        return self.net(z)


class Lagrangian(Holder):
    def forward(self, q, q_dot):
        return self.net(torch.cat((q, q_dot), -1))


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Damped(0.5), r"gives one number a state, Damped gives \[3, 4\]|Damped.forward does more"),
        (lambda: Damped(0.0), r"gives one number a state, Damped gives \[3, 4\]|Damped.forward does more"),
        (OtherSign, r"OtherSign gives \[3, 4\]|OtherSign.forward does more"),
        (Force, r"Force.forward takes \(t, z\) where that of a Hamiltonian takes \(z\)"),
        (Lagrangian, r"Lagrangian.forward takes \(q, q_dot\)"),
        (lambda: hf.BaselineMLP(4, (3,)).double(), r"BaselineMLP gives \[3, 4\]|found ReLU"),
        (lambda: nn.LSTM(4, 1).double(), "gives a tensor, LSTM gives tuple|found LSTM"),
        (lambda: holding(lambda self, z: self.net(z).sum()), r"gives \[\] for states \[3, 4\]|does more than run its .net"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*nested autograd")
def test_what_is_no_hamiltonian_is_not_rolled_out(make, message, backend):
    for n_steps in (0, 1):
        with pytest.raises((TypeError, ValueError), match=message):
            hf.rollout(make(), Z, 0.1, n_steps, backend=backend)


@pytest.mark.filterwarnings("ignore:.*nested autograd")
def test_an_energy_without_a_derivative_is_named():
    for forward in (
        lambda self, z: self.net(z.detach()),
        lambda self, z: torch.from_numpy(self.net(z).detach().numpy()),
    ):
        module = holding(forward)
        for call in (lambda m: hf.leapfrog(m, Z, 0.1, 1), lambda m: hf.gradient(m, Z)):
            with pytest.raises(ValueError, match="Own gives an energy that autograd cannot differentiate"):
                call(module)


def test_a_promise_is_taken_for_the_forward_that_it_is_about():
    torch.testing.assert_close(hf.leapfrog(Promises(), Z, 0.1, 2), hf.leapfrog(mlp(), Z, 0.1, 2))

    class Overrides(Promises):
        def forward(self, z):
            return 2 * self.net(z)

    with pytest.raises(NotFusedError, match="Overrides.forward does more"):
        hf.rollout(Overrides(), Z, 0.1, 1, backend="torch")
    module = Scaled()
    module.forward_is_net = True
    hf.rollout(module, Z, 0.1, 1, backend="torch")


# In graphs


@pytest.mark.filterwarnings("ignore:.*nested autograd")
def test_in_a_compiled_graph_a_forward_is_followed_while_it_is_traced():
    module = Scaled(2.0)
    whole = torch.compile(lambda z: hf.leapfrog(module, z, 0.1, 2), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="Scaled.forward does more than run its .net"):
        whole(Z)
    parts = torch.compile(lambda z: hf.leapfrog(module, z, 0.1, 2), backend="eager")
    torch.testing.assert_close(parts(Z)[:, -1], textbook(module, Z))
    plain = Squeezed()
    whole = torch.compile(lambda z: hf.leapfrog(plain, z, 0.1, 2), fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(Z)[:, -1], textbook(plain, Z))


# What a forward is seen to depend on


def test_what_depends_on_net_alone_is_followed_once(monkeypatch):
    followed = []
    monkeypatch.setattr(reader, "_follow", lambda *a: followed.append(a))
    monkeypatch.setattr(reader, "_followed", set())
    for make, times in ((Plain, 1), (Squeezed, 1), (Indexed, 1), (Checks, 3), (Loops, 3), (Flagged, 3), (Scaled, 3)):
        followed.clear()
        for _ in range(3):
            reader.prove(make())
        assert len(followed) == times, make


def test_layers_that_make_no_network_are_named():
    linear = nn.Linear(4, 3)
    for module, error, message in (
        (nn.Sequential(linear, nn.Tanh(), nn.Linear(2, 1)), ValueError, "layer 2 of Sequential takes 2 numbers, .* gives 3"),
        (nn.Sequential(nn.Linear(4, 0), nn.Tanh(), nn.Linear(0, 1)), ValueError, "widths must be positive, layer 0"),
        (nn.Sequential(nn.LazyLinear(3), nn.Tanh(), nn.Linear(3, 1)), TypeError, "layer 0 of Sequential has no weights yet"),
        (
            nn.Sequential(linear, nn.Tanh(), nn.Dropout(), nn.Linear(3, 1)),
            TypeError,
            r"layer 2 .* Dropout\(p=0.5\) in training",
        ),
        (nn.DataParallel(hf.LatentHNN(4, (3,))), TypeError, "pass its .module"),
        (None, TypeError, "must be an nn.Module, found NoneType"),
    ):
        for backend in ("auto", "reference"):
            with pytest.raises(error, match=message):
                hf.rollout(module, torch.zeros(2, 4), 0.1, 1, backend=backend)


# Adapters


def peft_module():
    """A stand-in for PEFT's own, which the tests do without: the same names, attributes and forward."""

    class Linear(nn.Module):
        merged = disable_adapters = False

        def __init__(self, base, rank=2, bias=False, dropout=None):
            super().__init__()
            self.base_layer = base
            self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=bias)})
            self.lora_dropout = nn.ModuleDict({"default": dropout or nn.Identity()})
            self.scaling, self.active_adapters, self.lora_variant = {"default": 0.7}, ["default"], {}

        in_features = property(lambda self: self.base_layer.in_features)
        out_features = property(lambda self: self.base_layer.out_features)

        def forward(self, x):
            result = self.base_layer(x)
            if self.disable_adapters or self.merged:
                return result
            for name in self.active_adapters:
                result = result + self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]
            return result

    Linear.__module__ = "peft.tuners.lora.layer"
    return Linear


@pytest.mark.parametrize("bias", [False, True])
def test_low_rank_adapters_run_by_their_effective_weight(bias):
    make = peft_module()
    net = nn.Sequential(make(nn.Linear(4, 8), bias=bias), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), make(nn.Linear(8, 1))).double()
    z = make_states(3, 4)
    results = []
    for backend in ("cpp", "torch", "reference"):
        states = hf.rollout(net, z, 0.1, 3, backend=backend).states
        results.append((states, *torch.autograd.grad(states.square().sum(), list(net.parameters()), allow_unused=True)))
    x = z.clone().requires_grad_()
    (g,) = torch.autograd.grad(net(x).sum(), x)
    torch.testing.assert_close(hf.gradient(net, z), g)
    for other in results[:2]:
        for a, b in zip(other, results[2], strict=True):
            assert (a is None) == (b is None) or (a if b is None else b).abs().max() == 0  # the output's bias
            if a is not None and b is not None:
                torch.testing.assert_close(a, b)
    with torch.no_grad():  # what an optimizer does is seen at the next call
        net[0].lora_B["default"].weight.add_(0.5)
    assert not torch.equal(hf.leapfrog(net, z, 0.1, 3), results[0][0])
    net[0].disable_adapters = net[4].disable_adapters = True
    plain = nn.Sequential(net[0].base_layer, *net[1:4], net[4].base_layer)
    assert torch.equal(hf.leapfrog(net, z, 0.1, 3), hf.leapfrog(plain, z, 0.1, 3))
    named = hf.Hamiltonian([net[0], net[2], net[4]])
    torch.testing.assert_close(hf.leapfrog(named, z, 0.1, 3), hf.leapfrog(plain, z, 0.1, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: setattr(layer, "lora_variant", {"default": object()}), "variant of LoRA"),
        (lambda layer: setattr(layer, "use_dora", {"default": True}), "variant of LoRA"),
        (lambda layer: layer.lora_dropout.update({"default": nn.Dropout(0.1)}), "dropout of 0.1"),
        (lambda layer: layer.lora_A["default"].float(), "dtype"),
        (lambda layer: setattr(layer, "base_layer", nn.Bilinear(4, 4, 8)), "around Bilinear"),
        (lambda layer: layer.lora_A["default"].register_forward_hook(lambda *_: None), "lora_A.default of layer 0.*hook"),
        (lambda layer: (setattr(layer, "merged", True), setattr(layer, "disable_adapters", True)), "merged and switched off"),
    ],
)
def test_adapters_that_compute_something_else_are_refused(change, message):
    net = nn.Sequential(peft_module()(nn.Linear(4, 8)), nn.Tanh(), nn.Linear(8, 1)).double()
    change(net[0])
    with pytest.raises(NotFusedError, match=message):
        hf.rollout(net, make_states(3, 4), 0.1, 1, backend="cpp")
