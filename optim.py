"""From gradients to updates: their exchange between devices, the optimizer, the learning rate."""

import math
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn import Module, Parameter
from torch.nn.parallel import DistributedDataParallel

OptimizerName = Literal["adamw", "muon"]
Schedule = Literal["cosine", "linear", "wsd"]


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
    step: int,
    max_steps: int,
    warmup_steps: int,
    max_lr: float,
    min_lr: float,
    schedule: Schedule = "cosine",
    cooldown: float = 0.4,
) -> float:
    """The learning rate of update ``step``: linear to max_lr, then down to min_lr at the last one.

    The way down is half a cosine (Loshchilov & Hutter 2017) or a line. "wsd" (warm-up, stable,
    decay; Hu et al. 2024) stays at max_lr, and is a line over the last ``cooldown`` of the steps.
    """
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    decay_start = warmup_steps  # the last step at max_lr
    if schedule == "wsd":
        decay_start = max(warmup_steps, max_steps - 1 - round(cooldown * max_steps))
    decay_steps = max(1, max_steps - 1 - decay_start)
    progress = min(1.0, max(0, step - decay_start) / decay_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))  # from 1 to 0
    return min_lr + (cosine if schedule == "cosine" else 1 - progress) * (max_lr - min_lr)


def build_optimizer(
    model: Module,
    weight_decay: float,
    optimizer: OptimizerName = "adamw",
    muon_lr_scale: float = 1.0,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) with GPT-3's betas, or Muon for the blocks and AdamW else.

    The learning rate is set at each step: that of a group times its "lr_scale", where it has one.
    Weight decay is for the matrices: biases and LayerNorm's weights, the tensors of one dimension,
    have no reason to be small. ``model`` has the names of GPT-2's parameters.
    """
    muon_weights: list[Parameter] = []
    matrices: list[Parameter] = []
    vectors: list[Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            vectors.append(parameter)
        elif optimizer == "muon" and name.startswith("transformer.h."):
            muon_weights.append(parameter)
        else:
            matrices.append(parameter)
    adamw = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=0.0,
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=True,  # one kernel for all parameters; it also reads `found_inf`, see train.py
    )
    if optimizer == "adamw":
        return adamw
    return MuonWithAdamW(muon_weights, adamw, weight_decay, muon_lr_scale)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for some weights of 2 dimensions, AdamW for all other parameters.

    Muon replaces the momentum of a matrix by the nearest orthogonal one. Scaled to the size of
    AdamW's usual update (Liu et al. 2025), it takes AdamW's learning rate, times ``lr_scale``.

    To the outside this is one optimizer: ``param_groups`` are Muon's and then AdamW's, and
    ``state_dict`` is in torch's format. Like a fused AdamW it skips an update if its attribute
    ``found_inf``, a scalar on the device of the weights, is 1. torch.optim.Muon, which makes the
    same updates, knows no skipping, takes c_attn for one matrix, and computes in bf16 everywhere:
    on a CPU without bf16 instructions that is more than ten times slower.
    """

    _step_supports_amp_scaling = True  # torch's GradScaler then sets found_inf, too

    def __init__(
        self,
        weights: list[Parameter],
        adamw: torch.optim.AdamW,
        weight_decay: float,
        lr_scale: float,
    ) -> None:
        self.adamw = adamw
        device = weights[0].device
        self.found_inf = torch.zeros((), device=device)
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        muon: dict[str, Any] = {
            "params": weights,
            "lr": 0.0,
            "lr_scale": lr_scale,
            "weight_decay": weight_decay,
            "momentum": 0.95,
        }
        super().__init__([muon, *adamw.param_groups], defaults={})
        self._share_state()

    def _share_state(self) -> None:
        """Let AdamW work on its groups and the state of this optimizer."""
        self.adamw.param_groups = self.param_groups[1:]
        self.adamw.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # the end of torch's load_state_dict: new groups, new state
        self._share_state()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters and their state, or nothing of it if ``found_inf`` is 1."""
        self.adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
        self.adamw.step()
        skip = self.found_inf > 0  # on the device: to read it here would wait for the GPU
        group = self.param_groups[0]
        for weight in group["params"]:
            rows, columns = weight.shape
            state = self.state[weight]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(weight)
            buffer = state["momentum_buffer"]
            momentum = buffer.lerp(weight.grad, 1 - group["momentum"])
            update = weight.grad.lerp(momentum, group["momentum"])  # Nesterov's
            # c_attn (3C, C) is three matrices: query, key and value, each to be made orthogonal.
            matrices = update.view(-1, columns, columns) if rows == 3 * columns else update
            update = orthogonalize(matrices.to(self.dtype)).reshape(rows, columns)
            # The entries of an orthogonal matrix have a root mean square of 1 / sqrt(longer side),
            # AdamW's updates one of about 0.2 at a learning rate of 1.
            size = 0.2 * math.sqrt(max(matrices.shape[-2:]))
            new = weight * (1 - group["lr"] * group["weight_decay"])
            new.sub_(update, alpha=group["lr"] * size)
            buffer.copy_(torch.where(skip, buffer, momentum))
            weight.copy_(torch.where(skip, weight, new))


def orthogonalize(matrices: Tensor) -> Tensor:
    """The orthogonal factor U V^T of matrices (..., rows, columns) = U S V^T, approximately.

    Five Newton-Schulz iterations with the coefficients of Jordan et al. 2024, which bring singular
    values to about 1 (0.7 to 1.2) instead of exactly there, in fewer iterations.
    """
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices  # with the smaller Gram matrix x x^T
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x
