"""What every script needs: device and precision, ranks, whole files, locks, one-line errors.

torch takes seconds to import and not every script needs it, so the functions that do import it.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeVar

import filelock

if TYPE_CHECKING:
    import torch

# GPT-2's vocabulary has 50,257 tokens, the last of which separates documents. A model may have more
# rows of embeddings: they only pad the matrix to a size that is fast.
VOCAB_SIZE = 50257
END_OF_TEXT = 50256

DtypeName = Literal["auto", "bf16", "fp32"]
Result = TypeVar("Result")


# ---- device, precision, ranks --------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is the machine's accelerator, or the CPU without one.

    Raises ValueError when the device does not exist or cannot be used.
    """
    import torch

    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        device = torch.empty(0, device=name).device  # fails here rather than during the run
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {first_line(error)}") from None
    if device.type == "cuda":
        # Events, streams and CUDA graphs are created on the current device unless told otherwise.
        torch.cuda.set_device(device)
    return device


def choose_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """The precision of the matrix products; "auto" is bf16 where the hardware has it."""
    import torch

    has_bf16 = True
    if device.type == "cpu":  # without these instructions bf16 is emulated, slower than fp32
        capabilities = torch.cpu.get_capabilities()
        has_bf16 = capabilities.get("avx512_bf16", False) or capabilities.get("amx_tile", False)
    elif device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = name == "bf16" or (name == "auto" and has_bf16)
    return torch.bfloat16 if bf16 else torch.float32


def read_rank() -> tuple[int, int]:
    """This process's rank and the number of processes, from the environment that torchrun sets."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class DistInfo:
    """This process among those of a distributed run."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def initialize(cls, device_name: str) -> DistInfo:
        """Choose this process's device, and join the process group where there are several."""
        import torch
        import torch.distributed as dist

        rank, world_size = read_rank()
        if device_name in ("auto", "cuda") and torch.cuda.is_available():
            device_name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # one GPU for each process
        device = choose_device(device_name)
        if world_size > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(rank=rank, world_size=world_size, device=device)

    def run_on_rank_0(self, function: Callable[[], Result]) -> Result:
        """Call ``function`` on rank 0 alone and return its result on every rank.

        Its ValueError or OSError is raised on every rank too, so that all of them stop.
        """
        import torch.distributed as dist

        outcome: list[Any] = [None]
        if self.rank == 0:
            try:
                outcome = [function()]
            except (ValueError, OSError) as error:
                outcome = [error]
        if self.world_size > 1:
            dist.broadcast_object_list(outcome)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]


# ---- files and locks -----------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under its name once it is complete and on the disk, or never."""
    temporary = path.with_name(f".{path.name}.tmp")
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
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_folder(folder: Path, flag: str, name: str = ".lock") -> filelock.BaseFileLock:
    """Lock a folder for as long as the returned lock is kept, at most until this process ends.

    The operating system releases it however the process ends, so it is never stale. ``flag`` is
    the command-line flag that names the folder.

    Raises ValueError when another process holds the lock or the folder cannot be written.
    """
    lock = filelock.FileLock(folder / name, thread_local=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise ValueError(
            f"{folder}: another run is writing there; wait for it or give another {flag}"
        ) from None
    except OSError as error:
        raise ValueError(f"{folder}: cannot write there ({error}); give a {flag}") from error
    return lock


def download_model(hub_id: str) -> Path:
    """The local copy of a GPT-2 on the Hugging Face hub, such as "gpt2-xl" or "owner/name".

    Raises FileNotFoundError when it cannot be downloaded.
    """
    if not re.fullmatch(r"gpt2(-medium|-large|-xl)?|[\w.-]+/[\w.-]+", hub_id):
        raise FileNotFoundError(
            f"{hub_id}: no such folder; give a checkpoint, a log folder or a hub id such as gpt2"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["config.json", "model*.safetensors"]))
    except Exception as error:  # the classes it may raise have no base but this one in common
        raise FileNotFoundError(
            f"{hub_id}: no such folder, and not on the hub: {first_line(error)}"
        ) from None


# ---- errors --------------------------------------------------------------------------------------

# Exit code 2 is for what the user can mend in the command or its files, 1 for a failure of the
# machine, the network or the run.
USER_ERRORS = (ValueError, FileNotFoundError, NotADirectoryError, PermissionError)
RUN_ERRORS = (OSError, MemoryError, FloatingPointError)


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextlib.contextmanager
def exit_with_one_line(remedy: str = "") -> Iterator[None]:
    """Turn an expected error into one line on standard error and an exit code.

    ``remedy`` says how to continue after a failure that was not the user's mistake, or Ctrl-C.
    """
    rank, world_size = read_rank()
    try:
        yield
    except (*USER_ERRORS, *RUN_ERRORS, KeyboardInterrupt) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        code = 130 if interrupted else 2 if isinstance(error, USER_ERRORS) else 1
        message = "interrupted" if interrupted else " ".join(str(error).split())
        message += f"; {remedy}" if remedy and code != 2 else ""
        message += f" (rank {rank})" if rank else ""
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
        if interrupted or world_size > 1:
            # At once, without Python's own clean-up: a thread may be waiting for the network. Among
            # several ranks NCCL would wait for those that will never come, and torchrun, which does
            # not see this process end, would not stop the others.
            os._exit(code)
        raise SystemExit(code) from None
