"""HellaSwag (Zellers et al. 2019): which of four endings does the model find most likely?

Two conventions are in use, and one run measures both:

    completion   the context as it is; build-nanogpt and llm.c report this one
    harness      "activity: ctx_a Ctx_b" without wiki markup; lm-evaluation-harness, task version 1

Each gives two accuracies. `acc` takes the ending of the highest log-likelihood, `acc_norm` that of
the highest per token (completion) or per character (harness).

Example: python hellaswag.py --checkpoint log --output predictions.jsonl
"""

from __future__ import annotations

import functools
import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from gptxs.checkpoint import find_checkpoint
from gptxs.cli import exit_with_one_line, first_line, number_problems, parse
from gptxs.distributed import DistInfo, DtypeName, choose_device, choose_dtype
from gptxs.files import atomic_write, decode_text
from gptxs.hf import require_gpt2_tokenizer
from gptxs.hub import require_hub
from gptxs.tokenizer import encode
from model import GPT, GPTConfig

# The conventions in the order of `Example.requests`, with their prefixes in the summary.
CONVENTIONS = {"completion": "", "harness": "harness_"}
# On a CPU the widest tensors at 124M, (tokens, 4 C) in an MLP and the logits, are 26 MB in fp32.
BATCH_TOKENS = 2048
LOGIT_ROWS = 128
# CUDA waits for each launch, so it gets few and large kernels: its logits are 0.8 GB in fp32.
CUDA_BATCH_TOKENS = 16_384
CUDA_LOGIT_ROWS = 4096
# All attention kernels but cuDNN's, which builds a plan for each new shape.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# Rows are padded to a multiple of this, so that only some forty shapes occur.
ROUND_TO = 8
# Rows shorter than this fraction of a batch's longest row wait for a batch with less padding.
MIN_FILL = 0.85
LOCAL_FILE = "give HellaSwag as JSONL, JSON or Parquet with --data (train.py: --hellaswag-data)"


@dataclass(frozen=True)
class HellaSwagConfig:
    checkpoint: str = "log"
    """A checkpoint, a log folder (its newest checkpoint) or a hub id such as gpt2."""
    data: Path | None = None
    """HellaSwag as a JSONL, JSON or Parquet file. Default: Rowan/hellaswag from the hub."""
    split: Literal["validation", "train"] | None = None
    """Split of Rowan/hellaswag; not with --data. Default: validation."""
    limit: int | None = None
    """Use only this many examples, from the beginning. Default: all."""
    output: Path | None = None
    """Write the predictions to this file, one JSON line for each example."""
    json: bool = False
    """Print the summary as one JSON object."""
    device: str = "auto"
    """cuda, cuda:1, mps or cpu. auto: the machine's accelerator, or the CPU without one."""
    dtype: DtypeName = "auto"
    """Precision of the matrix products. auto: bf16 where the hardware has it, else fp16 on GPUs."""
    verify: bool = True
    """Compare the checkpoint's files with its checksums first."""

    def validate(self) -> list[str]:
        """Every problem of these options, one message each."""
        problems = number_problems(self, at_least_one=("limit",))
        if self.data is not None and self.split is not None:
            problems.append(f"--split {self.split} has no effect with --data; leave one out")
        out = self.output  # nor is /dev/null a file: it would be replaced by one
        if out and not (out.absolute().parent.is_dir() and (out.is_file() or not out.exists())):
            problems.append(f"--output {out} is not a file in a folder that exists")
        return problems


# ---- examples ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """An example in one convention: a context, and four choices to continue it, as tokens."""

    where: str  # file and line, for messages
    context: list[int]
    choices: list[list[int]]
    lengths: list[int]  # what acc_norm divides each choice's log-likelihood by


# eq=False compares by identity: a tuple of 10,042 examples is then a cheap key of pack_for's cache.
@dataclass(frozen=True, eq=False)
class Example:
    ind: int  # HellaSwag's own number for it
    label: int  # index of the right choice
    requests: tuple[Request, ...]  # in the order of CONVENTIONS


def load_examples(
    path: str | Path | None = None, split: str = "validation", limit: int | None = None
) -> tuple[Example, ...]:
    """The first ``limit`` examples of a file, or of Rowan/hellaswag on the hub, tokenized.

    Raises FileNotFoundError when there is no such file, ValueError, with the line's number, when a
    line is malformed, and ConnectionError when the download fails.
    """
    records = download(split) if path is None else read_file(Path(path))
    examples = tuple(tokenize(record, where) for where, record in islice(records, limit))
    if not examples:
        raise ValueError(f"{path or split}: no examples; {LOCAL_FILE}")
    return examples


def load_or_skip(path: Path | None) -> tuple[Example, ...]:
    """The examples for a training run; none, with a line, where the hub's cannot be had."""
    try:
        return load_examples(path)
    except (ValueError, OSError) as error:
        if path is not None:
            raise
        print(f"HellaSwag is skipped: {first_line(error)}")
        return ()


def download(split: str) -> Iterator[tuple[str, Any]]:
    """The place, for messages, and the record of each example of Rowan/hellaswag."""
    try:
        require_hub()
        from datasets import load_dataset

        records = load_dataset("Rowan/hellaswag", split=split)
    except Exception as error:  # those of datasets have no base in common
        kind = ValueError if isinstance(error, ValueError) else ConnectionError
        raise kind(f"Rowan/hellaswag: {first_line(error)}; {LOCAL_FILE}") from error
    return with_places(records, f"Rowan/hellaswag {split}, example")


def read_file(path: Path) -> Iterator[tuple[str, Any]]:
    """The place, for messages, and the record of each example of Parquet, a JSON array or JSONL."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {LOCAL_FILE}")
    if path.suffix.lower() == ".parquet":
        from pyarrow import parquet

        return with_places(parquet.read_table(path).to_pylist(), f"{path}, example")
    text = decode_text(path.read_bytes(), str(path))
    if text.lstrip().startswith("["):
        return with_places(parse_json(text, str(path)), f"{path}, example")
    lines = with_places(text.split("\n"), f"{path}, line")
    return ((where, parse_json(line, where)) for where, line in lines if line.strip())


def with_places(records: Iterable[Any], what: str) -> Iterator[tuple[str, Any]]:
    return ((f"{what} {i}", record) for i, record in enumerate(records, start=1))


def parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}); repair or remove it") from None


def record_problems(record: Any) -> list[str]:
    """Every problem of an example as HellaSwag publishes it, one message each."""
    if not isinstance(record, dict):
        return ["not a JSON object"]
    problems = []
    for name in ("activity_label", "ctx", "ctx_a", "ctx_b"):
        if not isinstance(record.get(name), str):
            problems.append(f"{name} is missing or not a string")
    if record.get("ctx") == "":  # its last token predicts the first one of an ending
        problems.append("ctx is empty")
    endings = record.get("endings")
    texts = endings if isinstance(endings, list) else []
    if len(texts) != 4 or not all(isinstance(text, str) and text.strip() for text in texts):
        problems.append("endings are not four texts")
    label = record.get("label")  # a number in the original files, a string on the hub
    if str(label) not in ("0", "1", "2", "3"):
        problems.append(f"label {label!r} is not 0, 1, 2 or 3 (the test split has none)")
    return problems


def tokenize(record: Any, where: str) -> Example:
    """An example from its record. Raises ValueError with ``where`` when it is malformed."""
    if problems := record_problems(record):
        raise ValueError(f"{where}: {'; '.join(problems)}; repair or remove it")
    # As build-nanogpt does: context and ending are encoded apart.
    context = encode(record["ctx"]).tolist()
    choices = [encode(f" {ending}").tolist() for ending in record["endings"]]
    completion = Request(where, context, choices, [len(choice) for choice in choices])
    # The harness moves spaces at the end of the context to the ending, then encodes the two as one
    # text. GPT-2's encoding splits that before a space, so the tokens are the same as of the two.
    text = clean(f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}")
    context = encode(text.rstrip()).tolist()
    spaces = text[len(text.rstrip()) :]
    endings = [clean(ending) for ending in record["endings"]]
    choices = [encode(f"{spaces} {ending}").tolist() for ending in endings]
    harness = Request(where, context, choices, [len(ending) for ending in endings])
    return Example(record.get("ind", -1), int(record["label"]), requests=(completion, harness))


def clean(text: str) -> str:
    """Remove the markup of WikiHow texts exactly as the harness does."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


# ---- packing -------------------------------------------------------------------------------------

# A request is one row: its context once, then its four choices side by side. An input attends to
# those before it that belong to the context or to its own choice, which its segment tells, and each
# choice's positions continue those of the context. So a choice is computed as if it were alone.
CONTEXT = 1  # 0 is padding
FIRST_CHOICE = 2


def lay_out(request: Request, config: GPTConfig) -> tuple[Tensor, Tensor]:
    """Lay out a request as a row of L inputs that predict the M tokens of its choices.

    Returns inputs (3, L): token, position, segment; and targets (3, M): token, index of the input
    that predicts it, choice. Raises ValueError for what does not fit a model of that shape.
    """
    context_length = config.context_length
    longest = max(len(choice) for choice in request.choices)
    if longest > context_length:
        problem = f"an ending of {longest} tokens does not fit the context of {context_length}"
        raise ValueError(f"{request.where}: {problem}")
    largest = max(max(tokens) for tokens in (request.context, *request.choices))
    if largest >= config.vocab_size:
        problem = f"token {largest} is outside the model's vocabulary of {config.vocab_size}"
        raise ValueError(f"{request.where}: {problem}")
    # Where context and longest choice do not fit, the harness drops the context's oldest tokens,
    # fewer for a shorter choice. The choices then share nothing: each has its own copy.
    fits = len(request.context) + longest - 1 <= context_length
    shared = request.context if fits else []
    inputs = [(token, i, CONTEXT) for i, token in enumerate(shared)]
    targets: list[tuple[int, int, int]] = []
    for k, choice in enumerate(request.choices):
        # The last token of a choice is predicted but predicts nothing, so it is not an input.
        own = choice[:-1]
        if not fits:
            own = (request.context + own)[-context_length:]
        # What the choice attends to, in order. Each of its tokens is predicted by the one before.
        visible = [*range(len(shared)), *range(len(inputs), len(inputs) + len(own))]
        predictors = visible[-len(choice) :]
        inputs += [(token, len(shared) + i, FIRST_CHOICE + k) for i, token in enumerate(own)]
        targets += [(token, i, k) for token, i in zip(choice, predictors, strict=True)]
    return torch.tensor(inputs).T, torch.tensor(targets).T


# A training run evaluates the same examples again and again, so their batches are kept.
@functools.lru_cache(maxsize=2)
def pack_for(
    device: torch.device, examples: tuple[Example, ...], config: GPTConfig
) -> list[tuple[Tensor, Tensor]]:
    """All R requests in batches, on the CPU; in each as many rows as suit the device, or one.

    A batch has inputs (3, B, T): token, position, segment, of B rows of similar length padded to T;
    and targets (3, N): token, predictor among the B * T inputs, choice among all R * 4; int64.
    Raises ValueError for an example that does not fit a model of that shape.
    """
    batch_tokens = CUDA_BATCH_TOKENS if device.type == "cuda" else BATCH_TOKENS
    rows = [lay_out(request, config) for example in examples for request in example.requests]
    lengths = [inputs.size(1) for inputs, _ in rows]
    # Rows of similar length need little padding. The longest come first, so that memory, if it
    # does not suffice, runs out at once.
    waiting = sorted(range(len(rows)), key=lambda i: lengths[i])
    batches = []
    while waiting:
        longest = lengths[waiting[-1]]
        T = math.ceil(longest / ROUND_TO) * ROUND_TO
        candidates = waiting[-max(1, batch_tokens // T) :]
        chosen = [i for i in candidates if lengths[i] >= MIN_FILL * longest]  # the last of them
        del waiting[-len(chosen) :]
        inputs = [F.pad(rows[i][0], (0, T - lengths[i])) for i in chosen]
        # b * T inputs come before row b of the batch, and 4 * i choices before request i.
        targets = [rows[i][1] + torch.tensor([[0], [b * T], [4 * i]]) for b, i in enumerate(chosen)]
        batches.append((torch.stack(inputs, dim=1), torch.cat(targets, dim=1)))
    return batches


# ---- scoring -------------------------------------------------------------------------------------


def add_log_likelihoods(model: GPT, inputs: Tensor, targets: Tensor, scores: Tensor) -> None:
    """Add a batch's log-probabilities, in nats, to the ``scores`` (R * 4) of all choices, fp32."""
    tokens, positions, segments = inputs  # (B, T) each
    query = segments[:, :, None]  # (B, T, 1)
    key = segments[:, None, :]  # (B, 1, T)
    # Padding attends at least to itself: with no key at all, a softmax is NaN.
    mask = ((key == CONTEXT) | (key == query)).tril()[:, None]  # (B, 1, T, T)
    hidden = model.hidden_states(tokens, positions, mask).flatten(0, 1)  # (B * T, C)
    # Only the inputs that predict a target go through the head, the widest product of all.
    rows = CUDA_LOGIT_ROWS if scores.is_cuda else LOGIT_ROWS
    for predicted, predictors, choices in targets.split(rows, dim=1):
        logits = model.lm_head(hidden[predictors]).float()  # (rows, V)
        losses = F.cross_entropy(logits, predicted, reduction="none")  # (rows)
        scores.index_add_(0, choices, losses, alpha=-1)


@torch.no_grad()
def predict(
    model: GPT,  # not compiled: the shapes vary
    examples: Sequence[Example],
    dist_info: DistInfo,
    progress: bool = False,
) -> Tensor:
    """The model's choices on every rank, (n, 2 conventions, 2) int64: by acc, and by acc_norm.

    Raises ValueError where an example does not fit, FloatingPointError where the model overflows.
    """
    device = dist_info.device
    requests = [request for example in examples for request in example.requests]
    batches = pack_for(device, tuple(examples), model.config)
    # Ranks share whole batches: smaller parts would mean more padding.
    batches = batches[dist_info.rank :: dist_info.world_size]
    # Copied before the first kernel: later, the host would wait for all those in the queue.
    batches = [(inputs.to(device), targets.to(device)) for inputs, targets in batches]
    scores = torch.zeros(len(requests) * 4, device=device)
    bar = tqdm(batches, "HellaSwag", unit="batch", disable=not progress, leave=False)
    # Autocast keeps the weights it has converted until its end, so it surrounds all batches.
    with dist_info.autocast(), sdpa_kernel(BACKENDS):
        for inputs, targets in bar:
            add_log_likelihoods(model, inputs, targets, scores)
    if dist.is_initialized():
        # Each score is zero on all ranks but one: the sum is exact for any number of ranks.
        dist.all_reduce(scores)
    if not scores.isfinite().all():  # argmax would take a NaN for the best
        raise FloatingPointError(f"a log-likelihood is not finite in {dist_info.dtype}")
    scores = scores.view(-1, 4)  # (R, 4)
    lengths = torch.tensor([request.lengths for request in requests], device=device)  # (R, 4)
    chosen = torch.stack((scores.argmax(dim=1), (scores / lengths).argmax(dim=1)), dim=1)  # (R, 2)
    return chosen.view(len(examples), -1, 2)


def write_predictions(path: Path, examples: Sequence[Example], chosen: Tensor) -> None:
    """A JSON line for each example: its number, its label and the choices of ``predict``."""
    with atomic_write(path) as file:
        for example, choices in zip(examples, chosen.tolist(), strict=True):
            by_convention = dict(zip(CONVENTIONS, choices, strict=True))
            line = {"ind": example.ind, "label": example.label, **by_convention}
            file.write(json.dumps(line).encode() + b"\n")


def summarize(examples: Sequence[Example], chosen: Tensor) -> dict[str, float | int]:
    """The accuracies of the choices (n, 2, 2) that ``predict`` returns.

    Keys: n, acc and acc_norm (completion), harness_acc and harness_acc_norm; and of these four the
    standard errors, ``acc_stderr`` and so on: sqrt(p (1 - p) / (n - 1)) as in the harness.
    """
    n = len(examples)
    labels = torch.tensor([example.label for example in examples])
    correct = (chosen.cpu() == labels[:, None, None]).sum(dim=0).flatten().tolist()
    names = [prefix + name for prefix in CONVENTIONS.values() for name in ("acc", "acc_norm")]
    summary: dict[str, float | int] = {"n": n}
    for name, count in zip(names, correct, strict=True):
        p = count / n
        summary[name] = p
        summary[f"{name}_stderr"] = math.sqrt(p * (1 - p) / max(1, n - 1))
    return summary


# ---- command line --------------------------------------------------------------------------------


def main() -> None:
    with exit_with_one_line():
        config = parse(HellaSwagConfig, description=__doc__)
        if problems := config.validate():
            raise ValueError("; ".join(problems))
        device = choose_device(config.device)
        dtype = choose_dtype(config.dtype, device)
        # Before the model, which may be a download of gigabytes, so that mistakes show early.
        examples = load_examples(config.data, config.split or "validation", config.limit)
        folder = find_checkpoint(config.checkpoint, config.verify)
        read = {path.resolve() for path in (config.data, *folder.iterdir()) if path is not None}
        if config.output is not None and config.output.resolve() in read:
            raise ValueError(f"--output {config.output}: the output is the input")
        require_gpt2_tokenizer(folder)
        model = GPT.from_pretrained(folder).to(device)
        start = time.perf_counter()
        chosen = predict(model, examples, DistInfo(0, 1, device, dtype), progress=True)
        summary = summarize(examples, chosen)
        summary["seconds"] = time.perf_counter() - start
        print_summary(summary, config.json, f"{folder}, {dtype} on {device}")
        if config.output is not None:
            write_predictions(config.output, examples, chosen)


def print_summary(summary: dict[str, float | int], as_json: bool, how: str) -> None:
    """Print what ``summarize`` returns, with the seconds and how it was computed."""
    if as_json:
        print(json.dumps(summary), flush=True)
        return
    for convention, prefix in CONVENTIONS.items():
        figures = []
        for name in (f"{prefix}acc", f"{prefix}acc_norm"):
            figures.append(f"{name} {summary[name]:.4f} ± {summary[f'{name}_stderr']:.4f}")
        print(f"{convention:10}  {'   '.join(figures)}")
    print(f"{summary['n']} examples in {summary['seconds']:.1f} s, {how}", flush=True)


if __name__ == "__main__":
    main()
