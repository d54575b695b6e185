"""Three parts of gpu_report.sh, on random tokens:

profile      one step by classes of kernels, and the time in which the GPU waits for the host
first-step   the seconds until there is a step, its memory, the clocks; twice: a cold, a warm cache
evaluations  what a run of train.py logs of validation, HellaSwag and checkpoints

Example: python benchmarks/gpu_parts.py --part profile --micro-batch 32
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from bench_train import BenchConfig, Enough, chosen_shape, ours, prepare, time_once

import train
from gptxs import metrics
from gptxs.cli import exit_with_one_line, parse
from gptxs.distributed import DistInfo, choose_device, choose_dtype
from model import GPT
from train import TrainConfig


@dataclass(frozen=True)
class PartConfig(BenchConfig):
    part: Literal["profile", "first-step", "evaluations"] = "profile"
    """Which one."""
    hellaswag_rows: int = 10_042
    """Synthetic examples, of the real ones' lengths; by default as many as HellaSwag has."""
    val_tokens: int = 10_485_760
    """Validation tokens."""


# ---- one step by classes -------------------------------------------------------------------------

# The first that finds the name of a kernel, or on a CPU of an operation, has it.
CLASSES = {
    "attention": "flash|fmha|sdpa|attention",
    "products": "gemm|nvjet|cutlass|cublas|mkl|aten::(add|b)?mm",
    "Triton": "triton",
    "optimizer": "multi_tensor|fused_adam|_foreach|lpnorm|vector_norm",
    "gradient accumulation": "CUDAFunctor_add|aten::add_$",
}


def profile(config: TrainConfig) -> None:
    """Trace the third step, and print a table of it."""
    on_gpu = torch.cuda.is_available() and config.device.startswith("cuda")
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
    with ours(config) as step:
        step()
        print(f"a step without the profiler: {time_once(step) * 1e3:.1f} ms")
        step(profiler)
    trace = config.data_dir / "trace.json"
    profiler.export_chrome_trace(str(trace))
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if on_gpu else ("cpu_op",)
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("cat") in kinds]
    print_classes([(e["ts"], e["ts"] + e["dur"], e["name"]) for e in events])


def print_classes(events: list[tuple[float, float, str]]) -> None:
    """Print the time of each class; events have a start and an end in microseconds, and a name."""
    events = sorted(events, key=lambda event: (event[0], -event[1]))
    own: list[float] = []  # time of each, without those within it, as a CPU's operations have
    enclosing: list[int] = []
    for i, (start, end, _) in enumerate(events):
        while enclosing and events[enclosing[-1]][1] <= start:
            enclosing.pop()
        if enclosing:
            own[enclosing[-1]] -= end - start
        own.append(end - start)
        enclosing.append(i)
    times: dict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    others: dict[str, float] = defaultdict(float)
    for (_, _, name), time in zip(events, own, strict=True):
        found = (kind for kind, names in CLASSES.items() if re.search(names, name, re.IGNORECASE))
        kind = next(found, "other")
        times[kind] += time
        counts[kind] += 1
        if kind == "other":
            others[name] += time
    window = max(end for _, end, _ in events) - events[0][0]
    times["idle"] = window - sum(own)
    print("\n| | ms | of the step | launches |\n|---|---|---|---|")
    for kind in (*CLASSES, "other", "idle"):
        share = times[kind] / window
        print(f"| {kind} | {times[kind] / 1e3:.2f} | {share:.1%} | {counts[kind] or ''} |")
    print(f"| in all | {window / 1e3:.2f} | | |\n\nThe longest of the others:")
    for name in sorted(others, key=lambda name: -others[name])[:6]:
        print(f"{others[name] / 1e3:8.2f} ms  {name:.110}")


# ---- the first step ------------------------------------------------------------------------------


def first_step(config: TrainConfig) -> None:
    """Print the seconds of the first step and of later ones, memory and clocks."""
    device = torch.device(config.device)
    with ours(config) as step:
        first = time_once(step)
        later = median(time_once(step) for _ in range(3))
        print(f"first step {first:.2f} s, then {later:.3f} s")
        if device.type == "cuda":
            allocated = torch.cuda.max_memory_allocated(device) / 1e9
            reserved = torch.cuda.max_memory_reserved(device) / 1e9
            print(f"memory allocated {allocated:.2f} GB, reserved {reserved:.2f} GB")
        else:
            print(f"memory {metrics.peak_memory_gb(device):.2f} GB")
        if shutil.which("nvidia-smi"):
            query = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
            command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]
            reader = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            while reader.poll() is None:  # the clocks of a GPU that works
                step()
            print(reader.communicate()[0])


# ---- evaluations ---------------------------------------------------------------------------------


def write_hellaswag(path: Path, n: int) -> None:
    """Write n random examples of about the real ones' lengths."""
    draw = random.Random(0)
    words = "the man a dog runs over water red house she opens door and then he with it".split()

    def text(low: int, high: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(low, high))) + "."

    with path.open("w") as file:
        for ind in range(n):
            ctx_a, ctx_b = text(10, 80), draw.choice(["", "she", "he"])
            row = {"ind": ind, "activity_label": "Work", "ctx_a": ctx_a, "ctx_b": ctx_b}
            row |= {"ctx": f"{ctx_a} {ctx_b}".rstrip(), "label": draw.randrange(4)}
            row |= {"endings": [text(8, 45) for _ in range(4)]}
            file.write(json.dumps(row) + "\n")


def evaluations(config: TrainConfig, part: PartConfig) -> None:
    """Run two steps with everything before and after them; print what the run has logged."""
    examples = config.data_dir / "hellaswag.jsonl"
    write_hellaswag(examples, part.hellaswag_rows)
    run = replace(
        config,
        log_dir=config.data_dir / "log",
        batch_tokens=config.micro_batch * config.model.context_length,
        val_every=2,
        val_tokens=part.val_tokens,
        hellaswag_every=2,
        hellaswag_data=examples,
        checkpoint_every=2,
    )

    def on_step(progress: train.Progress, model: GPT) -> None:
        if progress.step == 2:
            raise Enough

    device = torch.device(run.device)
    dist_info = DistInfo(0, 1, device, choose_dtype(run.dtype, device))
    try:
        train.train(run, dist_info, on_step)
    except Enough:
        rows, _ = metrics.read_rows(run.log_dir / "metrics.jsonl")
        print("\nThe first ones compile and tokenize too. A checkpoint's seconds are the pause.")
        for row in rows:
            if row["kind"] in ("val", "hellaswag", "checkpoint"):
                print(json.dumps({k: v for k, v in row.items() if k != "time"}))


def main() -> None:
    with exit_with_one_line(), tempfile.TemporaryDirectory(prefix="gpu_parts_") as path:
        part = parse(PartConfig, description=__doc__)
        device = choose_device(part.device)
        base = prepare(Path(path), device, part.val_tokens + 1)
        config, where = chosen_shape(part, base, cuda=device.type == "cuda")
        print(where, flush=True)
        if part.part == "profile":
            profile(config)
        elif part.part == "first-step":
            first_step(config)
        else:
            evaluations(config, part)


if __name__ == "__main__":
    main()
