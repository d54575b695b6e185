"""Shards of tokens: their names and headers, a digest of each, and the index that lists them."""

from __future__ import annotations

import hashlib
import json
import mmap
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from gptxs.files import atomic_write, sha256
from gptxs.tokenizer import END_OF_TEXT

# The header of llm.c's and modded-nanogpt's .bin: 256 int32, the third is the number of tokens.
BIN_MAGIC_AND_VERSION = [20240520, 1]
DIGEST_BLOCKS = 16  # of 8 KiB, so that 100 shards take a moment
DIGEST_TOKENS = 4096


@dataclass(frozen=True)
class Shard:
    """A file of uint16 tokens, little-endian, behind a header."""

    path: Path
    tokens: int
    header_bytes: int

    def map_tokens(self) -> np.ndarray:
        """(tokens,) uint16, read from the disk when used; the file is open while the array is."""
        with self.path.open("rb") as file:  # a third of np.memmap's time
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(content, dtype="<u2", count=self.tokens, offset=self.header_bytes)


def read_header(path: Path) -> Shard:
    """Read a shard's header, not its tokens; ValueError, naming the file, for a damaged one."""
    file_bytes = path.stat().st_size
    tokens, header_bytes = file_bytes // 2, 0  # nanoGPT's .bin and datatrove's .ds have no header
    if path.suffix == ".npy":
        try:
            array = np.lib.format.open_memmap(path, mode="r")
        except Exception as error:  # NumPy parses the header as Python, which raises a dozen kinds
            raise ValueError(f"{path} is not a valid .npy file, or damaged: {error}") from error
        if array.dtype != np.dtype("<u2") or array.ndim != 1:
            raise ValueError(f"{path} holds {array.dtype} {array.shape}, not uint16 (tokens,)")
        tokens, header_bytes = array.size, array.offset
    elif np.fromfile(path, "<i4", count=2).tolist() == BIN_MAGIC_AND_VERSION:
        tokens, header_bytes = int(np.fromfile(path, "<i4", count=3)[-1]), 256 * 4
    if file_bytes != header_bytes + 2 * tokens:
        raise ValueError(f"{path} is damaged: {file_bytes} bytes for {tokens} tokens")
    return Shard(path, tokens, header_bytes)


def digest(shard: Shard) -> str:
    """SHA-256 of blocks all over the shard, its beginning and end included, in hexadecimal."""
    tokens = shard.map_tokens()
    last = max(0, len(tokens) - DIGEST_TOKENS)
    starts = np.linspace(0, last, num=DIGEST_BLOCKS, dtype=np.int64)
    blocks = [tokens[start : start + DIGEST_TOKENS].tobytes() for start in starts]
    return hashlib.sha256(b"".join(blocks)).hexdigest()


@dataclass
class ShardRecord:
    """A shard in index.json; the fields are its keys there."""

    file: str
    tokens: int
    sha256: str  # of the file with its header, as ``sha256sum`` computes it
    documents: int  # that begin in this shard
    next: list[int]  # where dataset.py continues after this shard


def save_shard(path: Path, tokens: np.ndarray, following: list[int]) -> ShardRecord:
    """Write tokens (n,) uint16 as np.save does; ``following`` is the record's ``next``."""
    with atomic_write(path) as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(tokens))
        file.write(tokens.data)  # not np.save, whose errors lack the system's reason
    documents = int(np.count_nonzero(tokens == END_OF_TEXT))
    return ShardRecord(path.name, len(tokens), sha256(path), documents, following)


@dataclass
class ShardIndex:
    """The content of index.json; the fields are its keys there."""

    source: str  # as dataset.py's flag takes it, with the flags that belong to it
    revision: str
    shard_size: int
    max_tokens: int | None
    complete: bool = False
    shards: list[ShardRecord] = field(default_factory=list)
    tokens: int | None = None  # in all, as the next two, once it is complete
    documents: int | None = None
    skipped: int | None = None  # documents without text

    @classmethod
    def read(cls, folder: Path) -> ShardIndex | None:
        """A folder's index, or None if it has none; ValueError, naming it, if it is damaged."""
        path = folder / "index.json"
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_bytes())
            records = [ShardRecord(**record) for record in content.pop("shards")]
            return cls(**content, shards=records)
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a valid index: {error}") from error

    def write(self, folder: Path) -> None:
        with atomic_write(folder / "index.json") as file:
            file.write(json.dumps(asdict(self), indent=1).encode())


def check_complete(folder: Path) -> None:
    """Raise ValueError, with the command that finishes it, for a folder that is not finished."""
    index = ShardIndex.read(folder)
    if index and not (index.complete and all((folder / s.file).exists() for s in index.shards)):
        size = f"--shard-size {index.shard_size}"
        size += f" --max-tokens {index.max_tokens}" if index.max_tokens else ""
        command = f"python dataset.py --source {index.source} --data-dir {folder} {size}"
        raise ValueError(f"{folder} is not finished; finish it with `{command}`")


def find_shards(folder: Path, split: str) -> list[Shard]:
    """The shards of a split in the order of their names; where index.json is, those it lists.

    Raises FileNotFoundError for none, ValueError for a damaged one and for several data sets.
    """
    index = ShardIndex.read(folder)
    # The split is the last part of a name but for numbers. A copy "x_train_000001 (1).npy" does not
    # match, nor macOS's "._x_train_000001.npy", nor a name that leads out of the folder.
    ending = r"_\d{6}\.npy|(_\d{6})?\.bin|(_\d+)*(_\w*shuffled)?\.ds"
    name = rf"(?:\d{{3}}_)?([^./\\][^/\\]*_)?{split}({ending})"
    files = [s.file for s in index.shards] if index else [path.name for path in folder.glob("*")]
    found = [match for file in sorted(files) if (match := re.fullmatch(name, file))]
    if not found:
        command = f"`python dataset.py --data-dir {folder}`"
        raise FileNotFoundError(f"{folder} has no {split} shards; write them with {command}")
    kinds = sorted({(match[1] or "") + re.sub(r"(_\d+)+", "*", match[2]) for match in found})
    if len(kinds) > 1:
        raise ValueError(f"{folder}: shards of several data sets ({', '.join(kinds)})")
    shards = [read_header(folder / match[0]) for match in found]
    return [shard for shard in shards if shard.tokens]  # datatrove leaves empty files too
