"""Latent files: what is in them, when they are made again, and what is refused on reading."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import struct
import sys
import types
import warnings
import weakref
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hjepa_fast.errors import LatentError, UsageError, VideoError
from hjepa_fast.pipeline import files, latents
from hjepa_fast.pipeline.config import EncodeConfig
from hjepa_fast.pipeline.encoders import load_encoder
from hjepa_fast.pipeline.latents import Latents, encode_videos, load_latents, probe
from hjepa_fast.pipeline.preprocess import preprocess
from hjepa_fast.pipeline.progress import Progress
from hjepa_fast.pipeline.videos import Trajectories, read_video, write_video

transformers = pytest.importorskip("transformers", reason="the extra dev, which brings transformers, is not installed")
av = pytest.importorskip("av", reason="the extra dev, which brings av, is not installed")

CONFIG = EncodeConfig(encoder="unused", clip_frames=4, clip_stride=2, encode_batch=3)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    torch.manual_seed(1)
    config = transformers.VJEPA2Config(
        crop_size=32,
        frames_per_clip=4,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
        pred_hidden_size=6,
        pred_num_attention_heads=1,
        pred_num_hidden_layers=0,
        pred_num_mask_tokens=1,
    )
    folder = tmp_path_factory.mktemp("encoder")
    transformers.VJEPA2Model(config).save_pretrained(folder)
    return load_encoder(str(folder), device="cpu")


class Counting:
    """An encoder that counts the clips it is given, and can fail."""

    def __init__(self, encoder, fail_after=None):
        self._encoder, self.clips, self.fail_after = encoder, 0, fail_after

    def __getattr__(self, name):
        return getattr(self._encoder, name)

    def __call__(self, clips):
        if self.fail_after is not None and self.clips >= self.fail_after:
            raise KeyboardInterrupt
        self.clips += len(clips)
        return self._encoder(clips)


@pytest.fixture
def videos(tmp_path):
    """Three videos of 11, 12 and 8 frames: 4, 5 and 3 clips of 4 frames with stride 2."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / "videos" / f"v_{i}.mp4" for i in (1, 2, 10)]
    paths[0].parent.mkdir()
    for path, length in zip(paths, (11, 12, 8), strict=True):
        write_video(path, rng.integers(0, 256, (length, 40, 48, 3), dtype=np.uint8), fps=25)
    return paths


def test_a_file_holds_the_models_own_latents_and_where_they_come_from(videos, tmp_path, encoder):
    paths = encode_videos(videos, tmp_path / "latents", CONFIG, encoder=encoder)
    assert [path.name for path in paths] == ["v_1.safetensors", "v_2.safetensors", "v_10.safetensors"]
    loaded = load_latents(tmp_path / "latents")
    assert [video.name for video in loaded] == ["v_1", "v_2", "v_10"]
    assert [video.start_frame.tolist() for video in loaded] == [[0, 2, 4, 6], [0, 2, 4, 6, 8], [0, 2, 4]]
    for path, video in zip(videos, loaded, strict=True):
        frames = preprocess(read_video(path).frames, 32)
        for start, latent in zip(video.start_frame.tolist(), video.latents, strict=True):
            with torch.no_grad():
                expected = encoder.model(frames[None, start : start + 4]).last_hidden_state.mean(1)[0]
            torch.testing.assert_close(latent, expected, atol=1e-5, rtol=1e-5)
    first = loaded[0]
    assert (first.metadata["n_frames"], first.metadata["fps"], first.metadata["label"]) == (11, 25.0, encoder.label)
    expected = encoder.provenance | {
        "clip_frames": 4,
        "clip_stride": 2,
        "crop": 32,
        "source": "v_1.mp4",
        "source_sha256": hashlib.sha256(videos[0].read_bytes()).hexdigest(),
    }
    assert expected.items() <= first.metadata["provenance"].items()
    assert "256 / 224" in first.metadata["provenance"]["preprocessing"]


def test_batches_do_not_change_latents(videos, tmp_path, encoder):
    for batch in (1, 2, 100):
        encode_videos(videos, tmp_path / str(batch), dataclasses.replace(CONFIG, encode_batch=batch), encoder=encoder)
    one, two, many = (load_latents(tmp_path / str(batch)) for batch in (1, 2, 100))
    for a, b, c in zip(one, two, many, strict=True):
        torch.testing.assert_close(a.latents, b.latents, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a.latents, c.latents, atol=1e-5, rtol=1e-5)


def _all_at_once(path, config, encoder):
    """Latents with the whole video in memory: its clips are gathered, and split into batches."""
    frames = torch.from_numpy(read_video(path).frames)
    starts = torch.arange(0, max(len(frames) - config.clip_frames, 0) + 1, config.clip_stride)
    clips = (starts[:, None] + torch.arange(config.clip_frames)).clamp(max=len(frames) - 1)
    return starts, torch.cat([encoder(preprocess(frames, 32)[batch]) for batch in clips.split(config.encode_batch)])


@pytest.mark.filterwarnings("ignore:.*of one clip")
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize(("length", "stride"), [(4, 2), (4, 1), (4, 4), (4, 3), (2, 5), (4, 11), (8, 3), (12, 4), (16, 4)])
def test_streaming_gives_the_bits_of_all_at_once(videos, tmp_path, encoder, length, stride, batch):
    config = dataclasses.replace(CONFIG, clip_frames=length, clip_stride=stride, encode_batch=batch)
    paths = encode_videos(videos, tmp_path / "latents", config, encoder=encoder)
    for video, path in zip(videos, paths, strict=True):
        starts, expected = _all_at_once(video, config, encoder)
        found = latents.read_latents(path)
        assert torch.equal(found.latents, expected)
        assert torch.equal(found.start_frame, starts)


@given(
    n_frames=st.integers(1, 60),
    length=st.integers(1, 12),
    stride=st.integers(1, 20),
    batch=st.integers(1, 5),
)
@settings(max_examples=200, deadline=None)
def test_batches_of_frames_hold_each_clip_once(n_frames, length, stride, batch):
    config = EncodeConfig(clip_frames=length, clip_stride=stride, encode_batch=batch)
    frames = [torch.full((1, 2, 2), number) for number in range(n_frames)]
    parts = list(latents._batches(iter(frames), config))
    found = [clip[:, 0, 0, 0].tolist() for part in parts for clip in latents._clips(part, config)]
    starts = range(0, max(n_frames - length, 0) + 1, stride)
    assert found == [[min(start + i, n_frames - 1) for i in range(length)] for start in starts]
    assert all(len(latents._clips(part, config)) == batch for part in parts[:-1])
    assert len(found) == latents._n_clips(n_frames, config)


@pytest.mark.parametrize("stride", [1, 4, 40])
def test_what_is_held_does_not_grow_with_the_video(stride):
    config = EncodeConfig(clip_frames=16, clip_stride=stride, encode_batch=3)
    full_size = weakref.WeakSet()

    most = [0, 0]
    alive = weakref.WeakSet()

    def decoded():
        for _ in range(1000):
            frame = torch.zeros(3, 8, 8)
            full_size.add(frame)
            most[0] = max(most[0], len(full_size))
            yield frame

    def clone(frame, **kwargs):
        kept = frame.detach().contiguous() + 0
        alive.add(kept)
        most[1] = max(most[1], len(alive))
        return kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", clone)
        for _ in latents._batches(decoded(), config):
            pass
    assert most[0] <= 2
    # three clips of 16 frames, at most
    assert 16 <= most[1] <= 3 * 16 + 1


def test_frames_are_decoded_while_they_are_encoded_and_not_much_ahead(tmp_path, encoder):
    (tmp_path / "videos").mkdir()
    path = tmp_path / "videos" / "long.mp4"
    write_video(path, np.random.default_rng(0).integers(0, 256, (400, 32, 32, 3), dtype=np.uint8), fps=25)
    config = dataclasses.replace(CONFIG, clip_frames=4, clip_stride=4, encode_batch=5)
    ahead = []
    for number, (reader, frames) in enumerate(latents._read_ahead([path], 32, config)):
        ahead.append(reader.n_frames - 20 * number)
        assert frames.shape in ((20, 3, 32, 32), (0, 3, 32, 32))
    assert len(ahead) == 400 // 20 + 1
    # this batch, the next one, and a frame that says whether there is another
    assert max(ahead) <= 41


def test_a_mirrored_video_is_encoded_again_and_a_plain_one_is_not(videos, tmp_path, encoder):
    """Latents that do not say how frames were shown are of frames that were turned, but not mirrored or stretched."""
    data = bytearray(videos[1].read_bytes())
    at = data.find(b"tkhd") + 4 + 40
    data[at : at + 36] = struct.pack(">9i", -65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    videos[1].write_bytes(data)
    for path in encode_videos(videos, tmp_path / "latents", CONFIG, encoder=encoder):
        tensors, metadata = files.load_tensors(path, "latents")
        provenance = json.loads(metadata["provenance"])
        assert "mirrored" in provenance.pop("source_frames")
        files.save_tensors(path, tensors, metadata | {"provenance": json.dumps(provenance)})
    assert len(load_latents(tmp_path / "latents")) == 3
    assert _clips_encoded(videos, tmp_path / "latents", CONFIG, encoder) == 5
    assert _clips_encoded(videos, tmp_path / "latents", CONFIG, encoder) == 0
    assert len(load_latents(tmp_path / "latents")) == 3


def test_a_pipe_is_refused_at_once(videos, tmp_path, encoder):
    pipe = videos[0].parent / "pipe.mp4"
    os.mkfifo(pipe)
    with pytest.raises(VideoError, match=r"pipe\.mp4: it is a device or pipe"):
        encode_videos([*videos, pipe], tmp_path / "latents", CONFIG, encoder=encoder)


def test_a_video_cut_short_leaves_no_file_and_keeps_those_before(videos, tmp_path, encoder):
    """Its first clips have been encoded by the time the end is missed."""
    frames = np.random.default_rng(0).integers(0, 256, (60, 40, 48, 3), dtype=np.uint8)
    with av.open(str(videos[1]), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 40, 48, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    data = videos[1].read_bytes()
    videos[1].write_bytes(data[: int(len(data) * 0.8)])
    counting = Counting(encoder)
    with pytest.raises(VideoError, match="v_2.*declares 60 frames"):
        encode_videos(videos, tmp_path / "latents", CONFIG, encoder=counting)
    assert counting.clips > 4
    assert [path.name for path in (tmp_path / "latents").iterdir()] == ["v_1.safetensors"]


def test_what_a_user_should_know_of_a_video_is_said(tmp_path, encoder):
    (tmp_path / "videos").mkdir()
    path = tmp_path / "videos" / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 9 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number + 5 * (number > 7), Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.warns(UserWarning, match=r"a\.mp4 has a variable frame rate"):
        encode_videos([path], tmp_path / "latents", CONFIG, encoder=encoder)


def test_progress_ends_at_the_true_total_where_nothing_is_declared(tmp_path, encoder):
    (tmp_path / "videos").mkdir()
    path = tmp_path / "videos" / "a.ts"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg2video", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(12):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 9 * number, np.uint8), format="rgb24")))
        container.mux(stream.encode())
    seen = []
    encode_videos([path], tmp_path / "latents", CONFIG, encoder=encoder, progress=lambda *counts: seen.append(counts))
    assert seen == [(3, 3), (5, 5)]


def test_finished_files_are_kept_without_decoding_or_loading(videos, tmp_path, encoder, monkeypatch):
    config = dataclasses.replace(CONFIG, encoder="offline", clip_frames=8, clip_stride=8)
    first = encode_videos(videos, tmp_path / "latents", config, device="cpu")
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in first]

    def never(*args, **kwargs):
        raise AssertionError("work was done again")

    monkeypatch.setattr(latents, "load_encoder", never)
    monkeypatch.setattr(latents, "VideoReader", never)
    assert encode_videos(videos, tmp_path / "latents", config, device="cpu") == first
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in first] == before


def test_an_interrupted_run_leaves_whole_files_only_and_is_resumed(videos, tmp_path, encoder):
    folder = tmp_path / "latents"
    # 4 clips in two batches are the first video; the second is interrupted after its first batch of 3
    with pytest.raises(KeyboardInterrupt):
        encode_videos(videos, folder, CONFIG, encoder=Counting(encoder, fail_after=7))
    assert [path.name for path in folder.iterdir()] == ["v_1.safetensors"]
    again = Counting(encoder)
    encode_videos(videos, folder, CONFIG, encoder=again)
    assert again.clips == 5 + 3
    assert len(load_latents(folder)) == 3


def _clips_encoded(videos, folder, config, encoder):
    counting = Counting(encoder)
    encode_videos(videos, folder, config, encoder=counting)
    return counting.clips


def test_only_what_differs_is_made_again(videos, tmp_path, encoder):
    folder = tmp_path / "latents"
    assert _clips_encoded(videos, folder, CONFIG, encoder) == 12
    assert _clips_encoded(videos, folder, CONFIG, encoder) == 0
    assert _clips_encoded(videos, folder, dataclasses.replace(CONFIG, encode_batch=5), encoder) == 0
    assert _clips_encoded(videos, folder, dataclasses.replace(CONFIG, clip_stride=4), encoder) == 2 + 3 + 2
    other = dataclasses.replace(encoder, provenance=encoder.provenance | {"weights_sha256": "0"})
    assert _clips_encoded(videos, folder, dataclasses.replace(CONFIG, clip_stride=4), other) == 2 + 3 + 2
    write_video(videos[1], np.zeros((8, 40, 48, 3), np.uint8), fps=25)
    assert _clips_encoded(videos, folder, dataclasses.replace(CONFIG, clip_stride=4), other) == 2
    (folder / "v_10.safetensors").write_bytes(b"cut short")
    assert _clips_encoded(videos, folder, dataclasses.replace(CONFIG, clip_stride=4), other) == 2


def test_an_unknown_commit_is_not_a_difference_but_another_revision_is(videos, tmp_path, encoder, monkeypatch):
    hub = {"model": "owner/name", "revision": "main", "commit": "abc", "dtype": "float32"}
    fake = dataclasses.replace(encoder, provenance=hub)
    encode_videos(videos, tmp_path / "latents", CONFIG, encoder=fake)
    monkeypatch.setattr(latents, "encoder_provenance", lambda *args: hub | {"commit": None})
    encode_videos(videos, tmp_path / "latents", CONFIG)
    monkeypatch.setattr(latents, "encoder_provenance", lambda *args: hub | {"commit": None, "revision": "v2"})
    loaded = []
    monkeypatch.setattr(latents, "load_encoder", lambda *args: loaded.append(args) or fake)
    encode_videos(videos, tmp_path / "latents", CONFIG)
    assert len(loaded) == 1


def test_a_short_video_is_padded_with_its_last_frame_and_says_so(tmp_path, encoder):
    (tmp_path / "videos").mkdir()
    path = tmp_path / "videos" / "short.mp4"
    write_video(path, np.random.default_rng(0).integers(0, 256, (3, 40, 48, 3), dtype=np.uint8), fps=25)
    with pytest.warns(UserWarning, match=r"short\.mp4 has 3 frames, fewer than the 4 of one clip.*repeated 1 times"):
        encode_videos([path], tmp_path / "latents", CONFIG, encoder=encoder)
    (video,) = load_latents(tmp_path / "latents")
    frames = preprocess(read_video(path).frames, 32)
    torch.testing.assert_close(video.latents, encoder(torch.cat([frames, frames[-1:]])[None]))
    assert video.metadata["n_frames"] == 3


def test_long_enough_videos_do_not_warn(videos, tmp_path, encoder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_videos(videos, tmp_path / "latents", CONFIG, encoder=encoder)


def test_progress_ends_at_the_true_total(videos, tmp_path, encoder):
    seen = []
    encode_videos(videos, tmp_path / "latents", CONFIG, encoder=encoder, progress=lambda *counts: seen.append(counts))
    assert [done for done, _ in seen] == [3, 4, 7, 9, 12]
    assert seen[0] == (3, 12)  # three videos like the first
    assert seen[-1] == (12, 12)
    assert all(done <= total for done, total in seen)


@pytest.mark.parametrize(("field", "value"), [("clip_frames", 0), ("clip_frames", 3), ("clip_stride", 0), ("encode_batch", 0)])
def test_unusable_numbers_are_refused(videos, tmp_path, encoder, field, value):
    with pytest.raises(UsageError, match=f"{field} must be .*found {value}"):
        encode_videos(videos, tmp_path / "latents", dataclasses.replace(CONFIG, **{field: value}), encoder=encoder)
    assert not (tmp_path / "latents").exists()


def test_names_that_would_collide_are_refused(videos, tmp_path, encoder):
    twin = tmp_path / "v_1.avi"
    twin.write_bytes(b"")
    with pytest.raises(LatentError, match=r"v_1\.mp4 and .*v_1\.avi would both"):
        encode_videos([*videos, twin], tmp_path / "latents", CONFIG, encoder=encoder)
    with pytest.raises(UsageError, match="the folder of the videos"):
        encode_videos(videos, videos[0].parent, CONFIG, encoder=encoder)


def test_latents_of_other_videos_are_noticed(videos, tmp_path, encoder):
    encode_videos(videos, tmp_path / "latents", CONFIG, encoder=encoder)
    with pytest.warns(UserWarning, match=r"2 other videos, such as v_2\.safetensors"):
        encode_videos(videos[:1], tmp_path / "latents", CONFIG, encoder=encoder)


def test_a_damaged_video_stops_after_the_ones_before_it(videos, tmp_path, encoder):
    videos[1].write_bytes(videos[1].read_bytes()[:200])
    with pytest.raises(VideoError, match="v_2"):
        encode_videos(videos, tmp_path / "latents", CONFIG, encoder=encoder)
    assert [video.name for video in load_latents(tmp_path / "latents")] == ["v_1"]


def test_an_encoder_that_overflows_is_reported(videos, tmp_path, encoder):
    class Overflowing(Counting):
        def __call__(self, clips):
            return super().__call__(clips) * float("inf")

    with pytest.raises(LatentError, match=r"non-finite latents for .*v_1.*float32"):
        encode_videos(videos, tmp_path / "latents", CONFIG, encoder=Overflowing(encoder))
    assert not (tmp_path / "latents").exists()


def save(folder, name, values, **changes):
    provenance = {"model": "m", "clip_frames": 4, "source": name, "source_sha256": name} | changes
    metadata = {"provenance": json.dumps(provenance), "label": "l", "fps": "30.0", "n_frames": "20"}
    files.save_tensors(folder / f"{name}.safetensors", {"latents": values, "start_frame": torch.arange(len(values))}, metadata)


def test_hidden_and_unfinished_files_are_ignored(tmp_path):
    save(tmp_path, "a", torch.ones(2, 4))
    (tmp_path / f"{files.PARTIAL}x.safetensors").write_bytes(b"")
    (tmp_path / ".hidden.safetensors").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("")
    assert [video.name for video in load_latents(tmp_path)] == ["a"]


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(LatentError, match="not found"):
        load_latents(tmp_path / "missing")
    with pytest.raises(LatentError, match="no latents in"):
        load_latents(tmp_path)


def test_mixed_sizes_are_refused_naming_both(tmp_path):
    save(tmp_path, "a", torch.ones(2, 4))
    save(tmp_path, "b", torch.ones(2, 6))
    with pytest.raises(LatentError, match=r"a\.safetensors has 4, .*b\.safetensors has 6"):
        load_latents(tmp_path)


@pytest.mark.parametrize("changes", [{"model": "other"}, {"clip_frames": 8}, {"extra": 1}])
def test_mixed_encoders_are_refused_naming_both(tmp_path, changes):
    save(tmp_path, "a", torch.ones(2, 4))
    save(tmp_path, "b", torch.ones(2, 4), **changes)
    with pytest.raises(
        LatentError, match=rf"a\.safetensors and .*b\.safetensors were encoded differently: {next(iter(changes))}"
    ):
        load_latents(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.ones(2, 5), "odd size 5"),
        (torch.tensor([[0.0, float("nan")], [float("inf"), 0.0]]), "2 non-finite values"),
        (torch.ones(2, 4).double(), "not a readable latent file.*float64"),
        (torch.ones(4), "not a readable latent file"),
    ],
    ids=["odd", "not finite", "float64", "one-dimensional"],
)
def test_unusable_values_are_refused(tmp_path, values, message):
    save(tmp_path, "a", values)
    with pytest.raises(LatentError, match=message):
        load_latents(tmp_path)


def test_other_safetensors_and_truncated_files_are_refused(tmp_path):
    save(tmp_path, "a", torch.ones(20, 4))
    path = tmp_path / "a.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(LatentError, match=r"a\.safetensors is not a readable latent file"):
        load_latents(tmp_path)
    files.save_tensors(path, {"positions": torch.ones(2, 4)}, {})
    with pytest.raises(LatentError, match=r"a\.safetensors is not a readable latent file"):
        load_latents(tmp_path)


def _motion(n_videos, n_frames=40, dim=10, noise=0.0, blind=False):
    """Videos whose latents are a linear map of the clip's mean positions and velocities, or know nothing of them."""
    rng = np.random.default_rng(3)
    mixing = rng.normal(size=(8, dim))
    found, truths = [], []
    for i in range(n_videos):
        truth = Trajectories(rng.normal(size=(n_frames, 2, 2)), rng.normal(size=(n_frames, 2, 2)), np.ones(2))
        starts = torch.arange(0, n_frames - 3, 2)
        state = np.concatenate([truth.positions, truth.velocities], axis=1).reshape(n_frames, 8)
        means = np.stack([state[s : s + 4].mean(axis=0) for s in starts.tolist()])
        clean = rng.normal(size=means.shape) if blind else means
        values = torch.from_numpy(clean @ mixing + noise * rng.normal(size=(len(starts), dim))).float()
        metadata = {"provenance": {"clip_frames": 4}, "n_frames": n_frames}
        found.append(Latents(f"v{i}", values, starts, metadata, path=None))
        truths.append(truth)
    return found, truths


def test_a_probe_reads_what_is_linear():
    scores = probe(*_motion(10))
    assert scores["position_r2"] > 0.999
    assert scores["velocity_r2"] > 0.999
    assert scores["n_test_videos"] == 2


def test_a_probe_of_a_noisy_map_scores_between():
    scores = probe(*_motion(20, noise=0.7))
    assert 0.3 < scores["position_r2"] < 0.95


def test_a_probe_finds_nothing_in_noise():
    # more dimensions than an unregularised fit could bear
    scores = probe(*_motion(10, dim=120, noise=1.0, blind=True))
    assert -0.1 < scores["position_r2"] < 0.2
    assert -0.1 < scores["velocity_r2"] < 0.2


def test_a_probe_refuses_too_few_videos_and_foreign_ground_truth():
    found, truths = _motion(3)
    probe(found, truths)
    with pytest.raises(LatentError, match="found 2"):
        probe(found[:2], truths[:2])
    other = _motion(1, n_frames=30)[1]
    with pytest.raises(LatentError, match="ground truth of v2 has 30 frames, its video 40"):
        probe(found, [*truths[:2], *other])


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_shows_rate_and_fields_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", _Terminal())
    with Progress("encoding", total=4, unit="clip") as progress:
        progress.update(1, loss=0.125)
        progress.callback(3, 6)
        assert progress.done == 3
        text = sys.stderr
    shown = text.getvalue()
    assert "encoding" in shown
    assert "3/6" in shown
    assert "clip/s" in shown or "s/clip" in shown


def test_progress_prints_few_lines_elsewhere(capsys):
    with Progress("encoding", total=1000, unit="clip") as progress:
        for _ in range(1000):
            progress.update(1, loss=0.125)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "encoding: 100% 1000/1000" in lines[0]
    assert "loss=0.125" in lines[0]


@pytest.mark.parametrize("without_tqdm", [True, False])
def test_progress_is_silent_when_off_or_without_tqdm(monkeypatch, capsys, without_tqdm):
    if without_tqdm:
        monkeypatch.setitem(sys.modules, "tqdm", types.ModuleType("tqdm"))
    with Progress("encoding", total=2, enabled=without_tqdm) as progress:
        progress.callback(2, 2)
    assert progress.done == 2
    assert capsys.readouterr().err == ""
