"""Seconds that a checkpoint of the 124M model blocks training, its size, and seconds to resume.

    python benchmarks/bench_checkpoint.py --folder DISK

The pause is the copy to host memory, for which training waits; the save is the pause and the write
after it, which a thread does. Beside it a plain write of as many bytes to one file, fsynced: what
the disk allows. The two take turns, so that a disk whose speed drifts is fair to both; the medians
are compared. The first pause is the longest: it allocates the copy. No page cache is dropped:
resuming right after saving reads from memory where there is enough of it.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from gptxs import checkpoint
from gptxs.checkpoint import TrainingState
from gptxs.optim import build_optimizer
from model import GPT, GPTConfig

BLOCK = 64 << 20  # bytes of one write call of the plain write


@dataclass(frozen=True)
class Options:
    """What to save, and where."""

    folder: Path = Path(".")
    """On the disk to measure; everything written is removed."""
    rounds: int = 5
    """Saves and plain writes, in turn."""
    device: str = "cpu"
    """Where the model and the optimizer's state are."""
    layers: int = 12
    """Transformer blocks: 12 is the 124M model, fewer a quick look."""


def build(options: Options) -> tuple[GPT, torch.optim.Optimizer, TrainingState]:
    """A model, its optimizer after one step, and a state like the one that train.py saves."""
    model = GPT(GPTConfig(n_layers=options.layers)).to(options.device)
    optimizer = build_optimizer(model, weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    state = TrainingState({"step": 0}, settings={}, optimizer=optimizer.state_dict(), scaler={})
    return model, optimizer, state


def plain_write(path: Path, size: int) -> float:
    """Seconds to write and fsync that many bytes."""
    block = os.urandom(BLOCK)
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for position in range(0, size, BLOCK):
            file.write(memoryview(block)[: min(BLOCK, size - position)])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def resume(log_dir: Path, optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Seconds to verify the newest checkpoint, and to load it."""
    start = time.perf_counter()
    folder = checkpoint.latest_valid(log_dir)
    verified = time.perf_counter()
    assert folder is not None
    state = checkpoint.load_state(folder)
    GPT.from_pretrained(folder)
    optimizer.load_state_dict(state.optimizer)
    return verified - start, time.perf_counter() - verified


def spread(seconds: list[float]) -> str:
    """The fastest and the slowest round."""
    return f"({min(seconds):.2f} to {max(seconds):.2f})"


def main() -> None:
    """Print a line for each measure."""
    options = tyro.cli(Options, description=__doc__)
    log_dir = Path(tempfile.mkdtemp(prefix=".bench_checkpoint_", dir=options.folder))
    try:
        model, optimizer, state = build(options)
        pauses = []
        saves = []
        plains = []

        def report(kind: str, step: int, row: dict[str, Any]) -> None:
            pauses.append(row["seconds"])
            saves.append(row["seconds"] + row["write_seconds"])

        # Nothing is deleted by the writer: that is not part of what is compared.
        writer = checkpoint.Writer(log_dir, keep=0, report=report, warn=sys.exit)
        for step in range(options.rounds):
            state = replace(state, progress={"step": step})
            writer.start(model.weights(), asdict(model.config), state)
            writer.collect(wait=True)
            newest, *older = checkpoint.list_checkpoints(log_dir)
            for old in older:
                shutil.rmtree(old)
            size = sum(file.stat().st_size for file in newest.iterdir())
            plains.append(plain_write(log_dir / "plain", size))
        verifying, loading = resume(log_dir, optimizer)
        save = statistics.median(saves)
        plain = statistics.median(plains)
        print(f"{model.num_parameters():,} parameters, {size:,} bytes on disk")
        print(f"pause        {statistics.median(pauses):6.2f} s  {spread(pauses)}")
        print(f"save         {save:6.2f} s  {size / save / 1e9:5.2f} GB/s  {spread(saves)}")
        print(f"plain write  {plain:6.2f} s  {size / plain / 1e9:5.2f} GB/s  {spread(plains)}")
        print(f"ratio        {plain / save:6.1%} of the plain write's speed")
        seconds = verifying + loading
        print(f"resume       {seconds:6.2f} s  verify {verifying:.2f}, load {loading:.2f}")
    finally:
        shutil.rmtree(log_dir, ignore_errors=True)


if __name__ == "__main__":
    main()
