"""Checkpoints of a run: saving, finding, verifying and loading them.

``LOG_DIR/step_005000/`` is a Hugging Face model plus ``training_state.pt`` and ``checksums.json``.
It is written under a temporary name, fsynced and renamed: a folder with its final name is complete.
The checksums detect a folder that was damaged later. Nothing that is loaded can run code: the
weights are safetensors, and the state is read with ``weights_only=True``. Training waits only until
``Writer`` has copied the run to host memory: a thread writes the copy.
"""

from common import first_line, fsync, read_json, require_regular_file

import json
import math
import re
import shutil
import signal
import sys
import time
import warnings
import zlib
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

import dataset
from model import GPT, is_finite, local_folder

STATE_FILE = "training_state.pt"
CHECKSUMS_FILE = "checksums.json"
# A resumed run must not change these: they determine the model and which tokens each step sees.
FIXED_SETTINGS = ("model", "batch_tokens", "seed", "shuffle", "data", "optimizer")
# Older versions lacked these settings: their runs behaved as if they had these values.
EARLIER_SETTINGS = {
    "optimizer": "adamw",
    "muon_lr_scale": 3.0,
    "schedule": "cosine",
    "cooldown": 0.4,
    "recompute": 0.0,
    "init_from": None,
}
# Not compared: how the process was started, and the digest of the initial weights, which a resumed
# run takes from its checkpoint.
IGNORED_SETTINGS = ("resume", "log_dir", "init_sha256")


@dataclass
class TrainingState:
    """What a run needs besides the weights to continue as if it had never stopped."""

    step: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    """Optimizer updates made so far."""
    optimizer: dict[str, Any]
    """The optimizer's state_dict."""
    rng: Tensor
    """State of torch's random number generator on the CPU."""
    settings: dict[str, Any]
    """The run's configuration, as in metrics.jsonl, and the fingerprint of its data."""
    best_val: float
    """Lowest validation loss so far."""
    skipped: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    """Updates skipped in a row because the gradient was not finite."""
    losses: list[float]
    """The most recent training losses, for the z-score."""
    scaler: dict[str, float | int] = field(default_factory=dict)
    """The state_dict of the loss scaler; empty but for fp16."""

    def state_dict(self) -> dict[str, Any]:
        """Plain data, by the names of the fields."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "TrainingState":
        """The inverse of ``state_dict``. Raises ValueError that names a part that is not valid."""
        if not isinstance(state, dict):
            raise ValueError(f"Expected `object`, got `{type(state).__name__}`")
        result = msgspec.convert(state, cls)  # checks the types of the fields; ValueError if not
        if math.isnan(result.best_val):
            raise ValueError("NaN - at `$.best_val`")
        try:
            json.dumps(result.settings)  # plain data that can be compared and shown
        except (TypeError, RecursionError) as error:
            raise ValueError(f"{first_line(error)} - at `$.settings`") from None
        try:
            torch.Generator().set_state(result.rng)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{first_line(error)} - at `$.rng`") from None
        if result.scaler:
            types = {name: type(value) for name, value in result.scaler.items()}
            known = torch.amp.GradScaler("cpu").state_dict()
            # All are positive but the count of steps since the scale has changed, which may be 0.
            positive = [value for name, value in result.scaler.items() if name != "_growth_tracker"]
            if types != {name: type(value) for name, value in known.items()} or not all(
                0 < value < 1e38 for value in positive
            ):
                raise ValueError("not the state of a loss scaler - at `$.scaler`")
        if not {"state", "param_groups"} <= set(result.optimizer):
            raise ValueError("not an optimizer's state - at `$.optimizer`")
        # An optimizer without its moments would silently take different steps.
        if result.step > 0 and not result.optimizer["state"]:
            raise ValueError("empty although updates were made - at `$.optimizer.state`")
        return result


class StopSignal:
    """SIGTERM, SIGINT, SIGUSR1 and SIGHUP ask for an orderly stop.

    A SIGINT after any of them raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.name = ""  # of the newest signal; empty until there is one
        for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows lacks the last two
            # nohup has SIGHUP ignored, so that a run survives the end of its terminal.
            ignored = name == "SIGHUP" and number and signal.getsignal(number) == signal.SIG_IGN
            if number and not ignored:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


# ---- finding -------------------------------------------------------------------------------------


def list_checkpoints(log_dir: Path) -> list[Path]:
    """The checkpoints in a log folder, newest first."""
    steps = {path: _step_of_name(path) for path in log_dir.glob("step_*")}
    found = [(step, path) for path, step in steps.items() if step is not None]
    return [path for _, path in sorted(found, reverse=True)]


def find_checkpoint(source: str | Path, check: bool = False) -> str | Path:
    """What ``GPT.from_pretrained`` reads for a checkpoint folder, a log folder or a hub id.

    Of a log folder that is its newest checkpoint, with ``check`` the newest whose model is not
    damaged; everything else is returned as it is. Raises FileNotFoundError for a folder that holds
    no model, and with ``check`` ValueError when a checkpoint, or all of a log folder, is damaged.
    """
    folder = Path(source)
    if (folder / "config.json").is_file():
        damage = verify(folder, model_only=True) if check else None
        if damage is not None:
            raise ValueError(f"{source}: damaged ({damage}); evaluations read it with --no-verify")
        return source
    if not folder.is_dir():  # a hub id
        return source
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise FileNotFoundError(f"{source}: no config.json and no step_* checkpoint in it")
    if not check:
        return checkpoints[0]
    valid = _newest_valid(checkpoints, model_only=True)
    if valid is None:
        raise ValueError(
            f"{source}: no valid checkpoint; evaluations read the newest with --no-verify"
        )
    return valid


def find_model(source: str, check: bool) -> Path:
    """The local folder of a checkpoint, of a log folder's newest or of a hub id.

    With ``check`` its files are compared with checksums.json, where there is one. Raises
    ValueError when they are damaged, FileNotFoundError when there is no model.
    """
    return local_folder(find_checkpoint(source, check))


def open_checkpoint(source: str, check: bool) -> GPT:
    """The model that ``find_model`` finds, on the CPU in fp32."""
    return GPT.from_pretrained(find_model(source, check))


def latest_valid(log_dir: Path) -> Path | None:
    """The newest checkpoint whose files match their checksums; damaged ones are reported.

    None when there are no checkpoints. Raises ValueError when all of them are damaged: starting
    from scratch beside them is the user's decision.
    """
    checkpoints = list_checkpoints(log_dir)
    valid = _newest_valid(checkpoints, model_only=False)
    if checkpoints and valid is None:
        raise ValueError(
            f"{log_dir}: no valid checkpoint; give a new --log-dir to start from scratch"
        )
    return valid


def _newest_valid(checkpoints: list[Path], model_only: bool) -> Path | None:
    """The first of the checkpoints that is not damaged; those before it are reported."""
    for folder in checkpoints:
        damage = verify(folder, model_only) or _misnamed(folder)
        if damage is None:
            return folder
        print(f"{folder}: damaged ({damage}); trying the one before", file=sys.stderr)
    return None


def verify(folder: Path, model_only: bool = False) -> str | None:
    """What is wrong with a checkpoint's files, or None when they match their checksums.

    With ``model_only`` the training state is not read, and a folder without checksums is valid: it
    may be a copy of the model, or another program's.
    """
    # A checksums.json that does not list these must not hide that they are missing.
    needed = {"model.safetensors", "config.json"}
    if not model_only:
        needed.add(STATE_FILE)
    elif not (folder / CHECKSUMS_FILE).exists():
        return None if (folder / "config.json").exists() else "no config.json"
    try:
        checksums = _read_checksums(folder)
        if not needed <= set(checksums):
            return f"{CHECKSUMS_FILE} does not list all files"
        for name, expected in checksums.items():
            if model_only and name == STATE_FILE:
                continue
            require_regular_file(folder / name)
            if _checksum(folder / name) != expected:
                return f"{name} does not match its checksum"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _read_checksums(folder: Path) -> dict[str, list[int]]:
    """Each file's size and CRC-32. Raises ValueError when a name leads out of the folder."""
    checksums = read_json(folder / CHECKSUMS_FILE, dict[str, list[int]])
    for name in checksums:
        if name in ("", ".", "..") or not set(name).isdisjoint("/\\\0"):
            raise ValueError(f"{CHECKSUMS_FILE} names {name!r}, which is not a file of this folder")
    return checksums


def _step_of_name(folder: Path) -> int | None:
    """The step in a checkpoint's name; None when it is not the name of one."""
    match = re.fullmatch(r"step_([0-9]+)", folder.name)
    return int(match[1]) if match else None


def _misnamed(folder: Path) -> str | None:
    """That a checkpoint's folder is named after another step, as a renamed or copied one is."""
    try:
        require_regular_file(folder / STATE_FILE)
        # With mmap the tensors are not read. What is wrong with the file is load_state's to say.
        step = _read_state(folder, mmap=True)["step"]
    except Exception:
        return None
    return f"it is of step {step}" if step != _step_of_name(folder) else None


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
    """Time that the thread took, including the deletion of old checkpoints."""


class Writer:
    """Writes the checkpoints of a run in a thread, one at a time, while training continues."""

    def __init__(self, log_dir: Path, keep: int) -> None:
        """Write to ``log_dir`` and keep only the newest ``keep`` checkpoints (0: all)."""
        self._log_dir = log_dir
        self._keep = keep
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[Saved] | None = None
        # The thread writes host copies of the weights and the optimizer's moments, since the next
        # step updates the originals in place. With AdamW they take 1.5 GB for 124M (2.5 GB if
        # pinned: torch rounds pinned allocations up to powers of two). Every save reuses them.
        self._copies: dict[str, Tensor] = {}
        self._model: GPT | None = None  # its parameters are the "model.*" entries of _copies

    def start(self, model: GPT, state: TrainingState) -> None:
        """Copy the run to host memory and start to write the copy.

        Collect the previous save with ``finished`` first: both use the same host buffers.
        Raises OSError when the run cannot be copied.
        """
        if self._pending is not None:
            raise RuntimeError("the previous checkpoint is still being written")
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
    # Loading would refuse a weight or moment that is not finite, and saving it could cost an older
    # checkpoint that is good.
    tensors = {"model": dict(model.named_parameters()), "optimizer": state.optimizer}
    for name, tensor in _tensors(tensors):
        if not is_finite(tensor):
            raise OSError(f"{final} was not written: {name} is not finite")
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
    shutil.rmtree(log_dir / f".partial_old_{final.name}", ignore_errors=True)
    if keep:
        _prune(log_dir, newest=final, keep=keep)
    return final


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts, with the path of their keys."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _tensors(entry, f"{name}.{key}" if name else str(key))
    elif isinstance(value, Tensor):
        yield name, value


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
        with suppress(OSError):  # the new checkpoint is complete, whatever becomes of this one
            # Renamed first, so that a half-deleted folder is never taken for a checkpoint.
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

    Raises ValueError when the file is not one, or contains anything but plain data. The optimizer's
    tensors are ``load_optimizer``'s to check.
    """
    path = folder / STATE_FILE
    remedy = f"delete {folder} to resume from the checkpoint before"
    try:
        require_regular_file(path)
        content = _read_state(folder)
    except MemoryError:
        raise  # says nothing about the file
    except Exception as error:  # torch's own message recommends weights_only=False
        raise ValueError(
            f"{path}: not a training state, or one that would run code when loaded; {remedy}"
        ) from error
    try:
        state = TrainingState.from_state_dict(content)
    except ValueError as error:
        raise ValueError(f"{path}: not a training state: {first_line(error)}; {remedy}") from None
    if _step_of_name(folder) not in (None, state.step):
        raise ValueError(
            f"{path}: of step {state.step}, not of the one in its folder's name; {remedy}"
        )
    return state


def _read_state(folder: Path, mmap: bool = False) -> Any:
    """What the file of the training state holds, on the CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an error is one line, without torch's warnings before it
        # weights_only: a state is plain data, and a pickle in its place must not run code.
        return torch.load(
            str(folder / STATE_FILE), map_location="cpu", weights_only=True, mmap=mmap
        )


def load_model(model: GPT, folder: Path) -> None:
    """Copy a checkpoint's weights into the parameters, which stay where they are.

    Raises ValueError when they are damaged or of another shape.
    """
    saved = GPT.from_pretrained(folder)
    if saved.config != model.config:
        raise ValueError(
            f"{folder}/config.json: the model is {saved.config}, not {model.config} as in"
            f" {STATE_FILE}; delete {folder} to resume from the checkpoint before"
        )
    model.load_state_dict(saved.state_dict())


def load_optimizer(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any], folder: Path = Path()
) -> None:
    """Load the moments of a saved optimizer; options such as weight decay stay as they are.

    Raises ValueError, and changes nothing, when a tensor does not fit its parameter: the fused
    kernel would read and write beyond it. ``folder`` is the checkpoint that the message names.
    """
    path = folder / STATE_FILE
    own = optimizer.state_dict()
    groups = state_dict.get("param_groups")
    states = state_dict.get("state")
    indices = [group["params"] for group in own["param_groups"]]
    if (
        not isinstance(groups, list)
        or not all(isinstance(group, dict) for group in groups)
        or [group.get("params") for group in groups] != indices
    ):
        raise ValueError(f"{path}: the optimizer's groups are not those of this model")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # Before the first update the state is empty.
    if not isinstance(states, dict) or (states and set(states) != set(range(len(parameters)))):
        raise ValueError(f"{path}: the optimizer's state is not that of this model")
    # Muon's groups are those without betas.
    muon = {i for group in own["param_groups"] if "betas" not in group for i in group["params"]}
    for index in states:
        names = {"momentum_buffer"} if index in muon else {"step", "exp_avg", "exp_avg_sq"}
        problem = _moments_problem(states[index], parameters[index], names)
        if problem:
            raise ValueError(f"{path}: optimizer.state[{index}]{problem}")
    # With the new options in place of those saved, an option that was changed takes effect.
    optimizer.load_state_dict({"state": states, "param_groups": own["param_groups"]})


def _moments_problem(state: object, parameter: Tensor, names: set[str]) -> str:
    """Why this cannot be the state of the parameter with these ``names``, or "" when it can."""
    if not isinstance(state, dict) or set(state) != names:
        return f" does not hold {', '.join(sorted(names))}"
    for name, value in state.items():
        shape = torch.Size() if name == "step" else parameter.shape
        dtype = torch.float32 if name == "step" else parameter.dtype
        if not isinstance(value, Tensor) or value.is_nested:  # which has no shape
            return f".{name} is not a tensor"
        if value.shape != shape or value.dtype != dtype:
            return (
                f".{name} is of shape {tuple(value.shape)} and {value.dtype}, its parameter of"
                f" {tuple(shape)} and {dtype}"
            )
        # A sparse or broadcast tensor holds less memory than its shape says.
        if value.layout != torch.strided or value.is_meta or not value.is_contiguous():
            return f".{name} is not a plain tensor"
        if not is_finite(value):
            return f".{name} is not finite"
        if name in ("step", "exp_avg_sq") and value.min() < 0:
            return f".{name} is negative"
    return ""


def compare_settings(saved: dict[str, Any], now: dict[str, Any], folder: Path) -> list[str]:
    """One message for each setting that differs from those of the checkpoint in ``folder``.

    Raises ValueError, with all of them, when some of these would make it another run.
    """
    changes = []
    refused = []
    saved = {**EARLIER_SETTINGS, **saved}
    for name, value in now.items():
        if name in IGNORED_SETTINGS or saved.get(name) == value:
            continue
        if name == "init_from" and value is None:  # a resumed run does not need its source
            continue
        # A damaged file may hold a value of any length.
        change = f"{name} was {' '.join(str(saved.get(name)).split())[:300]}, is now {value}"
        if name == "data":  # hundreds of names and sizes: no message could show them
            difference = _data_difference(saved.get(name), value)
            if difference:
                refused.append(f"the training shards are not the same ({difference})")
        elif name in FIXED_SETTINGS:
            refused.append(change)
        else:
            changes.append(change)
    if refused:
        raise ValueError(
            f"{folder} belongs to another run: {'; '.join(refused)};"
            " use the saved settings, or a new --log-dir"
        )
    return changes


def _data_difference(saved: Any, now: list[list[str | int]]) -> str:
    """How the shards of a checkpoint differ from those of today, or "" when they are the same.

    Both are lists of name, tokens and digest. A checkpoint of an older version lists the training
    shards only, and without the digest.
    """
    if not isinstance(saved, list) or not all(
        isinstance(entry, (list, tuple)) and len(entry) >= 2 for entry in saved
    ):
        return "the checkpoint does not list them"
    if all(len(entry) == 2 for entry in saved):
        now = [entry[:2] for entry in now if not re.search(r"_val_\d+\.npy$", str(entry[0]))]
    if len(saved) != len(now):
        return f"{len(saved)} then, {len(now)} now"
    for then, entry in zip(saved, now, strict=True):
        if list(then) != entry:
            return f"{entry[0]} has changed" if then[0] == entry[0] else f"{entry[0]} is new"
    return ""
