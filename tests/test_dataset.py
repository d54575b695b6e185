"""dataset.py: the shards are the documents' tokens, whatever the source and the workers."""

import bz2
import contextlib
import dataclasses
import gzip
import io
import itertools
import json
import lzma
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import dataset
from dataset import DatasetConfig, choose_shard_size, prepare, verify
from gptxs import sources
from gptxs.files import lock_folder
from gptxs.sources import Piece, read_text
from gptxs.tokenizer import DELIMITER, END_OF_TEXT, get_tokenizer

Main = Callable[..., tuple[int | str | None, str, str]]
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
    """A JSONL file, or a Parquet file with row groups of ``rows`` documents."""
    is_parquet = path.suffix == ".parquet"
    path.write_bytes(
        parquet(pa.array(texts, pa.string()), rows=rows) if is_parquet else jsonl(texts)
    )
    return path


def config_for(source: Path | str, folder: Path, shard_size: int | None = 100) -> DatasetConfig:
    return DatasetConfig((str(source),), data_dir=folder, shard_size=shard_size, workers=2)


def shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.npy"), key=lambda path: path.stem[-6:])


def all_tokens(folder: Path) -> np.ndarray:
    return np.concatenate([np.load(path) for path in shard_paths(folder)])


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def expected(texts: Sequence[str]) -> np.ndarray:
    encode = get_tokenizer().encode_ordinary
    return np.array([token for text in texts for token in (END_OF_TEXT, *encode(text))], np.uint16)


def fail_after(writes: int) -> Any:
    """Lets that many files reach the disk and then no more, as a full disk would."""
    successes = [None] * (2 * writes)  # the file, and its name in the folder
    failures = itertools.repeat(OSError(28, "No space left on device"))
    return mock.patch("os.fsync", side_effect=itertools.chain(successes, failures))


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    """`python dataset.py ARGUMENTS` inside this process; its exit code, output and errors."""

    def run(*arguments: object) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "argv", ["dataset.py", *map(str, arguments)])
        code: int | str | None = 0
        try:
            dataset.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def prepared(tmp_path: Path) -> DatasetConfig:
    """TEXTS in shards of 100 tokens."""
    config = config_for(write(tmp_path / "a.jsonl", TEXTS), tmp_path / "out")
    prepare(config)
    return config


# ---- what is written -----------------------------------------------------------------------------


@ORDINARY
@given(
    files=st.lists(st.lists(st.none() | st.text(max_size=30), max_size=8), min_size=1, max_size=3),
    suffix=st.sampled_from([".parquet", ".jsonl"]),
    shard_size=st.integers(1, 60),
    max_tokens=st.none() | st.integers(1, 100),
    workers=st.integers(1, 4),
    batch_chars=st.sampled_from([1, 20, 1000]),
    interruptions=st.lists(st.integers(1, 6), max_size=2),
)
def test_shards_are_the_concatenated_documents_cut_at_multiples_of_their_size(
    files: list[list[str | None]],
    suffix: str,
    shard_size: int,
    max_tokens: int | None,
    workers: int,
    batch_chars: int,
    interruptions: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dataset, "BATCH_CHARS", batch_chars)
    with tempfile.TemporaryDirectory() as temporary:
        source, out = Path(temporary, "source"), Path(temporary, "out")
        source.mkdir()
        for i, texts in enumerate(files):
            write(source / f"{i:03d}{suffix}", texts, rows=2)
        config = config_for(source, out, shard_size)
        config = dataclasses.replace(config, max_tokens=max_tokens, workers=workers)
        documents = [text for texts in files for text in texts if text]
        if not documents:
            with pytest.raises(ValueError, match="holds no text"):
                prepare(config)
            return
        for writes in interruptions:
            with fail_after(writes), contextlib.suppress(OSError):
                prepare(config)
        index = prepare(config)
        tokens = expected(documents)[:max_tokens]
        assert [shard.file for shard in index.shards] == [path.name for path in shard_paths(out)]
        for number, shard in enumerate(index.shards):
            assert shard.file == f"text_{'train' if number else 'val'}_{number:06d}.npy"
            saved = io.BytesIO()
            np.save(saved, tokens[number * shard_size :][:shard_size])
            assert (out / shard.file).read_bytes() == saved.getvalue()
        if max_tokens is None:
            empty_files = files.count([]) if suffix == ".jsonl" else 0
            assert index.documents == len(documents)
            assert index.skipped == sum(map(len, files)) - len(documents) + empty_files
        assert verify(out) == []
        # One that nothing disturbed, with other threads and batches, is the same to the byte.
        monkeypatch.setattr(dataset, "BATCH_CHARS", 50)
        prepare(dataclasses.replace(config, data_dir=Path(temporary, "again"), workers=1))
        assert contents(Path(temporary, "again")) == contents(out)
        before = contents(out)
        prepare(config)
        assert contents(out) == before


@ORDINARY
@given(
    text=st.lists(st.sampled_from([*" \n\r\t'<sa1!é中", "\x1c", "  ", DELIMITER]), max_size=60),
    block=st.integers(1, 25),
)
@example(text=[" ", " ", DELIMITER], block=1)
@example(text=["'", " ", " ", DELIMITER], block=1)
def test_a_text_file_is_the_documents_between_its_separators_whatever_the_block(
    text: list[str], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", block)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, "a.txt")
        path.write_bytes("".join(text).encode())
        rows = list(read_text(str(path)))
        batch = dataset.Batch(0, 0, rows, [])
        batch.encode(get_tokenizer())
        documents = [part for part in "".join(text).split(DELIMITER) if part.strip()]
        tokens = np.concatenate([np.empty(0, np.uint16), *batch.tokens])
        assert np.array_equal(tokens, expected(documents))


def test_the_embedded_corpus_is_the_same_each_time_and_a_fair_mix(tmp_path: Path) -> None:
    config = config_for("stdlib", tmp_path / "a", shard_size=50_000)
    index = prepare(config)
    assert index == prepare(dataclasses.replace(config, data_dir=tmp_path / "b", workers=1))
    tokens = all_tokens(tmp_path / "a")
    assert 300_000 < len(tokens) < 3_000_000
    assert index.shards[0].file == "stdlib_val_000000.npy"
    # Manual pages are in reStructuredText with a title underlined by stars, docstrings are not.
    decode = get_tokenizer().decode
    assert all(decode(q.tolist()).count("\n****") >= 5 for q in np.array_split(tokens, 4))


# ---- sources -------------------------------------------------------------------------------------

# Texts that a reader may change: a number, what pandas takes for nothing, quotes, line ends.
HARD = [
    'a "quoted" text,\r\nof two\tlines',
    "007",
    "NA",
    "null",
    "na\xefve 中",
    " x ",
    "2024-01-01",
]
LINES = jsonl(HARD, other=1)
ROWS = [{"text": text, "other": [1]} for text in HARD]
CELLS = ['"' + text.replace('"', '""') + '"' for text in HARD]
STREAM = io.BytesIO()
with pa.ipc.new_stream(STREAM, pa.schema({"text": pa.string()})) as writer:
    writer.write_table(pa.table({"text": HARD}))
TEXT = DELIMITER.join(HARD).encode()
SAME_TEXTS: dict[str, bytes] = {
    "a.jsonl": LINES,
    "A.JSONL": LINES,
    "lines.json": LINES.replace(b"\n", b"\r\n"),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES,
    "array.json": json.dumps(ROWS).encode(),
    "array.jsonl": json.dumps(ROWS, indent=1).encode(),
    "a [1]#b.jsonl": LINES,
    "other keys.jsonl": jsonl(HARD[:3]) + jsonl(HARD[3:], other="x", more={"y": [1]}),
    "a.csv": ("text,other\n" + "".join(f"{cell},1\n" for cell in CELLS)).encode(),
    "bom.csv": ("\ufefftext,other\n" + "".join(f"{cell},1\n" for cell in CELLS)).encode(),
    "a.tsv": ("other\ttext\n" + "".join(f"x\t{cell}\n" for cell in CELLS)).encode(),
    "a.arrow": STREAM.getvalue(),
    "a.parquet": parquet(HARD),
    "large.parquet": parquet(pa.array(HARD, pa.large_string())),
    "view.parquet": parquet(pa.array(HARD, pa.string_view())),
    "dictionary.parquet": parquet(pa.array(HARD).dictionary_encode()),
    "a.json.gz": gzip.compress(LINES),
    "a.jsonl.bz2": bz2.compress(LINES),
    "a.jsonl.xz": lzma.compress(LINES),
    "a.txt": TEXT,
    "A.TXT": TEXT,
    "a.md": DELIMITER.join([*HARD, "\n"]).encode(),
    "bom.text": b"\xef\xbb\xbf" + TEXT,
    "a.txt.gz": gzip.compress(TEXT),
    "a.txt.xz": lzma.compress(TEXT),
    "a.txt.zst": pa.compress(TEXT, "zstd", asbytes=True),
    "a.jsonl.zst": pa.compress(LINES, "zstd", asbytes=True),
}


@pytest.mark.parametrize("name", SAME_TEXTS)
def test_every_format_gives_the_texts_as_they_are(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(SAME_TEXTS[name])
    prepare(config_for(tmp_path / name, tmp_path / "out", shard_size=7))
    assert np.array_equal(all_tokens(tmp_path / "out"), expected(HARD))


def test_a_folder_of_save_to_disk_is_read(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "a", num_shards=2)
    prepare(config_for(tmp_path / "a", tmp_path / "out"))
    assert np.array_equal(all_tokens(tmp_path / "out"), expected(TEXTS))


def test_files_of_all_kinds_are_read_in_order_and_what_is_not_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    for folder in ("b", ".ipynb_checkpoints", ".venv", "__MACOSX"):
        (source / folder).mkdir(parents=True)
        (source / folder / "x.txt").write_text("third" if folder == "b" else "hidden")
    elsewhere.mkdir()
    (elsewhere / "x.txt").write_text("last")
    (elsewhere / "back").symlink_to(source)  # two folders that link to each other
    (source / "c").symlink_to(elsewhere)
    (source / "d.txt").symlink_to(elsewhere / "x.txt")
    (source / ".e").symlink_to(source)
    (tmp_path / "link").symlink_to(source)
    write(source / "a2.parquet", ["second"])
    (source / "a1.txt").write_bytes(b"first:\r\nas it is\n")
    (source / "a3.txt").write_bytes(b"")
    (source / "a4.jsonl").write_bytes(b"")
    for name in (".hidden.txt", "x.pdf", "y.pdf", "z.py"):
        (source / name).write_text("not read")
    index = prepare(config_for(tmp_path / "link", tmp_path / "out"))
    texts = ["first:\r\nas it is\n", "second", "third", "last"]
    assert np.array_equal(all_tokens(tmp_path / "out"), expected(texts))
    assert index.skipped == 2
    line = next(line for line in capsys.readouterr().err.splitlines() if ".pdf" in line)
    assert "2 .pdf" in line
    assert "1 .py" in line
    assert "1 c" in line
    assert ".txt" not in line


def test_several_sources_and_globs_follow_each_other(tmp_path: Path, main: Main) -> None:
    for name in "abc":
        write(tmp_path / f"{name}.jsonl", [name])
    out = tmp_path / "out"
    flags = ("--source", tmp_path / "c.jsonl", "--source", tmp_path / "[ab].jsonl")
    code, output, errors = main(*flags, "--data-dir", out, "--shard-size", 2)
    assert code == 0
    assert np.array_equal(all_tokens(out), expected(["c", "a", "b"]))
    assert "--shard-size" in output  # no window of 512 is left
    assert [line.split(":")[0] for line in errors.splitlines()] == [
        p.name for p in shard_paths(out)
    ]


def test_a_separator_in_a_column_is_ordinary_text_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"a {DELIMITER} b", "c", DELIMITER]
    prepare(config_for(write(tmp_path / "a.jsonl", texts), tmp_path / "out"))
    assert np.array_equal(all_tokens(tmp_path / "out"), expected(texts))
    assert f"{DELIMITER} is ordinary text in 2 documents" in capsys.readouterr().err


@pytest.mark.parametrize(("workers", "limit"), [(2, 12 * 20), (100, 65 * 32)])
def test_of_large_files_only_some_batches_are_in_memory(workers: int, limit: int) -> None:
    read = 0

    def rows() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield "word " * 100

    with mock.patch.object(dataset, "BATCH_CHARS", 1000):
        pieces = [Piece("endless", rows)] * 1000
        batches = dataset.tokenize(pieces, dataset.Position(0, 0, 0, 0), workers)
        assert len(list(itertools.islice(batches, 50))) == 50
        assert read < 2 * (50 + limit)
        batches.close()  # type: ignore[attr-defined]


def test_resuming_does_not_tokenize_again_what_is_in_shards(prepared: DatasetConfig) -> None:
    before = contents(prepared.data_dir)
    index = json.loads(before["index.json"])
    assert [len(shard["next"]) for shard in index["shards"]] == [4] * len(index["shards"])
    shard_paths(prepared.data_dir)[-1].unlink()
    with mock.patch.object(dataset, "encode_documents", wraps=dataset.encode_documents) as encode:
        prepare(prepared)
    assert sum(len(text) for call in encode.call_args_list for text in call.args[0]) < 1000
    assert contents(prepared.data_dir) == before
    # A missing shard, or one that was cut, is written again.
    (prepared.data_dir / "text_train_000002.npy").unlink()
    (prepared.data_dir / "text_train_000005.npy").write_bytes(b"short")
    prepare(prepared)
    assert contents(prepared.data_dir) == before


# ---- the default size of shards ------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [2, 50, 700, 1025, 1026, 5000, 10_249, 20_000, 10**6, 10**9])
def test_the_default_gives_a_training_shard_and_cuts_off_little(tokens: int) -> None:
    size = choose_shard_size(tokens)
    shards = -(-tokens // size)
    assert 2 <= shards <= 20
    if tokens >= 1026:  # at least one window of 512 in each split
        assert size > 512
    if tokens >= 10_000:
        assert (size - 1) % 512 < 0.05 * size


def test_the_default_follows_from_the_tokens_and_not_from_the_bytes(tmp_path: Path) -> None:
    texts = [text + " more text" * 100 for text in TEXTS]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts, embedding=[0.123456] * 1024))
    config = config_for(tmp_path / "a.jsonl", tmp_path / "whole", shard_size=None)
    whole = prepare(config)
    some = dataclasses.replace(config, data_dir=tmp_path / "some", max_tokens=12_000)
    assert 8 <= len(whole.shards) <= 20
    assert 8 <= len(prepare(some).shards) <= 20
    assert prepare(some).tokens == 12_000
    (tmp_path / "whole" / whole.shards[-1].file).unlink()  # continued without the flag
    assert prepare(config) == whole


def test_a_large_source_is_estimated_from_its_first_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "SHARD_SIZE", 3000)
    source = write(tmp_path / "a.parquet", TEXTS * 20)
    index = prepare(config_for(source, tmp_path / "out", shard_size=None))
    assert index.shard_size == 3000
    assert np.array_equal(all_tokens(tmp_path / "out"), expected(TEXTS * 20))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_large_file_has_large_shards(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(dataset, "SHARD_SIZE", 2000)
    monkeypatch.setattr(dataset, "BATCH_CHARS", 1000)
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1000)
    texts = TEXTS * 20
    content = jsonl(texts) if name == "a.jsonl" else DELIMITER.join(texts).encode()
    (tmp_path / name).write_bytes(content)
    index = prepare(config_for(tmp_path / name, tmp_path / "out", shard_size=None))
    assert index.shard_size == 2000
    assert all(" 1 of 1" in line for line in capsys.readouterr().err.splitlines())


@pytest.mark.parametrize("text", ["中" * 2**22, " " * 2**22])
def test_text_that_cannot_be_cut_takes_linear_time(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text)
    with mock.patch.object(sources, "BLOCK_BYTES", 1000):
        start = time.monotonic()
        assert list(read_text(str(tmp_path / "a.txt"))) == [text if text.strip() else None]
        assert time.monotonic() - start < 5


# ---- what is refused -----------------------------------------------------------------------------

UTF16 = "".join(f'{{"text": "na\xefve {i}"}}\n' for i in range(200)).encode("utf-16")
LATIN = "".join(f'{{"text": "na\xefve {i}"}}\n' for i in range(9000)).encode("latin-1")
NO_UTF8 = pa.array([b"good", b"\xff\xfe"], pa.binary()).cast(pa.string(), safe=False)
DAMAGED = parquet(TEXTS)
# The content of a file, and what the message has to contain beside its name.
BAD_FILES: dict[str, tuple[bytes, list[str]]] = {
    "utf16.txt": (UTF16, ["UTF-16", "iconv"]),
    "no mark.txt": (UTF16[2:], ["UTF-16", "iconv"]),
    "utf16.jsonl": (UTF16, ["UTF-16", "iconv"]),
    "utf16.csv": (UTF16, ["UTF-16", "iconv"]),
    "latin.txt": (b"a" * 2**20 + b"na\xefve", ["WINDOWS-1252", "iconv"]),
    "latin.jsonl": (LATIN, ["WINDOWS-1252", "iconv"]),
    "latin.csv": (b"text,x\n" + b"abc,1\n" * 50_000 + b"na\xefve,1\n", ["WINDOWS-1252", "iconv"]),
    "no_json.jsonl": (b'{"text": "a"}\n{"text": "b"\n', ["JSON"]),
    "other.jsonl": (b'{"body": "b", "title": "c"}\n', ["`text`", "--column", "body, title"]),
    "other.csv": (b"body,title\na,b\n", ["`text`", "--column", "body, title"]),
    "other.parquet": (parquet(["a"], column="body"), ["`text`", "--column", "id, body"]),
    "number.jsonl": (b'{"text": 5}\n', ["`text`", "int64"]),
    "mixed.jsonl": (b'{"text": 5}\n{"text": "a"}\n', ["`text`"]),
    "number.parquet": (parquet([1]), ["`text`", "int64"]),
    "list.parquet": (parquet([["a"]]), ["`text`", "list"]),
    "cut.parquet": (DAMAGED[:-100], ["Parquet"]),
    "damaged.parquet": (DAMAGED[:4] + bytes(300) + DAMAGED[304:], []),
    "no_utf8.parquet": (parquet(NO_UTF8), ["utf-8"]),
    "cut.jsonl.gz": (gzip.compress(LINES)[:-20], []),
    "no_suffix": (b"text", ["--source", ".parquet, .jsonl"]),
    "empty.jsonl": (b"", ["no text"]),
    "caf\udce9.txt": (b"text", ["UTF-8", "rename"]),
}


def error_of(result: tuple[int | str | None, str, str]) -> str:
    """The error line. Before it there may be lines about shards that could be written."""
    code, _, errors = result
    lines = [line for line in errors.splitlines() if ".npy:" not in line and "not read" not in line]
    assert (code, len(lines)) == (2, 1), errors
    return lines[0].removeprefix("dataset.py: ")


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_line_with_its_name(name: str, tmp_path: Path, main: Main) -> None:
    content, parts = BAD_FILES[name]
    path = tmp_path / name
    try:
        path.write_bytes(content)
    except OSError:
        pytest.skip("this file system has no such names")
    error = error_of(main("--source", path, "--data-dir", tmp_path / "out", "--shard-size", 10))
    assert all(part in error for part in [path.name.replace("\udce9", "\\xe9"), *parts]), error
    assert not shard_paths(tmp_path / "out") or "WINDOWS" in error
    if not shard_paths(tmp_path / "out"):  # the folder can be used for a source that was mended
        prepare(config_for(write(tmp_path / "good.jsonl", TEXTS), tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--source", "nowhere"], ["nowhere", "fineweb-edu, stdlib"]),
        (["--source", "nowhere/a.jsonl"], ["nowhere/a.jsonl"]),
        (["--workers", -1, "--max-tokens", 0], ["max_tokens 0", "workers -1"]),
        (["--shard-size", 0], ["shard_size 0"]),
        (["--shard-size", 5, "--shard-size", 6], ["--shard-size"]),
        (["--source", "stdlib", "--split", "test"], ["--split"]),
        (["--source", "stdlib", "--column", "body"], ["--column"]),
        (["--verify", "--max-tokens", 5], ["--verify"]),
        (["--verify", "--column", "body"], ["--verify"]),
        (["--verify"], ["no shards in"]),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(
    options: list[object], parts: list[str], tmp_path: Path, main: Main
) -> None:
    error = error_of(main("--data-dir", tmp_path / "out", *options))
    assert all(part in error for part in parts)


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"a\.jsonl is not a regular file"):
        prepare(config_for(tmp_path / "a.jsonl", tmp_path / "out"))


def test_an_error_names_the_file_that_has_it_and_names_it_once(tmp_path: Path, main: Main) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write(source / "a.parquet", TEXTS)
    (source / "b.parquet").write_bytes(DAMAGED[:-100])
    error = error_of(main("--source", source, "--data-dir", tmp_path / "out"))
    assert "a.parquet" not in error
    assert error.count("b.parquet") == 1


def test_a_column_of_an_empty_file_is_no_mistake(tmp_path: Path, main: Main) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    flags = ("--column", "body", "--data-dir", tmp_path / "out")
    assert "no text" in error_of(main("--source", tmp_path / "a.jsonl", *flags))


def test_a_source_begun_locally_is_not_sought_on_the_hub(prepared: DatasetConfig) -> None:
    hub = dataclasses.replace(prepared, source=("owner/name",))
    with pytest.raises(ValueError, match=r"source was .* and is now owner/name"):
        prepare(hub)


def test_a_folder_begun_with_other_options_is_left_alone(
    prepared: DatasetConfig, tmp_path: Path
) -> None:
    before = contents(prepared.data_dir)
    other = str(write(tmp_path / "b.jsonl", TEXTS[::-1]))
    for config, message in [
        (dataclasses.replace(prepared, shard_size=99), "shard_size was 100 and is now 99"),
        (dataclasses.replace(prepared, max_tokens=5), "max_tokens was None and is now 5"),
        (dataclasses.replace(prepared, source=(other,)), "source was .* and is now"),
        (dataclasses.replace(prepared, column="id"), "source was .* and is now"),
    ]:
        with pytest.raises(ValueError, match=f"{message}.*give another --data-dir"):
            prepare(config)
        assert contents(prepared.data_dir) == before
    Path(prepared.source[0]).write_bytes(jsonl([*TEXTS, "one more"]))
    with pytest.raises(ValueError, match=r"revision was .* and is now"):
        prepare(prepared)
    lock = lock_folder(prepared.data_dir, flag="--data-dir")
    with pytest.raises(ValueError, match="another process"):
        prepare(prepared)
    lock.release()


@pytest.mark.parametrize("index", [None, "{}", "[]", "{", '{"shards": [5]}'])
def test_a_folder_of_another_program_is_left_alone(index: str | None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    np.save(out / "edufineweb_val_000000.npy", np.zeros(5, np.uint16))
    if index is not None:
        (out / "index.json").write_text(index)
    before = contents(out)
    with pytest.raises(ValueError, match=r"index\.json"):
        prepare(config_for(write(tmp_path / "a.jsonl", TEXTS), out))
    assert contents(out) == before


# ---- verifying -----------------------------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)


SHARD = "text_train_000002.npy"
# The file that is damaged, how, and what the report must say of it.
DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a flipped bit": (SHARD, flip_a_bit, "SHA-256"),
    "gone": (SHARD, Path.unlink, "No such file"),
    "cut": (SHARD, lambda p: os.truncate(p, 300), "damaged"),
    "int32": (SHARD, lambda p: np.save(p, np.zeros(100, np.int32)), "int32"),
    "unknown": (
        "text_train_000999.npy",
        lambda p: np.save(p, np.zeros(9, np.uint16)),
        "index.json",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_verify_reports_every_bad_shard_and_exits_with_1(
    case: str, prepared: DatasetConfig, main: Main
) -> None:
    name, damage, problem = DAMAGES[case]
    out = prepared.data_dir
    assert main("--verify", "--data-dir", out)[0] == 0
    damage(out / name)
    flip_a_bit(out / "text_train_000004.npy")
    code, report, _ = main("--verify", "--data-dir", out)
    lines = {Path(line.split()[0].rstrip(":")).name: line for line in report.splitlines()}
    assert (code, len(lines)) == (1, 2)
    assert problem in lines[name]
    assert "has changed" in lines["text_train_000004.npy"]
    (out / "index.json").unlink()  # then only the files themselves can be checked
    np.save(out / "text_train_000900.npy", np.full(5, 60000, np.uint16))
    assert any("60000" in line for line in verify(out))
