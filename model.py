"""GPT-2 in plain PyTorch: its configuration, its loss, its blocks and its Hugging Face files.

Read it from the top: ``GPTConfig`` (the shape), ``LinearCrossEntropy`` (the loss without keeping
all of its logits), the blocks, then ``GPT``. Shapes use the field's letters: B batch, T time,
C channels (``d_model``), H heads, D = C / H channels of a head, V vocabulary.

Parameter names are Hugging Face GPT-2's, and ``save_pretrained`` writes a folder that
``transformers``, vLLM, llama.cpp and lm-eval open as it is.
"""

from common import (
    END_OF_TEXT,
    VOCAB_SIZE,
    Bounds,
    check_options,
    download_model,
    first_line,
    read_json,
    require_regular_file,
    sha256,
)

import hashlib
import json
import math
import re
import reprlib
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# GPT-2's Conv1D layers store their weight as (in, out), the transpose of nn.Linear's.
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# What config.json calls the fields of GPTConfig.
HF_NAMES = {
    "d_model": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
    "context_length": "n_positions",
    "vocab_size": "vocab_size",
}
# What config.json says besides, and must not contradict in a model that this file can compute.
HF_ARCHITECTURE: dict[str, Any] = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "n_inner": None,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def is_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN or infinity; NaN passes through both minimum and maximum."""
    low, high = torch.aminmax(tensor.detach())
    return math.isfinite(low) and math.isfinite(high)


@dataclass(frozen=True)
class GPTConfig:
    """The shape of the model. The defaults are GPT-2 124M with half of its context."""

    d_model: Annotated[int, Bounds(1, 2**17)] = 768
    """Channels of the residual stream; a multiple of n-heads."""
    n_heads: Annotated[int, Bounds(1, 2**17)] = 12
    """Attention heads in each layer."""
    n_layers: Annotated[int, Bounds(1, 2**14)] = 12
    """Transformer blocks."""
    context_length: Annotated[int, Bounds(1, 2**24)] = 512
    """The longest sequence of tokens that the model can attend to."""
    vocab_size: Annotated[int, Bounds(1, 2**24)] = 50304
    """Rows of the embedding: 50,257 tokens, padded to a multiple of 128 for speed."""

    def validate(self) -> list[str]:
        """Every problem of this shape, one message each; empty when it can be built."""
        problems = check_options(self, prefix="model.")
        if not problems and self.d_model % self.n_heads != 0:
            problems.append(
                f"model.d_model {self.d_model} must be a multiple of model.n_heads {self.n_heads}"
            )
        return problems


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


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        # The longest T for which compiled bf16 on a CPU uses blocked_attention; 0: never. The
        # probabilities that it saves are more than half of a (T, T) matrix for each head. At 1024,
        # and in fp32, torch's kernel is as fast.
        self.blocked_tokens = 512
        # Query, key and value of all heads in one matrix.
        self.c_attn = nn.Linear(config.d_model, 3 * config.d_model)
        self.c_proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_heads, C // self.n_heads)  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        compiled_on_cpu = x.device.type == "cpu" and torch.compiler.is_compiling()
        bf16 = q.dtype == torch.bfloat16
        if compiled_on_cpu and bf16 and mask is None and self.blocked_tokens >= T:
            # Copies, since nested_compile_region rejects inputs that are views of one tensor.
            q, k, v = (x.flatten(0, 1).contiguous() for x in (q, k, v))
            y = blocked_attention(q, k, v).view(B, self.n_heads, T, -1)
        else:
            # Fused attention where there is a kernel for it: never a (T, T) matrix in memory. No
            # backend is forced: torch 2.13 tries cuDNN first by itself on sm_9x and sm_10x with a
            # cuDNN above 9.15.0 (older ones fail at lengths that 128 does not divide,
            # pytorch#169849), and FlashAttention first elsewhere.
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # heads side by side again


class MLP(nn.Module):
    # Four times as wide as the residual stream, as in the first transformer (Vaswani et al. 2017).
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.d_model, 4 * config.d_model)
        self.c_proj = nn.Linear(4 * config.d_model, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        # GPT-2 was trained with the tanh approximation of GELU; the exact one is another function.
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.d_model)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.d_model)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        # Pre-norm: no LayerNorm on the residual path between the blocks, so deep models train.
        x = x + self.attn(self.ln_1(x), mask)
        x = x + self.mlp(self.ln_2(x))
        return x


class Transformer(nn.Module):
    """All but the head. A module of its own only because Hugging Face's names begin with it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.d_model)  # tokens
        self.wpe = nn.Embedding(config.context_length, config.d_model)  # positions
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = nn.LayerNorm(config.d_model)


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): pre-norm blocks, learned positions, the head tied to ``wte``."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if problems := config.validate():
            raise ValueError("; ".join(problems))
        self.config = config
        # Rows whose logits exist at once in the loss; 0: all rows; None: by the device.
        self.loss_chunk_rows: int | None = None
        # Blocks, from the first on, whose activations the backward pass computes again.
        self.recomputed_blocks = 0
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        # Weight tying (Press & Wolf 2017): 38.6M parameters of the 124M are not held twice.
        self.lm_head.weight = self.transformer.wte.weight
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """GPT-2's initial weights: normal with std 0.02, biases 0."""
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                # 2 n_layers of these add to the residual stream: its variance must not grow.
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layers))
            elif parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)  # LayerNorm's weights are 1 already

    def hidden_states(
        self, idx: Tensor, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The last layer's normalized states (B, T, C) of the tokens ``idx`` (B, T).

        By default each row is a text from its beginning, with causal attention. Other layouts give
        ``positions`` (B, T) and a ``mask`` (B, 1, T, T): boolean, true where a query sees a key, or
        in the dtype of the computation, added to the attention scores.

        Raises ValueError when the rows are longer than the context.
        """
        T = idx.size(1)
        limit = self.config.context_length
        if positions is None:
            if limit < T:
                raise ValueError(f"{T} tokens do not fit the context of {limit}; shorten the input")
            positions = torch.arange(T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        for i, block in enumerate(self.transformer.h):
            if i < self.recomputed_blocks and torch.is_grad_enabled():
                # Only x is kept: without dropout there is no random state to restore.
                x = checkpoint(block, x, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, mask)
        return self.transformer.ln_f(x)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of tokens (B, T), or with ``targets`` (B, T) the mean loss in nats."""
        hidden = self.hidden_states(idx)  # (B, T, C)
        if targets is None:
            return self.lm_head(hidden)
        return self._loss(hidden.flatten(0, 1), targets.flatten())

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of states (N, C) against targets (N,)."""
        device = hidden.device.type
        # Products with out= are not autocast, so the precision is passed on.
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        bf16 = dtype == torch.bfloat16
        rows = self.loss_chunk_rows
        if rows is None:
            if device == "cuda":
                # 4096 rows of logits are 0.8 GB in fp32. No more than about eight chunks: Inductor
                # would put their weight gradients off to the end of the forward pass, to add them
                # up in one kernel, which keeps every chunk's logits until then. At 64 x 1024 tokens
                # and 2 layers the counted peak of a micro-step falls from 8.98 to 6.75 GB.
                rows = max(4096, hidden.size(0) // 8)
            elif device == "cpu" and torch.compiler.is_compiling() and bf16 and len(hidden) <= 4096:
                # The plain loss, with up to 0.8 GB of logits. In bf16 the compiled step of 124M at
                # 4 x 512 is a little faster with it, and needs less memory. In fp32 it needs more.
                rows = 0
            else:
                # A CPU wants the logits in its cache, but not so few of them that adding up the
                # weight's gradient (V, C) costs more than a pass over the logits.
                rows = max(128, self.config.d_model)
        if rows == 0:  # the plain loss, which keeps all logits
            return F.cross_entropy(self.lm_head(hidden).float(), targets)
        if torch.is_grad_enabled():
            one_hot = torch.compiler.is_compiling()
            return LinearCrossEntropy.apply(
                hidden, self.lm_head.weight, targets, rows, dtype, one_hot
            )
        # Without gradients, in validation, the chunks are all that is needed of the above.
        total = hidden.new_zeros((), dtype=torch.float32)
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
            total += F.cross_entropy(self.lm_head(h).float(), t, reduction="sum")
        return total / targets.numel()

    @torch.no_grad()
    def crop_context(self, context_length: int) -> None:
        """Keep only the first positions: texts within them are computed as before.

        Raises ValueError for more positions than there are.
        """
        if context_length > self.config.context_length:
            raise ValueError(
                f"context_length {context_length} must be at most {self.config.context_length}"
            )
        self.config = replace(self.config, context_length=context_length)
        positions = self.transformer.wpe.weight[:context_length].clone()  # (T, C)
        self.transformer.wpe = nn.Embedding.from_pretrained(positions, freeze=False)

    # ---- numbers ---------------------------------------------------------------------------------

    def num_parameters(self, position: bool = True) -> int:
        """Parameters, the tied head counted once; without ``position`` those of wpe left out."""
        total = sum(p.numel() for p in self.parameters())
        return total if position else total - self.transformer.wpe.weight.numel()

    def flops_per_token(self) -> int:
        """Training FLOPs a token at full context, forward and backward pass.

        6 N + 12 L C T (PaLM, Chowdhery et al. 2022, appendix B), N without the positions. The
        attention is counted in full, not its causal half, as nanoGPT and llm.c count it.
        """
        c = self.config
        attention = 12 * c.n_layers * c.d_model * c.context_length
        return 6 * self.num_parameters(position=False) + attention

    # ---- Hugging Face's files --------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "GPT":
        """Read a Hugging Face GPT-2, a folder or a hub id such as "gpt2", onto the CPU in fp32.

        The number of embedding rows is kept as it is. Raises FileNotFoundError when there is no
        such folder or model, and ValueError when it is not a GPT-2 that this file can compute or
        its files are damaged.
        """
        folder = local_folder(source)
        config = read_shape(folder)
        with ExitStack() as files:
            try:
                weights = _open_weights(folder, files)
            except (OSError, ValueError, SafetensorError) as error:
                raise ValueError(
                    f"{folder}: damaged checkpoint ({first_line(error)}); use another"
                ) from error
            # A model of ten million layers, or of more memory than there is, is not even begun.
            problems = _size_problems(config, weights)
            if problems:
                raise _not_of_config(folder, problems)
            with torch.device("meta"):  # no memory and no random weights, only to be replaced
                model = cls(config)
            try:
                model._load_hf_weights(weights, folder)
            except SafetensorError as error:
                raise ValueError(
                    f"{folder}: damaged checkpoint ({first_line(error)}); use another"
                ) from error
        return model

    def _load_hf_weights(self, weights: "HFWeights", folder: Path) -> None:
        weights = dict(weights)
        head = weights.pop("lm_head.weight", None)
        loaded: dict[str, Tensor] = {}
        problems = []
        for name, parameter in self.transformer.named_parameters():
            weight = weights.pop(name, None)
            if weight is None:
                problems.append(f"{name} is missing")
                continue
            shape = weight.shape[::-1] if name.endswith(CONV1D) else weight.shape
            if shape != parameter.shape:
                problems.append(f"{name} is of shape {shape}")
            elif weight.dtype not in FLOATS:
                problems.append(f"{name} is of type {weight.dtype}, which is not floating point")
            elif not problems:
                loaded[name] = weight.read(transposed=name.endswith(CONV1D))
                if not is_finite(loaded[name]):
                    problems.append(f"{name} is not finite")
        # OpenAI's files have the causal mask, which is not a parameter.
        masks = (".attn.bias", ".attn.masked_bias")
        problems += [name for name in weights if not name.endswith(masks)]
        if not problems and head is not None:
            same = head.dtype in FLOATS and head.shape == loaded["wte.weight"].shape
            if not same or not torch.equal(head.read(), loaded["wte.weight"]):
                problems.append("its head is not tied to the embedding")
        if problems:
            raise _not_of_config(folder, problems)
        self.transformer.load_state_dict(loaded, assign=True)
        self.lm_head.weight = self.transformer.wte.weight

    def save_pretrained(self, path: str | Path) -> None:
        """Write ``model.safetensors``, ``config.json`` and ``generation_config.json`` to ``path``.

        Weights are fp32 in Hugging Face's orientation; the tied head is not stored twice. The
        tokenizer's files, which do not depend on the model, are ``dataset.save_tokenizer``'s.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        special_tokens = {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT}
        hf_config = {
            **HF_ARCHITECTURE,
            **{theirs: getattr(self.config, ours) for ours, theirs in HF_NAMES.items()},
            **special_tokens,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "architectures": ["GPT2LMHeadModel"],
            "n_ctx": self.config.context_length,  # the name that llama.cpp's converter looks for
        }
        generation: dict[str, Any] = dict(special_tokens)
        if self.config.vocab_size > VOCAB_SIZE:
            # transformers' generate would otherwise sample rows that only pad the vocabulary
            generation["suppress_tokens"] = list(range(VOCAB_SIZE, self.config.vocab_size))
        for name, content in (
            ("config.json", hf_config),
            ("generation_config.json", generation),
        ):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        # By the parameters and not the state_dict, which holds the tied head a second time.
        weights = {}
        for name, parameter in self.transformer.named_parameters():
            value = parameter.T if name.endswith(CONV1D) else parameter
            weights[f"transformer.{name}"] = value.detach().float().contiguous()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        # safetensors makes its file private to the user; give it the modes of its neighbour
        shutil.copymode(folder / "config.json", folder / "model.safetensors")


# ---- reading Hugging Face's files ----------------------------------------------------------------


def local_folder(source: str | Path) -> Path:
    """The folder of a model: ``source`` itself, or the local copy of a hub id.

    Raises ValueError for a file, and FileNotFoundError where there is no such folder or model.
    """
    folder = Path(source)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give the folder that it is in")
    return folder if folder.exists() else download_model(str(source))


def read_shape(folder: Path) -> GPTConfig:
    """The shape in a model's config.json. Raises ValueError when GPT cannot compute it."""
    try:
        hf_config = read_json(folder / "config.json", dict[str, Any])
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder}: damaged checkpoint ({first_line(error)}); use another"
        ) from error
    return _read_config(hf_config, folder)


def weights_sha256(folder: Path) -> str:
    """The SHA-256 of model.safetensors in hexadecimal, as ``sha256sum`` prints it.

    For a model in several files it is that of ``sha256sum model-*.safetensors | sha256sum``.
    """
    path = folder / "model.safetensors"
    if path.exists():
        return sha256(path)
    names = sorted(set(_read_index(folder / "model.safetensors.index.json").values()))
    lines = [f"{sha256(folder / name)}  {name}\n" for name in names]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of the types that are weights


@dataclass(frozen=True)
class HFWeight:
    """A tensor of a safetensors file, of which only the header was read."""

    file: Any
    """What safe_open returns."""
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self, transposed: bool = False) -> Tensor:
        """Its values in fp32."""
        value: Tensor = self.file.get_tensor(self.name)
        return (
            (value.T if transposed else value).float().clone(memory_format=torch.contiguous_format)
        )


HFWeights = dict[str, HFWeight]


def _open_weights(folder: Path, files: ExitStack) -> HFWeights:
    """The tensors of a folder by name, without the prefix "transformer.", which OpenAI's lack.

    They are those of model.safetensors or of the files that model.safetensors.index.json names:
    any other file in the folder is not this model's. Raises ValueError, OSError or SafetensorError.
    """
    path = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    file_of: dict[str, Path] | None = None
    paths = [path]
    if index.exists() and not path.exists():
        file_of = {name: folder / file for name, file in _read_index(index).items()}
        paths = sorted(set(file_of.values()))
    weights: HFWeights = {}
    for path in paths:
        require_regular_file(path)
        file = files.enter_context(safe_open(path, framework="pt"))
        for name in file.keys():  # noqa: SIM118  # it is not a dict
            if file_of is not None and file_of.get(name) != path:
                continue
            header = file.get_slice(name)
            key = name.removeprefix("transformer.")
            if key in weights:
                raise ValueError(f"{path} holds {key} twice")
            weights[key] = HFWeight(file, name, tuple(header.get_shape()), header.get_dtype())
    return weights


def _read_index(path: Path) -> dict[str, str]:
    """Which file of the folder holds each tensor of a model in several files."""
    content = read_json(path, dict[str, Any])
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: no weight_map")
    for file in weight_map.values():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise ValueError(f"{path}: weight_map: {reprlib.repr(file)} is not a file beside it")
    return weight_map


def _read_config(hf_config: dict[str, Any], folder: Path) -> GPTConfig:
    """The shape that config.json gives. Raises ValueError when GPT cannot compute it."""
    # A model of another architecture would load and compute nonsense. reprlib: values may be huge.
    problems = [
        f"{name} {reprlib.repr(hf_config[name])}"
        for name, value in HF_ARCHITECTURE.items()
        if hf_config.get(name, value) != value
    ]
    for name in HF_NAMES.values():
        value = hf_config.get(name)
        if type(value) is not int:  # bool is a subclass of int
            problems.append(f"no {name}" if value is None else f"{name} {reprlib.repr(value)}")
        elif abs(value) >= 2**63:  # neither tensors nor floats take it
            problems.append(f"{name} is above 2**63")
    if not problems:
        config = GPTConfig(**{ours: hf_config[theirs] for ours, theirs in HF_NAMES.items()})
        problems = config.validate()
        for ours, theirs in HF_NAMES.items():
            problems = [problem.replace(f"model.{ours}", theirs) for problem in problems]
    if problems:
        raise ValueError(
            f"{folder}/config.json: not a GPT-2 that this model computes: {', '.join(problems)}"
        )
    return config


def _size_problems(config: GPTConfig, weights: HFWeights) -> list[str]:
    """Where the weights are not of the sizes that determine those of the whole model."""
    problems = []
    for name, rows in (("wte.weight", config.vocab_size), ("wpe.weight", config.context_length)):
        if name not in weights:
            problems.append(f"{name} is missing")
        elif weights[name].shape != (rows, config.d_model):
            problems.append(f"{name} is of shape {weights[name].shape}")
    layers = {name.split(".")[1] for name in weights if name.startswith("h.")}
    if config.n_layers > len(layers):
        problems.append(f"h.{len(layers)}.ln_1.weight is missing, n_layer is {config.n_layers}")
    return problems


def _not_of_config(folder: Path, problems: list[str]) -> ValueError:
    return ValueError(f"{folder}: not a GPT-2 of its config.json: {', '.join(problems[:3])}")
