"""Command line `hjepa-fast`: parses arguments, calls the library, turns errors into messages."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import dataclasses
import io
import os
import signal
import sys
import threading
import traceback
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TextIO

import torch

from . import __version__
from .api import BACKENDS, INTEGRATORS
from .errors import HJEPAError, UsageError
from .pipeline import distributed, files
from .pipeline.config import RECIPES, WORLDS, Config, EncodeConfig, VideoConfig, world
from .pipeline.places import place
from .pipeline.run_folder import Run, inside
from .pipeline.zoo import MODELS, chosen

MOST_THREADS = 4096
EXIT_FAILURE, EXIT_USAGE, EXIT_SIGNAL = 1, 2, 128
ON_MANY = ("encode", "train", "evaluate", "reproduce", "demo")
"""Commands that processes started by torchrun do together."""
GOES_ON = "the same command goes on from here"


class Ended(KeyboardInterrupt):
    """A signal that asks the process to end, which is done as after Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Standard output and standard error may be closed, broken, or unable to show what is written: work goes on.

    Returns
    -------
    int
        The exit code: 0, 1 (failure), 2 (usage), or 128 and the number of the signal that ended it (130 for Ctrl-C).
    """
    _lost.clear()
    _prepare_streams()
    try:
        with _ended_by_signals():
            code = _run(arguments)
    except KeyboardInterrupt as end:  # between the command and here
        code = _interrupted(end)
    except Exception:  # --debug
        if distributed.size() == 1:
            raise
        traceback.print_exc()
        code = EXIT_FAILURE
    _print("")  # help, which argparse left unwritten
    if _lost and not code:
        _complain(f"error: standard output cannot be written: {_lost[0]}; all files are")
        code = EXIT_FAILURE
    _write(sys.stderr, "")
    distributed.end(code)
    return code


def _run(arguments: Sequence[str] | None) -> int:
    parser = build_parser()
    try:
        with _silent(not distributed.speaks()):
            options = parser.parse_args(arguments)
    except SystemExit as end:  # argparse has printed its message, or the help
        return end.code if isinstance(end.code, int) else EXIT_USAGE
    try:
        with warnings.catch_warnings():
            if any(action == "error" for action, *_ in warnings.filters):  # PYTHONWARNINGS; a warning ends no training
                warnings.simplefilter("default")
            warnings.showwarning = _show_warning
            _run_command(options)
    except HJEPAError as error:
        if options.debug:
            raise
        _complain_once(f"error: {error}")
        return EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILURE
    except KeyboardInterrupt as end:
        return _interrupted(end)
    except Exception as error:
        if distributed.is_lost(error):
            _complain_once(f"error: another process has ended; {GOES_ON}, and so does torchrun with --max-restarts")
            return EXIT_FAILURE
        if options.debug:
            raise
        _complain_once(f"unexpected error: {type(error).__name__}: {error} (--debug shows where)")
        return EXIT_FAILURE
    return 0


def _run_command(options: argparse.Namespace) -> None:
    """Together with the other processes if torchrun started some."""
    device = "cpu"
    if distributed.launched():
        if not options.on_many:
            distributed.refuse(options.name)
        device = options.device = distributed.device(options.device)
    with distributed.joined(device), _threads(getattr(options, "threads", None)):
        options.quiet |= not distributed.is_first()
        options.command(options)


@contextlib.contextmanager
def _threads(n: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if n is not None:
            torch.set_num_threads(n)
        yield
    finally:
        if n is not None:
            torch.set_num_threads(before)


@contextlib.contextmanager
def _silent(silent: bool) -> Iterator[None]:
    nowhere = io.StringIO()
    with (
        contextlib.redirect_stderr(nowhere if silent else sys.stderr),
        contextlib.redirect_stdout(nowhere if silent else sys.stdout),
    ):
        yield


def _interrupted(end: KeyboardInterrupt) -> int:
    number = end.args[0] if isinstance(end, Ended) else signal.SIGINT
    _complain_once(f"{f'ended by {signal.Signals(number).name}' if isinstance(end, Ended) else 'interrupted'}; {GOES_ON}")
    return EXIT_SIGNAL + number


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """End as after Ctrl-C when a terminal closes or a scheduler stops the process; what ignores them (nohup) still does."""

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # once: tidying up is not interrupted
        raise Ended(number)

    previous = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")):
                if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                    previous[number] = signal.signal(number, end)
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


_ASCII = {"±": "+-", "²": "^2"}
_lost: list[OSError | ValueError] = []
"""Why results could not be printed; a reader that has seen enough, such as `head`, does not count."""


def _as_ascii(error: UnicodeError) -> tuple[str | bytes, int]:
    """For `codecs.register_error`: what a stream's encoding has not, in characters that every one has."""
    if isinstance(error, UnicodeEncodeError):
        text = "".join(
            _ASCII.get(c, c.encode("ascii", "backslashreplace").decode()) for c in error.object[error.start : error.end]
        )
        return text, error.end
    raise error


def _prepare_streams() -> None:
    codecs.register_error("hjepa_fast", _as_ascii)
    for name in ("stdin", "stdout", "stderr"):  # a closed one leaves its number to the next file that is opened
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors="hjepa_fast")


def _say(text: object = "") -> None:
    """Print a result."""
    if distributed.speaks():
        _print(f"{text}\n")


def _print(text: str) -> None:
    if (error := _write(sys.stdout, text)) and not isinstance(error, BrokenPipeError):
        _lost.append(error)


def _complain(text: str) -> None:
    _write(sys.stderr, f"hjepa-fast: {text}\n")


def _complain_once(text: str) -> None:
    """Why the command ends, which one of its processes says, the first to know."""
    if distributed.once("the end"):
        _complain(text)


def _write(stream: TextIO, text: str) -> OSError | ValueError | None:
    """Write and flush. A stream that fails is silent from then on, so that neither the work nor the exit fails as well."""
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError) as error:  # a ValueError: it was closed
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None


def build_parser() -> argparse.ArgumentParser:
    """The parser; every configuration field of `pipeline.config` is an option of the commands that use it."""
    parser = argparse.ArgumentParser(
        prog="hjepa-fast", description="Hamiltonian world models on V-JEPA 2 latents, from videos to the table of results."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = _command(commands, "generate", "generate synthetic videos with their ground truth", _generate, ("videos",))
    _add_world(command)
    command.add_argument("--out", type=Path, default=Path("videos"), metavar="DIR", help="folder of videos (default: videos)")

    command = _command(commands, "encode", "encode a folder of videos into latents", _encode, ("encode",))
    command.add_argument("videos", type=Path, help="folder of videos (mp4, mov, avi, mkv, webm, ...)")
    command.add_argument(
        "--out", default="latents", metavar="DIR", help="folder of latents, or an address such as s3://... (default: latents)"
    )
    _add_device(command)

    command = _command(commands, "train", "train models on a folder of latents", _train, ("data", "train", "evaluate"))
    command.add_argument("latents", help="folder made by 'encode', or an address such as s3://...")
    command.add_argument(
        "--videos", type=Path, metavar="DIR", help="the videos behind the latents, for the probe, figures and recorded controls"
    )
    _add_run(command)
    _add_recipe(command)
    _add_models(command)
    _add_tensorboard(command)
    _add_device(command)

    command = _command(commands, "evaluate", "evaluate a run's trained models and write its table", _evaluate)
    command.add_argument("run", type=Path, help="a run's folder")
    _add_partial(command)
    _add_device(command)

    command = _command(commands, "figures", "draw a run's figures again", _figures)
    command.add_argument("run", type=Path, help="a run's folder")
    _add_partial(command)

    command = _command(commands, "dream", "roll out freely from one latent or one video clip", _dream)
    command.add_argument("checkpoint", type=Path, help="a trained model, such as RUN/models/hnn/best.safetensors")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--latents", type=Path, metavar="FILE", help="start from a latent of this file")
    source.add_argument("--video", type=Path, metavar="FILE", help="start from a clip of this video")
    command.add_argument("--index", type=int, default=0, help="which latent or clip, from 0 (default: 0)")
    command.add_argument("--steps", type=int, default=20, help="steps to roll out (default: 20)")
    command.add_argument(
        "--control",
        type=Path,
        metavar="FILE",
        help="control of a model with a port, as NAME.control.json: a row for each frame of the video (default: none)",
    )
    command.add_argument("--encoder", help="encoder for --video (default: the one the model was trained with)")
    command.add_argument(
        "--out",
        type=Path,
        default=Path("dream"),
        metavar="STEM",
        help="writes STEM.safetensors, STEM.png, STEM.pdf, STEM.mp4 and STEM.gif (default: dream)",
    )
    command.add_argument(
        "--animation", action=argparse.BooleanOptionalAction, default=True, help="write STEM.mp4 and STEM.gif (default: yes)"
    )
    _add_device(command)

    command = _command(commands, "check", "measure what integrators keep of a trained model's dynamics", _check)
    command.add_argument("checkpoint", type=Path, help="a trained model, such as RUN/models/hnn/best.safetensors")
    command.add_argument(
        "--integrators",
        type=_names,
        metavar="NAME,NAME",
        help=f"which: {', '.join(INTEGRATORS)} (default: the model's own and implicit-leapfrog)",
    )
    command.add_argument("--dt", type=float, metavar="X", help="step size (default: the model's)")
    command.add_argument("--steps", type=int, default=1000, metavar="N", help="steps of the energy drift (default: 1000)")
    command.add_argument("--states", type=int, default=8, metavar="N", help="states to start from (default: 8)")
    command.add_argument(
        "--latents", type=Path, metavar="FILE", help="start from latents of this file, not from standard normal states"
    )
    command.add_argument("--backend", default="auto", choices=BACKENDS, help="what computes the rollouts (default: auto)")
    _add_threads(command)
    command.add_argument(
        "--out",
        type=Path,
        default=Path("check"),
        metavar="STEM",
        help="writes STEM.json, STEM.png and STEM.pdf (default: check)",
    )
    command.add_argument(
        "--strict", action="store_true", help="exit with 1 if something does not hold that is claimed of an integrator"
    )

    sections = tuple(f.name for f in dataclasses.fields(Config))
    command = _command(commands, "reproduce", "the whole pipeline, from videos to table and figures", _reproduce, sections)
    _add_run(command)
    command.add_argument("--videos", type=Path, metavar="DIR", help="use this folder of videos instead of synthetic ones")
    _add_world(command)
    _add_recipe(command)
    command.add_argument(
        "--quick",
        action="store_true",
        help="a smoke test in under two minutes on two cores: offline encoder, 10 videos with a "
        "gradient background, 3 epochs, 100 extended steps; other options override these",
    )
    _add_models(command)
    _add_partial(command)
    _add_tensorboard(command)
    _add_device(command)

    command = _command(
        commands,
        "demo",
        "in minutes: models on the true states of two bodies in orbit, then on collisions as the offline encoder sees them",
        _demo,
    )
    command.add_argument(
        "--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="folder of both runs (default: runs/demo)"
    )
    _add_device(command)
    return parser


def _command(commands: Any, name: str, help: str, run: Any, sections: Sequence[str] = ()) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    command.set_defaults(command=run, name=name, on_many=name in ON_MANY)
    command.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    command.add_argument("--quiet", action="store_true", help="no progress, only results and warnings")
    if sections:
        command.add_argument(
            "--config", type=Path, metavar="FILE", help="JSON settings, such as a run's config.json; options override it"
        )
    for section in sections:
        kind = type(getattr(Config(), section))
        group = command.add_argument_group(section)
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            _add_field(group, section, field, hints[field.name])
    return command


def _add_field(group: Any, section: str, field: dataclasses.Field[Any], hint: Any) -> None:
    default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    options: dict[str, Any] = {
        "dest": f"{section}.{field.name}",
        "default": argparse.SUPPRESS,
        "help": f"{field.metadata['help']} (default: {default})".replace("%", "%%"),
    }
    if hint is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(hint) is Literal:
        options["choices"] = typing.get_args(hint)
    elif type(None) in typing.get_args(hint):
        kind = typing.get_args(typing.get_args(hint)[0])
        metavar: Any = "N" if Ellipsis in kind else ("LOW", "HIGH")
        options |= {"action": _NumbersOrNone, "type": str, "nargs": "+", "metavar": metavar, "const": kind[0]}
    elif typing.get_origin(hint) is tuple:
        options |= {"type": _numbers, "metavar": "X,X"}
    else:
        options |= {"type": hint, "metavar": {int: "N", float: "X", str: "NAME"}[hint]}
    group.add_argument(f"--{field.name.replace('_', '-')}", **options)


class _NumbersOrNone(argparse.Action):
    """`LOW HIGH`, `LOW,HIGH` or `none`, numbers of the type `const`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        text = ",".join(values)
        try:
            setattr(namespace, self.dest, None if text == "none" else _numbers(text, self.const))
        except ValueError as error:
            what = "integers" if self.const is int else "two numbers"
            raise argparse.ArgumentError(self, f"expected {what} or none, found {' '.join(values)!r}") from error


def _numbers(text: str, kind: type = float) -> tuple[Any, ...]:
    return tuple(kind(part) for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _add_world(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--world",
        choices=tuple(WORLDS),
        help="what the synthetic scene lives in: elastic, as published; damped, with drag and losses at collisions, and models "
        "with conformal friction; driven, by a recorded force or torque, which is the models' control. Sets --restitution, "
        "--drag, --force, --friction and --control, also those of a --config; these options override it",
    )


def _add_recipe(command: argparse.ArgumentParser) -> None:
    fields = ", ".join(f"--{name.replace('_', '-')}" for name in RECIPES["published"]["train"])
    command.add_argument(
        "--recipe",
        choices=tuple(RECIPES),
        help="how models are trained: published, as H-JEPA's; smooth, for latents that are canonical states of a smooth "
        f"motion. Sets {fields}, also those of a --config; these options override it",
    )


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto, a GPU if there is one)")
    _add_threads(command)


def _add_threads(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--threads", type=_positive, metavar="N", help="threads of the computations on the CPU (default: PyTorch's, all cores)"
    )


def _positive(text: str) -> int:
    if not (text.isdecimal() and 0 < int(text) <= MOST_THREADS):
        raise argparse.ArgumentTypeError(f"expected an integer from 1 to {MOST_THREADS}, found {text!r}")
    return int(text)


def _add_tensorboard(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--tensorboard",
        action="store_true",
        help="also log the epochs for TensorBoard, into the folder tensorboard of the run (needs the package tensorboard)",
    )


def _add_partial(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--partial", action="store_true", help="exit with 0 even if the training of a model in the run is not finished"
    )


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--out", type=Path, default=Path("runs/hjepa"), metavar="DIR", help="the run's folder (default: runs/hjepa)"
    )


def _add_models(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--models",
        nargs="+",
        choices=list(MODELS),
        metavar="NAME",
        help=f"which models to train: {', '.join(MODELS)} (default: all; those without friction or control only where the "
        "others have it)",
    )


def config_of(options: argparse.Namespace, preset: dict[str, dict[str, Any]] | None = None) -> Config:
    """Defaults, then the preset, then the file of --config, then what --world and --recipe set, then options."""
    values: dict[str, dict[str, Any]] = {section: dict(fields) for section, fields in (preset or {}).items()}
    if getattr(options, "config", None):
        recorded = Config.from_dict(files.read_json(options.config, "configuration"), str(options.config))
        values = recorded.to_dict()
    presets = []
    if getattr(options, "world", None):
        recorded_scene = values.get("videos", {}).get("scene", VideoConfig().scene)
        presets.append(world(options.world, vars(options).get("videos.scene", recorded_scene)))
    if getattr(options, "recipe", None):
        presets.append(RECIPES[options.recipe])
    for named in presets:
        for section, fields in named.items():
            values.setdefault(section, {}).update(fields)
    for name, value in vars(options).items():
        section, dot, field = name.partition(".")
        if dot:
            values.setdefault(section, {})[field] = value
    return Config.from_dict(values, "options")


def _may_fetch(options: argparse.Namespace) -> bool:
    """Whether the user, and not a file of settings, chose the encoder."""
    if options.config is None or "encode.encoder" in vars(options):
        return True
    recorded, default = config_of(options).encode, EncodeConfig()
    return (recorded.encoder, recorded.revision) == (default.encoder, default.revision)


def _generate(options: argparse.Namespace) -> None:
    from .pipeline.runs import make_videos

    with inside(options.out):
        paths = make_videos(options.out, config_of(options), not options.quiet)
    _say(f"{len(paths)} videos in {options.out}")


def _encode(options: argparse.Namespace) -> None:
    from .pipeline.runs import encode

    out = place(options.out)
    with distributed.by_first(inside(out)):
        paths = encode(options.videos, out, config_of(options), options.device, not options.quiet, _may_fetch(options))
    _say(f"latents of {len(paths)} videos in {options.out}")


def _train(options: argparse.Namespace) -> None:
    from .pipeline import tensorboard
    from .pipeline.encoders import resolve_device
    from .pipeline.runs import check_settings, read_windows, train_models

    run, config = Run(options.out), config_of(options)
    names = chosen(options.models, config.train, config.data)
    check_settings(config, names)
    if options.tensorboard:
        tensorboard.check_available()
    resolve_device(options.device)
    latents = place(options.latents)
    distributed.on_first(lambda: files.refuse_if_locked(latents))
    dataset = read_windows(latents, config, options.videos, not options.quiet)
    with distributed.by_first(run.locked()):
        distributed.on_first(lambda: run.start(config, options.videos, latents, names))
        train_models(run, names, dataset, config, options.device, not options.quiet, _say, options.tensorboard)


def _evaluate(options: argparse.Namespace) -> None:
    from .pipeline.runs import evaluate_run
    from .pipeline.tables import summary_table

    run = Run(options.run)
    summary = evaluate_run(run, options.device, not options.quiet)
    _say(summary_table(summary))
    _refuse_unfinished(run, summary, options)


def _figures(options: argparse.Namespace) -> None:
    from .pipeline.figures import draw, read_summary

    run = Run(options.run)
    for path in draw(run):
        _say(path)
    _refuse_unfinished(run, read_summary(run), options)


def _refuse_unfinished(run: Run, summary: Mapping[str, Any], options: argparse.Namespace) -> None:
    from .pipeline.tables import unfinished

    if (found := unfinished(summary)) and not options.partial:
        raise HJEPAError(
            f"the training in {run.root} is not finished: {'; '.join(found)}. Run the command that trains again, which goes on "
            "from there, or delete the folders of models that are not wanted, or allow this with --partial."
        )


def _dream(options: argparse.Namespace) -> None:
    from .pipeline.dream import dream

    result = dream(
        options.checkpoint,
        options.out,
        latents=options.latents,
        video=options.video,
        index=options.index,
        n_steps=options.steps,
        encoder=options.encoder,
        device=options.device,
        control=options.control,
        animate=options.animation,
    )
    _say(result.text)
    for path in result.paths:
        _say(path)


def _check(options: argparse.Namespace) -> None:
    from .pipeline.check import check

    result = check(
        options.checkpoint,
        options.out,
        integrators=options.integrators,
        dt=options.dt,
        n_steps=options.steps,
        n_states=options.states,
        latents=options.latents,
        backend=options.backend,
    )
    _say(result.text)
    for path in result.paths:
        _say(path)
    if options.strict and result.failed:
        raise HJEPAError(f"claimed, and does not hold: {'; '.join(result.failed)}")


def _reproduce(options: argparse.Namespace) -> None:
    from .pipeline.runs import QUICK, reproduce

    if options.world and options.videos:
        raise UsageError("--world is of the synthetic videos, and --videos names others: give one of them")
    config = config_of(options, QUICK if options.quick else None)
    names = chosen(options.models, config.train, config.data)
    summary = reproduce(
        config, options.out, options.videos, names, options.device, not options.quiet, _say, _may_fetch(options),
        options.tensorboard,
    )  # fmt: skip
    run = Run(options.out)
    _say(f"figures: {run.figures}")
    _refuse_unfinished(run, summary, options)


def _demo(options: argparse.Namespace) -> None:
    from .pipeline.findings import motion
    from .pipeline.runs import demo

    for run, summary in demo(options.out, options.device, not options.quiet, _say):
        found = f"{motion(summary)}\n" if "motion" in summary else ""
        _say(f"\n{found}table: {run.table}\nfigures: {run.figures}")


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning) and distributed.once(str(message)):
        _complain(f"warning: {message}")


if __name__ == "__main__":
    sys.exit(main())
