"""HellaSwag (Zellers et al. 2019): which of four endings does the model find the likeliest?

Two conventions are in use, and one pass over the model measures both:

    completion   the context as it is; build-nanogpt and llm.c report this one
    harness      "activity: Context", wiki markup removed; lm-evaluation-harness, its version 1.0

Each gives two accuracies. `acc` takes the ending of the highest log-likelihood, `acc_norm` that of
the highest per token (completion) or per character (harness).

Example: python hellaswag.py --checkpoint log --output predictions.jsonl
"""

import functools
import json
import math
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm

from dataset import atomic_file, get_tokenizer
from model import GPT, choose_device, fast_bf16

CONVENTIONS = ("completion", "harness")
# On a CPU, malloc reuses blocks of up to 32 MB and asks the system for larger ones each time. So
# the widest tensors are kept at 26 MB: a layer's (tokens, 4 C) at 124M, and the logits, in fp32.
BATCH_TOKENS = 2048  # inputs of one pass
HEAD_ROWS = 128  # rows of logits that exist at once
ROUND_TO = 8  # rows are padded to a multiple of this, so that only some forty lengths occur
FULL = 0.85  # shorter rows of few examples wait for a batch of their own, of less padding


@dataclass(frozen=True)
class HellaSwagOptions:
    checkpoint: str = "log"
    """A checkpoint, a log folder (its newest checkpoint) or a hub id such as gpt2."""
    data: Path | None = None
    """HellaSwag as a JSONL file. Default: Rowan/hellaswag from the hub."""
    split: Literal["validation", "train"] = "validation"
    """Split of Rowan/hellaswag; a --data file is taken whole."""
    limit: int | None = None
    """Only the first so many examples."""
    output: Path | None = None
    """Write the predictions there, a JSON line for each example."""
    json: bool = False
    """Print the summary as one JSON object."""
    device: str = "auto"
    """cuda, cuda:1, mps or cpu; auto takes the first there is."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the matrix products; auto: bf16 where the device has it in hardware."""


# ---------------------------------------------------------------- examples


@dataclass(frozen=True, eq=False)
class Question:
    """What one convention makes of an example, in tokens; ``lengths`` divide for acc_norm."""

    context: list[int]
    endings: list[list[int]]
    lengths: list[int]


@dataclass(frozen=True, eq=False)
class Example:
    ind: int
    label: int
    where: str  # file and line, for messages
    questions: tuple[Question, Question]  # in the order of CONVENTIONS


def clean(text: str) -> str:
    """Removes the markup of WikiHow texts exactly as the harness does, version 1.0."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def tokenize(raw: dict[str, Any], where: str) -> Example:
    """Checks and tokenizes an example. ValueError says what is wrong with it, and ``where``."""
    texts, endings = ("ctx", "ctx_a", "ctx_b", "activity_label"), raw.get("endings")
    problem = ""
    if missing := [k for k in texts if not isinstance(raw.get(k), str)]:
        problem = f"no text in {', '.join(missing)}"
    elif not raw["ctx"].strip() or not raw["ctx_a"].strip():
        problem = "its context is empty"
    elif not isinstance(endings, list) or len(endings) != 4:
        problem = "endings are not a list of four"
    elif not all(isinstance(e, str) and e.strip() for e in endings):
        problem = "an ending is empty or no text"
    elif str(raw.get("label")) not in ("0", "1", "2", "3"):
        problem = f"label {raw.get('label')!r} is not 0, 1, 2 or 3"
    if problem:
        raise ValueError(f"{where}: {problem}; repair or remove it")

    # The harness encodes context and ending together and moves spaces at the context's end to the
    # ending. GPT-2's encoding splits before a space, so after that the two may be encoded apart.
    encode = get_tokenizer().encode_ordinary
    completion = [encode(f" {ending}") for ending in endings]
    context = clean(f"{raw['activity_label']}: {raw['ctx_a']} {raw['ctx_b'].capitalize()}")
    spaces = context[len(context.rstrip()) :]
    choices = [clean(ending) for ending in endings]
    harness = [encode(f"{spaces} {choice}") for choice in choices]
    return Example(
        ind=raw.get("ind", -1),
        label=int(raw["label"]),
        where=where,
        questions=(
            Question(encode(raw["ctx"]), completion, [len(e) for e in completion]),
            Question(encode(context.rstrip()), harness, [len(choice) for choice in choices]),
        ),
    )


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file. Raises ValueError with the number of a line that is not one."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for n, line in enumerate(file, start=1):
            try:
                yield dict(json.loads(line))
            except (ValueError, TypeError):
                raise ValueError(f"{path}, line {n}: not a JSON object; remove it") from None


def load_examples(
    path: str | Path | None = None, split: str = "validation", limit: int | None = None
) -> list[Example]:
    """The first ``limit`` examples of a JSONL file, or of Rowan/hellaswag on the hub, tokenized.

    Raises:
        FileNotFoundError: there is no such file, or the hub cannot be reached.
        ValueError: a line is malformed; the message has its number.
    """
    if path is not None and not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; give HellaSwag as JSONL with --data")
    source = f"Rowan/hellaswag {split}" if path is None else str(path)
    raws = download(split) if path is None else read_jsonl(Path(path))
    numbered = islice(enumerate(raws, start=1), limit)
    examples = [tokenize(raw, f"{source}, line {n}") for n, raw in numbered]
    if not examples:
        raise ValueError(f"{source}: no examples in it; give HellaSwag as JSONL with --data")
    return examples


def download(split: str) -> Iterable[dict[str, Any]]:
    """A split of Rowan/hellaswag. FileNotFoundError when it cannot be had."""
    from datasets import load_dataset

    try:
        return load_dataset("Rowan/hellaswag", split=split)
    except Exception as error:  # its many errors share no class, and all mean the same here
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise FileNotFoundError(
            f"Rowan/hellaswag: not to be had ({reason}); give HellaSwag as JSONL with --data"
        ) from None


# ---------------------------------------------------------------- packing


@dataclass(frozen=True, eq=False)
class Row:
    """A question as one sequence: the context once, then the inputs of its four endings.

    A token of segment 0 is seen by all that follow it, one of segment k only by those of ending k.
    """

    inputs: list[tuple[int, int, int]]  # token, position, segment
    scored: list[tuple[int, int, int]]  # place of the input that predicts, token predicted, ending


def lay_out(question: Question, context_length: int, where: str) -> Row:
    """Packs a question for a model of ``context_length``.

    Where context and longest ending do not fit, the context's oldest tokens are dropped for each
    ending alone, as the harness does; then nothing is shared. Raises ValueError when an ending
    alone does not fit.
    """
    context, longest = question.context, max(map(len, question.endings))
    if longest > context_length:
        raise ValueError(
            f"{where}: an ending of {longest} tokens does not fit the context of {context_length}"
        )
    # The last token of an ending is predicted but predicts nothing, so it is no input.
    shared = context if len(context) + longest <= context_length + 1 else []
    row = Row([(token, place, 0) for place, token in enumerate(shared)], [])
    for k, ending in enumerate(question.endings):
        start = len(row.inputs)
        inputs = ([] if shared else context[len(ending) - context_length - 1 :]) + ending[:-1]
        row.inputs.extend((token, len(shared) + i, k + 1) for i, token in enumerate(inputs))
        places = [*range(len(shared)), *range(start, len(row.inputs))][-len(ending) :]
        row.scored.extend((place, token, k) for place, token in zip(places, ending, strict=True))
    return row


@dataclass(frozen=True, eq=False)
class Batch:
    """B rows of nearly equal length, padded to T, with N scored tokens in all."""

    questions: list[tuple[int, int]]  # (B), a row's example and convention
    inputs: Tensor  # (3, B, T): tokens, positions, segments
    scored: Tensor  # (3, N): place among B * T, token, ending among B * 4
    lengths: Tensor  # (B, 4)


@functools.lru_cache(maxsize=2)
def pack(
    examples: tuple[Example, ...], context_length: int, batch_tokens: int = BATCH_TOKENS
) -> list[Batch]:
    """All questions, sorted by length, in batches of ``batch_tokens`` inputs or one row.

    A training run evaluates the same examples again and again, so the result is kept.
    """
    rows = {
        (e, q): lay_out(question, context_length, example.where)
        for e, example in enumerate(examples)
        for q, question in enumerate(example.questions)
    }
    keys, batches = sorted(rows, key=lambda key: len(rows[key].inputs)), []
    while keys:
        longest = len(rows[keys[-1]].inputs)
        T = -(-longest // ROUND_TO) * ROUND_TO
        last = keys[-max(1, batch_tokens // T) :]
        chosen = [key for key in last if len(rows[key].inputs) >= FULL * longest]
        del keys[-len(chosen) :]
        inputs, scored = np.zeros((len(chosen), T, 3), dtype=np.int64), []
        inputs[:, :, 2] = -1  # padding: a segment that no token of a row looks at
        for i, key in enumerate(chosen):
            inputs[i, : len(rows[key].inputs)] = rows[key].inputs
            scored += [(i * T + p, token, i * 4 + k) for p, token, k in rows[key].scored]
        lengths = torch.tensor([examples[e].questions[q].lengths for e, q in chosen])
        inputs = torch.from_numpy(inputs.transpose(2, 0, 1).copy())
        batches.append(Batch(chosen, inputs, torch.tensor(scored).T.contiguous(), lengths))
    return batches


# ---------------------------------------------------------------- scoring


def log_likelihoods(model: GPT, batch: Batch, device: torch.device) -> Tensor:
    """Summed log-probabilities (B, 4), in nats, of the endings of a batch; fp32."""
    tokens, positions, segments = batch.inputs.to(device)  # (B, T) each
    query, key = segments[:, :, None], segments[:, None, :]
    mask = ((key == 0) | (key == query)).tril()[:, None]  # (B, 1, T, T)
    hidden = model.hidden_states(tokens, positions, mask).flatten(0, 1)  # (B * T, C)
    sums = torch.zeros(tokens.size(0) * 4, device=device)
    for places, targets, endings in batch.scored.to(device).split(HEAD_ROWS, dim=1):
        logits = model.lm_head(hidden[places]).float()  # (rows, V)
        losses = F.cross_entropy(logits, targets, reduction="none")
        sums.index_add_(0, endings, losses, alpha=-1)
    return sums.view(-1, 4)


@torch.no_grad()
def predict(
    model: GPT,
    examples: Sequence[Example],
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> Tensor:
    """The endings chosen, (n, 2 conventions, 2) int64: by likelihood, and by it over the length.

    Each rank computes every ``world_size``-th batch, and all of them return the whole. ``model`` is
    the uncompiled module: the shapes here are not those of training.
    """
    batches = pack(tuple(examples), model.config.context_length)[rank::world_size]
    chosen = torch.zeros((len(examples), 2, 2), dtype=torch.int64, device=device)
    # One autocast around all batches converts the weights once.
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        for batch in tqdm(batches, "HellaSwag", unit="batch", disable=not progress, leave=False):
            sums = log_likelihoods(model, batch, device)
            normed = sums / batch.lengths.to(device)
            e, q = torch.tensor(batch.questions, device=device).T
            chosen[e, q] = torch.stack((sums.argmax(dim=1), normed.argmax(dim=1)), dim=1)
    if dist.is_initialized():
        dist.all_reduce(chosen)  # zero on all ranks but one
    return chosen


def summarize(examples: Sequence[Example], chosen: Tensor) -> dict[str, float | int]:
    """Both conventions' accuracies of the endings ``chosen``, as ``predict`` returns them.

    Keys: acc, acc_norm (completion), harness_acc, harness_acc_norm; each with _stderr, which is
    sqrt(p (1 - p) / (n - 1)) as in the harness; and n.
    """
    n = len(examples)
    labels = torch.tensor([example.label for example in examples])
    correct = (chosen.cpu() == labels[:, None, None]).sum(dim=0).tolist()
    summary: dict[str, float | int] = {"n": n}
    for prefix, counts in zip(("", "harness_"), correct, strict=True):
        for name, count in zip(("acc", "acc_norm"), counts, strict=True):
            p = count / n
            summary[prefix + name] = p
            summary[f"{prefix}{name}_stderr"] = math.sqrt(p * (1 - p) / max(1, n - 1))
    return summary


# ---------------------------------------------------------------- command line


def main() -> None:
    options = tyro.cli(HellaSwagOptions, description=__doc__)
    try:
        if options.limit is not None and options.limit < 1:
            raise ValueError(f"--limit {options.limit}: must be at least 1")
        if options.output and not options.output.absolute().parent.is_dir():
            raise FileNotFoundError(f"{options.output}: its folder does not exist; make it first")
        device = choose_device(options.device)
        examples = load_examples(options.data, options.split, options.limit)
        model = GPT.from_pretrained(options.checkpoint).to(device)
        bf16 = options.dtype == "bf16" or (options.dtype == "auto" and fast_bf16(device))
        dtype = torch.bfloat16 if bf16 else torch.float32
        start = time.perf_counter()
        chosen = predict(model, examples, device, dtype=dtype, progress=True)
    except (ValueError, FileNotFoundError) as error:
        print(f"hellaswag.py: {error}", file=sys.stderr)
        sys.exit(2)
    summary = summarize(examples, chosen) | {"seconds": time.perf_counter() - start}
    if options.output:
        with atomic_file(options.output) as file:
            for example, pairs in zip(examples, chosen.tolist(), strict=True):
                line = {"ind": example.ind, "label": example.label}
                line |= dict(zip(CONVENTIONS, pairs, strict=True))
                file.write(json.dumps(line).encode() + b"\n")
    if options.json:
        print(json.dumps(summary))
        return
    for name, prefix in zip(CONVENTIONS, ("", "harness_"), strict=True):
        keys = (prefix + "acc", prefix + "acc_norm")
        shown = (f"{k} {summary[k]:.4f} ± {summary[k + '_stderr']:.4f}" for k in keys)
        print(f"{name:10}  {'   '.join(shown)}")
    print(f"{len(examples)} examples in {summary['seconds']:.1f} s, {dtype} on {device}")


if __name__ == "__main__":
    main()
