"""Encoders: the latent itself, checkpoints of several kinds, and no waiting for a network that is not there."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from hjepa_fast.errors import EncoderError, MissingDependencyError, UsageError
from hjepa_fast.pipeline import encoder_files, offline_encoder
from hjepa_fast.pipeline.config import PUBLISHED_ENCODER
from hjepa_fast.pipeline.encoders import encoder_provenance, load_encoder, resolve_device
from hjepa_fast.pipeline.offline_encoder.make import make

transformers = pytest.importorskip("transformers", reason="the extra dev, which brings transformers, is not installed")


def tiny_config():
    return transformers.VJEPA2Config(
        crop_size=32,
        patch_size=16,
        frames_per_clip=4,
        tubelet_size=2,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_pooler_layers=1,
        num_labels=3,
        initializer_range=0.3,
        pred_hidden_size=6,
        pred_num_attention_heads=1,
        pred_num_hidden_layers=0,
        pred_num_mask_tokens=1,
    )


@pytest.fixture
def tiny(tmp_path):
    """The model and the folder it was saved to."""
    model = transformers.VJEPA2Model(tiny_config()).eval()
    model.save_pretrained(tmp_path / "tiny")
    return model, tmp_path / "tiny"


@pytest.fixture
def no_network(monkeypatch):
    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise OSError("the network was used")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert not attempts


def test_a_latent_is_the_mean_output_token(tiny, no_network):
    model, folder = tiny
    encoder = load_encoder(str(folder), device="cpu")
    clips = torch.randn(3, 4, 3, 32, 32)
    with torch.no_grad():
        # the full forward pass, predictor included
        expected = model(clips).last_hidden_state.double().mean(1)
    latents = encoder(clips)
    assert latents.shape == (3, 24)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents.double(), expected, atol=1e-5, rtol=1e-5)
    assert (encoder.crop, encoder.clip_frames, encoder.tubelet_size, encoder.latent_dim) == (32, 4, 2, 24)
    assert encoder.model.config._attn_implementation == "sdpa"
    assert not encoder.model.training
    assert expected.std() > 0.1  # otherwise any latent would pass


def test_a_half_precision_encoder_averages_in_float32(tiny):
    _, folder = tiny
    encoder = load_encoder(str(folder), device="cpu", dtype="bfloat16")
    clips = torch.randn(2, 4, 3, 32, 32)
    assert next(encoder.model.parameters()).dtype == torch.bfloat16
    with torch.no_grad():
        tokens = encoder.model(clips.bfloat16(), skip_predictor=True).last_hidden_state
    torch.testing.assert_close(encoder(clips), tokens.float().mean(1))
    assert not torch.equal(encoder(clips), encoder(clips).bfloat16().float())
    assert encoder.provenance["dtype"] == "bfloat16"


@pytest.mark.parametrize("shape", [(2, 3, 3, 32, 32), (2, 0, 3, 32, 32), (2, 4, 3, 16, 16), (4, 3, 32, 32)])
def test_clips_of_another_shape_are_refused(tiny, shape):
    encoder = load_encoder(str(tiny[1]), device="cpu")
    with pytest.raises(EncoderError, match="multiple of 2"):
        encoder(torch.zeros(shape))


def test_a_classification_checkpoint_gives_its_encoder(tmp_path, capfd, no_network):
    model = transformers.VJEPA2ForVideoClassification(tiny_config()).eval()
    model.save_pretrained(tmp_path / "classifier")
    keys = load_file(tmp_path / "classifier" / "model.safetensors").keys()
    assert {key.split(".")[0] for key in keys} == {"vjepa2", "pooler", "classifier"}
    capfd.readouterr()
    encoder = load_encoder(str(tmp_path / "classifier"), device="cpu")
    output = capfd.readouterr()
    assert output.out + output.err == ""
    theirs = model.vjepa2.encoder.state_dict()
    ours = encoder.model.encoder.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_quietness_does_not_outlast_loading(tiny):
    logging = transformers.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_encoder(str(tiny[1]), device="cpu")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_missing_encoder_weights_are_refused_and_missing_predictor_weights_are_not(tiny):
    _, folder = tiny
    file = folder / "model.safetensors"
    tensors = load_file(file)
    without_predictor = {key: value for key, value in tensors.items() if key.startswith("encoder.")}
    assert len(without_predictor) < len(tensors)
    save_file(without_predictor, file, metadata={"format": "pt"})
    load_encoder(str(folder), device="cpu")
    del without_predictor["encoder.layernorm.weight"]
    save_file(without_predictor, file, metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"1 encoder weights are missing, such as encoder\.layernorm\.weight"):
        load_encoder(str(folder), device="cpu")


def test_weights_of_another_size_are_refused(tiny):
    _, folder = tiny
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))
    with pytest.raises(EncoderError, match="cannot be loaded"):
        load_encoder(str(folder), device="cpu")


def test_another_architecture_is_refused_by_name(tiny):
    _, folder = tiny
    (folder / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(EncoderError, match="model_type 'vit', not 'vjepa2'"):
        load_encoder(str(folder), device="cpu")


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_an_incomplete_folder_is_refused(tiny, missing, no_network):
    _, folder = tiny
    (folder / missing).unlink()
    with pytest.raises(EncoderError, match=r"must hold config\.json and model\.safetensors"):
        load_encoder(str(folder), device="cpu")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_configuration_is_refused(tiny, text):
    _, folder = tiny
    (folder / "config.json").write_text(text)
    with pytest.raises(EncoderError, match=str(folder)):
        load_encoder(str(folder), device="cpu")


def test_truncated_weights_are_refused(tiny):
    _, folder = tiny
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(EncoderError, match="cannot be loaded"):
        load_encoder(str(folder), device="cpu")


@pytest.mark.parametrize("name", ["./missing", "/missing/folder", "a/b/c", "missing"])
def test_a_name_that_can_only_be_a_folder_never_asks_the_hub(name, no_network):
    with pytest.raises(EncoderError, match="neither a folder, nor a hub name"):
        load_encoder(name, device="cpu")


def test_provenance_is_known_without_loading_and_follows_the_weights(tiny, no_network):
    _, folder = tiny
    before = encoder_provenance(str(folder), device="cpu")
    assert load_encoder(str(folder), device="cpu").provenance == before
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert before["weights_sha256"] == digest
    assert before["dtype"] == "float32"
    transformers.VJEPA2Model(tiny_config()).save_pretrained(folder)
    after = encoder_provenance(str(folder), device="cpu")
    assert {key for key in before if before[key] != after[key]} == {"weights_sha256"}


def _fake_cache(tmp_path, source):
    """A hub cache holding `source` as owner/name at a made-up commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    source.rename(repository / "snapshots" / commit)
    return commit


def test_a_cached_hub_checkpoint_needs_no_network(tiny, tmp_path, monkeypatch, no_network):
    import huggingface_hub.constants

    model, folder = tiny
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert encoder_provenance("owner/name", device="cpu")["commit"] is None
    commit = _fake_cache(tmp_path, folder)
    encoder = load_encoder("owner/name", device="cpu")
    expected = {"model": "owner/name", "revision": "main", "commit": commit, "dtype": "float32"}
    assert encoder.provenance == expected == encoder_provenance("owner/name", device="cpu")
    assert encoder.label == "owner/name (V-JEPA 2)"
    assert torch.equal(encoder.model.encoder.layernorm.weight, model.encoder.layernorm.weight)


def test_an_unreachable_hub_is_reported_at_once_and_names_both_ways_out(tmp_path, monkeypatch):
    import huggingface_hub.constants

    calls = []

    def unreachable(*args, **kwargs):
        calls.append(args)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    start = time.monotonic()
    with pytest.raises(EncoderError, match="local folder") as error:
        load_encoder(PUBLISHED_ENCODER, device="cpu")
    assert time.monotonic() - start < 10
    # the hub's library may look up a list of its own before the request; its retries would make this 6 and more
    assert len(calls) <= 2
    assert PUBLISHED_ENCODER in str(error.value)
    assert "--encoder offline" in str(error.value)


def test_hub_offline_mode_does_not_wait(tmp_path):
    # the hub's library reads the variable when it is imported, so this needs its own process
    program = """
import socket, sys, time
def refuse(*args, **kwargs):
    sys.exit("the network was used")
socket.getaddrinfo = socket.socket.connect = refuse
from hjepa_fast.errors import EncoderError
from hjepa_fast.pipeline.encoder_files import cached_folder, download
import huggingface_hub
start = time.monotonic()
assert cached_folder("facebook/none", "main") is None
try:
    download("facebook/none", "main")
except EncoderError as error:
    print(error)
assert time.monotonic() - start < 5
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "offline mode is enabled" in done.stdout
    assert "local folder" in done.stdout
    assert "--encoder offline" in done.stdout


def test_without_transformers_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'hjepa_fast\[pipeline\]'"):
        load_encoder("offline", device="cpu")


@pytest.mark.parametrize("device", ["cuda:99", "mps:7", "nonsense", "meta"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(UsageError, match=device):
        resolve_device(device)


def test_automatic_device_and_precision():
    device = resolve_device("auto")
    assert device.type == ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    assert encoder_provenance("offline", device="cpu")["dtype"] == "float32"
    assert encoder_provenance("offline", device="cpu", dtype="float16")["dtype"] == "float16"
    with pytest.raises(UsageError, match="float64"):
        encoder_provenance("offline", device="cpu", dtype="float64")


def test_the_offline_encoder_says_what_it_is(no_network):
    encoder = load_encoder("offline", device="cpu")
    assert "untrained" in encoder.label
    assert encoder.provenance["model"] == "offline"
    assert (encoder.latent_dim, encoder.crop, encoder.clip_frames) == (192, 128, 16)
    assert encoder.model.encoder.layer[0].mlp.fc1.weight.std() == pytest.approx(0.1, rel=0.02)
    assert encoder.model.encoder.embeddings.patch_embeddings.proj.weight.std() == pytest.approx(0.1, rel=0.02)


def test_the_offline_encoder_is_small_and_can_be_made_again(tmp_path):
    make(tmp_path)
    shipped = offline_encoder.FOLDER / "model.safetensors"
    assert shipped.stat().st_size < 4 * 2**20
    ours, again = load_file(shipped), load_file(tmp_path / "model.safetensors")
    assert ours.keys() == again.keys()
    for key, value in ours.items():
        # another instruction set may compute the normal quantiles with another last bit, near zero with several
        torch.testing.assert_close(again[key], value, rtol=2**-10, atol=1e-6)
    new, old = (json.loads((f / "config.json").read_text()) for f in (tmp_path, offline_encoder.FOLDER))
    assert {k: v for k, v in new.items() if k != "transformers_version"} == {
        k: v for k, v in old.items() if k != "transformers_version"
    }


def test_a_sharded_checkpoint_is_hashed_whole(tiny):
    model, folder = tiny
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    shards = encoder_files.weight_files(folder)
    assert len(shards) > 1
    encoder = load_encoder(str(folder), device="cpu")
    shards[-1].write_bytes(shards[-1].read_bytes() + b" ")
    assert encoder_provenance(str(folder), device="cpu") != encoder.provenance
