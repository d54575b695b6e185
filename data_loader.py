"""Shards of tokens as batches, by DDP rank, in an order that is a formula and not a state.

A shard of n tokens holds (n - 1) // T windows of T + 1 tokens: inputs and targets overlap by one.
Step s of a run takes positions [s * G, (s + 1) * G) of an endless stream of windows, where G is
the number of windows in a step; ``window_order`` computes which window stands at a position.
Within the step, position j belongs to micro-step m, rank r and row b, where
j = (m * world_size + r) * B + b. So a step sees the same tokens for any number of ranks and any
micro-batch, and resuming at step s needs no state but s.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gptxs.shards import Shard, digest, find_shards

# Four rounds of a good mixer are pseudo-random (Luby & Rackoff 1988); six cost little more.
# A change of this number would send every resumed run to other data.
FEISTEL_ROUNDS = 6

# ---- the order of the windows --------------------------------------------------------------------


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea & Flood 2014): 64 well-mixed bits for each of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(indices: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where a pseudo-random permutation of range(n) sends ``indices``; int64, of their shape.

    A Feistel network permutes 0 .. 4**k - 1, the smallest such range that holds n. A result of n
    or more is permuted again until it is below n ("cycle walking", Black & Rogaway 2002), at most
    4 times on average. It needs no memory, and every version of NumPy computes the same.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))  # bits in each half of the network
    mask = (np.uint64(1) << half) - np.uint64(1)
    # One 64-bit key a round. Seed and epoch go through the mixer so that neighbours differ.
    key = _mix(np.array([seed % 2**64], np.uint64)) + np.uint64(epoch)
    keys = _mix(_mix(key) + np.arange(1, FEISTEL_ROUNDS + 1, dtype=np.uint64))
    out = np.asarray(indices).astype(np.uint64)
    # All of them go through the network once; the test decides who goes again.
    outside = np.ones(out.shape, dtype=bool)
    while outside.any():
        x = out[outside]
        left = x >> half
        right = x & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        out[outside] = (left << half) | right
        outside = out >= n
    return out.astype(np.int64)


def window_order(positions: np.ndarray, n: int, seed: int, shuffle: bool) -> np.ndarray:
    """The windows (of n) at ``positions`` of the endless stream; a new permutation each epoch."""
    # A step may straddle two epochs, so each position finds its own.
    epochs, windows = np.divmod(np.asarray(positions, dtype=np.int64), n)
    if shuffle:
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            windows[in_epoch] = permute(windows[in_epoch], n, seed, int(epoch))
    return windows


@dataclass(frozen=True)
class StepLayout:
    """How the windows of a step are divided into micro-batches of B rows and among the ranks."""

    windows_per_step: int
    micro_batch: int
    rank: int = 0
    world_size: int = 1

    def micro_steps(self) -> int:
        """Micro-batches in a step of each rank."""
        return self.windows_per_step // (self.micro_batch * self.world_size)

    def positions(self, step: int, micro_step: int) -> np.ndarray:
        """Positions in the stream of this rank's micro-batch: (B,) int64."""
        j = (micro_step * self.world_size + self.rank) * self.micro_batch
        return step * self.windows_per_step + j + np.arange(self.micro_batch)

    def batches(self, n: int, seed: int, shuffle: bool, start_step: int) -> Iterator[np.ndarray]:
        """This rank's micro-batches from ``start_step`` on, without end: windows (B,) of n."""
        step = start_step
        while True:
            for micro_step in range(self.micro_steps()):
                yield window_order(self.positions(step, micro_step), n, seed, shuffle)
            step += 1


# ---- windows -------------------------------------------------------------------------------------


class TokenDataset:
    """The windows of a split's shards, by number.

    Raises what ``find_shards`` does, and ValueError when no shard holds a window of this context.
    """

    def __init__(
        self, data_dir: str | Path, split: str, context_length: int, vocab_size: int
    ) -> None:
        folder = Path(data_dir)
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.shards: list[Shard] = find_shards(folder, split)
        counts = [(shard.tokens - 1) // context_length for shard in self.shards]
        if sum(counts) == 0:
            raise ValueError(
                f"{folder}: no {split} shard holds {context_length + 1} tokens, one window of"
                f" context length {context_length}; lower it or prepare more data"
            )
        self.first_window = np.concatenate(([0], np.cumsum(counts)))  # of each shard, and the end
        # What stands before the split in the files' names; train.bin has the name of its folder.
        prefix = self.shards[0].path.name.rpartition(split)[0]
        self.name = prefix.rstrip("_") or folder.resolve().name

    def __len__(self) -> int:
        """The number of windows."""
        return int(self.first_window[-1])

    def fingerprint(self) -> list[list[str | int]]:
        """Each shard's name, tokens and digest: a run can only be resumed on the same shards.

        The digest is of the file itself: a record in index.json cannot know that it was changed.
        """
        return [[shard.path.name, shard.tokens, digest(shard)] for shard in self.shards]

    def windows(self, indices: np.ndarray) -> np.ndarray:
        """The windows ``indices`` (B,): (B, T + 1) uint16.

        Raises ValueError, naming the shard, for a token outside the vocabulary, which on a GPU
        would be an assertion that names nothing, and for a shard removed or cut short.
        """
        T = self.context_length
        # uint16 as on the disk: tokens become int64 on the device, after the copy.
        out = np.empty((len(indices), T + 1), dtype=np.uint16)
        shard_of = np.searchsorted(self.first_window, indices, side="right") - 1
        starts = (indices - self.first_window[shard_of]) * T
        for number in np.unique(shard_of):
            shard = self.shards[number]
            rows = shard_of == number
            # Mapped for this batch only: there may be 13,000 shards, and a process is usually
            # allowed 1,024 open files.
            try:
                tokens = shard.map_tokens()
            except (FileNotFoundError, ValueError) as error:
                message = f"{shard.path}: the shard was removed or cut short during the run"
                raise ValueError(message) from error
            windows = tokens[starts[rows, None] + np.arange(T + 1)]
            if windows.max() >= self.vocab_size:
                raise ValueError(
                    f"{shard.path}: token {windows.max()} is outside the vocabulary of"
                    f" {self.vocab_size}; write the shard again with dataset.py"
                )
            out[rows] = windows
        return out


def ignored_files(folder: Path, *datasets: TokenDataset) -> list[str]:
    """The files there that look like shards and are in no data set: copies, or of an old one."""
    used = {shard.path.name for data in datasets for shard in data.shards}
    found = {path.name for path in folder.glob("*") if path.suffix in (".npy", ".bin", ".ds")}
    return sorted(found - used)


# ---- batches -------------------------------------------------------------------------------------


class TokenLoader:
    """Iterates over (inputs, targets), each (B, T) int64 on the device, until ``batches`` ends.

    ``batches`` gives the windows (B,) of each. A thread reads ``prefetch`` batches ahead into
    pinned memory, so that the training loop waits for neither the disk nor the copy. Tokens travel
    as uint16, a quarter of int64's traffic.

    An exception in the thread is raised by the ``next`` that would have returned the batch.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        batches: Iterable[np.ndarray],
        device: torch.device,
        prefetch: int,
    ) -> None:
        self.dataset = dataset
        self.batches = batches
        self.device = device
        # A batch of tokens, what went wrong in the thread, or None for the end.
        self.queue: queue.Queue[Tensor | Exception | None] = queue.Queue(prefetch)
        self.closed = threading.Event()
        # A daemon: a run that ends by an exception does not wait for its next batch.
        self.thread = threading.Thread(target=self._read_ahead, name="token_loader", daemon=True)
        self.thread.start()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        item = self.queue.get()
        if not isinstance(item, Tensor):
            self.queue.put(item)  # for the next call
            raise StopIteration if item is None else item
        # A copy from pinned memory is queued behind the running step: the host does not wait. On
        # CUDA only: MPS would read memory that may be freed meanwhile (pytorch#189690).
        tokens = item.to(self.device, non_blocking=self.device.type == "cuda").long()
        return tokens[:, :-1], tokens[:, 1:]

    def _read_ahead(self) -> None:
        on_gpu = self.device.type == "cuda"
        try:
            if on_gpu:  # a thread starts on GPU 0, and would take memory there to pin
                torch.cuda.set_device(self.device)
            for indices in self.batches:
                tokens = torch.from_numpy(self.dataset.windows(indices))
                self._put(tokens.pin_memory() if on_gpu else tokens)
                if self.closed.is_set():
                    return
            self._put(None)
        except Exception as error:  # whatever it is, the training loop must stop for it
            self._put(error)

    def _put(self, item: Tensor | Exception | None) -> None:
        # With a timeout, since nobody may ever make room in the queue again.
        while not self.closed.is_set():
            try:
                return self.queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def close(self) -> None:
        """End the thread."""
        self.closed.set()
        self.thread.join()
