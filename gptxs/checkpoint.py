"""Checkpoints of a run: saving, finding, verifying and loading them.

``LOG_DIR/step_005000/`` is a Hugging Face model plus ``training_state.pt`` and ``checksums.json``.
It is written under a temporary name, fsynced and renamed: a folder with its final name is complete.
Nothing that is loaded can run code. Training waits only for the copy of the run to host memory.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
import zlib
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gptxs.cli import first_line
from gptxs.files import fsync
from gptxs.hf import write_model
from gptxs.hub import local_folder

Weights = dict[str, Tensor]  # the model's parameters by name, the tied head once
Shape = dict[str, int]  # the fields of GPTConfig

STATE_FILE = "training_state.pt"
CHECKSUMS_FILE = "checksums.json"
# A resumed run must not change these: its model, where that began, and what tokens each step sees.
FIXED_SETTINGS = ("model", "init_from", "batch_tokens", "seed", "shuffle", "data", "optimizer")
# Not compared: how the process was started, and the digest of the initial weights, which a resumed
# run takes from its checkpoint.
IGNORED_SETTINGS = ("resume", "log_dir", "init_sha256")


@dataclass
class TrainingState:
    """What a run needs besides the weights to continue as if it had never stopped."""

    progress: dict[str, Any]  # the step, and what else train.py counts
    settings: dict[str, Any]  # the configuration, as in metrics.jsonl, and the data's fingerprint
    optimizer: dict[str, Any]  # the optimizer's state_dict
    scaler: dict[str, Any]  # the loss scaler's, empty but for fp16


def list_checkpoints(log_dir: Path) -> list[Path]:
    """The checkpoints in a log folder, newest first."""
    folders = [path for path in log_dir.glob("step_*") if path.is_dir()]
    return sorted([path for path in folders if path.name[5:].isdecimal()], key=_step, reverse=True)


def folder_name(step: int) -> str:
    return f"step_{step:06d}"


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def contains_run(log_dir: Path) -> bool:
    """Whether a run has written metrics or checkpoints to this folder."""
    return bool(list_checkpoints(log_dir)) or (log_dir / "metrics.jsonl").exists()


def latest_valid(log_dir: Path, model_only: bool = False) -> Path | None:
    """The newest checkpoint that ``verify`` accepts; damaged ones are reported on stderr.

    None when there are no checkpoints. Raises ValueError when all of them are damaged: starting
    from scratch beside them is the user's decision.
    """
    damaged: list[Path] = []
    # Listed anew each time: a run may prune one and write another while it is verified.
    while folders := [path for path in list_checkpoints(log_dir) if path not in damaged]:
        try:
            verify(folders[0], model_only)
            return folders[0]
        except (OSError, ValueError) as error:
            if folders[0].exists():  # otherwise a run has pruned it meanwhile
                print(f"{folders[0]}: damaged ({error}); trying the one before", file=sys.stderr)
                damaged.append(folders[0])
    if damaged:
        raise ValueError(f"{log_dir}: no valid checkpoint; give another folder to start anew")
    return None


def find_checkpoint(source: str, check: bool = True) -> Path:
    """The folder of a model: a checkpoint, the newest one of a log folder, or a hub id's copy.

    With ``check`` the files are held against their checksums, where there are any. Raises
    FileNotFoundError where there is no model, ValueError when it, or all of a log, is damaged.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir() or (folder / "config.json").is_file():
        if check and folder.is_dir():
            verify(folder, model_only=True)
        return local_folder(source)
    newest = latest_valid(folder, True) if check else next(iter(list_checkpoints(folder)), None)
    if newest is None:
        raise FileNotFoundError(f"{source}: no config.json and no step_* checkpoint in it")
    return newest


def verify(folder: Path, model_only: bool = False) -> None:
    """Raise ValueError, or OSError, when a checkpoint's files do not match their checksums.

    With ``model_only`` the training state is not read, and a folder without checksums is valid: it
    may be a copy of the model, or another program's.
    """
    path = folder / CHECKSUMS_FILE
    if model_only and not path.exists() and (folder / "config.json").exists():
        return
    try:
        checksums = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        raise ValueError(f"{path} holds no checksums") from None
    # A file that the checksums do not list must not pass unseen when it is missing.
    for name in {STATE_FILE, "model.safetensors", "config.json", *checksums}:
        if model_only and name == STATE_FILE:
            continue
        if checksums.get(name) != _checksum(folder / name):
            remedy = "use another checkpoint, or evaluate it with --no-verify"
            raise ValueError(f"{folder / name} does not match its checksum; {remedy}")


def _checksum(path: Path) -> list[int]:
    """Size in bytes and CRC-32: against decay and truncation, not against an attacker."""
    # zlib's CRC runs at gigabytes a second; SHA-256 would take longer than the write.
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
        return [file.tell(), crc]


@dataclass
class Writer:
    """Writes the checkpoints of a run in a thread, one at a time, while training continues."""

    log_dir: Path
    keep: int  # only so many of the newest checkpoints; 0: all
    # Given "checkpoint", the step and the figures of each that is complete.
    report: Callable[[str, int, dict[str, Any]], None]
    warn: Callable[[str], None]  # given a line for each that failed: a full disk ends no run
    saved_step: int | None = None  # of the newest complete checkpoint
    problem: str = ""  # of the newest that failed

    def __post_init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[float] | None = None
        self._pending_step = 0
        self._pause = 0.0  # seconds that training waited for it
        # The next step updates the weights and moments in place, so the thread writes host copies:
        # 1.5 GB for 124M and AdamW, 2.5 GB if pinned, which torch rounds up to powers of two.
        self._copies: dict[str, Tensor] = {}

    def start(self, weights: Weights, shape: Shape, state: TrainingState) -> None:
        """Copy the run to host memory and start to write the copy, after the previous save."""
        start = time.perf_counter()
        self.collect(wait=True)  # both use the same host buffers
        weights = self._copy("model", weights)
        optimizer = self._copy("optimizer", state.optimizer)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the copies were only queued
        state = replace(state, optimizer=optimizer)
        self._pending_step = state.progress["step"]
        self._pause = time.perf_counter() - start
        self._pending = self._thread.submit(save, self.log_dir, weights, shape, state, self.keep)

    def collect(self, wait: bool = False) -> None:
        """Report the pending save if it has ended; with ``wait``, wait until it has."""
        pending = self._pending
        if pending is None or not (wait or pending.done()):
            return
        futures.wait([pending])  # if a signal's handler raises here, _pending is still set
        self._pending = None
        try:
            figures = {"seconds": self._pause, "write_seconds": pending.result()}
        except OSError as error:
            self.problem = first_line(error)
            self.warn(f"checkpoint not saved: {self.problem}")
            return
        self.saved_step = self._pending_step
        path = folder_name(self.saved_step)
        self.report("checkpoint", self.saved_step, {"path": path, **figures})

    def _copy(self, name: str, value: Any) -> Any:
        """Nested dicts, their tensors copied to host buffers; ``name`` is a buffer's key."""
        if isinstance(value, dict):
            return {key: self._copy(f"{name}.{key}", entry) for key, entry in value.items()}
        if not isinstance(value, Tensor):
            return value
        if name not in self._copies:
            # A GPU copies to pinned memory several times faster than to memory that may be swapped.
            self._copies[name] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return self._copies[name].copy_(value.detach(), non_blocking=value.is_cuda)


def save(log_dir: Path, weights: Weights, shape: Shape, state: TrainingState, keep: int) -> float:
    """Write the checkpoint of a step, then delete old ones but for ``keep`` (0: keep all).

    Returns the seconds that it took. Raises OSError on failure. If writing the files failed,
    nothing of them is left and no old checkpoint was deleted.
    """
    start = time.perf_counter()
    step = state.progress["step"]
    final = log_dir / folder_name(step)
    partial = log_dir / f".partial_{final.name}"
    try:
        _require_finite(weights, state)
        # In this order the process may be killed at any moment: first complete files, then their
        # name, and only then fewer old checkpoints.
        _remove_partial(log_dir)
        partial.mkdir(parents=True)  # the user may have moved the log folder
        _write_files(partial, weights, shape, state)
        if final.exists():  # a damaged one: moved aside, never half deleted in place
            final.rename(log_dir / f".partial_old_{final.name}")
        partial.rename(final)
        fsync(log_dir)
        # Later steps do not count: they are damaged, or this run would have resumed from them.
        older = [path for path in list_checkpoints(log_dir) if _step(path) < step]
        for old in older[keep - 1 :] if keep else []:
            with suppress(OSError):  # the user may move or lock any of them at any time
                old.rename(log_dir / f".partial_{old.name}")
    except Exception as error:  # torch and safetensors report a full disk with their own classes
        raise OSError(f"{final} could not be written: {error}") from error
    finally:
        _remove_partial(log_dir)
    return time.perf_counter() - start


def _remove_partial(log_dir: Path) -> None:
    for path in log_dir.glob(".partial_*"):  # also of a process that was killed
        shutil.rmtree(path, ignore_errors=True)


def _require_finite(weights: Weights, state: TrainingState) -> None:
    """Raise OSError for what no run could go on from, and what might cost an older checkpoint."""
    tensors = dict(weights)
    for index, moments in state.optimizer["state"].items():
        tensors.update({f"optimizer.state[{index}].{name}": moments[name] for name in moments})
    for name, tensor in tensors.items():
        low, high = torch.aminmax(tensor.detach())  # NaN passes through both
        if not (math.isfinite(low) and math.isfinite(high)):
            raise OSError(f"{name} is not finite")


def _write_files(folder: Path, weights: Weights, shape: Shape, state: TrainingState) -> None:
    """Write all files of a checkpoint and their checksums, and wait until they are on the disk."""
    # torch, safetensors, fsync and the checksums all run without Python's lock.
    with ThreadPoolExecutor() as pool:
        state_written = pool.submit(torch.save, vars(state), folder / STATE_FILE)
        write_model(folder, weights, shape)
        state_written.result()
        files = sorted(folder.iterdir())
        synced = pool.map(fsync, files)
        sums = pool.map(_checksum, files)  # from the page cache, while the disk is busy
        checksums = {file.name: checksum for file, checksum in zip(files, sums, strict=True)}
        list(synced)  # raises what one of them has raised
    path = folder / CHECKSUMS_FILE
    path.write_text(json.dumps(checksums, indent=2), encoding="utf-8")
    fsync(path)
    fsync(folder)


def load_state(folder: Path) -> TrainingState:
    """A checkpoint's training state, on the CPU. Raises ValueError when it is not one."""
    path = folder / STATE_FILE
    try:
        # weights_only: a state is plain data, and a pickle in its place must not run code.
        return TrainingState(**torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        remedy = "the log folder must be on a disk that all machines of a run share"
        raise FileNotFoundError(f"{path}: not there on this machine; {remedy}") from None
    except Exception as error:  # torch's own message recommends weights_only=False
        raise ValueError(f"{path}: not a training state, or one that would run code") from error


def load_optimizer(optimizer: Optimizer, state_dict: dict[str, Any], folder: Path) -> None:
    """Load the moments of a saved optimizer; options such as weight decay stay as they are.

    Raises ValueError, and changes nothing, when a tensor does not have its parameter's shape: the
    fused kernel would read and write beyond it.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {}
    for index, moments in state_dict["state"].items():
        # Interned names, as those of a run that was never stopped: its pickle has the same bytes.
        state[index] = {sys.intern(name): moment for name, moment in moments.items()}
        for name, moment in moments.items():
            expected = torch.Size() if name == "step" else parameters[index].shape
            if moment.shape != expected:
                raise ValueError(f"{folder}: {name} of parameter {index} is not of its shape")
    # With the new options in place of those saved, an option that was changed takes effect.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def compare_settings(saved: dict[str, Any], now: dict[str, Any], folder: Path) -> list[str]:
    """A note for each setting that differs from those of the checkpoint in ``folder``.

    Raises ValueError, with all of them, when some of these would make it another run.
    """
    changes: list[str] = []
    refused: list[str] = []
    for name, value in now.items():
        without_source = name == "init_from" and value is None  # which a resumed run may be
        if name in IGNORED_SETTINGS or saved.get(name) == value or without_source:
            continue
        change = f"{name} was {saved.get(name)}, is now {value}"
        if name == "data":  # hundreds of shards: no message could show them
            change = f"the shards are not the same ({_data_difference(saved[name], value)})"
        if name in FIXED_SETTINGS:
            refused.append(change)
        else:
            changes.append(f"resuming with another setting: {change}")
    if refused:
        remedy = "use the saved settings, or a new --log-dir"
        raise ValueError(f"{folder} belongs to another run: {'; '.join(refused)}; {remedy}")
    return changes


def _data_difference(saved: list[list[Any]], now: list[list[Any]]) -> str:
    """How shards, each a name, its tokens and a digest, differ from those of the checkpoint."""
    for then, entry in zip(saved, now, strict=False):
        if then != entry:
            return f"{entry[0]} has changed" if then[0] == entry[0] else f"{entry[0]} is new"
    return f"{len(saved)} then, {len(now)} now"
