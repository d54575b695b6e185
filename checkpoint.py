"""Stopping, saving and resuming: the one room that train.py hands over.

``LOG_DIR/step_005000/`` is a Hugging Face model plus ``training_state.pt`` and ``checksums.json``.
It is written under a temporary name, fsynced and renamed, so a folder with its final name is
whole; the checksums tell a folder that was damaged later. Nothing that is loaded can run code:
the weights are safetensors, the state is read with ``weights_only=True``.
"""

import fcntl
import json
import os
import shutil
import signal
import sys
import warnings
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from typing import IO, Any

import torch
from torch.utils.serialization import config

from model import GPT, checkpoints

STATE, CHECKSUMS = "training_state.pt", "checksums.json"
KEYS = ("step", "optimizer", "rng", "settings", "best_val", "skipped", "losses")
# Changing one of these makes another run: other tokens in a step, or another model.
FIXED = ("model", "batch_tokens", "seed", "shuffle", "data")


def lock(log_dir: Path) -> IO[str]:
    """Takes the log folder for this process, until it ends however it ends (``fcntl.flock``).

    Raises ValueError when another run writes there, or the folder cannot be written.
    """
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        file = open(log_dir / ".lock", "w")  # noqa: SIM115 - held until the process ends
    except OSError as error:
        raise ValueError(f"{log_dir}: cannot write there ({error}); give a --log-dir") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"{log_dir}: another run is writing there; wait for it or give another --log-dir"
        ) from None
    return file


class StopSignal:
    """SIGTERM, SIGINT, SIGUSR1 and SIGHUP ask for an orderly stop; a second SIGINT ends at once."""

    def __init__(self) -> None:
        self.name = ""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


def save(log_dir: Path, step: int, model: GPT, state: dict[str, Any], keep: int) -> Path:
    """Writes the checkpoint of ``step`` and prunes those before it, but for ``keep`` in all.

    Raises OSError when it cannot be written; then nothing of it stays and nothing is pruned.
    """
    final = log_dir / f"step_{step:06d}"
    partial = log_dir / f".partial_{final.name}"
    for stale in log_dir.glob(".partial_*"):  # of a process killed while it saved or pruned
        shutil.rmtree(stale, ignore_errors=True)
    try:
        partial.mkdir()
        # torch's own CRC would be a second one, for a seventh of its time.
        with ThreadPoolExecutor() as pool, config.patch("save.compute_crc32", False):
            writing = pool.submit(torch.save, state, partial / STATE)
            model.save_pretrained(partial)

            def settle(file: Path) -> tuple[str, Future[None], Future[list[int]]]:
                # The checksum is read from the page cache while the disk is busy with the fsync.
                return file.name, pool.submit(_fsync, file), pool.submit(_checksum, file)

            settled = [settle(f) for f in sorted(partial.iterdir()) if f.name != STATE]
            writing.result()
            sums = {}
            for name, synced, checksum in [*settled, settle(partial / STATE)]:
                synced.result()
                sums[name] = checksum.result()
        (partial / CHECKSUMS).write_text(json.dumps(sums, indent=2))
        _fsync(partial / CHECKSUMS)
        _fsync(partial)
        shutil.rmtree(final, ignore_errors=True)  # of an earlier, damaged or longer, attempt
        partial.rename(final)
        _fsync(log_dir)
    except Exception as error:  # torch and safetensors report a full disk with their own classes
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{final} could not be written: {error}") from error
    # Those of later steps are damaged, or this run would have gone on from them: they do not count.
    known = checkpoints(log_dir)
    for old in known[known.index(final) + keep :] if keep else []:
        # To delete gigabytes can take as long as to write them. Training does not wait for it.
        gone = old.rename(log_dir / f".partial_{old.name}")
        Thread(target=shutil.rmtree, args=(gone, True)).start()
    return final


def holds_run(log_dir: Path) -> bool:
    """Whether a run has written metrics or checkpoints there."""
    metrics = log_dir / "metrics.jsonl"
    return bool(checkpoints(log_dir)) or (metrics.exists() and metrics.stat().st_size > 0)


def newest_whole(log_dir: Path) -> Path | None:
    """The newest checkpoint whose files match their checksums; the damaged ones are reported.

    None where there are no checkpoints. Raises ValueError where all are damaged: to start anew
    beside them is for the user to decide.
    """
    found = checkpoints(log_dir)
    for folder in found:
        damage = find_damage(folder)
        if damage is None:
            return folder
        print(f"{folder}: damaged ({damage}); trying the one before", file=sys.stderr)
    if found:
        raise ValueError(f"{log_dir}: no checkpoint is whole; give a new --log-dir to start anew")
    return None


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text())
        if not {STATE, "model.safetensors", "config.json"} <= set(sums):
            return f"{CHECKSUMS} does not name all files"
        for name, expected in sums.items():
            if _checksum(folder / name) != expected:
                return f"{name} is not what was written"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def load_state(folder: Path) -> dict[str, Any]:
    """The training state, on the CPU. Raises ValueError when it holds more than plain data."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        return {key: state[key] for key in KEYS}
    except Exception as error:  # torch's own text recommends to load it unsafely
        raise ValueError(
            f"{folder / STATE}: not a training state, or one that would run code when loaded;"
            f" remove {folder} to go on from the checkpoint before"
        ) from error


def compare_settings(saved: dict[str, Any], now: dict[str, Any], folder: Path) -> list[str]:
    """Lines that say which settings differ from the run that is resumed.

    Raises ValueError for those that would make it another run.
    """
    differ = [k for k in now if k not in ("resume", "log_dir") and saved.get(k) != now[k]]
    refused = [k for k in differ if k in FIXED]
    if refused:
        changes = "; ".join(f"{k} was {saved.get(k)}, is {now[k]}" for k in refused if k != "data")
        data = "the training shards are not the same" if "data" in refused else ""
        raise ValueError(
            f"{folder}: this is another run: {'; '.join(filter(None, (changes, data)))};"
            " use the saved settings, or a new --log-dir"
        )
    return [f"{k} was {saved.get(k)}, is now {now[k]}" for k in differ]


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(path: Path) -> list[int]:
    """Size in bytes and CRC-32: against decay and truncation, not against an attacker."""
    crc, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return [size, crc]
