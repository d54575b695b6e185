"""dataset.py: the shards are the documents' tokens, whatever the source and the workers."""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dataset
from dataset import DatasetConfig, prepare, verify

TEXTS = [f"Document {i}. " + "The quick brown fox jumps. " * (i % 7) for i in range(100)]


def write_jsonl(path: Path, texts: list[str | None]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts))
    return path


def write_parquet(path: Path, texts: list[Any], rows: int = 10) -> Path:
    table = pa.table({"id": list(range(len(texts))), "text": pa.array(texts, pa.string())})
    pq.write_table(table, path, row_group_size=rows)
    return path


def config_for(source: Path | str, folder: Path, **options: Any) -> DatasetConfig:
    options = {"shard_size": 100, "workers": 2, **options}
    return DatasetConfig(source=str(source), data_dir=folder, **options)


def shards(folder: Path) -> list[np.ndarray]:
    return [np.load(path) for path in sorted(folder.glob("*.npy"), key=lambda p: p.stem[-6:])]


def expected(texts: list[str]) -> np.ndarray:
    encode = dataset.get_tokenizer().encode_ordinary
    return np.array([token for text in texts for token in (50256, *encode(text))], np.uint16)


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int | str | None:
    """`python dataset.py ARGUMENTS` inside this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["dataset.py", *map(str, arguments)])
    try:
        dataset.main()
    except SystemExit as exit_:
        return exit_.code
    return 0


# ---- what is written -----------------------------------------------------------------------------


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    files=st.lists(
        st.lists(st.none() | st.text(max_size=30), min_size=1, max_size=8), min_size=1, max_size=4
    ),
    shard_size=st.integers(1, 60),
    workers=st.integers(1, 4),
    max_tokens=st.none() | st.integers(1, 100),
    unit_bytes=st.sampled_from([1, 50, 1000]),
    parquet=st.booleans(),
    interruptions=st.lists(st.integers(1, 6), max_size=3),
)
def test_shards_are_the_concatenated_documents_cut_at_multiples_of_their_size(
    files: list[list[str | None]],
    shard_size: int,
    workers: int,
    max_tokens: int | None,
    unit_bytes: int,
    parquet: bool,
    interruptions: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dataset, "UNIT_BYTES", unit_bytes)
    monkeypatch.setattr(dataset, "BATCH", 3)
    with tempfile.TemporaryDirectory() as temporary:
        source, out = Path(temporary, "source"), Path(temporary, "out")
        source.mkdir()
        for i, texts in enumerate(files):
            if parquet:
                write_parquet(source / f"{i}.parquet", texts, rows=2)
            else:
                write_jsonl(source / f"{i}.jsonl", texts)
        options = {"shard_size": shard_size, "max_tokens": max_tokens, "workers": workers}
        for writes in interruptions:
            with fail_after(writes), contextlib.suppress(OSError):
                prepare(config_for(source, out, **options))
        index = prepare(config_for(source, out, **options))
        documents = [text for texts in files for text in texts if text]
        whole = expected(documents)[:max_tokens]
        found = shards(out)
        assert np.array_equal(np.concatenate([np.empty(0, np.uint16), *found]), whole)
        assert all(len(shard) == shard_size for shard in found[:-1])
        assert [shard["tokens"] for shard in index["shards"]] == [len(shard) for shard in found]
        assert index["tokens"] == len(whole)
        if max_tokens is None:
            assert index["documents"] == len(documents)
            assert index["skipped"] == sum(map(len, files)) - len(documents)
        assert not found or verify(out) == []


@contextlib.contextmanager
def fail_after(writes: int) -> Any:
    """Lets that many files reach the disk and then no more, as a full disk would."""
    original, left = os.fsync, writes * 2

    def fsync(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        original(descriptor)

    os.fsync = fsync
    try:
        yield
    finally:
        os.fsync = original


def test_text_and_parquet_and_jsonl_of_the_same_documents_are_the_same_shards(
    tmp_path: Path,
) -> None:
    (tmp_path / "txt").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "txt" / f"{i:03d}.txt").write_text(text)
    sources = [
        tmp_path / "txt",
        write_jsonl(tmp_path / "all.jsonl", TEXTS),
        write_parquet(tmp_path / "all.parquet", TEXTS),
    ]
    for i, source in enumerate(sources):
        prepare(config_for(source, tmp_path / str(i)))
        assert np.array_equal(np.concatenate(shards(tmp_path / str(i))), expected(TEXTS))


def test_names_formats_and_index_are_as_documented(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", TEXTS)
    index = prepare(config_for(source, tmp_path / "out", shard_size=300))
    names = sorted(path.name for path in (tmp_path / "out").glob("*.npy"))
    assert names[:2] == ["text_train_000001.npy", "text_train_000002.npy"]
    assert names[-1] == "text_val_000000.npy"
    assert json.loads((tmp_path / "out" / "index.json").read_text()) == index
    assert index["tokenizer"] == "gpt2"
    for shard in index["shards"]:
        path = tmp_path / "out" / shard["file"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]
        tokens = np.load(path, mmap_mode="r")
        assert (tokens.dtype, tokens.shape) == (np.uint16, (shard["tokens"],))
        path.write_bytes(b"")
        np.save(path, tokens := expected(TEXTS)[:300])  # NumPy itself writes the same bytes
        assert path.stat().st_size == 128 + 2 * len(tokens)
        break


def test_files_are_read_in_the_order_of_their_names_and_others_ignored(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "b").mkdir(parents=True)
    write_jsonl(source / "b" / "1.jsonl", ["third"])
    write_jsonl(source / "a2.jsonl", ["second"])
    (source / "a1.txt").write_text("first")
    (source / "README.md").write_text("no")
    (source / ".hidden.txt").write_text("no")
    prepare(config_for(source, tmp_path / "out"))
    assert np.array_equal(shards(tmp_path / "out")[0], expected(["first", "second", "third"]))


def test_several_machines_write_the_same_documents_into_one_folder(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for i in range(7):
        write_parquet(source / f"{i}.parquet", TEXTS[i::7])
    prepare(config_for(source, tmp_path / "one"))
    for rank in (2, 0, 3, 1):
        prepare(config_for(source, tmp_path / "four"), rank, 4)
    four, one = (np.concatenate(shards(tmp_path / name)) for name in ("four", "one"))
    assert np.array_equal(four, one)
    assert [p.name for p in (tmp_path / "four").glob("*_val_*")] == ["text_val_000000.npy"]
    assert len(list((tmp_path / "four").glob("index*.json"))) == 4
    assert verify(tmp_path / "four") == []
    with pytest.raises(ValueError, match="world_size 4 there, 1 here"):
        prepare(config_for(source, tmp_path / "four"))


def test_the_embedded_corpus_is_the_same_each_time_and_a_fair_mix(tmp_path: Path) -> None:
    index = prepare(config_for("stdlib", tmp_path / "a", shard_size=50_000))
    again = prepare(config_for("stdlib", tmp_path / "b", shard_size=50_000, workers=1))
    assert index == again
    assert 300_000 < index["tokens"] < 3_000_000
    # Manual pages are in reStructuredText with a title underlined by stars, docstrings are not.
    decode = dataset.get_tokenizer().decode
    halves = np.array_split(np.concatenate(shards(tmp_path / "a")), 4)
    assert all(decode(part.tolist()).count("\n****") >= 5 for part in halves)


def test_a_small_source_gets_about_ten_shards(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    prepare(config_for(source, tmp_path / "out", shard_size=None))
    assert 8 <= len(shards(tmp_path / "out")) <= 20


def test_a_slow_unit_does_not_let_the_others_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first unit stuck, no more than 2 * workers + 1 units may be begun."""
    begun, go = [], threading.Event()

    def read_unit(unit: dataset.Unit) -> Any:
        begun.append(unit.start)
        if unit.start == 0:
            go.wait(10)
        yield "text"

    monkeypatch.setattr(dataset, "read_unit", read_unit)
    units = [dataset.Unit("x", i, i + 1, 1) for i in range(50)]
    results = dataset.tokenize(units, workers=2)
    threading.Timer(0.5, lambda: (most.append(len(begun)), go.set())).start()
    most: list[int] = []
    assert len(list(results)) == 50
    assert most[0] <= 5


# ---- what is refused -----------------------------------------------------------------------------


def truncated_parquet(folder: Path) -> None:
    path = write_parquet(folder / "cut.parquet", TEXTS)
    path.write_bytes(path.read_bytes()[:-100])


def damaged_parquet(folder: Path) -> None:
    path = folder / "damaged.parquet"
    pq.write_table(pa.table({"text": TEXTS}), path, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[100:400] = bytes(300)
    path.write_bytes(data)


def parquet_with_bad_utf8(folder: Path) -> None:
    raw = pa.array([b"good", b"good", b"\xff\xfe"], pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": raw}), folder / "bad.parquet", use_dictionary=False)


BAD_SOURCES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no files": (lambda d: None, "holds no file that ends in .parquet, .jsonl, .txt"),
    "an empty file": (lambda d: (d / "e.jsonl").touch(), "e.jsonl is empty: remove it"),
    "invalid UTF-8": (
        lambda d: (d / "u.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n'),
        "u.jsonl: line 2: 'utf-8' codec can't decode",
    ),
    "no JSON": (
        lambda d: (d / "j.jsonl").write_text('{"text": "a"}\n\n{"text": "b"\n'),
        "j.jsonl: line 3: Expecting",
    ),
    "no key": (
        lambda d: (d / "k.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n'),
        "k.jsonl: line 2: no `text`",
    ),
    "no string": (
        lambda d: (d / "s.jsonl").write_text('{"text": 5}\n'),
        "s.jsonl: line 1: `text` is no string but 5",
    ),
    "text in Latin-1": (
        lambda d: (d / "l.txt").write_bytes(b"na\xefve"),
        "l.txt: 'utf-8' codec can't decode",
    ),
    "no column": (
        lambda d: pq.write_table(pa.table({"body": ["a"]}), d / "c.parquet"),
        "c.parquet has no column `text` of strings, but body (string)",
    ),
    "a column of numbers": (
        lambda d: pq.write_table(pa.table({"text": [1]}), d / "n.parquet"),
        "n.parquet has no column `text` of strings, but text (int64)",
    ),
    "an empty Parquet file": (lambda d: (d / "e.parquet").touch(), "e.parquet is empty"),
    "a truncated Parquet file": (truncated_parquet, "cut.parquet is no whole Parquet file"),
    "a damaged Parquet file": (damaged_parquet, "damaged.parquet: row 0 cannot be read"),
    "Parquet with invalid UTF-8": (parquet_with_bad_utf8, "bad.parquet: row 2 cannot be read"),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_a_bad_source_is_one_line_that_names_the_place(
    case: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make, message = BAD_SOURCES[case]
    source = tmp_path / "source"
    source.mkdir()
    make(source)
    out = tmp_path / "out"
    assert run_main(monkeypatch, "--source", source, "--data-dir", out, "--shard-size", 10) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.splitlines()[-1].startswith("dataset.py: ")
    assert sum(line.startswith("dataset.py: ") for line in error.splitlines()) == 1
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--source", "nowhere"), "no --source nowhere: give fineweb-edu, stdlib or"),
        (("--source", "stdlib", "--shard-size", 0), "shard_size 0: must be at least 1"),
        (
            ("--source", "stdlib", "--workers", -1, "--max-tokens", 0),
            "max_tokens 0, workers -1: must be at least 1",
        ),
        (("--verify",), "no shards in"),
    ],
)
def test_bad_options_exit_with_2_and_one_line(
    arguments: tuple[object, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_main(monkeypatch, "--data-dir", tmp_path, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("dataset.py: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard_size": 99}, "shard_size 100 there, 99 here"),
        ({"max_tokens": 5}, "max_tokens None there, 5 here"),
        ({"source": "b"}, "revision"),
    ],
)
def test_a_folder_begun_with_other_options_is_left_alone(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    write_jsonl(tmp_path / "b.jsonl", TEXTS[::-1])
    options = {"source": "a", "shard_size": 100}
    out = tmp_path / "out"
    prepare(config_for(tmp_path / "a.jsonl", out))
    before = {path: path.read_bytes() for path in out.iterdir()}
    options.update(change)
    with pytest.raises(ValueError, match=message) as error:
        prepare(config_for(tmp_path / f"{options.pop('source')}.jsonl", out, **options))
    assert "give another --data-dir" in str(error.value)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_shards_from_elsewhere_are_left_alone(tmp_path: Path) -> None:
    np.save(tmp_path / "edufineweb_val_000000.npy", np.zeros(5, np.uint16))
    with pytest.raises(ValueError, match=r"holds shards but no index\.json"):
        prepare(config_for(write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path))


def test_two_runs_into_one_folder_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with open(tmp_path / ".index.json.lock", "w") as lock:
        dataset.fcntl.flock(lock, dataset.fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another run writes to"):
            prepare(config_for(source, tmp_path))
    prepare(config_for(source, tmp_path))


# ---- verifying -----------------------------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (flip_a_bit, "has changed: another SHA-256"),
    "gone": (Path.unlink, "is missing"),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-2]), "is no whole NumPy file"),
    "empty": (lambda p: p.write_bytes(b""), "is no whole NumPy file"),
    "shorter": (lambda p: np.save(p, np.zeros(7, np.uint16)), "has 7 tokens, of 100"),
    "int32": (lambda p: np.save(p, np.zeros(100, np.int32)), "holds int32 (100,), not uint16"),
    "2-D": (lambda p: np.save(p, np.zeros((2, 50), np.uint16)), "holds uint16 (2, 50), not"),
    "no token": (lambda p: np.save(p, np.full(100, 50257, np.uint16)), "has a token 50257, of"),
    "renamed": (lambda p: p.rename(p.with_name("text_1.npy")), "is not named like a shard"),
    "unknown": (
        lambda p: np.save(p.with_name("text_train_000999.npy"), np.zeros(9, np.uint16)),
        "is not in index.json",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_verify_reports_every_bad_shard_and_exits_with_1(
    case: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage, message = DAMAGES[case]
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    out = tmp_path / "out"
    prepare(config_for(source, out))
    assert run_main(monkeypatch, "--verify", "--data-dir", out) == 0
    assert "every shard is good" in capsys.readouterr().out
    damage(out / "text_train_000002.npy")
    damage_elsewhere = out / "text_train_000004.npy"
    flip_a_bit(damage_elsewhere)
    assert run_main(monkeypatch, "--verify", "--data-dir", out) == 1
    report = capsys.readouterr().out
    assert message in report
    assert f"{damage_elsewhere} has changed" in report


def test_a_missing_or_shortened_shard_is_written_again(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    out = tmp_path / "out"
    prepare(config_for(source, out))
    before = {path.name: path.read_bytes() for path in out.glob("*")}
    (out / "text_train_000002.npy").unlink()
    (out / "text_train_000005.npy").write_bytes(b"short")
    prepare(config_for(source, out))
    assert {path.name: path.read_bytes() for path in out.glob("*")} == before


def test_verify_checks_shards_without_an_index(tmp_path: Path) -> None:
    np.save(tmp_path / "edufineweb_val_000000.npy", np.zeros(5, np.uint16))
    assert verify(tmp_path) == []
    np.save(tmp_path / "edufineweb_train_000001.npy", np.full(5, 60000, np.uint16))
    assert len(verify(tmp_path)) == 1
