"""A rollout as a program: the instructions of a step, forward and in reverse, for a sum of terms and an explicit scheme.

A term reads q, p or both, through its first layer a = q Wq^T + p Wp^T + b, or is a quadratic form (k x) . x / 2 of q or p
itself. A kick p <- p - c Hq is the sum over the terms that read q, a drift q <- q + c Hp over those that read p. A gradient is
evaluated when a move needs it and it is stale: a move that writes q makes stale whatever reads q, likewise p.

A program works on registers, rows of numbers a sample; all it does to them is

    evaluate            D_k <- delta_k(A_k)
    add                 y <- y + c x M,  or  y <- y + c dt x M,  with M a matrix, a vector's diagonal, or nothing
    take, scale         y <- e,  y <- e x elementwise,  with e numbers from outside for this step: friction, forces, controls

and its adjoint consists of the adjoints of these, read backwards. How a move reaches the first layers is the coupling:

    dense   A_j += c dt D_k (R_k S_j^T), R_k the half of the first layer that is read, S_j the one that is written; the
            coefficients of R_k in the state are summed up, the state itself is a product at the end
    pair    Y = sum_k D_k R_k;  the state += c dt Y;  A_j += c dt Y S_j^T

With a scalar quadratic form k, the dense coupling moves whole families: what is linear in p gets -c dt k times what is the same
in q, and q likewise of p. `C` are the coefficients of the state at the start, `U` what A_j would be of the other half.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from ..activations import Activations
from ..schemes import SCHEMES, SubStep, for_separable

Key = tuple[str | int, ...]
"""Names a register or a matrix.

Registers: ("A", k) the first pre-activation of term k; ("D", k) delta there; ("S", half, k, side) the coefficient in q or p
(`half`) of the half `side` of term k's first layer; ("C", half) of the state at the start; ("U", k); ("B", k) the bias;
("Z", half) the state's half; ("Y",) a move of it, ("V",) one by friction; ("F",) a force, ("I", k) what a control adds to A_k;
("G", i, k) and ("X", i, k) the gradient of sub-step i, and that mixed with earlier ones.

Matrices: ("K", k, side, j, other) the product of two halves, the second one transposed; ("W", k, side) a half; ("k", term, n)
the diagonal of n numbers of a quadratic form.
"""

EVALUATE, ADD, CLEAR, KEEP, RESTORE, LOAD, ADJOINT, FORGET, HESSIAN, TAKE, SCALE, GIVE, UNSCALE = range(13)


class Drive(NamedTuple):
    """What moves the state beside H. Each has numbers of its own for every step, `externals`: [1 or B, 1 or n_steps, width].

    Before and after the integrator's step stand half of the friction and half of the force, the friction outside; or, with
    `in_kicks`, every kick c of the integrator has both, at the point of that kick.
    """

    friction: str = ""
    """"conformal", p <- p + E p with E = exp(-g dt / 2) - 1; or "rayleigh", p <- p - E Hp with E = g dt / 2; or none. In kicks
    p <- p - c E p and p <- p - c E Hp, with E = g dt."""
    force: bool = False
    """p <- p + dt / 2 f; in kicks p <- p + c dt f."""
    control: tuple[int, ...] = ()
    """Terms whose first pre-activation changes by some numbers before every step: a control that they read has changed."""
    in_kicks: bool = False

    @property
    def n_externals(self) -> int:
        return bool(self.friction) + self.force + len(self.control)

    def __bool__(self) -> bool:
        return self.n_externals > 0

    def text(self) -> str:
        """As an attribute."""
        terms = "+".join(map(str, self.control))
        return f"{self.friction},{int(self.force)},{terms},{int(self.in_kicks)}" if self else ""


UNDRIVEN = Drive()


@functools.lru_cache(maxsize=256)
def drive_of(text: str) -> Drive:
    """What `Drive.text` wrote."""
    if not text:
        return UNDRIVEN
    friction, force, control, in_kicks = text.split(",")
    return Drive(friction, force == "1", tuple([int(k) for k in control.split("+") if k]), in_kicks == "1")


class Form(NamedTuple):
    """What a term is, without its numbers."""

    reads: str
    """"q", "p" or "z"."""
    n_layers: int
    """Linear layers; 0 of a quadratic form."""
    activation: Activations | None
    """None of a quadratic form."""
    scalar: bool = False
    """Of a quadratic form: one k for all coordinates."""

    @property
    def quadratic(self) -> bool:
        return self.activation is None

    def sees(self, side: str) -> bool:
        return self.reads in (side, "z")


class Instruction(NamedTuple):
    """One line of a program; registers and matrices by number."""

    op: int
    x: int = -1
    y: int = -1
    c: float = 0.0
    scaled: bool = False
    """Whether dt is a factor."""
    matrix: int = -1
    transposed: bool = False
    item: int = -1
    """What is on the tape."""
    slot: int = 0
    """Which of a step's on the tape; -1 the last one of the step before."""
    energy: int = -1
    """Of an evaluation: 0 where it gives H's share before the step, 1 after it."""
    meet: bool = False
    """Whether threads that share rows must meet first."""


class Item(NamedTuple):
    """What the tape holds, and how often in the first step, in each later one, and after the last."""

    register: int
    network: bool
    """Whether it is an evaluation, else a register's value."""
    first: int
    later: int
    end: int

    def before(self, step: int) -> int:
        """Slots of the steps before this one."""
        return 0 if step == 0 else self.first + (step - 1) * self.later

    def slots(self, n_steps: int) -> int:
        return self.before(n_steps) + self.end


Code = tuple[Instruction, ...]


class Program(NamedTuple):
    """What runs a rollout, and its adjoint."""

    registers: tuple[Key, ...]
    matrices: tuple[Key, ...]
    networks: tuple[int, ...]
    """Terms that are networks."""
    reads: tuple[str, ...]
    """What each of them reads."""
    items: tuple[Item, ...]
    """One for each network, in their order, then the kept registers."""
    start: Code
    """Where a rollout goes on: the evaluations that it knows, again."""
    first: Code
    later: Code
    end: Code
    back_end: Code
    back_later: Code
    back_first: Code
    state: tuple[int, ...]
    """Registers that say where a rollout is."""
    known: tuple[int, ...]
    """Deltas that hold from step to step."""
    path: tuple[int, ...]
    """Registers that the states are made of."""
    tracked: tuple[int, ...]
    """Registers whose values the adjoint follows backwards."""
    energies: tuple[int, ...]
    """Terms whose energies evaluations give."""

    def number(self, *key: str | int) -> int:
        return self.registers.index(key)

    def evaluations(self, n_steps: int) -> dict[int, int]:
        """How often each network is evaluated."""
        return {k: item.slots(n_steps) for k, item in zip(self.networks, self.items, strict=False)}


_OTHER = {"q": "p", "p": "q"}


def stages_of(integrator: str, forms: Sequence[Form]) -> tuple[SubStep, ...]:
    """The integrator's sub-steps; explicit ones wherever no term reads q and p."""
    scheme = SCHEMES[integrator]
    separable = None if any(form.reads == "z" for form in forms) else for_separable(scheme)
    return separable or scheme.stages


def covers(forms: Sequence[Form], stages: Sequence[SubStep]) -> bool:
    """Whether these sub-steps can be a program: explicit ones; and where q and p move at once, or by a mixture of gradients,
    without quadratic forms, which leave no gradient behind."""
    at_once = any((s.kick and s.drift) or s.mix for s in stages)
    return bool(stages) and not any(s.implicit for s in stages) and not (at_once and any(f.quadratic for f in forms))


def closes(forms: Sequence[Form]) -> bool:
    """Whether the dense coupling can be taken: quadratic forms are scalar, and stand beside networks of q or of p alone."""
    quadratic = [f for f in forms if f.quadratic]
    networks = [f for f in forms if not f.quadratic]
    return bool(networks) and all(f.scalar for f in quadratic) and not (quadratic and any(f.reads == "z" for f in networks))


class _Group(NamedTuple):
    """Instructions of one move, and what their adjoint needs to have."""

    code: list[Instruction]
    restores: list[Instruction]
    values: list[Instruction]


class _Compiler:
    def __init__(self, forms: Sequence[Form], stages: Sequence[SubStep], dense: bool, with_energy: bool, drive: Drive) -> None:
        self.forms, self.stages, self.dense, self.drive = forms, stages, dense, drive
        self.networks = [k for k, f in enumerate(forms) if not f.quadratic]
        self.quadratic = {side: [k for k, f in enumerate(forms) if f.quadratic and f.reads == side] for side in "qp"}
        self.mixes = any(s.mix for s in stages)
        self.registers: list[Key] = []
        self.matrices: list[Key] = []
        self.kept: list[int] = []
        self.with_energy = with_energy
        self.where: dict[int, int] = {}
        """The tape's slot of each network's present delta."""
        for k in self.networks:
            self.register("A", k)
            self.register("D", k)

    def register(self, *key: str | int) -> int:
        return _number(self.registers, key)

    def matrix(self, *key: str | int) -> int:
        return _number(self.matrices, key)

    def add(self, x: int, y: int, c: float = 1.0, scaled: bool = False, matrix: tuple[Key, bool] | None = None) -> Instruction:
        if matrix is None:
            return Instruction(ADD, x, y, c, scaled)
        return Instruction(ADD, x, y, c, scaled, self.matrix(*matrix[0]), matrix[1])

    def coupling(self, k: int, side: str, j: int, other: str) -> tuple[Key, bool]:
        """R_k S_j^T, each pair of halves in one order only."""
        straight = (k, side) >= (j, other)
        return (("K", k, side, j, other), False) if straight else (("K", j, other, k, side), True)

    def evaluate(self, k: int, slot: int, energy: int = -1) -> Instruction:
        item = self.networks.index(k)
        return Instruction(EVALUATE, self.register("A", k), self.register("D", k), item=item, slot=slot, energy=energy)

    def families(self, half: str) -> list[tuple[int, int]]:
        """What is linear in this half of the state, and the same of the other one; where quadratic forms link them."""
        other = _OTHER[half]
        pairs = [(self.register("C", half), self.register("C", other))]
        for k in self.networks:
            side = self.forms[k].reads
            # a network that reads this half moves the other one; its coefficients in this half come of a quadratic form
            if half == side or self.quadratic[half]:
                pairs.append((self.register("S", half, k, side), self.register("S", other, k, side)))
        return pairs

    def partners(self, half: str) -> list[tuple[int, int, int]]:
        """(what is moved, what by, -1 or the bias in that): projections on first layers, of this half and of the other."""
        found = []
        for k in self.networks:
            side = self.forms[k].reads
            if side == half and self.quadratic[_OTHER[half]]:
                found.append((self.register("A", k), self.register("U", k), -1))
            elif side != half and self.has_partner(k):
                found.append((self.register("U", k), self.register("A", k), self.register("B", k)))
        return found

    def has_partner(self, k: int) -> bool:
        """Whether a quadratic form moves what network k reads by what it does not."""
        return bool(self.quadratic[_OTHER[self.forms[k].reads]])

    def move(self, side: str, c: float, gradient: dict[int, int]) -> _Group:
        """By the gradient with respect to `side`; of each network in this register."""
        half = _OTHER[side]
        sources = [k for k in self.networks if self.forms[k].sees(side)]
        readers = [j for j in self.networks if self.forms[j].sees(half)]
        code: list[Instruction] = []
        values: list[Instruction] = []
        if self.dense:
            for k in sources:
                x = gradient[k]
                code += [self.add(x, self.register("A", j), c, True, self.coupling(k, side, j, half)) for j in readers]
                for j in self.networks:
                    if not self.forms[j].sees(half) and self.has_partner(j):
                        code.append(self.add(x, self.register("U", j), c, True, self.coupling(k, side, j, side)))
                code.append(self.add(x, self.register("S", half, k, side), c, True))
            for t in self.quadratic[side]:
                for y, x in self.families(half):
                    n = 2 if self.registers[x][0] == "C" else ("h", self.registers[x][2])
                    code.append(self.add(x, y, c, True, (("k", t, *_flat(n)), False)))
                for y, x, bias in self.partners(half):
                    scale = (("k", t, *_flat(("h", self.registers[x][1]))), False)
                    code.insert(0, Instruction(KEEP, x, item=self.keep(x)))
                    code.append(self.add(x, y, c, True, scale))
                    if bias >= 0:
                        code.append(self.add(bias, y, -c, True, scale))
        else:
            values = self.slope(side, gradient)
            code += [*values, *self.moved(self.register("Y"), half, c, True)]
        return _Group(code, self.restores(sources, gradient), values)

    def slope(self, side: str, gradient: dict[int, int]) -> list[Instruction]:
        """Y <- the gradient of H with respect to `side`."""
        Y = self.register("Y")
        values = [Instruction(CLEAR, y=Y)]
        for k in self.networks:
            if self.forms[k].sees(side):
                values.append(self.add(gradient[k], Y, matrix=(("W", k, side), False)))
        return values + [self.add(self.register("Z", side), Y, matrix=(("k", t, "d"), False)) for t in self.quadratic[side]]

    def moved(self, x: int, half: str, c: float, scaled: bool) -> list[Instruction]:
        """This half of the state by c x, and what reads it."""
        code = [self.add(x, self.register("Z", half), c, scaled)]
        for j in self.networks:
            if self.forms[j].sees(half):
                code.append(self.add(x, self.register("A", j), c, scaled, (("W", j, half), True)))
        return code

    def restores(self, sources: Sequence[int], gradient: dict[int, int]) -> list[Instruction]:
        return [
            Instruction(RESTORE, self.register("A", k), self.register("D", k), item=self.networks.index(k), slot=self.where[k])
            for k in sources
            if gradient[k] == self.register("D", k)
        ]

    def rub(self, c: float) -> _Group:
        """Friction: p by c V."""
        V, Zp = self.register("V"), self.register("Z", "p")
        keep = Instruction(KEEP, Zp, item=self.keep(Zp))
        if self.drive.friction == "conformal":
            values = [Instruction(SCALE, Zp, V, item=0)]
            return _Group([keep, *values, *self.moved(V, "p", c, False)], [], values)
        gradient = {k: self.register("D", k) for k in self.networks}
        values = [*self.slope("p", gradient), Instruction(SCALE, self.register("Y"), V, item=0)]
        sources = [k for k in self.networks if self.forms[k].sees("p")]
        # a quadratic form of p makes the friction depend on what it moves
        kept = [keep] if self.quadratic["p"] else []
        return _Group([*kept, *values, *self.moved(V, "p", c, False)], self.restores(sources, gradient), values)

    def push(self, c: float) -> _Group:
        """The force: p by c dt f."""
        return _Group(self.moved(self.register("F"), "p", c, True), [], [])

    def inputs(self) -> tuple[list[Instruction | _Group], list[Instruction]]:
        """What is taken before a step, and what its adjoint needs of that."""
        code: list[Instruction | _Group] = []
        prologue: list[Instruction] = []
        item = int(bool(self.drive.friction))
        if self.drive.force:
            prologue.append(Instruction(TAKE, y=self.register("F"), item=item))
            code.append(_Group([*prologue], [], []))
            item += 1
        for k in self.drive.control:
            I = self.register("I", k)  # noqa: E741
            code.append(_Group([Instruction(TAKE, y=I, item=item), self.add(I, self.register("A", k))], [], []))
            item += 1
        return code, prologue

    def keep(self, register: int) -> int:
        if register not in self.kept:
            self.kept.append(register)
        return len(self.networks) + self.kept.index(register)

    def step(self, known: set[int]) -> tuple[list[Instruction | _Group], list[Instruction], set[int]]:
        """One step; values that its adjoint needs throughout; what is known after it."""
        code, prologue = self.inputs()
        known = set(known) - set(self.drive.control)
        self.where = dict.fromkeys(known, -1)
        counts = dict.fromkeys(self.networks, 0)

        def evaluate_stale(wanted: Callable[[int], bool]) -> None:
            for k in self.networks:
                if k in known or not wanted(k):
                    continue
                code.append(self.evaluate(k, counts[k]))
                self.where[k] = counts[k]
                counts[k] += 1
                known.add(k)

        def driven(*groups: str) -> None:
            for which in groups:
                if which == "friction" and self.drive.friction:
                    if self.drive.friction == "rayleigh":
                        evaluate_stale(lambda k: self.forms[k].sees("p"))
                    code.append(self.rub(1.0 if self.drive.friction == "conformal" else -1.0))
                elif which == "force" and self.drive.force:
                    code.append(self.push(0.5))
                else:
                    continue
                known.difference_update([k for k in known if self.forms[k].sees("p")])

        around = not self.drive.in_kicks
        if around:
            driven("friction", "force")
        for i, s in enumerate(self.stages):
            sides = [(side, c) for side, c in (("q", -s.kick), ("p", s.drift)) if c]
            rubs = self.drive.in_kicks and self.drive.friction and s.kick
            seen = {side for side, _ in sides} | ({"p"} if rubs and self.drive.friction == "rayleigh" else set())
            evaluate_stale(lambda k: self.mixes or any(self.forms[k].sees(side) for side in seen))  # noqa: B023
            if rubs:
                code.append(self.rub(-s.kick))
            gradient = {k: self.register("D", k) for k in self.networks}
            if self.mixes:
                prologue += self.mix(i, s, gradient, code)
            code += [self.move(side, c, gradient) for side, c in sides]
            if self.drive.in_kicks and self.drive.force and s.kick:
                code.append(self.push(s.kick))
            for side, _ in sides:
                known.difference_update([k for k in known if self.forms[k].sees(_OTHER[side])])
        if around:
            driven("force", "friction")
        return code, prologue, known

    def mix(self, i: int, s: SubStep, gradient: dict[int, int], code: list[Instruction | _Group]) -> list[Instruction]:
        """Sub-step i's gradient where it is needed later, and that mixed with earlier ones."""
        values: list[Instruction] = []
        needed = any(j > i and len(t.mix) > i and t.mix[i] for j, t in enumerate(self.stages))
        for k in self.networks:
            D = self.register("D", k)
            made: list[Instruction] = []
            if needed:
                G = self.register("G", i, k)
                made += [Instruction(CLEAR, y=G), self.add(D, G)]
            if any(s.mix):
                X = gradient[k] = self.register("X", i, k)
                made += [Instruction(CLEAR, y=X), self.add(D, X)]
                made += [self.add(self.register("G", j, k), X, weight) for j, weight in enumerate(s.mix) if weight]
            code.append(_Group(made, [], []))
            item = self.networks.index(k)
            values += [Instruction(RESTORE, self.register("A", k), D, item=item, slot=self.where[k]), *made]
        return values


def _flat(n: int | Key) -> Key:
    return n if isinstance(n, tuple) else (n,)


def _number(known: list[Key], key: Key) -> int:
    if key not in known:
        known.append(key)
    return known.index(key)


def _flattened(code: Iterable[Instruction | _Group]) -> list[Instruction]:
    return [x for item in code for x in (item.code if isinstance(item, _Group) else [item])]


_ADJOINTS = {ADD: ADJOINT, CLEAR: FORGET, TAKE: GIVE, SCALE: UNSCALE}


def _reversed(code: Sequence[Instruction | _Group], prologue: Sequence[Instruction], tracked: set[int]) -> list[Instruction]:
    back = [*prologue]
    for item in reversed(code):
        if isinstance(item, Instruction):
            back.append(item._replace(op=HESSIAN))
            continue
        loads = [x._replace(op=LOAD) for x in item.code if x.op == KEEP]
        back += item.restores + loads + item.values
        back += [x._replace(op=_ADJOINTS[x.op]) for x in reversed(item.code) if x.op in _ADJOINTS]
        # what was loaded is back where it was
        followed = tracked - {x.x for x in loads}
        back += [x._replace(c=-x.c) for x in reversed(item.code) if x.op == ADD and x.y in followed]
    return back


def _with_meetings(code: Sequence[Instruction]) -> Code:
    """Threads that share rows own columns of every register; a product, or a network, reads what others wrote."""
    written: set[tuple[bool, int]] = set()
    read: set[tuple[bool, int]] = set()
    out = []
    for x in code:
        whole: set[tuple[bool, int]] = set()
        writes: set[tuple[bool, int]] = set()
        if x.op == ADD:
            whole, writes = ({(False, x.x)} if x.matrix >= 0 else set()), {(False, x.y)}
        elif x.op == ADJOINT:
            # the cotangent of y gives that of x; where gradients of matrices are gathered each thread copies its own columns
            whole, writes = ({(True, x.y)} if x.matrix >= 0 else set()), {(True, x.x)}
        elif x.op in (CLEAR, LOAD, TAKE, SCALE):
            writes = {(False, x.x if x.op == LOAD else x.y)}
        elif x.op in (FORGET, GIVE):
            writes = {(True, x.y)}
        elif x.op == UNSCALE:
            writes = {(True, x.x), (True, x.y)}
        elif x.op in (EVALUATE, RESTORE):
            writes = {(False, x.y)}
        elif x.op == HESSIAN:
            writes = {(False, x.y), (True, x.x), (True, x.y)}
        meet = bool(whole & written or writes & read)
        if meet:
            written, read = set(), set()
        written |= writes
        read |= whole
        out.append(x._replace(meet=meet))
    return tuple(out)


@functools.lru_cache(maxsize=256)
def compiled(
    forms: tuple[Form, ...], stages: tuple[SubStep, ...], dense: bool, with_energy: bool, drive: Drive = UNDRIVEN
) -> Program:
    """The program of explicit sub-steps for these terms, which `covers`, and with a dense coupling `closes`, must allow.

    What is driven takes a coupling by pair.
    """
    assert not (drive and dense)
    c = _Compiler(forms, stages, dense, with_energy, drive)
    first, prologue, known = c.step(set())
    later, _, known_later = c.step(known)
    assert known_later == known
    energies = [k for k in c.networks if _looks_first(first, c, k)] if with_energy else []
    end: list[Instruction | _Group] = []
    for k in energies:
        D = c.register("D", k)
        for code, at_start in ((first, True), (later, k not in known)):
            own = [(i, x) for i, x in enumerate(code) if isinstance(x, Instruction) and x.y == D]
            if k in known:
                i, x = own[-1]
                code[i] = x._replace(energy=1)
            if at_start:
                i, x = own[0]
                code[i] = x._replace(energy=0)
        if k not in known:
            end.append(c.evaluate(k, 0, 0))
    tracked: set[int] = set()
    if any(f.quadratic for f in forms):
        names = ("S", "C") if dense else ("Z",)
        tracked = {i for i, key in enumerate(c.registers) if key[0] in names}
    codes = [_flattened(code) for code in (first, later, end)]

    def count(op: int, item: int) -> list[int]:
        return [sum(x.op == op and x.item == item for x in code) for code in codes]

    items = [Item(c.register("A", k), True, *count(EVALUATE, n)) for n, k in enumerate(c.networks)]
    items += [Item(register, False, *count(KEEP, len(items) + n)) for n, register in enumerate(c.kept)]
    numbered = [_numbered(code) for code in (first, later)]
    resume = [c.evaluate(k, -1) for k in sorted(known)]
    state = [i for i, key in enumerate(c.registers) if key[0] in ("A", "S", "C", "U", "B", "Z")]
    path = [i for i, key in enumerate(c.registers) if key[0] in ("S", "C", "Z")]
    return Program(
        registers=tuple(c.registers),
        matrices=tuple(c.matrices),
        networks=tuple(c.networks),
        reads=tuple(forms[k].reads for k in c.networks),
        items=tuple(items),
        start=_with_meetings(resume),
        first=_with_meetings(_flattened(numbered[0])),
        later=_with_meetings(_flattened(numbered[1])),
        end=_with_meetings(_flattened(end)),
        back_end=_with_meetings(_reversed(end, [], tracked)),
        back_later=_with_meetings(_reversed(numbered[1], prologue, tracked)),
        back_first=_with_meetings(_reversed(numbered[0], prologue, tracked)),
        state=tuple(state),
        known=tuple(c.register("D", k) for k in sorted(known)),
        path=tuple(path),
        tracked=tuple(sorted(tracked)),
        energies=tuple(energies),
    )


def _looks_first(code: Sequence[Instruction | _Group], c: _Compiler, k: int) -> bool:
    """Whether term k is evaluated before anything that it reads has moved: then its energy costs nothing more."""
    for item in code:
        if isinstance(item, Instruction) and item.y == c.register("D", k):
            return True
        if isinstance(item, _Group) and any(x.op == ADD and x.y == c.register("A", k) for x in item.code):
            return False
    return False


def _numbered(code: Sequence[Instruction | _Group]) -> list[Instruction | _Group]:
    """With the kept registers' slots counted."""
    counts: dict[int, int] = {}
    out: list[Instruction | _Group] = []
    for item in code:
        if isinstance(item, _Group):
            own = []
            for x in item.code:
                if x.op == KEEP:
                    x = x._replace(slot=counts.get(x.x, 0))
                    counts[x.x] = x.slot + 1
                own.append(x)
            item = item._replace(code=own)
        out.append(item)
    return out
