"""Sample from a model, or measure its loss on validation shards (--loss).

A checkpoint is a folder, a log folder (its newest checkpoint) or a model of the hub, such as gpt2.
Without --prompt, prompts are read from standard input, a line each.

Examples: python eval.py --checkpoint log --prompt "The function returns" --stream
          python eval.py --checkpoint gpt2 --loss --data-dir edu_fineweb10B --context-length 512
"""

import codecs
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro

from data_loader import TokenDataset
from dataset import get_tokenizer
from model import END_OF_TEXT, GPT, choose_device, fast_bf16


@dataclass(frozen=True)
class EvalOptions:
    checkpoint: str = "log"
    """A checkpoint, a log folder (its newest checkpoint) or a hub id such as gpt2."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A text to go on from; give it several times for several. Default: standard input."""
    num_samples: int = 1
    """Samples of each prompt. Sample i draws with --seed + i, alone or among others."""
    max_new_tokens: int = 128
    """Tokens of a sample, unless it ends before with <|endoftext|>."""
    temperature: float = 1.0
    """Divides the logits: below 1 bolder, above 1 more even. 0 is --greedy."""
    top_k: int | None = 50
    """Draw among so many likeliest tokens; None: among all."""
    top_p: float | None = None
    """Draw among the fewest likeliest tokens that have this probability together."""
    greedy: bool = False
    """Take the likeliest token each time."""
    seed: int = 1337
    """Same seed, same text, on the same device in the same precision; up to rounding in batches."""
    stream: bool = False
    """Print tokens as they are made, one sample after the other."""
    json: bool = False
    """Print a JSON line for each sample, or for the loss."""

    loss: bool = False
    """Measure the validation loss in place of sampling."""
    data_dir: Path = Path("edu_fineweb10B")
    """Folder of token shards, for --loss."""
    val_tokens: int = 10_485_760
    """Tokens to measure the loss on: the first ones of the validation split."""
    context_length: int | None = None
    """Window of the loss; default: the model's context. Compare models at the same one."""
    micro_batch: int = 16
    """Windows computed at once, for --loss."""

    device: str = "auto"
    """cuda, cuda:1, mps or cpu; auto takes the first there is."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision; auto: bf16 where the device has it in hardware."""

    def check(self) -> None:
        """Raises ValueError with all that is wrong with these options."""
        at_least_1 = ("num_samples", "max_new_tokens", "top_k", "val_tokens", "context_length")
        found = [
            f"{k} {v} is not at least 1"
            for k in (*at_least_1, "micro_batch")
            if (v := getattr(self, k)) is not None and v < 1
        ]
        if self.temperature < 0:
            found.append(f"temperature {self.temperature} is negative")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            found.append(f"top_p {self.top_p} is not above 0 and at most 1")
        if self.stream and self.json:
            found.append("stream and json exclude each other")
        if found:
            raise ValueError("; ".join(found))


# ---------------------------------------------------------------- loss


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
    """Mean loss, in nats, of the first ``tokens`` tokens of a data set, in whole windows.

    Each rank computes every ``world_size``-th window and all return the loss of all of them, so
    it is the same for any number of ranks.

    Raises ValueError when ``tokens`` are less than one window.
    """
    mine = np.arange(rank, count_windows(dataset, tokens), world_size)
    sums = []
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        for first in range(0, len(mine), micro_batch):
            windows = dataset.windows(mine[first : first + micro_batch]).astype(np.int64)
            batch = torch.from_numpy(windows).to(device)
            inputs, targets = batch[:, :-1], batch[:, 1:]
            sums.append(model(inputs, targets).float() * targets.numel())
    # Millions of tokens are summed in fp64, on the host since not every device has it.
    total = float(torch.stack(sums).cpu().double().sum()) if sums else 0.0
    pair = torch.tensor([total, len(mine) * dataset.context_length], dtype=torch.float64)
    if dist.is_initialized():
        pair = pair.to(device)  # NCCL reduces what is on the GPU
        dist.all_reduce(pair)
    return float(pair[0] / pair[1])


def count_windows(dataset: TokenDataset, tokens: int) -> int:
    """The whole windows in the first ``tokens`` tokens. ValueError when there is none."""
    if tokens < dataset.context_length:
        raise ValueError(
            f"{tokens} validation tokens are less than one window of {dataset.context_length}"
        )
    return min(tokens // dataset.context_length, len(dataset))


def count_bytes(dataset: TokenDataset, windows: int) -> int:
    """Bytes of text that the targets of the first windows decode to; <|endoftext|> has none."""
    lengths = np.zeros(2**16, dtype=np.int64)
    tokenizer = get_tokenizer()
    lengths[:END_OF_TEXT] = [
        len(tokenizer.decode_single_token_bytes(t)) for t in range(END_OF_TEXT)
    ]
    targets = (dataset.windows(np.arange(i, i + 1))[:, 1:] for i in range(windows))
    return int(sum(lengths[t].sum() for t in targets))


def report_loss(options: EvalOptions, model: GPT, device: torch.device, dtype: torch.dtype) -> None:
    """Prints loss, perplexity and bits per byte on the validation split."""
    T = options.context_length or model.config.context_length
    dataset = TokenDataset(options.data_dir, "val", T)
    dataset.check_tokens(model.config.vocab_size)
    windows = count_windows(dataset, options.val_tokens)
    loss = validation_loss(model, dataset, windows * T, options.micro_batch, device, dtype=dtype)
    n_bytes = count_bytes(dataset, windows)
    result = {
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / math.log(2) * windows * T / n_bytes,
        "tokens": windows * T,
        "bytes": n_bytes,
        "context_length": T,
    }
    if options.json:
        print(json.dumps(result))
    else:
        print("   ".join(f"{k} {v:.4f}" for k, v in result.items() if isinstance(v, float)))
        print(f"{windows * T:,} tokens, {n_bytes:,} bytes of text, windows of {T} tokens")


# ---------------------------------------------------------------- samples


def stream_text(tokens: Iterable[int]) -> Iterator[str]:
    """The text of each token up to <|endoftext|>; part of a character waits for its end."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if token == END_OF_TEXT:
            break
        yield decoder.decode(get_tokenizer().decode_single_token_bytes(token))
    if rest := decoder.decode(b"", final=True):
        yield rest


def sample(options: EvalOptions, model: GPT, prompt: str, device: torch.device) -> None:
    """Prints the samples of one prompt and, on standard error, how fast they came."""
    # An empty prompt is the start of a document, and documents begin with <|endoftext|>.
    ids = get_tokenizer().encode_ordinary(prompt) or [END_OF_TEXT]
    idx, n = torch.tensor([ids], device=device), options.max_new_tokens
    how: dict[str, Any] = {"top_k": options.top_k, "top_p": options.top_p}
    how["temperature"] = 0.0 if options.greedy else options.temperature
    seeds = range(options.seed, options.seed + options.num_samples)
    start, made = time.perf_counter(), 0
    if options.stream:
        for seed in seeds:
            print(prompt, end="", flush=True)
            for text in stream_text(map(int, model.stream(idx, n, seed=seed, **how))):
                print(text, end="", flush=True)
                made += 1
            print("\n---")
    else:
        out = model.generate(idx, n, num_samples=options.num_samples, seed=options.seed, **how)
        for seed, tokens in zip(seeds, out[:, len(ids) :].tolist(), strict=True):
            kept = tokens[: tokens.index(END_OF_TEXT)] if END_OF_TEXT in tokens else tokens
            made += len(kept)
            text = get_tokenizer().decode(kept)
            line = {"prompt": prompt, "text": text, "seed": seed, "tokens": len(kept)}
            print(json.dumps(line) if options.json else f"{prompt}{text}\n---")
    seconds = time.perf_counter() - start
    speed = f"{made} tokens in {seconds:.2f} s, {made / seconds:.1f} tokens/s"
    print(f"{speed}, {model.lm_head.weight.dtype} on {device}", file=sys.stderr)


def main() -> None:
    options = tyro.cli(EvalOptions, description=__doc__)
    try:
        options.check()
        device = choose_device(options.device)
        model = GPT.from_pretrained(options.checkpoint).to(device)
        bf16 = options.dtype == "bf16" or (options.dtype == "auto" and fast_bf16(device))
        dtype = torch.bfloat16 if bf16 else torch.float32
        if options.loss:
            report_loss(options, model, device, dtype)
            return
        model.to(dtype)
        for prompt in options.prompt or (line.rstrip("\n") for line in sys.stdin):
            sample(options, model, prompt, device)
    except (ValueError, FileNotFoundError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
