"""The command line as a user meets it: every command, exit codes, messages, nothing half-written."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from hjepa_fast.cli import build_parser, config_of, main
from hjepa_fast.pipeline import animation, checkpoints, controls, figures, files, stage
from hjepa_fast.pipeline.config import WORLDS, Config, DataConfig, TrainConfig, VideoConfig
from hjepa_fast.pipeline.videos import find_videos, write_video
from hjepa_fast.pipeline.zoo import chosen
from synthetic import LABEL, write_latents, write_one

SMALL = ("--epochs", "2", "--batch-size", "8", "--window", "5", "--timing-runs", "2", "--timing-warmup", "0", "--quiet")


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """One small run of everything, on real video files and the offline encoder."""
    out = tmp_path_factory.mktemp("runs") / "small"
    options = ("--quick", "--n-videos", 5, "--n-frames", 44, "--size", 64, "--radius", 6, "--extended-steps", 7, "--out", out)
    assert run("reproduce", *options, *SMALL) == 0
    return out


def test_reproduce_writes_everything(reproduced):
    summary = json.loads((reproduced / "summary.json").read_text())
    names = [row["name"] for row in summary["models"]]
    assert names == ["persistence", *chosen(None, TrainConfig(), DataConfig())]
    for row in summary["models"]:
        assert {"name", "mse_mean", "mse_std", "drift_mean", "drift_std", "params", "ms_per_step"} <= row.keys()
        assert row["mse_mean"] > 0
    assert summary["encoder"] == "offline (untrained random features)"
    assert summary["split"] == "video"
    assert 0 < summary["probe"]["n_test_videos"] < 5
    assert summary["latent_dim"] == 192
    assert summary["extended_steps"] == 7
    compared = [row["integrator"] for row in summary["integrators"]]
    assert compared == ["leapfrog", "euler", "implicit-leapfrog", "implicit-midpoint"]
    table = (reproduced / "summary.md").read_text()
    assert "HNN (full)" in table
    assert "The full model's network under other integrators" in table
    assert "offline (untrained random features)" in table
    for name in ("energy", "drift_by_integrator", "phase", "comparison", "ablation", "dataset"):
        assert (reproduced / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (reproduced / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert len(list((reproduced / "videos").glob("*.mp4"))) == 5
    assert not [path for path in reproduced.rglob("*") if path.name.startswith(files.PARTIAL)]


def test_a_finished_run_is_not_done_again(reproduced):
    before = {path: path.stat().st_mtime_ns for path in reproduced.rglob("*") if path.is_file()}
    assert run("reproduce", "--config", reproduced / "config.json", "--out", reproduced, "--quiet") == 0
    kept = [path for path in before if path.parent.name in ("videos", "latents") or "models" in path.parts]
    assert kept
    assert [path for path in kept if path.stat().st_mtime_ns != before[path]] == []


def test_a_config_file_reproduces_a_run(reproduced, tmp_path):
    assert run("reproduce", "--config", reproduced / "config.json", "--out", tmp_path / "again", "--quiet") == 0
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (reproduced, tmp_path / "again"))
    for a, b in zip(first["models"], second["models"], strict=True):
        assert {k: v for k, v in a.items() if k != "ms_per_step"} == {k: v for k, v in b.items() if k != "ms_per_step"}
    assert first["probe"] == second["probe"]


def test_other_settings_in_the_same_folder_are_refused(reproduced, capsys):
    assert run("reproduce", "--config", reproduced / "config.json", "--out", reproduced, "--epochs", 3, "--quiet") == 1
    assert "holds a run with other settings: train.epochs 2 -> 3" in capsys.readouterr().err


def test_figures_are_drawn_again_without_training(reproduced, capsys):
    (reproduced / "figures" / "energy.png").unlink()
    trained = {path: path.stat().st_mtime_ns for path in (reproduced / "models").rglob("*")}
    assert run("figures", reproduced) == 0
    assert (reproduced / "figures" / "energy.png").exists()
    assert trained == {path: path.stat().st_mtime_ns for path in (reproduced / "models").rglob("*")}


def test_stage_by_stage_equals_reproduce(reproduced, tmp_path, capsys):
    """generate, encode, train, evaluate, figures: the same numbers as in one go."""
    config = ("--config", reproduced / "config.json")
    assert run("generate", *config, "--out", tmp_path / "v", "--quiet") == 0
    assert run("encode", tmp_path / "v", *config, "--out", tmp_path / "l", "--quiet") == 0
    assert (
        run("train", tmp_path / "l", *config, "--videos", tmp_path / "v", "--out", tmp_path / "r", "--models", "hnn", "--quiet")
        == 0
    )
    assert run("evaluate", tmp_path / "r", "--quiet") == 0
    assert run("figures", tmp_path / "r") == 0
    assert "HNN (full)" in capsys.readouterr().out
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (reproduced, tmp_path / "r"))
    assert [row["name"] for row in second["models"]] == ["persistence", "hnn"]
    assert second["models"][1]["mse_mean"] == first["models"][1]["mse_mean"]
    assert second["probe"] == first["probe"]


def test_dream_from_a_latent_and_from_the_video_agree(reproduced, tmp_path):
    checkpoint = reproduced / "models" / "hnn" / "best.safetensors"
    latents, video = (
        reproduced / kind / f"video_003{suffix}" for kind, suffix in (("latents", ".safetensors"), ("videos", ".mp4"))
    )
    assert run("dream", checkpoint, "--latents", latents, "--index", 2, "--steps", 4, "--out", tmp_path / "a.b") == 0
    assert run("dream", checkpoint, "--video", video, "--index", 2, "--steps", 4, "--out", tmp_path / "c") == 0
    first, _ = files.load_tensors(tmp_path / "a.b.safetensors", "dream")
    second, _ = files.load_tensors(tmp_path / "c.safetensors", "dream")
    assert first["states"].shape == (5, 192)
    assert first["energy"].shape == (5,)
    torch.testing.assert_close(first["states"], second["states"], rtol=1e-4, atol=1e-4)
    stored, _ = files.load_tensors(latents, "latents")
    torch.testing.assert_close(first["states"][0], stored["latents"][2], rtol=1e-5, atol=1e-5)
    assert {path.name for path in tmp_path.iterdir()} >= {"a.b.png", "a.b.pdf", "a.b.mp4", "a.b.gif", "c.png", "c.pdf"}


def test_a_dream_moves_as_the_probe_of_its_run_reads_it(reproduced, tmp_path, monkeypatch):
    """Positions by a regression fitted without the dream's own video, beside the true clip for as long as that is."""
    seen, fitted, readout = [], [], stage.readout
    monkeypatch.setattr(animation, "write", lambda stem, motion: seen.append(motion) or [])
    monkeypatch.setattr(stage, "readout", lambda items, truths: fitted.append(items) or readout(items, truths))
    checkpoint = reproduced / "models" / "baseline" / "best.safetensors"
    source = ("--latents", reproduced / "latents" / "video_003.safetensors", "--index", 1, "--steps", 8)
    assert run("dream", checkpoint, *source, "--out", tmp_path / "d") == 0
    assert [item.name for item in fitted[0]] == [f"video_00{i}" for i in (0, 1, 2, 4)]
    (shown,) = seen
    assert shown.predicted.shape == (9, 2, 2)
    assert "linear probe" in shown.about
    # 44 frames hold 8 clips of 16, the dream starts at the second, and each is seen by the frame in its middle
    assert (shown.true.shape, len(shown.images), shown.size, shown.seconds) == (
        (7, 2, 2),
        8,
        (64.0, 64.0),
        pytest.approx(4 / 30),
    )
    truth = files.load_tensors(reproduced / "videos" / "video_003.safetensors", "truth")[0]["positions"].numpy()
    np.testing.assert_allclose(shown.true[2].ravel(), truth[12:28].mean(axis=0).ravel())

    assert run("dream", checkpoint, *source, "--no-animation", "--out", tmp_path / "e") == 0
    assert len(seen) == 1
    moved = tmp_path / "best.safetensors"  # in no run: nothing is known of other videos
    moved.write_bytes(checkpoint.read_bytes())
    assert run("dream", moved, *source, "--out", tmp_path / "f") == 0
    assert (seen[-1].size, seen[-1].images, seen[-1].predicted.shape) == (None, [], (9, 1, 2))
    assert "no ground truth" in seen[-1].about


def test_dream_refuses_what_does_not_fit(reproduced, tmp_path, capsys):
    checkpoint = reproduced / "models" / "baseline" / "best.safetensors"
    latents = reproduced / "latents" / "video_000.safetensors"
    assert run("dream", checkpoint, "--latents", latents, "--index", 99) == 2
    assert "index 99 is out of range" in capsys.readouterr().err
    write_one(tmp_path / "other.safetensors", torch.randn(4, 192))
    assert run("dream", checkpoint, "--latents", tmp_path / "other.safetensors") == 1
    assert f"gives 192 of {LABEL}" in capsys.readouterr().err
    assert run("dream", checkpoint) == 2
    assert run("dream", tmp_path / "none.safetensors", "--latents", latents) == 1
    assert "checkpoint not found" in capsys.readouterr().err


@pytest.fixture(scope="module")
def driven(tmp_path_factory):
    """A small run in a world with a force, whose models have a port and friction."""
    out = tmp_path_factory.mktemp("runs") / "driven"
    options = ("--quick", "--n-videos", 5, "--n-frames", 44, "--size", 64, "--radius", 6, "--extended-steps", 3, "--out", out)
    models = ("--models", "hnn", "hnn-no-control")
    save = figures.save
    with pytest.MonkeyPatch.context() as patch:  # the other figures are those of every run, and take most of the time
        patch.setattr(figures, "save", lambda figure, stem: save(figure, stem) if stem.name == "dissipation" else [])
        assert run("reproduce", *options, *SMALL, "--world", "driven", "--friction", "rayleigh", "--epochs", 1, *models) == 0
    return out


def test_a_driven_world_from_videos_to_figures(driven, capsys):
    config = json.loads((driven / "config.json").read_text())
    assert (config["videos"]["force"], config["data"]["control"], config["train"]["friction"]) == (0.1, "recorded", "rayleigh")
    summary = json.loads((driven / "summary.json").read_text())
    titles = {row["name"]: row["title"] for row in summary["models"]}
    assert titles["hnn"] == "HNN (full) + friction, control"
    assert titles["hnn-no-control"] == "HNN (no control) + friction"
    assert [row["name"] for row in summary["models"] if "port" in row] == ["hnn", "hnn-no-control"]
    assert "Friction and control:" in (driven / "summary.md").read_text()
    assert (driven / "figures" / "dissipation.png").exists()
    assert len(list((driven / "videos").glob("*.control.json"))) == 5
    assert run("evaluate", driven, "--quiet") == 0
    control = driven / "videos" / "video_001.control.json"
    whole = control.read_text()
    try:
        control.write_text(whole.replace("-0.", "0."))
        assert run("evaluate", driven, "--quiet") == 1
        assert "was trained on other data" in capsys.readouterr().err
        control.unlink()
        assert run("evaluate", driven, "--quiet") == 1
        assert "no control of video_001: expected" in capsys.readouterr().err
    finally:
        control.write_text(whole)


def test_dreams_under_a_control(driven, reproduced, tmp_path, capsys):
    checkpoint, control = driven / "models" / "hnn" / "best.safetensors", driven / "videos" / "video_003.control.json"
    start = ("--latents", driven / "latents" / "video_003.safetensors", "--index", 2)
    dream = ("dream", checkpoint, *start)
    assert run(*dream, "--steps", 5, "--control", control, "--out", tmp_path / "u") == 0
    assert "the control gives" in capsys.readouterr().out
    assert run(*dream, "--steps", 5, "--out", tmp_path / "free") == 0
    assert "friction takes" in (text := capsys.readouterr().out)
    assert "without a control" in text
    pushed, free = (files.load_tensors(tmp_path / f"{name}.safetensors", "dream")[0] for name in ("u", "free"))
    assert "control" not in free
    loaded = checkpoints.load(checkpoint)
    model = checkpoints.restore(loaded, checkpoint)
    rows = controls.of_steps(controls.read(control), torch.arange(8, 29, 4), 16, "x").float()
    torch.testing.assert_close(pushed["control"], rows)
    z0 = (free["states"][0] - loaded.mean) / loaded.std
    with torch.no_grad():
        states = model.trajectory(z0, 5, control=rows / loaded.control_scale).states
    torch.testing.assert_close(pushed["states"], states * loaded.std + loaded.mean, rtol=1e-4, atol=1e-4)
    assert (pushed["states"][1] - free["states"][1]).abs().max() > 1e-6

    assert run(*dream, "--steps", 9, "--control", control) == 1
    assert "has 44 rows, and 9 steps from the clip at frame 8 pass 60 frames" in capsys.readouterr().err
    controls.write(tmp_path / "three.json", torch.ones(60, 3), "")
    assert run(*dream, "--steps", 9, "--control", tmp_path / "three.json") == 1
    assert "has 3 numbers a row" in capsys.readouterr().err
    for other in (driven / "models" / "hnn-no-control", reproduced / "models" / "hnn", reproduced / "models" / "baseline"):
        assert run("dream", other / "best.safetensors", *start, "--control", control) == 2
        assert f"has no port for {control}" in capsys.readouterr().err
    assert run(*dream, "--control", control, "--out", control.with_name("video_003")) == 2  # among the run's own files


def test_a_check_is_of_h_alone(driven, tmp_path, capsys):
    checkpoint = driven / "models" / "hnn" / "best.safetensors"
    options = ("--steps", 20, "--states", 1, "--integrators", "implicit-midpoint", "--out", tmp_path / "c", "--strict")
    assert run("check", checkpoint, *options) == 0
    assert "H alone, without its friction and control" in capsys.readouterr().out


def test_own_videos_without_a_control_are_missed_before_they_are_encoded(tmp_path, capsys):
    (tmp_path / "clip.mp4").write_bytes(b"not looked at")
    assert run("reproduce", "--quick", "--videos", tmp_path, "--control", "recorded", "--out", tmp_path / "run") == 1
    assert f"control not found: {tmp_path / 'clip.control.json'}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_world_sets_what_it_is_and_options_override_it(tmp_path):
    files.write_json(tmp_path / "c.json", {"videos": {"drag": 0.5, "n_frames": 9}, "train": {"friction": "rayleigh"}})
    parse = build_parser().parse_args
    damped = config_of(parse(["reproduce", "--world", "damped", "--drag", "0.02"]))
    assert (damped.videos.drag, damped.videos.restitution, damped.train.friction) == (0.02, 0.9, "conformal")
    elastic = config_of(parse(["reproduce", "--world", "elastic", "--config", str(tmp_path / "c.json")]))
    assert elastic == dataclasses.replace(Config(), videos=VideoConfig(n_frames=9))
    assert config_of(parse(["reproduce"])) == config_of(parse(["reproduce", "--world", "elastic"])) == Config()
    assert all(Config.from_dict(world, "x") for world in WORLDS.values())


def test_own_videos_of_mixed_sizes(tmp_path, capsys):
    """Any folder of videos goes through, without ground truth and without the probe."""
    (tmp_path / "mine").mkdir()
    rng = np.random.default_rng(0)
    for i, (height, width, fps) in enumerate([(48, 64, 25), (64, 48, 30), (90, 160, 12.5), (64, 64, 30), (64, 64, 30)]):
        frames = rng.integers(0, 255, (44, height // 8, width // 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
        write_video(tmp_path / "mine" / f"clip{i}.mp4", frames[:, : height // 2 * 2], fps)
    out = tmp_path / "run"
    assert run("reproduce", "--quick", "--videos", tmp_path / "mine", "--models", "hnn", "--out", out, *SMALL) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["probe"] is None
    assert not (out / "videos").exists()
    assert find_videos(tmp_path / "mine")[0].name == "clip0.mp4"


def test_every_configuration_field_is_an_option_with_its_default(capsys):
    assert run("reproduce", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(section.default):
            assert f"--{field.name.replace('_', '-')}" in text
    assert "(default: facebook/vjepa2-vitl-fpc16-256-ssv2)" in text
    assert "(default: 20.0)" in text


def test_options_override_the_file_and_the_preset(tmp_path):
    files.write_json(tmp_path / "c.json", {"train": {"epochs": 7, "lr": 0.5}, "videos": {"radius": [3.0]}})
    options = build_parser().parse_args(
        ["reproduce", "--config", str(tmp_path / "c.json"), "--epochs", "9", "--no-standardize", "--radius", "4,5"]
    )
    config = config_of(options)
    assert (config.train.epochs, config.train.lr) == (9, 0.5)
    assert config.videos.radius == (4.0, 5.0)
    assert not config.data.standardize
    quick = config_of(
        build_parser().parse_args(["reproduce", "--quick", "--encoder", "mine"]), {"encode": {"encoder": "offline"}}
    )
    assert quick.encode.encoder == "mine"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "required: COMMAND"),
        (("fly",), 2, "invalid choice: 'fly'"),
        (("generate", "--n-frames", "many"), 2, "invalid int value: 'many'"),
        (("generate", "--n-videos", "0"), 2, "n_videos"),
        (("generate", "--background", "red"), 2, "invalid choice: 'red'"),
        (("encode", "nowhere"), 1, "video folder not found: nowhere"),
        (("encode", ".", "--encoder", "offline"), 1, "no videos in"),
        (("train", "nowhere"), 1, "nowhere"),
        (("train", "latents", "--models", "resnet"), 2, "invalid choice: 'resnet'"),
        (("train", "latents", "--integrator", "verlet"), 2, "integrator must be auto or one of leapfrog, implicit-leapfrog, "),
        (("train", "latents", "--lr", "-1"), 2, "lr must be positive, found -1.0"),
        (("reproduce", "--integrator", "verlet"), 2, "found 'verlet'"),
        (("reproduce", "--control", "recorded", "--quick"), 2, "a control only with a --force above 0, found 0"),
        (("reproduce", "--world", "damped", "--videos", "latents"), 2, "--world is of the synthetic videos"),
        (("reproduce", "--models", "hnn", "hnn-no-control"), 2, "hnn-no-control is there to be compared with a model that has"),
        (("train", "latents", "--models", "hnn-no-friction"), 2, "it needs --friction, found none"),
        (("train", "latents", "--friction-per-dimension"), 2, "is of a friction, conformal or rayleigh, found none"),
        (("train", "latents", "--friction", "viscous"), 2, "invalid choice: 'viscous'"),
        (("train", "latents", "--friction", "rayleigh", "--integrator", "tao"), 2, "tao is not there with friction"),
        (("train", "latents", "--control", "recorded", "--window", "5"), 2, "name their folder with --videos"),
        (("train", "latents", "--control", "recorded", "--window", "5", "--videos", "."), 1, "no control of video_000"),
        (("generate", "--restitution", "2"), 2, "expected at most 1"),
        (("reproduce", "--extended-steps", "0"), 2, "extended_steps must be at least 1, found 0"),
        (("train", "latents", "--window", "99"), 1, "too few clips for a window of 99"),
        (("train", "latents", "--window", "5", "--device", "abacus"), 2, "abacus"),
        (("train", "latents", "--config", "none.json"), 1, "configuration not found: none.json"),
        (("evaluate", "nowhere"), 1, "run folder not found: nowhere"),
        (("figures", "nowhere"), 1, "summary"),
        (("evaluate", "latents"), 1, "configuration not found"),
        (("reproduce", "--encoder", "./none", "--n-videos", "1", "--n-frames", "4", "--quiet"), 1, "./none"),
    ],
)
def test_what_a_user_gets_wrong_is_said(arguments, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_latents(tmp_path / "latents")
    assert run(*arguments) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.rglob(f"{files.PARTIAL}*"))
    if code == 2 and "--device" not in arguments:
        assert not (tmp_path / "runs").exists()  # a run's folder with settings that nothing can use would be in the way


def test_an_unreachable_hub_names_both_ways_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = run("reproduce", "--n-videos", 2, "--n-frames", 20, "--size", 64, "--radius", 5, "--out", tmp_path, "--quiet")
    assert code == 1
    error = capsys.readouterr().err
    assert "--encoder offline" in error
    assert "local folder" in error


def test_debug_shows_the_traceback(tmp_path):
    from hjepa_fast.errors import HJEPAError

    with pytest.raises(HJEPAError):
        run("evaluate", tmp_path / "none", "--debug")


def test_an_odd_latent_size_is_named(tmp_path, capsys):
    write_one(tmp_path / "odd" / "a.safetensors", torch.randn(9, 5))
    assert run("train", tmp_path / "odd") == 1
    assert "odd size 5" in capsys.readouterr().err


def test_a_changed_folder_of_latents_is_noticed(tmp_path, capsys):
    write_latents(tmp_path / "latents")
    out = tmp_path / "run"
    assert run("train", tmp_path / "latents", "--out", out, "--models", "baseline", *SMALL) == 0
    write_latents(tmp_path / "latents", seed=1)
    assert run("evaluate", out) == 1
    assert "trained on other data" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_exits_with_its_place(tmp_path, capsys):
    write_latents(tmp_path / "latents")
    options = ("--models", "baseline", "--lr", "1e30", "--grad-clip", "1e30", *SMALL)
    assert run("train", tmp_path / "latents", "--out", tmp_path / "run", *options) == 1
    assert "in epoch" in capsys.readouterr().err


def test_an_interrupt_ends_with_130(monkeypatch, tmp_path, capsys):
    from hjepa_fast.pipeline import runs

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "make_videos", interrupt)
    assert run("generate", "--out", tmp_path / "v") == 130
    assert "the same command goes on from here" in capsys.readouterr().err


def test_the_installed_command_and_module():
    for command in ([os.path.join(os.path.dirname(sys.executable), "hjepa-fast")], [sys.executable, "-m", "hjepa_fast"]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("hjepa-fast 0.")


def test_checkpoint_statistics_travel(reproduced):
    checkpoint = checkpoints.load(reproduced / "models" / "hnn" / "best.safetensors")
    assert checkpoint.mean.shape == checkpoint.std.shape == (192,)
    assert checkpoint.facts["data"]["standardize"] is True
    assert (checkpoint.std != 1).any()
