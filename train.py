"""Train GPT-2 on shards of tokens: on one device, or under torchrun on many, with the same results.

    torchrun --standalone --nproc_per_node=8 train.py        the default run: 124M, 10B tokens
    python train.py --preset quickstart                      minutes on a CPU, nothing downloaded
    python train.py --preset finetune --init-from gpt2 --data-dir data/mine      on your own text
    python train.py --resume                                 continue from the newest checkpoint

Everything is written to --log-dir: metrics.jsonl, plot.png and checkpoints, which are Hugging Face
models. Steps count from 0: at step s the weights have had s updates, and the loss that is logged
for it is measured before the next one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

import dataset
import hellaswag
import plot
from data_loader import StepLayout, TokenDataset, TokenLoader, ignored_files
from eval import encode_prompt, sample_text, validation_loss
from gptxs import checkpoint, compiler, finetune, hf, shards
from gptxs.cli import exit_with_one_line, first_line, number_problems, parse
from gptxs.distributed import DistInfo, DtypeName, StopSignal, wrap_ddp
from gptxs.files import lock_folder
from gptxs.metrics import MetricsLogger
from gptxs.optim import OptimizerName, Schedule, build_optimizer, learning_rate
from model import GPT, GPTConfig

Preset = Literal["gpt-xs", "quickstart", "finetune", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]

MAX_SKIPPED = 10  # consecutive bad gradients that end the run; overflows in fp16 do not count
# Ranks may differ in these: what names something on their machines, and what rank 0 alone uses.
LOCAL_SETTINGS = ("data_dir", "log_dir", "hellaswag_data", "device", "tensorboard", "wandb")

# ---- configuration -------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. --preset sets all of them; any other flag overrides the preset."""

    preset: Preset = "gpt-xs"
    """gpt-xs: 124M, context 512, 10B tokens. quickstart: a small model on Python's documentation.
    finetune: the model of --init-from on a few million tokens of your own. gpt2, gpt2-medium,
    gpt2-large, gpt2-xl: OpenAI's four sizes with their context of 1024."""
    data_dir: Path = Path("edu_fineweb10B")
    """Folder of token shards: dataset.py's, or the .bin files of llm.c and nanoGPT."""
    log_dir: Path = Path("log")
    """Folder to write to: metrics.jsonl, step_*/ checkpoints, plot.png, report.md."""
    resume: bool = False
    """Resume from the latest valid checkpoint in --log-dir, or start from scratch without one."""
    init_from: str | None = None
    """Start from the weights and the shape of a checkpoint, a log folder (its newest) or a hub id
    such as gpt2. Its context is cropped to --model.context-length."""
    model: GPTConfig = field(default_factory=GPTConfig)

    batch_tokens: int = 524_288
    """Tokens in a step, over all devices."""
    micro_batch: int = 64
    """Sequences per device and micro-step; gradients are accumulated to --batch-tokens."""
    max_steps: int = 19_073
    """Optimizer updates in the whole run."""
    optimizer: OptimizerName = "adamw"
    """adamw; or muon for the matrices of the blocks, and AdamW for everything else."""
    muon_lr_scale: float = 3.0
    """Muon's learning rate as a multiple of AdamW's."""
    schedule: Schedule = "cosine"
    """What follows the warm-up: cosine or linear decay; wsd: constant, then linear."""
    cooldown: float = 0.4
    """The share of --max-steps in which the schedule wsd decays."""
    warmup_steps: int = 715
    """Updates of linear warm-up before the decay."""
    max_lr: float = 6e-4
    """Peak learning rate, at the end of the warm-up."""
    min_lr: float = 6e-5
    """Learning rate of the last update."""
    weight_decay: float = 0.1
    """Weight decay, on tensors of 2 or more dimensions."""
    grad_clip: float = 1.0
    """Maximum norm of the gradient; a larger gradient is scaled down to it."""

    val_every: int = 250
    """Steps between validation losses; 0 disables them, as for every interval below."""
    val_tokens: int = 10_485_760
    """Validation tokens, the same ones each time."""
    hellaswag_every: int = 250
    """Steps between HellaSwag evaluations."""
    hellaswag_data: Path | None = None
    """HellaSwag as a JSONL, JSON or Parquet file. Default: Rowan/hellaswag from the hub."""
    sample_every: int = 1000
    """Steps between samples."""
    sample_prompt: str = "Hello, I'm a language model,"
    """The text that the samples continue."""
    checkpoint_every: int = 250
    """Steps between checkpoints. Unless this is 0 there is also one at the end of the run."""
    keep_checkpoints: int = 3
    """Newest checkpoints to keep; 0: all."""

    shuffle: bool = True
    """Read the data in a seeded random order, a new one each epoch; otherwise as it is stored."""
    seed: int = 1337
    """Seed of the initial weights, the order of the data and the samples."""
    device: str = "auto"
    """cuda, cuda:1, mps or cpu; auto: the machine's accelerator, or the CPU without one."""
    dtype: DtypeName = "auto"
    """Precision; auto: bf16 where the device has it, fp16 (with a loss scale) on other GPUs."""
    compile: bool = True
    """Compile the training step; on a CPU only if at least 200 steps remain, on mps never."""
    recompute: float = 0.0
    """Share of the blocks whose activations are computed again for the gradient, not kept."""
    loss_rows: int | None = None
    """Tokens per chunk of the loss, which bounds its memory; 0: all. Default: by device."""
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

    def validate(self, world_size: int) -> list[str]:
        """One message for each problem of these settings with ``world_size`` processes."""
        problems = number_problems(self, at_least_one=("batch_tokens", "micro_batch", "max_steps"))
        problems += self.model.validate()
        if problems:  # the checks below need valid numbers
            return problems
        context = self.model.context_length
        micro_step_tokens = self.micro_batch * context * world_size  # over all processes
        if self.batch_tokens % micro_step_tokens != 0:
            nearest = max(1, round(self.batch_tokens / micro_step_tokens)) * micro_step_tokens
            problems.append(
                f"batch_tokens {self.batch_tokens} must be a multiple of {micro_step_tokens}"
                f" (micro_batch {self.micro_batch} x context_length {context} x {world_size}"
                f" processes); nearest: {nearest}"
            )
        if self.warmup_steps > self.max_steps:
            problems.append(f"warmup_steps {self.warmup_steps} exceed max_steps {self.max_steps}")
        if self.min_lr > self.max_lr:
            problems.append(f"min_lr {self.min_lr} must not exceed max_lr {self.max_lr}")
        if self.grad_clip == 0:
            problems.append("grad_clip 0 would make every gradient 0")
        if self.val_every and self.val_tokens < context:
            problems.append(f"val_tokens {self.val_tokens} are less than a window of {context}")
        for package, wanted in (("tensorboard", self.tensorboard), ("wandb", self.wandb)):
            if wanted and importlib.util.find_spec(package) is None:
                problems.append(f"--{package} needs a package: pip install {package}")
        return problems

    def unused_options(self, world_size: int) -> list[str]:
        """A note for each option that differs from the preset's but has no effect."""
        preset = PRESETS[self.preset]
        unused = {
            "muon_lr_scale": self.optimizer != "muon",
            "cooldown": self.schedule != "wsd",
            "val_tokens": self.val_every == 0,
            "hellaswag_data": self.hellaswag_every == 0,
            "sample_prompt": self.sample_every == 0,
            "keep_checkpoints": self.checkpoint_every == 0,
            "bf16_grads": world_size == 1,
        }
        given = [name for name in unused if getattr(self, name) != getattr(preset, name)]
        return [f"{name} has no effect beside the others" for name in given if unused[name]]


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
    checkpoint_every=150,
    compile=False,  # the compiler would take longer than it saves
)
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
# OpenAI's sizes, with GPT-3's learning rates (Brown et al. 2020, table 2.1). The micro-batches are
# estimated from the size of the activations to fit a GPU of 80 GB.
OPENAI_SIZES: list[tuple[Preset, GPTConfig, float, int]] = [
    ("gpt2", GPTConfig(768, 12, 12, context_length=1024), 6e-4, 64),
    ("gpt2-medium", GPTConfig(1024, 16, 24, context_length=1024), 3e-4, 32),
    ("gpt2-large", GPTConfig(1280, 20, 36, context_length=1024), 2.5e-4, 16),
    ("gpt2-xl", GPTConfig(1600, 25, 48, context_length=1024), 2e-4, 8),
]
PRESETS = {config.preset: config for config in (TrainConfig(), QUICKSTART, FINETUNE)} | {
    name: TrainConfig(preset=name, model=shape, max_lr=lr, min_lr=lr / 10, micro_batch=rows)
    for name, shape, lr, rows in OPENAI_SIZES
}


@dataclass
class Progress:
    """How far a run has come. Checkpoints hold it."""

    step: int = 0  # updates made so far
    best_val: float = math.inf  # the lowest validation loss so far
    skipped: int = 0  # updates skipped in a row because the gradient was not finite
    losses: list[float] = field(default_factory=list)  # the newest ones, to tell a spike


# ---- before the run ------------------------------------------------------------------------------


def prepare(config: TrainConfig) -> None:
    """Refuse a log folder that holds a run; write the quickstart's shards if there are none."""
    if not config.resume and checkpoint.contains_run(config.log_dir):
        raise ValueError(f"{config.log_dir} has a run; add --resume or give another --log-dir")
    if config.preset == "quickstart":
        index = shards.ShardIndex.read(config.data_dir)
        if (index and not index.complete) or not any(config.data_dir.glob("*val*")):
            dataset.prepare(
                dataset.DatasetConfig(("stdlib",), data_dir=config.data_dir, shard_size=50_000)
            )


# ---- the run -------------------------------------------------------------------------------------


def train(
    config: TrainConfig,
    dist_info: DistInfo,
    on_step: Callable[[Progress, GPT], None] | None = None,
) -> None:
    """The whole run, on the device and in the precision of ``dist_info``.

    ``on_step`` is called before each step. Raises ValueError or FileNotFoundError for invalid
    settings or missing data, FloatingPointError after too many gradients that are not finite,
    OSError if the last checkpoint was not saved.
    """
    rank = dist_info.rank
    world_size = dist_info.world_size
    device = dist_info.device
    if problems := config.validate(world_size):
        raise ValueError("; ".join(problems))
    # Closed after an error too: in a notebook its traceback would hold the lock and the threads.
    with contextlib.ExitStack() as stack:
        if rank == 0:
            stack.callback(lock_folder(config.log_dir, flag="--log-dir").release)
        dist_info.on_rank_0(lambda: prepare(config))
        notes = config.unused_options(world_size)  # what the user should know, for the logger

        # ---- data
        shards.check_complete(config.data_dir)
        context = config.model.context_length
        train_data = TokenDataset(config.data_dir, "train", context, config.model.vocab_size)
        val_data = TokenDataset(config.data_dir, "val", context, config.model.vocab_size)
        fingerprint = train_data.fingerprint() + val_data.fingerprint()
        common = {k: v for k, v in asdict(config).items() if k not in LOCAL_SETTINGS}
        common |= {f"shard {name}": (tokens, digest) for name, tokens, digest in fingerprint}
        common["dtype"] = dist_info.dtype  # "auto" depends on the hardware
        dist_info.require_equal(common)
        if ignored := ignored_files(config.data_dir, train_data, val_data):
            notes.append(f"left out, as no shards of this data set: {', '.join(ignored)}")
        examples: tuple[hellaswag.Example, ...] = ()
        if config.hellaswag_every:
            examples = dist_info.on_rank_0(lambda: hellaswag.load_or_skip(config.hellaswag_data))
            hellaswag.pack_for(device, examples, config.model)  # kept; now, for its errors' sake
        prompt: list[int] = []  # the tokens that the samples continue
        if config.sample_every:
            prompt = encode_prompt(config.sample_prompt, config.model.vocab_size)

        # ---- model
        torch.manual_seed(config.seed)
        torch.set_float32_matmul_precision("high")  # TF32 for what is computed in fp32
        torch.use_deterministic_algorithms(config.deterministic)
        if config.deterministic:  # required by cuBLAS, before its first call
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Initialized on the CPU, so that the weights of a seed do not depend on the device.
        model = GPT(config.model).to(device)
        model.loss_chunk_rows = config.loss_rows
        model.recomputed_blocks = math.ceil(config.recompute * config.model.n_layers)

        # ---- optimizer
        optimizer = build_optimizer(
            model, config.weight_decay, config.optimizer, muon_lr_scale=config.muon_lr_scale
        )
        # fp16 rounds small gradients to 0, so the loss is scaled up, as far as none overflows.
        scaler = torch.amp.GradScaler(device.type, enabled=dist_info.dtype == torch.float16)

        # ---- resume
        # As JSON's types: a checkpoint stores them, and must be readable without unpickling.
        settings = json.loads(json.dumps(asdict(config), default=str))
        settings |= {"data": fingerprint, "init_sha256": None}
        progress = Progress()
        saved = None  # the checkpoint that the run continues
        if config.resume:
            saved = dist_info.on_rank_0(lambda: checkpoint.latest_valid(config.log_dir))
        if saved is not None:
            state = checkpoint.load_state(saved)
            notes += checkpoint.compare_settings(state.settings, settings, saved)
            for name in ("init_from", "init_sha256"):  # where the run began stays the same
                settings[name] = state.settings[name]
            model.load_weights(hf.read_weights(saved), saved)
            checkpoint.load_optimizer(optimizer, state.optimizer, saved)
            if state.scaler:
                scaler.load_state_dict(state.scaler)
            progress = Progress(**state.progress)
            notes.append(f"resumed from {saved}")
        elif config.init_from is not None and rank == 0:  # DDP copies its weights to all
            weights, sha256 = finetune.initial_weights(config.init_from, settings["model"])
            model.load_weights(weights, config.init_from)
            settings["init_sha256"] = sha256
            notes.append(f"starting from the weights of {config.init_from}, SHA-256 {sha256}")

        # ---- compile and DDP
        # The same weights, wrapped for training. Samples, HellaSwag and checkpoints use the plain
        # module: their shapes vary, and its state_dict keys have no wrapper's prefix.
        training_model: torch.nn.Module = model
        ddp = None
        if world_size > 1:
            training_model = ddp = wrap_ddp(model, device, config.bf16_grads)
        compiled = None
        if config.compile:
            steps = config.max_steps - progress.step
            problem = dist_info.on_rank_0(lambda: compiler.compiler_problem(device, steps))
            if problem is None:
                training_model = compiled = compiler.compile_model(training_model, device)
            else:
                notes.append(f"training without torch.compile: {problem}")

        # ---- logger
        logger = MetricsLogger(
            config.log_dir,
            enabled=rank == 0,
            device=device,
            dtype=dist_info.dtype,
            world_size=world_size,
            max_steps=config.max_steps,
            tokens_per_step=config.batch_tokens,
            flops_per_step=model.flops_per_token() * config.batch_tokens,
            losses=progress.losses,  # the same list: it adds to it, and checkpoints save it
        )
        stack.callback(logger.close)
        facts = {
            "config": {k: v for k, v in settings.items() if k != "data"},
            "dataset": train_data.name,
            "parameters": model.num_parameters(),
            "resumed_from": saved.name if saved else None,
        }
        logger.start(progress.step, facts, tensorboard=config.tensorboard, wandb=config.wandb)
        layout = StepLayout(config.batch_tokens // context, config.micro_batch, rank, world_size)
        micro_steps = layout.micro_steps()
        tokens = len(train_data) * context
        epochs = config.max_steps * config.batch_tokens / tokens
        notes.append(f"{micro_steps} micro-steps a step; {epochs:.2f} epochs of {tokens:,} tokens")
        for note in notes:
            logger.print(note)

        # ---- the training loop
        stop_signal = stack.enter_context(StopSignal())  # until the last checkpoint is written
        writer = checkpoint.Writer(
            config.log_dir, config.keep_checkpoints, report=logger.report, warn=logger.print
        )
        writer.saved_step = progress.step if saved else None
        stack.callback(writer.collect, wait=True)  # for the last save, after an error too
        batches = layout.batches(len(train_data), config.seed, config.shuffle, progress.step)
        # Three steps ahead, to ride out short stalls of the disk.
        loader = TokenLoader(train_data, batches, device, prefetch=3 * micro_steps)
        stack.callback(loader.close)
        profiler = None
        if config.profile:
            trace = config.log_dir / f"trace_rank{rank}.json"
            profiler = stack.enter_context(compiler.step_profiler(trace, config.profile))
        first_step = progress.step
        evaluations = (config.val_every, config.hellaswag_every, config.sample_every)
        intervals = (config.checkpoint_every, *evaluations)

        def is_due(every: int) -> bool:
            return every > 0 and (ending or progress.step % every == 0)

        while True:
            # ---- what the steps before have brought, and what is due before this one
            ending = progress.step >= config.max_steps
            # On a GPU the numbers of the newest step are waited for only where they are needed.
            for done in logger.read_steps(wait=ending or any(map(is_due, intervals))):
                ending = ending or done.stop
                if not done.overflow:  # fp16's next loss scale is half of this one
                    progress.skipped = progress.skipped + 1 if done.skipped else 0
            if progress.skipped >= MAX_SKIPPED:
                raise FloatingPointError(
                    f"{MAX_SKIPPED} gradients in a row were not finite; a lower --max-lr may help"
                )
            # The checkpoint first, so that nothing that happens during the others can cost these
            # steps. A run that is resumed from it repeats the others.
            writer.collect()
            if is_due(config.checkpoint_every) and rank == 0 and writer.saved_step != progress.step:
                with logger.timed("checkpoint", progress.step):
                    state = checkpoint.TrainingState(
                        asdict(progress), settings, optimizer.state_dict(), scaler.state_dict()
                    )
                    writer.start(model.weights(), asdict(config.model), state)
            if ending and progress.step < config.max_steps:
                break  # asked to stop: the run evaluates when it is resumed
            if is_due(config.val_every):
                with logger.timed("val", progress.step) as row:
                    loss = validation_loss(
                        model, val_data, config.val_tokens, config.micro_batch, dist_info, compiled
                    )
                    progress.best_val = min(progress.best_val, loss)
                    row.update(loss=loss, best=progress.best_val)
            if examples and is_due(config.hellaswag_every):
                with logger.timed("hellaswag", progress.step) as row:
                    try:
                        predictions = hellaswag.predict(model, examples, dist_info)
                        row.update(hellaswag.summarize(examples, predictions))
                    except FloatingPointError as error:  # the same on all ranks
                        logger.print(f"no HellaSwag at step {progress.step}: {error}")
            is_trained = progress.step > 0 or settings["init_from"] is not None
            if is_due(config.sample_every) and rank == 0 and is_trained:
                with logger.timed("sample", progress.step) as row:
                    text = sample_text(model, prompt, config.seed, dist_info.dtype)
                    row.update(prompt=config.sample_prompt, text=text)
            if ending:
                break
            if on_step is not None:
                on_step(progress, model)

            # ---- the gradient of the step, a micro-batch at a time
            loss_sum = torch.zeros((), device=device)
            for micro_step in range(micro_steps):
                inputs, targets = next(loader)  # (B, T) each
                # DDP exchanges gradients in the last backward pass of the step only. This is what
                # its no_sync() sets, without a second copy of the lines below.
                if ddp is not None:
                    ddp.require_backward_grad_sync = micro_step == micro_steps - 1
                with dist_info.autocast():
                    loss = training_model(inputs, targets) / micro_steps
                scaler.scale(loss).backward()
                loss_sum += loss.detach()  # on the device: to read it here would wait for the GPU

            # ---- the mean loss of all ranks, and whether one of them was asked to stop
            stop = float(bool(stop_signal.name))
            stats = torch.stack((loss_sum, torch.full_like(loss_sum, stop)))  # [loss, stop]
            if world_size > 1:
                dist.all_reduce(stats)
                stats /= world_size

            # ---- clip, set the learning rate, update
            loss_scale = scaler.scale(torch.ones_like(loss_sum))  # 1 except in fp16
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            # If this is 1 the optimizer skips the update on the device, so the host need not read
            # the norm. All ranks decide alike, by the averaged gradient. In fp16 the scaler does.
            optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
            lr = learning_rate(progress.step, config)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            # MPS's fused AdamW ignored found_inf before torch 2.13 (pytorch#186360).
            if device.type != "mps" or bool(torch.isfinite(norm)):
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            progress.step += 1

            # ---- log
            stats = torch.cat((stats, torch.stack((norm, loss_scale))))  # [loss, stop, norm, scale]
            logger.log_step(progress.step - 1, lr, stats)
            if progress.step == first_step + 1:  # the step that compiled
                dist_info.limit_waits()
            if profiler is not None:
                profiler.step()

    # ---- the end
    has_checkpoints = config.checkpoint_every > 0
    if progress.step < config.max_steps:
        by = stop_signal.name or "another rank"
        remedy = "resume with the same command and --resume" if has_checkpoints else "not saved"
        logger.print(f"stopped by {by} after {progress.step} steps; {remedy}")
    elif rank == 0:
        try:
            plot.plot_run(config.log_dir)
            logger.print(f"done: metrics.jsonl, plot.png and report.md are in {config.log_dir}/")
        except Exception as error:  # whatever it is: a run never fails because its picture does
            logger.print(f"done, but no plot: {first_line(error)}")
        if writer.saved_step == progress.step:
            command = f"python eval.py --checkpoint {config.log_dir} --prompt"
            logger.print(f'now try\n{command} "{config.sample_prompt}"')
    if rank == 0 and has_checkpoints and writer.saved_step != progress.step:
        raise OSError(f"the last checkpoint was not saved: {writer.problem}")


# ---- command line --------------------------------------------------------------------------------


def main(on_step: Callable[[Progress, GPT], None] | None = None) -> None:
    """Parse the flags and train. --preset chooses the defaults, which the other flags override."""
    with exit_with_one_line(remedy="continue with --resume"):
        config = parse(TrainConfig, description=__doc__, presets=PRESETS)
        dist_info = DistInfo.initialize(config.device, config.dtype)
        # If the ranks disagreed on the next line, some would wait there for the others.
        dist_info.require_equal({"preset": config.preset, "init_from": config.init_from})
        if config.init_from is not None or config.preset == "finetune":
            log_dir = config.log_dir if config.resume else None
            asked, default = asdict(config.model), asdict(PRESETS[config.preset].model)
            shape = dist_info.on_rank_0(
                lambda: finetune.initial_shape(config.init_from, log_dir, asked, default)
            )
            config = replace(config, model=GPTConfig(**shape))
        try:
            train(config, dist_info, on_step)
        except RuntimeError as error:
            raise compiler.explain(error, config.micro_batch) from error
        # Reached only after success: after an error NCCL would wait here for the other ranks.
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
