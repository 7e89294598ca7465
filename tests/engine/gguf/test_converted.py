"""The cache of converted files: whole or not there, and always of the file that was digested."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from paceline.engine.gguf import converted
from paceline.engine.gguf.converted import Converted, OnProgress, convert_once
from paceline.errors import ConfigError

OnStep = Callable[[], None]


@pytest.fixture(autouse=True)
def conversion_is_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one is tested with the models; this is about its folder."""

    def copy(source: Path, dtype: str, folder: Path, on_progress: OnProgress) -> None:
        on_progress("", 0.5)
        (folder / "copy").write_bytes(source.read_bytes())

    monkeypatch.setattr(converted, "_run_conversion", copy)


def convert(path: Path, on_step: OnStep = lambda: None) -> Converted:
    return convert_once(path, "float32", path.parent / "cache", lambda name, share: on_step())


def write_file(path: Path, content: bytes = b"old") -> Path:
    path.write_bytes(content)
    return path


def replace(path: Path) -> None:
    write_file(path.with_suffix(".new"), b"new").replace(path)


def rewrite_with_its_old_time(path: Path) -> None:
    before = path.stat()
    write_file(path, b"new")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [replace, rewrite_with_its_old_time])
def test_a_file_that_changes_while_it_is_converted_is_refused_and_not_cached(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    path = write_file(tmp_path / "model.gguf")
    with pytest.raises(ConfigError, match=r"model\.gguf changed while it was being converted"):
        convert(path, lambda: change(path))
    assert [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()] == []
    assert (convert(path).folder / "copy").read_bytes() == b"new"


def test_what_a_killed_conversion_left_is_removed_by_the_next(tmp_path: Path) -> None:
    path = write_file(tmp_path / "model[1].gguf")
    folder = convert(path).folder
    left = folder.with_name(f"{folder.name}{converted.PARTIAL}abc")
    folder.rename(left)
    other = folder.with_name(f"other{converted.PARTIAL}abc")
    other.mkdir()
    assert convert(path).folder == folder
    assert not left.exists()
    assert other.exists()  # perhaps still at work: its lock is another one


def test_the_longest_file_name_has_a_folder(tmp_path: Path) -> None:
    path = write_file(tmp_path / ("ä" * 125 + ".gguf"))
    assert (convert(path).folder / "copy").exists()


def test_a_lock_that_is_held_too_long_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_file(tmp_path / "model.gguf")
    folder = convert(path).folder
    folder.rename(tmp_path / "away")
    monkeypatch.setattr(converted, "CONVERSION_TIMEOUT_S", 0.05)
    with FileLock(f"{folder}.lock"), pytest.raises(ConfigError, match=r"-v2\.lock"):
        convert(path)
