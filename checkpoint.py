"""Checkpoints of a run: saving, finding, verifying and loading them.

``LOG_DIR/step_005000/`` is a Hugging Face model plus ``training_state.pt`` and ``checksums.json``.
It is written under a temporary name, fsynced and renamed: a folder with its final name is complete.
The checksums detect a folder that was damaged later. Nothing that is loaded can run code: the
weights are safetensors, and the state is read with ``weights_only=True``. Training waits only until
``Writer`` has copied the run to host memory: a thread writes the copy.
"""

import json
import re
import shutil
import signal
import sys
import time
import warnings
import zlib
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dataset
from common import fsync
from model import GPT

STATE_FILE = "training_state.pt"
CHECKSUMS_FILE = "checksums.json"
# A resumed run must not change these: they determine the model and which tokens each step sees.
FIXED_SETTINGS = ("model", "batch_tokens", "seed", "shuffle", "data")
# These say how the process was started, not what it computes.
IGNORED_SETTINGS = ("resume", "log_dir")


@dataclass
class TrainingState:
    """What a run needs besides the weights to continue as if it had never stopped."""

    step: int
    """Optimizer updates made so far."""
    optimizer: dict[str, Any]
    """The optimizer's state_dict."""
    rng: Tensor
    """State of torch's random number generator on the CPU."""
    settings: dict[str, Any]
    """The run's configuration, as in metrics.jsonl, and the fingerprint of its data."""
    best_val: float
    """Lowest validation loss so far."""
    skipped: int
    """Updates skipped in a row because the gradient was not finite."""
    losses: list[float]
    """The most recent training losses, for the z-score."""

    def state_dict(self) -> dict[str, Any]:
        """Plain data, by the names of the fields."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "TrainingState":
        """The inverse of ``state_dict``. Raises KeyError when a field is missing."""
        return cls(**{field.name: state[field.name] for field in fields(cls)})


class StopSignal:
    """SIGTERM, SIGINT, SIGUSR1 and SIGHUP ask for an orderly stop.

    A SIGINT after any of them raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.name = ""  # of the signal that was received
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            # nohup has SIGHUP ignored, so that a run survives the end of its terminal.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


# ---- finding -------------------------------------------------------------------------------------


def list_checkpoints(log_dir: Path) -> list[Path]:
    """The checkpoints in a log folder, newest first."""
    found = [path for path in log_dir.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def find_checkpoint(source: str | Path) -> str | Path:
    """What ``GPT.from_pretrained`` reads for a checkpoint folder, a log folder or a hub id.

    Of a log folder that is its newest checkpoint; everything else is returned as it is. Raises
    FileNotFoundError for a folder that holds no model.
    """
    folder = Path(source)
    if not folder.is_dir() or (folder / "config.json").is_file():
        return source
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise FileNotFoundError(f"{source}: no config.json and no step_* checkpoint in it")
    return checkpoints[0]


def latest_valid(log_dir: Path) -> Path | None:
    """The newest checkpoint whose files match their checksums; damaged ones are reported.

    None when there are no checkpoints. Raises ValueError when all of them are damaged: starting
    from scratch beside them is the user's decision.
    """
    checkpoints = list_checkpoints(log_dir)
    for folder in checkpoints:
        damage = verify(folder)
        if damage is None:
            return folder
        print(f"{folder}: damaged ({damage}); trying the one before", file=sys.stderr)
    if checkpoints:
        raise ValueError(
            f"{log_dir}: no valid checkpoint; give a new --log-dir to start from scratch"
        )
    return None


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None when they match their checksums."""
    try:
        checksums = json.loads((folder / CHECKSUMS_FILE).read_text(encoding="utf-8"))
        if not isinstance(checksums, dict):
            return f"{CHECKSUMS_FILE} is not a JSON object"
        # An incomplete list would let a folder without weights pass.
        if not {STATE_FILE, "model.safetensors", "config.json"} <= set(checksums):
            return f"{CHECKSUMS_FILE} does not list all files"
        for name, expected in checksums.items():
            if _checksum(folder / name) != expected:
                return f"{name} does not match its checksum"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def contains_run(log_dir: Path) -> bool:
    """Whether a run has written metrics or checkpoints to this folder."""
    metrics = log_dir / "metrics.jsonl"
    return bool(list_checkpoints(log_dir)) or (metrics.exists() and metrics.stat().st_size > 0)


# ---- saving --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete."""

    step: int
    folder: Path
    seconds: float
    """Time that the thread took, with the deletion of old checkpoints."""


class Writer:
    """Writes the checkpoints of a run in a thread, one at a time, while training continues."""

    def __init__(self, log_dir: Path, keep: int) -> None:
        """Write to ``log_dir`` and keep only the newest ``keep`` checkpoints (0: all)."""
        self._log_dir = log_dir
        self._keep = keep
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[Saved] | None = None
        # The thread writes host copies of the weights and AdamW's moments, since the next step
        # updates the originals in place. They take 1.5 GB for 124M (2.5 GB if pinned: torch rounds
        # pinned allocations up to powers of two) and are reused by every save.
        self._copies: dict[str, Tensor] = {}
        self._model: GPT | None = None  # its parameters are the "model.*" entries of _copies

    def start(self, model: GPT, state: TrainingState) -> None:
        """Copy the run to host memory and start to write the copy.

        Collect the previous save with ``finished`` first: both use the same host buffers.
        Raises OSError when the run cannot be copied.
        """
        if self._pending is not None:
            raise RuntimeError("the checkpoint before is still being written")
        try:
            weights = self._copy("model", model.transformer.state_dict())
            optimizer = self._copy("optimizer", state.optimizer)
            if model.lm_head.weight.is_cuda:
                torch.cuda.synchronize(model.lm_head.weight.device)  # the copies were only queued
        except (RuntimeError, MemoryError) as error:
            name = f"step_{state.step:06d}"
            raise OSError(f"{self._log_dir / name} could not be copied: {error}") from error
        if self._model is None:
            # Once is enough: assign=True makes the copies its parameters, so later saves, which
            # overwrite the copies, also update this model.
            with torch.device("meta"):  # allocates no weights
                self._model = GPT(model.config)
            self._model.transformer.load_state_dict(weights, assign=True)
            self._model.lm_head.weight = self._model.transformer.wte.weight
        state_copy = replace(state, optimizer=optimizer, rng=state.rng.clone())
        self._pending = self._thread.submit(self._write, self._model, state_copy)

    def finished(self, wait: bool = False) -> Saved | None:
        """The result of the pending save, once. With ``wait`` it blocks until the save has ended.

        None if it is still being written or there is none. Raises OSError if the save failed.
        """
        pending = self._pending
        if pending is None or not (wait or pending.done()):
            return None
        futures.wait([pending])  # if a signal's handler raises here, _pending is still set
        self._pending = None
        return pending.result()

    def _copy(self, name: str, value: Any) -> Any:
        """Copy the tensors of nested dicts to host buffers; ``name`` is the buffer's key.

        Anything else is returned as it is, lists included: they must not hold tensors.
        """
        if isinstance(value, dict):
            return {key: self._copy(f"{name}.{key}", entry) for key, entry in value.items()}
        if not isinstance(value, Tensor):
            return value
        if name not in self._copies:
            self._copies[name] = _host_memory(value)
        return self._copies[name].copy_(value, non_blocking=value.is_cuda)

    def _write(self, model: GPT, state: TrainingState) -> Saved:
        start = time.perf_counter()
        folder = save(self._log_dir, model, state, self._keep)
        return Saved(state.step, folder, time.perf_counter() - start)


def _host_memory(tensor: Tensor) -> Tensor:
    """A tensor like this one in host memory, pinned for one on a GPU."""
    try:
        # A GPU copies to pinned memory several times faster than to memory that may be swapped out.
        return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    except RuntimeError:  # the system pins no more
        return torch.empty_like(tensor, device="cpu")


def save(log_dir: Path, model: GPT, state: TrainingState, keep: int) -> Path:
    """Write the checkpoint of ``state.step``, then delete old ones but for ``keep`` (0: keep all).

    Raises OSError on failure. If writing the files failed, nothing of them is left and no old
    checkpoint was deleted.
    """
    final = log_dir / f"step_{state.step:06d}"
    partial = log_dir / f".partial_{final.name}"
    for stale in log_dir.glob(".partial_*"):  # left by a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    try:
        # In this order the process may be killed at any moment: first complete files, then their
        # name, and only then fewer old checkpoints.
        partial.mkdir()
        _write_files(partial, model, state)
        if final.exists():  # a damaged earlier attempt: moved aside, never half deleted in place
            final.rename(log_dir / f".partial_old_{final.name}")
        partial.rename(final)
        fsync(log_dir)
    except Exception as error:  # torch and safetensors report a full disk with their own classes
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{final} could not be written: {error}") from error
    if keep:
        _prune(log_dir, newest=final, keep=keep)
    return final


def _write_files(folder: Path, model: GPT, state: TrainingState) -> None:
    """Write all files of a checkpoint and their checksums, and wait until they are on the disk."""
    checksums: dict[str, list[int]] = {}
    # Threads: torch, safetensors, fsync and the checksums all run without Python's lock. The 1.5 GB
    # of a 124M checkpoint are written at the speed of the disk, and training is not held up.
    with ThreadPoolExecutor() as pool:

        def finish(file: Path) -> tuple[str, Future[None], Future[list[int]]]:
            # The checksum is read from the page cache while the disk is busy with the fsync.
            return file.name, pool.submit(fsync, file), pool.submit(_checksum, file)

        state_written = pool.submit(torch.save, state.state_dict(), folder / STATE_FILE)
        model.save_pretrained(folder)
        dataset.save_tokenizer(folder, context_length=model.config.context_length)
        model_files = [path for path in sorted(folder.iterdir()) if path.name != STATE_FILE]
        finishing = [finish(path) for path in model_files]
        state_written.result()
        finishing.append(finish(folder / STATE_FILE))
        for name, synced, checksum in finishing:
            synced.result()
            checksums[name] = checksum.result()
    (folder / CHECKSUMS_FILE).write_text(json.dumps(checksums, indent=2), encoding="utf-8")
    fsync(folder / CHECKSUMS_FILE)
    fsync(folder)


def _prune(log_dir: Path, newest: Path, keep: int) -> None:
    """Delete all but ``keep`` checkpoints, counted from ``newest`` backwards.

    Checkpoints of later steps are not counted: this run would have resumed from them if they had
    not been damaged.
    """
    checkpoints = list_checkpoints(log_dir)
    for old in checkpoints[checkpoints.index(newest) + keep :]:
        # Under its new name a folder that is half deleted is not taken for a checkpoint.
        doomed = old.rename(log_dir / f".partial_{old.name}")
        shutil.rmtree(doomed, ignore_errors=True)


def _checksum(path: Path) -> list[int]:
    """Size in bytes and CRC-32: against decay and truncation, not against an attacker."""
    # zlib's CRC runs at gigabytes a second; SHA-256 would take longer than the write.
    crc = 0
    size = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
            size += len(block)
    return [size, crc]


# ---- resuming ------------------------------------------------------------------------------------


def load_state(folder: Path) -> TrainingState:
    """A checkpoint's training state, on the CPU.

    Raises ValueError when the file is not one, or contains anything but plain data.
    """
    try:
        # weights_only: a state is plain data, and a pickle in its place must not run code.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        return TrainingState.from_state_dict(state)
    except Exception as error:  # torch's own message recommends weights_only=False
        raise ValueError(
            f"{folder / STATE_FILE}: not a training state, or one that would run code when loaded;"
            f" delete {folder} to resume from the checkpoint before"
        ) from error


def compare_settings(saved: dict[str, Any], now: dict[str, Any], folder: Path) -> list[str]:
    """One message for each setting that differs from those of the checkpoint in ``folder``.

    Raises ValueError, with all of them, when some of these would make it another run.
    """
    changes = []
    refused = []
    for name, value in now.items():
        if name in IGNORED_SETTINGS or saved.get(name) == value:
            continue
        if name == "data":  # hundreds of names and sizes: no message could show them
            refused.append("the training shards are not the same")
        elif name in FIXED_SETTINGS:
            refused.append(f"{name} was {saved.get(name)}, is now {value}")
        else:
            changes.append(f"{name} was {saved.get(name)}, is now {value}")
    if refused:
        raise ValueError(
            f"{folder} belongs to another run: {'; '.join(refused)};"
            " use the saved settings, or a new --log-dir"
        )
    return changes
