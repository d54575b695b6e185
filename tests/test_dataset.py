"""dataset.py: the shards are the documents' tokens, whatever the source and the workers."""

import common

import base64
import contextlib
import dataclasses
import io
import itertools
import json
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
import pyarrow.parquet.encryption as encryption
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dataset
from dataset import DatasetConfig, prepare, verify

Main = Callable[..., tuple[int | str | None, str, str]]
TEXTS = [f"Document {i}. " + "The quick brown fox jumps. " * (i % 7) for i in range(100)]


def write(path: Path, texts: Sequence[str | None], rows: int = 10) -> Path:
    """A JSONL file, or a Parquet file with row groups of ``rows`` documents."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts))
    else:
        table = pa.table({"id": list(range(len(texts))), "text": pa.array(texts, pa.string())})
        pq.write_table(table, path, row_group_size=rows)
    return path


def config_for(source: Path | str, folder: Path, shard_size: int | None = 100) -> DatasetConfig:
    return DatasetConfig(source=str(source), data_dir=folder, shard_size=shard_size, workers=2)


def shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.npy"), key=lambda path: path.stem[-6:])


def all_tokens(folder: Path) -> np.ndarray:
    return np.concatenate([np.load(path) for path in shard_paths(folder)])


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


def expected(texts: list[str]) -> np.ndarray:
    encode = dataset.get_tokenizer().encode_ordinary
    return np.array([token for text in texts for token in (50256, *encode(text))], np.uint16)


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
        with pytest.raises(SystemExit) as exit_:
            dataset.main()
        return exit_.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def prepared(tmp_path: Path) -> DatasetConfig:
    """TEXTS in shards of 100 tokens."""
    config = config_for(write(tmp_path / "a.jsonl", TEXTS), tmp_path / "out")
    prepare(config)
    return config


# ---- what is written -----------------------------------------------------------------------------


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    files=st.lists(st.lists(st.none() | st.text(max_size=30), min_size=1, max_size=8), min_size=1),
    suffix=st.sampled_from([".parquet", ".jsonl"]),
    config=st.builds(
        DatasetConfig,
        shard_size=st.integers(1, 60),
        max_tokens=st.none() | st.integers(1, 100),
        workers=st.integers(1, 4),
    ),
    chunk_bytes=st.sampled_from([1, 50, 1000]),
    interruptions=st.lists(st.integers(1, 6), max_size=3),
)
def test_shards_are_the_concatenated_documents_cut_at_multiples_of_their_size(
    files: list[list[str | None]],
    suffix: str,
    config: DatasetConfig,
    chunk_bytes: int,
    interruptions: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dataset, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(dataset, "BATCH_DOCUMENTS", 3)
    with tempfile.TemporaryDirectory() as temporary:
        source, out = Path(temporary, "source"), Path(temporary, "out")
        source.mkdir()
        for i, texts in enumerate(files):
            write(source / f"{i:03d}{suffix}", texts, rows=2)
        config = dataclasses.replace(config, source=str(source), data_dir=out)
        if not any(text for texts in files for text in texts):
            with pytest.raises(ValueError, match="holds no text"):
                prepare(config)
            return
        for writes in interruptions:
            with fail_after(writes), contextlib.suppress(OSError):
                prepare(config)
        index = prepare(config)
        documents = [text for texts in files for text in texts if text]
        tokens = expected(documents)[: config.max_tokens]
        sizes = [len(np.load(path)) for path in shard_paths(out)]
        assert not sizes or np.array_equal(all_tokens(out), tokens)
        assert sum(sizes) == index.tokens == len(tokens)
        assert all(size == config.shard_size for size in sizes[:-1])
        assert [shard.tokens for shard in index.shards] == sizes
        if config.max_tokens is None:
            assert index.documents == len(documents)
            assert index.skipped == sum(map(len, files)) - len(documents)
        assert not sizes or verify(out) == []
        before = contents(out)
        prepare(config)
        assert contents(out) == before


def test_the_index_of_a_limited_run_stays_when_the_command_is_repeated(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", ["hello world", None] * 2)
    config = dataclasses.replace(config_for(source, tmp_path / "out", shard_size=3), max_tokens=3)
    prepare(config)
    before = contents(tmp_path / "out")
    prepare(config)
    assert contents(tmp_path / "out") == before


def test_an_index_that_has_to_be_continued_has_no_totals(prepared: DatasetConfig) -> None:
    before = contents(prepared.data_dir)
    shard_paths(prepared.data_dir)[-1].unlink()
    with fail_after(1), pytest.raises(OSError, match="No space"):
        prepare(prepared)
    index = json.loads((prepared.data_dir / "index.json").read_text())
    assert index.keys().isdisjoint({"tokens", "documents", "skipped"})
    prepare(prepared)
    assert contents(prepared.data_dir) == before


def test_a_machine_never_writes_over_the_shards_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "first_number", lambda rank, world_size: 2 * rank)
    source = write(tmp_path / "a.jsonl", ["hello world"] * 3)
    with pytest.raises(ValueError, match=r"no more shard numbers.*--shard-size"):
        prepare(config_for(source, tmp_path / "out", shard_size=3))
    assert len(shard_paths(tmp_path / "out")) == 2


def test_a_link_to_a_folder_is_named(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write(source / "a.jsonl", TEXTS)
    (source / "more").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="more is a link to a folder"):
        prepare(config_for(source, tmp_path / "out"))


def test_files_of_all_kinds_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "b").mkdir(parents=True)
    write(source / "b" / "1.jsonl", ["third", "fourth"])
    write(source / "a2.parquet", ["second"])
    (source / "a1.txt").write_bytes(b"first:\r\nas it is\n")
    (source / "README.md").write_text("ignored")
    (source / ".hidden.txt").write_text("ignored")
    prepare(config_for(source, tmp_path / "out"))
    texts = ["first:\r\nas it is\n", "second", "third", "fourth"]
    assert np.array_equal(all_tokens(tmp_path / "out"), expected(texts))


def test_every_shard_has_the_bytes_that_numpy_writes(prepared: DatasetConfig) -> None:
    tokens = expected(TEXTS)
    starts = range(0, len(tokens), 100)
    names = ["text_val_000000.npy", *(f"text_train_{i:06d}.npy" for i in range(1, len(starts)))]
    assert len(starts) > 10
    assert [path.name for path in shard_paths(prepared.data_dir)] == names
    for start, name in zip(starts, names, strict=True):
        saved = io.BytesIO()
        np.save(saved, tokens[start : start + 100])
        assert (prepared.data_dir / name).read_bytes() == saved.getvalue()


# What dataset.py writes for the documents below, but on fewer lines, with the digest of the source
# that the first versions had.
INDEX = """{"tokenizer": "gpt2", "source": "1 files",
"revision": "b10ae9dd75b4fe0ae479193f85b24041b76f7e7bfe1a42233c7d45567f891214",
"units": 1, "shard_size": 4, "max_tokens": null, "world_size": 1, "rank": 0, "complete": true,
"shards": [{"file": "text_val_000000.npy", "tokens": 4,
"sha256": "87da157e818f0490798ebabc58de53027c075803719dc5b34a220214ac55fe87",
"documents": 2, "next": [0, 4, 0]}, {"file": "text_train_000001.npy", "tokens": 2,
"sha256": "122018d0201cfc3685c0d0e953b2c50b20ee85086bccd99dc49d8114833a4430",
"documents": 0, "next": [1, 0, 2]}], "tokens": 6, "documents": 2, "skipped": 2}"""


def test_an_index_has_the_bytes_that_it_always_had_and_is_continued(tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = write(tmp_path / "a.jsonl", ["hello world", None] * 2)
    config = config_for(source, out, shard_size=4)
    index = prepare(config)
    begun = json.loads(INDEX)
    revision = "dc44213a47661d053eaeb4bf6984daf48c0f3e82a12ae3960d2d8f666b9831a4"
    assert (out / "index.json").read_text() == json.dumps({**begun, "revision": revision}, indent=1)
    assert dataset.ShardIndex.read(out / "index.json") == index
    (out / "index.json").write_text(json.dumps(begun, indent=1))
    before = contents(out)
    for key in ("tokens", "documents", "skipped"):
        del begun[key]
    begun.update(complete=False, shards=begun["shards"][:1])
    (out / "index.json").write_text(json.dumps(begun, indent=1))
    (out / "text_train_000001.npy").unlink()
    prepare(config)
    assert contents(out) == before


def test_several_machines_write_the_same_documents_into_one_folder(tmp_path: Path) -> None:
    source, one, four = (tmp_path / name for name in ("source", "one", "four"))
    source.mkdir()
    for i in range(7):
        write(source / f"{i}.parquet", TEXTS[i::7])
    prepare(config_for(source, one))
    for rank in (2, 0, 3, 1):
        prepare(config_for(source, four), rank, 4)
    assert np.array_equal(all_tokens(four), all_tokens(one))
    assert [path.name for path in four.glob("*_val_*")] == ["text_val_000000.npy"]
    assert len(list(four.glob("index*.json"))) == 4
    assert verify(four) == []
    with pytest.raises(ValueError, match="world_size was 4 and is now 1"):
        prepare(config_for(source, four))


def test_the_embedded_corpus_is_the_same_each_time_and_a_fair_mix(tmp_path: Path) -> None:
    config = config_for("stdlib", tmp_path / "a", shard_size=50_000)
    index = prepare(config)
    assert index == prepare(dataclasses.replace(config, data_dir=tmp_path / "b", workers=1))
    tokens = all_tokens(tmp_path / "a")
    assert 300_000 < len(tokens) < 3_000_000
    # Manual pages are in reStructuredText with a title underlined by stars, docstrings are not.
    decode = dataset.get_tokenizer().decode
    assert all(decode(q.tolist()).count("\n****") >= 5 for q in np.array_split(tokens, 4))


def test_a_small_source_gets_about_ten_shards_and_a_line_for_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "a.jsonl", TEXTS)
    index = prepare(config_for(source, tmp_path / "out", shard_size=None))
    assert 8 <= len(index.shards) <= 20
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == [shard.file for shard in index.shards]
    assert "100%" in lines[-1]


def test_a_slow_chunk_does_not_let_the_others_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the first chunk has been taken, at most 2 * workers + 1 are begun."""
    begun: list[int] = []

    def read_chunk(chunk: dataset.Chunk) -> Iterator[str]:
        begun.append(chunk.start)
        if chunk.start == 0:
            time.sleep(0.5)  # in which all others would be read if nothing held them back
        yield "text"

    monkeypatch.setattr(dataset, "read_chunk", read_chunk)
    chunks = [dataset.Chunk("x", i, i + 1, 1) for i in range(50)]
    results = dataset.tokenize(chunks, workers=2)
    next(results)
    assert len(begun) <= 5
    assert len(list(results)) == 49


def test_the_vocabulary_is_loaded_once_for_all_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "BATCH_DOCUMENTS", 3)  # work for all of them
    dataset.get_tokenizer.cache_clear()
    config = config_for(write(tmp_path / "a.jsonl", TEXTS), tmp_path / "out")
    prepare(dataclasses.replace(config, workers=4))
    assert dataset.get_tokenizer.cache_info().misses == 1


# ---- what is refused -----------------------------------------------------------------------------


def parquet(documents: Any, column: str = "text") -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({column: documents}), file, compression="zstd", use_dictionary=False)
    return file.getvalue()


PARQUET = parquet(TEXTS)
NO_UTF8 = pa.array([b"good", b"good", b"\xff\xfe"], pa.binary()).cast(pa.string(), safe=False)
# The content of a file, and what the message has to contain beside its name.
BAD_FILES: dict[str, tuple[bytes, list[str]]] = {
    "empty.jsonl": (b"", ["empty"]),
    "no_utf8.jsonl": (b'{"text": "a"}\n{"text": "\xff"}\n', ["line 2"]),
    "no_json.jsonl": (b'{"text": "a"}\n\n{"text": "b"\n', ["line 3"]),
    "no_key.jsonl": (b'{"text": "a"}\n{"body": "b"}\n', ["line 2", "`text`"]),
    "no_object.jsonl": (b'["text"]\n', ["line 1", "`text`"]),
    "no_string.jsonl": (b'{"text": 5}\n', ["line 1", "`text`", "5"]),
    "deep.jsonl": (b'{"text": ' + b"[" * 100_000 + b"\n", ["line 1"]),
    "latin_1.txt": (b"na\xefve", ["utf-8"]),
    "no_column.parquet": (parquet(["a"], column="body"), ["`text`", "body (string)"]),
    "numbers.parquet": (parquet([1]), ["text (int64)"]),
    "truncated.parquet": (PARQUET[:-100], ["is not a valid Parquet file"]),
    "damaged.parquet": (PARQUET[:100] + bytes(300) + PARQUET[400:], ["row 0"]),
    "no_utf8.parquet": (parquet(NO_UTF8), ["row 2"]),
    "no_suffix": (b"text", ["--source", ".parquet, .jsonl, .txt"]),
}


def error_of(result: tuple[int | str | None, str, str]) -> str:
    """The error line. Before it there may be lines about shards that could be written."""
    code, _, errors = result
    lines = [line for line in errors.splitlines() if ".npy:" not in line]
    assert (code, len(lines)) == (2, 1)
    return lines[0].removeprefix("dataset.py: ")


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_source_is_one_line_with_the_place_and_exit_code_2(
    name: str, tmp_path: Path, main: Main
) -> None:
    path = tmp_path / name
    content, parts = BAD_FILES[name]
    path.write_bytes(content)
    error = error_of(main("--source", path, "--data-dir", tmp_path / "out", "--shard-size", 10))
    assert all(part in error for part in [str(path), *parts])


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--source", "nowhere"], ["nowhere", "fineweb-edu, stdlib"]),
        (["--workers", -1, "--max-tokens", 0], ["max_tokens 0", "workers -1"]),
        (["--shard-size", 0], ["shard_size 0 must be at least 1"]),
        (["--verify"], ["no shards in"]),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(
    options: list[object], parts: list[str], tmp_path: Path, main: Main
) -> None:
    error = error_of(main("--data-dir", tmp_path / "out", *options))
    assert all(part in error for part in parts)


def test_a_folder_begun_with_other_options_is_left_alone(
    prepared: DatasetConfig, tmp_path: Path
) -> None:
    before = contents(prepared.data_dir)
    other = str(write(tmp_path / "b.jsonl", TEXTS[::-1]))
    for config, message in [
        (dataclasses.replace(prepared, shard_size=99), "shard_size was 100 and is now 99"),
        (dataclasses.replace(prepared, max_tokens=5), "max_tokens was None and is now 5"),
        (dataclasses.replace(prepared, source=other), "revision was .* and is now"),
    ]:
        with pytest.raises(ValueError, match=f"{message}.*give another --data-dir"):
            prepare(config)
        assert contents(prepared.data_dir) == before


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


def test_two_runs_cannot_write_into_one_folder(prepared: DatasetConfig) -> None:
    lock = common.lock_folder(prepared.data_dir, flag="--data-dir", name=".index.json.lock")
    with pytest.raises(ValueError, match="another run"):
        prepare(prepared)
    lock.release()
    prepare(prepared)


def test_an_edit_anywhere_in_a_source_is_noticed(prepared: DatasetConfig) -> None:
    source = Path(prepared.source)
    data = source.read_bytes()
    source.write_bytes(data.replace(b"Document 0", b"document 0", 1))
    with pytest.raises(ValueError, match=r"revision was .* and is now"):
        prepare(prepared)
    with mock.patch.object(dataset, "WHOLE_DIGEST_BYTES", 10):
        changed = dataset._content_digest(source)
        source.write_bytes(data)
        assert dataset._content_digest(source) != changed


def test_two_runs_that_begin_together_do_not_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.parquet", TEXTS)
    monkeypatch.setattr(dataset, "CHUNK_BYTES", 1)
    config = config_for(source, tmp_path / "out")
    open_source = dataset.open_source

    def open_slowly(*arguments: Any) -> Any:
        result = open_source(*arguments)
        monkeypatch.setattr(dataset, "open_source", open_source)
        prepare(config, rank=1, world_size=2)  # another run, meanwhile
        return result

    monkeypatch.setattr(dataset, "open_source", open_slowly)
    with pytest.raises(ValueError, match="world_size was 2 and is now 1"):
        prepare(config)
    prepare(config, rank=0, world_size=2)
    assert verify(config.data_dir) == []


def test_more_machines_than_parts_are_refused(prepared: DatasetConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(prepared, data_dir=tmp_path / "new")
    with pytest.raises(ValueError, match=r"WORLD_SIZE=2, .* 1 machines"):
        prepare(config, rank=0, world_size=2)


def test_an_unreadable_folder_among_the_sources_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "source" / "b").mkdir(parents=True)
    write(tmp_path / "source" / "a.jsonl", TEXTS)
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="source/b"):
        prepare(config_for(tmp_path / "source", tmp_path / "out"))


def test_a_fifo_is_no_source(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"a\.jsonl is not a regular file"):
        prepare(config_for(tmp_path / "a.jsonl", tmp_path / "out"))


def test_a_file_cut_short_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", TEXTS)
    size = path.stat().st_size
    os.truncate(path, size // 2)
    whole = dataset.Chunk(str(path), start=0, stop=size, size=size)
    with pytest.raises(ValueError, match=r"a\.jsonl"):
        list(dataset.read_chunk(whole))
    os.truncate(path, 0)
    with pytest.raises(ValueError, match=r"a\.jsonl was cut short"):
        list(dataset.read_chunk(whole))


class PlainKeys(encryption.KmsClient):
    """Keys of encrypted Parquet files that are no secret."""

    def __init__(self, config: object) -> None:
        super().__init__()

    def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> bytes:
        return base64.b64encode(key_bytes)

    def unwrap_key(self, wrapped_key: bytes, master_key_identifier: str) -> bytes:
        return base64.b64decode(wrapped_key)


@pytest.mark.parametrize("plaintext_footer", [True, False])
def test_encrypted_parquet_is_one_line(plaintext_footer: bool, tmp_path: Path, main: Main) -> None:
    settings = encryption.EncryptionConfiguration(
        footer_key="footer", column_keys={"text": ["text"]}, plaintext_footer=plaintext_footer
    )
    properties = encryption.CryptoFactory(PlainKeys).file_encryption_properties(
        encryption.KmsConnectionConfig(), settings
    )
    table = pa.table({"text": TEXTS})
    path = tmp_path / "a.parquet"
    with pq.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    assert str(path) in error_of(main("--source", path, "--data-dir", tmp_path / "out"))


def test_parquet_that_ends_the_process_is_named(tmp_path: Path) -> None:
    good = write(tmp_path / "good.parquet", TEXTS)
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"abort")
    script = dataset.PARQUET_CHECK.replace(
        "    try:", "    if 'bad' in path:\n        import os; os.abort()\n    try:"
    )
    dataset.check_parquet([str(good)])
    with (
        mock.patch.object(dataset, "PARQUET_CHECK", script),
        mock.patch.object(dataset, "CHECK_PROCESSES", 1),
        pytest.raises(ValueError, match=r"bad\.parquet .*ends the process"),
    ):
        dataset.check_parquet([str(good), str(bad), str(good)])


def test_rows_that_a_parquet_file_loses_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.parquet", TEXTS)
    chunk = dataset._chunks_of_file(str(path))[0]
    batches = pq.ParquetFile.iter_batches

    def lose(self: Any, *arguments: Any, **options: Any) -> Any:
        return itertools.islice(batches(self, *arguments, **options), 0)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lose)
    with pytest.raises(ValueError, match=r"a\.parquet: cannot read row 0: there should be 100"):
        list(dataset.read_chunk(chunk))


# What an index is made of, and what must be said of it.
Change = Callable[[dict[str, Any]], object]
BAD_INDEXES: dict[str, tuple[Change, str]] = {
    "path": (lambda i: i["shards"][0].update(file="../x_val_000000.npy"), "file"),
    "number": (lambda i: i["shards"][1].update(file="text_train_000007.npy"), "cannot be shard"),
    "tokens": (lambda i: i["shards"][0].update(tokens=-1), "tokens"),
    "text": (lambda i: i["shards"][0].update(tokens="many"), "tokens"),
    "next": (lambda i: i["shards"][0].update(next=[1]), "next"),
    "end": (lambda i: i["shards"][-1].update(next=[99, 0, 0]), "ends nowhere"),
    "used": (lambda i: i["shards"].pop() and i["shards"][-1].update(next=[0, 10**9, 0]), "tokens"),
    "list": (lambda i: i.update(shards=5), "shards"),
    "null": (lambda i: i.update(source=None), "source"),
    "rank": (lambda i: i.update(rank=3, world_size=4), "rank 3 of 4"),
    "zero": (lambda i: i.update(world_size=0), "world_size"),
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_a_damaged_index_is_one_line_with_its_name(case: str, prepared: DatasetConfig) -> None:
    change, message = BAD_INDEXES[case]
    path = prepared.data_dir / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"index\.json.*{message}"):
        prepare(prepared)


INCOMPLETE: dict[str, tuple[Change, str]] = {
    "unfinished": (lambda i: i.update(complete=False), r"index\.json is not complete"),
    "fewer": (lambda i: i["shards"].pop(), "tokens"),
    "missing": (lambda i: i["shards"][1].update(file="a_train_000001.npy"), "is missing"),
    "size": (lambda i: i["shards"][1].update(tokens=99), "bytes, not"),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_an_unfinished_folder_is_refused_with_the_command_that_finishes_it(
    case: str, prepared: DatasetConfig
) -> None:
    dataset.check_complete(prepared.data_dir)
    change, message = INCOMPLETE[case]
    path = prepared.data_dir / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    command = rf"`python dataset\.py --source \S+ --data-dir {prepared.data_dir} --shard-size 100`"
    with pytest.raises(ValueError, match=f"{message}.*{command}"):
        dataset.check_complete(prepared.data_dir)


def test_missing_parts_of_machines_are_named_and_no_index_is_fine(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for i in range(3):
        write(source / f"{i}.jsonl", TEXTS)
    config = config_for(source, tmp_path / "out")
    for rank in (0, 2):
        prepare(config, rank, 3)
    with pytest.raises(ValueError, match=r"machines \[1\] of 3 .*WORLD_SIZE=3"):
        dataset.check_complete(config.data_dir)
    prepare(config, 1, 3)
    dataset.check_complete(config.data_dir)
    for path in config.data_dir.glob("index*"):
        path.unlink()
    dataset.check_complete(config.data_dir)


# ---- verifying -----------------------------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)


def array(*shape: int, token: int = 0, dtype: Any = np.uint16) -> Callable[[Path], None]:
    return lambda path: np.save(path, np.full(shape, token, dtype))


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


SHARD = "text_train_000002.npy"
# The file that is damaged, how, and what the report must say of it.
DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a flipped bit": (SHARD, flip_a_bit, "SHA-256"),
    "gone": (SHARD, Path.unlink, "is missing"),
    "cut": (SHARD, lambda p: os.truncate(p, 300), "is not a valid .npy file"),
    "empty": (SHARD, lambda p: os.truncate(p, 0), "is not a valid .npy file"),
    "shorter": (SHARD, array(7), "has 7 tokens"),
    "int32": (SHARD, array(100, dtype=np.int32), "holds int32 (100,)"),
    "2-D": (SHARD, array(2, 50), "holds uint16 (2, 50)"),
    "no token": (SHARD, array(100, token=50257), "50257"),
    "archive": (SHARD, lambda p: np.savez(p.open("wb"), np.zeros(5)), "is not a valid .npy file"),
    "a folder": (SHARD, replace_by_folder, "is not a regular file"),
    "no tokens": (SHARD, array(0), "holds no token"),
    "a bad header": (SHARD, lambda p: p.write_bytes(b"\x93NUMPY\x01\x00\x76\x00{'(" * 30), "valid"),
    "misnamed": ("text_1.npy", array(9), "is not named"),
    "unknown": ("text_train_000999.npy", array(9), "is not in index.json"),
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
    assert (code, report.count("\n")) == (1, 2)
    lines = {line.split()[0]: line for line in report.splitlines()}
    assert problem in lines[str(out / name)]
    assert "has changed" in lines[str(out / "text_train_000004.npy")]


def test_a_missing_or_shortened_shard_is_written_again(prepared: DatasetConfig) -> None:
    before = contents(prepared.data_dir)
    (prepared.data_dir / SHARD).unlink()
    (prepared.data_dir / "text_train_000005.npy").write_bytes(b"short")
    prepare(prepared)
    assert contents(prepared.data_dir) == before


def test_verify_checks_shards_without_an_index(tmp_path: Path) -> None:
    np.save(tmp_path / "edufineweb_val_000000.npy", np.zeros(5, np.uint16))
    assert verify(tmp_path) == []
    np.save(tmp_path / "edufineweb_train_000001.npy", np.full(5, 60000, np.uint16))
    assert len(verify(tmp_path)) == 1


def test_every_flip_of_a_header_is_one_message_or_harmless(prepared: DatasetConfig) -> None:
    path = prepared.data_dir / SHARD
    data = path.read_bytes()
    expected = dataset.read_shard_header(path)
    for bit in range(128 * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            header = dataset.read_shard_header(path)
        except ValueError as error:
            message = str(error)
        else:
            assert header == expected
            continue
        assert message.startswith(f"{path} ")


def test_a_source_that_failed_before_the_first_shard_can_be_mended(
    tmp_path: Path, main: Main
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("not JSON\n")
    assert "line 1" in error_of(main("--source", source, "--data-dir", tmp_path / "out"))
    source.write_text('{"text": "a text"}\n')
    config = dataset.DatasetConfig(source=str(source), data_dir=tmp_path / "out")
    assert dataset.prepare(config).complete
