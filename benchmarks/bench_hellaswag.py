"""HellaSwag's speed against the plain recipe and lm-evaluation-harness, on one device.

Rows: hellaswag.py's two conventions from one pass, and each of them alone; the recipe of
build-nanogpt (one example at a time, four padded rows, full logits; it measures the completion
convention only); `lm_eval` with several batch sizes (it measures the harness convention only). All
use the same random weights of GPT-2 124M, the same examples, the same precision. The rows take
turns, round by round, and each reports its best round.

Example: python benchmarks/bench_hellaswag.py --data hellaswag_val.jsonl --examples 24
"""

import dataclasses
import json
import logging
import math
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
import hellaswag
from gptxs.distributed import DistInfo, choose_device, choose_dtype
from gptxs.tokenizer import get_tokenizer
from model import GPT, GPTConfig

Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Options:
    data: Path
    """HellaSwag's validation examples as JSONL."""
    examples: int = 24
    """How many of them, evenly spread over the file."""
    rounds: int = 3
    """Turns of each row."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of all rows."""
    lm_eval_batches: tuple[int, ...] = (1, 4, 16, 64)
    """Batch sizes of lm_eval to choose the best from; give none to leave it out."""
    device: str = "auto"
    """cuda, cuda:1, mps or cpu."""


def tokenize(records: Records, convention: str = "both") -> tuple[hellaswag.Example, ...]:
    """The examples in both conventions or in one of them."""
    examples = tuple(hellaswag.tokenize(record, where="data") for record in records)
    if convention == "both":
        return examples
    i = list(hellaswag.CONVENTIONS).index(convention)
    return tuple(dataclasses.replace(e, requests=e.requests[i : i + 1]) for e in examples)


@torch.no_grad()
def recipe(model: GPT, records: Records, device: torch.device) -> list[tuple[int, int]]:
    """build-nanogpt's measurement, as it describes it: one example at a time, padded, in full."""
    encode = get_tokenizer().encode_ordinary
    chosen = []
    for record in records:
        context = encode(record["ctx"])
        endings = [encode(" " + ending) for ending in record["endings"]]
        T = len(context) + max(len(ending) for ending in endings)
        rows = torch.zeros((4, T), dtype=torch.int64)
        mask = torch.zeros((4, T))  # 1 where a token of an ending is predicted
        for k, ending in enumerate(endings):
            end = len(context) + len(ending)
            rows[k, :end] = torch.tensor(context + ending)
            mask[k, len(context) : end] = 1
        rows = rows.to(device)
        mask = mask[:, 1:].to(device)
        logits = model(rows)[:, :-1]  # (4, T - 1, V)
        losses = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
        sums = (losses.view(4, -1) * mask).sum(dim=1)  # (4)
        chosen.append((int(sums.argmin()), int((sums / mask.sum(dim=1)).argmin())))
    return chosen


def count_multiplications(model: GPT, records: Records) -> tuple[int, int]:
    """Multiplications by weights that hellaswag.py's completion row and the recipe make."""
    head = model.lm_head.weight.numel()
    body = sum(p.numel() for p in model.transformer.h.parameters() if p.dim() == 2)
    examples = tokenize(records, "completion")
    device = model.lm_head.weight.device
    ours = 0
    for inputs, targets in hellaswag.pack_for(device, examples, model.config):
        ours += inputs[0].numel() * body + targets.size(1) * head
    padded = 0
    for request in (example.requests[0] for example in examples):
        padded += 4 * (len(request.context) + max(len(choice) for choice in request.choices))
    return ours, padded * (body + head)


class Harness:
    """lm_eval's own code path, tokenizing, batching and scoring the examples."""

    def __init__(self, folder: Path, device: torch.device, dtype: str, batch: int) -> None:
        from lm_eval.models.huggingface import HFLM

        precision = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
        self.model = HFLM(str(folder), device=str(device), dtype=precision, batch_size=batch)

    def __call__(self, records: Records) -> None:
        from lm_eval.api.instance import Instance

        instances = []
        for record in records:
            context = (
                f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
            )
            for k, ending in enumerate(record["endings"]):
                instance = Instance(
                    request_type="loglikelihood",
                    doc=record,
                    arguments=(hellaswag.clean(context), f" {hellaswag.clean(ending)}"),
                    idx=k,
                )
                instances.append(instance)
        self.model.loglikelihood(instances, disable_tqdm=True)


def time_rows(
    rows: dict[str, Callable[[Records], Any]], records: Records, rounds: int
) -> dict[str, float]:
    """Examples a second of each row in its best round."""
    for row in rows.values():
        row(records[:2])  # warm up
    best = dict.fromkeys(rows, math.inf)
    for _ in range(rounds):
        for name, row in rows.items():
            start = time.perf_counter()
            row(records)
            best[name] = min(best[name], time.perf_counter() - start)
    return {name: len(records) / seconds for name, seconds in best.items()}


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    logging.disable(logging.WARNING)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    lines = options.data.read_text("utf-8").splitlines()
    lines = lines[:: max(1, len(lines) // options.examples)][: options.examples]
    records = [json.loads(line) for line in lines]
    torch.manual_seed(0)
    model = GPT(GPTConfig(context_length=1024, vocab_size=50257)).to(device)

    def ours(records: Records, convention: str = "both") -> None:
        # Tokenized and packed each time, although a training run does that once.
        dist_info = DistInfo(0, 1, device, dtype)
        hellaswag.predict(model, tokenize(records, convention), dist_info).tolist()

    def padded(records: Records) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            recipe(model, records, device)

    rows: dict[str, Callable[[Records], Any]] = {
        "ours, both": ours,
        "ours, completion": lambda records: ours(records, "completion"),
        "ours, harness": lambda records: ours(records, "harness"),
        "recipe, completion": padded,
    }
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for batch in options.lm_eval_batches:
            rows[f"lm_eval, batch {batch}"] = Harness(Path(folder), device, options.dtype, batch)
        speed = time_rows(rows, records, options.rounds)

    threads = torch.get_num_threads()
    print(f"{len(records)} examples, 124M, {options.dtype}, {device}, {threads} threads")
    for name, value in speed.items():
        print(f"{name:24} {value:8.2f} examples/s")
    ours_count, recipe_count = count_multiplications(model, records)
    plain = speed["recipe, completion"]
    print(f"completion / recipe      {speed['ours, completion'] / plain:8.2f}")
    print(f"  multiplications, recipe / completion {recipe_count / ours_count:.2f}")
    print(f"both / recipe            {speed['ours, both'] / plain:8.2f}")
    if options.lm_eval_batches:
        lm_eval = max(speed[f"lm_eval, batch {batch}"] for batch in options.lm_eval_batches)
        print(f"harness / lm_eval        {speed['ours, harness'] / lm_eval:8.2f}")
        both_apart = 1 / (1 / plain + 1 / lm_eval)
        print(f"both / recipe + lm_eval  {speed['ours, both'] / both_apart:8.2f}")


if __name__ == "__main__":
    main()
