"""Shards of tokens as batches, by DDP rank, in an order that is a formula and not a state.

A shard of n tokens holds (n - 1) // T windows of T + 1 tokens. Step s of the run takes positions
[s * G, (s + 1) * G) of an endless stream of windows, G windows a step; ``window_order`` says which
window stands at a position. Within the step, position j belongs to micro-step m, rank r and row b
with j = (m * world_size + r) * B + b. So for any number of ranks and any micro-batch a step sees
the same tokens, and to resume at step s is to start at step s.
"""

import os
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FEISTEL_ROUNDS = 6


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea & Flood 2014): 64 well-mixed bits for each of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(indices: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where a pseudo-random permutation of range(n) sends ``indices``; int64, of their shape.

    A Feistel network over the smallest even number of bits that holds n permutes 0 .. 4**k - 1;
    whatever lands at n or beyond walks on until it lands inside (Black & Rogaway 2002). That is
    at most 4 walks on average, no memory, and the same for every version of NumPy.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    # One 64-bit key a round; `epoch` and `seed` go through the mixer so that neighbours differ.
    key = _mix(np.array([seed % 2**64], np.uint64)) + np.uint64(epoch)
    keys = _mix(_mix(key) + np.arange(1, FEISTEL_ROUNDS + 1, dtype=np.uint64))
    out = np.asarray(indices).astype(np.uint64)
    walking = np.ones(out.shape, dtype=bool)
    while walking.any():
        x = out[walking]
        left, right = x >> half, x & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        out[walking] = (left << half) | right
        walking = out >= n
    return out.astype(np.int64)


def window_order(positions: np.ndarray, n: int, seed: int, shuffle: bool) -> np.ndarray:
    """The windows (of n) at ``positions`` of the endless stream; a new permutation each epoch."""
    epochs, windows = np.divmod(np.asarray(positions, dtype=np.int64), n)
    if shuffle:
        for epoch in np.unique(epochs):
            at = epochs == epoch
            windows[at] = permute(windows[at], n, seed, int(epoch))
    return windows


class TokenDataset:
    """The windows of a split's shards, ``DIR/*_{split}_{index}.npy``, memory-mapped.

    Raises:
        FileNotFoundError: the folder or the split's shards are missing.
        ValueError: a shard is damaged, not 1-D uint16, too short, or of another data set.
    """

    def __init__(self, data_dir: str | Path, split: str, context_length: int) -> None:
        folder, self.context_length = Path(data_dir), context_length
        self.paths = sorted(folder.glob(f"*_{split}_[0-9]*.npy"))
        if not self.paths:
            raise FileNotFoundError(
                f"{folder}: no {split} shards (*_{split}_000000.npy) there; write them with"
                f" `python dataset.py --data-dir {folder}` or give another --data-dir"
            )
        names = sorted({path.name.rsplit(f"_{split}_", 1)[0] for path in self.paths})
        if len(names) > 1:
            raise ValueError(f"{folder}: shards of several data sets ({', '.join(names)})")
        self.shards = [_open_shard(path) for path in self.paths]
        counts = [(len(shard) - 1) // context_length for shard in self.shards]
        if sum(counts) == 0:
            raise ValueError(
                f"{folder}: no {split} shard holds {context_length + 1} tokens, one window of"
                f" context length {context_length}; lower it or prepare more data"
            )
        self.first_window = np.concatenate(([0], np.cumsum(counts)))
        self.sizes = [path.stat().st_size for path in self.paths]

    def __len__(self) -> int:
        """The number of windows."""
        return int(self.first_window[-1])

    def check_tokens(self, vocab_size: int, rank: int = 0, world_size: int = 1) -> None:
        """Reads every ``world_size``-th shard once; ValueError names one with a foreign token.

        It also leaves the shards in the page cache, where random windows are read from later.
        """
        for path, shard in list(zip(self.paths, self.shards, strict=True))[rank::world_size]:
            if int(shard.max()) >= vocab_size:
                raise ValueError(
                    f"{path}: token {int(shard.max())} is outside the vocabulary of {vocab_size};"
                    " write the shard again with dataset.py"
                )

    def fingerprint(self) -> list[list[str | int]]:
        """Each shard's name and tokens: what must be the same for a run to go on with it."""
        return [[p.name, len(s)] for p, s in zip(self.paths, self.shards, strict=True)]

    def windows(self, indices: np.ndarray) -> np.ndarray:
        """Windows as (len(indices), T + 1) uint16.

        Raises OSError when a shard has vanished or changed its size since it was opened: reading a
        map of a file cut short would kill the process without a word (SIGBUS).
        """
        T = self.context_length
        out = np.empty((len(indices), T + 1), dtype=np.uint16)
        shard_of = np.searchsorted(self.first_window, indices, side="right") - 1
        for shard in np.unique(shard_of):
            path = self.paths[shard]
            if not path.exists() or os.path.getsize(path) != self.sizes[shard]:
                raise OSError(f"{path}: the shard was removed or changed during the run")
        for row, (shard, index) in enumerate(zip(shard_of, indices, strict=True)):
            start = (index - self.first_window[shard]) * T
            out[row] = self.shards[shard][start : start + T + 1]
        return out


def _open_shard(path: Path) -> np.ndarray:
    try:
        shard = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a whole .npy file ({error}); write it again") from error
    if not isinstance(shard, np.ndarray) or shard.dtype != np.uint16 or shard.ndim != 1:
        raise ValueError(f"{path}: not a 1-D uint16 array; shards come from dataset.py")
    return shard


@dataclass(frozen=True)
class Share:
    """What one rank takes of each step: micro-batches of B rows among ``world_size`` ranks."""

    windows_per_step: int
    micro_batch: int
    rank: int = 0
    world_size: int = 1

    def micro_steps(self) -> int:
        """Micro-batches of a step on each rank."""
        return self.windows_per_step // (self.micro_batch * self.world_size)

    def positions(self, step: int, micro_step: int) -> np.ndarray:
        """Positions in the stream of this rank's micro-batch, (B,) int64."""
        j = (micro_step * self.world_size + self.rank) * self.micro_batch
        return step * self.windows_per_step + j + np.arange(self.micro_batch)


class DataLoader:
    """Iterates over (inputs, targets), each (B, T) int64 on the device, from ``start_step`` on.

    A thread reads ahead into pinned memory, so the training loop waits for neither disk nor copy.
    Tokens travel as uint16, a quarter of int64's traffic. What goes wrong in the thread stands in
    ``error`` at once, up to three steps ahead of the ``next`` that raises it; ``close`` ends it.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        share: Share,
        device: torch.device,
        *,
        seed: int = 0,
        shuffle: bool = True,
        start_step: int = 0,
    ) -> None:
        self.dataset, self.share, self.device = dataset, share, device
        self.seed, self.shuffle, self.step = seed, shuffle, start_step
        self.error: Exception | None = None
        self.queue: queue.Queue[Tensor | Exception] = queue.Queue(3 * share.micro_steps())
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._read_ahead, name="data_loader", daemon=True)
        self.thread.start()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        item = self.queue.get()
        if isinstance(item, Exception):
            self.queue.put(item)  # for whoever asks again
            raise item
        # A copy from pinned memory: it is queued behind the running step and nothing waits for it.
        tokens = item.to(self.device, non_blocking=True).long()
        return tokens[:, :-1], tokens[:, 1:]

    def _batches(self) -> Iterator[np.ndarray]:
        n, step = len(self.dataset), self.step
        while True:
            for micro_step in range(self.share.micro_steps()):
                positions = self.share.positions(step, micro_step)
                yield self.dataset.windows(window_order(positions, n, self.seed, self.shuffle))
            step += 1

    def _read_ahead(self) -> None:
        try:
            if self.device.type == "cuda":  # a thread begins on GPU 0; pinning is not for that one
                torch.cuda.set_device(self.device)
            for batch in self._batches():
                tokens = torch.from_numpy(batch)
                self._put(tokens.pin_memory() if self.device.type == "cuda" else tokens)
                if self.closed.is_set():
                    return
        except Exception as error:  # handed to the training loop, which must hear of any
            self.error = error
            self._put(error)

    def _put(self, item: Tensor | Exception) -> None:
        while not self.closed.is_set():
            try:
                return self.queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def close(self) -> None:
        """Ends the thread."""
        self.closed.set()
        self.thread.join()
