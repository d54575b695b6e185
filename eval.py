"""Sample from a model, or measure its loss on validation shards (--loss).

A checkpoint is a folder, a log folder (its newest checkpoint) or a model of the hub, such as gpt2.
Without --prompt, prompts are read from standard input, a line each.

Examples: python eval.py --checkpoint log --prompt "The function returns" --stream
          python eval.py --checkpoint gpt2 --loss --data-dir edu_fineweb10B --context-length 512
"""

from common import (
    END_OF_TEXT,
    VOCAB_SIZE,
    Bounds,
    DtypeName,
    check_options,
    choose_device,
    choose_dtype,
    exit_with_one_line,
    parse_options,
)

import codecs
import contextlib
import copy
import io
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from checkpoint import open_checkpoint
from data_loader import TokenDataset, TokenLoader
from dataset import encode_ordinary, get_tokenizer
from model import GPT, Block

# ---- configuration -------------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplingOptions:
    """How many samples are drawn of a prompt, and how."""

    max_new_tokens: Annotated[int, Bounds(1, 1_000_000)] = 128
    """Length of a sample in tokens; it ends earlier at <|endoftext|>."""
    num_samples: Annotated[int, Bounds(1, 4096)] = 1
    """Samples of each prompt. Sample i is drawn with --seed + i, alone or in a batch."""
    temperature: Annotated[float, Bounds(0, 100)] = 1.0
    """Divides the logits: below 1 more conservative, above 1 more random. 0 is --greedy."""
    top_k: Annotated[int | None, Bounds(1, 1_000_000)] = 50
    """Draw from this many of the most likely tokens; None: from all."""
    top_p: Annotated[float | None, Bounds(0, 1)] = None
    """Nucleus sampling: draw from the smallest set of tokens with at least this total
    probability."""
    seed: Annotated[int, Bounds(-(2**63), 2**64 - 1)] = 1337
    """The same seed gives the same text on the same device in the same precision; a batch of
    samples may differ by rounding."""


@dataclass(frozen=True)
class EvalConfig(SamplingOptions):
    checkpoint: str = "log"
    """A checkpoint, a log folder (its newest checkpoint) or a hub id such as gpt2."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A text to continue; repeat the flag for several. Default: read standard input."""
    greedy: bool = False
    """Always take the most likely token."""
    stream: bool = False
    """Print each token as soon as it is drawn, one sample after the other."""
    json: bool = False
    """Print a JSON line for each sample, or for the loss."""

    loss: bool = False
    """Measure the validation loss instead of sampling."""
    data_dir: Path = Path("edu_fineweb10B")
    """Folder of token shards, for --loss."""
    val_tokens: Annotated[int, Bounds(1, 2**50)] = 10_485_760
    """Tokens to measure the loss on: the first ones of the validation split."""
    context_length: Annotated[int | None, Bounds(1, 2**24)] = None
    """Tokens in a window of the loss; default: the model's context. Only losses at the same
    length are comparable."""
    micro_batch: Annotated[int, Bounds(1, 65_536)] = 16
    """Windows computed at once, for --loss."""

    device: str = "auto"
    """cuda, cuda:1, mps or cpu; auto: the machine's accelerator, or the CPU without one."""
    dtype: DtypeName = "auto"
    """Precision; auto: bf16 where the device has it in hardware, fp16 on other GPUs."""
    quantize: Literal["none", "int8"] = "none"
    """int8: round the weights of all matrix products to 8 bits, with a scale for each output
    channel. Faster on a CPU; other devices refuse it."""
    verify: bool = True
    """Compare the checkpoint's files with its checksums first."""

    def validate(self) -> list[str]:
        """Every problem of these options, one message each."""
        problems = check_options(self)
        if self.top_p == 0:
            problems.append("top_p 0.0 must be above 0")
        if 0 < self.temperature < 1e-6:  # logits divided by less could overflow
            problems.append(f"temperature {self.temperature} must be 0 or at least 1e-06")
        if self.seed < 2**64 < self.seed + self.num_samples:
            problems.append(f"seed {self.seed} is too large for num_samples {self.num_samples}")
        if self.greedy and self.top_p is not None:
            problems.append("greedy and top_p exclude each other")
        if self.greedy and self.temperature not in (0, SamplingOptions.temperature):
            problems.append(f"greedy and temperature {self.temperature} exclude each other")
        if self.loss and (self.prompt or self.stream):
            problems.append("loss excludes prompt and stream")
        if self.stream and self.json:
            problems.append("stream and json exclude each other")
        return problems


# ---- loss ----------------------------------------------------------------------------------------


@torch.no_grad()
def validation_loss(
    model: GPT,
    dataset: TokenDataset,
    tokens: int,
    micro_batch: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Mean loss, in nats, of the first ``tokens`` tokens of a data set, in complete windows.

    Each rank computes every ``world_size``-th window and all return the loss of all of them, so
    it is the same for any number of ranks.

    Raises ValueError when ``tokens`` are less than one window.
    """
    windows = np.arange(rank, count_windows(dataset, tokens), world_size)
    batches = (windows[i : i + micro_batch] for i in range(0, len(windows), micro_batch))
    sums = []  # left on the device: reading a number here would wait for every batch
    with (
        torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
        contextlib.closing(TokenLoader(dataset, batches, device, prefetch=2)) as loader,
    ):
        for inputs, targets in loader:  # (B, T) each
            sums.append(model(inputs, targets).float() * targets.numel())
    # Millions of tokens are summed in fp64, on the host since not every device has it.
    total = float(torch.stack(sums).cpu().double().sum()) if sums else 0.0
    # Ranks may have a window more or less than others, so sums are added up and not means.
    total_and_count = torch.tensor(
        [total, len(windows) * dataset.context_length], dtype=torch.float64
    )
    if dist.is_initialized():
        total_and_count = total_and_count.to(device)  # NCCL reduces only what is on the GPU
        dist.all_reduce(total_and_count)
    return float(total_and_count[0] / total_and_count[1])


def count_windows(dataset: TokenDataset, tokens: int) -> int:
    """The complete windows in the first ``tokens`` tokens. Raises ValueError when there is none."""
    if tokens < dataset.context_length:
        raise ValueError(
            f"{tokens} validation tokens are less than one window of {dataset.context_length}"
        )
    return min(tokens // dataset.context_length, len(dataset))


def count_bytes(dataset: TokenDataset, windows: int) -> int:
    """Bytes of text that the targets of the first windows decode to; <|endoftext|> has none."""
    tokenizer = get_tokenizer()
    lengths = np.zeros(2**16, dtype=np.int64)  # of every uint16 token, the padding's too
    for token in range(END_OF_TEXT):
        lengths[token] = len(tokenizer.decode_single_token_bytes(token))
    total = 0
    for window in range(windows):  # one at a time: the lengths take eight bytes a token
        targets = dataset.windows(np.array([window]))[:, 1:]
        total += int(lengths[targets].sum())
    return total


def report_loss(config: EvalConfig, model: GPT, device: torch.device, dtype: torch.dtype) -> None:
    """Print loss, perplexity and bits per byte on the validation split."""
    T = config.context_length or model.config.context_length
    if model.config.context_length < T:
        raise ValueError(
            f"context_length {T} is longer than the model's {model.config.context_length}"
        )
    dataset = TokenDataset(config.data_dir, "val", T)
    dataset.check_tokens(model.config.vocab_size)
    windows = count_windows(dataset, config.val_tokens)
    loss = validation_loss(model, dataset, windows * T, config.micro_batch, device, dtype=dtype)
    n_bytes = count_bytes(dataset, windows)
    perplexity = math.exp(loss) if loss < 700 else math.inf  # 700: what a float can hold
    # Unlike the loss per token, it can be compared across tokenizers. Targets that are all
    # <|endoftext|> have no text.
    bits_per_byte = loss / math.log(2) * windows * T / n_bytes if n_bytes else math.nan
    if config.json:
        result = {
            "loss": loss if math.isfinite(loss) else None,
            "perplexity": perplexity if math.isfinite(perplexity) else None,
            "bits_per_byte": bits_per_byte if math.isfinite(bits_per_byte) else None,
            "tokens": windows * T,
            "bytes": n_bytes,
            "context_length": T,
        }
        print(json.dumps(result))
    else:
        print(f"loss {loss:.4f}   perplexity {perplexity:.4f}   bits_per_byte {bits_per_byte:.4f}")
        print(f"{windows * T:,} tokens, {n_bytes:,} bytes of text, windows of {T} tokens")


# ---- decoding ------------------------------------------------------------------------------------


def prepare_for_decoding(
    model: GPT, rows: int, dtype: torch.dtype, int8: bool = False
) -> tuple[GPT, list[nn.Parameter]]:
    """A copy of the model in ``dtype``, at its fastest with ``rows`` tokens at a time.

    ``int8`` quantizes the linear layers and the head, not the token embedding tied to it. Also
    returns the copies of ``model.parameters()``, in that order; the copy of a parameter that has
    this dtype already shares its memory. The linear layers of the returned model are plain
    functions, so it is good for forward passes only.
    """
    copies = [nn.Parameter(p.to(dtype), requires_grad=False) for p in model.parameters()]
    # deepcopy looks an object's id up in its memo first and uses what it finds there.
    memo = {id(p): copied for p, copied in zip(model.parameters(), copies, strict=True)}
    prepared = copy.deepcopy(model, memo)
    for module in list(prepared.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                # A plain attribute and a plain function: looking up a module and its parameters
                # and calling it, 49 times a token, would cost a CPU another 2% (124M, batch 1).
                delattr(module, name)
                setattr(module, name, projection(layer, rows, int8))
    return prepared, copies


def projection(layer: nn.Linear, rows: int, int8: bool) -> Callable[[Tensor], Tensor]:
    """The layer as a function, in its fastest form for inputs of ``rows`` rows.

    This is the only place that decides how a matrix is stored for decoding.
    """
    weight = layer.weight
    bias = layer.bias
    if int8:
        quantized, scales = quantize(weight)
        # The int8 kernel wins only up to 16 rows. Beyond that, as in a prompt, a plain product with
        # the dequantized weights takes half the time.
        rounded = (quantized * scales[:, None].float()).to(weight.dtype)  # (N, K)

        def int8_linear(x: Tensor) -> Tensor:
            K = x.size(-1)
            if x.numel() > 16 * K:
                return F.linear(x, rounded, bias)
            # The kernel for bf16 inputs is vectorized for every CPU, the one for fp32 is not: it
            # takes 3 to 7 times as long as the product with fp32 weights (AVX2, torch 2.13).
            y = torch.ops.aten._weight_int8pack_mm(x.reshape(-1, K).bfloat16(), quantized, scales)
            y = y.view(*x.shape[:-1], -1).to(x.dtype)
            return y if bias is None else y + bias

        return int8_linear
    on_mkl = weight.device.type == "cpu" and torch.backends.mkl.is_available()
    if on_mkl and weight.dtype == torch.float32 and 1 < rows <= 64:
        # Store the weight also in the order in which MKL reads it: a product with 8 rows takes
        # down to half the time. These are the operators that Inductor uses for frozen weights; for
        # another number of rows, as in a prompt, they use the plain weight.
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
        return lambda x: torch.ops.mkl._mkl_linear(x, packed, weight, bias, rows)
    return partial(F.linear, weight=weight, bias=bias)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (N, K) as int8, 127 for the largest of a row, and each row's bf16 scale (N,).

    Raises ValueError where torch has no usable kernel for the product.
    """
    if weight.device.type != "cpu":
        # torch 2.13's CUDA kernel has one thread for each output, which reads a whole row alone.
        raise ValueError(f"quantize int8 is for cpu only, not {weight.device}; leave it out")
    if weight.size(1) % 32 != 0:  # the kernel would read beyond the end of a row
        raise ValueError(f"quantize int8: d_model {weight.size(1)} must be a multiple of 32")
    largest = weight.float().abs().amax(dim=1).clamp(min=1e-12)
    # Divide by the bf16-rounded scale, which also multiplies later, so that its rounding adds no
    # error. It is off by at most 1/512, too little for 127 to become 128 and overflow.
    scales = (largest / 127).bfloat16()
    return (weight / scales[:, None].float()).round_().to(torch.int8), scales


# cuDNN is left out: it builds a plan for each new shape, about 0.4 s each, and prompts have any
# length.
@sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
def decode(
    model: GPT, cache: Tensor, idx: Tensor, positions: Tensor, end: int | None = None
) -> Tensor:
    """The fp32 logits (B, 50257) of the token that follows ``idx`` (B, T).

    ``idx`` is a single token (T = 1) or a whole prompt that starts at position 0. Its keys and
    values are written to ``positions`` (T,) of the cache (n_layers, 2, B, H, places, D), which must
    already hold those of all earlier tokens. ``end`` is the last of ``positions`` plus one: only
    these places are read. Without it the whole cache is read and later places are masked out, so
    that shapes never change, as a CUDA graph requires.
    """
    # It must mirror GPT.hidden_states, Block.forward and CausalSelfAttention.forward, which have no
    # cache; tests/test_sampling.py compares the logits. The layers are the model's own modules:
    # a loop over plain functions only would be 2-4% faster (124M, batch 1, CPU).
    mask = None
    if end is None:
        end = cache.size(4)
        mask = positions[:, None] >= torch.arange(end, device=idx.device)  # (T, end)
    B, T = idx.shape
    x = model.transformer.wte(idx) + model.transformer.wpe(positions)  # (B, T, C)
    for layer, kv in zip(model.transformer.h, cache, strict=True):  # kv (2, B, H, places, D)
        block = cast(Block, layer)  # an nn.ModuleList does not know the type of its modules
        attention = block.attn
        qkv = attention.c_attn(block.ln_1(x)).view(B, T, 3, attention.n_heads, -1)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        q = qkv[0]
        kv.index_copy_(3, positions, qkv[1:])
        k, v = kv[:, :, :, :end]  # (B, H, end, D) each
        # A single token may attend to all before it, so only a prompt needs to be causal.
        causal = mask is None and T > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        x = x + attention.c_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)
        x = x + block.mlp(block.ln_2(x))
    logits = model.lm_head(model.transformer.ln_f(x[:, -1]))  # (B, V): of the last token only
    # Rows beyond the vocabulary only pad the matrix and must never be sampled.
    return logits.float()[:, :VOCAB_SIZE]


def capture_cuda_graph(step: Callable[..., Tensor], *inputs: Tensor) -> Callable[..., Tensor]:
    """``step`` as a CUDA graph: one launch instead of hundreds, for inputs of these shapes.

    The result is overwritten by the next call.
    """
    # A graph reads and writes fixed addresses, so each call copies its inputs to these.
    fixed_inputs = [x.clone() for x in inputs]
    # Kernels must not be loaded during the capture. Running the step twice is harmless: it writes
    # the same values to the same places of the cache.
    step(*fixed_inputs)
    graph = torch.cuda.CUDAGraph()
    # By default all captures of a process use one stream, of the GPU of the first of them.
    stream = torch.cuda.Stream(fixed_inputs[0].device)
    # The outer block leaves the stream even when the capture fails. Other threads, such as the
    # loader's or NCCL's, may use the device meanwhile.
    with (
        torch.cuda.stream(stream),
        torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
    ):
        output = step(*fixed_inputs)

    def replay(*inputs: Tensor) -> Tensor:
        for fixed_input, x in zip(fixed_inputs, inputs, strict=True):
            fixed_input.copy_(x)
        graph.replay()
        return output

    return replay


# ---- sampling ------------------------------------------------------------------------------------


def sample_next_token(
    logits: Tensor, generators: list[torch.Generator], options: SamplingOptions
) -> Tensor:
    """Draw one token (B,) for each row of logits (B, V), with a random generator for each row.

    Temperature first, then top-k, then top-p (Holtzman et al. 2019) of what is left. Temperature
    0 takes the most likely token.
    """
    if options.temperature == 0:
        return logits.argmax(dim=-1)
    V = logits.size(1)
    # A random number for each token, not for each place in the order: if rounding swaps two tokens
    # of nearly equal logits, each keeps its number and the draw stays the same.
    uniform = torch.stack([torch.rand(V, device=logits.device, generator=g) for g in generators])
    ids = torch.arange(V, device=logits.device).expand_as(logits)  # the token of each column
    if options.top_k is not None or options.top_p is not None:
        logits, ids = logits.topk(min(options.top_k or V, V))  # in descending order
    p = (logits / options.temperature).softmax(dim=-1)
    if options.top_p is not None:
        before = p.cumsum(dim=-1) - p  # total probability of the more likely tokens
        p = p.masked_fill(before >= options.top_p, 0)
    # The Gumbel-max trick: argmax(p / e) with e ~ Exp(1) is a draw from p, and unlike
    # torch.multinomial it does not make the host wait for the device.
    exponential = -uniform.gather(1, ids).log()
    column = (p / exponential).argmax(dim=-1, keepdim=True)  # (B, 1)
    return ids.gather(1, column)[:, 0]


class Sampler:
    """Samples from a model, reusing its copy of the weights, its cache and its CUDA graph.

    Computes in ``dtype``, by default that of the weights. Call ``update`` after the weights have
    changed. All streams share one cache: finish or drop a stream before the next.
    """

    def __init__(self, model: GPT, dtype: torch.dtype | None = None, int8: bool = False) -> None:
        self.model = model
        self.dtype = dtype or model.lm_head.weight.dtype
        self.int8 = int8
        self.use_graph = model.lm_head.weight.device.type == "cuda"
        self._rows = 0  # batch size of the prepared model; 0: it must be made again
        self._cache: Tensor | None = None
        self._replay: Callable[..., Tensor] | None = None

    @torch.inference_mode()
    def update(self) -> None:
        """Take the model's weights as they are now."""
        if self._replay is None:
            self._rows = 0  # makes _prepare copy, pack or quantize the weights again
            return
        # Keep the graph and overwrite the weights at the addresses that it reads: another capture
        # would empty the allocator's cache, which the next training step would have to fill again.
        for copied, p in zip(self._copies, self.model.parameters(), strict=True):
            copied.copy_(p)

    @torch.inference_mode()
    def _prepare(self, rows: int, places: int) -> Tensor:
        """The cache, made again, like the prepared model, only where its size has changed."""
        c = self.model.config
        if rows != self._rows:
            self._prepared, self._copies = prepare_for_decoding(
                self.model, rows, self.dtype, self.int8
            )
            self._rows = rows
            self._cache = None
        shape = (c.n_layers, 2, rows, c.n_heads, places, c.d_model // c.n_heads)
        if self._cache is None or self._cache.shape != shape:
            self._cache = self._prepared.transformer.wte.weight.new_zeros(shape)
            self._replay = None
        self._cache.zero_()  # a masked place has weight 0, but 0 times a NaN left there is NaN
        return self._cache

    def stream(self, idx: Tensor, options: SamplingOptions) -> Iterator[Tensor]:
        """Yield the next tokens (B * num_samples,) of prompts (B, T), ``max_new_tokens`` times.

        Row i is drawn with a generator of its own, seeded with ``seed + i``, so its text does not
        depend on the others.
        """
        context = self.model.config.context_length
        B = idx.size(0)
        rows = B * options.num_samples
        generators = [
            torch.Generator(idx.device).manual_seed(options.seed + i) for i in range(rows)
        ]
        window = idx[:, -context:]  # the tokens that the model sees
        cached = 0  # how many of them are in the cache
        cache = self._prepare(rows, min(context, window.size(1) + options.max_new_tokens))
        for step in range(options.max_new_tokens):
            # Entered for each token: a generator would leave its caller in these modes at a yield.
            with torch.inference_mode(), torch.autocast(idx.device.type, enabled=False):
                if cached == context:
                    # Positions are absolute, so nothing in a full cache can be shifted. The newest
                    # half of the context becomes the prompt of an empty one.
                    window = window[:, -max(1, context // 2) :]
                    cached = 0
                T = window.size(1)
                new = window[:, cached:]  # the prompt, then one token at a time
                positions = torch.arange(cached, T, device=idx.device)
                if step == 0:  # a prompt is computed once for all its samples
                    by_prompt = cache.unflatten(2, (B, options.num_samples))
                    logits = decode(self._prepared, by_prompt[:, :, :, 0], new, positions, end=T)
                    by_prompt[:, :, :, 1:] = by_prompt[:, :, :, :1]
                    window = window.repeat_interleave(options.num_samples, dim=0)
                    logits = logits.repeat_interleave(options.num_samples, dim=0)
                elif self.use_graph and cached > 0:
                    if self._replay is None:
                        decode_one = partial(decode, self._prepared, cache)
                        self._replay = capture_cuda_graph(decode_one, new, positions)
                    logits = self._replay(new, positions)
                else:
                    logits = decode(self._prepared, cache, new, positions, end=T)
                cached = T
                token = sample_next_token(logits, generators, options)
                window = torch.cat((window, token[:, None]), dim=1)
            yield token

    def generate(self, idx: Tensor, options: SamplingOptions) -> Tensor:
        """Prompts (B, T) with up to ``max_new_tokens`` more: (B * num_samples, T + new).

        A row ends at its first ``<|endoftext|>`` and is filled with it.
        """
        prompts = idx.repeat_interleave(options.num_samples, dim=0)
        new = prompts[:, :0]
        for n, token in enumerate(self.stream(idx, options), start=1):
            new = torch.cat((new, token[:, None]), dim=1)
            # Looking at the tokens waits for the device, so it is not done for each.
            if n % 16 == 0 and (new == END_OF_TEXT).any(dim=1).all():
                break
        ended = (new == END_OF_TEXT).cumsum(dim=1) > 0  # from the first <|endoftext|> of a row on
        new = new.masked_fill(ended, END_OF_TEXT)
        longest = int((~ended).sum(dim=1).max())
        return torch.cat((prompts, new[:, : longest + 1]), dim=1)


# ---- command line --------------------------------------------------------------------------------


def stream_text(tokens: Iterable[int]) -> Iterator[str]:
    """The text of each token up to <|endoftext|>; an incomplete UTF-8 character is held back."""
    # A token may end within a character's UTF-8 bytes; the incremental decoder keeps those.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if token == END_OF_TEXT:
            break
        yield decoder.decode(get_tokenizer().decode_single_token_bytes(token))
    if rest := decoder.decode(b"", final=True):
        yield rest


def encode_prompt(prompt: str, vocab_size: int) -> list[int]:
    """The prompt's tokens. Raises ValueError when the model's vocabulary lacks one of them."""
    # An empty prompt is the start of a document, and documents begin with <|endoftext|>.
    ids = encode_ordinary(prompt) or [END_OF_TEXT]
    if max(ids) >= vocab_size:
        raise ValueError(
            f"prompt {prompt[:40]!r}: token {max(ids)} is outside the model's vocabulary of"
            f" {vocab_size}; give another prompt"
        )
    return ids


def print_samples(config: EvalConfig, sampler: Sampler, prompt: str, device: torch.device) -> None:
    """Print the samples of one prompt and, on standard error, how fast they came."""
    tokenizer = get_tokenizer()
    ids = encode_prompt(prompt, sampler.model.config.vocab_size)
    idx = torch.tensor([ids], device=device)  # (1, T)
    options = replace(config, temperature=0.0) if config.greedy else config
    seeds = range(options.seed, options.seed + options.num_samples)
    made = 0
    start = time.perf_counter()
    if config.stream:
        for seed in seeds:
            print(prompt, end="", flush=True)
            tokens = sampler.stream(idx, replace(options, num_samples=1, seed=seed))
            for text in stream_text(int(token) for token in tokens):
                print(text, end="", flush=True)
                made += 1
            print("\n---")
    else:
        out = sampler.generate(idx, options)
        for seed, row in zip(seeds, out[:, len(ids) :].tolist(), strict=True):
            kept = row[: row.index(END_OF_TEXT)] if END_OF_TEXT in row else row
            made += len(kept)
            text = tokenizer.decode(kept)
            line = {"prompt": prompt, "text": text, "seed": seed, "tokens": len(kept)}
            print(json.dumps(line) if config.json else f"{prompt}{text}\n---")
    seconds = time.perf_counter() - start
    precision = f"int8 weights, {sampler.dtype}" if sampler.int8 else str(sampler.dtype)
    speed = f"{made} tokens in {seconds:.2f} s, {made / max(seconds, 1e-9):.1f} tokens/s"
    sys.stdout.flush()  # a reader that has gone, such as `head`, is noticed before the next prompt
    with contextlib.suppress(OSError):
        print(f"{speed}, {precision} on {device}", file=sys.stderr)


def read_prompts() -> Iterator[str]:
    """The lines of standard input, as UTF-8 whatever the locale is."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    for line in sys.stdin:
        yield line.rstrip("\n")


def main() -> None:
    with exit_with_one_line():
        config = parse_options(EvalConfig, description=__doc__)
        problems = config.validate()
        if problems:
            raise ValueError("; ".join(problems))
        device = choose_device(config.device)
        dtype = choose_dtype(config.dtype, device)
        int8 = config.quantize == "int8"
        if int8 and device.type != "cpu":  # before the model, which may be a download
            raise ValueError(f"quantize int8 is for cpu only, not {device}; leave it out")
        model = open_checkpoint(config.checkpoint, config.verify).to(device)
        if config.loss:
            if int8:  # the weights that samples in fp32 are drawn with
                model, _ = prepare_for_decoding(model, 1, torch.float32, int8)
            report_loss(config, model, device, dtype)
            return
        for prompt in config.prompt:  # before the samples of the first
            encode_prompt(prompt, model.config.vocab_size)
        sampler = Sampler(model, dtype, int8)
        for prompt in config.prompt or read_prompts():
            print_samples(config, sampler, prompt, device)


if __name__ == "__main__":
    main()
