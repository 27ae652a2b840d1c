"""Smooth scenes: a pendulum, balls coupled by springs, two bodies in orbit; their energy and their exact motion.

Every scene has canonical coordinates (q, p) in which H = sum_i p_i^2 / (2 m_i) + V(q). Time is measured in frames and length in
pixels; mass is relative. With a drag g and a recorded push u, the motion is q' = p / m, p' = -dV/dq - g p + m u.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..errors import HJEPAError, UsageError
from .config import VideoConfig, coerce, shown

MOST = 1e9
"""Size of the largest constant that a file may give a scene."""
RESOLVED, FASTEST = 0.5, 4.0
"""Rates per frame, angular frequencies and drag: of one extrapolation of `Scene.advance`, and the largest of a scene."""
ROUNDS, TRIES = 12, 16
"""In which a random motion that can be shown is looked for: rounds, and motions of a round, which are computed together."""
PUSHES = {
    1: "torque over the moment of inertia, radians per frame^2",
    2: "force per mass on every ball in x and y, pixels per frame^2",
}
"""What a push is, by its numbers; recorded with it."""

_SUBSTEPS = (1, 2, 3, 4, 5)
_WEIGHTS = [math.prod(n * n / (n * n - m * m) for m in _SUBSTEPS if m != n) for n in _SUBSTEPS]
"""Of leapfrog's results with so many steps a frame in their extrapolation to endlessly many, of order 10."""


@dataclass(frozen=True)
class Scene(ABC):
    """What moves in a video and by which law; `of` makes the one that a configuration asks for.

    Coordinates and momenta are float64 arrays [..., n]. In the plane, q is (x_1, y_1, x_2, y_2, ...) from the middle of the
    frame, x to the right and y down.
    """

    name: ClassVar[str]

    size: int
    """Side of the frame in pixels."""
    radii: tuple[float, ...]
    """Of the balls, in pixels."""
    drag: float
    """Rate per frame at which momenta decay."""
    push: float
    """Largest size of the recorded push (`PUSHES`); 0 without one."""

    @property
    def n(self) -> int:
        """Degrees of freedom."""
        return 2 * len(self.radii)

    @property
    def push_dim(self) -> int:
        """Numbers of a push: one torque, or a force in x and y."""
        return 2

    @property
    def conservative(self) -> bool:
        """Whether the energy in the videos is constant: neither drag nor a push."""
        return self.drag == 0 and self.push == 0

    @functools.cached_property
    def masses(self) -> np.ndarray:
        """Mass of each coordinate, [n]; the balls' go with their areas, and their mean is 1."""
        areas = np.square(np.array(self.radii))
        return np.repeat(areas / areas.mean(), 2)

    @property
    def middle(self) -> float:
        """x and y of the middle of the frame in pixels; pixel (0, 0) has its centre at the origin."""
        return (self.size - 1) / 2

    @abstractmethod
    def potential(self, q: np.ndarray) -> np.ndarray:
        """V(q), [..., n] to [...]."""

    @abstractmethod
    def pull(self, q: np.ndarray) -> np.ndarray:
        """-dV/dq, [..., n]."""

    def positions(self, q: np.ndarray) -> np.ndarray:
        """Centres of the balls in pixels, [..., n] to [..., balls, 2]."""
        return self.middle + q.reshape(*q.shape[:-1], len(self.radii), 2)

    def velocities(self, q: np.ndarray, p: np.ndarray) -> np.ndarray:
        """Of the balls' centres in pixels per frame, [..., balls, 2]."""
        return (p / self.masses).reshape(*q.shape[:-1], len(self.radii), 2)

    @abstractmethod
    def start(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A random state q, p, each [n]; its motion may leave what `fits` allows."""

    def fits(self, q: np.ndarray) -> bool:
        """Whether a path [T, n] can be shown: the balls stay inside the frame."""
        inside = np.minimum(self.positions(q), self.size - 1 - self.positions(q)) - np.array(self.radii)[:, None]
        return bool((inside >= 0).all())

    def energy(self, q: np.ndarray, p: np.ndarray) -> np.ndarray:
        """H(q, p), [...], without what drag takes and a push gives."""
        return (p * p / (2 * self.masses)).sum(axis=-1) + self.potential(q)

    def check(self) -> None:
        """UsageError for constants that have no meaning, or whose motion `advance` does not resolve."""
        if self.size < 2 or self.size > 8192 or not self.radii or min(self.radii) <= 0 or max(self.radii) > self.size:
            raise UsageError(f"a frame of size {self.size} with balls of radius {shown(self.radii)}")
        for name, value in dataclasses.asdict(self).items():
            if name != "radii" and value < 0:
                raise UsageError(f"{name} is {value}, expected at least 0")
        for name, rate in {"drag": self.drag, **self.rates()}.items():
            if not rate <= FASTEST:
                raise UsageError(f"{name} is {rate:.3g} per frame, expected at most {FASTEST:g}")

    @abstractmethod
    def rates(self) -> dict[str, float]:
        """The largest angular frequencies that the scene can have, radians per frame."""

    @functools.cached_property
    def pieces(self) -> int:
        """Into how many extrapolations a frame is cut."""
        return max(1, math.ceil(min(max(self.drag, *self.rates().values()), FASTEST) / RESOLVED))

    def advance(self, q: np.ndarray, p: np.ndarray, push: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The state one frame later, all but for rounding; `push` [push_dim] is held meanwhile.

        Each leapfrog step is a symmetric composition of exact flows, that of the drift and that of pull, push and drag, so that
        its error has even powers of the step alone. Extrapolating from 1 to 5 steps, in each piece of a frame, removes the
        first four of them (Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", II.9).
        """
        extra = np.zeros(1) if push is None else self.masses * np.resize(push, self.n)
        for _ in range(self.pieces):
            q, p = self._extrapolate(q, p, extra, 1 / self.pieces)
        return q, p

    def _extrapolate(self, q: np.ndarray, p: np.ndarray, extra: np.ndarray, time: float) -> tuple[np.ndarray, np.ndarray]:
        masses = self.masses
        moved, gained = np.zeros_like(q), np.zeros_like(p)
        for steps, weight in zip(_SUBSTEPS, _WEIGHTS, strict=True):
            h = time / steps
            lost = -math.expm1(-self.drag * h)  # the share of a momentum, and below the time that a force has acted for
            acting = lost / self.drag if self.drag else h
            # changes and not states: the weights' own rounding errors would scale the states, frame after frame
            dq, dp = (0.5 * h) * p / masses, np.zeros_like(p)
            for step in range(steps):
                dp = dp - lost * (p + dp) + acting * (self.pull(q + dq) + extra)
                dq = dq + (h if step < steps - 1 else 0.5 * h) * (p + dp) / masses
            moved += weight * dq
            gained += weight * dp
        return q + moved, p + gained

    def path(
        self, q: np.ndarray, p: np.ndarray, n_states: int, pushes: np.ndarray | None = None, stride: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """States at frames 0 (that given), stride, 2 stride, ..., each [n_states, ..., n]; `pushes` [frames, push_dim]."""
        path = np.empty((2, n_states, *q.shape))
        for state in range(n_states):
            for frame in range((state - 1) * stride, state * stride) if state else ():
                q, p = self.advance(q, p, None if pushes is None else pushes[frame])
            path[0, state], path[1, state] = q, p
        return path[0], path[1]

    def draw(self, rng: np.random.Generator, n_frames: int, pushes: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """A random motion that fits, q and p, each [n_frames, n].

        Raises
        ------
        UsageError
            None of those that were tried fits.
        """
        for _ in range(ROUNDS):
            starts = [self.start(rng) for _ in range(TRIES)]
            q, p = self.path(np.stack([q for q, _ in starts]), np.stack([p for _, p in starts]), n_frames, pushes)
            for i in range(TRIES):
                if self.fits(q[:, i]):
                    return q[:, i].copy(), p[:, i].copy()
        raise UsageError(
            f"none of {ROUNDS * TRIES} random motions of scene {self.name} can be shown inside the frame, nothing touching: "
            f"expected smaller balls, less drag ({self.drag:g}) or force ({self.push:g}), or shorter videos"
        )

    def to_dict(self) -> dict[str, Any]:
        """The scene as plain values, for `read`."""
        return {"name": self.name, **dataclasses.asdict(self), "radii": list(self.radii)}


@dataclass(frozen=True)
class Pendulum(Scene):
    """A rigid pendulum: q is the angle from hanging, not wrapped, p its rate; H = p^2 / 2 + frequency^2 (1 - cos q).

    It swings below the separatrix, with amplitudes of 0.3 to 2.2 rad, so that an angle and what is seen determine each other.
    """

    name = "pendulum"

    length: float
    """Of the rod, in pixels."""
    frequency: float
    """Of small swings, radians per frame."""

    @property
    def n(self) -> int:
        return 1

    @property
    def push_dim(self) -> int:
        return 1

    @functools.cached_property
    def masses(self) -> np.ndarray:
        return np.ones(1)

    def potential(self, q: np.ndarray) -> np.ndarray:
        return 2 * self.frequency**2 * np.square(np.sin(q[..., 0] / 2))

    def pull(self, q: np.ndarray) -> np.ndarray:
        return -(self.frequency**2) * np.sin(q)

    def positions(self, q: np.ndarray) -> np.ndarray:
        return self.middle + self.length * np.stack([np.sin(q), np.cos(q)], axis=-1)

    def velocities(self, q: np.ndarray, p: np.ndarray) -> np.ndarray:
        return self.length * p[..., None] * np.stack([np.cos(q), -np.sin(q)], axis=-1)

    def start(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        amplitude, phase = rng.uniform(0.3, 2.2), rng.uniform(0, 2 * math.pi)
        q = amplitude * math.cos(phase)
        p = 2 * self.frequency * math.sqrt(max(math.sin(amplitude / 2) ** 2 - math.sin(q / 2) ** 2, 0.0))
        return np.array([q]), np.array([math.copysign(p, -math.sin(phase))])

    def fits(self, q: np.ndarray) -> bool:
        return bool((np.abs(q) < 3).all()) and super().fits(q)

    def rates(self) -> dict[str, float]:
        return {"frequency": self.frequency}


def _hold(scene: Springs | Orbit, q: np.ndarray) -> np.ndarray:
    """Potential of the weak springs that hold every ball to the middle, proportional to its mass."""
    return 0.5 * scene.hold**2 * (scene.masses * q * q).sum(axis=-1)


@dataclass(frozen=True)
class Springs(Scene):
    """A chain of balls coupled by springs: V = stiffness / 2 sum (|q_i+1 - q_i| - length)^2 + hold^2 / 2 sum m_i |q_i|^2.

    The second term, a weak spring from each ball to the middle, keeps the centre of mass in view: it oscillates there.
    """

    name = "springs"

    length: float
    """Of a spring at rest, in pixels."""
    stiffness: float
    """Of a spring, mass per frame^2."""
    hold: float
    """Angular frequency of the centre of mass, radians per frame."""

    def potential(self, q: np.ndarray) -> np.ndarray:
        stretch = np.linalg.norm(self._springs(q), axis=-1) - self.length
        return 0.5 * self.stiffness * np.square(stretch).sum(axis=-1) + _hold(self, q)

    def pull(self, q: np.ndarray) -> np.ndarray:
        spring = self._springs(q)
        distance = np.sqrt(np.square(spring).sum(axis=-1, keepdims=True))
        tension = self.stiffness * spring * (1 - self.length / np.maximum(distance, 1e-12))
        pull = -(self.hold**2) * self.masses * q
        flat = tension.reshape(*q.shape[:-1], self.n - 2)
        pull[..., :-2] += flat
        pull[..., 2:] -= flat
        return pull

    def _springs(self, q: np.ndarray) -> np.ndarray:
        """From each ball to the next, [..., springs, 2]."""
        return (q[..., 2:] - q[..., :-2]).reshape(*q.shape[:-1], len(self.radii) - 1, 2)

    def start(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        balls, rate = len(self.radii), math.sqrt(self.stiffness)
        angle = rng.uniform(0, 2 * math.pi)
        lengths = self.length * rng.uniform(0.65, 1.15, balls - 1)
        along = np.concatenate([[0.0], np.cumsum(lengths)])
        q = along[:, None] * np.array([math.cos(angle), math.sin(angle)])
        v = self.length * rate * rng.uniform(-0.35, 0.35, (balls, 2))
        mass = self.masses[::2, None]
        q, v = (x - (mass * x).mean(axis=0) for x in (q, v))
        radius, direction = 0.09 * self.size * np.sqrt(rng.random(2)), rng.uniform(0, 2 * math.pi, 2)
        centre = radius[:, None] * np.stack([np.cos(direction), np.sin(direction)], axis=1)
        return (q + centre[0]).ravel(), (mass * (v + self.hold * centre[1])).ravel()

    def fits(self, q: np.ndarray) -> bool:
        """Whether besides no spring gets shorter than a third of its length: its direction is singular at 0."""
        return bool((np.linalg.norm(self._springs(q), axis=-1) > self.length / 3).all()) and super().fits(q)

    def rates(self) -> dict[str, float]:
        return {"sqrt(4 stiffness / mass)": math.sqrt(4 * self.stiffness / self.masses.min()), "hold": self.hold}

    def check(self) -> None:
        super().check()
        if len(self.radii) < 2:
            raise UsageError(f"scene springs has {len(self.radii)} ball, expected at least 2")
        if self.length < 2 * max(self.radii):
            raise UsageError(
                f"springs of {self.length:.3g} pixels between balls of radius {max(self.radii):g}: "
                "expected fewer or smaller balls, or a larger size"
            )


@dataclass(frozen=True)
class Orbit(Scene):
    """Two bodies that attract each other: V = -attraction m_1 m_2 / sqrt(r^2 + softening^2) + hold^2 / 2 sum m_i |q_i|^2.

    They are r apart. The second term, a weak spring from each body to the middle, keeps the centre of mass in view. Without it
    and without the softening, which keeps energies and rates finite, the bodies move by Kepler's laws.
    """

    name = "orbit"

    attraction: float
    """The constant of gravity, pixels^3 per frame^2 and mass."""
    softening: float
    """In pixels."""
    hold: float
    """Angular frequency of the centre of mass, radians per frame."""

    def potential(self, q: np.ndarray) -> np.ndarray:
        apart = q[..., 2:] - q[..., :2]
        distance = np.sqrt(np.square(apart).sum(axis=-1) + self.softening**2)
        return -self.attraction * self.masses[0] * self.masses[2] / distance + _hold(self, q)

    def pull(self, q: np.ndarray) -> np.ndarray:
        apart = q[..., 2:] - q[..., :2]
        square = np.square(apart).sum(axis=-1, keepdims=True) + self.softening**2
        force = self.attraction * self.masses[0] * self.masses[2] * apart / (square * np.sqrt(square))
        return np.concatenate([force, -force], axis=-1) - self.hold**2 * self.masses * q

    def start(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """An ellipse of the bodies alone, of eccentricity up to 0.3, at a random place of it."""
        axis, eccentricity = self.size * rng.uniform(0.3, 0.4), rng.uniform(0, 0.3)
        place, turned = rng.uniform(0, 2 * math.pi, 2)
        sense = rng.choice([-1.0, 1.0])
        first, second = self.masses[0], self.masses[2]
        parameter = axis * (1 - eccentricity**2)
        speed = math.sqrt(self.attraction * (first + second) / parameter)
        apart = parameter / (1 + eccentricity * math.cos(place)) * np.array([math.cos(place), sense * math.sin(place)])
        v = speed * np.array([-math.sin(place), sense * (eccentricity + math.cos(place))])
        turn = np.array([[math.cos(turned), -math.sin(turned)], [math.sin(turned), math.cos(turned)]])
        apart, v = turn @ apart, turn @ v
        radius, direction = 0.06 * self.size * np.sqrt(rng.random(2)), rng.uniform(0, 2 * math.pi, 2)
        centre = radius[:, None] * np.stack([np.cos(direction), np.sin(direction)], axis=1)
        shares = np.array([-second, first])[:, None] / (first + second)
        q, v = centre[0] + shares * apart, self.hold * centre[1] + shares * v
        return q.ravel(), self.masses * v.ravel()

    def fits(self, q: np.ndarray) -> bool:
        """Whether besides the bodies do not touch."""
        return bool((np.linalg.norm(q[..., 2:] - q[..., :2], axis=-1) >= sum(self.radii)).all()) and super().fits(q)

    def rates(self) -> dict[str, float]:
        core = math.sqrt(self.attraction * (self.masses[0] + self.masses[2]) / max(self.softening, 1e-9) ** 3 + self.hold**2)
        return {"hold": self.hold, "the frequency of small orbits": core}

    def check(self) -> None:
        super().check()
        if len(self.radii) != 2:
            raise UsageError(f"scene orbit has {len(self.radii)} bodies, expected 2")


KINDS: dict[str, type[Scene]] = {kind.name: kind for kind in (Pendulum, Springs, Orbit)}


def of(config: VideoConfig) -> Scene | None:
    """The smooth scene that a configuration asks for; None for the collisions.

    Small swings of the pendulum take 52 frames. Two balls of equal mass on a spring take 50 without the hold, and by the hold
    alone 100. An orbit a third of the frame's side across takes 56 without the hold, and by the hold alone 110.

    Raises
    ------
    UsageError
        A number that the scene cannot be made with.
    """
    if config.scene == "collisions":
        return None
    size, balls = config.size, {"pendulum": 1, "orbit": 2}.get(config.scene, config.n_balls)
    if config.n_balls not in (balls, VideoConfig().n_balls):
        raise UsageError(f"n_balls is {config.n_balls}, expected {balls} in scene {config.scene}")
    if config.restitution != 1:
        raise UsageError(
            f"restitution is {config.restitution}: in scene {config.scene} nothing collides; it is an option of collisions"
        )
    if len(config.radius) not in (1, balls):
        raise UsageError(f"radius has {len(config.radius)} values, expected 1 or one per ball (of which there are {balls})")
    radii = tuple(np.resize(np.array(config.radius), balls).tolist())
    common: dict[str, Any] = {"size": size, "radii": radii, "drag": config.drag, "push": config.force}
    scene: Scene
    if config.scene == "pendulum":
        length = 0.36 * size
        scene = Pendulum(**common | {"push": config.force / length}, length=length, frequency=2 * math.pi / 52)
    elif config.scene == "springs":
        length = 0.4 * size * min(1, 1.5 / max(balls - 1, 1))
        scene = Springs(**common, length=length, stiffness=0.5 * (2 * math.pi / 50) ** 2, hold=2 * math.pi / 100)
    else:
        attraction = (2 * math.pi / 56) ** 2 * (size / 3) ** 3 / 2
        scene = Orbit(**common, attraction=attraction, softening=0.1 * size, hold=2 * math.pi / 110)
    scene.check()
    return scene


def read(values: Any, source: str, error: type[HJEPAError] = HJEPAError) -> Scene:
    """A scene from plain values, as `Scene.to_dict` gives them; `source` names the file.

    Raises
    ------
    HJEPAError, or `error`
        They are not a known scene's, or have no meaning.
    """
    try:
        if not isinstance(values, Mapping) or not isinstance(values.get("name"), str) or values["name"] not in KINDS:
            found = values.get("name") if isinstance(values, Mapping) else values
            raise UsageError(f"expected a scene named {', '.join(KINDS)}, found {shown(found)}")
        kind = KINDS[values["name"]]
        hints = {field.name: typing.get_type_hints(kind)[field.name] for field in dataclasses.fields(kind)}
        if set(hints) | {"name"} != set(values):
            found = ", ".join(map(shown, list(values)[:20]))
            raise UsageError(f"{kind.name} has {', '.join(hints)}; found {found}")
        scene = kind(**{name: coerce(hint, values[name], name, MOST) for name, hint in hints.items()})
        scene.check()
    except UsageError as failure:
        raise error(f"{source}: scene: {failure}") from failure
    return scene
