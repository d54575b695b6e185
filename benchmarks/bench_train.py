"""The training step against itself with parts switched off, and against the plain steps of others.

One device, random tokens, no network. On a GPU the variants take turns; on a CPU each has a process
of its own, since one step's speed depends on the memory that others have freed. Each reports the
median of its rounds. "ours" is a step of train.py's own loop: loader, compiled model, chunked loss,
clipping, AdamW and logging. Memory is the peak of a variant's second step: weights, gradients,
AdamW's moments and activations. The ceiling is a large matrix product in the precision that
`--dtype auto` chooses; "in products" is the part of a step spent in matrix products and attention
(measured on a CPU only).

    python benchmarks/bench_train.py                                  every table
    python benchmarks/bench_train.py --device cpu --tables variants   one of them
"""

import contextlib
import ctypes
import gc
import io
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch
import torch._inductor.config
import tyro
from torch import Tensor
from torch.utils.benchmark import timer  # reads the clock once the GPU has finished

sys.path.insert(0, str(Path(__file__).parents[1]))
import common

from plain_steps import Step, hugging_face, nanogpt, torch_loss, use_torch_attention

import metrics
import plot
import train
from data_loader import TokenLoader
from model import GPT
from train import TrainConfig

DTYPES: dict[common.DtypeName, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class BenchConfig:
    """What to measure, and how often."""

    device: str = "auto"
    """cuda, cuda:1 or cpu; auto: the machine's GPU, or the CPU without one."""
    tables: tuple[Literal["variants", "growth", "recompute", "ranks"], ...] = (
        "variants",
        "growth",
        "recompute",
        "ranks",
    )
    """Tables to measure, in this order."""
    micro_batch: int | None = None
    """Sequences computed at once in the table of variants. Default: 64, on a CPU 4."""
    context_length: int = 512
    """Tokens of a sequence in that table."""
    batch_tokens: int | None = None
    """Tokens of a step in that table. Default: 524,288, on a CPU one micro-batch."""
    only: str = ""
    """Measure only rows whose name this regular expression finds, but for the table of ranks."""
    rounds: int = 3
    """Timed steps of each row."""
    ceiling: bool = True
    """Measure large matrix products first, which all rows are compared with."""


# ---- our step ------------------------------------------------------------------------------------


class BlockingLoader(TokenLoader):
    """Reads each batch when the training loop asks for it."""

    def __next__(self) -> tuple[Tensor, Tensor]:
        windows = self.dataset.windows(next(iter(self.batches)))
        tokens = torch.from_numpy(windows).to(self.device).long()
        return tokens[:, :-1], tokens[:, 1:]


def ours(
    config: TrainConfig, prefetch: bool = True, logging: bool = True, blocked_attention: bool = True
) -> Step:
    """A step of train.py's loop, in a run with a log folder of its own."""
    config = replace(config, log_dir=Path(tempfile.mkdtemp(dir=config.data_dir)))
    device = torch.device(config.device)
    run = train.Run(config, common.DistInfo(rank=0, world_size=1, device=device))
    # The run's own handlers would only end its loop, where a signal must end the benchmark.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    run.logger.enabled = logging
    if not blocked_attention:
        use_torch_attention(run.model)
    if not prefetch:
        run.loader.close()
        run.loader = BlockingLoader(run.train_data, run.loader.batches, device, prefetch=1)
        run.loader.close()  # ends the thread that would read ahead
    loop = train.training_loop(run)
    next(loop)  # the loop yields before each step: bring it before the first one
    return loop.__next__


# ---- measuring -----------------------------------------------------------------------------------


def keeping_activations(config: TrainConfig) -> Step:
    """Ours on a CPU without computing norms and GELU again in the backward pass."""
    step = ours(config)
    # compile_model has set it to less. It is read where the step compiles, in the first one.
    torch._functorch.config.activation_memory_budget = 1.0
    return step


@dataclass
class Variant:
    """A row of a table: the settings of a step, who builds it, and what was measured."""

    name: str
    config: TrainConfig
    build: Callable[[TrainConfig], Step] = ours
    keeps_memory: bool = True  # that it frees; see common.keep_freed_memory
    memory_gb: float = 0.0
    in_products: float | None = None  # part of the time
    seconds: list[float] = field(default_factory=list)  # of each round


def time_once(step: Step) -> float:
    """Seconds of one call, until the device has finished."""
    start = timer()
    step()
    return timer() - start


def reset_memory(device: torch.device) -> float:
    """Return free memory to the system and reset its peak; the GB that are still in use."""
    gc.unfreeze()  # the training loop freezes all that exists at its first step
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Without it a variant reuses what the one before it has freed, and seems to need less.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak, see proc_pid_clear_refs(5)
    return metrics.peak_memory_gb(device)


def warm_up(variant: Variant, device: torch.device) -> Step:
    """Build a variant's step, and run it for all that is measured besides its time."""
    before = reset_memory(device)
    step = variant.build(variant.config)
    step()  # compiles, and allocates AdamW's moments
    reset_memory(device)
    seconds = time_once(step)
    variant.memory_gb = metrics.peak_memory_gb(device) - before
    # All that is known of this row if the time runs out before the table is printed.
    print(
        f"{variant.name}: {seconds:.3f} s, {variant.memory_gb:.2f} GB", file=sys.stderr, flush=True
    )
    if device.type == "cpu":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            step()
        # Matrix products and attention: the work that no variant can avoid.
        names = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot_product", "mkl")
        times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
        products = sum(time for name, time in times.items() if name.startswith(names))
        variant.in_products = products / sum(times.values())
    return step


def measure(variants: list[Variant], rounds: int, device: torch.device) -> list[Variant]:
    """Time the variants in turn. Those that fail are reported, and not returned."""
    steps: list[Step] = []
    ready: list[Variant] = []
    with contextlib.redirect_stdout(io.StringIO()):  # what train.py prints
        for variant in variants:
            try:
                steps.append(warm_up(variant, device))
                ready.append(variant)
            except Exception as error:  # out of memory, or a feature that this torch lacks
                reason = common.first_line(error)
                print(f"{variant.name}: skipped ({reason:.150})", file=sys.stderr, flush=True)
        # Round by round: when the machine's speed drifts, it drifts for all of them.
        for _ in range(rounds):
            for variant, step in zip(ready, steps, strict=True):
                variant.seconds.append(time_once(step))
    return ready


def measure_alone(
    bench: BenchConfig, base: TrainConfig, name: str
) -> tuple[float, float | None, list[float]] | None:
    """What a CPU's variant is found to need, for a process of its own; None if it fails."""
    _, rows = variants(bench, base, cuda=False)
    row = next(row for row in rows if row.name == name)
    if row.keeps_memory:
        common.keep_freed_memory()
    torch.set_float32_matmul_precision("high")
    device = torch.device("cpu")
    train.compiler_problem(device)  # so that the compiler's own memory is not counted
    measured = measure([row], bench.rounds, device)
    return (row.memory_gb, row.in_products, row.seconds) if measured else None


def measure_each_alone(rows: list[Variant], bench: BenchConfig, base: TrainConfig) -> list[Variant]:
    """Measure a CPU's variants, one after the other. Those that fail are not returned."""
    ready = []
    for row in rows:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            result = process.submit(measure_alone, bench, base, row.name).result()
        if result is not None:
            row.memory_gb, row.in_products, row.seconds = result
            ready.append(row)
    return ready


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: the best that is seen in a second."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    seconds: list[float] = []
    while sum(seconds) < 1:  # a single product where a CPU emulates bf16
        seconds.append(time_once(lambda: a @ a))
    return 2 * n**3 / min(seconds)


# ---- tables --------------------------------------------------------------------------------------


def show(title: str, measured: list[Variant], ceiling: float, peak: float | None) -> None:
    """Print a Markdown table. ``ceiling`` and ``peak`` (the data sheet's) are FLOP/s."""
    print(f"\n### {title}\n")
    print("| | first / this | tokens/s | MFU | of the ceiling | in products | memory |")
    print("|---|---|---|---|---|---|---|")
    speeds = [v.config.batch_tokens / median(v.seconds) for v in measured]
    for v, speed in zip(measured, speeds, strict=True):
        with torch.device("meta"):  # only the shapes count
            flops = GPT(v.config.model).flops_per_token() * speed
        mfu = f"{flops / peak:.1%}" if peak else ""
        of_ceiling = f"{flops / ceiling:.0%}" if math.isfinite(ceiling) else ""
        products = f"{v.in_products:.0%}" if v.in_products else ""
        print(
            f"| {v.name} | {speeds[0] / speed:.2f} | {speed:,.0f} | {mfu}"
            f" | {of_ceiling} | {products} | {v.memory_gb:.2f} GB |",
            flush=True,
        )


def shape(base: TrainConfig, B: int, T: int, size: str = "gpt2") -> TrainConfig:
    """Steps of one micro-batch (B, T), with the model of a preset; by default that of 124M."""
    model = replace(train.PRESETS[size].model, context_length=T)
    return replace(base, model=model, micro_batch=B, batch_tokens=B * T)


def variants(bench: BenchConfig, base: TrainConfig, cuda: bool) -> tuple[str, list[Variant]]:
    """The title and the rows: ours, ours without each of its parts, and the others."""
    B = bench.micro_batch or (64 if cuda else 4)
    T = bench.context_length
    batch_tokens = bench.batch_tokens or (524_288 if cuda else B * T)
    config = replace(shape(base, B, T), batch_tokens=batch_tokens)
    eager = replace(config, compile=False)
    plain_loss = replace(config, loss_rows=0)
    # Inductor splits the loss by itself (since 2.13). The setting is read where a step compiles,
    # in the first one, so it is the step that is wrapped.
    auto_chunker = torch._inductor.config.patch({"auto_chunker.enable": True})
    rows = [
        Variant("ours", config),
        Variant("ours, plain loss", plain_loss),
        Variant("ours, Inductor's auto_chunker", plain_loss, lambda c: auto_chunker(ours(c))),
        Variant("ours, not compiled", eager),
        Variant("ours, no prefetch", config, partial(ours, prefetch=False)),
    ]
    # The steps of others, which do not change how malloc works.
    other = partial(Variant, keeps_memory=False)
    if cuda:
        rows += [
            Variant("ours, nothing logged", config, partial(ours, logging=False)),
            Variant("ours, 4096 loss rows", replace(config, loss_rows=4096)),
            Variant("ours, 8192 loss rows", replace(config, loss_rows=8192)),
            other("plain step, torch's linear_cross_entropy", config, torch_loss),
            other("nanoGPT-style", config, nanogpt),
            other("Hugging Face", config, hugging_face),
        ]
    else:
        # Both precisions, because a CPU may have no instructions for bf16.
        bf16 = replace(config, dtype="bf16")
        fp32_eager = replace(eager, dtype="fp32")
        rows += [
            Variant("ours, freed memory returned", config, keeps_memory=False),
            Variant("ours, nothing computed twice", config, keeping_activations),
            Variant("ours, torch's attention", config, partial(ours, blocked_attention=False)),
            Variant("ours, 768 loss rows", replace(config, loss_rows=768)),
        ]
        if config.dtype == "fp32":
            rows += [
                Variant("ours, bf16", bf16),
                other("nanoGPT-style, fp32, compiled", config, nanogpt),
            ]
        rows += [
            other("nanoGPT-style, fp32, eager", fp32_eager, nanogpt),
            other("nanoGPT-style, bf16, compiled", bf16, nanogpt),
            other("Hugging Face, fp32, eager", fp32_eager, hugging_face),
            other("Hugging Face, bf16, eager", replace(eager, dtype="bf16"), hugging_face),
        ]
    where = f"{B} x {T}, {batch_tokens:,} tokens a step"
    title = f"Variants: 124M, {where}, {config.dtype} where not said otherwise"
    return title, rows


def growth(base: TrainConfig, cuda: bool) -> Iterator[tuple[str, list[Variant]]]:
    """Titles and rows: ours over the micro-batch, the context and the size of the model."""
    base = replace(base, compile=cuda)  # a CPU would compile for a minute in each row
    batches = (8, 16, 32, 64) if cuda else (1, 2, 4)
    for T in (512, 1024):
        rows = [Variant(f"{B} x {T}", shape(base, B, T)) for B in batches]
        yield f"Micro-batch, context {T}: 124M", rows
    tokens = 32_768 if cuda else 2048
    contexts = (256, 512, 1024, 2048)
    rows = [Variant(f"{tokens // T} x {T}", shape(base, tokens // T, T)) for T in contexts]
    yield f"Context: 124M, {tokens:,} tokens at once", rows
    B = 16 if cuda else 1
    sizes = ("gpt2", "gpt2-medium", "gpt2-large")
    yield f"Model: {B} x 512", [Variant(size, shape(base, B, 512, size)) for size in sizes]


def recompute(base: TrainConfig, cuda: bool) -> Iterator[tuple[str, list[Variant]]]:
    """Titles and rows: ours over the share of the blocks that is computed twice."""
    base = replace(base, compile=cuda)
    for size, B in (("gpt2", 64 if cuda else 4), ("gpt2-large", 16 if cuda else 1)):
        config = shape(base, B, 512, size)
        rows = [
            Variant(f"{size}, --recompute {share:g}", replace(config, recompute=share))
            for share in (0.0, 0.5, 1.0)
        ]
        yield f"Blocks computed again: {B} x 512", rows


def ranks(data_dir: Path, cuda: bool) -> None:
    """Print a table of torchrun with 1, 2, ... processes here, with the same tokens a step."""
    count = torch.cuda.device_count() if cuda else 2
    batch_tokens = 524_288 if cuda else 1024
    on_cuda = "--device cuda --micro-batch 64"
    on_cpu = "--device cpu --micro-batch 1 --model.context-length 256"
    nothing_but_steps = "--val-every 0 --hellaswag-every 0 --sample-every 0 --checkpoint-every 0"
    print(f"\n### Processes: 124M, {batch_tokens:,} tokens a step\n\n| | tokens/s | ratio |")
    print("|---|---|---|")
    first = None
    for size in [n for n in (1, 2, 4, 8) if n <= count]:
        log_dir = Path(tempfile.mkdtemp(dir=data_dir))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={size}", train.__file__]
        command += [f"--data-dir={data_dir}", f"--log-dir={log_dir}"]
        command += [f"--batch-tokens={batch_tokens}", "--max-steps=8", "--warmup-steps=1"]
        command += (on_cuda if cuda else on_cpu).split() + nothing_but_steps.split()
        # The processes must not compete for the cores.
        threads = str(max(1, (os.cpu_count() or 1) // size))
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        subprocess.run(command, env=environment, capture_output=True, check=True)
        _, speeds = plot.read_metrics(log_dir).series("train", "tokens_per_s")
        speed = median(speeds[3:])  # without the steps that compile and allocate
        first = first or speed
        print(f"| {size} | {speed:,.0f} | {speed / first:.2f} |", flush=True)


def main() -> None:
    """Print the machine's ceiling, then each table when it is done."""
    bench = tyro.cli(BenchConfig, description=__doc__)
    with common.exit_with_one_line(), tempfile.TemporaryDirectory(prefix="bench_train_") as path:
        folder = Path(path)
        device = common.choose_device(bench.device)
        cuda = device.type == "cuda"
        torch._dynamo.config.recompile_limit = 64  # each row compiles the same functions again
        torch.set_float32_matmul_precision("high")
        device_name = metrics.device_name(device)
        print(f"{device_name}, torch {torch.__version__}, CUDA {torch.version.cuda}")
        dtype = common.choose_dtype("auto", device)
        dtype_name = next(name for name in DTYPES if DTYPES[name] == dtype)
        ceiling = math.nan
        if bench.ceiling:
            ceiling = matmul_flops(device, dtype)
            print(f"ceiling in {dtype_name}: {ceiling / 1e12:.3f} TFLOP/s")
        peak = metrics.peak_flops(device_name, str(dtype).removeprefix("torch."))

        rng = np.random.default_rng(0)
        for split, size in (("val", 10_000), ("train", 20_000_000)):
            tokens = rng.integers(0, common.VOCAB_SIZE, size, dtype=np.uint16)
            np.save(folder / f"random_{split}_000000.npy", tokens)
        # Nothing of a run but its steps.
        base = TrainConfig(val_every=0, hellaswag_every=0, sample_every=0, checkpoint_every=0)
        base = replace(base, data_dir=folder, device=str(device), dtype=dtype_name)
        for table in bench.tables:
            if table == "variants":
                title, rows = variants(bench, base, cuda)
                rows = [row for row in rows if re.search(bench.only, row.name)]
                if device.type == "cpu":
                    measured = measure_each_alone(rows, bench, base)
                else:
                    measured = measure(rows, bench.rounds, device)
                show(title, measured, ceiling, peak)
            elif table in ("growth", "recompute"):
                for title, rows in (growth if table == "growth" else recompute)(base, cuda):
                    # One at a time: together they would not fit into memory.
                    wanted = [row for row in rows if re.search(bench.only, row.name)]
                    alone = [row for v in wanted for row in measure([v], bench.rounds, device)]
                    if alone:
                        show(title, alone, ceiling, peak)
            else:
                ranks(folder, cuda)


if __name__ == "__main__":
    main()
