"""What a run tells: metrics.jsonl, the console, TensorBoard and Weights & Biases.

Kept out of train.py so that the loop there reads as its chores. One process, rank 0, writes; a
full disk or a tracker that fails is reported once and never ends a run.
"""

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

# Dense bf16 peaks in TFLOP/s, from the vendors' data sheets; the first name that fits counts.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.05,
    "A10G": 70.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU; None for one that is not in the table."""
    return next((peak * 1e12 for name, peak in PEAK_TFLOPS.items() if name in device_name), None)


def device_name(device: torch.device) -> str:
    """The model of the GPU or processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_memory_gb(device: torch.device) -> float:
    """Most memory ever in use: the GPU's as torch counts it, or this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes; on a Mac bytes
    return peak / (1e9 if sys.platform == "darwin" else 1e6)


def provenance() -> dict[str, Any]:
    """The versions and the commit that a run was made with."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"numpy": np.__version__, "cuda": torch.version.cuda}
    return {"versions": versions, "git_commit": commit}


class TensorBoard:
    """Numbers as scalars, in ``tensorboard/`` of the log folder."""

    def __init__(self, log_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(log_dir / "tensorboard", flush_secs=10)

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()


def trackers(log_dir: Path, config: dict[str, Any], tensorboard: bool, wandb: bool) -> list[Any]:
    """Objects with wandb's ``log(numbers, step)`` and ``finish()`` that also get the numbers.

    Raises ValueError where wandb cannot start, which is mostly a login that is missing.
    """
    found: list[Any] = [TensorBoard(log_dir)] if tensorboard else []
    if wandb:
        import wandb as package

        try:
            found.append(package.init(project="gpt-xs", dir=log_dir, config=config))
        except package.Error as error:
            remedy = "run `wandb login`, or set WANDB_MODE=offline"
            raise ValueError(f"--wandb: {first_line(error)}; {remedy}") from error
    return found


def first_line(error: Exception) -> str:
    """An exception in one line: the first of its text, or its class where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


class Metrics:
    """Where a run's numbers go. Only an ``enabled`` one, rank 0's, writes and speaks."""

    def __init__(self, log_dir: Path, enabled: bool) -> None:
        self.path, self.enabled, self.failing = log_dir / "metrics.jsonl", enabled, False
        self.trackers: list[Any] = []
        self.live = enabled and sys.stdout.isatty()
        self.durations: deque[float] = deque(maxlen=100)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Appends a line to metrics.jsonl and tells the trackers its numbers."""
        if not self.enabled:
            return
        row = {"kind": kind, "step": step, "time": time.time(), **values}
        # JSON has no NaN: what is not finite, in the settings too, becomes null.
        row = json.loads(json.dumps(row), parse_constant=lambda _: None)
        line = json.dumps(row) + "\n"
        try:
            with self.path.open("a+b") as file:
                # A process that was killed, or a full disk, may have left half a line.
                if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                    line = "\n" + line
                file.write(line.encode())
            self.failing = False
        except OSError as error:
            if not self.failing:
                self.say(f"{self.path}: {error}; training goes on without these metrics")
            self.failing = True
        numbers = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
        self._track("log", numbers, step=step)

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        if self.enabled:
            self._print(f"\r\x1b[K{text}\n" if self.live else text + "\n")

    def train_step(self, step: int, max_steps: int, **values: Any) -> None:
        """Writes a step and prints it: a line in a file, on a terminal one that changes."""
        self.write("train", step, **values)
        self.durations.append(values["ms"] / 1e3)
        # The median: the first step compiles, and others may wait for a disk.
        left = timedelta(seconds=round(median(self.durations) * (max_steps - step - 1)))
        v = values
        mfu = f" | mfu {v['mfu']:.1%}" if v["mfu"] else ""
        text = (
            f"step {step:5d}/{max_steps} | loss {v['loss']:7.4f} ({v['z']:+5.2f}z)"
            f" | norm {v['grad_norm']:7.4f} | lr {v['lr']:.2e} | {v['ms']:7.1f} ms"
            f" | {v['tokens_per_s']:9,.0f} tok/s{mfu} | {v['memory_gb']:.1f} GB | {left} left"
        )
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            bar = "█" * round(10 * (step + 1) / max_steps)
            self._print(f"\r\x1b[K{f'{bar:░<10} {text}'[:width]}")
        else:
            self.say(text)
        if values.get("skipped"):
            self.say(f"step {step:5d} | the gradient is not finite: update skipped")

    @staticmethod
    def _print(text: str) -> None:
        with suppress(OSError):  # a full disk or a closed pipe behind it ends no run either
            print(text, end="", flush=True)

    def close(self) -> None:
        """Ends the live line and the trackers."""
        if self.live:
            print()
        self._track("finish")

    def _track(self, method: str, *arguments: Any, **options: Any) -> None:
        """Calls every tracker; one that fails is said, and left out from then on."""
        for tracker in list(self.trackers):
            try:
                getattr(tracker, method)(*arguments, **options)
            except Exception as error:  # no tracker is worth a run
                self.trackers.remove(tracker)
                name = type(tracker).__name__
                self.say(f"{name}: {first_line(error)}; training goes on without this tracker")
