"""dataset.py against what goes wrong: kills, full disks, and a hub that breaks off and refuses."""

import gzip
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from hub_server import Handler, HubServer
from launcher import wait_for
from test_dataset import jsonl, read_files, shard_paths, write

import dataset
from dataset import DatasetConfig, prepare
from gptxs.files import lock_folder

SCRIPT = Path(dataset.__file__)
FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
WORDS = ["time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child"]


def texts_of(documents: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(1, 400))) for _ in range(documents)]


def write_source(folder: Path, files: int, documents: int) -> Path:
    """Parquet files like FineWeb-Edu's, with several columns and ten row groups each."""
    folder.mkdir(parents=True)
    for i in range(files):
        texts = texts_of(documents, seed=i)
        write(folder / f"{i:03d}_00000.parquet", texts, rows=documents // 10)
    return folder


def command(source: Path, out: Path, shard_size: int) -> list[str]:
    options = ["--source", source, "--data-dir", out, "--shard-size", shard_size, "--workers", 2]
    return [sys.executable, str(SCRIPT), *map(str, options)]


def prepared_files(source: Path, folder: Path, shard_size: int) -> dict[str, bytes]:
    """What a run that nothing disturbs writes."""
    with mock.patch("os.fsync"):
        prepare(DatasetConfig((str(source),), data_dir=folder, shard_size=shard_size))
    return read_files(folder)


def error_of(stderr: str) -> str:
    """The error, which must be a single line at the end."""
    assert "Traceback" not in stderr
    lines = stderr.splitlines()
    assert [line for line in lines if line.startswith("dataset.py: ")] == lines[-1:]
    return lines[-1]


def kill_at_random_moments(times: int, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", 8, 400)
    out = tmp_path / "killed"
    undisturbed = prepared_files(source, tmp_path / "undisturbed", 20_000)
    assert len(undisturbed) > 20
    moments = random.Random(0)
    kills = 0
    while kills < times:
        done = len(shard_paths(out))
        # All shards may be there already, of a process killed after the last of them.
        wanted = moments.randrange(done, max(done + 1, len(undisturbed) - 1))
        run = subprocess.Popen(command(source, out, 20_000), stderr=subprocess.DEVNULL)
        if wanted == done:  # while it starts, or anywhere if it is quick
            time.sleep(moments.uniform(0, 1))
        while run.poll() is None and len(shard_paths(out)) < wanted:
            time.sleep(0.001)
        run.kill()
        killed = run.wait() != 0
        kills += killed
        found = {path.name: path.read_bytes() for path in shard_paths(out)}
        assert found.items() <= undisturbed.items()  # no shard is wrong, at any moment
        # Half of the time it is killed a second time before it is complete.
        if not killed or kills == times or moments.random() < 0.5:
            subprocess.run(command(source, out, 20_000), check=True)
            assert read_files(out) == undisturbed
            shutil.rmtree(out)


def test_killed_at_8_moments_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    kill_at_random_moments(8, tmp_path)


@pytest.mark.soak
def test_killed_at_50_moments_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    kill_at_random_moments(50, tmp_path)


def test_a_failing_disk_is_one_line_and_keeps_the_shards_before(tmp_path: Path) -> None:
    """The system's own limit of a file's size, which the index reaches after some shards."""
    source = write_source(tmp_path / "source", 2, 40)
    out = tmp_path / "out"
    undisturbed = prepared_files(source, tmp_path / "undisturbed", 400)
    failed = subprocess.run(
        command(source, out, 400),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)),
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert failed.returncode == 1
    assert error_of(failed.stderr).startswith("dataset.py: [Errno 27] File too large; ")
    left = read_files(out)
    index = json.loads(left.pop("index.json"))
    assert left.items() <= undisturbed.items()
    times = {s["file"]: (out / s["file"]).stat().st_mtime_ns for s in index["shards"]}
    assert len(times) > 10
    subprocess.run(command(source, out, 400), check=True)
    assert read_files(out) == undisturbed
    assert times == {name: (out / name).stat().st_mtime_ns for name in times}  # not written twice


# Waits neither for the disk nor long before another try of `datasets` and huggingface_hub.
DRIVER = """
import os, sys
import datasets
import huggingface_hub.utils._http as http
http.http_backoff.__kwdefaults__.update(base_wait_time=0.01, max_wait_time=0.02)
datasets.config.STREAMING_READ_RETRY_INTERVAL = 0.01
datasets.config.STREAMING_READ_MAX_RETRIES = 3
os.fsync = lambda _: None
sys.argv[0] = "dataset.py"
sys.path.insert(0, sys.argv.pop(1))
import dataset
dataset.main()
"""
README = """---
configs:
- {config_name: default, data_files: [{split: train, path: sample/10BT/000*}]}
- {config_name: sample-10BT, data_files: [{split: train, path: sample/10BT/*}]}
---
"""


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same texts as Parquet files like FineWeb-Edu's and in a JSONL file."""
    folder = tmp_path_factory.mktemp("hub")
    write_source(folder / "fineweb/sample/10BT", 2, 400)
    (folder / "fineweb/README.md").write_text(README)
    texts = texts_of(400, seed=0) + texts_of(400, seed=1)
    (folder / "lines").mkdir()
    (folder / "lines/train.jsonl.gz").write_bytes(gzip.compress(jsonl(texts)))
    return {FINEWEB_EDU: folder / "fineweb", "o/lines": folder / "lines"}


@pytest.fixture(scope="module")
def undisturbed(repos: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """FineWeb-Edu's files tokenized from the disk: the shards that a hub must give too."""
    out = tmp_path_factory.mktemp("undisturbed")
    prepared_files(repos[FINEWEB_EDU] / "sample" / "10BT", out, 1500)
    return shards(out)


@pytest.fixture
def hub(repos: dict[str, Path]) -> Iterator[HubServer]:
    with HubServer(repos) as server:
        yield server


def shards(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in shard_paths(folder)]


def run(
    hub: HubServer, folder: Path, *options: str, stop: int = 0, **environment: str
) -> tuple[int, str]:
    """Its exit code and standard error; ``stop`` is a signal that it gets after some shards."""
    out = folder / "out"
    arguments = ["--data-dir", str(out), "--shard-size", "1500", *options]
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(SCRIPT.parent), *arguments],
        cwd=hub.repos[FINEWEB_EDU].parent,
        env={**os.environ, **hub.environment(folder / "cache"), **environment},
        stderr=subprocess.PIPE,
        pipesize=4096,  # less than the lines for all shards: it cannot end before it is stopped
        text=True,
    )
    if stop:
        wait_for(lambda: process.poll() is not None or len(shard_paths(out)) > 2)
        with pytest.raises(ValueError, match="another process writes there"):
            lock_folder(out, flag="--data-dir")
        process.send_signal(stop)
    errors = process.communicate(timeout=300)[1]
    return process.returncode, errors


@pytest.mark.parametrize(
    ("source", "number"),
    [
        ("fineweb-edu", signal.SIGINT),
        ("o/lines", signal.SIGKILL),
        ("fineweb/sample", signal.SIGINT),  # the same files, but on the disk
        ("lines/train.jsonl.gz", signal.SIGINT),
    ],
)
def test_stopped_it_leaves_complete_shards_and_resumed_it_has_the_same_bytes(
    source: str, number: int, hub: HubServer, undisturbed: list[bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, errors = run(hub, tmp_path, "--source", source, stop=number)
    if number == signal.SIGINT:
        assert code == 130
        *lines, error = errors.splitlines()
        assert "dataset.py: interrupted; " in error  # after a shard's line that has no end yet
        assert all("_000" in line for line in lines)  # those for shards, and no warning
        assert list(out.glob(".*.tmp")) == []
    kept = shards(out)
    assert 0 < len(kept) < len(undisturbed)
    assert kept == undisturbed[: len(kept)]
    code, errors = run(hub, tmp_path, "--source", source)
    assert code == 0, errors
    assert shards(out) == undisturbed


def test_a_bad_connection_changes_nothing_and_a_lost_one_keeps_the_work(
    hub: HubServer, tmp_path: Path, undisturbed: list[bytes]
) -> None:
    out = tmp_path / "out"
    kinds = itertools.cycle(("half", 429, "dropped", 503, "slow"))
    asked: set[object] = set()
    seen: set[object] = set()
    lost_after_the_first_shard = True

    def fault(handler: Handler, path: Path) -> bool:
        request = (path, handler.headers["Range"])  # each fails once
        kind = "fine" if request in asked or path.suffix != ".parquet" else next(kinds)
        if lost_after_the_first_shard and shard_paths(out):
            kind = 503
        asked.add(request)
        seen.add(kind)
        handler.breaks_off = kind == "half"
        handler.close_connection |= kind == "dropped"
        time.sleep(0.3 * (kind == "slow"))
        if isinstance(kind, int):
            handler.answer(kind)
        return kind in ("dropped", 429, 503)

    hub.fault = fault
    code, errors = run(hub, tmp_path, "--workers", "1")
    assert code == 1
    error_of(errors)
    kept = shards(out)
    assert 0 < len(kept) < len(undisturbed)
    assert kept == undisturbed[: len(kept)]
    lost_after_the_first_shard = False
    asked.clear()
    seen.clear()
    code, errors = run(hub, tmp_path)
    assert code == 0, errors
    assert seen == {"fine", "half", "slow", 429, 503, "dropped"}
    assert shards(out) == undisturbed
    index = json.loads((out / "index.json").read_text())
    assert (index["source"], index["revision"]) == ("fineweb-edu", hub.commit(FINEWEB_EDU))
    assert index["shards"][0]["file"] == "edufineweb_val_000000.npy"


@pytest.mark.parametrize("endpoint", ["http://hub.invalid", "http://127.0.0.1:9", "hub.invalid"])
def test_without_a_hub_it_says_so_at_once(endpoint: str, hub: HubServer, tmp_path: Path) -> None:
    start = time.monotonic()
    code, errors = run(hub, tmp_path, HF_ENDPOINT=endpoint)
    assert time.monotonic() - start < 20
    assert code == (1 if "://" in endpoint else 2)
    assert f"HF_ENDPOINT {endpoint}" in error_of(errors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--name", "sample-10B"), "sample-10BT"),
        (("--revision", "v9"), "v9"),
        (("--split", "test"), "train"),
        (("--column", "body"), "id, text"),
        (("--source", "o/none"), "o/none"),
    ],
)
def test_what_the_hub_does_not_have_is_a_mistake(
    options: tuple[str, ...], message: str, hub: HubServer, tmp_path: Path
) -> None:
    code, errors = run(hub, tmp_path, *options)
    assert code == 2, errors
    assert message in error_of(errors)
