"""Trains GPT-2 on shards of tokens: one device, or torchrun's many, with the same numbers.

    torchrun --standalone --nproc_per_node=8 train.py        the default run: 124M, 10B tokens
    python train.py --preset quickstart                      minutes on a CPU, with no data set
    python train.py --resume                                 goes on at the newest checkpoint

Everything goes to --log-dir: metrics.jsonl, checkpoints that are Hugging Face models, plot.png.
Step s is the update made after s updates; losses logged for it are those of the weights before.
"""

import argparse
import gc
import importlib.util
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

import numpy as np
import torch
import torch._functorch.config
import torch.distributed as dist
import tyro
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import dataset
import hellaswag
import metrics
import plot
from data_loader import DataLoader, Share, TokenDataset
from eval import validation_loss
from model import GPT, GPTConfig, attention_backends, checkpoints, choose_device, fast_bf16

Preset = Literal["gpt-xs", "quickstart", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
Result = TypeVar("Result")
# A step whose numbers may still be on their way: step, learning rate, numbers, their arrival.
Pending = tuple[int, float, Tensor, torch.cuda.Event | None]

MAX_SKIPPED = 10  # updates skipped in a row before a run is called lost
SPIKE_WINDOW, SPIKE_LEAST = 128, 16  # steps that a loss is compared with
# What ends a run without being its user's mistake.
RUN_FAULTS = (FloatingPointError, ConnectionError, torch.OutOfMemoryError)
CPU_COMPILE_STEPS = 200  # a run on a CPU repays the minute of compiling from here on


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. --preset sets them all; any other flag overrides the preset."""

    preset: Preset = "gpt-xs"
    """gpt-xs: GPT-2 124M on 10B tokens. quickstart: a small model on the embedded corpus.
    gpt2, gpt2-medium, gpt2-large, gpt2-xl: OpenAI's four sizes with their context of 1024."""
    data_dir: Path = Path("edu_fineweb10B")
    """Folder of token shards, as dataset.py writes them."""
    log_dir: Path = Path("log")
    """Where the run is written: metrics.jsonl, step_*/ checkpoints, plot.png, report.md."""
    resume: bool = False
    """Go on at the newest whole checkpoint in --log-dir; start anew where there is none."""
    model: GPTConfig = field(default_factory=GPTConfig)

    batch_tokens: int = 524_288
    """Tokens of one step, over all devices."""
    micro_batch: int = 64
    """Sequences a device computes at once; gradient accumulation fills the step."""
    max_steps: int = 19_073
    """Updates of the whole run."""
    warmup_steps: int = 715
    """Updates of linear warm-up, before the cosine."""
    max_lr: float = 6e-4
    """Learning rate after the warm-up."""
    min_lr: float = 6e-5
    """Learning rate of the last update."""
    weight_decay: float = 0.1
    """AdamW's decay of tensors with 2 or more dimensions."""
    grad_clip: float = 1.0
    """Largest norm of the gradient of one update."""

    val_every: int = 250
    """Steps between validation losses; 0: never, like all these intervals."""
    val_tokens: int = 10_485_760
    """Validation tokens, the same ones each time."""
    hellaswag_every: int = 250
    """Steps between HellaSwag accuracies."""
    hellaswag_data: Path | None = None
    """HellaSwag as a JSONL file; otherwise Rowan/hellaswag from the hub."""
    sample_every: int = 1000
    """Steps between samples."""
    sample_prompt: str = "Hello, I'm a language model,"
    """What the samples go on from."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; there is one at the end of the run in any case but 0."""
    keep_checkpoints: int = 3
    """Newest checkpoints to keep; 0: all."""

    shuffle: bool = True
    """Visit the windows in a seeded random order, another each epoch; otherwise in turn."""
    seed: int = 1337
    """Seed of the initial weights, the order of the data and the samples."""
    device: str = "auto"
    """cuda, cuda:1, mps or cpu; auto takes the first there is."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the matrix products; auto: bf16 where the device has it in hardware."""
    compile: bool = True
    """Compile the training step. On a CPU only runs of 200 steps or more repay it."""
    loss_rows: int | None = None
    """Tokens whose logits exist at once in the loss. Default by device; 0: all, the plain loss."""
    bf16_grads: bool = False
    """Exchange gradients in bf16: half the traffic between devices, less exact sums."""
    profile: int = 0
    """Trace this many steps with torch.profiler into trace_rank*.json of the log folder."""
    deterministic: bool = False
    """Use deterministic algorithms only: a GPU then repeats a run bit for bit."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too, into tensorboard/ of the log folder."""
    wandb: bool = False
    """Send the metrics to Weights & Biases too."""

    def problems(self, world_size: int) -> list[str]:
        """All that is wrong with these settings for ``world_size`` processes, a line each."""
        c, T = self, self.model.context_length
        counts = [k for k in vars(c) if k.endswith(("_every", "_steps", "_checkpoints"))]
        counts += ["profile"] + ["loss_rows"] * (c.loss_rows is not None)
        found = c.model.problems()
        found += [f"{k} {getattr(c, k)} is negative" for k in counts if getattr(c, k) < 0]
        if c.max_steps < 1 or c.warmup_steps > c.max_steps:
            found.append(f"max_steps {c.max_steps} is below 1 or warmup_steps {c.warmup_steps}")
        if c.micro_batch < 1 or c.batch_tokens < 1:
            found.append(f"micro_batch {c.micro_batch} or batch_tokens {c.batch_tokens} is below 1")
        elif T > 0 and c.batch_tokens % (smallest := c.micro_batch * T * world_size):
            nearest = max(1, round(c.batch_tokens / smallest)) * smallest
            found.append(
                f"batch_tokens {c.batch_tokens} is no multiple of micro_batch {c.micro_batch}"
                f" x context_length {T} x {world_size} processes; {nearest} would be"
            )
        if not 0 <= c.min_lr <= c.max_lr:
            found.append(f"min_lr {c.min_lr} is not between 0 and max_lr {c.max_lr}")
        if not c.grad_clip > 0 or not c.weight_decay >= 0:
            found.append(f"grad_clip {c.grad_clip} or weight_decay {c.weight_decay} is too small")
        if c.val_every and c.val_tokens < T:
            found.append(f"val_tokens {c.val_tokens} is less than one window of {T}")
        if c.hellaswag_every and c.hellaswag_data and not c.hellaswag_data.is_file():
            found.append(f"hellaswag_data {c.hellaswag_data}: no such file")
        for package in ("tensorboard", "wandb"):
            if getattr(c, package) and not importlib.util.find_spec(package):
                found.append(f"--{package} needs a package: pip install {package}")
        return found


# OpenAI's four sizes at their context of 1024; the peak rates are GPT-3's (Brown et al. 2020, table
# 2.1), and the micro-batches fit a GPU of 80 GB by the size of their activations.
OPENAI_SIZES = {
    "gpt2": (GPTConfig(768, 12, 12, 1024), 6e-4, 64),
    "gpt2-medium": (GPTConfig(1024, 16, 24, 1024), 3e-4, 32),
    "gpt2-large": (GPTConfig(1280, 20, 36, 1024), 2.5e-4, 16),
    "gpt2-xl": (GPTConfig(1600, 25, 48, 1024), 2e-4, 8),
}
PRESETS = {
    "gpt-xs": TrainConfig(),
    "quickstart": TrainConfig(
        preset="quickstart",
        data_dir=Path("data/quickstart"),
        log_dir=Path("log/quickstart"),
        model=GPTConfig(d_model=128, n_heads=4, n_layers=4, context_length=128),
        batch_tokens=512,
        micro_batch=4,
        max_steps=600,
        warmup_steps=50,
        max_lr=1e-3,
        min_lr=1e-4,
        val_every=150,
        val_tokens=16_384,
        hellaswag_every=0,
        sample_every=300,
        sample_prompt="The function returns",
        checkpoint_every=300,
        compile=False,  # the compiler would take longer than it saves
    ),
} | {
    name: TrainConfig(preset=name, model=model, max_lr=lr, min_lr=lr / 10, micro_batch=rows)
    for name, (model, lr, rows) in OPENAI_SIZES.items()
}


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of update ``step``: linear to max_lr, then a cosine that ends at min_lr."""
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    length = max(1, config.max_steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / length)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + cosine * (config.max_lr - config.min_lr)


@dataclass(frozen=True)
class World:
    """This process among torchrun's: its rank, their number, its device."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, device: str) -> "World":
        """Reads torchrun's environment; opens the process group where there are several."""
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        chosen = choose_device(device)
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if size > 1:
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        return cls(rank, size, chosen)

    def broadcast(self, make: Callable[[], Result]) -> Result:
        """What ``make`` returns on rank 0, on every rank. Its user errors end them all."""
        box: list[Any] = [None]
        if self.rank == 0:
            try:
                box = [make()]
            except (ValueError, OSError) as error:
                box = [error]
        if self.size > 1:
            dist.broadcast_object_list(box)
        if isinstance(box[0], Exception):
            raise box[0]
        return box[0]


def exchange_in_bf16(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """torch's own hook; under its own name DDP refuses it in a build without CUDA."""
    return bf16_compress_hook(group, bucket)


class Run:
    """A run's state and its chores; ``fit`` is the order in which they are done."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config, self.world, self.step = config, world, 0
        self.metrics = metrics.Metrics(config.log_dir, world.rank == 0)
        bf16 = config.dtype == "bf16" or (config.dtype == "auto" and fast_bf16(world.device))
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        context = config.model.context_length
        self.train_data = TokenDataset(config.data_dir, "train", context)
        self.val_data = TokenDataset(config.data_dir, "val", context)
        for data in (self.train_data, self.val_data):
            data.check_tokens(config.model.vocab_size, world.rank, world.size)

        torch.manual_seed(config.seed)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays fp32
        torch.use_deterministic_algorithms(config.deterministic)
        if config.deterministic:  # cuBLAS asks for it
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self.model = GPT(config.model).to(world.device)
        self.model.loss_rows = config.loss_rows
        groups = self.model.parameter_groups(config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=True)
        self.settings = json.loads(json.dumps(asdict(config), default=str))
        self.settings["data"] = self.train_data.fingerprint()
        self.losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self.best_val, self.skipped = math.inf, 0
        self.resumed_from = self.resume()
        self.saved_step = self.step if self.resumed_from else None

        share = Share(config.batch_tokens // context, config.micro_batch, world.rank, world.size)
        self.micro_steps = share.micro_steps()
        order = {"seed": config.seed, "shuffle": config.shuffle, "start_step": self.step}
        self.loader = DataLoader(self.train_data, share, world.device, **order)
        self.ddp: DistributedDataParallel | None = None
        self.training_model = self.parallel_and_compiled()
        self.signal, self.stopping = checkpoint.StopSignal(), False
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.examples: list[Any] | None = None
        self.pending: Pending | None = None
        self.announce()
        self.clock = time.perf_counter()

    def resume(self) -> Path | None:
        """Goes on where the newest whole checkpoint stands; returns it."""
        log_dir = self.config.log_dir
        if not self.config.resume:
            return None
        folder = self.world.broadcast(lambda: checkpoint.newest_whole(log_dir))
        if folder is None:
            return None
        state = checkpoint.load_state(folder)
        for line in checkpoint.compare_settings(state["settings"], self.settings, folder):
            self.metrics.say(f"resuming with another setting: {line}")
        self.model.load_state_dict(GPT.from_pretrained(folder).state_dict())
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        self.step, self.best_val, self.skipped = state["step"], state["best_val"], state["skipped"]
        self.losses.extend(state["losses"])
        self.metrics.say(f"resumed from {folder}")
        return folder

    def parallel_and_compiled(self) -> torch.nn.Module:
        """The module that is trained. Validation and samples use the raw one, ``self.model``."""
        device, model = self.world.device, self.model
        if self.world.size > 1:
            # Not static_graph: with gradient accumulation it stops synchronising (pytorch#187732).
            ids = [device.index] if device.type == "cuda" else None
            model = self.ddp = DistributedDataParallel(model, ids, gradient_as_bucket_view=True)
            if self.config.bf16_grads:
                self.ddp.register_comm_hook(None, exchange_in_bf16)
        on_cpu, left = device.type == "cpu", self.config.max_steps - self.step
        if not self.config.compile or (on_cpu and left < CPU_COMPILE_STEPS):
            return model
        # A laptop may lack the C++ compiler that Inductor needs: then it runs uncompiled.
        torch._dynamo.config.suppress_errors = on_cpu
        # Below 1, norms and GELU are not kept but computed again in the backward pass, which is
        # little beside a CPU's matrix products. A GPU, which waits for memory, keeps the default.
        torch._functorch.config.activation_memory_budget = 0.95 if on_cpu else 1.0
        # Compiling outside of DDP splits the graph at its buckets, so that the all-reduce of the
        # last layers' gradients overlaps the backward pass of the first.
        return torch.compile(model, dynamic=False)

    def announce(self) -> None:
        """The run's first line, here and in metrics.jsonl."""
        config, world, parameters = self.config, self.world, self.model.num_parameters()
        device = metrics.device_name(world.device)
        peak = metrics.peak_flops(device) if self.dtype == torch.bfloat16 else None
        self.peak_flops = peak and peak * world.size
        settings = {k: v for k, v in self.settings.items() if k != "data"}
        facts = {"parameters": parameters, "device": device, "world_size": world.size}
        facts |= {"dtype": str(self.dtype).removeprefix("torch."), **metrics.provenance()}
        resumed = self.resumed_from and self.resumed_from.name
        self.metrics.write("run", self.step, config=settings, **facts, resumed_from=resumed)
        if world.rank == 0:
            where = (config.log_dir, settings, config.tensorboard, config.wandb)
            self.metrics.trackers = metrics.trackers(*where)
        tokens = len(self.train_data) * config.model.context_length
        self.metrics.say(
            f"{parameters:,} parameters in {facts['dtype']} on {world.size} x {device};"
            f" {config.batch_tokens:,} tokens a step in {self.micro_steps} micro-steps;"
            f" {config.max_steps * config.batch_tokens / tokens:.2f} epochs of {tokens:,} tokens"
        )

    def fit(self) -> None:
        """Trains to the last step, or to a signal."""
        config = self.config
        with attention_backends(self.world.device), self.profiler() as profiler:
            while True:
                last = self.step >= config.max_steps or self.stopping
                if self.due(config.val_every):
                    self.chore("val", self.validate)
                if self.due(config.hellaswag_every):
                    self.chore("hellaswag", self.hellaswag)
                if self.due(config.sample_every) and self.step:
                    self.chore("sample", self.sample)
                if self.due(config.checkpoint_every) or (last and config.checkpoint_every):
                    self.chore("checkpoint", self.save)
                if last:
                    break
                self.update()
                profiler.step()
                if self.step % 100 == 1:  # what has lived so long needs no more of gc's looks
                    gc.collect()
                    gc.freeze()
        self.loader.close()
        self.metrics.close()

    def profiler(self) -> torch.profiler.profile:
        """Traces ``profile`` steps, the fifth and on: those before compile and allocate."""
        path = self.config.log_dir / f"trace_rank{self.world.rank}.json"

        def write(profiler: torch.profiler.profile) -> None:
            profiler.export_chrome_trace(str(path))
            self.metrics.say(f"profile: {path}; open it at https://ui.perfetto.dev")

        def idle(step: int) -> torch.profiler.ProfilerAction:
            return torch.profiler.ProfilerAction.NONE

        active = self.config.profile
        steps = {"wait": 3, "warmup": 1, "active": active, "repeat": 1}
        schedule = torch.profiler.schedule(**steps) if active else idle
        return torch.profiler.profile(schedule=schedule, on_trace_ready=write)

    # -- a step -----------------------------------------------------------------------------------

    def update(self) -> None:
        """Accumulates, clips, updates. Nothing in it waits for the device."""
        if self.launcher and os.getppid() != self.launcher:
            raise ConnectionError("torchrun has died, and with it what watches over the ranks")
        loss = self.accumulate()
        stop = bool(self.signal.name or self.loader.error)
        stats = torch.stack((loss, torch.full_like(loss, stop)))
        if self.world.size > 1:  # before the update: if it fails, this step has not been made
            dist.all_reduce(stats)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        # The fused kernel skips the update where this is 1, without a look from the host. The norm
        # is that of the averaged gradient, so all ranks decide alike.
        self.optimizer.found_inf = (~torch.isfinite(norm)).float()
        lr = learning_rate(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        stats, arrived = torch.cat((stats / self.world.size, norm.reshape(1))), None
        if self.world.device.type == "cuda":
            stats = torch.empty(3, pin_memory=True).copy_(stats, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        pending = (self.step, lr, stats, arrived)
        self.step += 1
        if arrived is not None:  # read the step before, while this one computes
            pending, self.pending = self.pending, pending
        self.report(pending)

    def accumulate(self) -> Tensor:
        """Adds up the gradient of this rank's micro-batches; returns their mean loss."""
        total = torch.zeros((), device=self.world.device)
        bf16 = self.dtype == torch.bfloat16
        for micro_step in range(self.micro_steps):
            inputs, targets = next(self.loader)
            if self.ddp is not None:  # gradients are exchanged once a step
                self.ddp.require_backward_grad_sync = micro_step == self.micro_steps - 1
            with torch.autocast(self.world.device.type, torch.bfloat16, enabled=bf16):
                loss = self.training_model(inputs, targets) / self.micro_steps
            loss.backward()
            total += loss.detach()
        return total

    def report(self, pending: Pending | None) -> None:
        """Logs a step's numbers as soon as they have arrived."""
        if pending is None:
            return
        step, lr, stats, arrived = pending
        if arrived is not None:
            arrived.synchronize()
        loss, stop, norm = stats.tolist()
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        self.stopping |= stop > 0
        skip = {} if math.isfinite(norm) else {"skipped": True}
        self.skipped = self.skipped + 1 if skip else 0
        recent = self.losses
        z = (loss - np.mean(recent)) / np.std(recent) if len(recent) >= SPIKE_LEAST else 0.0
        if math.isfinite(loss):
            recent.append(loss)
        config, speed = self.config, self.config.batch_tokens / seconds
        mfu = self.peak_flops and self.model.flops_per_token() * speed / self.peak_flops
        memory = metrics.peak_memory_gb(self.world.device)
        numbers = {"loss": loss, "z": float(z), "lr": lr, "grad_norm": norm, "ms": seconds * 1e3}
        speeds = {"tokens_per_s": speed, "mfu": mfu, "memory_gb": memory}
        self.metrics.train_step(step, config.max_steps, **numbers, **speeds, **skip)
        if self.skipped == MAX_SKIPPED:
            good = next(iter(checkpoints(config.log_dir)), "none")
            raise FloatingPointError(
                f"{MAX_SKIPPED} gradients in a row were not finite; last good checkpoint: {good}"
            )

    # -- chores -----------------------------------------------------------------------------------

    def due(self, every: int) -> bool:
        """Whether a chore of this interval is due before this step, or at the end."""
        return every > 0 and (self.step % every == 0 or self.step >= self.config.max_steps)

    def chore(self, kind: str, work: Callable[[], dict[str, Any]]) -> None:
        """Does it and logs what it returns; none of its time counts as training."""
        pending, self.pending = self.pending, None
        self.report(pending)
        start = time.perf_counter()
        values = work()
        self.clock = time.perf_counter()
        if values:
            values["seconds"] = round(self.clock - start, 3)
            self.metrics.write(kind, self.step, **values)
            shown = {k: f"{v:.4f}" if isinstance(v, float) else v for k, v in values.items()}
            text = ", ".join(f"{k} {v}" for k, v in shown.items())
            self.metrics.say(f"step {self.step:5d} | {kind}: {text}")

    def validate(self) -> dict[str, Any]:
        """The loss on the first ``val_tokens`` validation tokens, shared among the ranks."""
        tokens, rows = self.config.val_tokens, self.config.micro_batch
        where = {"rank": self.world.rank, "world_size": self.world.size, "dtype": self.dtype}
        device = self.world.device
        loss = validation_loss(self.model, self.val_data, tokens, rows, device, **where)
        self.best_val = min(self.best_val, loss)
        return {"loss": loss, "best": self.best_val}

    def hellaswag(self) -> dict[str, Any]:
        """HellaSwag's accuracies. Where its examples cannot be had, says so once."""
        world, data = self.world, self.config.hellaswag_data
        if self.examples is None:
            try:
                self.examples = world.broadcast(lambda: hellaswag.load_examples(data))
            except (ValueError, OSError) as error:
                self.examples = []
                self.metrics.say(f"HellaSwag is left out: {error}")
        if not self.examples:
            return {}
        where = (world.device, world.rank, world.size, self.dtype)
        chosen = hellaswag.predict(self.model, self.examples, *where)
        return hellaswag.summarize(self.examples, chosen)

    def sample(self) -> dict[str, Any]:
        """A sample, the same one for the same weights."""
        if self.world.rank:
            return {}
        tokenizer, prompt = dataset.get_tokenizer(), self.config.sample_prompt
        idx = torch.tensor([tokenizer.encode(prompt)], device=self.world.device)
        out = self.model.generate(idx, 64, top_k=50, seed=self.config.seed, dtype=self.dtype)
        tokens = [token for token in out[0].tolist() if token != dataset.END_OF_TEXT]
        return {"prompt": prompt, "text": tokenizer.decode(tokens)}

    def save(self) -> dict[str, Any]:
        """Writes a checkpoint. Where it cannot be written, says so and goes on."""
        if self.world.rank or self.step == self.saved_step:
            return {}
        state = {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "settings": self.settings,
            "best_val": self.best_val,
            "skipped": self.skipped,
            "losses": list(self.losses),
        }
        config = self.config
        try:
            keep = config.keep_checkpoints
            path = checkpoint.save(config.log_dir, self.step, self.model, state, keep)
        except OSError as error:
            self.metrics.say(f"no checkpoint: {error}; training goes on")
            return {}
        self.saved_step = self.step
        return {"path": path.name}


def prepare(config: TrainConfig, world_size: int) -> IO[str]:
    """Checks settings and data, writes the quickstart's shards; returns the log folder's lock."""
    problems = config.problems(world_size)
    if problems:
        raise ValueError("; ".join(problems))
    if config.preset != "quickstart":  # whose shards are written below
        TokenDataset(config.data_dir, "train", config.model.context_length)
    lock = checkpoint.lock(config.log_dir)
    if not config.resume and checkpoint.holds_run(config.log_dir):
        raise ValueError(f"{config.log_dir} holds a run: --resume it or give another --log-dir")
    if config.preset == "quickstart" and not any(config.data_dir.glob("*.npy")):
        corpus = {"source": "stdlib", "shard_size": 50_000}
        dataset.prepare(dataset.DatasetConfig(data_dir=config.data_dir, **corpus))
    return lock


def train(config: TrainConfig, world: World) -> None:
    """The whole run. Raises ValueError or OSError for a user's mistake."""
    locks: list[IO[str]] = []  # held until the run ends
    world.broadcast(lambda: locks.append(prepare(config, world.size)))
    run = Run(config, world)
    try:
        run.fit()
    except (OSError, RuntimeError) as error:  # a shard is gone, a rank has died, memory is out
        if config.checkpoint_every:
            run.chore("checkpoint", run.save)
        if isinstance(error, dist.DistBackendError) or "gloo" in str(error):
            reason = str(error).splitlines()[0]
            raise ConnectionError(
                f"another rank has died after step {run.step}: see its message, then go on with"
                f" the same command and --resume ({reason})"
            ) from error
        raise
    say, log_dir = run.metrics.say, config.log_dir
    if run.step < config.max_steps:
        if run.loader.error:
            raise run.loader.error
        name = run.signal.name or "another rank"
        saved = run.saved_step is not None
        how = "go on with the same command and --resume" if saved else "there is no checkpoint"
        say(f"stopped by {name} after {run.step} steps; {how}")
    elif world.rank == 0:
        try:
            plot.plot_run(log_dir)
        except (ValueError, OSError, ImportError) as error:
            say(f"no plot: {error}")
        say(f"done: metrics.jsonl, plot.png, report.md and checkpoints are in {log_dir}/; now try")
        say(f'python eval.py --checkpoint {log_dir} --prompt "{config.sample_prompt}"')


def main() -> None:
    """Reads the flags: --preset chooses the defaults that the other flags override."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, default="gpt-xs")
    rank = os.environ.get("RANK", "0")
    try:
        preset = PRESETS[parser.parse_known_args()[0].preset]
        config = tyro.cli(TrainConfig, default=preset, description=__doc__)
        train(config, World.join(config.device))
    except (ValueError, OSError, *RUN_FAULTS) as error:
        message = str(error)
        if isinstance(error, torch.OutOfMemoryError):
            half = max(1, config.micro_batch // 2)
            message = f"out of GPU memory at --micro-batch {config.micro_batch}; use {half}"
        print(f"train.py: {message}" + (f" (rank {rank})" if rank != "0" else ""), file=sys.stderr)
        raise SystemExit(1 if isinstance(error, RUN_FAULTS) else 2) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
