"""gptxs/files.py: files that are whole or absent, locks on any disk, text as people save it."""

from __future__ import annotations

import codecs
import errno
import json
import os
import stat
import subprocess
import threading
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from unittest.mock import Mock

import pytest

from gptxs import files

Patch = pytest.MonkeyPatch
TEXT = "Café „naïve“ and plain English text. " * 20


def test_a_file_appears_once_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    with files.atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"new"
    with suppress(KeyboardInterrupt), files.atomic_write(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["index.json"]


def test_two_processes_write_the_same_file(tmp_path: Path, monkeypatch: Patch) -> None:
    path = tmp_path / "plot.png"
    with files.atomic_write(path) as ours:
        ours.write(b"ours")
        monkeypatch.setattr(os, "getpid", lambda: 0)
        with files.atomic_write(path) as theirs:
            theirs.write(b"theirs")
        assert path.read_bytes() == b"theirs"
    assert path.read_bytes() == b"ours"


@pytest.mark.parametrize(
    ("of_folders", "number", "is_error"),
    [
        (True, errno.EINVAL, False),
        (True, errno.ENOSYS, False),
        (True, errno.EOPNOTSUPP, False),
        (True, errno.EIO, True),
        (False, errno.EINVAL, True),
    ],
)
def test_data_that_did_not_reach_the_disk_is_an_error_unless_it_has_no_fsync_of_folders(
    tmp_path: Path, monkeypatch: Patch, of_folders: bool, number: int, is_error: bool
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == of_folders:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    def expected() -> AbstractContextManager[object]:
        return pytest.raises(OSError, match=os.strerror(number)) if is_error else nullcontext()

    monkeypatch.setattr(os, "fsync", fsync)
    with expected(), files.atomic_write(tmp_path / "a") as file:
        file.write(b"x")
    assert [path.name for path in tmp_path.iterdir()] == (["a"] if of_folders else [])
    (tmp_path / "a").touch()
    with expected():
        files.fsync(tmp_path if of_folders else tmp_path / "a")


def test_one_run_at_a_time_writes_to_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new/log"
    held = files.lock_folder(folder, flag="--log-dir")
    with pytest.raises(ValueError, match=r"another process writes there.*--log-dir"):
        files.lock_folder(folder, flag="--log-dir")
    # As in a notebook, another thread may end what this one has begun.
    thread = threading.Thread(target=held.release)
    thread.start()
    thread.join()
    files.lock_folder(folder, flag="--log-dir").release()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EIO])
def test_a_disk_without_locks_is_said_in_a_line_and_nothing_stale_remains(
    tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(number, os.strerror(number))))
    if number == errno.EIO:  # another failure, and no missing feature
        with pytest.raises(OSError, match="Input/output"):
            files.lock_folder(tmp_path, flag="--log-dir")
        return
    files.lock_folder(tmp_path, flag="--log-dir")
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{tmp_path}: this disk has no locks" in error
    # Nor for another machine, which could not ask whether the process of a marker still lives.
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b""]


@pytest.mark.parametrize(
    "text", ["", f"{TEXT}\ufeff{TEXT}", f"{TEXT}\0\0\0{TEXT}", json.dumps({"text": "語" * 3000})]
)
def test_utf_8_is_read_without_its_mark(text: str) -> None:
    assert files.decode_text(text.encode(), "a.txt") == text
    assert files.decode_text(codecs.BOM_UTF8 + text.encode(), "a.txt") == text


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp1252"])
def test_another_encoding_is_refused_with_a_command_that_converts_it(encoding: str) -> None:
    data = TEXT.encode(encoding)
    with pytest.raises(ValueError, match=r"^a\.txt is not UTF-8") as error:
        files.decode_text(data, "a.txt")
    command = str(error.value).split("`")[1]
    done = subprocess.run(command.split(), input=data, capture_output=True, check=True)
    assert files.decode_text(done.stdout, "a.txt") == TEXT
