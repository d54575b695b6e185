"""From gradients to updates: their exchange between devices, the optimizer, the learning rate."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel


def wrap_ddp(model: Module, device: torch.device, bf16_grads: bool) -> DistributedDataParallel:
    """The model with its gradients averaged over the ranks in the backward pass.

    ``bf16_grads`` halves the traffic: the gradients are rounded to bf16 before they are summed.
    """
    # Not static_graph: with gradient accumulation it stops synchronizing (pytorch#187732).
    ddp = DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,  # gradients live in the buckets that are exchanged: no copy
        # The compiled step is split into a graph for each bucket. DDP's default of 25 MB makes 13
        # graphs of 124M, cut inside the blocks, which write and read 3.3 GB more in a micro-step of
        # 64 x 512 tokens; 100 MB makes 4 and 0.55 GB, by Inductor's own count.
        bucket_cap_mb=100,
    )
    if bf16_grads:
        ddp.register_comm_hook(None, _exchange_in_bf16)
    return ddp


def _exchange_in_bf16(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    # torch's own hook. DDP looks for its name, and refuses it in a build without CUDA.
    return bf16_compress_hook(group, bucket)


def learning_rate(
    step: int, max_steps: int, warmup_steps: int, max_lr: float, min_lr: float
) -> float:
    """The learning rate of update ``step``: linear to max_lr, then a cosine that ends at min_lr."""
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    decay_steps = max(1, max_steps - 1 - warmup_steps)
    progress = min(1.0, (step - warmup_steps) / decay_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))  # from 1 to 0
    return min_lr + cosine * (max_lr - min_lr)


def build_optimizer(model: Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) with GPT-3's betas. The learning rate is set at each step.

    Weight decay is for the matrices: biases and LayerNorm's weights, the tensors of one dimension,
    have no reason to be small.
    """
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=0.0,
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=True,  # one kernel for all parameters; it also reads `found_inf`, see train.py
    )
