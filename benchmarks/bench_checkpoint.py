"""Seconds that a checkpoint of the 124M model blocks training, its size, and seconds to resume.

    python benchmarks/bench_checkpoint.py --folder DISK

Beside it a plain write of as many bytes to one file, fsynced: what the disk allows. The two take
turns, so that a disk whose speed drifts is fair to both; the medians are compared. No page cache
is dropped: resuming right after saving reads from memory where there is enough of it.
"""

import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
import checkpoint
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


def make(options: Options) -> tuple[GPT, torch.optim.AdamW, dict[str, Any]]:
    """A model, its optimizer after one step, and the state that train.py saves."""
    model = GPT(GPTConfig(n_layers=options.layers)).to(options.device)
    groups = model.parameter_groups(0.1)
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    state = dict.fromkeys(checkpoint.KEYS) | {"optimizer": optimizer.state_dict()}
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


def resume(log_dir: Path, optimizer: torch.optim.AdamW) -> tuple[float, float]:
    """Seconds to check the newest checkpoint, and to load it."""
    start = time.perf_counter()
    folder = checkpoint.newest_whole(log_dir)
    checked = time.perf_counter()
    assert folder is not None
    state = checkpoint.load_state(folder)
    GPT.from_pretrained(folder)
    optimizer.load_state_dict(state["optimizer"])
    return checked - start, time.perf_counter() - checked


def main() -> None:
    """Prints one line for each measure."""
    options = tyro.cli(Options, description=__doc__)
    log_dir = Path(tempfile.mkdtemp(prefix=".bench_checkpoint_", dir=options.folder))
    try:
        model, optimizer, state = make(options)
        saves, plains = [], []
        for step in range(options.rounds):
            start = time.perf_counter()
            saved = checkpoint.save(log_dir, step, model, state, keep=1)
            saves.append(time.perf_counter() - start)
            for thread in set(threading.enumerate()) - {threading.main_thread()}:
                thread.join()  # deleting the checkpoint before it must not slow the plain write
            size = sum(file.stat().st_size for file in saved.iterdir())
            plains.append(plain_write(log_dir / "plain", size))
        checking, loading = resume(log_dir, optimizer)
        save, plain = statistics.median(saves), statistics.median(plains)
        print(f"{model.num_parameters():,} parameters, {size:,} bytes on disk")
        print(f"save         {save:6.2f} s  {size / save / 1e9:5.2f} GB/s  {_range(saves)}")
        print(f"plain write  {plain:6.2f} s  {size / plain / 1e9:5.2f} GB/s  {_range(plains)}")
        print(f"share        {plain / save:6.1%} of the plain write's speed")
        print(f"resume       {checking + loading:6.2f} s  check {checking:.2f}, load {loading:.2f}")
    finally:
        shutil.rmtree(log_dir, ignore_errors=True)


def _range(seconds: list[float]) -> str:
    return f"({min(seconds):.2f} to {max(seconds):.2f})"


if __name__ == "__main__":
    main()
