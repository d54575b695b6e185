"""What every script needs: options, device, ranks, files and locks, the hub, one-line errors.

torch takes seconds to import and not every script needs it, so the functions that do import it.
Other packages are imported late too: until the last lines of this module have run, Ctrl-C prints a
traceback.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import itertools
import os
import re
import signal
import socket
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeVar, get_type_hints

if TYPE_CHECKING:
    import torch

# GPT-2's vocabulary has 50,257 tokens, the last of which separates documents. A model may have more
# rows of embeddings: they only pad the matrix to a size that is fast.
VOCAB_SIZE = 50257
END_OF_TEXT = 50256

DtypeName = Literal["auto", "bf16", "fp16", "fp32"]
# Parameters of glibc's mallopt(), from its malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
JOIN_SECONDS = 120.0  # that a rank waits for the others: they import torch, maybe from a network
DNS_SECONDS = 10.0  # that resolving the hub's name may take

Result = TypeVar("Result")
Options = TypeVar("Options")
Record = TypeVar("Record")


# ---- options -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bounds:
    """The range of a numeric option, both ends included: ``Annotated[int, Bounds(1, 10)]``."""

    low: float
    high: float


def check_options(config: Any, prefix: str = "") -> list[str]:
    """A message for each option outside its ``Bounds``, those of nested dataclasses too."""
    problems = []
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        if is_dataclass(value):
            problems += check_options(value, prefix=f"{prefix}{name}.")
        for bounds in getattr(hint, "__metadata__", ()):
            if not isinstance(bounds, Bounds) or value is None:
                continue
            if value != value:  # NaN; math.isnan would convert an integer, which may be too large
                problems.append(f"{prefix}{name} {value} must be a number")
            elif value < bounds.low:
                problems.append(f"{prefix}{name} {value} must be at least {bounds.low}")
            elif value > bounds.high:
                problems.append(f"{prefix}{name} {value} must be at most {bounds.high}")
    return problems


def parse_options(
    config_class: type[Options], description: str | None, default: Options | None = None
) -> Options:
    """Parse the command line into a ``config_class``. Raises ValueError for a refused flag.

    ``default`` holds the values of the flags that are not given.
    """
    import tyro

    for before, argument in itertools.pairwise(sys.argv):
        # As from an unset shell variable. An empty path would mean the working directory.
        flag = argument.removesuffix("=") if argument.startswith("--") else before
        if (argument == "" or argument == f"{flag}=") and not flag.endswith("prompt"):
            raise ValueError(f"{flag} is followed by an empty value; leave it out or fill it")
    box = io.StringIO()  # tyro explains a mistake in a box of several lines
    try:
        with contextlib.redirect_stderr(box):
            if default is None:
                return tyro.cli(config_class, description=description)
            return tyro.cli(config_class, description=description, default=default)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    lines = [line.strip("│ ") for line in box.getvalue().splitlines()[1:]]  # but for the title
    mistake = itertools.takewhile(lambda line: line.strip("─╰╯"), lines)  # up to the first rule
    raise ValueError(f"{' '.join(mistake)}; see --help")


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
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used here: {first_line(error)}") from None
    if device.type == "meta":  # torch's device for shapes without numbers
        raise ValueError("--device meta computes nothing; give cpu, cuda or mps")
    if device.type == "cuda":
        # Events, streams and CUDA graphs are created on the current device unless told otherwise.
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory() -> None:
    """Let the C library keep the memory that is freed, instead of giving it back to the system.

    Each training step allocates the same gigabytes again, and Linux would have to clear every page
    of them first: a quarter to a third of a step that is not compiled (torch 2.13, bf16, 2 cores).
    """
    if sys.platform != "linux":
        return
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc; other libraries have none
    if mallopt is not None:
        # See mallopt(3): free memory at the end of the heap stays, and large blocks come from it.
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_MMAP_MAX, 0)


def choose_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """The precision of the matrix products.

    "auto" is bf16 where the hardware has it, fp16 on other GPUs, and fp32 on other CPUs.
    """
    import torch

    if name != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    has_bf16 = True
    if device.type == "cpu":  # without these instructions bf16 is emulated, slower than fp32
        capabilities = torch.cpu.get_capabilities()
        has_bf16 = capabilities.get("avx512_bf16", False) or capabilities.get("amx_tile", False)
    elif device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if has_bf16:
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def read_rank() -> tuple[int, int]:
    """This process's rank and the number of processes, from the environment that torchrun sets.

    Raises ValueError for values that contradict each other, such as those left by another job.
    """
    remedy = "start with torchrun, or unset RANK and WORLD_SIZE"
    values = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        text = os.environ.get(name, "1" if name == "WORLD_SIZE" else "0")
        if not re.fullmatch(r"[0-9]{1,6}", text):
            raise ValueError(f"{name}={text!r} in the environment is not a number; {remedy}")
        values[name] = int(text)
    rank, world_size = values["RANK"], values["WORLD_SIZE"]
    if rank >= world_size:
        raise ValueError(
            f"RANK={rank} must be below WORLD_SIZE={world_size} (1 where it is not set); {remedy}"
        )
    if world_size > 1 and "RANK" not in os.environ:
        raise ValueError(f"WORLD_SIZE={world_size} in the environment, but no RANK; {remedy}")
    return rank, world_size


def join_group(backend: str, rank: int, world_size: int) -> None:
    """Form the process group. Raises ConnectionError that names the ranks that did not come."""
    import torch.distributed as dist

    missing_names = [n for n in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(n)]
    if missing_names:
        raise ValueError(
            f"WORLD_SIZE={world_size} in the environment, but no {' and '.join(missing_names)};"
            " start with torchrun, or unset RANK and WORLD_SIZE"
        )
    host = os.environ["MASTER_ADDR"]
    port = os.environ["MASTER_PORT"]
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"MASTER_PORT={port!r} in the environment is not a port")
    try:
        socket.getaddrinfo(host, int(port))
    except OSError as error:
        raise ValueError(f"MASTER_ADDR={host!r} in the environment: {error}") from None
    # torchrun hosts the store itself; without it that is rank 0's part, as for env:// in torch.
    is_host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    deadline = time.monotonic() + JOIN_SECONDS
    # torch's client would print pages about a host that does not answer yet.
    while not is_host:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConnectionError(
                    f"rank {rank} cannot reach rank 0 at {host}:{port} ({error}); start all"
                    " ranks, or unset RANK and WORLD_SIZE for one process"
                ) from None
            time.sleep(0.1)
    try:
        store = dist.TCPStore(
            host,
            int(port),
            world_size,
            is_master=is_host,
            timeout=timedelta(seconds=JOIN_SECONDS),
            wait_for_workers=False,  # it would not say who is missing
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        group = dist.PrefixStore(f"gpt-xs/{attempt}", store)
        group.set(f"rank {rank}", "")
        absent = list(range(world_size))
        while absent and time.monotonic() < deadline:
            absent = [other for other in absent if not group.check([f"rank {other}"])]
            time.sleep(0.05 if absent else 0)
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        raise ConnectionError(
            f"rank {rank} cannot reach rank 0 at {host}:{port}: {first_line(error)}"
        ) from None
    if absent:
        names = ", ".join(str(other) for other in absent[:8])
        raise ConnectionError(
            f"{len(absent)} of {world_size} ranks did not start within {JOIN_SECONDS:.0f} s"
            f" (missing: {names}); start all of them, or unset RANK and WORLD_SIZE for one process"
        )
    dist.init_process_group(backend, store=group, rank=rank, world_size=world_size)


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

        rank, world_size = read_rank()
        if device_name in ("auto", "cuda") and torch.cuda.is_available():
            device_name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # one GPU for each process
        device = choose_device(device_name)
        if world_size > 1:
            join_group("nccl" if device.type == "cuda" else "gloo", rank, world_size)
        return cls(rank=rank, world_size=world_size, device=device)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in order, on every rank."""
        import torch.distributed as dist

        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def run_on_all(self, function: Callable[[], Result]) -> Result:
        """Call ``function`` on every rank. If it fails on one, all of them raise and stop.

        A rank raises its own error, or one that names the rank that has failed. Only ValueError
        and OSError are exchanged: anything else is a bug.
        """
        error: Exception | None = None
        outcome: list[Result] = []
        try:
            outcome.append(function())
        except (ValueError, OSError) as caught:
            error = caught
        failure = None if error is None else (exit_code(error) == 2, str(error))
        failures = self.gather(failure)
        if error is not None:
            raise error
        for rank, other in enumerate(failures):
            if other is not None:
                by_user, message = other
                raise (ValueError if by_user else OSError)(f"rank {rank} has failed: {message}")
        return outcome[0]

    def require_equal(self, facts: Mapping[str, object]) -> None:
        """Raise ValueError, on every rank, that names the facts in which the ranks differ."""
        texts = {name: str(value) for name, value in facts.items()}
        of_ranks = self.gather(texts)
        for rank, other in enumerate(of_ranks):
            for name, text in of_ranks[0].items():
                if other.get(name) != text:
                    raise ValueError(
                        f"all ranks must have the same settings and data, but {name} is"
                        f" {text[:100]} on rank 0 and {str(other.get(name))[:100]} on rank {rank}"
                    )

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


def sha256(path: Path) -> str:
    """A file's SHA-256 in hexadecimal, as ``sha256sum`` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_regular_file(path: Path) -> None:
    """Raise FileNotFoundError where there is no file, ValueError where it is a folder or device.

    To open a FIFO would wait for ever, and to read a device would not end.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is not a regular file; give another")


def read_json(path: Path, record_type: type[Record]) -> Record:
    """A JSON file as a ``record_type``, such as a dataclass, whose types are checked.

    Raises ValueError, naming the file and the key, when it is damaged or of another type.
    """
    import msgspec

    require_regular_file(path)
    try:
        return msgspec.json.decode(path.read_bytes(), type=record_type)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged or not what it should be: {first_line(error)}") from None


class FolderLock:
    """The lock of a folder, for as long as this is kept, at most until the process ends.

    The operating system releases it however the process ends, so it is never stale.
    """

    def __init__(self, folder: Path, name: str, seconds: float) -> None:
        """Wait up to ``seconds`` for a process that holds it.

        Raises filelock.Timeout when it still does, OSError when the lock cannot be made.
        """
        import filelock

        self._folder = folder
        self._path = folder / name
        # By ourselves first: filelock takes some errors for a lock that is held, and truncates
        # what it opens, which may be the user's own file behind a link.
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        os.close(os.open(self._path, flags, 0o644))
        if not stat.S_ISREG(self._path.lstat().st_mode):
            raise OSError(f"{self._path} is not a regular file")
        self._lock = filelock.FileLock(self._path, thread_local=False)
        self._lock.acquire(timeout=seconds, poll_interval=0.02)
        self._inode = self._path.stat().st_ino

    def check(self) -> None:
        """Raise OSError when the folder was renamed or removed since: another run may be there."""
        try:
            if self._path.stat().st_ino == self._inode:
                return
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError:  # a network disk that does not answer: nothing says that it was renamed
            return
        raise OSError(f"{self._folder} was renamed, removed or replaced during the run")

    def release(self) -> None:
        """Let another process lock the folder."""
        self._lock.release()


def lock_folder(folder: Path, flag: str, name: str = ".lock", seconds: float = 0.0) -> FolderLock:
    """Lock a folder, which is made where it is missing. ``flag`` is the option that names it.

    Raises ValueError when another process holds the lock for ``seconds``, or the folder cannot be
    written.
    """
    import filelock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        return FolderLock(folder, name, seconds)
    except filelock.Timeout:
        raise ValueError(
            f"{folder}: another run is writing there; wait for it or give another {flag}"
        ) from None
    except OSError as error:
        raise ValueError(f"{folder}: cannot write there ({error}); give a {flag}") from error


# ---- the Hugging Face hub ------------------------------------------------------------------------


@functools.cache
def hub_problem() -> str:
    """Why the hub cannot be reached by its name, or "" where it can or where a proxy resolves it.

    The hub's own client would try for minutes.
    """
    import urllib.parse
    import urllib.request

    host = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    if host is None or urllib.request.getproxies().keys() & {"http", "https", "all"}:
        return ""
    answers: list[str] = []

    def resolve() -> None:
        try:
            socket.getaddrinfo(host, None)
            answers.append("")
        except (OSError, UnicodeError) as error:  # a label of HF_ENDPOINT may be too long
            answers.append(str(error))

    thread = threading.Thread(target=resolve, name="resolve", daemon=True)
    thread.start()
    thread.join(DNS_SECONDS)
    answer = answers[0] if answers else f"no answer within {DNS_SECONDS:.0f} s"
    return answer and f"the name {host} cannot be resolved ({answer}); is there a network?"


def prepare_hub() -> None:
    """Call before the first import of a hub's library: without a network only its cache is used."""
    if hub_problem():
        os.environ["HF_HUB_OFFLINE"] = "1"


def download_model(hub_id: str) -> Path:
    """The local copy of a GPT-2 on the Hugging Face hub, such as "gpt2-xl" or "owner/name".

    Raises FileNotFoundError when it cannot be downloaded.
    """
    if not re.fullmatch(r"gpt2(-medium|-large|-xl)?|[\w.-]+/[\w.-]+", hub_id):
        raise FileNotFoundError(
            f"{hub_id}: no such folder; give a checkpoint, a log folder or a hub id such as gpt2"
        )
    prepare_hub()
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(hub_id, allow_patterns=["config.json", "model*.safetensors*"])
        )
    except Exception as error:  # the classes it may raise have no base but this one in common
        raise FileNotFoundError(
            f"{hub_id}: no such folder, and not on the hub: {hub_problem() or first_line(error)}"
        ) from None


# ---- errors --------------------------------------------------------------------------------------

# Exit code 2 is for what the user can mend in the command or its files, 1 for a failure of the
# machine, the network or the run, or for a bug.
USER_ERRORS = (
    ValueError,
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
USER_ERRNOS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS)
RUN_ERRORS = (OSError, MemoryError, FloatingPointError)
MAX_MESSAGE = 2000  # characters: a message may quote a damaged file


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def exit_code(error: BaseException) -> int:
    """130 for Ctrl-C, 2 for a mistake of the user, 1 for anything else."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, USER_ERRORS) or getattr(error, "errno", 0) in USER_ERRNOS else 1


def describe(error: BaseException) -> str:
    """An error in one line. One that nobody expected is named with its place in the code."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    message = " ".join(str(error).split())
    message = "".join(c if c.isprintable() else "?" for c in message)
    if len(message) > MAX_MESSAGE:
        message = f"{message[:MAX_MESSAGE]}..."
    if isinstance(error, (*USER_ERRORS, *RUN_ERRORS)):
        return message or type(error).__name__
    frames = list(traceback.extract_tb(error.__traceback__))
    frames = [frame for frame in frames if frame.name != "exit_with_one_line"] or frames
    ours = [frame for frame in frames if Path(frame.filename).parent == Path(__file__).parent]
    place = (ours or frames)[-1]
    return (
        f"{type(error).__name__}: {message} ({Path(place.filename).name}:{place.lineno});"
        " set GPT_XS_DEBUG=1 to see the traceback"
    )


def make_streams_safe() -> None:
    """Give closed standard streams to the null device, and let no character be an error."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:  # Python's way to say that it was closed when the process started
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - stays open
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if mode == "r" else "backslashreplace")


def discard_output() -> None:
    """Let what is buffered for a full or closed standard output go to the null device."""
    # Python would flush it at its end, fail again, and print that.
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def flush_output() -> None:
    """Flush standard output, or discard what cannot be written."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        discard_output()


@contextlib.contextmanager
def exit_with_one_line(remedy: str = "") -> Iterator[None]:
    """Turn any error into one line on standard error and an exit code.

    ``remedy`` says how to continue after a failure that was not the user's mistake, or Ctrl-C.
    """
    make_streams_safe()
    has_import_handler = signal.getsignal(signal.SIGINT) is _exit_interrupted
    if has_import_handler:  # from here on Ctrl-C raises, so that what is open can be closed
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
        sys.stdout.flush()  # here, where its failure is one line
    except SystemExit:
        flush_output()
        raise
    except GeneratorExit:
        raise
    except BrokenPipeError:
        # The reader of standard output, such as `head`, has what it wanted. Connections raise
        # errors of their libraries' own.
        discard_output()
    except BaseException as error:  # tiktoken's panics are no Exception
        _exit_for(error, remedy)
    finally:
        if has_import_handler:  # nor may Ctrl-C print a traceback while Python ends
            signal.signal(signal.SIGINT, _exit_interrupted)


def _exit_for(error: BaseException, remedy: str) -> None:
    """Print the line of an error and end the process, or raise SystemExit."""
    if os.environ.get("GPT_XS_DEBUG") == "1":
        traceback.print_exception(error)
    code = exit_code(error)
    message = describe(error)
    if remedy and code != 2:
        message += f"; {remedy}"
    # Whatever is wrong with the environment is what the message says already.
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        message += f" (rank {rank})"
    with contextlib.suppress(OSError, ValueError):
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    flush_output()
    if code == 130 or os.environ.get("WORLD_SIZE", "1") != "1":
        # At once, without Python's own clean-up: a thread may be waiting for the network. Among
        # several ranks NCCL would wait for those that will never come, and torchrun, which does
        # not see this process end, would not stop the others.
        os._exit(code)
    raise SystemExit(code) from None


def _exit_interrupted(number: int, frame: Any) -> None:
    """Ctrl-C while the libraries are imported: seconds in which no ``with`` block is entered."""
    os.write(2, f"{Path(sys.argv[0]).name}: interrupted\n".encode())
    os._exit(130)


# Only where one of these scripts is the program: a notebook that imports them keeps its handler.
# A SIGINT that is ignored, as in a shell's background job, stays ignored.
_program = getattr(sys.modules["__main__"], "__file__", None) or ""
_is_script = _program != "" and Path(_program).resolve().parent == Path(__file__).resolve().parent
if _is_script and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _exit_interrupted)
