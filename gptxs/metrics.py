"""What a run reports: metrics.jsonl, the console, torch.TensorBoard and Weights & Biases.

Rank 0 alone writes. A full disk, or a tracker that fails once it has started, ends no run.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptxs.cli import first_line

if TYPE_CHECKING:  # plot.py needs the rows of this module, and not to wait for torch
    import torch

# Dense peaks in TFLOP/s, bf16 or fp16 with sums in fp32, by torch.cuda.get_device_name(): from the
# makers' data sheets, which also give twice as much for sparse matrices.
PEAK_TFLOPS = {
    "NVIDIA B200": 2250.0,
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA H200": 989.4,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA L40S": 362.05,
    "NVIDIA L4": 121.0,
    "NVIDIA A10G": 70.0,
    "NVIDIA GeForce RTX 5090": 209.5,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 3090": 71.0,
    "Tesla T4": 65.0,
    "Tesla V100-SXM2-16GB": 125.0,
    "Tesla V100-SXM2-32GB": 125.0,
    "AMD Instinct MI300X": 1307.4,
}


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a metrics.jsonl, each with a ``kind`` (str) and a ``step`` (int), and the number
    of lines that are none: a process that is killed may leave half a line.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.split("\n") if line.strip()]
    rows = []
    for line in lines:
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            row = json.loads(line)  # which also knows NaN and Infinity, as other programs write
            if isinstance(row["kind"], str) and type(row["step"]) is int:
                rows.append(row)
    return rows, len(lines) - len(rows)


def peak_flops(device_name: str, dtype: str, devices: int = 1) -> float | None:
    """Dense FLOP/s of that many GPUs in bfloat16 or float16; None where none is known."""
    peak = PEAK_TFLOPS.get(device_name) if dtype in ("bfloat16", "float16") else None
    return peak * 1e12 * devices if peak else None


def device_name(device: torch.device) -> str:
    """The model of the GPU or of the processor."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.cpu.get_capabilities().get("cpu_name") or platform.machine()


def peak_memory_gb(device: torch.device) -> float:
    """The most memory ever in use, in GB: the GPU's as torch counts it, else this process's."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows has no such module
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)  # bytes on a Mac, else kilobytes


def git_commit() -> str | None:
    """The commit of this code; None outside a git repository, or without git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None


class TensorBoard:
    """Scalars in ``tensorboard/`` of the log folder, by the methods of a wandb run."""

    def __init__(self, log_dir: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an earlier process wrote of start_step and later is hidden: it is computed again.
        self.writer = SummaryWriter(log_dir / "tensorboard", purge_step=start_step, flush_secs=10)
        self.finish = self.writer.close

    def log(self, numbers: dict[str, float]) -> None:
        for name in numbers.keys() - {"step"}:
            self.writer.add_scalar(name, numbers[name], int(numbers["step"]))


def start_wandb(log_dir: Path, config: dict[str, Any]) -> Any:
    """A run of Weights & Biases; one that is resumed goes on, by the id in the log folder."""
    import wandb

    file = log_dir / "wandb_id"
    known = (file.read_text().strip() or None) if file.exists() else None
    run = wandb.init(project="gpt-xs", dir=log_dir, config=config, id=known, resume="allow")
    file.write_text(run.id)
    # wandb's own count of steps never goes back, as ours does to a checkpoint.
    run.define_metric("*", step_metric="step")
    return run


@dataclass(frozen=True)
class StepStats:
    """The numbers of a step, the same on every rank."""

    step: int
    loss: float  # of the weights before the update, the mean over all micro-batches and ranks
    norm: float  # of the gradient before clipping
    stop: bool  # any rank asks for the end of the run
    loss_scale: float  # of fp16, else 1
    skipped: bool  # there was no update, since the gradient is not finite
    overflow: bool  # but only because fp16's scale was too large: the next is half of it


@dataclass
class MetricsLogger:
    """Where a run's numbers go. Every rank reads them, and only rank 0 (``enabled``) reports."""

    log_dir: Path
    enabled: bool
    device: torch.device
    dtype: torch.dtype
    world_size: int
    max_steps: int
    tokens_per_step: int
    flops_per_step: int
    # Of the newest 128 steps, against which a spike is measured; checkpoints keep them.
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._dtype_name = str(self.dtype).removeprefix("torch.")
        self._device_name = device_name(self.device)
        self._peak_flops = peak_flops(self._device_name, self._dtype_name, self.world_size)
        self._trackers: list[Any] = []  # each with log() and finish()
        # Steps whose numbers may still be on their way: step, learning rate, stats, arrival.
        self._pending: deque[tuple[int, float, torch.Tensor, torch.cuda.Event | None]] = deque()
        self._seconds: deque[float] = deque(maxlen=100)  # of the newest steps
        self._step_start = time.perf_counter()

    def start(self, step: int, row: dict[str, Any], tensorboard: bool, wandb: bool) -> None:
        """Report the start at ``step`` with the facts in ``row``, and start the trackers."""
        if self.enabled:
            import torch

            versions = {"python": platform.python_version(), "torch": torch.__version__}
            row = {**row, "device": self._device_name, "dtype": self._dtype_name}
            row.update(world_size=self.world_size, versions=versions, git_commit=git_commit())
            self.write("run", step, row)
            self.print(
                f"{row['parameters']:,} parameters, {self.tokens_per_step:,} tokens a step, in"
                f" {self._dtype_name} on {self.world_size} x {self._device_name}"
            )
            # After that line, whose numbers are facts about the run and not curves.
            if tensorboard:
                self._trackers.append(TensorBoard(self.log_dir, start_step=step))
            if wandb:
                self._trackers.append(start_wandb(self.log_dir, row["config"]))

    def log_step(self, step: int, lr: float, stats: torch.Tensor) -> None:
        """Take the numbers of a step: ``stats`` (4,) are loss, stop, norm and loss scale."""
        arrived = None
        if stats.device.type == "cuda":
            import torch

            stats = stats.to("cpu", non_blocking=True)  # into pinned memory, which torch allocates
            arrived = torch.cuda.current_stream().record_event()
        self._pending.append((step, lr, stats, arrived))

    def read_steps(self, wait: bool) -> list[StepStats]:
        """Report and return the steps whose numbers are known; with ``wait``, those of all steps.

        On a GPU the newest step is left for the next call: to wait for it would leave the GPU
        without work while the host queues the next. The one before has ended, or soon will have.
        """
        read: list[StepStats] = []
        while self._pending:
            is_newest = len(self._pending) == 1 and self._pending[0][3] is not None
            # After a request to stop there is no next step.
            if is_newest and not (wait or any(stats.stop for stats in read)):
                break
            step, lr, values, arrived = self._pending.popleft()
            # Not synchronize(): until it returned, a signal's handler could not run.
            while arrived is not None and not arrived.query():
                time.sleep(0.0005)
            loss, stop, norm, loss_scale = values.tolist()
            skipped = not math.isfinite(norm)
            overflow = skipped and math.isfinite(loss) and loss_scale > 1
            stats = StepStats(step, loss, norm, stop > 0, loss_scale, skipped, overflow)
            if self.enabled:
                self._report_step(stats, lr)
            read.append(stats)
        return read

    def _report_step(self, stats: StepStats, lr: float) -> None:
        step, loss, norm = stats.step, stats.loss, stats.norm
        seconds = time.perf_counter() - self._step_start
        self._step_start += seconds
        self._seconds.append(seconds)
        tokens_per_s = self.tokens_per_step / seconds
        mfu = self.flops_per_step / seconds / self._peak_flops if self._peak_flops else None
        memory_gb = peak_memory_gb(self.device)
        # A spike shows in standard deviations above the losses before it, if there are enough.
        deviation = float(np.std(self.losses)) if len(self.losses) >= 16 else 0.0
        z = float(loss - np.mean(self.losses)) / deviation if deviation else 0.0
        if math.isfinite(loss):
            self.losses.append(loss)
            del self.losses[:-128]
        row: dict[str, Any] = {"loss": loss, "z": z, "lr": lr, "grad_norm": norm}
        row.update(ms=seconds * 1e3, tokens_per_s=tokens_per_s, mfu=mfu, memory_gb=memory_gb)
        if stats.loss_scale != 1:
            row["loss_scale"] = stats.loss_scale
        note = ""
        if stats.skipped:
            row["overflow" if stats.overflow else "skipped"] = True
            problem = "overflow in fp16" if stats.overflow else "the gradient is not finite"
            note = f" | {problem}: update skipped"
        self.write("train", step, row)
        # The median: the first step compiles, and others may wait for a disk.
        left = float(np.median(self._seconds)) * (self.max_steps - step - 1)
        self.print(
            f"step {step:5d}/{self.max_steps} | loss {loss:7.4f} ({z:+5.2f}z) | norm {norm:7.4f}"
            f" | lr {lr:.2e} | {seconds * 1e3:7.1f} ms | {tokens_per_s:9,.0f} tok/s"
            f"{f' | mfu {mfu:.1%}' if mfu else ''} | {memory_gb:.1f} GB"
            f" | {timedelta(seconds=round(left))} left{note}"
        )

    @contextmanager
    def timed(self, kind: str, step: int) -> Iterator[dict[str, Any]]:
        """Report what the block puts into the dictionary, and the seconds that it took."""
        row: dict[str, Any] = {}
        start = time.perf_counter()
        yield row
        seconds = time.perf_counter() - start
        self._step_start += seconds  # they do not count as the next step's
        if row:  # it is empty when there was nothing to do
            self.report(kind, step, {**row, "seconds": round(seconds, 3)})

    def report(self, kind: str, step: int, row: dict[str, Any]) -> None:
        """Write a line to metrics.jsonl and print it."""
        self.write(kind, step, row)
        texts = [f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()]
        self.print(f"step {step:5d} | {kind}: {', '.join(texts)}")

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl, and pass its numbers on to the trackers."""
        if not self.enabled:
            return
        row = {"kind": kind, "step": step, "time": time.time(), **values}
        # JSON has no NaN and no infinity: read again, they are None.
        row = json.loads(json.dumps(row), parse_constant=lambda name: None)
        line = json.dumps(row).encode() + b"\n"
        path = self.log_dir / "metrics.jsonl"
        try:
            with path.open("a+b") as file:
                if file.tell():  # a process that was killed, or a full disk, may leave half a line
                    file.seek(-1, os.SEEK_END)
                    line = line if file.read(1) == b"\n" else b"\n" + line
                file.write(line)
        except OSError as error:
            self.print(f"{path}: {error}; training continues without this line")
        numbers = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
        self._call_trackers("log", {**numbers, "step": step})

    def print(self, text: str) -> None:
        """Print a line. A console that is full (OSError) or closed (ValueError) ends no run."""
        if self.enabled:
            with suppress(OSError, ValueError):
                print(text, flush=True)

    def close(self) -> None:
        """End the trackers."""
        self._call_trackers("finish")

    def _call_trackers(self, method: str, *arguments: Any) -> None:
        for tracker in list(self._trackers):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:  # no failure of a tracker is worth the run
                self._trackers.remove(tracker)
                problem = f"{type(tracker).__name__}: {first_line(error)}"
                self.print(f"{problem}; training continues without this tracker")
