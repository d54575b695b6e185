"""HellaSwag's speed against the plain recipe and lm-evaluation-harness, on one device.

Rows: hellaswag.py's two conventions from one pass, and each of them alone; the recipe of
build-nanogpt (one example at a time, four padded rows, full logits; it measures the completion
convention only); `lm_eval` with the best of several batch sizes (it measures the harness convention
only). All use the same random weights of GPT-2 124M, the same examples, the same precision. The
rows take turns, round by round, and each reports its best round.

Example: python benchmarks/bench_hellaswag.py --data hellaswag_val.jsonl --examples 24
"""

import dataclasses
import json
import logging
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import hellaswag
from model import GPT, GPTConfig, choose_device


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


@torch.no_grad()
def recipe(model: GPT, raws: list[dict[str, Any]], device: torch.device) -> list[Any]:
    """build-nanogpt's measurement, as it describes it: one example at a time, padded, in full."""
    encode = hellaswag.get_tokenizer().encode_ordinary
    chosen = []
    for raw in raws:
        context = encode(raw["ctx"])
        endings = [encode(" " + ending) for ending in raw["endings"]]
        T = len(context) + max(map(len, endings))
        rows, mask = torch.zeros((4, T), dtype=torch.int64), torch.zeros((4, T))
        for k, ending in enumerate(endings):
            rows[k, : len(context) + len(ending)] = torch.tensor(context + ending)
            mask[k, len(context) : len(context) + len(ending)] = 1
        rows, mask = rows.to(device), mask.to(device)
        logits = model(rows)[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
        losses = losses.view(4, -1) * mask[:, 1:]
        sums = losses.sum(1)
        chosen.append((int(sums.argmin()), int((sums / mask[:, 1:].sum(1)).argmin())))
    return chosen


def work(model: GPT, raws: list[dict[str, Any]]) -> tuple[float, float]:
    """Multiplications by weights that hellaswag.py's completion row and the recipe make."""
    head = model.lm_head.weight.numel()
    body = sum(p.numel() for p in model.transformer["h"].parameters() if p.dim() == 2)
    examples = [hellaswag.tokenize(raw, "data") for raw in raws]
    alone = tuple(dataclasses.replace(e, questions=e.questions[:1]) for e in examples)
    batches = hellaswag.pack(alone, model.config.context_length)
    ours = sum(b.inputs[0].numel() * body + b.scored.size(1) * head for b in batches)
    questions = [example.questions[0] for example in examples]
    padded = sum(4 * (len(q.context) + max(map(len, q.endings))) for q in questions)
    return ours, padded * (body + head)


class Harness:
    """lm_eval's own code path, tokenizing, batching and scoring the examples."""

    def __init__(self, folder: Path, device: torch.device, dtype: str, batch: int) -> None:
        from lm_eval.models.huggingface import HFLM

        precision = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
        self.model = HFLM(str(folder), device=str(device), dtype=precision, batch_size=batch)

    def __call__(self, raws: list[dict[str, Any]]) -> None:
        from lm_eval.api.instance import Instance

        requests = []
        for raw in raws:
            context = f"{raw['activity_label']}: {raw['ctx_a']} {raw['ctx_b'].capitalize()}"
            requests += [
                Instance(
                    request_type="loglikelihood",
                    doc=raw,
                    arguments=(hellaswag.clean(context), f" {hellaswag.clean(ending)}"),
                    idx=k,
                )
                for k, ending in enumerate(raw["endings"])
            ]
        self.model.loglikelihood(requests, disable_tqdm=True)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    logging.disable(logging.WARNING)
    device = choose_device(options.device)
    bf16 = options.dtype == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    lines = options.data.read_text("utf-8").splitlines()
    raws = [json.loads(line) for line in lines[:: max(1, len(lines) // options.examples)]]
    raws = raws[: options.examples]
    torch.manual_seed(0)
    model = GPT(GPTConfig(context_length=1024, vocab_size=50257)).to(device)

    def ours(raws: list[dict[str, Any]], only: int | None = None) -> None:
        # Tokenized and packed each time, although a training run does that once.
        examples = [hellaswag.tokenize(raw, "data") for raw in raws]
        if only is not None:
            examples = [dataclasses.replace(e, questions=(e.questions[only],)) for e in examples]
        hellaswag.predict(model, examples, device, dtype=dtype).tolist()

    def padded(raws: list[dict[str, Any]]) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            recipe(model, raws, device)

    rows: dict[str, Any] = {
        "ours, both": ours,
        "ours, completion": lambda raws: ours(raws, 0),
        "ours, harness": lambda raws: ours(raws, 1),
        "recipe, completion": padded,
    }
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for batch in options.lm_eval_batches:
            rows[f"lm_eval, batch {batch}"] = Harness(Path(folder), device, options.dtype, batch)
        best = dict.fromkeys(rows, float("inf"))
        for row in rows.values():
            row(raws[:2])  # warm up
        for _ in range(options.rounds):
            for name, row in rows.items():
                start = time.perf_counter()
                row(raws)
                best[name] = min(best[name], time.perf_counter() - start)
    threads = torch.get_num_threads()
    print(f"{len(raws)} examples, 124M, {options.dtype}, {device}, {threads} threads")
    speed = {name: len(raws) / s for name, s in best.items()}
    for name, value in speed.items():
        print(f"{name:24} {value:8.2f} examples/s")
    completion, harness, both = (
        speed[f"ours, {name}"] for name in (*hellaswag.CONVENTIONS, "both")
    )
    plain = speed["recipe, completion"]
    ours_work, recipe_work = work(model, raws)
    print(f"completion / recipe      {completion / plain:8.2f}")
    print(f"  multiplications, recipe / completion {recipe_work / ours_work:.2f}")
    print(f"both / recipe            {both / plain:8.2f}")
    if batches := [value for name, value in speed.items() if name.startswith("lm_eval")]:
        print(f"harness / lm_eval        {harness / max(batches):8.2f}")
        print(f"both / recipe + lm_eval  {both * (1 / plain + 1 / max(batches)):8.2f}")


if __name__ == "__main__":
    main()
