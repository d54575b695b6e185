"""Sample from a model, measure its loss (--loss), or write the folder to publish (--export DIR).

Examples: python eval.py --checkpoint log --prompt "The function returns" --stream
          python eval.py --checkpoint gpt2 --loss --data-dir edu_fineweb10B --context-length 512
          python eval.py --checkpoint log --export my-gpt2
"""

from __future__ import annotations

import codecs
import contextlib
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import tyro
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from data_loader import TokenDataset, TokenLoader
from gptxs import hf
from gptxs.checkpoint import find_checkpoint, folder_name
from gptxs.cli import exit_with_one_line, number_problems, parse
from gptxs.distributed import DistInfo, DtypeName, choose_device, choose_dtype
from gptxs.files import decode_text
from gptxs.metrics import read_rows
from gptxs.tokenizer import END_OF_TEXT, VOCAB_SIZE, encode, get_tokenizer
from model import GPT

# ---- configuration -------------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplingOptions:
    max_new_tokens: int = 128
    """Length of a sample in tokens; it ends earlier at <|endoftext|>."""
    num_samples: int = 1
    """Samples of each prompt. Sample i is drawn with --seed + i, alone or in a batch."""
    temperature: float = 1.0
    """Divides the logits: below 1 more conservative, above 1 more random. 0 is --greedy."""
    top_k: int | None = 50
    """Draw from this many of the most likely tokens; 0 or None: from all."""
    top_p: float | None = None
    """Draw from the smallest set of tokens with at least this total probability (nucleus)."""
    seed: int = 1337
    """The same seed gives the same text, on the same device, in the same precision."""


@dataclass(frozen=True)
class EvalConfig(SamplingOptions):
    checkpoint: str = "log"
    """A checkpoint, a log folder (its newest checkpoint) or a hub id such as gpt2."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A text to continue; repeat the flag for several. Default: the lines of standard input."""
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
    val_tokens: int = 10_485_760
    """Tokens to measure the loss on: the first ones of the validation split."""
    context_length: int | None = None
    """Tokens in a window, for --loss, and comparable at one length only; default: the model's."""
    micro_batch: int = 16
    """Windows computed at once, for --loss."""
    export: Path | None = None
    """Write the folder to publish: the model with 50,257 rows, its tokenizer and a model card."""
    device: str = "auto"
    """cuda, cuda:1, mps or cpu; auto: the machine's accelerator, or the CPU without one."""
    dtype: DtypeName = "auto"
    """Precision; auto: bf16 where the device has it, fp16 on other GPUs, fp32 for --export."""
    verify: bool = True
    """Compare the checkpoint's files with its checksums first."""

    def validate(self) -> list[str]:
        """Every problem of these options, one message each."""
        counts = ("max_new_tokens", "num_samples", "val_tokens", "context_length", "micro_batch")
        problems = number_problems(self, at_least_one=counts)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"top_p {self.top_p} must be above 0 and at most 1")
        if self.stream and self.json:
            problems.append("stream and json exclude each other")
        # What is merely ignored would mislead: a flag that is not at its default has an effect.
        sampling = {"prompt", "greedy", "stream", "json", "device"}
        sampling |= {field.name for field in fields(SamplingOptions)}
        if self.greedy or self.temperature == 0:
            sampling -= {"top_k", "top_p", "seed"}
        if self.greedy and self.temperature != 0:
            sampling -= {"temperature"}
        loss = {"loss", "data_dir", "val_tokens", "context_length", "micro_batch", "json", "device"}
        used = loss if self.loss else {"export"} if self.export else sampling
        given = {field.name for field in fields(self) if getattr(self, field.name) != field.default}
        if unused := sorted(given - used - {"checkpoint", "dtype", "verify"}):
            problems.append(f"no effect with the other flags: {', '.join(unused)}; leave them out")
        return problems


# ---- loss ----------------------------------------------------------------------------------------


@torch.no_grad()
def validation_loss(
    model: GPT,
    dataset: TokenDataset,
    tokens: int,
    micro_batch: int,
    dist_info: DistInfo,
    compiled: nn.Module | None = None,
) -> float:
    """Mean loss, in nats, of the first ``tokens`` tokens of a data set, in complete windows.

    Each rank computes its share of the windows and all return the loss of all of them, so it is
    the same for any number of ranks. All batches but the last, which may have fewer than
    ``micro_batch`` windows, go through ``compiled``, the compiled model, where there is one.
    Raises ValueError when ``tokens`` are less than one window.
    """
    T = dataset.context_length
    if tokens < T:
        raise ValueError(f"{tokens} validation tokens are less than one window of {T}")
    windows = np.arange(dist_info.rank, min(tokens // T, len(dataset)), dist_info.world_size)
    batches = (windows[i : i + micro_batch] for i in range(0, len(windows), micro_batch))
    sums = []  # left on the device: reading a number here would wait for every batch
    with (
        dist_info.autocast(),
        contextlib.closing(TokenLoader(dataset, batches, dist_info.device, prefetch=2)) as loader,
    ):
        for inputs, targets in loader:  # (B, T) each
            # For another number of rows the compiler would start again.
            forward = compiled if compiled is not None and len(inputs) == micro_batch else model
            sums.append(forward(inputs, targets).float() * targets.numel())
    # Millions of tokens are summed in fp64, on the host since not every device has it.
    total = float(torch.stack(sums).cpu().double().sum()) if sums else 0.0
    # Ranks may have a window more or less than others, so sums are added up and not means.
    sum_and_count = torch.tensor([total, len(windows) * T], dtype=torch.float64)
    if dist.is_initialized():
        sum_and_count = sum_and_count.to(dist_info.device)  # NCCL reduces only what is on the GPU
        dist.all_reduce(sum_and_count)
    return float(sum_and_count[0] / sum_and_count[1])


def count_bytes(dataset: TokenDataset, windows: int) -> int:
    """Bytes of text that the targets of the first windows decode to; <|endoftext|> has none."""
    lengths = np.zeros(2**16, dtype=np.int64)  # of every uint16 token, the padding's too
    texts = get_tokenizer().decode_tokens_bytes(list(range(END_OF_TEXT)))
    lengths[:END_OF_TEXT] = [len(text) for text in texts]
    # One window at a time, since the lengths take eight bytes a token.
    targets = (dataset.windows(np.array([window]))[:, 1:] for window in range(windows))
    return sum(int(lengths[target].sum()) for target in targets)


def report_loss(config: EvalConfig, folder: Path, dist_info: DistInfo) -> None:
    """Print loss, perplexity and bits per byte on the validation split."""
    model = GPT.from_pretrained(folder).to(dist_info.device)
    T = config.context_length or model.config.context_length
    dataset = TokenDataset(config.data_dir, "val", T, model.config.vocab_size)
    limit = config.val_tokens
    loss = validation_loss(model, dataset, limit, config.micro_batch, dist_info)
    windows = min(limit // T, len(dataset))
    tokens = windows * T
    n_bytes = 0
    try:
        hf.require_gpt2_tokenizer(folder)
        n_bytes = count_bytes(dataset, windows)
    except ValueError as error:
        print(f"no bits per byte: {error}", file=sys.stderr)
    figures = {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,  # 700: what a float can hold
        # Unlike the loss per token, it can be compared across tokenizers.
        "bits_per_byte": loss / math.log(2) * tokens / n_bytes if n_bytes else math.nan,
    }
    if config.json:  # which has no NaN and no infinity
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        print(json.dumps({**finite, "tokens": tokens, "bytes": n_bytes, "context_length": T}))
    else:
        print("   ".join(f"{name} {value:.4f}" for name, value in figures.items()))
        print(f"{tokens:,} tokens, {n_bytes:,} bytes of text, windows of {T} tokens, {folder}")


# ---- sampling ------------------------------------------------------------------------------------


def sample_next_token(
    logits: Tensor, generators: list[torch.Generator], options: SamplingOptions
) -> Tensor:
    """Draw one token (B,) for each row of logits (B, V), with a random generator for each row.

    Temperature first, then top-k, then top-p (Holtzman et al. 2019) of what is left. Temperature
    0 takes the most likely token.
    """
    if options.temperature < 1e-6:  # logits divided by less could overflow
        return logits.argmax(dim=-1)
    V = logits.size(1)
    # A random number for each token, not for each place in the order: if rounding swaps two tokens
    # of nearly equal logits, each keeps its number and the draw stays the same.
    uniform = torch.stack([torch.rand(V, device=logits.device, generator=g) for g in generators])
    ids = torch.arange(V, device=logits.device).expand_as(logits)  # the token of each column
    if options.top_k or options.top_p is not None:
        logits, ids = logits.topk(min(options.top_k or V, V))  # in descending order
    p = (logits / options.temperature).softmax(dim=-1)
    if options.top_p is not None:
        before = p.cumsum(dim=-1) - p  # total probability of the more likely tokens
        p = p.masked_fill(before >= options.top_p, 0)
    # A race: argmax(p / e) with e ~ Exp(1) is a draw from p. torch.multinomial would take one
    # generator for all rows.
    exponential = -uniform.gather(1, ids).log()
    column = (p / exponential).argmax(dim=-1, keepdim=True)  # (B, 1)
    return ids.gather(1, column)[:, 0]


# Without cuDNN, which takes 0.4 s for a plan of each new shape: prompts have any length.
@sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
@torch.inference_mode()
def generate(
    model: GPT,
    idx: Tensor,
    options: SamplingOptions,
    on_token: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Prompts (B, T) with up to ``max_new_tokens`` more: (B * num_samples, T + new).

    The model computes in the dtype of its weights. A row ends at its first ``<|endoftext|>`` and is
    filled with it. ``on_token`` is given the newest token of each row (B * num_samples,). Row i has
    a random generator of its own, seeded with ``seed`` + i, and so the draws of a sample alone.
    """
    context = model.config.context_length
    N = options.num_samples
    out = idx.repeat_interleave(N, dim=0)
    seeds = range(options.seed, options.seed + len(out))
    generators = [torch.Generator(idx.device).manual_seed(seed) for seed in seeds]
    pending = idx[:, -context:]  # not in the cache yet: the prompt, then a token at a time
    cache = model.make_cache(len(pending), min(context, pending.size(1) + options.max_new_tokens))
    ended = torch.zeros_like(out[:, 0], dtype=torch.bool)
    for step in range(options.max_new_tokens):
        with torch.autocast(idx.device.type, enabled=False):
            hidden = model.hidden_states(pending, cache=cache)[:, -1]  # (B, C)
            # Rows beyond the vocabulary only pad the matrix and must never be sampled.
            logits = model.lm_head(hidden).float()[:, :VOCAB_SIZE]
        if step == 0:  # a prompt is computed once for all its samples
            logits = logits.repeat_interleave(N, dim=0)
            for layer in cache:
                layer.k = layer.k.repeat_interleave(N, dim=0)
                layer.v = layer.v.repeat_interleave(N, dim=0)
        token = sample_next_token(logits, generators, options).masked_fill(ended, END_OF_TEXT)
        out = torch.cat((out, token[:, None]), dim=1)
        if on_token is not None:
            on_token(token)
        ended = token == END_OF_TEXT
        if ended.all():
            break
        pending = token[:, None]
        if cache[0].tokens == context:
            # Positions are absolute: a full cache cannot be shifted. Its newest half starts anew.
            pending = out[:, -max(1, context // 2) :]
            for layer in cache:
                layer.tokens = 0
    return out


# ---- text ----------------------------------------------------------------------------------------


def sample_text(model: GPT, prompt: list[int], seed: int, dtype: torch.dtype) -> str:
    """How a model in training continues a prompt's tokens, the same each time for its weights."""
    idx = torch.tensor([prompt], device=model.lm_head.weight.device)  # (1, T)
    options = SamplingOptions(max_new_tokens=64, top_k=50, seed=seed)
    # A copy in the precision of the run, as ``main`` samples.
    out = generate(copy.deepcopy(model).to(dtype), idx, options)  # (1, T + new)
    return get_tokenizer().decode([token for token in out[0].tolist() if token != END_OF_TEXT])


def encode_prompt(prompt: str, vocab_size: int) -> list[int]:
    """The prompt's tokens. Raises ValueError when the model's vocabulary lacks one of them."""
    # An empty prompt is the start of a document, and documents begin with <|endoftext|>.
    ids = encode(prompt.removeprefix("\ufeff")).tolist() or [END_OF_TEXT]
    if max(ids) >= vocab_size:
        raise ValueError(f"prompt {prompt[:40]!r} exceeds the model's vocabulary of {vocab_size}")
    return ids


def read_prompts() -> Iterator[str]:
    """The lines of standard input, as UTF-8 whatever the locale is."""
    if sys.stdin.isatty():
        print("type a prompt and Enter, as often as you like; Ctrl-D ends", file=sys.stderr)
    line = b""
    for line in sys.stdin.buffer:
        yield decode_text(line, where="standard input").rstrip("\r\n")
    if not line:
        raise ValueError("no prompt: give --prompt TEXT, or lines on standard input")


def token_printer() -> Callable[[Tensor | int], None]:
    """A function that prints the text of one token after the other, as whole characters."""
    # A token may end within a character's UTF-8 bytes; the incremental decoder keeps those.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def print_token(token: Tensor | int) -> None:
        ends = int(token) == END_OF_TEXT
        data = b"" if ends else get_tokenizer().decode_single_token_bytes(int(token))
        print(decoder.decode(data, final=ends), end="", flush=True)

    return print_token


def print_samples(config: EvalConfig, model: GPT, prompt: str, device: torch.device) -> None:
    """Print the samples of one prompt and, on standard error, how fast they came."""
    idx = torch.tensor([encode_prompt(prompt, model.config.vocab_size)], device=device)  # (1, T)
    options = replace(config, temperature=0.0) if config.greedy else config
    seeds = range(options.seed, options.seed + options.num_samples)
    made = 0
    start = time.perf_counter()
    if config.stream:
        for seed in seeds:
            print(prompt, end="", flush=True)
            print_token = token_printer()
            out = generate(model, idx, replace(options, num_samples=1, seed=seed), print_token)
            print_token(END_OF_TEXT)  # what is left of a character that was cut off
            print("\n---")
            made += int((out[:, idx.size(1) :] != END_OF_TEXT).sum())
    else:
        out = generate(model, idx, options)
        for seed, row in zip(seeds, out[:, idx.size(1) :].tolist(), strict=True):
            kept = row[: row.index(END_OF_TEXT)] if END_OF_TEXT in row else row
            made += len(kept)
            text = get_tokenizer().decode(kept)
            line = {"prompt": prompt, "text": text, "seed": seed, "tokens": len(kept)}
            print(json.dumps(line) if config.json else f"{prompt}{text}\n---")
    sys.stdout.flush()  # a reader that has gone, such as `head`, is noticed before the next prompt
    seconds = time.perf_counter() - start
    speed = f"{made} tokens in {seconds:.2f} s, {made / seconds:.1f} tokens/s"
    print(f"{speed}, {model.lm_head.weight.dtype} on {device}", file=sys.stderr)


def export(folder: Path, out: Path, dtype: torch.dtype) -> None:
    """Write the folder to publish, with what a run's log says of the model at its step."""
    log = folder.parent / "metrics.jsonl"
    newest: dict[str, dict[str, Any]] = {}  # the last line of each kind
    for row in read_rows(log)[0] if log.exists() else []:
        if row["kind"] == "run" or folder_name(row["step"]) == folder.name:
            newest[row["kind"]] = row
    dataset = newest.get("run", {}).get("dataset") or "unknown data"
    scores = newest.get("hellaswag", {})
    # Who reads a card expects the harness's convention.
    names = ("acc", "acc_norm")
    figures = {("Rowan/hellaswag", name): scores.get(f"harness_{name}") for name in names}
    figures[dataset, "validation loss"] = newest.get("val", {}).get("loss")
    results = {name: value for name, value in figures.items() if value is not None}
    hf.export_model(folder, out, dtype, dataset=dataset, results=results)
    print(f"{out}: the model in {dtype}, its tokenizer and its card, README.md")


# ---- command line --------------------------------------------------------------------------------


def main() -> None:
    with exit_with_one_line():
        config = parse(EvalConfig, description=__doc__)
        if problems := config.validate():
            raise ValueError("; ".join(problems))
        device = choose_device(config.device)  # before the model, which may be a download
        dtype = choose_dtype(config.dtype, device)
        folder = find_checkpoint(config.checkpoint, check=config.verify)
        if config.export:
            export(folder, config.export, torch.float32 if config.dtype == "auto" else dtype)
        elif config.loss:
            report_loss(config, folder, DistInfo(0, 1, device, dtype))
        else:
            hf.require_gpt2_tokenizer(folder)
            # The weights themselves in this precision: there is no optimizer that needs more.
            model = GPT.from_pretrained(folder).to(device, dtype)
            for prompt in config.prompt or read_prompts():
                print_samples(config, model, prompt, device)


if __name__ == "__main__":
    main()
