"""GPT-2 in plain PyTorch: its shape, its blocks, its loss.

Read it from the top. Shapes use the field's letters: B batch, T time, C channels (``d_model``),
H heads, D = C / H channels of a head, V vocabulary. Parameter names are Hugging Face GPT-2's, and
``save_pretrained`` writes a folder that transformers, vLLM, llama.cpp and lm-eval open as it is.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gptxs import hf
from gptxs.cli import number_problems
from gptxs.hub import local_folder
from gptxs.kernels import blocked_attention, linear_cross_entropy


@dataclass(frozen=True)
class GPTConfig:
    """The shape of the model. The defaults are GPT-2 124M with half of its context."""

    d_model: int = 768
    """Channels of the residual stream; a multiple of n-heads."""
    n_heads: int = 12
    """Attention heads in each layer."""
    n_layers: int = 12
    """Transformer blocks."""
    context_length: int = 512
    """The longest sequence of tokens that the model can attend to."""
    vocab_size: int = 50304
    """Rows of the embedding: 50,257 tokens, padded to a multiple of 128 for speed."""

    def validate(self) -> list[str]:
        """Every problem of this shape, one message each; empty when it can be built."""
        problems = number_problems(self, at_least_one=asdict(self), prefix="model.")
        if not problems and self.d_model % self.n_heads != 0:
            problems.append(
                f"model.d_model {self.d_model} must be a multiple of model.n_heads {self.n_heads}"
            )
        return problems


# ---- the blocks ----------------------------------------------------------------------------------


@dataclass
class KVCache:
    """Keys and values of one layer, for up to ``length`` tokens."""

    k: Tensor  # (B, H, length, D)
    v: Tensor  # (B, H, length, D)
    tokens: int = 0  # seen so far

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append those of T new tokens (B, H, T, D); returns those of all tokens so far."""
        start = self.tokens
        self.tokens = start + k.size(2)
        self.k[:, :, start : self.tokens] = k
        self.v[:, :, start : self.tokens] = v
        return self.k[:, :, : self.tokens], self.v[:, :, : self.tokens]


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        # The longest T for which compiled bf16 on a CPU uses blocked_attention; 0: never. It keeps
        # the probabilities for the backward pass: more than half a (T, T) matrix for each head. At
        # 1024, and in fp32, torch's kernel is as fast.
        self.blocked_tokens = 512
        # Query, key and value of all heads in one matrix.
        self.c_attn = nn.Linear(config.d_model, 3 * config.d_model)
        self.c_proj = nn.Linear(config.d_model, config.d_model)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_heads, C // self.n_heads)  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        if cache is not None:
            k, v = cache.update(k, v)  # (B, H, tokens, D) each
        plain = mask is None and cache is None
        compiled_on_cpu = x.device.type == "cpu" and torch.compiler.is_compiling()
        bf16 = q.dtype == torch.bfloat16
        if compiled_on_cpu and bf16 and plain and self.blocked_tokens >= T:
            # Copies: blocked_attention is compiled apart, which rejects views of one tensor.
            q, k, v = (t.flatten(0, 1).contiguous() for t in (q, k, v))
            y = blocked_attention(q, k, v).view(B, self.n_heads, T, -1)
        else:
            # Fused attention where there is a kernel for it: never a (T, T) matrix in memory. No
            # backend is forced: torch 2.13 tries cuDNN first by itself on sm_9x and sm_10x with a
            # cuDNN above 9.15.0 (older ones fail at lengths that 128 does not divide,
            # pytorch#169849), and FlashAttention first elsewhere.
            # A single query comes after all keys, those of the cache, and needs no mask.
            causal = mask is None and T > 1
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
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

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        # Pre-norm: no LayerNorm on the residual path between the blocks, so deep models train.
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """All but the head. A module of its own only because Hugging Face's names begin with it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.d_model)  # tokens
        self.wpe = nn.Embedding(config.context_length, config.d_model)  # positions
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = nn.LayerNorm(config.d_model)


# ---- the model -----------------------------------------------------------------------------------


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): pre-norm blocks, learned positions, the head tied to ``wte``."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        # Rows whose logits exist at once in the loss; 0: all rows; None: by the device.
        self.loss_chunk_rows: int | None = None
        # Whether the residual stream is bf16 too under autocast in bf16; None: not on a CPU.
        self.bf16_residual: bool | None = None
        # How many blocks, from the first on, compute their activations again in the backward pass.
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

    def make_cache(self, batch: int, length: int) -> list[KVCache]:
        """An empty cache for each layer, for up to ``length`` tokens, in the weights' dtype."""
        c = self.config
        weight = self.lm_head.weight
        shape = (c.n_layers, 2, batch, c.n_heads, length, c.d_model // c.n_heads)
        return [KVCache(k, v) for k, v in weight.new_zeros(shape)]

    def hidden_states(
        self,
        idx: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: list[KVCache] | None = None,
    ) -> Tensor:
        """The last layer's normalized states (B, T, C) of the tokens ``idx`` (B, T).

        By default each row is a text from its beginning, with causal attention. With a ``cache`` it
        continues the tokens that are in it, and is appended to them.
        Other layouts give ``positions`` (B, T) and a ``mask`` (B, 1, T, T): boolean, true where a
        query sees a key, or in the dtype of the computation, added to the attention scores.

        Raises ValueError when the rows are longer than the context.
        """
        T = idx.size(1)
        start = cache[0].tokens if cache else 0
        if positions is None:
            limit = cache[0].k.size(2) if cache else self.config.context_length
            if start + T > limit:
                raise ValueError(
                    f"{start + T} tokens do not fit the context of {limit}; shorten the input"
                )
            positions = torch.arange(start, start + T, device=idx.device)
        if start > 0 and T > 1 and mask is None:
            # is_causal would let the first of these tokens see only the first one in the cache.
            mask = torch.ones(T, start + T, dtype=torch.bool, device=idx.device).tril(start)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        device = x.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        bf16_residual = device != "cpu" if self.bf16_residual is None else self.bf16_residual
        if bf16_residual and autocast == torch.bfloat16:
            # Cast once: a GPU waits for memory wherever a block reads and writes an fp32 stream.
            # llm.c does the same. A CPU computes slower so, and the stream may overflow fp16.
            x = x.bfloat16()
        for i, block in enumerate(self.transformer.h):
            if i < self.recomputed_blocks and torch.is_grad_enabled():
                # Only x is kept: without dropout there is no random state to restore.
                x = checkpoint(block, x, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, mask, cache[i] if cache else None)
        return self.transformer.ln_f(x)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of tokens (B, T), or with ``targets`` (B, T) the mean loss in nats."""
        hidden = self.hidden_states(idx)  # (B, T, C)
        if targets is None:
            return self.lm_head(hidden)
        return linear_cross_entropy(
            hidden.flatten(0, 1),
            self.lm_head.weight,
            targets.flatten(),
            chunk_rows=self.loss_chunk_rows,
        )

    # ---- numbers ---------------------------------------------------------------------------------

    def num_parameters(self) -> int:
        """Parameters, the tied head counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """Training FLOPs a token at full context, forward and backward pass.

        6 N + 12 L C T (PaLM, Chowdhery et al. 2022, appendix B), N without the positions. The
        attention is counted in full, not its causal half, as nanoGPT and llm.c count it.
        """
        c = self.config
        weights = self.num_parameters() - self.transformer.wpe.weight.numel()
        return 6 * weights + 12 * c.n_layers * c.d_model * c.context_length

    # ---- Hugging Face's files --------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """The parameters by name, without the head, which is the embedding once more."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def load_weights(
        self, weights: dict[str, Tensor], source: str | Path, assign: bool = False
    ) -> None:
        """Copy what ``weights`` returns into the parameters; with ``assign`` it becomes them.

        Raises ValueError, which names their ``source``, if it does not fit.
        """
        tied = {**weights, "lm_head.weight": weights.get("transformer.wte.weight")}
        try:
            self.load_state_dict(tied, assign=assign)
        except (RuntimeError, AttributeError) as error:
            problem = " ".join(str(error).split())
            raise ValueError(f"{source}: not the weights of its config.json: {problem}") from None
        self.lm_head.weight = self.transformer.wte.weight

    @classmethod
    def from_pretrained(cls, source: str | Path) -> GPT:
        """Read a Hugging Face GPT-2, a folder or a hub id such as "gpt2", onto the CPU in fp32.

        The number of embedding rows is kept as it is. Raises FileNotFoundError when there is no
        such folder or model, and ValueError when it is not a GPT-2 that this file can compute.
        """
        folder = local_folder(source)
        config = GPTConfig(**hf.read_shape(folder))
        if problems := config.validate():
            raise ValueError(f"{folder}/config.json: {'; '.join(problems)}")
        with torch.device("meta"):  # no memory and no random weights, only to be replaced
            model = cls(config)
        model.load_weights(hf.read_weights(folder), folder, assign=True)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model in fp32 as a Hugging Face folder, with GPT-2's tokenizer if it is its."""
        hf.write_model(Path(folder), self.weights(), asdict(self.config))
