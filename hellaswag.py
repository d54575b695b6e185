"""HellaSwag (Zellers et al. 2019): which of four endings does the model find most likely?

Two conventions are in use, and one pass over the model measures both:

    completion   the context as it is; build-nanogpt and llm.c report this one
    harness      "activity: Context", wiki markup removed; lm-evaluation-harness, task version 1.0

Each gives two accuracies. `acc` takes the ending of the highest log-likelihood, `acc_norm` that of
the highest per token (completion) or per character (harness).

Example: python hellaswag.py --checkpoint log --output predictions.jsonl
"""

import common

import functools
import json
import math
import re
import reprlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from checkpoint import open_checkpoint
from dataset import encode_ordinary
from model import GPT

# The conventions in the order of `Example.requests`, with their prefixes in the summary.
CONVENTIONS = {"completion": "", "harness": "harness_"}
# On a CPU, malloc reuses blocks of up to 32 MB and asks the system for larger ones every time. At
# 124M in fp32 these two keep the widest tensors, (tokens, 4 C) in an MLP and the logits, at 26 MB.
BATCH_TOKENS = 2048
LOGIT_ROWS = 128
# A GPU waits for each launch, so it gets few and large kernels: its logits are 0.8 GB in fp32.
CUDA_BATCH_TOKENS = 16_384
CUDA_LOGIT_ROWS = 4096
# All attention kernels but cuDNN's, which builds a plan for each new shape, of which there are 31.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# Rows are padded to a multiple of this, so that only some forty shapes occur.
ROUND_TO = 8
# Rows shorter than this fraction of a batch's longest row wait for a batch with less padding.
MIN_FILL = 0.85

LOCAL_FILE = "give HellaSwag as a JSONL file with --data (train.py: --hellaswag-data)"


@dataclass(frozen=True)
class HellaSwagConfig:
    checkpoint: str = "log"
    """A checkpoint, a log folder (its newest checkpoint) or a hub id such as gpt2."""
    data: Path | None = None
    """HellaSwag as a JSONL file. Default: Rowan/hellaswag from the hub."""
    split: Literal["validation", "train"] = "validation"
    """Split of Rowan/hellaswag. Ignored with --data."""
    limit: Annotated[int | None, common.Bounds(1, 10**9)] = None
    """Use only this many examples, from the beginning. Default: all."""
    output: Path | None = None
    """Write the predictions to this file, one JSON line for each example."""
    json: bool = False
    """Print the summary as one JSON object."""
    device: str = "auto"
    """cuda, cuda:1, mps or cpu. auto: the machine's accelerator, or the CPU without one."""
    dtype: common.DtypeName = "auto"
    """Precision of the matrix products. auto: bf16 where the hardware has it, else fp16 on GPUs."""
    verify: bool = True
    """Compare the checkpoint's files with its checksums first."""

    def validate(self) -> list[str]:
        """Every problem of these options, one message each."""
        problems = common.check_options(self)
        if self.output is not None:
            problems += self._output_problems(self.output)
        return problems

    def _output_problems(self, output: Path) -> list[str]:
        # It is written after minutes of work, and replaces what is there.
        if not output.absolute().parent.is_dir():
            return [f"--output {output}: its folder does not exist; create it first"]
        if output.exists() and not output.is_file():
            return [f"--output {output} is not a regular file; give another"]
        if output.exists() and not holds_predictions(output):
            return [f"--output {output} exists and holds no predictions; give another file"]
        try:  # the temporary file from which the output will be renamed
            temporary = output.with_name(f".{output.name}.tmp")
            temporary.open("wb").close()
            temporary.unlink()
        except OSError as error:
            return [f"--output {output} cannot be written ({error}); give another"]
        return []


# ---- examples ------------------------------------------------------------------------------------


# eq=False compares by identity: a tuple of 20,084 requests is then a cheap key of pack's cache.
@dataclass(frozen=True, eq=False)
class Request:
    """An example in one convention: a context, and four choices to continue it, as tokens."""

    where: str  # file and line, for messages
    context: list[int]
    choices: list[list[int]]
    lengths: list[int]  # what acc_norm divides each choice's log-likelihood by


@dataclass(frozen=True, eq=False)
class Example:
    ind: int  # HellaSwag's own number for it
    label: int  # index of the right choice
    requests: tuple[Request, ...]  # in the order of CONVENTIONS


def load_examples(
    path: str | Path | None = None, split: str = "validation", limit: int | None = None
) -> list[Example]:
    """The first ``limit`` examples of a JSONL file, or of Rowan/hellaswag on the hub, tokenized.

    Raises FileNotFoundError when there is no such file or the download fails, and ValueError, with
    the line's number, when a line is malformed.
    """
    if path is not None:
        if not Path(path).exists():
            raise FileNotFoundError(f"{path}: no such file; {LOCAL_FILE}")
        common.require_regular_file(Path(path))
    source = f"Rowan/hellaswag {split}" if path is None else str(path)
    records = download(split) if path is None else read_jsonl(Path(path))
    examples = []
    for number, record in enumerate(islice(records, limit), start=1):
        examples.append(tokenize(record, where=f"{source}, line {number}"))
    if not examples:
        raise ValueError(f"{source} has no examples; {LOCAL_FILE}")
    return examples


def download(split: str) -> Iterable[Any]:
    """A split of Rowan/hellaswag. Raises FileNotFoundError when it cannot be downloaded."""
    common.prepare_hub()
    try:
        from datasets import load_dataset

        return load_dataset("Rowan/hellaswag", split=split)
    except Exception as error:  # the classes it may raise have no base but this one in common
        reason = common.hub_problem() or common.first_line(error)
        problem = f"Rowan/hellaswag could not be downloaded ({reason})"
        raise FileNotFoundError(f"{problem}; {LOCAL_FILE}") from None


def read_jsonl(path: Path) -> Iterator[Any]:
    """The value of each line of a JSONL file; None for a line that is not JSON."""
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line.decode())
            except (ValueError, RecursionError):  # not UTF-8, not JSON, or nested too deep
                record = None
            yield record


def validate(record: Any) -> list[str]:
    """Every problem of an example as HellaSwag publishes it, one message each."""
    if not isinstance(record, dict):
        return ["not a JSON object"]
    problems = []
    for name in ("activity_label", "ctx", "ctx_a", "ctx_b"):
        value = record.get(name)
        if not isinstance(value, str):
            problems.append(f"{name} is missing or not a string")
        elif name in ("ctx", "ctx_a") and not value.strip():
            # The first token of an ending is predicted by the last one of its context.
            problems.append(f"{name} is empty")
    endings = record.get("endings")
    if not isinstance(endings, list) or len(endings) != 4:
        problems.append("endings is not a list of four")
    elif not all(isinstance(ending, str) and ending.strip() for ending in endings):
        problems.append("an ending is empty or not a string")
    # A number in the original files, a string on the hub, and empty in the test split.
    label = record.get("label")
    if not isinstance(label, int | str) or str(label) not in ("0", "1", "2", "3"):
        problems.append(f"label {reprlib.repr(label)} is not 0, 1, 2 or 3")
    ind = record.get("ind", -1)
    if isinstance(ind, bool) or not isinstance(ind, int):
        problems.append("ind is not a whole number")
    return problems


def tokenize(record: Any, where: str) -> Example:
    """The example of a JSONL line. Raises ValueError with ``where`` when it is malformed."""
    if problems := validate(record):
        raise ValueError(f"{where}: {'; '.join(problems)}; repair or remove the line")
    encode = encode_ordinary
    # As build-nanogpt does: context and ending are encoded apart.
    choices = [encode(f" {ending}") for ending in record["endings"]]
    lengths = [len(choice) for choice in choices]
    completion = Request(where, encode(record["ctx"]), choices, lengths)
    # The harness moves spaces at the end of the context to the ending, then encodes the two as one
    # text. GPT-2's encoding splits before a space, so that encoding them apart gives the same.
    text = clean(f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}")
    context = text.rstrip()
    if not context:
        raise ValueError(f"{where}: ctx_a is empty without its markup; repair or remove the line")
    spaces = text[len(context) :]
    endings = [clean(ending) for ending in record["endings"]]
    choices = [encode(f"{spaces} {ending}") for ending in endings]
    lengths = [len(ending) for ending in endings]
    harness = Request(where, encode(context), choices, lengths)
    return Example(record.get("ind", -1), int(record["label"]), requests=(completion, harness))


def clean(text: str) -> str:
    """Remove the markup of WikiHow texts exactly as the harness does."""
    text = text.strip().replace(" [title]", ". ")
    lines = []
    for line in text.split("\n"):
        # The harness's pattern would search the rest of the line for each bracket that is never
        # closed: hours for a megabyte of them. Behind the last "]" there is no markup.
        before, closing, after = line.rpartition("]")
        lines.append(re.sub(r"\[.*?\]", "", before + closing) + after)
    return "\n".join(lines).replace("  ", " ")


# ---- packing -------------------------------------------------------------------------------------

# A request is one row: its context once, then its four choices side by side. An input attends to
# those before it that belong to the context or to its own choice, which its segment tells, and each
# choice's positions continue those of the context. So a choice is computed as if it were alone.
CONTEXT = 1  # 0 is padding
FIRST_CHOICE = 2


def lay_out(request: Request, context_length: int) -> tuple[Tensor, Tensor]:
    """Lay out a request as a row of L inputs that predict the M tokens of its choices.

    Returns inputs (3, L): token, position, segment; and targets (3, M): token, index of the input
    that predicts it, choice. Raises ValueError when an ending alone exceeds ``context_length``.
    """
    longest = max(len(choice) for choice in request.choices)
    if longest > context_length:
        problem = f"an ending of {longest} tokens does not fit the context of {context_length}"
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


@dataclass(frozen=True, eq=False)
class Batch:
    """B rows of similar length, out of R requests, padded to T; N targets; int64."""

    inputs: Tensor  # (3, B, T): token, position, segment
    targets: Tensor  # (3, N): token, predictor among the B * T inputs, choice among all R * 4

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device, in one transfer, for which on CUDA the host does not wait."""
        numbers = torch.cat((self.inputs.flatten(), self.targets.flatten()))
        if device.type == "cuda":
            numbers = numbers.pin_memory()  # from other memory the host would wait for the copy
        numbers = numbers.to(device, non_blocking=device.type == "cuda")
        inputs, targets = numbers.split((self.inputs.numel(), self.targets.numel()))
        return Batch(inputs.view(self.inputs.shape), targets.view(self.targets.shape))


# A training run evaluates the same examples again and again, so their batches are kept.
@functools.lru_cache(maxsize=2)
def pack(
    requests: tuple[Request, ...], context_length: int, batch_tokens: int = BATCH_TOKENS
) -> list[Batch]:
    """All requests in batches of at most ``batch_tokens`` inputs with padding, or one row."""
    rows = [lay_out(request, context_length) for request in requests]
    row_lengths = [inputs.size(1) for inputs, _ in rows]
    # Rows of similar length need little padding. The longest come first, so that memory, if it
    # does not suffice, runs out at once.
    waiting = sorted(range(len(rows)), key=lambda i: row_lengths[i])
    batches = []
    while waiting:
        longest = row_lengths[waiting[-1]]
        T = math.ceil(longest / ROUND_TO) * ROUND_TO
        candidates = waiting[-max(1, batch_tokens // T) :]
        chosen = [i for i in candidates if row_lengths[i] >= MIN_FILL * longest]
        del waiting[-len(chosen) :]
        batch_inputs = []
        batch_targets = []
        for b, i in enumerate(chosen):
            inputs, targets = rows[i]
            batch_inputs.append(F.pad(inputs, (0, T - row_lengths[i])))
            # b * T inputs come before row b of the batch, and 4 * i choices before request i.
            batch_targets.append(targets + torch.tensor([[0], [b * T], [4 * i]]))
        batches.append(Batch(torch.stack(batch_inputs, dim=1), torch.cat(batch_targets, dim=1)))
    return batches


def pack_for(device: torch.device, examples: Sequence[Example], context_length: int) -> list[Batch]:
    """The examples in batches of the size that suits the device.

    Raises ValueError when an ending exceeds ``context_length``.
    """
    requests = tuple(request for example in examples for request in example.requests)
    batch_tokens = CUDA_BATCH_TOKENS if device.type == "cuda" else BATCH_TOKENS
    return pack(requests, context_length, batch_tokens)


# ---- scoring -------------------------------------------------------------------------------------


def add_log_likelihoods(model: GPT, batch: Batch, scores: Tensor) -> None:
    """Add a batch's log-probabilities, in nats, to the ``scores`` (R * 4) of all choices, fp32."""
    device = scores.device
    batch = batch.to(device)
    tokens, positions, segments = batch.inputs  # (B, T) each
    query = segments[:, :, None]  # (B, T, 1)
    key = segments[:, None, :]  # (B, 1, T)
    # Padding attends to itself: with no key at all, a softmax is NaN.
    visible = ((key == CONTEXT) | (key == query)).tril()[:, None]  # (B, 1, T, T)
    # What the attention adds to its scores; it would convert a boolean mask once in every layer.
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else model.lm_head.weight.dtype
    mask = torch.where(visible, 0.0, -math.inf).to(dtype)
    hidden = model.hidden_states(tokens, positions, mask).flatten(0, 1)  # (B * T, C)
    # Only the inputs that predict a target go through the head, which is 50,304 columns wide.
    rows = CUDA_LOGIT_ROWS if device.type == "cuda" else LOGIT_ROWS
    for targets, predictors, choices in batch.targets.split(rows, dim=1):
        logits = model.lm_head(hidden[predictors]).float()  # (rows, V)
        losses = F.cross_entropy(logits, targets, reduction="none")  # (rows)
        scores.index_add_(0, choices, losses, alpha=-1)


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
    """The model's choices on every rank, (n, 2 conventions, 2) int64: by acc, and by acc_norm.

    ``model`` is the uncompiled module. Raises ValueError when an ending exceeds its context.
    """
    requests = [request for example in examples for request in example.requests]
    # Ranks share whole batches: smaller parts would mean more padding.
    batches = pack_for(device, examples, model.config.context_length)[rank::world_size]
    scores = torch.zeros(len(requests) * 4, device=device)
    # Autocast keeps the weights it has converted until its end, so it surrounds all batches.
    with (
        torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
        sdpa_kernel(BACKENDS),
    ):
        for batch in tqdm(batches, "HellaSwag", unit="batch", disable=not progress, leave=False):
            add_log_likelihoods(model, batch, scores)
    if dist.is_initialized():
        # Each score is zero on all ranks but one: the sum is exact for any number of ranks.
        dist.all_reduce(scores)
    if not scores.isfinite().all():  # argmax would take a NaN for the best
        raise FloatingPointError(f"a log-likelihood is not finite: the model overflows in {dtype}")
    scores = scores.view(-1, 4)  # (R, 4)
    lengths = torch.tensor([request.lengths for request in requests], device=device)  # (R, 4)
    chosen = torch.stack((scores.argmax(dim=1), (scores / lengths).argmax(dim=1)), dim=1)  # (R, 2)
    return chosen.view(len(examples), -1, 2)


def check_vocabulary(examples: Sequence[Example], vocab_size: int) -> None:
    """Raise ValueError for an example with a token that a model's vocabulary lacks."""
    for example in examples:
        for request in example.requests:
            largest = max(map(max, (request.context, *request.choices)))
            if largest >= vocab_size:
                raise ValueError(
                    f"{request.where}: token {largest} is outside the model's vocabulary of"
                    f" {vocab_size}"
                )


def holds_predictions(path: Path) -> bool:
    """Whether a file is empty or was written by ``write_predictions``."""
    with path.open("rb") as file:
        start = file.read(1024)  # a line has some 60 bytes
    if not start:
        return True
    try:
        return set(json.loads(start.splitlines()[0])) == {"ind", "label", *CONVENTIONS}
    except (ValueError, TypeError):
        return False


def write_predictions(path: Path, examples: Sequence[Example], chosen: Tensor) -> None:
    """A JSON line for each example: its number, its label and the choices of ``predict``."""
    try:
        with common.atomic_write(path) as file:
            for example, choices in zip(examples, chosen.tolist(), strict=True):
                line: dict[str, Any] = {"ind": example.ind, "label": example.label}
                line.update(zip(CONVENTIONS, choices, strict=True))
                file.write(json.dumps(line).encode() + b"\n")
    except OSError as error:  # whatever it is, the command was right: exit code 1
        raise OSError(f"--output {path}: the predictions were not written ({error})") from None


def summarize(examples: Sequence[Example], chosen: Tensor) -> dict[str, float | int]:
    """The accuracies of the choices (n, 2, 2) that ``predict`` returns.

    Keys: n; acc and acc_norm (completion); harness_acc and harness_acc_norm; each of the four with
    _stderr for its standard error, sqrt(p (1 - p) / (n - 1)) as in the harness.
    """
    n = len(examples)
    labels = torch.tensor([example.label for example in examples])
    correct = (chosen.cpu() == labels[:, None, None]).sum(dim=0).tolist()
    summary: dict[str, float | int] = {"n": n}
    for prefix, counts in zip(CONVENTIONS.values(), correct, strict=True):
        for name, count in zip(("acc", "acc_norm"), counts, strict=True):
            p = count / n
            summary[f"{prefix}{name}"] = p
            summary[f"{prefix}{name}_stderr"] = math.sqrt(p * (1 - p) / max(1, n - 1))
    return summary


# ---- command line --------------------------------------------------------------------------------


def main() -> None:
    with common.exit_with_one_line():
        config = common.parse_options(HellaSwagConfig, description=__doc__)
        if problems := config.validate():
            raise ValueError("; ".join(problems))
        device = common.choose_device(config.device)
        dtype = common.choose_dtype(config.dtype, device)
        # Before the model, which may be a download of gigabytes, so that mistakes show early.
        examples = load_examples(config.data, config.split, config.limit)
        model = open_checkpoint(config.checkpoint, config.verify).to(device)
        check_vocabulary(examples, model.config.vocab_size)
        start = time.perf_counter()
        chosen = predict(model, examples, device, dtype=dtype, progress=True)
        summary = summarize(examples, chosen)
        summary["seconds"] = time.perf_counter() - start
        try:
            print_summary(summary, config.json, f"{dtype} on {device}")
        finally:  # one of the two may fail: a full disk, a closed console
            if config.output is not None:
                write_predictions(config.output, examples, chosen)


def print_summary(summary: dict[str, float | int], as_json: bool, where: str) -> None:
    """Print what ``summarize`` returns, with the seconds, and flush it."""
    if as_json:
        print(json.dumps(summary), flush=True)
        return
    for convention, prefix in CONVENTIONS.items():
        figures = []
        for name in (f"{prefix}acc", f"{prefix}acc_norm"):
            figures.append(f"{name} {summary[name]:.4f} ± {summary[f'{name}_stderr']:.4f}")
        print(f"{convention:10}  {'   '.join(figures)}")
    print(f"{summary['n']} examples in {summary['seconds']:.1f} s, {where}", flush=True)


if __name__ == "__main__":
    main()
