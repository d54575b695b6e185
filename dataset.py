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
from typing import Annotated, NamedTuple

import numpy as np
import tiktoken
import tyro

from gptxs.cli import exit_with_one_line, first_line, number_problems, parse
from gptxs.files import lock_folder, sha256
from gptxs.memory import keep_freed_memory
from gptxs.shards import ShardIndex, read_header, save_shard
from gptxs.sources import (
    Continuation,
    Piece,
    has_columns,
    hub_files,
    is_on_hub,
    local_files,
    naming,
    open_files,
)
from gptxs.stdlib import stdlib_documents
from gptxs.tokenizer import DELIMITER, END_OF_TEXT, VOCAB_SIZE, encode_documents, get_tokenizer

# What shards are called; those of other sources are "text".
PREFIXES: dict[tuple[str, ...], str] = {("fineweb-edu",): "edufineweb", ("stdlib",): "stdlib"}
# Characters per call of the tokenizer: enough to hide the cost of a call, few enough to have
# hundreds of such batches in memory.
BATCH_CHARS = 1 << 18
SHARD_SIZE = 100_000_000
# Of the default run. Small shards hold a multiple of it, and the token that follows: whole windows.
CONTEXT_LENGTH = 512
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
        only = DatasetConfig(data_dir=self.data_dir, workers=self.workers, verify=True)
        if self.verify and self != only:
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
    for source, pin in zip(config.sources, pins, strict=True):
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
    if config.column != "text" and pieces and not any(has_columns(p.file) for p in pieces):
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
        joined = encode_documents(texts, tokenizer)
        parts = iter(np.split(joined, np.flatnonzero(joined == END_OF_TEXT)))
        empty = next(parts)  # what is before the first document
        for text in self.texts:
            skipped = 1 if isinstance(text, Continuation) else 0  # its <|endoftext|>
            self.tokens.append(next(parts)[skipped:] if text else empty)
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


class Position(NamedTuple):
    """A place in a source, which index.json has for the end of each shard."""

    piece: int
    row: int  # in the piece
    used: int  # tokens of that row that are in shards
    empty: int  # documents without text before it


def tokenize(pieces: list[Piece], start: Position, workers: int) -> Iterator[Batch]:
    """The batches of all rows from ``start`` on, in order, with their tokens."""
    # Threads and not processes: decompressing, the network and tiktoken all release Python's lock,
    # and the tokens need not be copied from one process to another.
    readers = ThreadPoolExecutor(2 * workers)
    tokenizer = readers.submit(get_tokenizer)  # while the others read
    thread = threading.local()

    def copy_tokenizer() -> None:
        # Threads need not wait for each other: an Encoding has one cache, which one thread uses.
        thread.tokenizer = copy.copy(tokenizer.result())

    encoders = ThreadPoolExecutor(workers, initializer=copy_tokenizer)
    # What is read ahead is bounded, however many cores there are.
    pieces_at_once = min(2 * workers, 64)
    batches_at_once = min(workers + 18, 40)  # of each of these pieces

    def encode(batch: Batch) -> Batch:
        batch.encode(thread.tokenizer)
        return batch

    def read_some(batches: Iterator[Batch]) -> list[Future[Batch]]:
        some = itertools.islice(batches, batches_at_once)
        return [encoders.submit(encode, batch) for batch in some]

    def open_piece(number: int) -> tuple[Iterator[Batch], Future[list[Future[Batch]]]]:
        first = start.row if number == start.piece else 0
        batches = read_batches(pieces[number], number, first)
        return batches, readers.submit(read_some, batches)

    numbers = iter(range(start.piece, len(pieces)))
    reading = deque(map(open_piece, itertools.islice(numbers, pieces_at_once)))
    try:
        tokenizer.result()  # its error, rather than that of a thread that could not begin
        while reading:
            batches, future = reading.popleft()
            while encoded := future.result():
                future = readers.submit(read_some, batches)  # while these are tokenized
                for batch in encoded:
                    yield batch.result()
            reading.extend(map(open_piece, itertools.islice(numbers, 1)))
    finally:
        # After an error, or when the caller has enough. Arrow's threads abort a process that ends
        # while they read, so wait for the readers, except after Ctrl-C.
        encoders.shutdown(wait=False, cancel_futures=True)
        is_interrupt = isinstance(sys.exception(), KeyboardInterrupt)
        readers.shutdown(wait=not is_interrupt, cancel_futures=True)


# ---- tokens -> shards ----------------------------------------------------------------------------


def cut(
    batches: Iterable[Batch], shard_size: int, max_tokens: int, position: Position
) -> Iterator[tuple[np.ndarray, Position]]:
    """The tokens (n,) uint16 of each shard, and the position in the source after them.

    ``position`` is where the batches begin. All shards have ``shard_size`` tokens but the last. At
    the end come no tokens, and the number of all empty documents.
    """
    parts: list[np.ndarray] = []
    filled = 0
    used, empty = position.used, position.empty
    rows = ((batch.piece, row) for batch in batches for row in enumerate(batch.tokens, batch.first))
    for piece, (row, tokens) in rows:
        empty += len(tokens) == 0
        while used < len(tokens) and max_tokens > 0:
            part = tokens[used : used + min(shard_size - filled, max_tokens)]
            parts.append(part)
            used += len(part)
            filled += len(part)
            max_tokens -= len(part)
            position = Position(piece, row, used, empty)
            if used == len(tokens):
                position = Position(piece, row + 1, 0, empty)
            if filled == shard_size:
                yield np.concatenate(parts), position
                parts, filled = [], 0
        used = 0
        if max_tokens == 0:
            break
    if parts:
        yield np.concatenate(parts), position
    yield np.empty(0, np.uint16), position._replace(empty=empty)


def choose_shard_size(tokens: int) -> int:
    """About a tenth of all tokens, in whole windows and the token that follows them."""
    windows = tokens // 10 // (2 * CONTEXT_LENGTH) * 2 * CONTEXT_LENGTH  # of 512 or of 1,024
    if windows > 0:
        return min(windows + 1, SHARD_SIZE)
    # One window in each, or half of the tokens where they are not enough for two windows.
    return max(1, min(CONTEXT_LENGTH + 1, tokens // 2))


def prepare(config: DatasetConfig) -> ShardIndex:
    """Write the shards that are missing in ``config.data_dir``; returns the content of index.json.

    Shard 0 is the validation split, all others are for training. Raises ValueError or
    FileNotFoundError for a source that cannot be used and for a folder begun with other options,
    ConnectionError for the network, OSError for the disk. Shards that are complete always stay, and
    the next call continues after them.
    """
    folder = config.data_dir
    lock = lock_folder(folder, flag="--data-dir")
    try:
        for left in folder.glob(".*.tmp"):  # by a process that was killed
            left.unlink()
        old = ShardIndex.read(folder)
        if old is None and any(folder.glob("*.npy")):
            raise ValueError(f"{folder} has shards but no index.json; give another --data-dir")
        if old and not old.shards:
            old = None  # nothing was written, and the user may have corrected the source since
        source = " --source ".join(map(shlex.quote, config.sources))
        for flag, default in (("name", None), ("split", None), ("column", "text")):
            if getattr(config, flag) != default:
                source += f" --{flag} {shlex.quote(getattr(config, flag))}"
        shard_size = config.shard_size or (old.shard_size if old else 0)
        index = ShardIndex(source, "", shard_size, config.max_tokens)
        if old:
            require_same(folder, old, index, ("source", "shard_size", "max_tokens"))
        index.revision, pieces, empty = open_source(config, old.revision if old else None)
        if old:
            require_same(folder, old, index, ("revision",))
            for record in old.shards:
                path = folder / record.file
                # From the first bad shard on all are written again, with the same bytes.
                if not path.exists() or path.stat().st_size != 128 + 2 * record.tokens:
                    break
                index.shards.append(record)
            if old.complete and index.shards == old.shards:
                return old
        write_shards(config, index, pieces, empty)
        return index
    finally:
        lock.release()


def require_same(folder: Path, old: ShardIndex, new: ShardIndex, names: tuple[str, ...]) -> None:
    """ValueError where the shards in a folder were begun with something else."""
    for name in names:
        was, now = getattr(old, name), getattr(new, name)
        if was != now:
            raise ValueError(
                f"{folder}: {name} was {was} and is now {now}; give another --data-dir, or"
                f" what the shards there were begun with (--source {old.source})"
            )


def write_shards(config: DatasetConfig, index: ShardIndex, pieces: list[Piece], empty: int) -> None:
    """Tokenize the pieces from where the index ends, write the shards, and record each."""
    folder = config.data_dir
    start = Position(*index.shards[-1].next) if index.shards else Position(0, 0, 0, empty)
    limit = index.max_tokens or sys.maxsize
    done = read = sum(record.tokens for record in index.shards)
    delimiters = 0

    def observe(batches: Iterable[Batch]) -> Iterator[Batch]:
        nonlocal read, delimiters
        for batch in batches:
            read += sum(map(len, batch.tokens))
            delimiters += batch.delimiters
            yield batch

    batches = observe(tokenize(pieces, start, config.workers) if done < limit else ())
    if index.shard_size == 0:
        first: list[Batch] = []
        for batch in batches:
            first.append(batch)
            if read >= min(limit, SHARD_SIZE):
                break
        begun = first[-1].piece + 1 if first else 1
        total = read * len(pieces) // begun  # pieces are of similar size
        if read >= SHARD_SIZE and begun in (1, len(pieces)):  # but this one is not read to its end
            files = filter(os.path.isfile, {piece.file for piece in pieces})
            total = max(total, sum(map(os.path.getsize, files)) // 5)  # bytes in a token
        index.shard_size = choose_shard_size(min(limit, total))
        batches = itertools.chain(first, batches)
        del first  # the chain lets go of it when it was read
    # Before any shard, so that there is never a shard without an index, which would be refused.
    index.write(folder)
    name = PREFIXES.get(config.sources, "text")
    for tokens, position in cut(batches, index.shard_size, limit - done, start):
        if len(tokens) > 0:
            split = "train" if index.shards else "val"
            path = folder / f"{name}_{split}_{len(index.shards):06d}.npy"
            index.shards.append(save_shard(path, tokens, list(position)))
            index.write(folder)
            done += len(tokens)
            of_source = f"piece {position.piece + 1:,} of {len(pieces):,}"
            print(f"{path.name}: {done:,} tokens, {of_source}", file=sys.stderr)
    if not index.shards:
        raise ValueError(f"--source {index.source} holds no text to tokenize; give another")
    index.complete = True
    index.tokens = done
    index.documents = sum(record.documents for record in index.shards)
    index.skipped = position.empty
    index.write(folder)
    if delimiters:
        print(f"{DELIMITER} is ordinary text in {delimiters:,} documents", file=sys.stderr)


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
    keep_freed_memory()
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
            print(f"{lost:.0%} fill no window of {CONTEXT_LENGTH} tokens; try another --shard-size")


if __name__ == "__main__":
    main()
