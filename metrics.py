"""What a run reports: metrics.jsonl, the console, TensorBoard and Weights & Biases.

Rank 0 alone writes. A full disk or a tracker that fails is reported once and never ends a run.
"""

from __future__ import annotations

from common import first_line

import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Required, TypedDict, cast

import msgspec
import numpy as np
from tqdm import tqdm

if TYPE_CHECKING:  # plot.py needs the rows of this module, and not to wait for torch
    import torch
    from torch import Tensor

# Dense peaks of the tensor cores in TFLOP/s with sums in fp32, as torch has them; GeForce cards are
# twice as fast with sums in fp16. They are the same in bf16 and fp16. What has no bf16 is below.
# Figures that a data sheet gives with sparsity only are halved. The names are those of the devices
# without NOT_THE_MODEL, in capitals.
PEAK_TFLOPS = {
    "GB300": 2500.0,  # GB300 NVL72 data sheet, 360 PFLOP/s with sparsity for 72
    "B300": 2250.0,  # HGX B300 data sheet, 36 PFLOP/s with sparsity for 8
    "GB200": 2500.0,  # Blackwell data sheet
    "B200": 2250.0,  # Blackwell data sheet
    "GH200": 989.4,  # GH200 data sheet and H100 white paper
    "H200": 989.4,  # H200 data sheet and H100 white paper
    "H100": 989.4,  # H100 white paper, SXM5
    "H100 NVL": 835.0,  # H100 data sheet
    "H100 PCIE": 756.0,  # H100 white paper
    "A100": 312.0,  # A100 data sheet
    "A100 PCIE": 312.0,  # A100 data sheet
    "L40S": 362.05,  # L40S data sheet
    "L4": 121.0,  # L4 data sheet
    "A40": 149.7,  # A40 data sheet and GA102 white paper
    "A10G": 70.0,  # A10G data sheet
    "RTX 6000 ADA GENERATION": 364.2,  # Ada white paper
    "RTX A6000": 154.8,  # GA102 white paper
    "RTX 5090": 209.5,  # RTX Blackwell white paper
    "RTX 4090": 165.2,  # Ada white paper
    "RTX 4080 SUPER": 104.4,  # an eighth of the 836 AI TOPS (FP8, sparse) of NVIDIA's page
    "RTX 4080": 97.5,  # Ada white paper
    "RTX 4070 TI SUPER": 88.2,  # an eighth of the 706 AI TOPS of NVIDIA's page
    "RTX 4070 TI": 80.2,  # an eighth of the 641 AI TOPS of NVIDIA's page
    "RTX 3090": 71.0,  # GA102 white paper
    "RTX 3080": 59.5,  # GA102 white paper, 10 GB; the one of 12 GB has this name too, and 61.3
    "T4": 65.0,  # T4 data sheet
    "V100 SXM2": 125.0,  # V100 data sheet
    "V100 PCIE": 112.0,  # V100 data sheet
    "MI300X": 1307.4,  # MI300X data sheet
    # MI200 data sheets: 383.0 and 362.1 of two dies, each of which is a device.
    "MI250X": 191.5,
    "MI250": 181.05,
    "MI250X / MI250": 191.5,  # a name of both: rather too high a peak than too high an MFU
}
FP16_ONLY = ("T4", "V100 SXM2", "V100 PCIE")
# Words of a device's name: its maker, its line, its memory, and modules there is but one of. With
# any other word, such as LAPTOP, MAX-Q or the MIG of a part of a GPU, it is another device.
NOT_THE_MODEL = re.compile("NVIDIA|TESLA|GEFORCE|AMD|INSTINCT|[0-9]+GB?|HBM3E?|SXM[456]|AC|OAM|VF")

MIN_SECONDS = 1e-6  # of a step, by which numbers are divided
# What a console raises that is full, closed (ValueError) or missing (sys.stdout is None).
CONSOLE_ERRORS = (OSError, ValueError, AttributeError)


Count = Annotated[int, msgspec.Meta(ge=1, le=2**53)]  # beyond it a float skips whole numbers
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e11)]  # as a date, the year 5138


class RunConfig(TypedDict, total=False):
    """What plot.py reads of a run's configuration, which has more keys."""

    batch_tokens: Count | None
    max_steps: Count | None
    model: dict[str, Any]


class Row(TypedDict, total=False):
    """A line of metrics.jsonl. Only kind and step are in all; what is not finite is null."""

    kind: Required[str]
    step: Required[Annotated[int, msgspec.Meta(ge=0, le=2**53)]]
    time: Seconds  # since 1970
    seconds: Seconds | None  # that an evaluation, a sample or a checkpoint took
    # kind "run": a process has started
    config: RunConfig
    dataset: str | None  # what the names of the shards begin with
    versions: dict[str, Any]
    resumed_from: str | None
    # kind "train", for the loss of the weights before the update, and kind "val"
    loss: float | None
    ms: float | None
    # kind "hellaswag", which also has harness_acc, harness_acc_norm and four standard errors
    n: Count
    acc: float | None
    acc_norm: float | None
    # kind "checkpoint", whose seconds are those that training waited
    path: str
    write_seconds: float | None
    # kind "sample"
    prompt: str
    text: str


def parse_row(line: str) -> Row | None:
    """A line of metrics.jsonl, or None when it was torn by a kill or is something else.

    The keys of ``Row`` are checked; others, of this version or another, stay as they are.
    """
    try:
        try:
            row = msgspec.json.decode(line)
        except ValueError:
            row = json.loads(line)  # which also knows NaN and Infinity, as other programs write
        msgspec.convert(row, Row)  # for its checks alone: the copy has only the keys of Row
    except (ValueError, RecursionError):
        return None
    return cast(Row, row)


# ---- facts about the machine ---------------------------------------------------------------------


def peak_flops(device_name: str, dtype: str, devices: int = 1) -> float | None:
    """Dense FLOP/s of that many GPUs in bfloat16 or float16; None where no peak is known."""
    words = re.split(r"[ -]+", device_name.upper())
    model = " ".join(word for word in words if not NOT_THE_MODEL.fullmatch(word))
    precisions = ("float16",) if model in FP16_ONLY else ("float16", "bfloat16")
    if model not in PEAK_TFLOPS or dtype not in precisions:
        return None
    return PEAK_TFLOPS[model] * 1e12 * devices


def unknown_peak(device: torch.device, device_name: str, dtype: str) -> str | None:
    """Why there is no MFU, in a line for the user; None where there is, or none is expected."""
    tensor_cores = device.type == "cuda" and dtype in ("bfloat16", "float16")
    if not tensor_cores or peak_flops(device_name, dtype) is not None:
        return None
    return (
        f"no MFU: metrics.PEAK_TFLOPS has no peak of {device_name} in {dtype}; add it if it has one"
    )


def device_name(device: torch.device) -> str:
    """The model of the GPU or of the processor."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.cpu.get_capabilities().get("cpu_name") or platform.machine()


def peak_memory_gb(device: torch.device) -> float:
    """The most memory ever in use, in GB: the GPU's as torch counts it, else this process's.

    NaN where the operating system does not record it.
    """
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
    """The commit of these scripts, or None outside a git repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None


# ---- trackers ------------------------------------------------------------------------------------


class TensorBoard:
    """Numbers as scalars in ``tensorboard/`` of the log folder. The methods are a wandb run's."""

    def __init__(self, log_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(log_dir / "tensorboard", flush_secs=10)
        self.finish = self.writer.close

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)


def start_wandb(log_dir: Path, config: dict[str, Any]) -> Any:
    """A Weights & Biases run. Raises ValueError when it cannot start, or is not logged in."""
    import wandb

    try:
        return wandb.init(project="gpt-xs", dir=log_dir, config=config)
    except wandb.Error as error:
        remedy = "run `wandb login`, or set WANDB_MODE=offline"
        raise ValueError(f"--wandb: {first_line(error)}; {remedy}") from error


# ---- the logger ----------------------------------------------------------------------------------


@dataclass
class MetricsLogger:
    """Where a run's numbers go. Every rank reads them, and only rank 0 (``enabled``) reports."""

    log_dir: Path
    enabled: bool
    device: torch.device
    max_steps: int
    tokens_per_step: int
    flops_per_step: int
    peak_flops: float | None  # of all devices together, per second; None: no MFU is reported

    # Called while a step's numbers are awaited; it may raise to end the wait.
    on_wait: Callable[[], None] | None = None

    # What the training loop reads. Checkpoints keep all but the first.
    stop_requested: bool = False  # by any rank, in a step whose numbers have been read
    best_val: float = math.inf
    skipped_in_a_row: int = 0  # updates
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=128))  # of the newest steps

    def __post_init__(self) -> None:
        self.trackers: list[Any] = []  # of which each has a wandb run's log() and finish()
        self.write_failed = False  # the newest line: a full disk is reported once, not each step
        # Steps whose numbers may still be on their way: step, learning rate, stats, arrival.
        self.pending: deque[tuple[int, float, Tensor, torch.cuda.Event | None]] = deque()
        self.durations: deque[float] = deque(maxlen=100)  # of the newest steps, in seconds
        self.step_start = time.perf_counter()
        # On a terminal a bar that is drawn again at each step. Elsewhere it is disabled, and each
        # step is a line that stays.
        self.bar = tqdm(
            total=self.max_steps,
            file=sys.stdout,
            disable=not (self.enabled and _on_terminal()),
            dynamic_ncols=True,
            bar_format="{bar:10} {desc}",
        )

    def start(
        self,
        step: int,
        config: dict[str, Any],
        tensorboard: bool,
        wandb: bool,
        dataset: str = "",  # what the names of the shards begin with
        parameters: int = 0,
        device: str = "",  # the name of its model
        world_size: int = 1,
        dtype: str = "",
        resumed_from: str | None = None,  # the name of the checkpoint's folder
        init_from: str | None = None,  # the model whose weights the run has started from
        init_sha256: str | None = None,  # of those weights
    ) -> None:
        """Report that a process starts at ``step``, with its configuration, and start trackers."""
        if not self.enabled:
            return
        import torch

        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "cuda": torch.version.cuda,
        }
        row = {
            "config": config,
            "dataset": dataset,
            "parameters": parameters,
            "device": device,
            "world_size": world_size,
            "dtype": dtype,
            "resumed_from": resumed_from,
            "init_from": init_from,
            "init_sha256": init_sha256,
            "versions": versions,
            "git_commit": git_commit(),
        }
        self.write("run", step, row)
        # After that line, whose numbers are facts about the run and not curves.
        if tensorboard:
            self.trackers.append(TensorBoard(self.log_dir))
        if wandb:
            self.trackers.append(start_wandb(self.log_dir, config))

    def log_step(self, step: int, lr: float, stats: Tensor) -> None:
        """Report a step, on a GPU the one before.

        ``stats`` (4,) holds its loss, the ranks' stop requests, the norm of its gradient, and the
        scale of the loss, which is above 1 only in fp16.
        """
        arrived = None
        if stats.device.type == "cuda":
            import torch

            # To read them now would leave the GPU without work while the host queues the next step.
            # Waiting for the step before does not: this one is queued already.
            stats = stats.to("cpu", non_blocking=True)  # into pinned memory, which torch allocates
            arrived = torch.cuda.current_stream().record_event()
        self.pending.append((step, lr, stats, arrived))
        self.flush(keep=0 if arrived is None else 1)

    def flush(self, keep: int = 0) -> None:
        """Report the pending steps but the newest ``keep``, waiting for their numbers."""
        while len(self.pending) > keep:
            step, lr, stats, arrived = self.pending.popleft()
            # Not synchronize(): until it returned, a signal's handler could not run.
            while arrived is not None and not arrived.query():
                if self.on_wait is not None:
                    self.on_wait()
                time.sleep(0.0005)
            loss, stop, norm, loss_scale = stats.tolist()
            self.stop_requested = self.stop_requested or stop > 0
            self._report_step(step, lr, loss, norm, loss_scale)

    def _report_step(
        self, step: int, lr: float, loss: float, norm: float, loss_scale: float
    ) -> None:
        now = time.perf_counter()
        # A clock that stands still, or that a virtual machine sets back, must not end the run.
        seconds = max(now - self.step_start, MIN_SECONDS)
        self.step_start = now
        self.durations.append(seconds)
        ms = seconds * 1e3
        tokens_per_s = self.tokens_per_step / seconds
        mfu = self.flops_per_step / seconds / self.peak_flops if self.peak_flops else None
        memory_gb = peak_memory_gb(self.device)
        # A spike shows in standard deviations above the mean of the losses before it.
        z = 0.0
        deviation = float(np.std(self.losses)) if len(self.losses) >= 16 else 0.0
        if deviation > 0:  # fewer losses say little about it, and equal ones have none
            z = float((loss - np.mean(self.losses)) / deviation)
        if math.isfinite(loss):
            self.losses.append(loss)
        skipped = not math.isfinite(norm)  # the optimizer has decided the same
        # In fp16 a gradient may only have been scaled up too far, and the next scale is half of
        # this one. A scale of 1 is not to blame any more.
        overflow = skipped and math.isfinite(loss) and loss_scale > 1
        if not overflow:
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0

        row: dict[str, Any] = {"loss": loss, "z": z, "lr": lr, "grad_norm": norm, "ms": ms}
        row.update(tokens_per_s=tokens_per_s, mfu=mfu, memory_gb=memory_gb)
        if loss_scale != 1:
            row["loss_scale"] = loss_scale
        if skipped:
            row["overflow" if overflow else "skipped"] = True
        self.write("train", step, row)
        # The median: the first step compiles, and others may wait for a disk.
        left = tqdm.format_interval(float(np.median(self.durations)) * (self.max_steps - step - 1))
        text = (
            f"step {step:5d}/{self.max_steps} | loss {loss:7.4f} ({z:+5.2f}z) | norm {norm:7.4f}"
            f" | lr {lr:.2e} | {ms:7.1f} ms | {tokens_per_s:9,.0f} tok/s"
            f"{f' | mfu {mfu:.1%}' if mfu else ''} | {memory_gb:.1f} GB | {left} left"
        )
        if self.bar.disable:
            self.print(text)
        else:
            with suppress(*CONSOLE_ERRORS):
                self.bar.n = step + 1
                self.bar.set_description_str(text)
        if overflow:
            self.print(f"step {step:5d} | overflow in fp16 at loss scale {loss_scale:g}: skipped")
        elif skipped:
            self.print(f"step {step:5d} | the gradient is not finite: update skipped")

    @contextmanager
    def timed(self, kind: str, step: int) -> Iterator[dict[str, Any]]:
        """Report what the block puts into the dictionary, and the seconds that it took."""
        self.flush()  # or these seconds would count as the pending step's
        start = time.perf_counter()
        row: dict[str, Any] = {}
        try:
            yield row
        finally:
            self.step_start = time.perf_counter()  # nor do they count as the next step's
        if row:  # it is empty when there was nothing to do
            row["seconds"] = round(max(0.0, self.step_start - start), 3)
            self.report(kind, step, row)

    def report(self, kind: str, step: int, row: dict[str, Any]) -> None:
        """Write a line to metrics.jsonl and print it."""
        self.write(kind, step, row)
        texts = [f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()]
        self.print(f"step {step:5d} | {kind}: {', '.join(texts)}")

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl, and pass its numbers on to the trackers."""
        if not self.enabled:
            return
        row = _without_nan({"kind": kind, "step": step, "time": time.time(), **values})
        line = json.dumps(row).encode() + b"\n"
        path = self.log_dir / "metrics.jsonl"
        try:
            with path.open("a+b") as file:
                if file.tell():  # a process that was killed, or a full disk, may leave half a line
                    file.seek(-1, os.SEEK_END)
                    line = line if file.read(1) == b"\n" else b"\n" + line
                file.write(line)
            self.write_failed = False
        except OSError as error:
            if not self.write_failed:
                self.print(f"{path}: {error}; training continues without these metrics")
            self.write_failed = True
        numbers = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
        self._call_trackers("log", numbers, step)

    def print(self, text: str) -> None:
        """Print a line that stays."""
        if self.enabled:
            with suppress(*CONSOLE_ERRORS):  # a full or closed console must not end the run
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()

    def close(self) -> None:
        """End the bar and the trackers."""
        with suppress(*CONSOLE_ERRORS):
            self.bar.close()
        self._call_trackers("finish")

    def _call_trackers(self, method: str, *arguments: Any) -> None:
        for tracker in list(self.trackers):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:  # no failure of a tracker is worth the run
                self.trackers.remove(tracker)
                name = type(tracker).__name__
                self.print(f"{name}: {first_line(error)}; training continues without this tracker")


def _on_terminal() -> bool:
    """Whether standard output is a terminal; not when it is closed or None."""
    try:
        return sys.stdout.isatty()
    except CONSOLE_ERRORS:
        return False


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them, in nested settings too."""
    if isinstance(value, dict):
        return {name: _without_nan(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
