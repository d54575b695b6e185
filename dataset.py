"""Turn text into shards of GPT-2 tokens, the files that train.py reads.

    python dataset.py                                         FineWeb-Edu's 10B-token sample
    python dataset.py --source stdlib --data-dir data/python  Python's own manual, no network
    python dataset.py --source my_texts --data-dir data/mine  a file, or a folder of files
    python dataset.py --verify --data-dir data/mine           check every shard

A document travels through this file from top to bottom: a source is opened as pieces, threads read
their rows and turn them into tokens, these are cut into shards, each shard is saved and recorded.
The shards depend only on the source, --shard-size and --max-tokens: not on the number of workers,
or how often the run was killed. The same command again continues after the last shard.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
import shlex
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import tiktoken
import tyro

from gptxs.cli import exit_with_one_line, first_line, number_problems, parse
from gptxs.files import atomic_write, lock_folder, sha256
from gptxs.shards import ShardIndex, ShardRecord, read_header, shard_name
from gptxs.sources import (
    TEXT_SUFFIXES,
    Continuation,
    Piece,
    hub_files,
    is_on_hub,
    local_files,
    naming,
    open_files,
    stdlib_documents,
    suffix_of,
)
from gptxs.tokenizer import DELIMITER, END_OF_TEXT, VOCAB_SIZE, encode_documents, get_tokenizer

# What shards are called; those of other sources are "text".
PREFIXES: dict[tuple[str, ...], str] = {("fineweb-edu",): "edufineweb", ("stdlib",): "stdlib"}
# Of text, for one call of the tokenizer: enough to hide the cost of the call, and few enough to
# have hundreds of them in memory.
BATCH_CHARS = 1 << 18
SHARD_SIZE = 100_000_000
CONTEXT_LENGTH = 512  # of the default run: small shards are made to hold whole windows of it
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class DatasetConfig:
    """What to tokenize, and into which shards."""

    source: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """fineweb-edu (the default), stdlib (Python's own manual pages and docstrings), OWNER/NAME on
    the Hugging Face hub, or a file, folder or glob of Parquet, JSONL, JSON, CSV, TSV, Arrow or text
    files, compressed or not. A text file is one document, or several with <|endoftext|> between
    them. Several sources: give the flag several times."""
    name: str | None = None
    """Configuration of a hub's data set. FineWeb-Edu's default is sample-10BT; sample-100BT and
    sample-350BT are larger, and default is all, 1.3T tokens."""
    split: str | None = None
    """Split of a hub's data set. Default: train."""
    revision: str | None = None
    """Commit, branch or tag of a hub's data set. Default: the one in index.json, or the newest."""
    column: str = "text"
    """The column, or the key of JSON, that holds the documents."""
    data_dir: Path = Path("edu_fineweb10B")
    """The folder of the shards and their index.json."""
    shard_size: int | None = None
    """Tokens in a shard. Default: 100,000,000, or about a tenth of a small source."""
    max_tokens: int | None = None
    """Stop after this many tokens."""
    workers: int = CORES
    """Cores to tokenize on. Default: all that the process may use."""
    verify: bool = False
    """Write nothing, but check every shard in --data-dir and report the bad ones."""

    def validate(self) -> list[str]:
        """Every problem of these options, one message each."""
        problems = number_problems(self, at_least_one=("shard_size", "max_tokens", "workers"))
        if self.verify and (self.source or self.shard_size or self.max_tokens):
            problems.append("--verify checks what is in --data-dir; leave out the other flags")
        for flag in ("name", "split", "revision"):
            if getattr(self, flag) and not any(map(is_on_hub, self.sources)):
                problems.append(f"--{flag} is for data sets of the hub, and no --source is one")
        return problems

    @property
    def sources(self) -> tuple[str, ...]:
        return self.source or ("fineweb-edu",)  # not as the default, which tyro would append to


# ---- source -> pieces ----------------------------------------------------------------------------


def open_source(config: DatasetConfig, revision: str | None) -> tuple[str, list[Piece], int]:
    """What pins the content of all sources, their pieces, and the number of empty files.

    ``revision`` pinned it when the shards were begun: the hub's data may have changed since. Raises
    ValueError or FileNotFoundError for a source that cannot be used, ConnectionError when the hub
    cannot be reached.
    """
    revisions: list[str] = []
    pieces: list[Piece] = []
    empty = 0
    pins = revision.split("+") if revision else [None] * len(config.sources)
    for source, pin in zip(config.sources, pins, strict=False):
        if source == "stdlib":
            documents = stdlib_documents()
            pinned = hashlib.sha256(DELIMITER.join(documents).encode()).hexdigest()
            pieces.append(Piece(source, partial(iter, documents)))
        elif is_on_hub(source):
            pinned, files = hub_files(source, config.name, config.split, config.revision or pin)
            pieces += open_files(files, config.column)
        else:
            pinned, found = local_files(source)
            files = [str(file) for file in found if file.stat().st_size > 0]
            pieces += open_files(files, config.column)
            empty += len(found) - len(files)
        revisions.append(pinned)
    if config.column != "text" and all(suffix_of(p.file) in ("", *TEXT_SUFFIXES) for p in pieces):
        raise ValueError(f"--column {config.column}: this source has no columns")
    return "+".join(revisions), pieces, empty


# ---- rows -> tokens ------------------------------------------------------------------------------


@dataclass
class Batch:
    """Rows that follow each other in a piece: first their texts, then their tokens."""

    piece: int
    first: int  # row
    texts: list[str | None]
    tokens: list[np.ndarray]  # (n,) uint16 of each row; n is 0 where there is no text
    delimiters: int = 0  # documents in which <|endoftext|> is ordinary text

    def encode(self, tokenizer: tiktoken.Encoding) -> None:
        texts = [text for text in self.texts if text]
        joined = encode_documents(texts, tokenizer) if texts else np.empty(0, np.uint16)
        parts = iter(np.split(joined, np.flatnonzero(joined == END_OF_TEXT)))
        empty = next(parts)  # what is before the first document
        for text in self.texts:
            begin = isinstance(text, Continuation)  # without <|endoftext|>
            self.tokens.append(next(parts)[begin:] if text else empty)
        self.delimiters = sum(DELIMITER in text for text in texts)
        self.texts = []


def read_batches(piece: Piece, number: int, first: int) -> Iterator[Batch]:
    """A piece's rows from ``first`` on; the last batch may hold none."""
    texts: list[str | None] = []
    chars = 0
    with naming(piece.file):
        for text in itertools.islice(piece.rows(), first, None):
            texts.append(text)
            chars += len(text or "")
            if chars >= BATCH_CHARS:
                yield Batch(number, first, texts, [])
                first += len(texts)
                texts, chars = [], 0
    yield Batch(number, first, texts, [])


def tokenize(pieces: list[Piece], start: list[int], workers: int) -> Iterator[Batch]:
    """The batches of all rows from ``start`` (piece, row, ...) on, in order, with their tokens."""
    # Threads and not processes: decompressing, the network and tiktoken all release Python's lock,
    # and the tokens need not be copied from one process to another.
    readers = ThreadPoolExecutor(2 * workers)
    tokenizer = readers.submit(get_tokenizer)  # while the others read
    thread = threading.local()

    def begin_thread() -> None:
        # A copy for each thread: a regular expression has one fast cache, that of the first thread.
        thread.tokenizer = copy.copy(tokenizer.result())

    encoders = ThreadPoolExecutor(workers, initializer=begin_thread)

    def encode(batch: Batch) -> Batch:
        batch.encode(thread.tokenizer)
        return batch

    def read_some(batches: Iterator[Batch]) -> list[Future[Batch]]:
        some = itertools.islice(batches, workers + 8)
        return [encoders.submit(encode, batch) for batch in some]

    def begin(number: int) -> tuple[Iterator[Batch], Future[list[Future[Batch]]]]:
        first = start[1] if number == start[0] else 0
        batches = read_batches(pieces[number], number, first)
        return batches, readers.submit(read_some, batches)

    # In memory are some batches of each of these pieces.
    numbers = iter(range(start[0], len(pieces)))
    reading = deque(map(begin, itertools.islice(numbers, 2 * workers + 4)))
    try:
        tokenizer.result()  # its error, rather than that of a thread that could not begin
        while reading:
            batches, future = reading.popleft()
            while encoded := future.result():
                future = readers.submit(read_some, batches)  # while these are tokenized
                for batch in encoded:
                    yield batch.result()
            reading.extend(map(begin, itertools.islice(numbers, 1)))
    finally:
        # After an error, or when the caller has enough. Arrow's threads abort a process that ends
        # while they read, so a reader is waited for, but by nobody who has pressed Ctrl-C.
        encoders.shutdown(wait=False, cancel_futures=True)
        is_interrupt = isinstance(sys.exception(), KeyboardInterrupt)
        readers.shutdown(wait=not is_interrupt, cancel_futures=True)


# ---- tokens -> shards ----------------------------------------------------------------------------


def cut(
    batches: Iterable[Batch], shard_size: int, max_tokens: int, position: list[int]
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """The tokens (n,) uint16 of each shard, and the position in the source after them.

    A position is the piece, the row in it, how many tokens of that row are used, and the number of
    empty documents before it; ``position`` is where the batches begin. All shards have
    ``shard_size`` tokens but the last. At the end come no tokens, and all empty documents.
    """
    parts: list[np.ndarray] = []
    filled = 0
    *_, used, empty = position
    rows = ((batch.piece, row) for batch in batches for row in enumerate(batch.tokens, batch.first))
    for piece, (row, tokens) in rows:
        empty += len(tokens) == 0
        while used < len(tokens) and max_tokens > 0:
            parts.append(tokens[used : used + min(shard_size - filled, max_tokens)])
            used += len(parts[-1])
            filled += len(parts[-1])
            max_tokens -= len(parts[-1])
            position = [piece, row, used, empty]
            if used == len(tokens):
                position = [piece, row + 1, 0, empty]
            if filled == shard_size:
                yield np.concatenate(parts), position
                parts, filled = [], 0
        used = 0
        if max_tokens == 0:
            break
    if parts:
        yield np.concatenate(parts), position
    yield np.empty(0, np.uint16), [*position[:3], empty]


def choose_shard_size(tokens: int) -> int:
    """About a tenth of all tokens, in whole windows of 1,024 and the token that follows them."""
    if tokens >= 10 * SHARD_SIZE:
        return SHARD_SIZE
    if tokens >= 10 * 1025:
        return tokens // 10 // 1024 * 1024 + 1
    # One window in each, or half of the tokens where they are not enough for two windows.
    return max(1, min(CONTEXT_LENGTH + 1, tokens // 2))


def prepare(config: DatasetConfig) -> ShardIndex:
    """Write the shards that are missing in ``config.data_dir``; returns the content of index.json.

    Shard 0 is the validation split, all others are for training. Raises ValueError or
    FileNotFoundError for options or a source that cannot be used and for a folder begun with
    others, ConnectionError for the network, OSError for the disk. Shards that are complete always
    stay, and the next call continues after them.
    """
    if problems := config.validate():
        raise ValueError("; ".join(problems))
    folder = config.data_dir
    lock = lock_folder(folder, flag="--data-dir")
    try:
        old = ShardIndex.read(folder)
        if old is None and any(folder.glob("*.npy")):
            raise ValueError(f"{folder} has shards but no index.json; give another --data-dir")
        if old and not old.shards:
            old = None  # nothing was written, and the user may have corrected the source since
        revision, pieces, empty = open_source(config, old.revision if old else None)
        index = continue_index(config, old, revision)
        if not index.complete:
            write_shards(config, index, pieces, empty)
    finally:
        lock.release()
    return index


def continue_index(config: DatasetConfig, old: ShardIndex | None, revision: str) -> ShardIndex:
    """A new index with the shards of the old one; ValueError if that is of something else."""
    source = " --source ".join(map(shlex.quote, config.sources))
    for flag, default in (("name", None), ("split", None), ("column", "text")):
        if getattr(config, flag) != default:
            source += f" --{flag} {shlex.quote(getattr(config, flag))}"
    index = ShardIndex(source, revision, config.shard_size or 0, config.max_tokens)
    if old is None:
        return index
    index.shard_size = config.shard_size or old.shard_size
    for name in ("source", "revision", "shard_size", "max_tokens"):
        was, now = getattr(old, name), getattr(index, name)
        if was != now:
            raise ValueError(
                f"{config.data_dir}: {name} was {was} and is now {now}; give another --data-dir, or"
                f" what the shards there were begun with (--source {old.source})"
            )
    for record in old.shards:
        path = config.data_dir / record.file
        # From the first bad shard on all are written again, with the same bytes.
        if not path.exists() or path.stat().st_size != 128 + 2 * record.tokens:
            return index
        index.shards.append(record)
    return old if old.complete else index


def write_shards(config: DatasetConfig, index: ShardIndex, pieces: list[Piece], empty: int) -> None:
    """Tokenize the pieces from where the index ends, write the shards, and record each."""
    folder = config.data_dir
    start = index.shards[-1].next if index.shards else [0, 0, 0, empty]
    done = sum(record.tokens for record in index.shards)
    left = (index.max_tokens or sys.maxsize) - done
    seen = done
    total = delimiters = 0

    def observe(batches: Iterable[Batch]) -> Iterator[Batch]:
        nonlocal seen, total, delimiters
        for batch in batches:
            seen += sum(map(len, batch.tokens))
            # Pieces are of similar size, so the ones so far show how many tokens there will be.
            total = min(done + left, seen * len(pieces) // (batch.piece + 1))
            delimiters += batch.delimiters
            yield batch

    batches = observe(tokenize(pieces, start, config.workers) if left else ())
    if index.shard_size == 0:  # follows from what there is, not from the sizes of files
        first: list[Batch] = []
        for batch in batches:
            first.append(batch)
            if seen >= min(left, SHARD_SIZE):
                break
        index.shard_size = choose_shard_size(total)
        batches = itertools.chain(first, batches)
    # Before any shard, so that there is never a shard without an index, which would be refused.
    index.write(folder)
    name = PREFIXES.get(config.sources, "text")
    skipped = 0
    for tokens, position in cut(batches, index.shard_size, left, start):
        skipped = position[-1]
        if len(tokens) > 0:
            split = "train" if index.shards else "val"
            path = folder / shard_name(name, split, len(index.shards))
            index.shards.append(save_shard(path, tokens, position))
            index.write(folder)
            done += len(tokens)
            left -= len(tokens)
            print(f"{path.name}: {done:,} of about {total:,} tokens", file=sys.stderr)
    if not index.shards:
        raise ValueError(f"--source {index.source} holds no text to tokenize; give another")
    index.complete = True
    index.tokens = done
    index.documents = sum(record.documents for record in index.shards)
    index.skipped = skipped
    index.write(folder)
    if delimiters:
        print(f"{DELIMITER} is ordinary text in {delimiters:,} documents", file=sys.stderr)


def save_shard(path: Path, tokens: np.ndarray, position: list[int]) -> ShardRecord:
    """Write a shard's tokens (n,) uint16 as np.save does; ``position`` is where they end."""
    with atomic_write(path) as file:
        header = {"descr": "<u2", "fortran_order": False, "shape": tokens.shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(tokens.data)  # not np.save, whose errors lack the system's reason
    documents = int(np.count_nonzero(tokens == END_OF_TEXT))
    return ShardRecord(path.name, len(tokens), sha256(path), documents, position)


# ---- verifying -----------------------------------------------------------------------------------


def verify(folder: Path, workers: int = 1) -> list[str]:
    """A line for each problem with the shards in a folder; FileNotFoundError if it has none."""
    index = ShardIndex.read(folder)
    digests = {record.file: record.sha256 for record in index.shards} if index else {}
    names = sorted({*digests, *(path.name for path in folder.glob("*.npy"))})
    if not names:
        raise FileNotFoundError(f"no shards in {folder}: give the --data-dir of an earlier run")

    def check(name: str) -> str:
        path = folder / name
        try:
            highest = int(read_header(path).map_tokens().max(initial=0))
        except (OSError, ValueError) as error:
            return f"{path}: {first_line(error)}"
        if index and name not in digests:
            return f"{path} is not in index.json"
        if index and digests[name] != sha256(path):
            return f"{path} has changed: its SHA-256 is not the one in index.json"
        if highest >= VOCAB_SIZE:
            return f"{path} has the token {highest}; GPT-2's last one is {END_OF_TEXT}"
        return ""

    with ThreadPoolExecutor(workers) as pool:
        problems = [problem for problem in pool.map(check, names) if problem]
    if index and not index.complete:
        problems.append(f"{folder} is not finished: repeat the command that began it")
    return problems


def main() -> None:
    """Exit code 2 for a mistake in options or source, 1 for network, disk, or a bad shard."""
    start = time.perf_counter()
    with exit_with_one_line(remedy="run the same command again to continue"):
        config = parse(DatasetConfig, description=__doc__)
        if problems := config.validate():
            raise ValueError("; ".join(problems))
        if config.verify:
            problems = verify(config.data_dir, config.workers)
            print("\n".join(problems) or f"{config.data_dir}: every shard is valid")
            sys.exit(1 if problems else 0)
        index = prepare(config)
        print(
            f"{config.data_dir}: {index.tokens:,} tokens of {index.documents:,} documents in"
            f" {len(index.shards)} shards, {index.skipped:,} empty ones skipped,"
            f" {time.perf_counter() - start:.1f} s"
        )
        windows = sum((record.tokens - 1) // CONTEXT_LENGTH for record in index.shards)
        lost = 1 - windows * CONTEXT_LENGTH / (index.tokens or 1)
        if lost > 0.05:
            print(
                f"{lost:.0%} of them are in no window of {CONTEXT_LENGTH} tokens, but at the end of"
                " a shard: another --shard-size may leave out less"
            )


if __name__ == "__main__":
    main()
