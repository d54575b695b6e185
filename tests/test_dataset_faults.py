"""dataset.py against what goes wrong: kills, full disks, and a hub that breaks off and refuses."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import Handler, HubServer

import dataset
from dataset import DatasetConfig, prepare, verify

SCRIPT = Path(dataset.__file__)
WORDS = ["time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child"]
README = """---
configs:
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
---
"""


def write_parquet_files(folder: Path, files: int, documents: int) -> Path:
    """Files like FineWeb-Edu's: several row groups, several columns."""
    rng = random.Random(0)
    folder.mkdir(parents=True)
    for i in range(files):
        texts = [" ".join(rng.choices(WORDS, k=rng.randrange(1, 400))) for _ in range(documents)]
        table = pa.table({"id": [f"{i}-{j}" * 9 for j in range(documents)], "text": texts})
        pq.write_table(table, folder / f"{i:03d}_00000.parquet", row_group_size=documents // 4)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """The shards and the index, without hidden files."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}


def assert_nothing_half_written(folder: Path) -> None:
    for path in folder.glob("*.npy"):
        np.load(path)
    assert not list(folder.glob(".*.tmp"))


# ---- killed --------------------------------------------------------------------------------------


def kill_at_random_moments(times: int, folder: Path) -> None:
    source = write_parquet_files(folder / "source", 8, 400)

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, SCRIPT, "--source", source, "--data-dir", out]
        command += ["--shard-size", "20000", "--workers", "2"]
        return subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)

    begin = time.perf_counter()
    assert start(folder / "whole").wait() == 0
    duration = time.perf_counter() - begin
    whole = contents(folder / "whole")
    assert len(whole) > 20
    moments = random.Random(os.getpid())
    out, kills = folder / "killed", 0
    for _ in range(times):
        done = len(list(out.glob("*.npy")))
        wanted = moments.randrange(done, len(whole))  # of one shard less, and the index
        run = start(out)
        if wanted == done:  # before its first shard, or anywhere if it is quick
            time.sleep(moments.uniform(0, duration))
        while run.poll() is None and len(list(out.glob("*.npy"))) < wanted:
            time.sleep(0.001)
        with contextlib.suppress(ProcessLookupError):  # it was done before
            os.killpg(run.pid, signal.SIGKILL)
        kills += run.wait() != 0
        if out.exists():  # nothing that was there may be wrong, at any moment
            found = contents(out)
            assert all(whole[name] == data for name, data in found.items() if name != "index.json")
        if moments.random() < 0.5:  # half of the time it is killed again, before it is done
            continue
        assert start(out).wait() == 0
        assert contents(out) == whole
        assert_nothing_half_written(out)
        for path in out.iterdir():
            path.unlink()
    assert start(out).wait() == 0
    assert contents(out) == whole
    assert kills > times // 4


def test_killed_at_8_moments_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    kill_at_random_moments(8, tmp_path)


@pytest.mark.soak
def test_killed_at_50_moments_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    kill_at_random_moments(50, tmp_path)


def test_an_interrupt_leaves_whole_shards_and_one_line(tmp_path: Path) -> None:
    source = write_parquet_files(tmp_path / "source", 8, 400)
    command = [sys.executable, SCRIPT, "--source", source, "--data-dir", tmp_path / "out"]
    command += ["--shard-size", "2000"]  # hundreds of shards, in the midst of which it comes
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert run.stderr is not None
    first = run.stderr.readline()  # the line of the first shard
    run.send_signal(signal.SIGINT)
    error = first + run.stderr.read()
    assert run.wait() == 130
    assert error.splitlines()[-1] == "dataset.py: interrupted; run it again to go on"
    assert "Traceback" not in error
    assert_nothing_half_written(tmp_path / "out")


# ---- a full disk ---------------------------------------------------------------------------------


def test_a_file_size_limit_is_one_line_and_can_be_gone_on_from(tmp_path: Path) -> None:
    source = write_parquet_files(tmp_path / "source", 2, 100)
    command = [sys.executable, str(SCRIPT), "--source", str(source), "--shard-size", "9000"]
    command += ["--data-dir", str(tmp_path / "out")]
    # 9,000 tokens do not fit into a file of 10,000 bytes; the index does.
    limited = "import resource, runpy, sys; sys.argv = sys.argv[1:];"
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000));"
    limited += "runpy.run_path(sys.argv[0], run_name='__main__')"
    dataset.get_tokenizer()  # tiktoken keeps a copy of its files, larger than the limit
    run = subprocess.run(
        [sys.executable, "-c", limited, *command[1:]], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert run.stderr == "dataset.py: [Errno 27] File too large; run it again to go on\n"
    assert_nothing_half_written(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*")] != []
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert verify(tmp_path / "out") == []


def test_a_disk_that_fills_up_keeps_the_shards_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_parquet_files(tmp_path / "source", 2, 100)
    whole = DatasetConfig(str(source), data_dir=tmp_path / "whole", shard_size=5000)
    out = DatasetConfig(str(source), data_dir=tmp_path / "out", shard_size=5000)
    prepare(whole)
    fsync, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 15:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        prepare(out)
    monkeypatch.undo()
    kept = contents(tmp_path / "out")
    assert len(kept) > 2
    assert_nothing_half_written(tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*_00000[01].npy")}
    prepare(out)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert times == {path: path.stat().st_mtime_ns for path in times}  # not written twice


# ---- the hub -------------------------------------------------------------------------------------

# Pauses between the tries are shortened, in dataset.py as well as in huggingface_hub.
DRIVER = """
import sys
import huggingface_hub.utils._http as http
http.http_backoff.__kwdefaults__.update(base_wait_time=0.01, max_wait_time=0.02, max_retries=2)
sys.path.insert(0, sys.argv.pop(1))
import dataset
dataset.RETRY_PAUSES = (0.01, 0.02)
dataset.UNIT_BYTES = 100_000
dataset.main()
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository like FineWeb-Edu's."""
    folder = tmp_path_factory.mktemp("hub") / "repo"
    write_parquet_files(folder / "sample" / "10BT", 2, 400)
    (folder / "README.md").write_text(README)
    return folder


@pytest.fixture(scope="module")
def undisturbed(files: Path, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The same files tokenized from the disk: the shards that a hub must give too."""
    out = tmp_path_factory.mktemp("undisturbed")
    source = str(files / "sample" / "10BT")
    prepare(DatasetConfig(source, data_dir=out, shard_size=20_000))
    return shards(out)


@pytest.fixture
def hub(files: Path) -> Iterator[HubServer]:
    with HubServer({dataset.HUB_DATASET: files}) as server:
        yield server


def shards(folder: Path) -> list[bytes]:
    paths = sorted(folder.glob("*.npy"), key=lambda path: path.stem[-6:])
    return [path.read_bytes() for path in paths]


def run(hub: HubServer, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", DRIVER, str(SCRIPT.parent), "--data-dir", str(folder / "out")]
    return subprocess.run(
        [*command, "--shard-size", "20000", *options],
        env={**os.environ, **hub.environment(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def data_requests(fault: Callable[[Handler, int], bool]) -> Callable[[Handler, Path], bool]:
    """A fault that is given the number of each request for data, from 0."""
    count = -1

    def apply(handler: Handler, path: Path) -> bool:
        nonlocal count
        count += path.suffix == ".parquet"
        return path.suffix == ".parquet" and fault(handler, count)

    return apply


def test_the_hub_gives_the_shards_of_the_same_files_on_disk(
    hub: HubServer, tmp_path: Path, undisturbed: list[bytes]
) -> None:
    finished = run(hub, tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert shards(tmp_path / "out") == undisturbed
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["revision"] == hub.commit(dataset.HUB_DATASET)
    assert index["source"] == "HuggingFaceFW/fineweb-edu sample-10BT"
    assert {path.name[:10] for path in (tmp_path / "out").glob("*.npy")} == {"edufineweb"}


def test_a_bad_connection_changes_nothing(
    hub: HubServer, tmp_path: Path, undisturbed: list[bytes]
) -> None:
    parquet = next((hub.repos[dataset.HUB_DATASET] / "sample" / "10BT").iterdir())

    def fault(handler: Handler, request: int) -> bool:
        kind = ("fine", "broken", "slow", 429, 503, "fine", "dropped")[request % 7]
        if kind == "slow":
            time.sleep(0.3)
        elif kind == "broken":
            handler.break_off(parquet)
        elif kind == "dropped":
            handler.close_connection = True
        elif kind != "fine":
            handler.refuse(int(kind))
        return kind not in ("fine", "slow")

    hub.fault = data_requests(fault)
    finished = run(hub, tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert shards(tmp_path / "out") == undisturbed


def test_a_hub_that_fails_for_good_is_one_line_and_the_work_is_kept(
    hub: HubServer, tmp_path: Path, undisturbed: list[bytes]
) -> None:
    def fault(handler: Handler, request: int) -> bool:
        if request > 8:
            handler.refuse(503)
        return request > 8

    hub.fault = data_requests(fault)
    failed = run(hub, tmp_path, "--workers", "1")
    assert failed.returncode == 1
    lines = [line for line in failed.stderr.splitlines() if line.startswith("dataset.py")]
    assert len(lines) == 1
    assert "503" in lines[0]
    assert "run it again to go on" in lines[0]
    assert "Traceback" not in failed.stderr
    kept = shards(tmp_path / "out")
    assert 0 < len(kept) < len(undisturbed)
    assert kept == undisturbed[: len(kept)]
    hub.fault = None
    finished = run(hub, tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert shards(tmp_path / "out") == undisturbed


def test_no_hub_at_all_is_one_line(hub: HubServer, tmp_path: Path) -> None:
    with HubServer({}) as gone:
        pass
    failed = run(gone, tmp_path)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("dataset.py: the source cannot be read: ")
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--name", "sample-10B"), "sample-10BT"), (("--revision", "v9"), "v9")],
)
def test_an_unknown_part_or_revision_is_a_mistake(
    options: tuple[str, ...], message: str, hub: HubServer, tmp_path: Path
) -> None:
    failed = run(hub, tmp_path, *options)
    assert failed.returncode == 2, failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("dataset.py: ")
    assert message in failed.stderr.splitlines()[-1]
    assert "Traceback" not in failed.stderr
