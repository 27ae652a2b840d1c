"""Hamiltonians made of a user's own layers, against textbook code of the same function."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hjepa_fast as hf
from hjepa_fast.errors import NotFusedError
from hjepa_fast.testing import make_states

D = 3
BACKENDS = ("cpp", "torch", "reference")


def linear(*widths):
    torch.manual_seed(sum(widths))
    return [nn.Linear(n, m).double() for n, m in itertools.pairwise(widths)]


def textbook(energy, z0, dt, n):
    """Leapfrog steps by nested autograd, and energies."""
    z = z0
    states = [z0]
    for _ in range(n):
        q, p = z.chunk(2, dim=-1)

        def field(q, p):
            z = torch.cat((q, p), dim=-1)
            z = z if z.requires_grad else z.requires_grad_()
            return torch.autograd.grad(energy(z).sum(), z, create_graph=True)[0].chunk(2, dim=-1)

        p = p - dt / 2 * field(q, p)[0]
        q = q + dt * field(q, p)[1]
        p = p - dt / 2 * field(q, p)[0]
        z = torch.cat((q, p), dim=-1)
        states.append(z)
    states = torch.stack(states, dim=-2)
    return states, energy(states)


def assert_equal(model, energy, parameters, backend="cpp", dt=0.2):
    """Values to 1e-10 and gradients to 1e-9 of what `energy` says, without a warning."""
    z0 = make_states(5, 2 * D)
    parameters = list(parameters)
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for roll in (
            lambda z: hf.rollout(model, z, dt, 4, energy=True, backend=backend)[:2],
            lambda z: textbook(energy, z, dt, 4),
        ):
            z = z0.clone().requires_grad_()
            states, H = roll(z)
            H = H.reshape(states.shape[:-1])
            loss = states.square().sum() + (H * torch.linspace(0.5, 1.5, 5)).sum()
            results.append((states, H, *torch.autograd.grad(loss, [z, *parameters], allow_unused=True)))
    ours, theirs = results
    for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a is None or b is None:  # a bias that only shifts H, or a layer that was left out
            assert (a if b is None else b) is None or (a if b is None else b).abs().max() == 0
            continue
        torch.testing.assert_close(a, b, rtol=1e-10 if k < 2 else 1e-9, atol=1e-10 if k < 2 else 1e-9)
    z = make_states(4, 2 * D, seed=4).requires_grad_()
    (g,) = torch.autograd.grad(energy(z).sum(), z)
    torch.testing.assert_close(hf.gradient(model, z.detach(), backend=backend), g, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
class TestOneNetwork:
    def test_layers_of_any_name(self, backend):
        first, second, last = linear(2 * D, 7, 5, 1)
        model = hf.Hamiltonian([first, second, last], "tanh")
        assert_equal(
            model,
            lambda z: last(torch.tanh(second(torch.tanh(first(z))))).squeeze(-1),
            [*first.parameters(), last.weight],
            backend,
        )

    @pytest.mark.parametrize("activation", [torch.tanh, nn.SiLU(), "softplus", F.gelu, nn.Softplus(2.0)])
    def test_activations_by_name_function_or_module(self, backend, activation):
        a, b = linear(2 * D, 9, 1)
        function = F.softplus if activation == "softplus" else activation
        assert_equal(hf.Hamiltonian([a, b], activation), lambda z: b(function(a(z))).squeeze(-1), [a.weight, b.weight], backend)

    @pytest.mark.parametrize("activation", ["sigmoid", nn.ELU(0.7), torch.square])
    def test_more_activations(self, backend, activation):
        a, b, c = linear(2 * D, 9, 6, 1)
        function = torch.sigmoid if activation == "sigmoid" else activation
        model = hf.Hamiltonian([a, b, c], activation)
        assert_equal(model, lambda z: c(function(b(function(a(z))))).squeeze(-1), [a.weight, b.weight, c.weight], backend, 0.05)

    def test_an_activation_for_each_layer(self, backend):
        a, b, c, d = linear(2 * D, 9, 6, 5, 1)
        model = hf.Hamiltonian([a, b, c, d], ["tanh", nn.Softplus(2.0, 5.0), torch.sin])
        assert_equal(
            model,
            lambda z: d(torch.sin(c(F.softplus(b(torch.tanh(a(z))), 2.0, 5.0)))).squeeze(-1),
            [a.weight, b.weight, b.bias, c.weight, d.weight],
            backend,
        )
        net = nn.Sequential(a, nn.Tanh(), b, nn.SiLU(), c, nn.Sigmoid(), d)
        assert_equal(net, lambda z: net(z).squeeze(-1), [a.weight, b.weight, c.weight], backend)

    def test_relu_beside_a_smooth_activation(self, backend):
        a, b, c = linear(2 * D, 9, 6, 1)
        with torch.no_grad():  # at its corner, where PyTorch's slope is 0
            b.weight[0], b.bias[0] = 0, 0
        net = nn.Sequential(a, nn.Tanh(), b, nn.ReLU(), c)
        assert_equal(net, lambda z: net(z).squeeze(-1), [a.weight, b.weight, b.bias, c.weight], backend)

    def test_p_before_q(self, backend):
        a, b = linear(2 * D, 9, 1)
        model = hf.Hamiltonian([a, b], order="pq")
        assert_equal(
            model, lambda z: b(torch.tanh(a(torch.cat((z[..., D:], z[..., :D]), -1)))).squeeze(-1), [a.weight], backend
        )

    def test_one_of_two_outputs(self, backend):
        a, b = linear(2 * D, 9, 2)
        for output in (0, 1, -1):
            model = hf.Hamiltonian([a, b], output=output)
            assert_equal(model, lambda z, i=output: b(torch.tanh(a(z)))[..., i], [a.weight, b.weight, b.bias], backend)

    def test_statistics_and_a_factor(self, backend):
        a, b = linear(2 * D, 9, 1)
        scale, shift = torch.linspace(0.5, 2, 2 * D).double(), torch.linspace(-1, 1, 2 * D).double()
        factor = nn.Parameter(torch.tensor(0.3).double())
        model = hf.Hamiltonian([a, b], "softplus", order="pq", scale=scale, shift=shift, factor=factor)
        assert set(dict(model.named_parameters())) == {"net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias", "factor"}

        def energy(z):
            x = (torch.cat((z[..., D:], z[..., :D]), -1) - shift) / scale
            return (factor * b(F.softplus(a(x)))).squeeze(-1)

        assert_equal(model, energy, [a.weight, a.bias, b.weight, b.bias, factor], backend)
        torch.testing.assert_close(model(make_states(4, 2 * D)).squeeze(-1), energy(make_states(4, 2 * D)))

    def test_numbers_keep_every_digit(self, backend):
        a, b = linear(2 * D, 9, 1)
        model = hf.Hamiltonian([a, b], scale=0.1, shift=0.3, factor=0.7)
        assert_equal(model, lambda z: 0.7 * b(torch.tanh(a((z - 0.3) / 0.1))).squeeze(-1), [a.weight], backend, dt=0.01)

    def test_layers_that_hold_their_activations(self, backend):
        a, b, c = linear(2 * D, 9, 4, 1)
        net = nn.Sequential(nn.Sequential(a, nn.Tanh()), nn.Identity(), b, nn.Dropout(0.5), nn.Tanh(), c).eval()
        assert_equal(
            hf.Hamiltonian(net, order="pq"), lambda z: net(torch.cat((z[..., D:], z[..., :D]), -1)).squeeze(-1), [a.weight]
        )


@pytest.mark.parametrize("backend", BACKENDS)
class TestSums:
    def test_own_networks_of_q_and_p(self, backend):
        V, T = nn.Sequential(*_between(linear(D, 7, 1))), nn.Sequential(*_between(linear(D, 5, 4, 1)))
        model = hf.Separable(V=V, T=T)
        energy = lambda z: (V(z[..., :D]) + T(z[..., D:])).squeeze(-1)  # noqa: E731
        assert_equal(model, energy, [*V[0].parameters(), T[0].weight, T[2].bias], backend)
        torch.testing.assert_close(model(make_states(4, 2 * D)).squeeze(-1), energy(make_states(4, 2 * D)))

    @pytest.mark.parametrize("k", [0.3, nn.Parameter(torch.tensor(0.3).double()), torch.linspace(0.1, 1, D).double()])
    def test_kinetic_energy_and_springs(self, backend, k):
        V = nn.Sequential(*_between(linear(D, 7, 1)))
        assert_equal(
            hf.Separable(V, quadratic=k),
            lambda z: V(z[..., :D]).squeeze(-1) + (k * z[..., :D] ** 2 + z[..., D:] ** 2).sum(-1) / 2,
            [V[0].weight, *([k] if isinstance(k, nn.Parameter) else [])],
            backend,
        )

    def test_a_list_of_everything(self, backend):
        a, b = linear(2 * D, 9, 1)
        V = nn.Sequential(*_between(linear(D, 7, 1)))
        general = hf.LatentHNN(2 * D, (5,)).double()
        model = hf.SumHNN(hf.Hamiltonian([a, b], order="pq"), hf.Term(V, "q"), hf.Quadratic("p", 2.0), general, hf.Term(V, "p"))
        assert_equal(
            model,
            lambda z: (
                b(torch.tanh(a(torch.cat((z[..., D:], z[..., :D]), -1))))
                + V(z[..., :D])
                + V(z[..., D:])
                + general(z)
                + (z[..., D:] ** 2).sum(-1, keepdim=True)
            ).squeeze(-1),
            [a.weight, V[0].weight, *general.net[0].parameters()],
            backend,
        )


def _between(layers, activation=nn.Tanh):
    out = []
    for layer in layers:
        out += [layer, activation()]
    return out[:-1]


class Foreign(nn.Module):
    """As in repositories that name layers, put p first and give two outputs."""

    def __init__(self):
        super().__init__()
        self.linear1, self.linear2, self.linear3 = linear(2 * D, 8, 6, 2)

    def forward(self, x):
        return self.linear3(torch.tanh(self.linear2(torch.tanh(self.linear1(x)))))

    def hamiltonian_terms(self):
        return hf.Hamiltonian([self.linear1, self.linear2, self.linear3], "tanh", order="pq", output=1)


def test_a_class_of_ones_own_says_what_it_computes():
    model = Foreign()
    keys = list(model.state_dict())
    assert_equal(model, lambda z: model(torch.cat((z[..., D:], z[..., :D]), -1))[..., 1], model.parameters())
    assert list(model.state_dict()) == keys
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.linear1.weight.mul_(2)
    z0 = make_states(2, 2 * D)
    assert not torch.equal(hf.leapfrog(other, z0, 0.1, 2), hf.leapfrog(model, z0, 0.1, 2))


def test_what_it_says_is_asked_at_every_call():
    class Switching(Foreign):
        output = 1

        def hamiltonian_terms(self):
            return [hf.Hamiltonian([self.linear1, self.linear2, self.linear3], order="pq", output=self.output)]

    model, z0 = Switching(), make_states(2, 2 * D)
    first = hf.leapfrog(model, z0, 0.1, 2)
    model.output = 0
    assert not torch.equal(hf.leapfrog(model, z0, 0.1, 2), first)


def test_a_forward_that_a_subclass_puts_in_place_is_not_what_the_base_says():
    class Scaled(hf.Hamiltonian):
        def forward(self, z):
            return 2 * super().forward(z)

    model = Scaled(linear(2 * D, 8, 1))
    with pytest.raises(NotFusedError):
        hf.rollout(model, make_states(2, 2 * D), 0.1, 1, backend="cpp")
    with pytest.warns(UserWarning, match="forward"):
        found = hf.leapfrog(model, make_states(2, 2 * D), 0.1, 1)
    expected, _ = textbook(lambda z: model(z).squeeze(-1), make_states(2, 2 * D), 0.1, 1)
    torch.testing.assert_close(found, expected)


def test_hooks_on_any_of_the_layers_are_seen():
    layers = linear(2 * D, 8, 1)
    for model, hooked in (
        (hf.Hamiltonian(layers), layers[0]),
        (hf.SumHNN(hf.Hamiltonian(layers), hf.Quadratic("q")), layers[1]),
        (hf.SumHNN(hf.Hamiltonian(layers)), None),
    ):
        handle = (hooked or model).register_forward_hook(lambda *_: None)
        with pytest.raises(NotFusedError, match="hook"):
            hf.rollout(model, make_states(2, 2 * D), 0.1, 1, backend="cpp")
        handle.remove()
        hf.rollout(model, make_states(2, 2 * D), 0.1, 1, backend="cpp")


def test_in_a_compiled_graph():
    model, z0 = hf.Separable(nn.Sequential(*_between(linear(D, 7, 1))), quadratic=0.5), make_states(3, 2 * D)
    whole = hf.Hamiltonian(linear(2 * D, 8, 2), order="pq", output=1, scale=torch.full((2 * D,), 2.0).double())
    for H in (model, whole):
        compiled = torch.compile(lambda z, H=H: hf.leapfrog(H, z, 0.1, 3), fullgraph=True)
        torch.testing.assert_close(compiled(z0), hf.leapfrog(H, z0, 0.1, 3))


def test_float32_and_moves_of_dtype():
    model = hf.SumHNN(hf.Hamiltonian(linear(2 * D, 8, 1), scale=torch.full((2 * D,), 2.0)), hf.Quadratic("q", 0.1)).float()
    assert hf.leapfrog(model, make_states(2, 2 * D).float(), 0.1, 2).dtype == torch.float32
    assert hf.leapfrog(model.double(), make_states(2, 2 * D), 0.1, 2).dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: hf.Hamiltonian([]), TypeError, "found none"),
        (lambda: hf.Hamiltonian(linear(4, 5, 1), order="QP"), ValueError, "qp, pq; found 'QP'"),
        (lambda: hf.Hamiltonian(linear(4, 5, 2)), ValueError, "2 outputs"),
        (lambda: hf.Hamiltonian(linear(4, 5, 2), output=2), ValueError, "found 2"),
        (lambda: hf.Hamiltonian(linear(4, 5, 2), output=True), ValueError, "found True"),
        (lambda: hf.Hamiltonian(linear(3, 5, 1)), ValueError, "takes 3"),
        (lambda: hf.Hamiltonian(linear(4, 5, 1), scale=torch.ones(3)), ValueError, r"\[4\], found \[3\]"),
        (lambda: hf.Hamiltonian(linear(4, 5, 1), scale=torch.tensor([1.0, 0, 1, 1])), ValueError, "zero"),
        (lambda: hf.Hamiltonian(linear(4, 5, 1), shift=torch.ones(4, dtype=torch.int64)), TypeError, "int64"),
        (lambda: hf.Hamiltonian(linear(4, 5, 1), factor="2"), TypeError, "factor must be a number"),
        (lambda: hf.Hamiltonian(linear(4, 5, 1), torch.relu), ValueError, "relu"),
        (lambda: hf.Hamiltonian(linear(4, 5, 5, 1), ["tanh"]), ValueError, "2 activations between them, found 1"),
        (lambda: hf.Hamiltonian([*linear(4, 5), nn.Tanh(), *linear(5, 1)], "tanh"), ValueError, "beside them"),
        (lambda: hf.Term(nn.Linear(2, 1), "x"), ValueError, "found 'x'"),
        (lambda: hf.Quadratic("z"), ValueError, "found 'z'"),
        (lambda: hf.Quadratic("q", torch.ones(2, 2)), ValueError, r"found \[2, 2\]"),
        (lambda: hf.SumHNN(), TypeError, "found none"),
    ],
)
def test_what_cannot_be_made(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_terms_that_do_not_fit_together():
    z0 = make_states(2, 4)
    with pytest.raises(ValueError, match=r"one size 2d; found q of 4, p of 6"):
        hf.leapfrog(
            hf.Separable(nn.Sequential(*_between(linear(2, 5, 1))), nn.Sequential(*_between(linear(3, 5, 1)))), z0, 0.1, 1
        )
    with pytest.raises(ValueError, match="any size"):
        hf.leapfrog(hf.SumHNN(hf.Quadratic("q"), hf.Quadratic("p")), z0, 0.1, 1)
    mixed = hf.SumHNN(hf.Hamiltonian(linear(4, 5, 1)), hf.LatentHNN(4, (5,)))
    with pytest.raises(ValueError, match="one dtype"):
        hf.leapfrog(mixed, z0, 0.1, 1)

    class Itself(nn.Module):
        def hamiltonian_terms(self):
            return self

    with pytest.raises(TypeError, match="found itself"):
        hf.leapfrog(Itself(), z0, 0.1, 1)


CHANGES = {
    "a factor": lambda H: setattr(H.terms[0], "factor", 3.0),
    "what a term reads": lambda H: setattr(H.terms[0], "reads", "p"),
    "a stiffness": lambda H: setattr(H.terms[1], "k", 4.0),
    "a stiffness of each": lambda H: setattr(H.terms[1], "k", torch.ones(D).double()),
    "the order": lambda H: setattr(H.terms[2], "order", "pq"),
    "a shift": lambda H: setattr(H.terms[2], "shift", 0.5),
    "weights in place": lambda H: H.terms[0].net[0].weight.data.mul_(2),
    "a layer": lambda H: H.terms[0].net.__setitem__(0, *linear(D, 7)),
    "an activation": lambda H: H.terms[2].net.__setitem__(1, nn.Softplus(2.0)),
    "its sharpness": lambda H: setattr(H.terms[2].net[1], "beta", 3.0),
    "a term": lambda H: H.terms.__setitem__(2, hf.Quadratic("p", 0.7)),
    "one term more": lambda H: H.terms.append(hf.Quadratic("p", 0.7)),
    "what it says": lambda H: setattr(H, "hamiltonian_terms", lambda: [H.terms[0], H.terms[1]]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_read_holds_until_something_changes(change, monkeypatch):
    V, general = linear(D, 7, 1), linear(2 * D, 5, 1)
    H = hf.SumHNN(hf.Term(V, "q", "tanh"), hf.Quadratic("q", 2.0), hf.Hamiltonian(general, nn.Softplus()))
    energy = {
        "what it says": lambda z: H.terms[0](z) + H.terms[1](z),
    }.get(change, H)
    asked = []
    monkeypatch.setattr(hf.SumHNN, "hamiltonian_terms", lambda self: asked.append(self) or list(self.terms))
    z = make_states(4, 2 * D)
    for _ in range(3):
        torch.testing.assert_close(hf.leapfrog(H, z, 0.1, 2), textbook(H, z, 0.1, 2)[0])
    assert len(asked) == 1
    CHANGES[change](H)
    torch.testing.assert_close(hf.leapfrog(H, z, 0.1, 2), textbook(energy, z, 0.1, 2)[0])
    before = hf.gradient(H, z).detach()
    with torch.no_grad():
        V[0].weight.add_(1.0)
        H.terms[0].net[0].weight.add_(1.0)
    assert not torch.equal(hf.gradient(H, z), before)


def test_gpu_kernels_leave_the_activations_that_they_lack_to_pytorch():
    from hjepa_fast.activations import Activation, Mixed
    from hjepa_fast.backends import cuda
    from hjepa_fast.backends.triton import launch
    from hjepa_fast.hidden_space.network import Tail
    from hjepa_fast.schemes import SubStep

    a, scheme = torch.ones(2, 3), (SubStep(0.5, 0.0), SubStep(0.0, 1.0))
    for backend in (cuda, launch):
        for activation, left in (
            (Activation("tanh"), False),
            (Activation("sigmoid"), True),
            (Mixed((Activation("tanh"), Activation("sin"))), True),
        ):
            tail = Tail([torch.ones(4, 3), torch.ones(1, 4)], [torch.ones(4), torch.ones(1)], activation)
            assert backend._delegated(a, tail, scheme, 1) is left


class Fivefold(nn.Module):
    """A network of q with a factor, which its own `.net` does not show."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(*_between(linear(D, 7, 1)))

    def forward(self, q):
        return 5 * self.net(q)

    def hamiltonian_terms(self):
        return hf.Term(self.net, "q", factor=5.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: hf.Term(hf.Hamiltonian(linear(2 * D, 8, 1), order="pq", factor=2.0), "z"),
        lambda: hf.Separable(V=Fivefold()),
        lambda: hf.SumHNN(hf.Term(hf.Separable(nn.Sequential(*_between(linear(D, 7, 1)))), "z")),
    ],
)
def test_a_term_of_what_says_its_own_terms_is_not_read_past_them(make):
    model, z = make(), make_states(4, 2 * D)
    with pytest.raises(NotFusedError, match="SumHNN"):
        hf.gradient(model, z, backend="cpp")
    x = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    with pytest.warns(UserWarning, match="SumHNN"):
        found = hf.gradient(model, z)
    torch.testing.assert_close(found, expected)
