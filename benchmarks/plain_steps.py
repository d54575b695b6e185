"""The training steps that bench_train.py compares ours with: the usual loop around other models.

It is the loop of nanoGPT's kind: batches are cut from a memory map when they are needed, and the
loss is read after each step. Micro-batches, precision and compilation are those of the settings
that ours gets, and so is the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

from gptxs.distributed import choose_dtype
from gptxs.optim import build_optimizer
from model import GPT, CausalSelfAttention
from train import TrainConfig


class Step(Protocol):
    """Makes a training step; ``within`` surrounds it, in the thread that computes it."""

    def __call__(self, within: AbstractContextManager[Any] | None = None) -> None: ...


def nanogpt(config: TrainConfig) -> AbstractContextManager[Step]:
    """Our model with all logits at once."""
    model = GPT(config.model)
    return plain_step(config, model, lambda idx, targets: cross_entropy(model(idx), targets))


def torch_loss(config: TrainConfig) -> AbstractContextManager[Step]:
    """Our model with torch's own loss that does not keep all logits (since 2.13)."""
    model = GPT(config.model)

    def loss(idx: Tensor, targets: Tensor) -> Tensor:
        hidden = model.hidden_states(idx).flatten(0, 1)  # (B * T, C)
        options = torch.nn.LinearCrossEntropyOptions()  # without them it keeps all logits
        weight = model.lm_head.weight
        return F.linear_cross_entropy(hidden, weight, targets.flatten(), options=options)

    return plain_step(config, model, loss)


def hugging_face(config: TrainConfig) -> AbstractContextManager[Step]:
    """The GPT-2 of transformers, with all logits at once."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = config.model
    hf_config = GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.context_length,
        n_embd=shape.d_model,
        n_layer=shape.n_layers,
        n_head=shape.n_heads,
        use_cache=False,
    )
    # Ours has no dropout. In evaluation mode theirs has none either; gradients are the same.
    model = GPT2LMHeadModel(hf_config).eval()
    return plain_step(config, model, lambda idx, targets: cross_entropy(model(idx).logits, targets))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean loss of logits (B, T, V) for targets (B, T)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def use_torch_attention(model: torch.nn.Module) -> None:
    """Keep a compiled step on a CPU from blocked_attention."""
    for module in model.modules():
        if isinstance(module, CausalSelfAttention):
            module.blocked_tokens = 0


@contextmanager
def plain_step(
    config: TrainConfig, model: torch.nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[Step]:
    """A step of the loop. ``loss_of`` computes the loss of tokens and targets, (B, T) each."""
    device = torch.device(config.device)
    dtype = choose_dtype(config.dtype, device)
    B = config.micro_batch
    T = config.model.context_length
    micro_steps = config.batch_tokens // (B * T)
    shard = np.load(next(config.data_dir.glob("*_train_*.npy")), mmap_mode="r")
    optimizer = build_optimizer(model.to(device), config.weight_decay)
    for group in optimizer.param_groups:
        group["lr"] = config.max_lr
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    use_torch_attention(model)
    # torch's default, which train.py changes on a CPU.
    torch._functorch.config.activation_memory_budget = 1.0
    if config.compile:
        loss_of = torch.compile(loss_of, dynamic=False)

    def step(within: AbstractContextManager[Any] | None = None) -> None:
        with within or nullcontext():
            for _ in range(micro_steps):
                starts = np.random.randint(len(shard) - T, size=(B, 1))
                tokens = torch.from_numpy(shard[starts + np.arange(T + 1)].astype(np.int64))
                if device.type == "cuda":
                    tokens = tokens.pin_memory().to(device, non_blocking=True)
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss = loss_of(tokens[:, :-1], tokens[:, 1:]) / micro_steps
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            loss.item()  # as they print it after each step

    yield step
