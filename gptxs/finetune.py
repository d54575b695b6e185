"""The model that a run starts from in place of random weights: its shape and its weights."""

from __future__ import annotations

from pathlib import Path

from gptxs.checkpoint import Shape, Weights, find_checkpoint, list_checkpoints
from gptxs.hf import read_shape, read_weights, require_gpt2_tokenizer, weights_sha256
from gptxs.tokenizer import VOCAB_SIZE


def initial_shape(source: str | None, log_dir: Path | None, asked: Shape, default: Shape) -> Shape:
    """The shape of the model ``source``, with at most the context that is ``asked`` for.

    A checkpoint in ``log_dir``, the folder of a run to resume, counts first: the source may be gone
    by then. Where ``asked`` differs from ``default`` it is the user's: raises ValueError with all
    fields that contradict the source.
    """
    if log_dir is not None and list_checkpoints(log_dir):
        source = str(log_dir)
    if source is None:
        raise ValueError("--preset finetune needs a model to start from: add --init-from gpt2")
    saved = read_shape(find_checkpoint(source))
    context = min(asked["context_length"], saved["context_length"])
    shape = {**saved, "context_length": context}
    problems = []
    for name, value in asked.items():
        if value not in (default[name], shape[name]):
            limit = "at most " if name == "context_length" else ""
            problems.append(f"model.{name} {value} must be {limit}{saved[name]} as in {source}")
    if problems:
        raise ValueError("; ".join(problems))
    return shape


def initial_weights(source: str, shape: Shape) -> tuple[Weights, str]:
    """The weights of the model ``source``, as ``read_weights`` returns them, and their SHA-256.

    Only the first positions are kept, as many as ``shape`` has: texts within them are computed as
    before. Raises ValueError for a vocabulary of GPT-2's size that is not GPT-2's.
    """
    folder = find_checkpoint(source)
    if shape["vocab_size"] >= VOCAB_SIZE:  # a smaller one has shards of its own tokens
        require_gpt2_tokenizer(folder)
    weights = read_weights(folder)
    positions = weights["transformer.wpe.weight"]  # (T, C)
    weights["transformer.wpe.weight"] = positions[: shape["context_length"]]
    return weights, weights_sha256(folder)
