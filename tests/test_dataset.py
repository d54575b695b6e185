"""dataset.py: the shards are the documents' tokens, whatever the source and the workers."""

import bz2
import contextlib
import io
import itertools
import json
import lzma
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import dataset
from dataset import DatasetConfig, choose_shard_size, prepare, verify
from gptxs import sources
from gptxs.sources import Piece, read_text
from gptxs.tokenizer import DELIMITER, END_OF_TEXT, get_tokenizer

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
TEXTS = [f"Document {i}. " + "The quick brown fox jumps. " * (i % 7) for i in range(100)]
ORDINARY = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def jsonl(texts: Sequence[str | None], **others: Any) -> bytes:
    return b"".join(json.dumps({"text": text, **others}).encode() + b"\n" for text in texts)


def parquet(documents: Any, column: str = "text", rows: int = 10) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"id": [0] * len(documents), column: documents}), file, rows)
    return file.getvalue()


def write(path: Path, texts: Sequence[str | None], rows: int = 10) -> Path:
    """A JSONL or text file, or a Parquet file with row groups of ``rows`` documents."""
    if path.suffix == ".parquet":
        path.write_bytes(parquet(pa.array(texts, pa.string()), rows=rows))
    elif path.suffix == ".txt":
        path.write_text(DELIMITER.join(text or "" for text in texts))
    else:
        path.write_bytes(jsonl(texts))
    return path


def config_for(source: Path | str, folder: Path, shard_size: int | None = 100) -> DatasetConfig:
    return DatasetConfig((str(source),), data_dir=folder, shard_size=shard_size, workers=2)


def shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.npy"), key=lambda path: path.stem[-6:])


def all_tokens(folder: Path) -> np.ndarray:
    return np.concatenate([np.load(path) for path in shard_paths(folder)])


def read_files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the lock."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def expected(texts: Sequence[str]) -> np.ndarray:
    encode = get_tokenizer().encode_ordinary
    return np.array([token for text in texts for token in (END_OF_TEXT, *encode(text))], np.uint16)


def fail_after(writes: int) -> Any:
    """Lets that many files reach the disk and then no more, as a full disk would."""
    successes = [None] * (2 * writes)  # the file, and its name in the folder
    failures = itertools.repeat(OSError(28, "No space left on device"))
    return mock.patch("os.fsync", side_effect=itertools.chain(successes, failures))


def main(*arguments: object) -> None:
    """`python dataset.py ARGUMENTS` inside this process."""
    with mock.patch.object(sys, "argv", ["dataset.py", *map(str, arguments)]):
        dataset.main()


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: Patch) -> None:
    """Nothing here has to survive a power cut, and waiting for the disk takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def prepared(tmp_path: Path) -> DatasetConfig:
    """TEXTS in shards of 100 tokens."""
    config = config_for(write(tmp_path / "a.jsonl", TEXTS), tmp_path / "out")
    prepare(config)
    return config


@ORDINARY
@given(
    files=st.lists(st.lists(st.none() | st.text(max_size=30), max_size=8), min_size=1, max_size=3),
    suffix=st.sampled_from([".parquet", ".jsonl"]),
    config=st.builds(
        DatasetConfig,
        shard_size=st.integers(1, 60),
        max_tokens=st.none() | st.integers(1, 100),
        workers=st.integers(1, 4),
    ),
    batch_chars=st.sampled_from([1, 20, 1000]),
    interruptions=st.lists(st.integers(1, 6), max_size=2),
)
def test_shards_are_the_concatenated_documents_cut_at_multiples_of_their_size(
    files: list[list[str | None]],
    suffix: str,
    config: DatasetConfig,
    batch_chars: int,
    interruptions: list[int],
    monkeypatch: Patch,
) -> None:
    monkeypatch.setattr(dataset, "BATCH_CHARS", batch_chars)
    with tempfile.TemporaryDirectory() as temporary:
        source, out = Path(temporary, "source"), Path(temporary, "out")
        source.mkdir()
        for i, texts in enumerate(files):
            write(source / f"{i:03d}{suffix}", texts, rows=2)
        config = replace(config, source=(str(source),), data_dir=out)
        documents = [text for texts in files for text in texts if text]
        if not documents:
            with pytest.raises(ValueError, match="holds no text"):
                prepare(config)
            return
        for writes in interruptions:
            with fail_after(writes), contextlib.suppress(OSError):
                prepare(config)
        index = prepare(config)
        tokens = expected(documents)[: config.max_tokens]
        assert [shard.file for shard in index.shards] == [path.name for path in shard_paths(out)]
        for number, shard in enumerate(index.shards):
            assert shard.file == f"text_{'train' if number else 'val'}_{number:06d}.npy"
            saved = io.BytesIO()
            np.save(saved, tokens[number * index.shard_size :][: index.shard_size])
            assert (out / shard.file).read_bytes() == saved.getvalue()
        if config.max_tokens is None:
            empty_files = files.count([]) if suffix == ".jsonl" else 0
            assert index.documents == len(documents)
            assert index.skipped == sum(map(len, files)) - len(documents) + empty_files
        assert verify(out) == []
        # One that nothing disturbed, with other threads and batches, is the same to the byte.
        before = read_files(out)
        monkeypatch.setattr(dataset, "BATCH_CHARS", 50)
        prepare(replace(config, data_dir=Path(temporary, "again"), workers=1))
        assert read_files(Path(temporary, "again")) == before
        prepare(config)
        assert read_files(out) == before


@ORDINARY
@given(
    text=st.lists(st.sampled_from([*" \n\r\t'<sa1!é中", "\x1c", "  ", DELIMITER]), max_size=60),
    block=st.integers(1, 25),
    batch_chars=st.sampled_from([1, 1000]),
)
@example(text=[" ", " ", DELIMITER, "a"], block=1, batch_chars=1000)
@example(text=[*"a sa 1 a"], block=1, batch_chars=1)
@example(text=["'", " ", " ", DELIMITER], block=1, batch_chars=1000)
def test_a_text_file_is_the_documents_between_its_separators_whatever_the_block(
    text: list[str], block: int, batch_chars: int, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", block)
    monkeypatch.setattr(dataset, "BATCH_CHARS", batch_chars)
    documents = [part for part in "".join(text).split(DELIMITER) if part.strip()]
    assume(documents)
    with tempfile.TemporaryDirectory() as temporary:
        path, out = Path(temporary, "a.txt"), Path(temporary, "out")
        path.write_bytes("".join(text).encode())
        prepare(config_for(path, out))
        assert np.array_equal(all_tokens(out), expected(documents))


def test_the_embedded_corpus_is_the_same_each_time_and_a_fair_mix(tmp_path: Path) -> None:
    config = config_for("stdlib", tmp_path / "a", shard_size=50_000)
    index = prepare(config)
    assert index == prepare(replace(config, data_dir=tmp_path / "b", workers=1))
    tokens = all_tokens(tmp_path / "a")
    assert 300_000 < len(tokens) < 3_000_000
    assert index.shards[0].file == "stdlib_val_000000.npy"
    # Manual pages are in reStructuredText with a title underlined by stars, docstrings are not.
    decode = get_tokenizer().decode
    assert all(decode(q.tolist()).count("\n****") >= 5 for q in np.array_split(tokens, 4))


# Texts that a reader may change: a number, what pandas takes for nothing, quotes, line ends.
HARD = ["007", "NA", "null", "2024-01-01", " x ", "na\xefve", 'a "text",\r\nof two\tlines', "中"]
LINES = jsonl(HARD, other=1)
CELLS = ['"' + text.replace('"', '""') + '"' for text in HARD]
STREAM = io.BytesIO()
with pa.ipc.new_stream(STREAM, pa.schema({"text": pa.string()})) as writer:
    writer.write_table(pa.table({"text": HARD}))
TEXT = DELIMITER.join([*HARD, "\n"]).encode()
SAME_TEXTS: dict[str, bytes] = {
    "A [1]#B.JSONL": LINES,
    "lines.json": LINES.replace(b"\n", b"\r\n"),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES,
    "array.json": json.dumps([{"text": text, "other": [1]} for text in HARD], indent=1).encode(),
    "other keys.jsonl": jsonl(HARD[:3]) + jsonl(HARD[3:], other="x", more={"y": [1]}),
    "bom.csv": ("\ufefftext,other\n" + "".join(f"{cell},1\n" for cell in CELLS)).encode(),
    "a.tsv": ("other\ttext\n" + "".join(f"x\t{cell}\n" for cell in CELLS)).encode(),
    "a.arrow": STREAM.getvalue(),
    "a.parquet": parquet(HARD),
    "large.parquet": parquet(pa.array(HARD, pa.large_string())),
    "view.parquet": parquet(pa.array(HARD, pa.string_view())),
    "dictionary.parquet": parquet(pa.array(HARD).dictionary_encode()),
    "a.json.gz": pa.compress(LINES, "gzip", asbytes=True),
    "a.jsonl.bz2": bz2.compress(LINES),
    "a.jsonl.xz": lzma.compress(LINES),
    "bom.md": b"\xef\xbb\xbf" + TEXT,
    "a.txt.zst": pa.compress(TEXT, "zstd", asbytes=True),
    "a.jsonl.zst": pa.compress(LINES, "zstd", asbytes=True),
}


@pytest.mark.parametrize("name", SAME_TEXTS)
def test_every_format_gives_the_texts_as_they_are(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(SAME_TEXTS[name])
    prepare(config_for(tmp_path / name, tmp_path / "out", shard_size=7))
    assert np.array_equal(all_tokens(tmp_path / "out"), expected(HARD))


def test_sources_and_their_files_are_read_in_order_and_what_is_not_is_said(
    tmp_path: Path, capsys: Capture
) -> None:
    import datasets

    source, elsewhere, out = tmp_path / "source", tmp_path / "elsewhere", tmp_path / "out"
    for folder in ("b", ".ipynb_checkpoints", ".venv"):
        (source / folder).mkdir(parents=True)
        (source / folder / "x.txt").write_text("third" if folder == "b" else "hidden")
    elsewhere.mkdir()
    (elsewhere / "x.txt").write_text("fifth")
    (elsewhere / "back").symlink_to(source)  # two folders that link to each other
    (source / "c").symlink_to(elsewhere)
    (source / "d.txt").symlink_to(elsewhere / "x.txt")
    (source / ".e").symlink_to(source)
    (tmp_path / "link").symlink_to(source)
    write(source / "a2.parquet", ["second"])
    (source / "a1.txt").write_bytes(b"first:\r\nas it is\n")
    (source / "a3.txt").write_bytes(b"")
    (source / "a4.jsonl").write_bytes(b"")
    datasets.Dataset.from_dict({"text": ["fourth"]}).save_to_disk(source / "b2")
    for name in (".hidden.txt", "x.pdf", "y.pdf", "z.py"):
        (source / name).write_text("not read")
    (tmp_path / "glob/a/b").mkdir(parents=True)
    for name in ("z", "glob/y", "glob/a/b/x"):
        write(tmp_path / f"{name}.jsonl", [f"{name[-1]}{DELIMITER}"])
    names = ["link", "z.jsonl", "glob/**"]  # which finds x as a file and in a folder
    flags = [word for name in names for word in ("--source", tmp_path / name)]
    main(*flags, "--data-dir", out, "--shard-size", 2)
    texts = ["first:\r\nas it is\n", "second", "third", "fourth", "fifth"]
    texts += [f"{name}{DELIMITER}" for name in "zxy"]
    assert np.array_equal(all_tokens(out), expected(texts))
    output, errors = capsys.readouterr()
    assert "2 empty ones skipped" in output
    assert "--shard-size" in output  # no window of 512 is left
    not_read, *of_shards, last = errors.splitlines()
    assert all(part in not_read for part in ("2 .pdf", "1 .py", "1 c"))
    assert ".txt" not in not_read
    assert [line.split(":")[0] for line in of_shards] == [path.name for path in shard_paths(out)]
    assert f"{DELIMITER} is ordinary text in 3 documents" in last


@pytest.mark.parametrize(("workers", "limit"), [(2, 300), (60, 3000)])
def test_of_large_files_only_some_batches_are_in_memory(
    workers: int, limit: int, tmp_path: Path, monkeypatch: Patch
) -> None:
    read = 0

    def rows(pause: float) -> Iterator[str]:
        nonlocal read
        time.sleep(pause)
        while True:
            read += 1
            yield "word " * 20

    monkeypatch.setattr(dataset, "BATCH_CHARS", 100)  # a row
    # Until the first comes, all others are read as far as they will be.
    pieces = [Piece("late", lambda: rows(1)), *[Piece("endless", lambda: rows(0))] * 1000]
    monkeypatch.setattr(dataset, "open_source", lambda *_: ("", pieces, 0))
    prepare(replace(config_for("stdlib", tmp_path), max_tokens=1000, workers=workers))
    assert read < limit


def test_resuming_does_not_tokenize_again_what_is_in_shards(prepared: DatasetConfig) -> None:
    before = read_files(prepared.data_dir)
    shard_paths(prepared.data_dir)[-1].unlink()
    with mock.patch.object(dataset, "encode_documents", wraps=dataset.encode_documents) as encode:
        prepare(prepared)
    assert sum(len(text) for call in encode.call_args_list for text in call.args[0]) < 1000
    assert read_files(prepared.data_dir) == before
    # A missing shard, or one that was cut, is written again.
    (prepared.data_dir / "text_train_000005.npy").unlink()
    (prepared.data_dir / "text_train_000002.npy").write_bytes(b"short")
    prepare(prepared)
    assert read_files(prepared.data_dir) == before


@pytest.mark.parametrize("tokens", [2, 50, 700, 1025, 1026, 5000, 10_249, 20_000, 10**6, 10**9])
def test_the_default_gives_a_training_shard_and_cuts_off_little(tokens: int) -> None:
    size = choose_shard_size(tokens)
    assert 2 <= -(-tokens // size) <= 20  # shards
    if tokens >= 1026:  # at least one window of 512 in each split
        assert size > 512
    if tokens >= 10_000:
        assert (size - 1) % 512 < 0.05 * size


def test_the_default_follows_from_the_tokens_and_not_from_the_bytes(tmp_path: Path) -> None:
    texts = [text + " more text" * 100 for text in TEXTS]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts, embedding=[0.123456] * 1024))
    config = config_for(tmp_path / "a.jsonl", tmp_path / "whole", shard_size=None)
    whole = prepare(config)
    some = replace(config, data_dir=tmp_path / "some", max_tokens=12_000)
    assert 8 <= len(whole.shards) <= 20
    assert 8 <= len(prepare(some).shards) <= 20
    assert prepare(some).tokens == 12_000
    (tmp_path / "whole" / whole.shards[-1].file).unlink()  # continued without the flag
    assert prepare(config) == whole


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.txt"])
def test_a_large_source_has_large_shards(name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(dataset, "SHARD_SIZE", 2000)
    monkeypatch.setattr(dataset, "BATCH_CHARS", 1000)
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1000)
    source = write(tmp_path / name, TEXTS * 20)
    assert prepare(config_for(source, tmp_path / "out", shard_size=None)).shard_size == 2000
    assert np.array_equal(all_tokens(tmp_path / "out"), expected(TEXTS * 20))


@pytest.mark.parametrize("text", ["中" * 2**22, " " * 2**22])
def test_text_that_cannot_be_cut_takes_linear_time(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text)
    with mock.patch.object(sources, "BLOCK_BYTES", 1000):
        start = time.monotonic()
        assert list(read_text(str(tmp_path / "a.txt"))) == [text if text.strip() else None]
        assert time.monotonic() - start < 5


UTF16 = "".join(f'{{"text": "na\xefve {i}"}}\n' for i in range(200)).encode("utf-16")
LATIN = "".join(f'{{"text": "na\xefve {i}"}}\n' for i in range(9000)).encode("latin-1")
NO_UTF8 = pa.array([b"good", b"\xff\xfe"], pa.binary()).cast(pa.string(), safe=False)
DAMAGED = parquet(TEXTS)
# The content of a file, and what the message has to contain beside its name.
BAD_FILES: dict[str, tuple[bytes, list[str]]] = {
    "utf16.txt": (UTF16, ["UTF-16", "iconv"]),
    "no mark.txt": (UTF16[2:], ["UTF-16", "iconv"]),
    "utf16.jsonl": (UTF16, ["UTF-16", "iconv"]),
    "latin.txt": (b"a" * 2**20 + b"na\xefve", ["WINDOWS-1252", "iconv"]),
    "latin.jsonl": (LATIN, ["WINDOWS-1252", "iconv"]),
    "latin.csv": (b"text,x\n" + b"abc,1\n" * 50_000 + b"na\xefve,1\n", ["WINDOWS-1252", "iconv"]),
    "comma.csv": (b"text\nhello, world\n", []),
    "no_json.jsonl": (b'{"text": "a"}\n{"text": "b"\n', ["JSON"]),
    "other.jsonl": (b'{"body": "b", "title": "c"}\n', ["`text`", "--column", "body, title"]),
    "other.parquet": (parquet(["a"], column="body"), ["`text`", "--column", "id, body"]),
    "mixed.jsonl": (b'{"text": 5}\n{"text": "a"}\n', ["`text`"]),
    "number.parquet": (parquet([1]), ["`text`", "int64"]),
    "list.parquet": (parquet([["a"]]), ["`text`", "list"]),
    "cut.parquet": (DAMAGED[:-100], ["Parquet"]),
    "damaged.parquet": (DAMAGED[:4] + bytes(300) + DAMAGED[304:], []),
    "no_utf8.parquet": (parquet(NO_UTF8), ["utf-8"]),
    "cut.jsonl.gz": (SAME_TEXTS["a.json.gz"][:-20], []),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_and_the_folder_can_be_used_again(name: str, tmp_path: Path) -> None:
    content, parts = BAD_FILES[name]
    bad = tmp_path / "source" / name
    bad.parent.mkdir()
    write(bad.with_name("a.parquet"), TEXTS)
    bad.write_bytes(content)
    config = config_for(bad.parent, tmp_path / "out", shard_size=10**6)
    with pytest.raises(ValueError, match=re.escape(name)) as error:
        prepare(config)
    message = str(error.value)
    assert message.count(name) == 1
    assert all(part in message for part in parts), message
    assert "a.parquet" not in message
    bad.unlink()
    prepare(config)


def test_verify_names_every_bad_shard(prepared: DatasetConfig, capsys: Capture) -> None:
    out = prepared.data_dir
    assert verify(out) == []
    flipped, gone, cut, wide = shard_paths(out)[2:6]
    np.save(flipped, np.load(flipped) ^ 1)
    gone.unlink()
    os.truncate(cut, 300)
    np.save(wide, np.zeros(100, np.int32))
    unknown = out / "text_train_000999.npy"
    np.save(unknown, np.full(5, 60000, np.uint16))
    with pytest.raises(SystemExit) as stop:
        main("--verify", "--data-dir", out)
    assert stop.value.code == 1
    report = capsys.readouterr().out.splitlines()
    paths = [flipped, gone, cut, wide, unknown]
    problems = ["has changed", "No such file", "damaged", "int32", "index.json"]
    for line, path, problem in zip(report, paths, problems, strict=True):
        assert str(path) in line
        assert problem in line
    (out / "index.json").unlink()  # then only the files themselves can be checked
    assert any("60000" in line for line in verify(out))
