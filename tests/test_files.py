"""gptxs/files.py: files that are whole or absent, locks on any disk, text as people save it."""

from __future__ import annotations

import codecs
import errno
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from launcher import ROOT

from gptxs import files

# ---- files ---------------------------------------------------------------------------------------


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


def refuse_fsync(monkeypatch: pytest.MonkeyPatch, of_folders: bool, number: int) -> None:
    """A disk on which fsync fails, of folders or of files."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == of_folders:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_fsync_of_folders_is_good_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refuse_fsync(monkeypatch, of_folders=True, number=number)
    with files.atomic_write(tmp_path / "a") as file:
        file.write(b"x")
    files.fsync(tmp_path)
    assert (tmp_path / "a").read_bytes() == b"x"


def test_data_that_did_not_reach_the_disk_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_fsync(monkeypatch, of_folders=True, number=errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        files.fsync(tmp_path)
    monkeypatch.undo()
    refuse_fsync(monkeypatch, of_folders=False, number=errno.EINVAL)
    with pytest.raises(OSError, match="Invalid"), files.atomic_write(tmp_path / "a") as file:
        file.write(b"x")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").touch()
    with pytest.raises(OSError, match="Invalid"):
        files.fsync(tmp_path / "a")


# ---- locks ---------------------------------------------------------------------------------------

# Locks a folder where flock fails with an errno (0: it works), then says so and waits for the end.
CHILD = """
import errno, fcntl, os, sys
from pathlib import Path
from gptxs.files import lock_folder

number = int(sys.argv[2])
def flock(descriptor, operation):
    raise OSError(number, os.strerror(number))
if number:
    fcntl.flock = flock
lock = lock_folder(Path(sys.argv[1]), flag="--log-dir")
print("locked", flush=True)
sys.stdin.read()
lock.release()
"""


def lock(folder: Path, number: int = 0, die: int = 0) -> tuple[int, str, str]:
    """Locks a folder in a process that ends, or is killed: its exit code and what it printed."""
    command = [sys.executable, "-c", CHILD, str(folder), str(number)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        out = process.stdout.readline()
        if die:
            process.send_signal(die)
        rest, err = process.communicate()
    return process.returncode, out + rest, err


def test_one_process_at_a_time_writes_to_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new/log"
    held = files.lock_folder(folder, flag="--log-dir")
    code, out, err = lock(folder)
    assert (code, out) == (1, "")
    assert "another process writes there" in err
    assert "--log-dir" in err
    # As in a notebook, another thread may end what this one has begun.
    thread = threading.Thread(target=held.release)
    thread.start()
    thread.join()
    assert lock(folder, die=signal.SIGKILL) == (-signal.SIGKILL, "locked\n", "")
    assert lock(folder) == (0, "locked\n", "")  # a lock goes with its process


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EIO])
def test_a_disk_without_locks_is_said_in_a_line_and_nothing_stale_remains(
    tmp_path: Path, number: int
) -> None:
    for die in (signal.SIGKILL, 0):
        code, out, err = lock(tmp_path, number, die)
        if number == errno.EIO:  # another failure, and no missing feature
            assert (code, out, "Input/output error" in err) == (1, "", True)
            return
        assert (code, out) == (-die, "locked\n")
        assert err.count("\n") == 1
        assert f"{tmp_path}: this disk has no locks" in err
        # Nor for another machine, which could not ask whether the process of a marker still lives.
        assert [path.read_bytes() for path in tmp_path.iterdir()] == [b""]


def test_the_lock_obeys_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.lock_folder(tmp_path / "log", flag="--log-dir").release()
    finally:
        os.umask(before)
    assert (tmp_path / "log/.lock").stat().st_mode & 0o777 == 0o640


# ---- text ----------------------------------------------------------------------------------------

TEXT = "Café „naïve“ and plain English text. " * 20


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", ""),
        (codecs.BOM_UTF8, ""),
        (TEXT.encode(), TEXT),
        (codecs.BOM_UTF8 + TEXT.encode(), TEXT),
        (f"{TEXT}\ufeff{TEXT}".encode(), f"{TEXT}\ufeff{TEXT}"),  # a mark only at the beginning
        (f"{TEXT}\0\0\0{TEXT}".encode(), f"{TEXT}\0\0\0{TEXT}"),
        (json.dumps({"text": "語" * 3000}).encode(), json.dumps({"text": "語" * 3000})),
    ],
)
def test_utf_8_is_read_without_its_mark(data: bytes, text: str) -> None:
    assert files.decode_text(data, "a.txt") == text


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp1252"])
def test_another_encoding_is_refused_with_a_command_that_converts_it(
    tmp_path: Path, encoding: str
) -> None:
    data = TEXT.encode(encoding)
    with pytest.raises(ValueError, match=r"^a\.txt is not UTF-8") as error:
        files.decode_text(data, "a.txt")
    command = str(error.value).split("`")[1]
    done = subprocess.run(command.split(), input=data, capture_output=True, check=True)
    assert files.decode_text(done.stdout, "a.txt") == TEXT
