"""Files are complete or absent."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from hjepa_fast.errors import HJEPAError, UsageError
from hjepa_fast.pipeline import files
from hjepa_fast.pipeline.config import Config


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    files.write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), files.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_full_disk_is_said(tmp_path):
    path = tmp_path / "file.txt"
    with pytest.raises(HJEPAError, match="file.txt: the disk is full. Free some space"), files.atomic_path(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_safetensors_on_a_full_disk(tmp_path, monkeypatch):
    """safetensors has the operating system's error as text only, in these words."""
    import safetensors.torch

    def full(*_, **__):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(HJEPAError, match=r"x.safetensors: the disk is full. Free some space"):
        files.save_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(1)}, {})
    assert not list(tmp_path.iterdir())


def test_a_folder_in_the_way_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HJEPAError, match="cannot write .*: (Not a directory|File exists)"):
        files.write_text(tmp_path / "file" / "inside", "")


def test_files_get_ordinary_permissions(tmp_path):
    (tmp_path / "plain").write_text("")
    files.write_text(tmp_path / "atomic", "")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_tensors_round_trip(tmp_path):
    path = tmp_path / "x.safetensors"
    files.save_tensors(path, {"a": torch.arange(6).view(2, 3).T}, {"key": "value"})
    tensors, metadata = files.load_tensors(path, "x")
    assert torch.equal(tensors["a"], torch.arange(6).view(2, 3).T)
    assert metadata == {"key": "value"} == files.read_metadata(path)
    assert files.read_metadata(tmp_path / "none") is None
    with pytest.raises(HJEPAError, match="thing not found"):
        files.load_tensors(tmp_path / "none", "thing")
    path.write_bytes(b"garbage")
    with pytest.raises(HJEPAError, match="thing is not a readable safetensors file"):
        files.load_tensors(path, "thing")
    assert files.read_metadata(path) is None


def test_json_is_strict(tmp_path):
    with pytest.raises(ValueError, match="Out of range"):
        files.write_json(tmp_path / "x.json", {"x": float("nan")})
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(HJEPAError, match="settings cannot be read"):
        files.read_json(tmp_path / "bad.json", "settings")


class TestConfig:
    def test_round_trip(self):
        config = Config.from_dict({"videos": {"radius": [10, 12.5]}, "data": {"standardize": False}}, "test")
        assert config.videos.radius == (10.0, 12.5)
        assert Config.from_dict(config.to_dict(), "test") == config

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ([], "x: a configuration is a JSON object, found list"),
            ({"video": {}}, "x: unknown section video; known: videos, "),
            ({"videos": {"frames": 1}}, "x: videos: unknown field frames; known: scene, n_videos, "),
            ({"videos": 3}, "x: videos: expected a JSON object, found int"),
            ({"train": {"epochs": "many"}}, "x: train.epochs: expected int, found 'many'"),
            ({"train": {"epochs": True}}, "x: train.epochs: expected int, found True"),
            ({"data": {"standardize": 1}}, "x: data.standardize: expected bool, found 1"),
            ({"data": {"split": "frame"}}, "x: data.split: 'frame' is not one of video, window"),
            ({"videos": {"radius": []}}, "x: videos.radius: expected a list of numbers"),
        ],
    )
    def test_what_does_not_fit_is_named(self, values, message):
        with pytest.raises(UsageError, match=message.replace("(", r"\(")):
            Config.from_dict(values, "x")


class TestLocks:
    def test_the_content_is_on_the_disk_before_the_name(self, tmp_path, monkeypatch):
        done = []
        fsync, replace = os.fsync, Path.replace
        monkeypatch.setattr(os, "fsync", lambda handle: done.append(os.readlink(f"/proc/self/fd/{handle}")) or fsync(handle))
        monkeypatch.setattr(Path, "replace", lambda self, target: done.append("renamed") or replace(self, target))
        files.write_text(tmp_path / "x.txt", "text")
        written, renamed, folder = done
        assert Path(written).name.startswith(files.PARTIAL)
        assert renamed == "renamed"
        assert Path(folder) == tmp_path

    def test_one_holder_at_a_time(self, tmp_path):
        folder = tmp_path / "deep" / "folder"
        message = f"{folder} is in use: process {os.getpid()} on .* writes into it. Wait until that has ended"
        with files.locked(folder):
            files.write_text(folder / "x", "")
            with pytest.raises(HJEPAError, match=message), files.locked(folder):
                pass
            with pytest.raises(HJEPAError, match=message):
                files.refuse_if_locked(folder)
        files.refuse_if_locked(folder)
        files.refuse_if_locked(tmp_path)
        with files.locked(folder):
            pass
        assert sorted(path.name for path in folder.iterdir()) == [files.LOCK, "x"]

    def test_a_new_folder_that_nothing_was_written_into_goes_again(self, tmp_path):
        with pytest.raises(KeyboardInterrupt), files.locked(tmp_path / "new"):
            raise KeyboardInterrupt
        assert not list(tmp_path.iterdir())

    def test_only_unfinished_files_of_this_package_are_removed(self, tmp_path):
        names = {".partial-a1b2c3_z.json", ".partial-abcdefgh"}
        kept = {".partial-report.json", "x.partial-abcdefgh", ".partial-abcdefgh.tar.gz", "partial-abcdefgh.json"}
        for name in names | kept:
            (tmp_path / name).write_text("")
        (tmp_path / ".partial-folder__").mkdir()
        with files.locked(tmp_path):
            pass
        assert {path.name for path in tmp_path.iterdir()} == kept | {".partial-folder__", files.LOCK}

    def test_a_place_that_cannot_be_written(self):
        for folder in ("/proc", "/proc/none"):
            with pytest.raises(HJEPAError, match=f"cannot write into {folder}: "), files.locked(folder):
                pass

    def test_a_file_system_without_locks(self, tmp_path, monkeypatch):
        import filelock

        def no_locks(*_, **__):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(filelock.FileLock, "acquire", no_locks)
        with pytest.warns(UserWarning, match="without locks: see that nothing else writes there"), files.locked(tmp_path):
            files.write_text(tmp_path / "x", "")

    def test_a_folder_that_only_is_read_perhaps(self, tmp_path, monkeypatch):
        import filelock

        def refused(*_, **__):
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(filelock.FileLock, "acquire", refused)
        with files.locked(tmp_path, needed=False):
            pass
        with pytest.raises(HJEPAError, match="cannot write into .*: Read-only file system"), files.locked(tmp_path):
            pass
