"""Command line `hjepa-fast`: parses arguments, calls the library, turns errors into messages."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from . import __version__
from .api import BACKENDS, INTEGRATORS
from .errors import HJEPAError, UsageError
from .pipeline import files
from .pipeline.config import Config, EncodeConfig
from .pipeline.run_folder import Run
from .pipeline.zoo import MODELS

EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 (failure), 2 (usage) or 130 (interrupted)."""
    parser = build_parser()
    try:
        options = parser.parse_args(arguments)
    except SystemExit as end:  # argparse has printed its message, or the help
        return end.code if isinstance(end.code, int) else EXIT_USAGE
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            options.command(options)
    except HJEPAError as error:
        if options.debug:
            raise
        print(f"hjepa-fast: error: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILURE
    except KeyboardInterrupt:
        print("hjepa-fast: interrupted; the same command goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser; every configuration field of `pipeline.config` is an option of the commands that use it."""
    parser = argparse.ArgumentParser(
        prog="hjepa-fast", description="Hamiltonian world models on V-JEPA 2 latents, from videos to the table of results."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = _command(commands, "generate", "generate synthetic videos of colliding balls", _generate, ("videos",))
    command.add_argument("--out", type=Path, default=Path("videos"), metavar="DIR", help="folder of videos (default: videos)")

    command = _command(commands, "encode", "encode a folder of videos into latents", _encode, ("encode",))
    command.add_argument("videos", type=Path, help="folder of mp4, avi or mov files")
    command.add_argument(
        "--out", type=Path, default=Path("latents"), metavar="DIR", help="folder of latents (default: latents)"
    )
    _add_device(command)

    command = _command(commands, "train", "train models on a folder of latents", _train, ("data", "train", "evaluate"))
    command.add_argument("latents", type=Path, help="folder made by 'encode'")
    command.add_argument("--videos", type=Path, metavar="DIR", help="the videos behind the latents, for the probe and figures")
    _add_run(command)
    _add_models(command)
    _add_device(command)

    command = _command(commands, "evaluate", "evaluate a run's trained models and write its table", _evaluate)
    command.add_argument("run", type=Path, help="a run's folder")
    _add_device(command)

    command = _command(commands, "figures", "draw a run's figures again", _figures)
    command.add_argument("run", type=Path, help="a run's folder")

    command = _command(commands, "dream", "roll out freely from one latent or one video clip", _dream)
    command.add_argument("checkpoint", type=Path, help="a trained model, such as RUN/models/hnn/best.safetensors")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--latents", type=Path, metavar="FILE", help="start from a latent of this file")
    source.add_argument("--video", type=Path, metavar="FILE", help="start from a clip of this video")
    command.add_argument("--index", type=int, default=0, help="which latent or clip, from 0 (default: 0)")
    command.add_argument("--steps", type=int, default=20, help="steps to roll out (default: 20)")
    command.add_argument("--encoder", help="encoder for --video (default: the one the model was trained with)")
    command.add_argument(
        "--out",
        type=Path,
        default=Path("dream"),
        metavar="STEM",
        help="writes STEM.safetensors, STEM.png and STEM.pdf (default: dream)",
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
    command.add_argument(
        "--quick",
        action="store_true",
        help="a smoke test in under two minutes on two cores: offline encoder, 10 videos with a "
        "gradient background, 3 epochs, 100 extended steps; other options override these",
    )
    _add_models(command)
    _add_device(command)
    return parser


def _command(commands: Any, name: str, help: str, run: Any, sections: Sequence[str] = ()) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    command.set_defaults(command=run)
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
        options |= {"action": _NumbersOrNone, "nargs": "+", "metavar": ("LOW", "HIGH")}
    elif typing.get_origin(hint) is tuple:
        options |= {"type": _numbers, "metavar": "X,X"}
    else:
        options |= {"type": hint, "metavar": {int: "N", float: "X", str: "NAME"}[hint]}
    group.add_argument(f"--{field.name.replace('_', '-')}", **options)


class _NumbersOrNone(argparse.Action):
    """`LOW HIGH`, `LOW,HIGH` or `none`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        text = ",".join(values)
        try:
            setattr(namespace, self.dest, None if text == "none" else _numbers(text))
        except ValueError as error:
            raise argparse.ArgumentError(self, f"expected two numbers or none, found {' '.join(values)!r}") from error


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto, a GPU if there is one)")


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--out", type=Path, default=Path("runs/hjepa"), metavar="DIR", help="the run's folder (default: runs/hjepa)"
    )


def _add_models(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--models",
        nargs="+",
        default=list(MODELS),
        choices=list(MODELS),
        metavar="NAME",
        help=f"which models to train: {', '.join(MODELS)} (default: all)",
    )


def config_of(options: argparse.Namespace, preset: dict[str, dict[str, Any]] | None = None) -> Config:
    """Defaults, then the preset, then the file of --config, then options."""
    values: dict[str, dict[str, Any]] = {section: dict(fields) for section, fields in (preset or {}).items()}
    if getattr(options, "config", None):
        recorded = Config.from_dict(files.read_json(options.config, "configuration"), str(options.config))
        values = recorded.to_dict()
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

    paths = make_videos(options.out, config_of(options), not options.quiet)
    print(f"{len(paths)} videos in {options.out}")


def _encode(options: argparse.Namespace) -> None:
    from .pipeline.runs import encode

    paths = encode(options.videos, options.out, config_of(options), options.device, not options.quiet, _may_fetch(options))
    print(f"latents of {len(paths)} videos in {options.out}")


def _train(options: argparse.Namespace) -> None:
    from .pipeline.latents import load_latents
    from .pipeline.runs import check_settings, train_models
    from .pipeline.windows import prepare

    run, config = Run(options.out), config_of(options)
    check_settings(config, options.models)
    dataset = prepare(load_latents(options.latents), config.data)
    run.start(config, options.videos, options.latents)
    train_models(run, options.models, dataset, config, options.device, not options.quiet, print)


def _evaluate(options: argparse.Namespace) -> None:
    from .pipeline.runs import evaluate_run

    run = Run(options.run)
    evaluate_run(run, options.device, not options.quiet)
    print(run.table.read_text(encoding="utf-8"))


def _figures(options: argparse.Namespace) -> None:
    from .pipeline.figures import draw

    for path in draw(Run(options.run)):
        print(path)


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
    )
    print(result.text)
    for path in result.paths:
        print(path)


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
    print(result.text)
    for path in result.paths:
        print(path)
    if options.strict and result.failed:
        raise HJEPAError(f"claimed, and does not hold: {'; '.join(result.failed)}")


def _reproduce(options: argparse.Namespace) -> None:
    from .pipeline.runs import QUICK, reproduce

    config = config_of(options, QUICK if options.quick else None)
    reproduce(
        config, options.out, options.videos, options.models, options.device, not options.quiet, print, _may_fetch(options)
    )
    run = Run(options.out)
    print()
    print(run.table.read_text(encoding="utf-8"))
    print(f"figures: {run.figures}")


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        print(f"hjepa-fast: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
