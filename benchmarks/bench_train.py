"""The training step against its own parts switched off, and against the plain steps of others.

One process, one device, random tokens and no network. The variants take turns, and each reports
the median of its rounds. "ours" is train.py's own step: loader, compiled model, chunked loss,
clipping, AdamW and logging. Memory is the peak of a variant's second step: weights, gradients,
AdamW's moments and activations. The ceiling is a large matrix product in the same precision; "in
products" is the share of a step in matrix products and attention (measured on a CPU only).

    python benchmarks/bench_train.py                                  every table that suits
    python benchmarks/bench_train.py --device cpu --tables variants   one of them
"""

import contextlib
import ctypes
import gc
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import metrics
import train
from model import GPT, GPTConfig, choose_device, fast_bf16

ROOT = Path(__file__).parent.parent
VOCAB_SIZE = 50257
Table = Literal["variants", "growth", "ranks"]
Step = Callable[[], None]
Builder = Callable[[train.TrainConfig, Path], Step]


@dataclass(frozen=True)
class Options:
    device: str = "auto"
    """cuda, cuda:1 or cpu."""
    tables: tuple[Table, ...] = ("variants", "growth", "ranks")
    """What to measure."""
    micro_batch: int | None = None
    """Sequences at once in the table of variants. Default: 64, on a CPU 4."""
    context_length: int = 512
    """Tokens of a sequence there."""
    batch_tokens: int | None = None
    """Tokens of a step there. Default: 524,288, on a CPU one micro-batch."""
    only: str = ""
    """Only variants whose name this regular expression finds."""
    rounds: int = 3
    """Turns of each variant."""


@dataclass
class Variant:
    """A step function with its settings, and what was measured of it."""

    name: str
    build: Callable[[], Step]
    tokens: int
    flops_per_token: int
    step: Step | None = None
    memory_gb: float | None = None
    products: float | None = None  # share of a step's time in matrix products and attention
    seconds: list[float] | None = None

    def tokens_per_s(self) -> float:
        return self.tokens / statistics.median(self.seconds or [float("nan")])


# ---- ours ----------------------------------------------------------------------------------------


def start(config: train.TrainConfig, folder: Path) -> train.Run:
    """A run of train.py on the shards in ``folder``, before its first step."""
    log_dir = Path(tempfile.mkdtemp(dir=folder))
    with contextlib.redirect_stdout(io.StringIO()):
        config = replace(config, data_dir=folder, log_dir=log_dir)
        return train.Run(config, train.World(0, 1, choose_device(config.device)))


def stepper(run: train.Run, attention: Any = train.attention_backends) -> Step:
    def step() -> None:
        with contextlib.redirect_stdout(io.StringIO()), attention(run.world.device):
            run.update()

    return step


def ours(config: train.TrainConfig, folder: Path) -> Step:
    """train.py's step, metrics and all."""
    return stepper(start(config, folder))


def without_cudnn(config: train.TrainConfig, folder: Path) -> Step:
    return stepper(start(config, folder), lambda _: contextlib.nullcontext())


def without_log(config: train.TrainConfig, folder: Path) -> Step:
    run = start(config, folder)
    run.metrics.enabled = False
    return stepper(run)


def auto_chunked(config: train.TrainConfig, folder: Path) -> Step:
    """Inductor splits the loss by itself (torch 2.13 and later)."""
    step = ours(config, folder)

    def chunked() -> None:  # Inductor reads the setting when the first step compiles
        with torch._inductor.config.patch({"auto_chunker.enable": True}):
            step()

    return chunked


def without_prefetch(config: train.TrainConfig, folder: Path) -> Step:
    """Each batch is read when it is asked for."""
    run = start(config, folder)
    run.loader.close()
    batches, device = run.loader._batches(), run.world.device

    class InTurn:
        error = None

        def __next__(self) -> tuple[Tensor, Tensor]:
            tokens = torch.from_numpy(next(batches)).to(device).long()
            return tokens[:, :-1], tokens[:, 1:]

    run.loader = InTurn()
    return stepper(run)


# ---- others --------------------------------------------------------------------------------------


class Loss(torch.nn.Module):
    """The mean loss of a model: ``kind`` of its tokens and targets."""

    def __init__(self, model: torch.nn.Module, kind: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        return self.kind(self.model, idx, targets)


def plain(config: train.TrainConfig, folder: Path, model: torch.nn.Module) -> Step:
    """The usual loop: batches cut from a memory map when they are needed, autocast, and a look at
    the loss after each step."""
    device, rows, T = choose_device(config.device), config.micro_batch, config.model.context_length
    tokens = np.load(next(folder.glob("*_train_*.npy")), mmap_mode="r")
    groups = GPT.parameter_groups(model.to(device), config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)
    torch._functorch.config.activation_memory_budget = 1.0  # torch's own, which train.py changes
    compiled = torch.compile(model, dynamic=False) if config.compile else model
    micro_steps = config.batch_tokens // (rows * T)

    def batch() -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(tokens) - T - 1, (rows,)).tolist()
        windows = torch.from_numpy(
            np.stack([tokens[i : i + T + 1].astype(np.int64) for i in starts])
        )
        if device.type == "cuda":
            windows = windows.pin_memory().to(device, non_blocking=True)
        return windows[:, :-1], windows[:, 1:]

    def step() -> None:
        for _ in range(micro_steps):
            with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bf16"):
                loss = compiled(*batch()) / micro_steps
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


def full_loss(model: torch.nn.Module, idx: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of all logits, as nanoGPT and transformers compute it."""
    out = model(idx)
    logits = out if isinstance(out, Tensor) else out.logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def nanogpt(config: train.TrainConfig, folder: Path) -> Step:
    return plain(config, folder, Loss(GPT(config.model), full_loss))


def torch_loss(config: train.TrainConfig, folder: Path) -> Step:
    """torch's own loss without all logits (2.13 and later)."""

    def loss(model: GPT, idx: Tensor, targets: Tensor) -> Tensor:
        hidden = model.hidden_states(idx).flatten(0, 1)
        return F.linear_cross_entropy(hidden, model.lm_head.weight, targets.flatten())

    return plain(config, folder, Loss(GPT(config.model), loss))


def hugging_face(config: train.TrainConfig, folder: Path) -> Step:
    from transformers import GPT2Config, GPT2LMHeadModel

    m = config.model
    shape = {"n_embd": m.d_model, "n_head": m.n_heads, "n_layer": m.n_layers}
    shape |= {"n_positions": m.context_length, "vocab_size": m.vocab_size}
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = GPT2LMHeadModel(GPT2Config(**shape, **dropouts, use_cache=False))
    return plain(config, folder, Loss(model, full_loss))


# ---- measuring ---------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(device: torch.device, peak: bool = False) -> float:
    """Bytes in use by this process on the device, or the most since ``reset_peak``."""
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated)(device)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0])


def release(device: torch.device) -> None:
    """Gives free memory back, so that no variant reuses what another one has left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def measure(variants: list[Variant], rounds: int, device: torch.device) -> list[Variant]:
    """Warms each variant up, then times them in turn. One that fails is reported and left out."""
    ready = []
    for variant in variants:
        try:
            release(device)
            before = memory(device)
            variant.step, variant.seconds = variant.build(), []
            variant.step()  # compiles, allocates AdamW's moments
            release(device)
            reset_peak(device)
            variant.step()
            synchronize(device)
            variant.memory_gb = (memory(device, peak=True) - before) / 1e9
            if device.type == "cpu":
                variant.products = products(variant.step)
            ready.append(variant)
        except Exception as error:  # out of memory, or a part that this torch lacks
            print(f"{variant.name}: left out ({str(error).splitlines()[0]:.150})", flush=True)
            variant.step = None
    for _ in range(rounds):
        for variant in ready:
            start = time.perf_counter()
            variant.step()
            synchronize(device)
            variant.seconds.append(time.perf_counter() - start)
    for variant in ready:
        variant.step = None  # and with it its memory
    return ready


def products(step: Step) -> float:
    """The share of a step's time in matrix products and attention: what all variants must do."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    names = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot_product", "mkl")
    return sum(t for name, t in times.items() if name.startswith(names)) / sum(times.values())


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: the best of five."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times[1:])


@dataclass(frozen=True)
class Bench:
    """What all tables share."""

    options: Options
    device: torch.device
    folder: Path
    base: train.TrainConfig
    limit: float  # FLOP/s of the ceiling
    peak: float | None  # FLOP/s of the data sheet

    def config(self, rows: int, model: GPTConfig, batch_tokens: int | None = None) -> Any:
        tokens = batch_tokens or rows * model.context_length
        return replace(self.base, model=model, micro_batch=rows, batch_tokens=tokens)

    def variant(self, name: str, config: train.TrainConfig, build: Builder = ours) -> Variant:
        with torch.device("meta"):
            flops = GPT(config.model).flops_per_token()
        return Variant(name, lambda: build(config, self.folder), config.batch_tokens, flops)

    def show(self, title: str, measured: list[Variant]) -> None:
        """A Markdown table; the ratio says how many times as fast the first row is."""
        print(f"\n### {title}\n")
        print("| | first / this | tokens/s | MFU | of the ceiling | in products | memory |")
        print("|---|---|---|---|---|---|---|")
        for v in measured:
            speed, ratio = v.tokens_per_s(), measured[0].tokens_per_s() / v.tokens_per_s()
            flops = v.flops_per_token * speed
            mfu = f"{flops / self.peak:.1%}" if self.peak else ""
            in_products = f"{v.products:.0%}" if v.products else ""
            share = f"{flops / self.limit:.0%} | {in_products} | {v.memory_gb:.2f} GB"
            print(f"| {v.name} | {ratio:.2f} | {speed:,.0f} | {mfu} | {share} |", flush=True)


def variants(bench: Bench) -> None:
    """Ours, ours without each of its parts, and the others."""
    options, cuda = bench.options, bench.device.type == "cuda"
    model = GPTConfig(context_length=options.context_length)
    rows = options.micro_batch or (64 if cuda else 4)
    config = bench.config(rows, model, options.batch_tokens or (524_288 if cuda else None))
    full, eager = replace(config, loss_rows=0), replace(config, compile=False)
    found = [
        bench.variant("ours", config),
        bench.variant("ours, plain loss", full),
        bench.variant("ours, Inductor's auto_chunker", full, auto_chunked),
        bench.variant("ours, not compiled", eager),
        bench.variant("ours, no prefetch", config, without_prefetch),
    ]
    if cuda:
        found += [
            bench.variant("ours, torch's choice of attention", config, without_cudnn),
            bench.variant("ours, nothing logged", config, without_log),
            bench.variant("plain step, torch's linear_cross_entropy", config, torch_loss),
            bench.variant("nanoGPT-style", config, nanogpt),
            bench.variant("Hugging Face", config, hugging_face),
        ]
    else:  # where bf16 may be the slower one
        fp32, bf16 = replace(eager, dtype="fp32"), replace(eager, dtype="bf16")
        compiled = replace(config, dtype="bf16")
        if config.dtype == "fp32":
            found.append(bench.variant("ours, bf16", compiled))
        found += [
            bench.variant("nanoGPT-style, fp32, eager", fp32, nanogpt),
            bench.variant("nanoGPT-style, bf16, compiled", compiled, nanogpt),
            bench.variant("Hugging Face, fp32, eager", fp32, hugging_face),
            bench.variant("Hugging Face, bf16, eager", bf16, hugging_face),
        ]
    where = f"{rows} x {model.context_length}, {config.batch_tokens:,} tokens a step"
    title = f"Variants: 124M, {where}, {config.dtype} where not said otherwise"
    found = [variant for variant in found if re.search(options.only, variant.name)]
    bench.show(title, measure(found, options.rounds, bench.device))


def growth(bench: Bench) -> None:
    """Ours over the micro-batch, the context and the size of the model, one at a time."""
    cuda = bench.device.type == "cuda"
    contexts = {T: GPTConfig(context_length=T) for T in (256, 512, 1024, 2048)}
    tokens = 32_768 if cuda else 2048
    at_once = {f"{tokens // T} x {T}": (tokens // T, model) for T, model in contexts.items()}
    tables = {
        f"Micro-batch, context {T}: 124M": {
            f"{B} x {T}": (B, contexts[T]) for B in ((8, 16, 32, 64) if cuda else (1, 2, 4))
        }
        for T in (512, 1024)
    }
    tables[f"Context: 124M, {tokens:,} tokens at once"] = at_once
    rows = 16 if cuda else 1
    tables[f"Model: {rows} x 512"] = {
        name: (rows, replace(train.OPENAI_SIZES[name][0], context_length=512))
        for name in ("gpt2", "gpt2-medium", "gpt2-large")
    }
    for title, shapes in tables.items():
        found = [bench.variant(name, bench.config(*shape)) for name, shape in shapes.items()]
        alone = [measure([variant], bench.options.rounds, bench.device) for variant in found]
        bench.show(title, [variant for measured in alone for variant in measured])


def ranks(bench: Bench) -> None:
    """torchrun with 1, 2, ... processes on this machine, with the same tokens a step."""
    cuda = bench.device.type == "cuda"
    count, rows, T = (torch.cuda.device_count(), 64, 512) if cuda else (2, 1, 256)
    batch_tokens = 524_288 if cuda else 4 * T
    print(f"\n### Processes: 124M, {batch_tokens:,} tokens a step\n\n| | tokens/s | ratio |")
    print("|---|---|---|")
    first = None
    for size in [n for n in (1, 2, 4, 8) if n <= count]:
        log_dir = Path(tempfile.mkdtemp(dir=bench.folder))
        chores = ("val", "hellaswag", "sample", "checkpoint")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += (
            f"--nproc-per-node={size} {ROOT / 'train.py'} --device {bench.device.type}".split()
        )
        command += f"--data-dir {bench.folder} --log-dir {log_dir} --max-steps 8".split()
        command += f"--micro-batch {rows} --batch-tokens {batch_tokens} --warmup-steps 1".split()
        command += f"--model.context-length {T}".split()
        command += " ".join(f"--{chore}-every 0" for chore in chores).split()
        threads = {} if cuda else {"OMP_NUM_THREADS": str((os.cpu_count() or 1) // size or 1)}
        subprocess.run(command, env=os.environ | threads, capture_output=True, check=True)
        lines = map(json.loads, (log_dir / "metrics.jsonl").read_text().splitlines())
        speeds = [line["tokens_per_s"] for line in lines if line["kind"] == "train"][3:]
        speed = statistics.median(speeds)
        first = first or speed
        print(f"| {size} | {speed:,.0f} | {speed / first:.2f} |", flush=True)


@contextlib.contextmanager
def random_shards() -> Iterator[Path]:
    """A temporary folder with shards of random tokens."""
    with tempfile.TemporaryDirectory(prefix="bench_train_") as name:
        generator = np.random.default_rng(0)
        for split, n in (("val", 10_000), ("train", 20_000_000)):
            tokens = generator.integers(0, VOCAB_SIZE, n, dtype=np.uint16)
            np.save(Path(name) / f"random_{split}_000000.npy", tokens)
        yield Path(name)


def main() -> None:
    """Prints a heading and each table as it is done."""
    options = tyro.cli(Options, description=__doc__)
    device = choose_device(options.device)
    dtype = "bf16" if fast_bf16(device) else "fp32"
    cuda = device.type == "cuda"
    torch._dynamo.config.recompile_limit = 64  # each variant compiles the same functions again
    torch.set_float32_matmul_precision("high")
    limit = ceiling(device, torch.bfloat16 if dtype == "bf16" else torch.float32)
    name = metrics.device_name(device)
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    print(f"ceiling in {dtype}: {limit / 1e12:.3f} TFLOP/s, best of five products")
    if not cuda:
        bf16 = ceiling(device, torch.bfloat16)
        print(f"ceiling in bf16: {bf16 / 1e12:.3f} TFLOP/s")
    # To compile takes a CPU a minute, so there only the variants are.
    base = train.TrainConfig(device=str(device), dtype=dtype, val_every=0, hellaswag_every=0)
    peak = metrics.peak_flops(name) if cuda else None
    with random_shards() as folder:
        for table in options.tables:
            fitting = replace(base, compile=cuda or table == "variants")
            bench = Bench(options, device, folder, fitting, limit, peak)
            globals()[table](bench)


if __name__ == "__main__":
    main()
