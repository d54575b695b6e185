"""Files that are complete or absent, checksums, the lock of a folder, text as people save it."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import filelock

# What a file system answers that has no fsync of folders (CIFS, sshfs) or no flock (Lustre, FSx).
UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF}


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under its name once it is complete and on the disk, or never."""
    # With the process's number: plot.py --watch and the end of a run write the same picture.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)  # the new name must survive a power cut too


def fsync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    # Windows flushes no file that was opened for reading, and no system opens a folder for writing.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in UNSUPPORTED):
            raise
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """A file's SHA-256 in hexadecimal, as ``sha256sum`` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock_folder(folder: Path, flag: str) -> filelock.BaseFileLock:
    """Lock a folder, which is made where it is missing, until ``release()`` or the process's end.

    ``flag`` is the option that names the folder. Raises ValueError when another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Without flock it would fall back to a file that outlives a killed process on another machine.
    lock = filelock.FileLock(folder / ".lock", thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ValueError(
            f"{folder}: another process writes there; wait for it or give another {flag}"
        ) from None
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        print(f"{folder}: this disk has no locks: start no second run there", file=sys.stderr)
    return lock


def decode_text(data: bytes, where: str) -> str:
    """UTF-8 without its mark; ValueError, which says how to convert it, for other encodings."""
    start = data[:4096]
    # Every second byte of English in UTF-16 is 0, so that without a mark it would pass as UTF-8.
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or start.count(0) > len(start) // 4:
        encoding = "UTF-16"
    else:
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            encoding = "WINDOWS-1252"
    raise ValueError(
        f"{where} is not UTF-8 but, it seems, {encoding}; convert it with"
        f" `iconv -f {encoding} -t UTF-8`"
    )
