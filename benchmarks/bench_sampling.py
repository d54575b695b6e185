"""Decoding speed against Hugging Face's, a loop without cache, and the machine's own limit.

GPT-2 124M with random weights, one prompt, greedy, no early stop. The limit is a bare loop over the
same matrices, a matrix-vector product each: no token can be computed without reading all weights
once. The methods alternate, and each reports its best round.

Example: python benchmarks/bench_sampling.py --dtype bf16
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from eval import SamplingOptions, generate
from gptxs.distributed import choose_device
from gptxs.tokenizer import VOCAB_SIZE
from model import GPT, GPTConfig


@dataclass(frozen=True)
class Options:
    prompt: int = 16
    """Tokens of the prompt."""
    new_tokens: int = 128
    """Tokens to generate."""
    batch: int = 8
    """Samples in the batched measurement."""
    rounds: int = 3
    """How often each method is measured."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of all methods."""
    hugging_face: bool = True
    """Whether to measure transformers' generate."""
    uncached: bool = True
    """Whether to measure the loop without a cache, by far the slowest method."""
    device: str = "auto"
    """cuda, cuda:1, mps or cpu."""


@dataclass(frozen=True)
class Method:
    samples: int
    run: Callable[[], object]


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    device = choose_device(options.device)
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    n = options.new_tokens
    torch.manual_seed(0)
    config = GPTConfig(context_length=1024, vocab_size=VOCAB_SIZE)
    model = GPT(config).requires_grad_(False).to(device, dtype)
    idx = torch.randint(VOCAB_SIZE - 1, (1, options.prompt), device=device)
    # All matrices that a token is multiplied with, the head among them.
    weights = [p.data for name, p in model.named_parameters() if p.dim() == 2 and "wpe" not in name]

    def ours(samples: int) -> Method:
        sampling = SamplingOptions(max_new_tokens=n, num_samples=samples, temperature=0)

        def run() -> None:
            out = generate(model, idx, sampling)
            # Random weights do not end a text, which would be a shorter one.
            assert out.shape == (samples, options.prompt + n)

        return Method(samples, run)

    @torch.inference_mode()
    def limit() -> None:
        vectors = [torch.randn(1, w.size(1), device=device, dtype=dtype) for w in weights]
        for _ in range(n):
            for vector, weight in zip(vectors, weights, strict=True):
                F.linear(vector, weight)

    @torch.inference_mode()
    def uncached() -> None:
        window = idx
        for _ in range(n):
            token = model.lm_head(model.hidden_states(window)[:, -1:]).argmax(-1)
            window = torch.cat((window, token), dim=1)

    batched = f"ours, batch {options.batch}"
    methods = {
        "ours": ours(1),
        batched: ours(options.batch),
        "limit": Method(1, limit),
    }
    if options.hugging_face:
        from transformers import AutoModelForCausalLM

        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            theirs.to(device)

        def hugging_face() -> None:
            out = theirs.generate(idx, do_sample=False, max_new_tokens=n, min_new_tokens=n)
            out[0, -1].item()  # waits for the device

        methods["Hugging Face"] = Method(1, hugging_face)
    if options.uncached:
        methods["without cache"] = Method(1, uncached)

    best = dict.fromkeys(methods, float("inf"))  # seconds
    for _ in range(options.rounds):
        for name, method in methods.items():
            start = time.perf_counter()
            method.run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best[name] = min(best[name], time.perf_counter() - start)

    threads = torch.get_num_threads()
    print(f"124M, {options.prompt} + {n} tokens, {options.dtype}, {device}, {threads} threads")
    gigabytes = sum(w.numel() for w in weights) * dtype.itemsize / 1e9
    speed = {}
    for name, method in methods.items():
        speed[name] = method.samples * n / best[name]
        bandwidth = gigabytes * n / best[name]
        print(f"{name:19} {speed[name]:9.2f} tokens/s   weights at {bandwidth:7.2f} GB/s")
    for name in methods:
        if name == batched:
            print(f"{name} / ours {speed[name] / speed['ours']:.2f}")
        elif name != "ours":
            print(f"ours / {name} {speed['ours'] / speed[name]:.2f}")


if __name__ == "__main__":
    main()
