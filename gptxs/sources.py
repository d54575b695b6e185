"""Sources of text as pieces that threads read row by row: files, and data sets of the hub.

`datasets` streams JSON, CSV and Arrow files and all formats of the hub. Two things are read without
it: text files, of which it would hold a line in memory (a book, or a corpus, may be one line) and
change the line ends; and local Parquet, since `datasets` takes a second or two to start.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import itertools
import os
import re
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gptxs.cli import first_line
from gptxs.files import decode_text
from gptxs.tokenizer import DELIMITER

TEXT_SUFFIXES = (".txt", ".text", ".md")
SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".arrow", *TEXT_SUFFIXES)
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
ARROW_METADATA = ("dataset_info.json", "dataset_dict.json", "state.json")  # of `save_to_disk`
FILES_AT_ONCE = 64  # in a stream of `datasets`, which goes through this list for each of them
ROWS_AT_ONCE = 256
BLOCK_BYTES = 1 << 18  # of a text file; another number would move the rows of shards that are begun
# The head of a document longer than a block: some text, up to the last space or newline before a
# character that is neither whitespace nor "<", with which a separator may begin. GPT-2's pattern
# splits any text there, so that no token changes.
HEAD = re.compile(r"\s*\S.*(?=[ \n][^\s<])", re.DOTALL)


class Continuation(str):
    """A row that continues the document of the row before."""


@dataclass(frozen=True)
class Piece:
    """A part of a source that one thread reads by itself.

    A row is a document, a Continuation, or None or "" where there is no text.
    """

    file: str
    rows: Callable[[], Iterable[str | None]]


# ---- where the files are -------------------------------------------------------------------------


def suffix_of(file: str) -> str:
    """What tells a file's format: ".jsonl" for `A.JSONL.GZ`; "" for one that is not read."""
    stem, suffix = os.path.splitext(file.lower())
    if suffix in COMPRESSIONS and not stem.endswith((".parquet", ".arrow")):
        suffix = os.path.splitext(stem)[1]
    return suffix if suffix in SUFFIXES else ""


def has_columns(file: str) -> bool:
    return suffix_of(file) not in ("", *TEXT_SUFFIXES)


def is_on_hub(source: str) -> bool:
    """Whether it is a data set of the hub rather than a path."""
    is_path = os.path.exists(os.path.expanduser(source)) or suffix_of(source)
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None
    return source == "fineweb-edu" or (is_id and not is_path)


def hub_files(
    source: str, name: str | None, split: str | None, revision: str | None
) -> tuple[str, list[str]]:
    """The commit of a hub's data set, and its files in order.

    Raises ConnectionError when the hub cannot be reached, ValueError or FileNotFoundError for what
    it does not have.
    """
    from gptxs.hub import require_hub  # here, since huggingface_hub takes a moment

    require_hub()
    if source == "fineweb-edu":
        source, name = "HuggingFaceFW/fineweb-edu", name or "sample-10BT"
    builder = _import_datasets().load_dataset_builder(source, name, revision=revision)
    splits = {str(key): files for key, files in (builder.config.data_files or {}).items()}
    files = [str(file) for file in splits.get(split or "train", [])]
    if not files or not all(map(suffix_of, files)):
        raise ValueError(f"--source {source}: no files that are read; --split is {[*splits]}")
    return files[0].split("@")[1].split("/")[0], files  # hf://datasets/OWNER/NAME@COMMIT/FILE


def local_files(source: str) -> tuple[str, list[Path]]:
    """SHA-256 of the names and sizes of a path's, folder's or glob's files, and these in order.

    A line says which files are left out. Raises ValueError for none at all.
    """
    path = Path(source).expanduser()
    names = [str(path)] if path.exists() else sorted(glob.glob(str(path), recursive=True))
    roots = [Path(name) for name in names]
    found = [file for root in roots for file in (_walk(root) if root.is_dir() else [root])]
    found = [file for file in dict.fromkeys(found) if file.name not in ARROW_METADATA]
    files = [file for file in found if suffix_of(file.name)]
    left_out = Counter(f.suffix or f.name for f in found) - Counter(f.suffix for f in files)
    if left_out:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(left_out.items()))
        print(f"{source}: files and linked folders not read: {kinds}", file=sys.stderr)
    if not files:
        problem = f"no file ends in {', '.join(SUFFIXES)}" if roots else "no such file or folder"
        known = "fineweb-edu, stdlib, OWNER/NAME of the hub or a path"
        raise ValueError(f"--source {source}: {problem}; give {known}")
    digest = hashlib.sha256()
    for file in files:
        try:
            name = os.path.relpath(file, path if path.is_dir() else path.parent).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{os.fsencode(file)!r}: the name is not UTF-8; rename it") from None
        digest.update(name + f"\0{file.stat().st_size}\0".encode())
    return digest.hexdigest(), files


def _walk(folder: Path) -> list[Path]:
    """The files below a folder except hidden ones, in order. Links to folders are not followed."""
    files: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name[0] != ".":
            is_link = path.is_symlink()  # could lead in a circle
            files += _walk(path) if path.is_dir() and not is_link else [path]
    return files


# ---- files as pieces -----------------------------------------------------------------------------


def open_files(files: list[str], column: str) -> list[Piece]:
    """The pieces of files: a row group of Parquet, and of other formats a file."""
    pieces: list[Piece] = []
    for suffix, of_one_format in itertools.groupby(files, suffix_of):
        group = list(of_one_format)
        if suffix in TEXT_SUFFIXES:
            pieces += [Piece(file, partial(read_text, file)) for file in group]
        elif suffix == ".parquet" and not group[0].startswith("hf://"):
            for file in group:
                pieces += _open_parquet(file, column)
        else:
            for start in range(0, len(group), FILES_AT_ONCE):
                pieces += _open_streams(group[start : start + FILES_AT_ONCE], suffix, column)
    return pieces


def _import_datasets() -> Any:
    import datasets
    from tqdm import tqdm

    # It would import torch, which takes seconds, and log as errors what we turn into a line.
    datasets.config.TORCH_AVAILABLE = False
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    tqdm.set_lock(threading.RLock())  # its own starts a process, of which Ctrl-C leaves a warning
    warnings.filterwarnings("error", message="Length of header")  # pandas would cut texts off
    return datasets


def _open_streams(files: list[str], suffix: str, column: str) -> list[Piece]:
    """Files of one format, streamed by `datasets`."""
    kind = {".jsonl": "json", ".tsv": "csv"}.get(suffix, suffix[1:])
    options: dict[str, Any] = {}
    if kind == "csv":  # every text as it is: neither a number nor, for "NA" or "", nothing
        options = {"converters": {column: str}, "keep_default_na": False, "index_col": False}
        options["sep"] = "\t" if suffix == ".tsv" else ","
    data_files = {"train": [glob.escape(file) for file in files]}
    with naming(files[0]):  # whose beginning is read here
        builder = _import_datasets().load_dataset_builder(kind, data_files=data_files, **options)
        stream = builder.as_streaming_dataset(split="train")
        if kind == "parquet":
            _require_column(column, stream.column_names)  # here, since no others are read
            builder.config.columns = [column]
            builder.config.batch_size = ROWS_AT_ONCE  # or it holds row groups, of up to 1M rows
    # No cast to the columns of the first file: in JSON they differ from file to file.
    builder.info.features = stream.info.features = None

    def read(parts: Any, index: int) -> Iterator[str | None]:
        part = parts.shard(parts.num_shards, index).with_format("arrow")
        for table in part.iter(ROWS_AT_ONCE):
            yield from _texts(table, column)

    def split_file(number: int) -> list[Piece]:
        with naming(files[number]):
            parts = stream.shard(len(files), number).reshard()
        return [Piece(files[number], partial(read, parts, i)) for i in range(parts.num_shards)]

    with ThreadPoolExecutor(16) as pool:  # a hub takes long for each file's list of row groups
        return [piece for part in pool.map(split_file, range(len(files))) for piece in part]


def _open_parquet(file: str, column: str) -> list[Piece]:
    """The row groups of a local Parquet file, read by pyarrow."""
    import pyarrow.parquet as pq

    with naming(file):
        metadata = pq.read_metadata(file)

    def read(group: int) -> Iterator[str | None]:
        with pq.ParquetFile(file, metadata=metadata) as opened:
            _require_column(column, opened.schema_arrow.names)
            for batch in opened.iter_batches(ROWS_AT_ONCE, [group], [column]):
                yield from _texts(batch, column)

    return [Piece(file, partial(read, group)) for group in range(metadata.num_row_groups)]


def _require_column(column: str, names: list[str]) -> None:
    if column not in names:
        raise ValueError(f"no column `{column}`; give --column one of: {', '.join(names)}")


def _texts(table: Any, column: str) -> list[str | None]:
    """The texts of an Arrow table's column; ValueError where it has none."""
    _require_column(column, table.schema.names)
    held = str(table[column].type).removeprefix("dictionary<values=")
    if not held.startswith(("string", "large_string", "null")):
        raise ValueError(f"column `{column}` holds {held} and not text; give another --column")
    return table[column].to_pylist()


def read_text(file: str) -> Iterator[str | None]:
    """The documents of a text file, which <|endoftext|> separates, in the memory of a block.

    Text in which nothing can be cut, such as Chinese in one line, is held until its end.
    """
    import fsspec  # takes 50 ms

    decoder = codecs.getincrementaldecoder("utf-8")()
    row_type: type[str] = str
    rest = ""
    with fsspec.open(file, "rb", compression="infer") as opened:
        for number in itertools.count():
            # Twice as much each time that nothing could be cut: the time is linear in such text.
            block = opened.read(max(BLOCK_BYTES, len(rest)))
            text = decoder.decode(block, final=not block)
            if number == 0:  # drops the mark, and refuses UTF-16 with zeros, which are valid UTF-8
                text = decode_text(text.encode(), "this file")
            *documents, rest = (rest + text).split(DELIMITER)
            for document in documents:
                yield row_type(document) if document.strip() else None
                row_type = str
            if not block:
                break
            if len(rest) > BLOCK_BYTES and (head := HEAD.match(rest)):
                yield row_type(head[0])
                row_type = Continuation
                rest = rest[head.end() :]
    yield row_type(rest) if rest.strip() else None


@contextmanager
def naming(file: str) -> Iterator[None]:
    """Give an error the name of the file, and another reason where its encoding is to blame."""
    try:
        yield
    except Exception as error:  # a damaged file raises any class of Python's, pyarrow's, pandas'
        is_systems = isinstance(error, OSError) and error.errno is not None
        if is_systems or (file.startswith("hf://") and not isinstance(error, ValueError)):
            raise
        reason = first_line(error)
        cause = error if isinstance(error, UnicodeDecodeError) else error.__context__
        if isinstance(cause, UnicodeDecodeError) and suffix_of(file) not in (".parquet", ".arrow"):
            try:
                decode_text(cause.object, "this file")
            except ValueError as encoding:
                reason = str(encoding)
        raise ValueError(f"{file}: {reason}") from error
