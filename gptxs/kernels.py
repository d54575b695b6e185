"""Two computations of GPT-2 that plain PyTorch does with more memory, or more slowly.

Shapes use the field's letters: B batch, T time, C channels, H heads, D channels of a head,
V vocabulary, N = B * T rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int | None = None
) -> Tensor:
    """Mean cross-entropy, in nats, of ``hidden @ weight.T`` against ``targets``.

    hidden (N, C), weight (V, C), targets (N,) int64. ``chunk_rows`` rows have their logits in
    memory at once; 0: all; None: by the device. Returns a scalar in fp32.
    """
    device = hidden.device.type
    # Products with out= are not autocast, so the precision is passed on.
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    if chunk_rows is None:
        chunk_rows = _default_chunk_rows(hidden, dtype)
    if chunk_rows == 0:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets)
    if torch.is_grad_enabled():
        one_hot = torch.compiler.is_compiling()
        return LinearCrossEntropy.apply(hidden, weight, targets, chunk_rows, dtype, one_hot)
    # Without gradients, in validation, the chunks are all that is needed.
    total = hidden.new_zeros((), dtype=torch.float32)
    for h, t in zip(hidden.split(chunk_rows), targets.split(chunk_rows), strict=True):
        total += F.cross_entropy(F.linear(h, weight).float(), t, reduction="sum")
    return total / targets.numel()


def _default_chunk_rows(hidden: Tensor, dtype: torch.dtype) -> int:
    """The rows of a chunk that suit the device; 0: all of them."""
    N, C = hidden.shape
    if hidden.device.type != "cpu":
        # 4096 rows of logits are 0.8 GB in fp32. No more than about eight chunks: Inductor would
        # put their weight gradients off to the end of the forward pass, to add them up in one
        # kernel, which keeps every chunk's logits until then. At 64 x 1024 tokens and 2 layers the
        # counted peak of a micro-step falls from 8.98 to 6.75 GB.
        return max(4096, N // 8)
    if torch.compiler.is_compiling() and dtype == torch.bfloat16 and N <= 4096:
        # The plain loss, with up to 0.8 GB of logits. In bf16 the compiled step of 124M at 4 x 512
        # is a little faster with it, and needs less memory. In fp32 it needs more.
        return 0
    # A CPU wants the logits in its cache, but not so few of them that adding up the weight's
    # gradient (V, C) costs more than a pass over the logits.
    return max(128, C)


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of ``hidden @ weight.T`` against ``targets``, a chunk of rows at a time.

    The logits of a whole batch are by far its largest tensor (6.6 GB at 64x512x50304 in fp32).
    Here only ``chunk_rows`` rows of them exist at once. The gradient of the logits,
    softmax(logits) - onehot(target), is known as soon as they are, so the forward pass multiplies
    it through to the gradients of ``hidden`` and ``weight`` and nothing is computed twice.

    hidden (N, C), weight (V, C), targets (N,) int64. The matrix products are in ``dtype``, the
    softmax and the sum over the chunks in fp32. Returns a scalar in fp32, in nats.

    ``one_hot`` writes the target as a comparison with every column instead of an index, and nothing
    in place. The result is the same, and Inductor then makes a single Triton kernel of the chunk:
    half the memory traffic by its own count. It would also put a gather by index off to the end of
    the forward pass, which keeps the logits of every chunk alive until then.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk_rows: int,
        dtype: torch.dtype,
        one_hot: bool,
    ) -> Tensor:
        N = hidden.size(0)
        h = hidden.to(dtype)
        # A weight's gradient, a sum over thousands of rows, may exceed fp16's 65,504. The loss
        # scale, which is applied later, could not help. A power of 2 costs no digits.
        fp16 = dtype == torch.float16
        summands = h / 64 if fp16 else h
        w = weight.to(dtype)
        loss = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(h)
        grad_weight = torch.zeros_like(weight)
        # Uncompiled, every chunk uses the same memory: on a CPU new tensors of this size cost more
        # than the arithmetic.
        buffer = h.new_empty(min(chunk_rows, N), w.size(0))  # (rows, V)
        for start in range(0, N, chunk_rows):
            rows = slice(start, start + chunk_rows)
            target = targets[rows, None]  # (rows, 1)
            if one_hot:
                log_p = (h[rows] @ w.T).float().log_softmax(dim=-1)  # (rows, V)
                is_target = torch.arange(log_p.size(1), device=h.device) == target  # (rows, V)
                loss -= torch.where(is_target, log_p, 0).sum(dim=-1).sum()
                grad = (log_p.exp() - is_target.float()).to(dtype)
            else:
                logits = torch.mm(h[rows], w.T, out=buffer[: len(target)]).float()  # (rows, V)
                target_logit = logits.gather(1, target)  # (rows, 1)
                top = logits.amax(dim=-1, keepdim=True)  # subtracted, so that exp cannot overflow
                p = logits.sub_(top).exp_()  # not normalized yet
                total = p.sum(dim=-1, keepdim=True)
                loss += (total.log() + top - target_logit).sum()
                p.div_(total).scatter_add_(1, target, p.new_full(target.shape, -1))
                grad = p.to(dtype)
            grad_hidden[rows] = grad @ w
            if one_hot or dtype != weight.dtype:
                grad_weight += grad.T @ summands[rows]
            else:
                grad_weight.addmm_(grad.T, h[rows])  # adds without a (V, C) product in between
        if fp16:
            grad_weight *= 64
        ctx.save_for_backward(grad_hidden.to(hidden.dtype), grad_weight)
        return loss / N

    @staticmethod
    def backward(ctx: Any, *grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_output[0] / grad_hidden.size(0)
        return grad_hidden * scale, grad_weight * scale, None, None, None, None


@torch.compiler.nested_compile_region  # compiled once, not again for each layer
def blocked_attention(q: Tensor, k: Tensor, v: Tensor, rows: int = 128) -> Tensor:
    """Causal attention of q, k and v (B * H, T, D), for ``rows`` queries at a time.

    For the compiled bf16 step on a CPU. Inductor fuses a block's softmax into one loop, and its
    matrix products are larger than those in torch's kernel: a step of 124M at 4 x 512 is 1.1 times
    as fast. Future keys are computed only within a block's own queries, then masked. The scores are
    rounded to the dtype of q before the softmax, which is in fp32.
    """
    T, D = q.shape[1:]
    positions = torch.arange(T, device=q.device)
    blocks = []
    for start in range(0, T, rows):
        stop = min(start + rows, T)
        scores = (q[:, start:stop] @ k[:, :stop].mT).float() / math.sqrt(D)  # (B * H, rows, stop)
        is_future = positions[:stop] > positions[start:stop, None]  # (rows, stop)
        p = scores.masked_fill(is_future, -math.inf).softmax(dim=-1)
        blocks.append(p.to(v.dtype) @ v[:, :stop])
    return torch.cat(blocks, dim=1)
