"""From gradients to updates: the learning rate, the groups of parameters, AdamW and Muon."""

import math
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import Module, Parameter

OptimizerName = Literal["adamw", "muon"]
Schedule = Literal["cosine", "linear", "wsd"]


class ScheduleSettings(Protocol):
    """What ``learning_rate`` reads of the settings of a run."""

    @property
    def max_steps(self) -> int: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def max_lr(self) -> float: ...
    @property
    def min_lr(self) -> float: ...
    @property
    def schedule(self) -> Schedule: ...
    @property
    def cooldown(self) -> float: ...


def learning_rate(step: int, config: ScheduleSettings) -> float:
    """The learning rate of update ``step``: linear to max_lr, then down to min_lr at the last one,
    where the warm-up leaves two updates or more.

    The way down is half a cosine (Loshchilov & Hutter 2017) or a line. "wsd" (warm-up, stable,
    decay; Hu et al. 2024) stays at max_lr, and is a line over the last ``cooldown`` of the steps.
    """
    c = config
    if step < c.warmup_steps:
        return c.max_lr * (step + 1) / c.warmup_steps
    decay_start = c.warmup_steps  # the last step at max_lr
    if c.schedule == "wsd":
        decay_start = max(c.warmup_steps, c.max_steps - 1 - round(c.cooldown * c.max_steps))
    progress = max(0, step - decay_start) / max(1, c.max_steps - 1 - decay_start)  # from 0 to 1
    cosine = 0.5 * (1 + math.cos(math.pi * progress))  # from 1 to 0
    return c.min_lr + (cosine if c.schedule == "cosine" else 1 - progress) * (c.max_lr - c.min_lr)


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
        muon: dict[str, Any] = {"params": weights, "lr": 0.0, "lr_scale": lr_scale}
        muon |= {"weight_decay": weight_decay, "momentum": 0.95}
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
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for weight in self.param_groups[0]["params"]:
            by_shape.setdefault(weight.shape, []).append(weight)
        for weights in by_shape.values():
            self._update(weights)

    def _update(self, weights: list[Tensor]) -> None:
        """Muon's update of weights of one shape, all layers' at once: a GPU waits for launches."""
        group = self.param_groups[0]
        rows, columns = weights[0].shape
        for new_weight in (w for w in weights if not self.state[w]):
            self.state[new_weight]["momentum_buffer"] = torch.zeros_like(new_weight)
        buffers = [self.state[w]["momentum_buffer"] for w in weights]
        weight = torch.stack(weights)  # (layers, rows, columns)
        buffer = torch.stack(buffers)
        gradient = torch.stack([w.grad for w in weights if w.grad is not None])  # all have one
        momentum = buffer.lerp(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"])  # Nesterov's
        # c_attn (3C, C) is three matrices: query, key and value, each to be made orthogonal.
        matrices = update.view(-1, columns, columns) if rows == 3 * columns else update
        update = orthogonalize(matrices.to(self.dtype)).view_as(weight)
        # The entries of an orthogonal matrix have a root mean square of 1 / sqrt(longer side),
        # AdamW's updates one of about 0.2 at a learning rate of 1.
        size = 0.2 * math.sqrt(max(matrices.shape[-2:]))
        new = weight * (1 - group["lr"] * group["weight_decay"])
        new.sub_(update, alpha=group["lr"] * size)
        skip = self.found_inf > 0  # on the device: to read it here would wait for the GPU
        torch._foreach_copy_(buffers, list(torch.where(skip, buffer, momentum)))
        torch._foreach_copy_(weights, list(torch.where(skip, weight, new)))


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
