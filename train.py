"""Train GPT-2 on shards of tokens: on one device, or under torchrun on many, with equal results.

    torchrun --standalone --nproc_per_node=8 train.py        the default run: 124M, 10B tokens
    python train.py --preset quickstart                      minutes on a CPU, nothing downloaded
    python train.py --preset finetune --init-from gpt2 --data-dir data/mine      on your own text
    python train.py --resume                                 continue from the newest checkpoint

Everything is written to --log-dir: metrics.jsonl, plot.png and checkpoints, which are Hugging Face
models. Steps count from 0: step s follows s optimizer updates, and its logged loss is that of the
weights before its own update.
"""

from common import (
    END_OF_TEXT,
    Bounds,
    DistInfo,
    DtypeName,
    FolderLock,
    check_options,
    choose_dtype,
    exit_with_one_line,
    first_line,
    lock_folder,
    parse_options,
    require_regular_file,
)

import argparse
import gc
import hashlib
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch._functorch.config
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import dataset
import hellaswag
import metrics
import plot
from data_loader import StepLayout, TokenDataset, TokenLoader
from eval import Sampler, SamplingOptions, encode_prompt, validation_loss
from metrics import MetricsLogger
from model import GPT, GPTConfig, read_shape, weights_sha256
from optim import OptimizerName, Schedule, build_optimizer, learning_rate, wrap_ddp

Preset = Literal["gpt-xs", "quickstart", "finetune", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]

# Consecutive updates skipped before the run ends with an error; overflows in fp16 do not count.
MAX_SKIPPED = 10
# Of several ranks, when one may be gone: torchrun kills the others 30 s after its SIGTERM.
HANG_SECONDS = 20.0
CPU_COMPILE_STEPS = 200  # compiling takes a CPU about a minute: fewer steps do not recoup it
FIRST_TRACED_STEP = 5  # with --profile, counted from 1: earlier ones compile and allocate
# Those that determine the learning rate of a step.
SCHEDULE_SETTINGS = ("schedule", "cooldown", "max_steps", "warmup_steps", "max_lr", "min_lr")
# Ranks may differ in these: paths on their machines, and what rank 0 alone uses.
LOCAL_SETTINGS = ("data_dir", "log_dir", "hellaswag_data", "device", "tensorboard", "wandb")

Count = Annotated[int, Bounds(0, 10**9)]  # of steps or files; 0 stands for none

# ---- configuration -------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. --preset sets all of them; any other flag overrides the preset."""

    preset: Preset = "gpt-xs"
    """gpt-xs: GPT-2 124M with a context of 512, on 10B tokens. quickstart: a small model on the
    documentation in Python's standard library. finetune: the model of --init-from, with at most
    512 tokens of its context, on a few million tokens of your own. gpt2, gpt2-medium, gpt2-large,
    gpt2-xl: OpenAI's four sizes with their context of 1024."""
    data_dir: Path = Path("edu_fineweb10B")
    """Folder of token shards, as dataset.py writes them."""
    log_dir: Path = Path("log")
    """Folder to write to: metrics.jsonl, step_*/ checkpoints, plot.png, report.md."""
    resume: bool = False
    """Resume from the latest valid checkpoint in --log-dir, or start from scratch without one."""
    init_from: str | None = None
    """Start from the weights of this model instead of random ones: a checkpoint, a log folder (its
    newest) or a hub id such as gpt2. The shape is that model's; --model.context-length may be less.
    A checkpoint in --log-dir counts first with --resume."""
    model: GPTConfig = field(default_factory=GPTConfig)

    batch_tokens: Annotated[int, Bounds(1, 2**40)] = 524_288
    """Tokens in a step, over all devices."""
    micro_batch: Annotated[int, Bounds(1, 2**20)] = 64
    """Sequences per device and micro-step; gradients are accumulated to --batch-tokens."""
    max_steps: Annotated[int, Bounds(1, 10**9)] = 19_073
    """Optimizer updates in the whole run."""
    optimizer: OptimizerName = "adamw"
    """adamw; or muon for the matrices of the blocks, and AdamW for everything else."""
    muon_lr_scale: Annotated[float, Bounds(0, 1000)] = 3.0
    """Muon's learning rate as a multiple of AdamW's."""
    schedule: Schedule = "cosine"
    """How the learning rate falls after the warm-up: cosine or linear; wsd: constant, then linear
    over the last --cooldown of the steps."""
    cooldown: Annotated[float, Bounds(0, 1)] = 0.4
    """The share of --max-steps in which the schedule wsd decays."""
    warmup_steps: Count = 715
    """Updates of linear warm-up before the decay."""
    max_lr: Annotated[float, Bounds(0, 100)] = 6e-4
    """Peak learning rate, at the end of the warm-up."""
    min_lr: Annotated[float, Bounds(0, 100)] = 6e-5
    """Learning rate of the last update."""
    weight_decay: Annotated[float, Bounds(0, 100)] = 0.1
    """Weight decay, on tensors of 2 or more dimensions."""
    grad_clip: Annotated[float, Bounds(1e-9, 1e9)] = 1.0
    """Maximum norm of the gradient; a larger gradient is scaled down to it."""

    val_every: Count = 250
    """Steps between validation losses; 0 disables them, as for every interval below."""
    val_tokens: Annotated[int, Bounds(0, 2**50)] = 10_485_760
    """Validation tokens, the same ones each time."""
    hellaswag_every: Count = 250
    """Steps between HellaSwag evaluations."""
    hellaswag_data: Path | None = None
    """HellaSwag as a JSONL file. Default: Rowan/hellaswag from the Hugging Face hub."""
    sample_every: Count = 1000
    """Steps between samples."""
    sample_prompt: str = "Hello, I'm a language model,"
    """The text that the samples continue."""
    checkpoint_every: Count = 1000
    """Steps between checkpoints. Unless this is 0 there is also one at the end of the run."""
    keep_checkpoints: Count = 3
    """Newest checkpoints to keep; 0: all."""

    shuffle: bool = True
    """Read the data in a seeded random order, a new one each epoch; otherwise as it is stored."""
    seed: Annotated[int, Bounds(-(2**63), 2**64 - 1)] = 1337
    """Seed of the initial weights, the order of the data and the samples."""
    device: str = "auto"
    """cuda, cuda:1, mps or cpu; auto: the machine's accelerator, or the CPU without one."""
    dtype: DtypeName = "auto"
    """Precision of the matrix products; auto: bf16 where the device has it in hardware, fp16 on
    other GPUs. The loss is scaled for fp16, and steps whose gradient overflows are skipped."""
    compile: bool = True
    """Compile the training step; on a CPU only if at least 200 steps remain, on mps never."""
    recompute: Annotated[float, Bounds(0, 1)] = 0.0
    """Share of the blocks that are computed again in the backward pass, instead of keeping their
    activations: less memory for more time."""
    loss_rows: Annotated[int | None, Bounds(0, 2**40)] = None
    """Tokens per chunk of the loss, which bounds the memory of the logits. Default: by device; 0:
    no chunks, the plain loss."""
    bf16_grads: bool = False
    """Exchange gradients in bf16: half the traffic between devices, less exact sums."""
    profile: Annotated[int, Bounds(0, 10_000)] = 0
    """Trace this many steps with torch.profiler into trace_rank*.json of the log folder."""
    deterministic: bool = False
    """Use deterministic algorithms only: a GPU then repeats a run bit for bit."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too, into tensorboard/ of the log folder."""
    wandb: bool = False
    """Send the metrics to Weights & Biases too."""

    def validate(self, world_size: int) -> list[str]:
        """One message for each problem of these settings with ``world_size`` processes."""
        problems = check_options(self)
        add = problems.append
        # The shape's own ranges are among those above; the rest needs a shape within them.
        problems += [problem for problem in self.model.validate() if problem not in problems]
        if self.warmup_steps > self.max_steps:
            add(f"warmup_steps {self.warmup_steps} must not exceed max_steps {self.max_steps}")
        context = self.model.context_length
        micro_step_tokens = self.micro_batch * context * world_size  # over all processes
        if micro_step_tokens > 0 and self.batch_tokens % micro_step_tokens != 0:
            nearest = max(1, round(self.batch_tokens / micro_step_tokens)) * micro_step_tokens
            add(
                f"batch_tokens {self.batch_tokens} must be a multiple of {micro_step_tokens}"
                f" (micro_batch {self.micro_batch} x context_length {context} x {world_size}"
                f" processes);"
                f" nearest: {nearest}"
            )
        if self.min_lr > self.max_lr:
            add(f"min_lr {self.min_lr} must be between 0 and max_lr {self.max_lr}")
        if self.profile > 0 and self.max_steps < FIRST_TRACED_STEP:
            add(
                f"profile traces from step {FIRST_TRACED_STEP} on; max_steps {self.max_steps} ends"
                " before it"
            )
        if self.val_every and self.val_tokens < context:
            add(f"val_tokens {self.val_tokens} must be at least one window of {context} tokens")
        data = self.hellaswag_data
        if self.hellaswag_every and data is not None:
            try:
                require_regular_file(data)
            except FileNotFoundError:
                add(f"hellaswag_data {data}: no such file")
            except (ValueError, OSError) as error:
                add(f"hellaswag_data: {first_line(error)}")
        for package, wanted in (("tensorboard", self.tensorboard), ("wandb", self.wandb)):
            if wanted and importlib.util.find_spec(package) is None:
                add(f"--{package} needs a package: pip install {package}")
        return problems


def openai_size(
    preset: Preset, d_model: int, n_heads: int, n_layers: int, max_lr: float, micro_batch: int
) -> TrainConfig:
    """One of OpenAI's sizes, with their context of 1024.

    Learning rates are GPT-3's (Brown et al. 2020, table 2.1). The micro-batches are estimated from
    the size of the activations to fit a GPU of 80 GB.
    """
    model = GPTConfig(d_model=d_model, n_heads=n_heads, n_layers=n_layers, context_length=1024)
    min_lr = max_lr / 10
    return TrainConfig(
        preset=preset, model=model, max_lr=max_lr, min_lr=min_lr, micro_batch=micro_batch
    )


QUICKSTART = TrainConfig(
    preset="quickstart",
    data_dir=Path("data/quickstart"),
    log_dir=Path("log/quickstart"),
    model=GPTConfig(d_model=128, n_heads=4, n_layers=4, context_length=128),  # 7.2M parameters
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
)
FINETUNE_CONTEXT = 512  # tokens: a longer context of the source is cropped to that
FINETUNE = TrainConfig(
    preset="finetune",
    log_dir=Path("log/finetune"),
    batch_tokens=16_384,
    micro_batch=4,
    max_steps=300,  # 4.9M tokens
    warmup_steps=20,
    max_lr=5e-5,
    min_lr=0.0,
    val_every=25,
    val_tokens=65_536,
    hellaswag_every=0,
    sample_every=50,
    checkpoint_every=100,
)
PRESETS: dict[str, TrainConfig] = {
    config.preset: config
    for config in (
        TrainConfig(),
        QUICKSTART,
        FINETUNE,
        openai_size("gpt2", d_model=768, n_heads=12, n_layers=12, max_lr=6e-4, micro_batch=64),
        openai_size(
            "gpt2-medium", d_model=1024, n_heads=16, n_layers=24, max_lr=3e-4, micro_batch=32
        ),
        openai_size(
            "gpt2-large", d_model=1280, n_heads=20, n_layers=36, max_lr=2.5e-4, micro_batch=16
        ),
        openai_size("gpt2-xl", d_model=1600, n_heads=25, n_layers=48, max_lr=2e-4, micro_batch=8),
    )
}


def scheduled_lr(config: TrainConfig, step: int) -> float:
    """The learning rate of update ``step``."""
    return learning_rate(
        step,
        config.max_steps,
        config.warmup_steps,
        config.max_lr,
        config.min_lr,
        config.schedule,
        config.cooldown,
    )


# ---- parts of the setup --------------------------------------------------------------------------


def compiler_problem(device: torch.device) -> str | None:
    """Compile a tiny function: the error's first line, or None where torch.compile works.

    A laptop may lack the C++ compiler that Inductor needs. The model itself would fail only in its
    first backward pass, where torch's fall-back to uncompiled code does not apply.
    """
    x = torch.ones(2, device=device, requires_grad=True)
    try:
        torch.compile(torch.sin)(x).sum().backward()
    except Exception as error:  # whatever the compiler raises: the run goes on without it
        return first_line(error)
    return None


def compile_model(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model, or its DDP wrapper, compiled for static shapes."""
    from torch._inductor import config as inductor  # takes a second

    # A budget below 1 computes norms and GELU again in the backward pass instead of keeping them.
    # On a CPU that is nothing beside the matrix products, and saves a fifth of the memory at 124M
    # in bf16. On a GPU these operations wait for memory.
    torch._functorch.config.activation_memory_budget = 0.95 if device.type == "cpu" else 1.0
    # Otherwise Inductor chooses between kernels by their time, and they add in different orders.
    inductor.deterministic = torch.are_deterministic_algorithms_enabled()
    # Compiling the DDP wrapper, not the module in it, splits the graph at its buckets, so that the
    # all-reduce of the last layers' gradients overlaps the backward pass of the first.
    return torch.compile(model, dynamic=False)  # type: ignore[return-value]  # typed as a callable


def start_profiler(path: Path, steps: int, logger: MetricsLogger) -> torch.profiler.profile:
    """Trace ``steps`` steps, beginning with FIRST_TRACED_STEP."""

    def write(profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(str(path))
        logger.print(f"profile: {path}; open it at https://ui.perfetto.dev")

    profiler = torch.profiler.profile(
        schedule=torch.profiler.schedule(
            wait=FIRST_TRACED_STEP - 2, warmup=1, active=steps, repeat=1
        ),
        on_trace_ready=write,
    )
    profiler.start()
    return profiler


def with_initial_shape(config: TrainConfig, preset: TrainConfig, info: DistInfo) -> TrainConfig:
    """These options with the shape of the model that the run starts from, but for --model flags.

    Raises ValueError that names all flags that contradict that shape, and ValueError or
    FileNotFoundError, on all ranks, where there is no such model.
    """
    # A resumed run no longer needs its source, which may be gone. Flags that contradict the
    # checkpoint are refused where it is loaded.
    if config.resume:
        own = info.run_on_rank_0(lambda: checkpoint.latest_valid(config.log_dir))
        if own is not None:
            shape = info.run_on_all(lambda: read_shape(own))
            return parse_options(TrainConfig, __doc__, default=replace(preset, model=shape))
    source = config.init_from
    if source is None:
        raise ValueError(
            f"--preset {config.preset} needs a model to start from: add --init-from gpt2, or a"
            " checkpoint or log folder"
        )
    shape = info.run_on_all(lambda: read_shape(checkpoint.find_model(source, check=True)))
    default = shape
    if config.preset == "finetune":
        default = replace(shape, context_length=min(shape.context_length, FINETUNE_CONTEXT))
    config = parse_options(TrainConfig, __doc__, default=replace(preset, model=default))
    problems = []
    for name, wanted in asdict(config.model).items():
        limit = getattr(shape, name)
        if name == "context_length" and wanted > limit:
            problems.append(f"model.{name} {wanted} must be at most {limit} as in {source}")
        elif name != "context_length" and wanted != limit:
            problems.append(f"model.{name} {wanted} must be {limit} as in {source}")
    if problems:
        raise ValueError("; ".join(problems + config.validate(info.world_size)))
    return config


def open_data(config: TrainConfig) -> tuple[TokenDataset, TokenDataset]:
    """The training and the validation split. Raises ValueError when they are not complete."""
    dataset.check_complete(config.data_dir)
    context = config.model.context_length
    train_data = TokenDataset(config.data_dir, "train", context)
    return train_data, TokenDataset(config.data_dir, "val", context)


def load_hellaswag(config: TrainConfig, device: torch.device) -> list[hellaswag.Example]:
    """The examples, all of which the model can take: that is found out before the first step.

    Raises ValueError or OSError when a file of the user's cannot be used, and ConnectionError
    when the hub's data set cannot.
    """
    path = config.hellaswag_data
    try:
        examples = hellaswag.load_examples(path)
        hellaswag.check_vocabulary(examples, config.model.vocab_size)
        # Raises for an ending that is too long. The evaluations use what is laid out here.
        hellaswag.pack_for(device, examples, config.model.context_length)
    except Exception as error:
        if path is not None:
            raise
        raise ConnectionError(first_line(error)) from error
    return examples


# ---- a run ---------------------------------------------------------------------------------------


class Run:
    """The parts of a run, for the training loop and for ``on_step`` callbacks."""

    def __init__(
        self, config: TrainConfig, dist_info: DistInfo, lock: FolderLock | None = None
    ) -> None:
        """Open the data, build the model or load it from a checkpoint, and report the start.

        What can fail on one rank alone is done by ``run_on_all``: then all of them stop.
        ``lock`` is that of the log folder, on rank 0.
        """
        self.config = config
        self.dist_info = dist_info
        self.lock = lock
        self.lost_folder = False  # the log folder is no longer the one that was locked
        rank = dist_info.rank
        world_size = dist_info.world_size
        device = dist_info.device
        context = config.model.context_length
        self.train_data, self.val_data = dist_info.run_on_all(lambda: open_data(config))
        fingerprint = dist_info.run_on_all(
            lambda: self.train_data.fingerprint() + self.val_data.fingerprint()
        )
        digest = hashlib.sha256(json.dumps(fingerprint).encode()).hexdigest()
        dist_info.require_equal({"the digest of the shards in data_dir": digest})
        # A token outside the vocabulary would crash a GPU hours later, with an error that does not
        # name it.
        checked = dist_info.run_on_all(
            lambda: [
                data.check_tokens(config.model.vocab_size, rank, world_size)
                for data in (self.train_data, self.val_data)
            ]
        )

        torch.manual_seed(config.seed)
        torch.set_float32_matmul_precision("high")  # TF32 for what is computed in fp32
        torch.use_deterministic_algorithms(config.deterministic)
        if config.deterministic:  # required by cuBLAS, before its first call
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self.dtype = choose_dtype(config.dtype, device)
        dist_info.require_equal({"dtype": self.dtype})  # "auto" depends on the hardware
        self.prompt: list[int] = []  # the tokens that the samples continue
        if config.sample_every:
            self.prompt = encode_prompt(config.sample_prompt, config.model.vocab_size)
        # Initialized on the CPU, so that the weights of a seed do not depend on the device.
        self.model = GPT(config.model).to(device)
        self.model.loss_chunk_rows = config.loss_rows
        self.model.recomputed_blocks = math.ceil(config.recompute * config.model.n_layers)
        self.sampler = Sampler(self.model, self.dtype)
        self.optimizer = build_optimizer(
            self.model, config.weight_decay, config.optimizer, config.muon_lr_scale
        )
        # Gradients too small for fp16 would be 0: they are those of the loss times a scale, which
        # halves when one is too large and doubles after 2,000 steps without.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        device_name = metrics.device_name(device)
        dtype_name = str(self.dtype).removeprefix("torch.")
        self.logger = MetricsLogger(
            config.log_dir,
            enabled=rank == 0,
            device=device,
            max_steps=config.max_steps,
            tokens_per_step=config.batch_tokens,
            flops_per_step=self.model.flops_per_token() * config.batch_tokens,
            peak_flops=metrics.peak_flops(device_name, dtype_name, world_size),
        )

        # As JSON's types: a checkpoint stores them, and must be readable without unpickling.
        self.settings = json.loads(json.dumps(asdict(config), default=str))
        self.settings["data"] = fingerprint
        self.settings["init_sha256"] = None  # of the weights that the run has started from
        self.step = 0  # updates made so far
        self.updating = False  # the weights are being changed, and are those of no step
        self.ending = False  # there will be no further step
        self.failed = False  # because of an error
        self.wait_limit: float | None = None  # see limit_wait
        self.saved_step: int | None = None  # the step of the newest checkpoint
        self.writer = checkpoint.Writer(config.log_dir, keep=config.keep_checkpoints)
        self.save_seconds = 0.0  # that training waited for the checkpoint that is being written
        self.save_problem = ""  # why the newest checkpoint was not saved
        resumed_from = self._resume() if config.resume else None
        if resumed_from is None and config.init_from is not None:
            self._initialize_from(config.init_from)

        # The same weights, wrapped for training. Evaluations, samples and checkpoints use the plain
        # module: their shapes vary, and its state_dict keys have no wrapper's prefix.
        self.training_model: torch.nn.Module = self.model
        self.ddp: DistributedDataParallel | None = None
        if world_size > 1:
            self.training_model = self.ddp = wrap_ddp(self.model, device, config.bf16_grads)
        steps_left = config.max_steps - self.step
        # Not on mps, where compiled code may compute other numbers (pytorch#171764).
        worthwhile = device.type != "cpu" or steps_left >= CPU_COMPILE_STEPS
        if config.compile and worthwhile and device.type != "mps":
            problem = compiler_problem(device)
            if problem is None:
                self.training_model = compile_model(self.training_model, device)
            else:
                self.logger.print(f"training without torch.compile: {problem}")

        layout = StepLayout(config.batch_tokens // context, config.micro_batch, rank, world_size)
        self.micro_steps = layout.micro_steps()
        batches = layout.batches(len(self.train_data), config.seed, config.shuffle, self.step)
        # Three steps ahead, to ride out short stalls of the disk.
        self.loader = TokenLoader(self.train_data, batches, device, prefetch=3 * self.micro_steps)

        # Before the first line of metrics: a file of the user's that cannot be used is refused.
        self.hellaswag_examples = self._load_hellaswag() if config.hellaswag_every else []
        private = ("data", "init_sha256")  # hundreds of lines, and what the line has already
        public_settings = {k: v for k, v in self.settings.items() if k not in private}
        dist_info.run_on_all(
            lambda: self.logger.start(
                self.step,
                config=public_settings,
                tensorboard=config.tensorboard,
                wandb=config.wandb,
                dataset=self.train_data.name,
                parameters=self.model.num_parameters(),
                device=device_name,
                world_size=world_size,
                dtype=dtype_name,
                resumed_from=resumed_from.name if resumed_from is not None else None,
                init_from=self.settings["init_from"],
                init_sha256=self.settings["init_sha256"],
            )
        )
        no_mfu = metrics.unknown_peak(device, device_name, dtype_name)
        if no_mfu is not None:
            self.logger.print(no_mfu)
        if not all(checked):
            self.logger.print(
                "checking all shards takes more than a minute; it continues in the background"
            )
        tokens = len(self.train_data) * context
        self.logger.print(
            f"{self.model.num_parameters():,} parameters, computed in {dtype_name} on"
            f" {world_size} x {device_name}; {config.batch_tokens:,} tokens a step in"
            f" {self.micro_steps} micro-steps;"
            f" {config.max_steps * config.batch_tokens / tokens:.2f} epochs of {tokens:,} tokens"
        )
        # Installed last: until now nothing is lost if a signal ends the process at once.
        self.stop_signal = checkpoint.StopSignal()
        if world_size > 1:
            self.logger.on_wait = self.limit_wait

    def limit_wait(self) -> None:
        """Raise DistBackendError when the process has to end and waits for a step in vain.

        Where a rank has died, NCCL waits ten minutes for its part of the step. torchrun sends the
        other ranks a SIGTERM, and would kill them after 30 s.
        """
        if not self.failed and not self.stop_signal.name:
            return
        now = time.monotonic()
        if self.wait_limit is None:
            self.wait_limit = now + HANG_SECONDS
        elif now > self.wait_limit:
            self.updating = True  # on the device, or about to be: it cannot be saved
            raise dist.DistBackendError(f"the step did not end within {HANG_SECONDS} s")

    def _initialize_from(self, source: str) -> None:
        """Replace the random weights by those of a checkpoint or a hub's model."""

        def load() -> str:
            folder = checkpoint.find_model(source, check=True)
            saved = GPT.from_pretrained(folder)
            saved.crop_context(self.config.model.context_length)
            # In place: the optimizer already refers to these parameters.
            self.model.load_state_dict(saved.state_dict())
            return weights_sha256(folder)

        digest = self.dist_info.run_on_all(load)
        self.dist_info.require_equal({f"the SHA-256 of {source}": digest})
        self.settings["init_sha256"] = digest
        self.logger.print(f"starting from the weights of {source}, SHA-256 {digest}")

    def _resume(self) -> Path | None:
        """Load the latest valid checkpoint; None when there is none."""
        log_dir = self.config.log_dir
        folder = self.dist_info.run_on_rank_0(lambda: checkpoint.latest_valid(log_dir))
        if folder is None:
            return None
        state = self.dist_info.run_on_all(lambda: self._load_checkpoint(folder))
        torch.set_rng_state(state.rng)
        self.logger.best_val = state.best_val
        # On a GPU a checkpoint may be of the very step that ended the run.
        self.logger.skipped_in_a_row = min(state.skipped, MAX_SKIPPED - 1)
        self.logger.losses.extend(state.losses)
        self.step = self.saved_step = state.step
        self.logger.print(f"resumed from {folder}")
        return folder

    def _load_checkpoint(self, folder: Path) -> checkpoint.TrainingState:
        """Load model and optimizer, and report the settings that have changed."""
        state = checkpoint.load_state(folder)
        for change in checkpoint.compare_settings(state.settings, self.settings, folder):
            self.logger.print(f"resuming with another setting: {change}")
        for name in ("init_from", "init_sha256"):  # which stay true
            self.settings[name] = state.settings.get(name)
        saved = {**self.settings, **checkpoint.EARLIER_SETTINGS, **state.settings}
        last = self.config.max_steps - 1
        if any(saved[name] != self.settings[name] for name in SCHEDULE_SETTINGS):
            self.logger.print(
                f"the learning rate follows the new settings as if they had been used from step 0:"
                f" {scheduled_lr(self.config, min(state.step, last)):.2e} at step {state.step},"
                f" {scheduled_lr(self.config, last):.2e} at step {last}"
            )
        # In place: the optimizer already refers to these parameters.
        checkpoint.load_model(self.model, folder)
        checkpoint.load_optimizer(self.optimizer, state.optimizer, folder)
        if state.scaler:
            self.scaler.load_state_dict(state.scaler)
        return state

    def _load_hellaswag(self) -> list[hellaswag.Example]:
        """The examples, or none and a message where the hub's cannot be had."""
        config = self.config
        device = self.dist_info.device
        try:
            return self.dist_info.run_on_rank_0(lambda: load_hellaswag(config, device))
        except (ValueError, OSError) as error:
            if config.hellaswag_data is not None:
                raise
            self.logger.print(f"HellaSwag is skipped: {error}")
            return []


# ---- what is due between steps -------------------------------------------------------------------

# All of it uses the uncompiled model: each new shape, such as the last batch of the validation
# tokens, would be compiled again.


def log_validation_loss(run: Run) -> None:
    with run.logger.timed("val", run.step) as row:
        loss = validation_loss(
            run.model,
            run.val_data,
            run.config.val_tokens,
            run.config.micro_batch,
            run.dist_info.device,
            rank=run.dist_info.rank,
            world_size=run.dist_info.world_size,
            dtype=run.dtype,
        )
        check_log_folder(run)  # before each line, since an evaluation may take minutes
        run.logger.best_val = min(run.logger.best_val, loss)
        row.update(loss=loss, best=run.logger.best_val)


def log_hellaswag(run: Run) -> None:
    if not run.hellaswag_examples:
        return
    with run.logger.timed("hellaswag", run.step) as row:
        predictions = hellaswag.predict(
            run.model,
            run.hellaswag_examples,
            run.dist_info.device,
            rank=run.dist_info.rank,
            world_size=run.dist_info.world_size,
            dtype=run.dtype,
        )
        check_log_folder(run)
        row.update(hellaswag.summarize(run.hellaswag_examples, predictions))


def log_sample(run: Run) -> None:
    """Log how the model continues the prompt, with the same seed each time."""
    is_random = run.step == 0 and run.settings["init_from"] is None  # and has nothing to say
    if run.dist_info.rank != 0 or is_random:
        return
    tokenizer = dataset.get_tokenizer()
    with run.logger.timed("sample", run.step) as row:
        idx = torch.tensor([run.prompt], device=run.dist_info.device)  # (1, T)
        options = SamplingOptions(max_new_tokens=64, top_k=50, seed=run.config.seed)
        run.sampler.update()
        sample = run.sampler.generate(idx, options)
        tokens = [token for token in sample[0].tolist() if token != END_OF_TEXT]
        row.update(prompt=run.config.sample_prompt, text=tokenizer.decode(tokens))


def attempt(run: Run, name: str, chore: Callable[[Run], None]) -> None:
    """Run a chore that training can do without: if it fails, that is reported."""
    try:
        chore(run)
    except Exception as error:
        # Where the other ranks wait for this one's part, they would wait in vain.
        if run.lost_folder or (name == "hellaswag" and run.dist_info.world_size > 1):
            raise
        run.logger.print(f"step {run.step:5d} | {name} is skipped: {first_line(error)}")


def save_checkpoint(run: Run) -> None:
    """Start to save this step, on rank 0, unless it is saved. A full disk does not end the run."""
    if run.dist_info.rank != 0:
        return
    with run.logger.timed("checkpoint", run.step):  # reported when the folder is complete
        start = time.perf_counter()
        report_checkpoint(run, wait=True)  # one is written at a time; it may be that of this step
        if run.step == run.saved_step:
            return
        # Built inside the block: on entering it the logger has read the numbers of the last step.
        state = checkpoint.TrainingState(
            step=run.step,
            optimizer=run.optimizer.state_dict(),
            rng=torch.get_rng_state(),
            settings=run.settings,
            best_val=run.logger.best_val,
            skipped=run.logger.skipped_in_a_row,
            losses=list(run.logger.losses),
            scaler=run.scaler.state_dict(),
        )
        try:
            run.writer.start(run.model, state)
        except OSError as error:
            report_unsaved(run, error)
        run.save_seconds = time.perf_counter() - start


def report_checkpoint(run: Run, wait: bool = False) -> None:
    """Report the checkpoint that was being written, if that has ended; ``wait`` until it has."""
    try:
        saved = run.writer.finished(wait)
    except OSError as error:
        report_unsaved(run, error)
        return
    if saved is not None:
        run.saved_step = saved.step
        row = {
            "path": saved.folder.name,
            "seconds": round(run.save_seconds, 3),
            "write_seconds": round(saved.seconds, 3),
        }
        run.logger.report("checkpoint", saved.step, row)


def report_unsaved(run: Run, error: Exception) -> None:
    """Report that a checkpoint could not be written; ``report_end`` repeats it of the last."""
    problem = run.save_problem = first_line(error)
    run.logger.print(
        f"checkpoint not saved: {problem}{'' if run.ending else '; training continues'}"
    )


def check_log_folder(run: Run) -> None:
    """Raise OSError when the log folder was renamed or replaced: another run may be there."""
    try:
        if run.lock is not None:
            run.lock.check()
    except OSError:
        run.lost_folder = True
        run.logger.enabled = False  # nothing more is written there
        raise


# ---- the training loop ---------------------------------------------------------------------------


def training_loop(run: Run) -> Iterator[None]:
    """Train until ``max_steps`` or a signal to stop. Yields before each step, for callbacks.

    ``run.step`` counts the updates. Nothing in a step waits for the device: the logger reads the
    step's numbers, on a GPU one step later.
    """
    config = run.config
    world_size = run.dist_info.world_size
    device = run.dist_info.device
    logger = run.logger
    launcher_pid = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def is_due(every: int) -> bool:
        return every > 0 and (run.step % every == 0 or run.step >= config.max_steps)

    while True:
        # ---- what is due before this step
        check_log_folder(run)
        report_checkpoint(run)
        run.ending = run.step >= config.max_steps or logger.stop_requested
        # The checkpoint first, so that no failure of the others can cost these steps. A run that is
        # resumed from it repeats the others.
        if is_due(config.checkpoint_every) or (run.ending and config.checkpoint_every > 0):
            save_checkpoint(run)
        if is_due(config.val_every):
            log_validation_loss(run)
        if is_due(config.hellaswag_every):
            attempt(run, "hellaswag", log_hellaswag)
        if is_due(config.sample_every):
            attempt(run, "sample", log_sample)
        if run.ending:
            break
        yield

        # An orphaned rank would run on, with nothing to stop it when another rank dies.
        if launcher_pid is not None and os.getppid() != launcher_pid:
            raise ConnectionError("torchrun has died, and nothing supervises the ranks any more")

        # ---- the gradient of the step, a micro-batch at a time
        loss_sum = torch.zeros((), device=device)
        for micro_step in range(run.micro_steps):
            inputs, targets = next(run.loader)  # (B, T) each
            # DDP exchanges gradients in the last backward pass of the step only. This is what its
            # no_sync() sets, without a second copy of the lines below.
            if run.ddp is not None:
                run.ddp.require_backward_grad_sync = micro_step == run.micro_steps - 1
            with torch.autocast(device.type, run.dtype, enabled=run.dtype != torch.float32):
                loss = run.training_model(inputs, targets) / run.micro_steps
            run.scaler.scale(loss).backward()
            loss_sum += loss.detach()  # on the device: to read it here would wait for the GPU

        # ---- the mean loss of all ranks, and whether one of them has to stop. Before the update,
        # ---- so that gloo's error for a rank that has died leaves the step undone.
        stop = bool(run.stop_signal.name or run.loader.error)
        stats = torch.stack((loss_sum, torch.full_like(loss_sum, stop)))  # [loss, stop]
        if world_size > 1:
            dist.all_reduce(stats)
            stats /= world_size

        # ---- clip, set the learning rate, update
        loss_scale = run.scaler.scale(torch.ones_like(loss_sum))  # 1 but in fp16
        run.scaler.unscale_(run.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip)
        # The optimizer skips the update on the device if this is 1, so the host need not read the
        # norm. It is the norm of the averaged gradient: all ranks decide alike. In fp16 the scaler
        # sets it, from the same gradients.
        run.optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        lr = scheduled_lr(config, run.step)
        for group in run.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        run.updating = True
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.step += 1
        run.updating = False
        run.optimizer.zero_grad(set_to_none=True)

        # ---- log
        check_log_folder(run)  # again: a step may take seconds
        # [loss, stop, norm, loss scale]
        logger.log_step(run.step - 1, lr, torch.cat((stats, torch.stack((norm, loss_scale)))))
        if logger.skipped_in_a_row >= MAX_SKIPPED:
            report_checkpoint(run, wait=True)
            good = next(iter(checkpoint.list_checkpoints(config.log_dir)), "none")  # the newest
            raise FloatingPointError(
                f"{MAX_SKIPPED} gradients in a row were not finite; last good checkpoint: {good}"
            )
        # Without freeze(), each collection would walk through all objects that live as long as the
        # run, which takes milliseconds. The first time is after the step that compiled.
        if run.step % 100 == 1:
            gc.collect()
            gc.freeze()

    run.loader.close()
    logger.flush()
    check_log_folder(run)
    report_checkpoint(run, wait=True)
    logger.close()


# ---- the whole run -------------------------------------------------------------------------------


def prepare(config: TrainConfig, world_size: int) -> FolderLock:
    """Check settings and data, write the quickstart's shards, and lock the log folder."""
    problems = config.validate(world_size)
    if problems:
        raise ValueError("; ".join(problems))
    if config.sample_every:
        encode_prompt(config.sample_prompt, config.model.vocab_size)  # raises if it cannot be done
    quickstart = config.preset == "quickstart"
    if not quickstart:  # whose shards may be missing: they are written below
        open_data(config)  # raises if they are
    lock = lock_folder(config.log_dir, flag="--log-dir")
    if not config.resume and checkpoint.contains_run(config.log_dir):
        raise ValueError(
            f"{config.log_dir} contains a run; continue it with --resume or give another --log-dir"
        )
    if quickstart and not has_all_shards(config.data_dir):
        # This continues what a killed process has begun, and refuses what another is writing.
        dataset.prepare(
            dataset.DatasetConfig(source="stdlib", data_dir=config.data_dir, shard_size=50_000)
        )
    return lock


def has_all_shards(data_dir: Path) -> bool:
    """Whether a folder holds shards, and all that its index names."""
    try:
        dataset.check_complete(data_dir)
    except (ValueError, FileNotFoundError):
        return False
    return any(data_dir.glob("*.npy"))


def train(
    config: TrainConfig, dist_info: DistInfo, on_step: Callable[[Run], None] | None = None
) -> None:
    """The whole run; ``on_step`` is called before each step.

    Raises ValueError or FileNotFoundError for invalid settings or missing data, ConnectionError
    when another rank has died, FloatingPointError after too many gradients that are not finite.
    """
    settings: dict[str, Any] = asdict(config)
    dist_info.require_equal({k: v for k, v in settings.items() if k not in LOCAL_SETTINGS})
    locks: list[FolderLock] = []  # filled on rank 0, held until the run has ended
    dist_info.run_on_rank_0(lambda: locks.append(prepare(config, dist_info.world_size)))
    run = Run(config, dist_info, lock=locks[0] if locks else None)
    profiler: torch.profiler.profile | None = None
    if config.profile:
        trace = config.log_dir / f"trace_rank{dist_info.rank}.json"
        profiler = start_profiler(trace, config.profile, run.logger)
    try:
        for steps_done, _ in enumerate(training_loop(run)):
            if profiler is not None and steps_done > 0:
                profiler.step()
            if on_step is not None:
                on_step(run)
    except KeyboardInterrupt:  # a second SIGINT ends the process at once
        raise
    except BaseException as error:  # a missing shard, a dead rank, out of memory
        if run.lost_folder:
            raise
        # Unless the update itself has failed, the weights are those of the last complete one.
        run.ending = run.failed = True
        can_save = isinstance(error, OSError | RuntimeError | ValueError) and not run.updating
        if can_save and config.checkpoint_every > 0:
            try:
                save_checkpoint(run)
            except RuntimeError as unsaved:  # a GPU that has failed, or waits for a dead rank
                report_unsaved(run, unsaved)
        report_checkpoint(run, wait=True)  # the process may end without Python's own clean-up
        # When a rank has died, gloo raises a plain RuntimeError that names its source file.
        died = isinstance(error, dist.DistBackendError)
        if died or (isinstance(error, RuntimeError) and "/gloo/" in str(error)):
            raise ConnectionError(
                f"another rank has failed after step {run.step}: see its message, then resume with"
                f" the same command and --resume ({first_line(error)})"
            ) from error
        raise
    if profiler is not None:
        profiler.stop()
    # The loader of this rank failed, and all ranks have stopped at the same step and saved.
    if run.loader.error is not None and run.step < config.max_steps:
        raise run.loader.error
    if dist_info.rank == 0:
        report_end(run)


def report_end(run: Run) -> None:
    """Print how the run ended and what there is of it, and plot it if it is finished.

    Raises OSError when its last checkpoint could not be written.
    """
    config = run.config
    newest = next(iter(checkpoint.list_checkpoints(config.log_dir)), None)
    if run.step < config.max_steps:
        remedy = "resume with the same command and --resume" if newest else "there is no checkpoint"
        name = run.stop_signal.name or "another rank"
        run.logger.print(f"stopped by {name} after {run.step} steps; {remedy}")
    else:
        report_done(run, has_checkpoints=newest is not None)
    if config.checkpoint_every > 0 and run.saved_step != run.step:
        remedy = f"the newest is {newest}" if newest else "there is none"
        raise OSError(f"the last checkpoint was not saved, {remedy}: {run.save_problem}")


def report_done(run: Run, has_checkpoints: bool) -> None:
    """Plot a finished run and say which files it has left."""
    config = run.config
    try:
        plot.plot_run(config.log_dir)
    except Exception as error:  # whatever it is: a run never fails because its picture does
        run.logger.print(f"no plot: {first_line(error)}")
    names = ("metrics.jsonl", "plot.png", "report.md")
    left = [name for name in names if (config.log_dir / name).is_file()]
    left += ["checkpoints"] if has_checkpoints else []
    listed = " and ".join(filter(None, (", ".join(left[:-1]), *left[-1:]))) or "no files"
    text = f"done: {listed} are in {config.log_dir}/"
    if has_checkpoints:
        command = f'python eval.py --checkpoint {config.log_dir} --prompt "{config.sample_prompt}"'
        text += f"; now try\n{command}"
    run.logger.print(text)


def main(on_step: Callable[[Run], None] | None = None) -> None:
    """Parse the flags and train. --preset chooses the defaults, which the other flags override."""
    with exit_with_one_line():
        # First only --preset, because tyro needs the defaults before it parses anything. It is
        # tyro that refuses a name that is missing or unknown, with the names that there are.
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--preset", nargs="?")
        name = parser.parse_known_args()[0].preset
        preset = PRESETS.get(name, PRESETS["gpt-xs"])
        config = parse_options(TrainConfig, description=__doc__, default=preset)
        dist_info = DistInfo.initialize(config.device)
        start = {"preset": config.preset, "resume": config.resume, "init_from": config.init_from}
        dist_info.require_equal(start)  # a rank must not wait for the others' part in what follows
        if config.init_from is not None or config.preset == "finetune":
            config = with_initial_shape(config, preset, dist_info)
        try:
            train(config, dist_info, on_step)
        except torch.OutOfMemoryError as error:
            half = config.micro_batch // 2
            smaller = half or "--recompute 1"
            raise MemoryError(
                f"out of GPU memory at --micro-batch {config.micro_batch}; use {smaller}"
            ) from error
        # Reached only after success: after an error NCCL would wait here for the other ranks.
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
