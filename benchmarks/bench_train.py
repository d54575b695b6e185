"""The training step against itself with parts switched off, and against the plain steps of others.

One device, random tokens, no network. On a GPU the variants take turns; on a CPU each has a process
of its own, since one step's speed depends on the memory that others have freed. Each reports the
median of its rounds. "ours" is a step of train.train itself: loader, compiled model, chunked loss,
clipping, AdamW and logging. Memory is the peak of a variant's second step: weights, gradients,
AdamW's moments and activations. The ceiling is a large matrix product in the precision that
`--dtype auto` chooses; "in products" is the part of a step spent in matrix products and attention
(measured on a CPU only).

    python benchmarks/bench_train.py                                  every table
    python benchmarks/bench_train.py --device cpu --tables variants   one of them
"""

from __future__ import annotations

import contextvars
import ctypes
import gc
import io
import math
import multiprocessing
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import (
    AbstractContextManager,
    ExitStack,
    contextmanager,
    nullcontext,
    redirect_stdout,
)
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
import torch._inductor.config
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import timer  # reads the clock once the GPU has finished

sys.path.insert(0, str(Path(__file__).parents[1]))
from plain_steps import Step, hugging_face, nanogpt, torch_loss, use_torch_attention

import train
from data_loader import TokenDataset
from gptxs import metrics
from gptxs.cli import exit_with_one_line, parse
from gptxs.compiler import compiler_problem
from gptxs.distributed import DistInfo, DtypeName, choose_device, choose_dtype, keep_freed_memory
from gptxs.tokenizer import VOCAB_SIZE
from model import GPT
from train import TrainConfig

DTYPE_NAMES: dict[torch.dtype, DtypeName] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
Table = Literal["variants", "options", "growth", "recompute", "ranks"]


@dataclass(frozen=True)
class BenchConfig:
    """What to measure, and how often."""

    device: str = "auto"
    """cuda, cuda:1 or cpu; auto: the machine's GPU, or the CPU without one."""
    tables: tuple[Table, ...] = ("variants", "options", "growth", "recompute", "ranks")
    """Tables to measure, in this order."""
    size: train.Preset = "gpt2"
    """The preset whose model the tables of variants and options have."""
    layers: int | None = None
    """Blocks of that model: fewer compile sooner. Default: the preset's."""
    micro_batch: int | None = None
    """Sequences computed at once in these tables. Default: 64, on a CPU 4."""
    context_length: int = 512
    """Tokens of a sequence in these tables."""
    batch_tokens: int | None = None
    """Tokens of a step in these tables. Default: 524,288, on a CPU one micro-batch."""
    only: str = ""
    """Measure only rows whose name this regular expression finds, but for the table of ranks."""
    rounds: int = 3
    """Timed steps of each row."""
    time_limit: float = math.inf
    """Seconds of a table after which it begins no further row."""
    ceiling: bool = True
    """Measure large matrix products first, which all rows are compared with."""
    compile: bool = True
    """Compile what is compiled by default."""
    turns: bool = False
    """Let a CPU's rows take turns in one process too: sooner, and no measurement."""


# ---- our step ------------------------------------------------------------------------------------


class Enough(Exception):
    """Ends a run from its on_step."""


@contextmanager
def ours(
    config: TrainConfig,
    at_first: Callable[[GPT], AbstractContextManager[Any]] = lambda model: nullcontext(),
    replacing: dict[str, object] | None = None,
) -> Iterator[Step]:
    """The step of train.train itself, in a run with a log folder of its own.

    The run is in a thread, and waits before each step until that step is wanted. ``at_first`` is
    given the model before the first step, which compiles, and what it returns surrounds that step.
    ``replacing`` gives names of train.py another meaning where the run is set up.
    """
    log_dir = Path(tempfile.mkdtemp(dir=config.data_dir))
    device = torch.device(config.device)
    wanted: queue.SimpleQueue[AbstractContextManager[Any] | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    around = ExitStack()  # the step that is made

    def on_step(progress: train.Progress, model: GPT) -> None:
        around.close()
        if progress.step == 0:
            around.enter_context(at_first(model))
        done.put(None)
        within = wanted.get()
        if within is None:
            raise Enough
        around.enter_context(within)

    def run() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # a thread starts on GPU 0
            dist_info = DistInfo(0, 1, device, choose_dtype(config.dtype, device))
            train.train(replace(config, log_dir=log_dir), dist_info, on_step)
        except BaseException as error:  # of the step that the other thread waits for
            done.put(error)

    def wait() -> None:
        error = done.get()
        if error is not None:
            raise error

    def step(within: AbstractContextManager[Any] | None = None) -> None:
        wanted.put(within or nullcontext())
        wait()

    # torch's settings belong to a thread: this one starts with those of the thread that waits.
    target = contextvars.copy_context().run
    thread = threading.Thread(target=target, args=(run,), daemon=True)
    try:
        with patch.dict(vars(train), replacing or {}):
            thread.start()
            wait()
        yield step
    finally:
        wanted.put(None)
        thread.join()


class BlockingLoader:
    """Reads each batch when the training loop asks for it, in place of a TokenLoader."""

    def __init__(
        self,
        dataset: TokenDataset,
        batches: Iterable[np.ndarray],
        device: torch.device,
        prefetch: int,
    ) -> None:
        self.dataset = dataset
        self.batches = iter(batches)
        self.device = device

    def __next__(self) -> tuple[Tensor, Tensor]:
        windows = self.dataset.windows(next(self.batches))
        tokens = torch.from_numpy(windows).to(self.device).long()
        return tokens[:, :-1], tokens[:, 1:]

    def close(self) -> None:
        pass


def silent_logger(log_dir: Path, **settings: Any) -> metrics.MetricsLogger:
    """A logger that reads the numbers of the steps, and reports none."""
    return metrics.MetricsLogger(log_dir, **{**settings, "enabled": False})


def torch_attention(model: GPT) -> AbstractContextManager[None]:
    use_torch_attention(model)
    return nullcontext()


def keep_activations(model: GPT) -> AbstractContextManager[None]:
    """Nothing is computed again in the backward pass, where compile_model chose otherwise."""
    torch._functorch.config.activation_memory_budget = 1.0
    return nullcontext()


def attention(backend: SDPBackend) -> Callable[[GPT], AbstractContextManager[None]]:
    """One attention kernel instead of torch's choice, which is made where the step compiles."""
    return lambda model: sdpa_kernel(backend)


def inductor(flags: dict[str, bool]) -> Callable[[GPT], AbstractContextManager[None]]:
    """Settings of Inductor, which it reads where the step compiles."""
    return lambda model: torch._inductor.config.patch(flags)


def residual(dtype: torch.dtype) -> Callable[[GPT], AbstractContextManager[None]]:
    """The residual stream in this precision, bf16 or fp32."""

    def at_first(model: GPT) -> AbstractContextManager[None]:
        model.bf16_residual = dtype == torch.bfloat16
        return nullcontext()

    return at_first


# ---- measuring -----------------------------------------------------------------------------------


def start_profiler() -> None:
    """Kineto starts in the main thread, or says that it could not. Later any thread may use it."""
    with torch.profiler.profile():
        pass


@dataclass
class Variant:
    """A row of a table: the settings of a step, who builds it, and what was measured."""

    name: str
    config: TrainConfig
    build: Callable[[TrainConfig], AbstractContextManager[Step]] = ours
    keeps_memory: bool = True  # that it frees; see keep_freed_memory
    memory_gb: float = 0.0
    in_products: float | None = None  # part of the time
    seconds: list[float] = field(default_factory=list)  # of each round


def time_once(step: Callable[[], object]) -> float:
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


def warm_up(variant: Variant, device: torch.device, stack: ExitStack) -> Step:
    """Build a variant's step, and run it for all that is measured besides its time.

    ``stack`` then ends what the step has started.
    """
    before = reset_memory(device)
    step = stack.enter_context(variant.build(variant.config))
    first = time_once(step)  # compiles, and allocates AdamW's moments
    reset_memory(device)
    seconds = time_once(step)
    variant.memory_gb = metrics.peak_memory_gb(device) - before
    # All that is known of this row if the time runs out before the table is printed.
    known = f"{seconds:.3f} s, first {first:.1f} s, {variant.memory_gb:.2f} GB"
    print(f"{variant.name}: {known}", file=sys.stderr, flush=True)
    if device.type == "cpu":
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        step(profiler)
        # Matrix products and attention: the work that no variant can avoid.
        names = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot_product", "mkl")
        times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
        products = sum(time for name, time in times.items() if name.startswith(names))
        variant.in_products = products / sum(times.values())
    return step


def measure(
    variants: list[Variant], rounds: int, device: torch.device, time_limit: float = math.inf
) -> list[Variant]:
    """Time the variants in turn. Those that fail are reported, and not returned.

    After ``time_limit`` seconds no further one begins.
    """
    start = timer()
    steps: list[Step] = []
    ready: list[Variant] = []
    with redirect_stdout(io.StringIO()), ExitStack() as stack:  # what train.py prints
        for variant in variants:
            try:
                if timer() - start > time_limit:
                    raise TimeoutError("the table's time is over")
                with ExitStack() as own:  # closed here if it fails
                    steps.append(warm_up(variant, device, own))
                    stack.enter_context(own.pop_all())
                ready.append(variant)
            except Exception as error:  # out of memory, or a feature that this torch lacks
                print(f"{variant.name}: skipped ({error!r:.300})", file=sys.stderr, flush=True)
        # Round by round: when the machine's speed drifts, it drifts for all of them.
        for _ in range(rounds):
            for variant, step in zip(ready, steps, strict=True):
                variant.seconds.append(time_once(step))
    return ready


def measure_alone(
    bench: BenchConfig, base: TrainConfig, table: Table, title: str, name: str
) -> tuple[float, float | None, list[float]] | None:
    """What a CPU's variant is found to need, for a process of its own; None if it fails."""
    rows = dict(TABLES[table](bench, base, cuda=False))[title]
    row = next(row for row in rows if row.name == name)
    if row.keeps_memory:
        keep_freed_memory()
        # In a real run the step is in the main thread. The thread of ours would have a heap of its
        # own, which gives back what is freed: M_ARENA_MAX of glibc's malloc.h.
        ctypes.CDLL(None).mallopt(-8, 1)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cpu")
    if row.config.compile:
        compiler_problem(device, steps=1000)  # so that the compiler's own memory is not counted
    start_profiler()
    measured = measure([row], bench.rounds, device)
    return (row.memory_gb, row.in_products, row.seconds) if measured else None


def measure_each_alone(
    rows: list[Variant], bench: BenchConfig, base: TrainConfig, table: Table, title: str
) -> list[Variant]:
    """Measure a CPU's variants, one after the other. Those that fail are not returned."""
    ready = []
    for row in rows:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            task = process.submit(measure_alone, bench, base, table, title, row.name)
            result = task.result()
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


def shape(base: TrainConfig, B: int, T: int, size: train.Preset = "gpt2") -> TrainConfig:
    """Steps of one micro-batch (B, T), with the model of a preset; by default that of 124M."""
    model = replace(train.PRESETS[size].model, context_length=T)
    return replace(base, model=model, micro_batch=B, batch_tokens=B * T)


def chosen_shape(bench: BenchConfig, base: TrainConfig, cuda: bool) -> tuple[TrainConfig, str]:
    """The step of the flags, and a name for its shape."""
    B = bench.micro_batch or (64 if cuda else 4)
    T = bench.context_length
    config = shape(base, B, T, bench.size)
    batch_tokens = bench.batch_tokens or (524_288 if cuda else B * T)
    layers = bench.layers or config.model.n_layers
    model = replace(config.model, n_layers=layers)
    where = f"{bench.size}, {layers} layers, {B} x {T}, {batch_tokens:,} tokens a step"
    config = replace(config, model=model, batch_tokens=batch_tokens, compile=bench.compile)
    return config, f"{where}, {config.dtype}"


def variants(
    bench: BenchConfig, base: TrainConfig, cuda: bool
) -> Iterator[tuple[str, list[Variant]]]:
    """Title and rows: ours, ours without each of its parts, and the others."""
    config, where = chosen_shape(bench, base, cuda)
    eager = replace(config, compile=False)
    plain_loss = replace(config, loss_rows=0)
    # Inductor splits the loss by itself (since 2.13).
    auto_chunker = partial(ours, at_first=inductor({"auto_chunker.enable": True}))
    no_prefetch = partial(ours, replacing={"TokenLoader": BlockingLoader})
    rows = [
        Variant("ours", config),
        Variant("ours, plain loss", plain_loss),
        Variant("ours, Inductor's auto_chunker", plain_loss, auto_chunker),
        Variant("ours, not compiled", eager),
        Variant("ours, no prefetch", config, no_prefetch),
    ]
    # The steps of others, which do not change how malloc works.
    other = partial(Variant, keeps_memory=False)
    if cuda:
        nothing_logged = partial(ours, replacing={"MetricsLogger": silent_logger})
        rows += [
            Variant("ours, nothing logged", config, nothing_logged),
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
            Variant(
                "ours, nothing computed twice", config, partial(ours, at_first=keep_activations)
            ),
            Variant("ours, torch's attention", config, partial(ours, at_first=torch_attention)),
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
    yield f"Variants: {where} where not said otherwise", rows


def options(
    bench: BenchConfig, base: TrainConfig, cuda: bool
) -> Iterator[tuple[str, list[Variant]]]:
    """Title and rows: ours, each with one thing chosen otherwise. The likeliest gains first."""
    config, where = chosen_shape(bench, base, cuda)
    B = config.micro_batch
    rows_at_once = B * config.model.context_length
    rows = [Variant("ours", config)]
    for n in (4096, 8192, 16_384):
        if n < rows_at_once:
            rows.append(Variant(f"{n} loss rows", replace(config, loss_rows=n)))
    rows.append(Variant("all loss rows", replace(config, loss_rows=rows_at_once)))
    if config.dtype != "fp32":
        half = torch.bfloat16 if config.dtype == "bf16" else torch.float16
        for dtype in (torch.float32, half):
            build = partial(ours, at_first=residual(dtype))
            rows.append(Variant(f"residual {DTYPE_NAMES[dtype]}", config, build))
    if config.batch_tokens % (2 * rows_at_once) == 0:
        rows.append(Variant(f"micro-batch {2 * B}", replace(config, micro_batch=2 * B)))
    if cuda:
        different = {
            "cuDNN's attention": attention(SDPBackend.CUDNN_ATTENTION),
            "flash attention": attention(SDPBackend.FLASH_ATTENTION),
            "Inductor's combo_kernels": inductor({"combo_kernels": True}),
            "Inductor's enable_pdl": inductor({"triton.enable_pdl": True}),
            "Inductor's coordinate_descent_tuning": inductor({"coordinate_descent_tuning": True}),
        }
        for name, at_first in different.items():
            rows.append(Variant(name, config, partial(ours, at_first=at_first)))
    yield f"Options: {where}", rows


def growth(
    bench: BenchConfig, base: TrainConfig, cuda: bool
) -> Iterator[tuple[str, list[Variant]]]:
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
    sizes: tuple[train.Preset, ...] = ("gpt2", "gpt2-medium", "gpt2-large")
    yield f"Model: {B} x 512", [Variant(size, shape(base, B, 512, size)) for size in sizes]


def recompute(
    bench: BenchConfig, base: TrainConfig, cuda: bool
) -> Iterator[tuple[str, list[Variant]]]:
    """Titles and rows: ours over the share of the blocks that is computed twice."""
    base = replace(base, compile=cuda)
    sizes: dict[train.Preset, int] = {"gpt2": 64 if cuda else 4, "gpt2-large": 16 if cuda else 1}
    for size, B in sizes.items():
        config = shape(base, B, 512, size)
        rows = [
            Variant(f"{size}, --recompute {share:g}", replace(config, recompute=share))
            for share in (0.0, 0.5, 1.0)
        ]
        yield f"Blocks computed again: {size}, {B} x 512", rows


TABLES = {"variants": variants, "options": options, "growth": growth, "recompute": recompute}


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
        rows, _ = metrics.read_rows(log_dir / "metrics.jsonl")
        speeds = [row["tokens_per_s"] for row in rows if row["kind"] == "train"]
        speed = median(speeds[3:])  # without the steps that compile and allocate
        first = first or speed
        print(f"| {size} | {speed:,.0f} | {speed / first:.2f} |", flush=True)


def prepare(folder: Path, device: torch.device, val_tokens: int = 10_000) -> TrainConfig:
    """Write random shards, and set torch up; the settings of a run that only makes steps."""
    start_profiler()
    torch._dynamo.config.recompile_limit = 64  # each row compiles the same functions again
    torch.set_float32_matmul_precision("high")
    rng = np.random.default_rng(0)
    for split, size in (("val", val_tokens), ("train", 20_000_000)):
        tokens = rng.integers(0, VOCAB_SIZE, size, dtype=np.uint16)
        np.save(folder / f"random_{split}_000000.npy", tokens)
    return TrainConfig(
        data_dir=folder,
        device=str(device),
        dtype=DTYPE_NAMES[choose_dtype("auto", device)],
        val_every=0,
        hellaswag_every=0,
        sample_every=0,
        checkpoint_every=0,
    )


def main() -> None:
    """Print the machine's ceiling, then each table when it is done."""
    with exit_with_one_line(), tempfile.TemporaryDirectory(prefix="bench_train_") as path:
        bench = parse(BenchConfig, description=__doc__)
        # Inductor writes the value of an --only into the code it makes, where a ' ends a string.
        del sys.argv[1:]
        device = choose_device(bench.device)
        cuda = device.type == "cuda"
        base = prepare(Path(path), device)
        dtype = choose_dtype("auto", device)
        device_name = metrics.device_name(device)
        print(f"{device_name}, torch {torch.__version__}, CUDA {torch.version.cuda}")
        ceiling = math.nan
        if bench.ceiling:
            ceiling = matmul_flops(device, dtype)
            print(f"ceiling in {base.dtype}: {ceiling / 1e12:.3f} TFLOP/s")
        peak = metrics.peak_flops(device_name, str(dtype).removeprefix("torch."))
        for table in bench.tables:
            if table == "ranks":
                ranks(base.data_dir, cuda)
                continue
            for title, rows in TABLES[table](bench, base, cuda):
                rows = [row for row in rows if re.search(bench.only, row.name)]
                if not cuda and not bench.turns:
                    measured = measure_each_alone(rows, bench, base, table, title)
                elif table in ("variants", "options"):
                    measured = measure(rows, bench.rounds, device, bench.time_limit)
                else:  # one at a time: together they would not fit into memory
                    measured = [v for row in rows for v in measure([row], bench.rounds, device)]
                if measured:
                    show(title, measured, ceiling, peak)


if __name__ == "__main__":
    main()
