"""Videos to latents, one file per video; reading them back; and a probe of what they tell about the motion."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import HJEPAError, LatentError, UsageError, VideoError
from . import distributed, files, preprocess, untrusted
from .config import STATE_ENCODER, EncodeConfig
from .encoder_files import file_sha256
from .encoders import Encoder, encoder_provenance, load_encoder
from .places import Place, Remote, place
from .videos import Trajectories, VideoReader, check_regular

SUFFIX = ".safetensors"
RIDGE_STRENGTHS = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_SOURCE_KEYS = ("source", "source_sha256", "source_frames", "source_state_sha256")
FRAMES = "turned and mirrored as the display matrix says, square pixels"
"""How a video's frames are shown; recorded beside every latent."""
_PUBLISHED = EncodeConfig()


@dataclass(frozen=True)
class Latents:
    """One video's latents, float32 [n_clips, latent_dim], and each clip's first frame, int64 [n_clips].

    `metadata` holds "provenance" (a dict: encoder, clips, preprocessing, source video), "label" (the encoder in words),
    "fps" and "n_frames".
    """

    name: str
    latents: Tensor
    start_frame: Tensor
    metadata: dict[str, Any]
    path: Place


def encode_videos(
    videos: Sequence[Path],
    folder: Place,
    config: EncodeConfig,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    encoder: Encoder | None = None,
    fetch: bool = True,
) -> list[Place]:
    """Encode each video to `folder`/<stem>.safetensors, the complete file or none.

    Clip t is frames [t * clip_stride, t * clip_stride + clip_frames); trailing frames that fill no clip are left out.
    A video shorter than one clip is padded with its last frame, with a warning. Files that are there already and were
    made by the same encoder from the same video are kept, so an interrupted run is resumed by running it again; the
    encoder is loaded only if something is left to do. Clips are encoded while the video is decoded, so memory does not
    grow with its length: two batches of clips are held. What a user should know of a video (`VideoReader.notes`) is warned of.
    With the encoder "state" nothing is decoded, see `states`. Processes that work together (see `distributed.joined`) share the
    videos out.

    Parameters
    ----------
    videos, folder
        Files with different stems, and another folder than theirs, a path or an address (see `places`); it is made if missing.
    device : str
        "auto" or a torch device; unused if `encoder` is given.
    progress : callable, optional
        Called as progress(done_clips, total_clips). Until the last video is read, the total is an estimate.
    encoder : Encoder, optional
        Used instead of loading `config.encoder`.
    fetch : bool
        See `load_encoder`.

    Returns
    -------
    list of Path, or of places behind an address, in the order of `videos`

    Raises
    ------
    LatentError
        Two videos have the same stem, or the encoder's output is not finite.
    UsageError
        A number in `config` cannot be used with this encoder, or `folder` holds the videos.
    VideoError, EncoderError, HJEPAError
        A video cannot be read, the encoder cannot be loaded, or a file cannot be written.
    """
    for field in ("clip_frames", "clip_stride", "encode_batch"):
        if getattr(config, field) < 1:
            raise UsageError(f"{field} must be at least 1, found {getattr(config, field)}")
    videos = [Path(video) for video in videos]
    targets = _targets(videos, place(folder))
    for video in videos:
        check_regular(video)
    hashes = dict(zip(videos, distributed.shared_out(videos, file_sha256), strict=True))
    if encoder is None and config.encoder == STATE_ENCODER:
        from . import states

        return distributed.on_first(lambda: states.encode(targets, hashes, config, progress))

    def outdated(recipe: dict[str, Any]) -> list[Path]:
        def is_kept(video: Path) -> bool:
            return is_current(targets[video], recipe | _source(video, hashes[video]), video)

        return [video for video, kept in zip(videos, distributed.shared_out(videos, is_kept), strict=True) if not kept]

    if encoder is None:
        recipe = _recipe(config, encoder_provenance(config.encoder, config.revision, device, config.encode_dtype))
        if not outdated(recipe):
            return list(targets.values())
        encoder = load_encoder(config.encoder, config.revision, device, config.encode_dtype, fetch)
    if config.clip_frames % encoder.tubelet_size:
        raise UsageError(
            f"clip_frames must be a multiple of {encoder.tubelet_size}, the frames per token of encoder {encoder.label}, "
            f"found {config.clip_frames}"
        )
    recipe = _recipe(config, encoder.provenance) | {"crop": encoder.crop}
    todo = outdated(recipe)
    done = before = finished = total = 0
    encoded = distributed.Counter()
    parts: list[Tensor] = []
    for reader, frames in _read_ahead(distributed.claimed(todo), encoder.crop, config):
        if len(frames):
            # Clips overlap: moving the frames once and gathering there saves most of the transfer.
            clips = _clips(frames.to(encoder.device), config)
            parts.append(encoder(preprocess.normalize(clips)))
            done += len(clips)
            of_all = encoded.add(len(clips))
            if progress is not None:
                planned = max(done, before + _n_clips(reader.expected, config))
                total = max(of_all, planned + round(planned / (finished + 1) * (len(todo) - finished - 1)))
                progress(of_all, total)
            continue
        for note in _notes(reader, config):
            warnings.warn(note, stacklevel=2)
        latents, parts = torch.cat(parts), []
        before, finished = done, finished + 1
        if not latents.isfinite().all():
            raise LatentError(f"encoder {encoder.label} gave non-finite latents for {reader.path}; try --encode-dtype float32")
        metadata = {
            "provenance": json.dumps(recipe | _source(reader.path, hashes[reader.path])),
            "label": encoder.label,
            "fps": repr(reader.fps),
            "n_frames": str(reader.n_frames),
        }
        starts = torch.arange(len(latents)) * config.clip_stride
        files.save_tensors(targets[reader.path], {"latents": latents, "start_frame": starts}, metadata)
    distributed.wait()
    if progress is not None and todo and (done := encoded.add(0)) != total:
        progress(done, done)
    for target in targets.values():
        if not target.exists():
            raise HJEPAError(
                f"{target} was written by another process and is not here: all processes need the same file system"
            )
    return list(targets.values())


def _targets(videos: list[Path], folder: Place) -> dict[Path, Place]:
    by_name: dict[str, Path] = {}
    for video in videos:
        if other := by_name.get(video.stem):
            raise LatentError(f"{other} and {video} would both be encoded to {video.stem}{SUFFIX}: rename one of them")
        if isinstance(folder, Path) and video.parent.resolve() == folder.resolve():
            raise UsageError(f"latents cannot go to {folder}, the folder of the videos, where ground truth has the same names")
        by_name[video.stem] = video
    if others := [path.name for path in _list(folder) if path.stem not in by_name]:
        warnings.warn(f"{folder} also holds latents of {len(others)} other videos, such as {others[0]}", stacklevel=3)
    return {video: folder / f"{stem}{SUFFIX}" for stem, video in by_name.items()}


def _recipe(config: EncodeConfig, encoder: dict[str, str | None]) -> dict[str, Any]:
    clips = {"clip_frames": config.clip_frames, "clip_stride": config.clip_stride}
    return encoder | clips | {"preprocessing": preprocess.VERSION}


def _source(video: Path, digest: str) -> dict[str, str]:
    return dict(zip(_SOURCE_KEYS[:3], (video.name, digest, FRAMES), strict=True))


def is_current(target: Place, wanted: dict[str, Any], video: Path) -> bool:
    """Whether `target` was made of `video` as `wanted`; what is unknown (None, a commit outside the cache) is not compared."""
    try:
        found = untrusted.parse_json((files.read_metadata(target) or {}).get("provenance", "{}"), str(target))
    except HJEPAError:
        return False
    if not isinstance(found, dict):
        return False
    if "source_frames" not in found and "source_frames" in wanted:
        # Made of frames that were turned, but neither mirrored nor stretched: as good where neither is called for.
        found["source_frames"] = wanted["source_frames"]
        return _matches(found, wanted) and not _is_altered(video)
    return _matches(found, wanted)


def _matches(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all(value is None or found.get(key) == value for key, value in wanted.items())


def _is_altered(video: Path) -> bool:
    reader = VideoReader(video)
    try:
        next(iter(reader))
    except VideoError:
        return True  # reading it again says why
    return reader.altered


def _read_ahead(paths: Iterable[Path], crop: int, config: EncodeConfig = _PUBLISHED) -> Iterator[tuple[VideoReader, Tensor]]:
    """Each video's frames as the encoder sees them, uint8 [n, 3, crop, crop], as many at a time as a batch of clips needs.

    An empty batch follows the last one of a video, once all of it has been read without error. The next batch is
    decoded while this one is encoded; no more than these two are held, however long the videos are.
    """

    def batches() -> Iterator[tuple[VideoReader, Tensor]]:
        for path in paths:
            video = VideoReader(path)
            seen = (preprocess.resize_and_crop(image[None], crop)[0] for image in video)
            for frames in _batches(seen, config):
                yield video, frames
            yield video, torch.empty(0, 3, crop, crop, dtype=torch.uint8)

    source = batches()
    with ThreadPoolExecutor(max_workers=1) as pool:
        following = pool.submit(next, source, None)
        while (current := following.result()) is not None:
            following = pool.submit(next, source, None)
            yield current


def _batches(frames: Iterable[Tensor], config: EncodeConfig) -> Iterator[Tensor]:
    """The frames of `encode_batch` clips at a time, of the last ones fewer; `_clips` makes clips of each."""
    length, step = config.clip_frames, _step(config)
    most = (config.encode_batch - 1) * step + length
    held: list[Tensor] = []
    number = -1
    for number, frame in enumerate(frames):
        if number % config.clip_stride >= length:
            continue  # between two clips
        held.append(frame.clone(memory_format=torch.contiguous_format))  # not a view of the full-size frame
        if len(held) == most:
            yield torch.stack(held)
            del held[: config.encode_batch * step]
    if 0 <= number < length - 1:
        held += held[-1:] * (length - len(held))
    if len(held) >= length:
        yield torch.stack(held[: (len(held) - length) // step * step + length])


def _step(config: EncodeConfig) -> int:
    """Held frames between the starts of two clips."""
    return min(config.clip_stride, config.clip_frames)


def _clips(frames: Tensor, config: EncodeConfig) -> Tensor:
    """Views of the clips of held frames: [n, 3, H, W] to [n_clips, clip_frames, 3, H, W]."""
    return frames.unfold(0, config.clip_frames, _step(config)).movedim(-1, 1)


def _n_clips(n_frames: int, config: EncodeConfig) -> int:
    return max(n_frames - config.clip_frames, 0) // config.clip_stride + 1


def _notes(video: VideoReader, config: EncodeConfig) -> list[str]:
    if video.n_frames >= config.clip_frames:
        return video.notes
    return [
        *video.notes,
        f"{video.path} has {video.n_frames} frames, fewer than the {config.clip_frames} of one clip: "
        f"its last frame is repeated {config.clip_frames - video.n_frames} times",
    ]


def _list(folder: Place) -> Sequence[Place]:
    if isinstance(folder, Remote):
        return sorted(folder.files(SUFFIX) if folder.is_dir() else (), key=files.natural_order)
    found = [path for path in folder.glob(f"*{SUFFIX}") if not path.name.startswith(".")]
    return sorted(found, key=files.natural_order)


def list_files(folder: Place) -> Sequence[Place]:
    """The latent files of a folder, video_2 before video_10; hidden and unfinished ones are ignored.

    Raises
    ------
    LatentError
        The folder is missing, or has none.
    """
    folder = place(folder)
    if not folder.is_dir():
        raise LatentError(f"latent folder not found: {folder}")
    found = _list(folder)
    if not found:
        raise LatentError(f"no latents in {folder}: expected files ending in {SUFFIX}, as `encode_videos` writes them")
    return found


def load_latents(folder: Place, most: int | None = None) -> list[Latents]:
    """Read every latent file of a folder, video_2 before video_10; hidden and unfinished files are ignored.

    Parameters
    ----------
    most : int, optional
        Bytes. Of larger folders about as many are read, of files evenly spread over all, with a warning.

    Raises
    ------
    LatentError
        The folder is missing or empty, a file is not a latent file, not finite or of odd latent size, or two files
        differ in latent size or in how they were encoded.
    """
    paths = list_files(folder)
    if most is not None:
        paths = _some(paths, most, folder)
    videos = [read_latents(path) for path in paths]
    check_alike([(video.path, video.latents.shape[1], video.metadata) for video in videos])
    return videos


def _some(paths: Sequence[Place], most: int, folder: Place) -> Sequence[Place]:
    total = sum(path.size() if isinstance(path, Remote) else path.stat().st_size for path in paths)
    if total <= most:
        return paths
    n = max(1, len(paths) * most // total)
    warnings.warn(f"{n} of the {len(paths)} latent files in {folder} are read, evenly spread: all are too large", stacklevel=3)
    return [paths[i] for i in np.linspace(0, len(paths) - 1, n).round().astype(int)]


def check_alike(videos: Sequence[tuple[Place, int, dict[str, Any]]]) -> None:
    """Latent files, each with its latent size and metadata, must belong together.

    Raises
    ------
    LatentError
        Two differ in latent size or in how they were encoded.
    """
    first, size, metadata = videos[0]
    for path, other_size, other in videos[1:]:
        if size != other_size:
            raise LatentError(f"latent sizes differ: {first} has {size}, {path} has {other_size}")
        ours, theirs = ({k: v for k, v in x["provenance"].items() if k not in _SOURCE_KEYS} for x in (metadata, other))
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                raise LatentError(
                    f"{first} and {path} were encoded differently: {key} is {ours.get(key)!r} and "
                    f"{theirs.get(key)!r}. Encode all videos again, or delete the latents that do not belong"
                )


def known_facts(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a latent file's metadata say, as `Latents.metadata`; KeyError, ValueError or HJEPAError if they are none."""
    from . import schemas

    known = {
        "provenance": untrusted.parse_json(metadata["provenance"], "provenance"),
        "label": metadata["label"],
        "fps": float(metadata["fps"]),
        "n_frames": int(metadata["n_frames"]),
    }
    schemas.check(schemas.LatentFacts, known, "metadata")
    return known


def check_even(path: Place, size: int) -> None:
    """Raises LatentError if latents are of an odd size."""
    if size % 2:
        raise LatentError(f"{path} has latents of odd size {size}; z = [q, p] needs an even one")


def read_latents(path: Place) -> Latents:
    """Read one latent file.

    Raises
    ------
    LatentError
        It is missing, unreadable, not a latent file, not finite, or of odd latent size.
    """
    from . import schemas

    try:
        tensors, metadata = files.load_tensors(path, "latent file")
        latents, start_frame = tensors["latents"], tensors["start_frame"]
        known = known_facts(metadata)
        if latents.dtype != torch.float32 or latents.ndim != 2 or start_frame.shape != latents.shape[:1] or not latents.numel():
            raise LatentError(f"shapes {list(latents.shape)} and {list(start_frame.shape)}, {latents.dtype}")
        inside = start_frame.dtype == torch.int64 and (start_frame >= 0).all() and (start_frame < known["n_frames"]).all()
        if not inside or latents.shape[1] > schemas.MOST_DIMENSIONS:
            raise LatentError(
                f"clips start at frames outside 0 to {known['n_frames'] - 1}, or a latent has too many dimensions"
            )
    except (HJEPAError, KeyError, ValueError) as error:
        raise LatentError(f"{path} is not a readable latent file; delete it and encode again ({error})") from error
    check_even(path, latents.shape[1])
    if not latents.isfinite().all():
        raise LatentError(f"{path} has {int((~latents.isfinite()).sum())} non-finite values; delete it and encode again")
    return Latents(path.stem, latents, start_frame, known, path)


@dataclass(frozen=True)
class Readout:
    """A ridge regression from latents, and how well it reads from held-out videos."""

    mean: np.ndarray
    """[d], of the latents it was fitted to."""
    scale: np.ndarray
    """[d]"""
    weights: np.ndarray
    """[d, k]"""
    offset: np.ndarray
    """[k]"""
    r2: float = float("nan")

    def __call__(self, latents: np.ndarray) -> np.ndarray:
        """Latents [..., d] to what is read from them, [..., k]."""
        read: np.ndarray = self.offset + (latents - self.mean) / self.scale @ self.weights
        return read


def probe(
    latents: Sequence[Latents], trajectories: Sequence[Trajectories], test_fraction: float = 0.2, seed: int = 42
) -> dict[str, float | int]:
    """How well a ridge regression reads ball positions and velocities, averaged over each clip, from its latent.

    Whole videos are held out; the ridge strength is chosen on a fifth of the training videos.
    `trajectories[i]` is the ground truth of `latents[i]`'s video; `test_fraction` of the videos is held out. The result
    has "position_r2" and "velocity_r2" on those videos (the mean R^2 of the coordinates) and "n_test_videos".

    Raises
    ------
    LatentError
        Too few videos, or ground truth that does not fit them.
    """
    scores: dict[str, float | int] = {"n_test_videos": max(1, round(test_fraction * len(latents)))}
    for name, field in (("position_r2", "positions"), ("velocity_r2", "velocities")):
        scores[name] = readout(latents, trajectories, field, test_fraction, seed).r2
    return scores


def readout(
    latents: Sequence[Latents],
    trajectories: Sequence[Trajectories],
    field: str = "positions",
    test_fraction: float = 0.2,
    seed: int = 42,
) -> Readout:
    """The regression of `probe` to "positions" or "velocities", [n_clips, balls * 2], and its R^2; errors as there."""
    n_test = max(1, round(test_fraction * len(latents)))
    n_validation = max(1, round((len(latents) - n_test) / 5))
    if len(latents) - n_test - n_validation < 1:
        raise LatentError(f"a probe needs videos to train, to validate and to test with; found {len(latents)}")
    for video, truth in zip(latents, trajectories, strict=True):
        if len(truth.positions) != video.metadata["n_frames"]:
            raise LatentError(
                f"ground truth of {video.name} has {len(truth.positions)} frames, its video {video.metadata['n_frames']}"
            )
        if truth.positions.shape != (len(truth.positions), *trajectories[0].positions.shape[1:]):
            raise LatentError(f"ground truth of {video.name} is of another number of bodies than that of {latents[0].name}")
    order = np.random.default_rng(seed).permutation(len(latents))
    test, validation, rest = np.split(order, [n_test, n_test + n_validation])
    features = [video.latents.double().numpy() for video in latents]
    targets = [clip_means(v, getattr(truth, field)) for v, truth in zip(latents, trajectories, strict=True)]

    def of(videos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate([features[i] for i in videos]), np.concatenate([targets[i] for i in videos])

    def fitted(train: np.ndarray, held_out: np.ndarray, strength: float) -> Readout:
        found = _ridge(*of(train), strength)
        return dataclasses.replace(found, r2=_r2(found, *of(held_out)))

    tried = [fitted(rest, validation, strength).r2 for strength in RIDGE_STRENGTHS]
    return fitted(order[n_test:], test, RIDGE_STRENGTHS[int(np.argmax(tried))])


def clip_means(video: Latents, motion: np.ndarray) -> np.ndarray:
    """[n_clips, balls * 2]: the mean of `motion` [T, balls, 2] over each clip's frames."""
    length = video.metadata["provenance"]["clip_frames"]
    return np.stack([motion[start : start + length].mean(axis=0).ravel() for start in video.start_frame.tolist()])


def _ridge(x: np.ndarray, y: np.ndarray, strength: float) -> Readout:
    """Fitted to x [n, d] and y [n, k]."""
    mean, std = x.mean(axis=0), x.std(axis=0)
    std[std == 0] = 1
    x = (x - mean) / std
    weights = np.linalg.solve(x.T @ x + strength * len(x) * np.eye(x.shape[1]), x.T @ (y - y.mean(axis=0)))
    return Readout(mean, std, weights, y.mean(axis=0))


def _r2(found: Readout, x: np.ndarray, y: np.ndarray) -> float:
    residual = ((y - found(x)) ** 2).sum(axis=0)
    spread = ((y - y.mean(axis=0)) ** 2).sum(axis=0)
    moving = spread > 0
    if not moving.any():
        raise LatentError("the held-out videos' ground truth does not vary, so R^2 has no meaning")
    return float((1 - residual[moving] / spread[moving]).mean())
