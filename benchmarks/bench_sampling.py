"""Decoding speed against Hugging Face's, a loop without cache, and the machine's own limit.

GPT-2 124M with random weights, one prompt, greedy, no early stop. The limit is a bare loop over the
same matrices, a matrix-vector product each: nobody can make a token without reading all weights
once. The rows take turns, round by round, and each reports its best round.

Example: python benchmarks/bench_sampling.py --dtype bf16
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from model import GPT, GPTConfig, choose_device


@dataclass(frozen=True)
class Options:
    prompt: int = 16
    """Tokens of the prompt."""
    new_tokens: int = 128
    """Tokens to make."""
    batch: int = 8
    """Samples of the batched row."""
    rounds: int = 3
    """Turns of each row."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of all rows."""
    hugging_face: bool = True
    """Whether to measure transformers' generate."""
    uncached: bool = True
    """Whether to measure the loop without a cache, by far the slowest row."""
    device: str = "auto"
    """cuda, cuda:1, mps or cpu."""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    device, n = choose_device(options.device), options.new_tokens
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    torch.manual_seed(0)
    model = GPT(GPTConfig(context_length=1024, vocab_size=50257)).requires_grad_(False)
    idx = torch.randint(50256, (1, options.prompt), device=device)
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "wpe" not in name]

    @torch.inference_mode()
    def limit() -> None:
        vectors = {
            w.size(1): torch.randn(1, w.size(1), device=device, dtype=dtype) for w in weights
        }
        for _ in range(n):
            for w in weights:
                F.linear(vectors[w.size(1)], w)

    @torch.inference_mode()
    def uncached() -> None:
        window = idx
        for _ in range(n):
            token = model.lm_head(model.hidden_states(window)[:, -1:]).argmax(-1)
            window = torch.cat((window, token), dim=1)

    def ours(samples: int) -> None:
        for token in model.stream(idx, n, num_samples=samples, temperature=0):  # noqa: B007
            pass
        token.tolist()  # waits for the device

    rows: dict[str, tuple[int, Callable[[], None]]] = {
        "ours": (1, lambda: ours(1)),
        f"ours, batch {options.batch}": (options.batch, lambda: ours(options.batch)),
        "limit": (1, limit),
    }
    if options.hugging_face:
        from transformers import AutoModelForCausalLM

        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
        settings = {"do_sample": False, "max_new_tokens": n, "min_new_tokens": n}
        rows["Hugging Face"] = (1, lambda: theirs.generate(idx, **settings)[0, -1].item())
    if options.uncached:
        rows["without cache"] = (1, uncached)
    model.to(device, dtype)
    weights = [p.data for p in matrices]

    best = dict.fromkeys(rows, float("inf"))
    for _ in range(options.rounds):
        for name, (_, row) in rows.items():
            start = time.perf_counter()
            row()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best[name] = min(best[name], time.perf_counter() - start)
    threads = torch.get_num_threads()
    print(f"124M, {options.prompt} + {n} tokens, {options.dtype}, {device}, {threads} threads")
    speed = {name: samples * n / best[name] for name, (samples, _) in rows.items()}
    size = sum(w.numel() * w.element_size() for w in weights)
    for name, value in speed.items():
        passes = value / rows[name][0]
        print(f"{name:16} {value:9.2f} tokens/s   weights at {passes * size / 1e9:7.2f} GB/s")
    for name in rows:
        if name == f"ours, batch {options.batch}":
            print(f"{name} / ours {speed[name] / speed['ours']:.2f}")
        elif name != "ours":
            print(f"ours / {name} {speed['ours'] / speed[name]:.2f}")


if __name__ == "__main__":
    main()
