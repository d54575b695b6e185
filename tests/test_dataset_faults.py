"""dataset.py against what goes wrong: kills, full disks, and a hub that breaks off and refuses."""

import csv
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

import numpy as np
import pytest
from hub_server import Handler, HubServer
from test_dataset import contents, jsonl, shard_paths, write

import dataset
from dataset import DatasetConfig, prepare
from gptxs.tokenizer import get_tokenizer

SCRIPT = Path(dataset.__file__)
FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
WORDS = ["time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child"]
README = (
    "---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n"
    "  - split: train\n    path: sample/10BT/*\n---\n"
)


def texts_of(documents: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(1, 400))) for _ in range(documents)]


def write_source(folder: Path, files: int, documents: int) -> Path:
    """Parquet files like FineWeb-Edu's, with several columns and four row groups each."""
    folder.mkdir(parents=True)
    for i in range(files):
        texts = texts_of(documents, seed=i)
        write(folder / f"{i:03d}_00000.parquet", texts, rows=documents // 4)
    return folder


def assert_nothing_incomplete(folder: Path) -> None:
    for path in folder.glob("*.npy"):
        np.load(path)
    assert not list(folder.glob(".*.tmp"))


def command(source: Path, out: Path, shard_size: int) -> list[str]:
    options = ["--source", source, "--data-dir", out, "--shard-size", shard_size, "--workers", 2]
    return [sys.executable, str(SCRIPT), *map(str, options)]


# ---- killed --------------------------------------------------------------------------------------


def kill_at_random_moments(times: int, folder: Path) -> None:
    source = write_source(folder / "source", 8, 400)
    out = folder / "killed"
    subprocess.run(command(source, folder / "undisturbed", 20_000), check=True)
    undisturbed = contents(folder / "undisturbed")
    assert len(undisturbed) > 20
    moments = random.Random(0)
    kills = 0
    while kills < times:
        done = len(list(out.glob("*.npy")))
        # All shards may be there already, of a process killed after the last of them.
        wanted = moments.randrange(done, max(done + 1, len(undisturbed) - 1))
        run = subprocess.Popen(command(source, out, 20_000), stderr=subprocess.DEVNULL)
        if wanted == done:  # while it starts, or anywhere if it is quick
            time.sleep(moments.uniform(0, 1))
        while run.poll() is None and len(list(out.glob("*.npy"))) < wanted:
            time.sleep(0.001)
        run.kill()
        killed = run.wait() != 0
        kills += killed
        if out.exists():  # no shard that is there may be wrong, at any moment
            found = {path.name: path.read_bytes() for path in out.glob("*.npy")}
            assert found.items() <= undisturbed.items()
        # Half of the time it is killed a second time before it is complete.
        if not killed or kills == times or moments.random() < 0.5:
            subprocess.run(command(source, out, 20_000), check=True)
            assert contents(out) == undisturbed
            assert_nothing_incomplete(out)
            shutil.rmtree(out)


def test_killed_at_8_moments_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    kill_at_random_moments(8, tmp_path)


@pytest.mark.soak
def test_killed_at_50_moments_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    kill_at_random_moments(50, tmp_path)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_an_interrupt_leaves_complete_shards_and_one_line(suffix: str, tmp_path: Path) -> None:
    source = write(tmp_path / f"a{suffix}", texts_of(800))
    # The lines for its shards are more than the pipe holds, so it cannot end before the interrupt.
    arguments = command(source, tmp_path / "out", shard_size=1500)
    run = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, pipesize=4096)
    while run.poll() is None and len(shard_paths(tmp_path / "out")) < 3:
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    errors = run.communicate()[1]
    assert run.returncode == 130
    lines = errors.splitlines()
    assert lines[0].startswith("text_val_000000.npy:")
    assert [line for line in lines if "text_" not in line] == lines[-1:]  # no warning either
    assert lines[-1].startswith("dataset.py: interrupted; ")
    assert_nothing_incomplete(tmp_path / "out")


def test_a_failing_disk_is_one_line_and_keeps_the_shards_before(tmp_path: Path) -> None:
    """The system's own limit of a file's size, which the index reaches after some shards."""
    source = write_source(tmp_path / "source", 2, 100)
    out = tmp_path / "out"
    subprocess.run(command(source, tmp_path / "undisturbed", 400), check=True)
    get_tokenizer()  # tiktoken keeps a copy of its files, larger than the limit
    failed = subprocess.run(
        command(source, out, 400),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("dataset.py: [Errno 27] File too large; ")
    assert "Traceback" not in failed.stderr
    assert_nothing_incomplete(out)
    kept = json.loads((out / "index.json").read_text())["shards"]
    times = {shard["file"]: (out / shard["file"]).stat().st_mtime_ns for shard in kept}
    assert len(times) > 10
    subprocess.run(command(source, out, 400), check=True)
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert times == {name: (out / name).stat().st_mtime_ns for name in times}  # not written twice


# ---- the hub -------------------------------------------------------------------------------------

# Pauses between the tries of `datasets` and huggingface_hub are shortened.
DRIVER = """
import sys
import datasets
import huggingface_hub.utils._http as http
http.http_backoff.__kwdefaults__.update(base_wait_time=0.01, max_wait_time=0.02)
datasets.config.STREAMING_READ_RETRY_INTERVAL = 0.01
datasets.config.STREAMING_READ_MAX_RETRIES = 3
sys.argv[0] = "dataset.py"
sys.path.insert(0, sys.argv.pop(1))
import dataset
dataset.main()
"""


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One like FineWeb-Edu's, and a Parquet, a JSONL.gz and a CSV repository of the same texts."""
    folder = tmp_path_factory.mktemp("hub")
    fineweb, parquet, lines, table = (folder / name for name in ("fineweb", "p", "j", "c"))
    write_source(fineweb / "sample" / "10BT", 2, 400)
    (fineweb / "README.md").write_text(README)
    texts = texts_of(800)
    for repo in (parquet, lines, table):
        repo.mkdir()
    write(parquet / "train.parquet", texts, rows=100)
    (lines / "train.jsonl.gz").write_bytes(gzip.compress(jsonl(texts)))
    with (table / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "text"), *enumerate(texts)])
    return {FINEWEB_EDU: fineweb, "o/parquet": parquet, "o/lines": lines, "o/table": table}


@pytest.fixture(scope="module")
def undisturbed(repos: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """FineWeb-Edu's files tokenized from the disk: the shards that a hub must give too."""
    out = tmp_path_factory.mktemp("undisturbed")
    source = str(repos[FINEWEB_EDU] / "sample" / "10BT")
    prepare(DatasetConfig((source,), data_dir=out, shard_size=20_000))
    return shards(out)


@pytest.fixture
def hub(repos: dict[str, Path]) -> Iterator[HubServer]:
    with HubServer(repos) as server:
        yield server


def shards(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in shard_paths(folder)]


def run(hub: HubServer, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    arguments = ["--data-dir", str(folder / "out"), "--shard-size", "20000", *options]
    return subprocess.run(
        [sys.executable, "-c", DRIVER, str(SCRIPT.parent), *arguments],
        env={**os.environ, **hub.environment(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def error_of(failed: subprocess.CompletedProcess[str]) -> str:
    """The error, which must be a single line at the end."""
    assert "Traceback" not in failed.stderr
    lines = failed.stderr.splitlines()
    assert [line for line in lines if line.startswith("dataset.py: ")] == lines[-1:]
    return lines[-1]


@pytest.mark.parametrize("repo", ["o/parquet", "o/lines", "o/table"])
def test_a_data_set_by_its_id_killed_and_resumed_has_the_same_bytes(
    repo: str, hub: HubServer, repos: dict[str, Path], tmp_path: Path
) -> None:
    local = str(repos["o/parquet"] / "train.parquet")
    prepare(DatasetConfig((local,), data_dir=tmp_path / "local", shard_size=1500))
    whole = shards(tmp_path / "local")
    arguments = [sys.executable, str(SCRIPT), "--source", repo, "--shard-size", "1500"]
    arguments += ["--data-dir", str(tmp_path / "out")]
    environment = {**os.environ, **hub.environment(tmp_path / "cache")}
    # The lines for its shards are more than the pipe holds, so it cannot end before it is killed.
    process = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, pipesize=4096)
    while process.poll() is None and len(shard_paths(tmp_path / "out")) < 3:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    kept = shards(tmp_path / "out")
    assert process.returncode == -signal.SIGKILL
    assert 0 < len(kept) < len(whole)
    subprocess.run(arguments, env=environment, check=True)
    assert shards(tmp_path / "out") == whole
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert (index["source"], index["revision"]) == (repo, hub.commit(repo))


def test_a_bad_connection_changes_nothing(
    hub: HubServer, tmp_path: Path, undisturbed: list[bytes]
) -> None:
    kinds = itertools.cycle(("half", 429, "dropped", 503, "slow"))
    asked: set[object] = set()
    seen = set()

    def fault(handler: Handler, path: Path) -> bool:
        request = (path, handler.headers["Range"])  # each fails once
        kind = "fine" if request in asked or path.suffix != ".parquet" else next(kinds)
        asked.add(request)
        seen.add(kind)
        handler.breaks_off = kind == "half"
        handler.close_connection |= kind == "dropped"
        time.sleep(0.3 * (kind == "slow"))
        if isinstance(kind, int):
            handler.answer(kind)
        return kind in ("dropped", 429, 503)

    hub.fault = fault
    finished = run(hub, tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert seen == {"fine", "half", "slow", 429, 503, "dropped"}
    assert shards(tmp_path / "out") == undisturbed
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["revision"] == hub.commit(FINEWEB_EDU)
    assert shard_paths(tmp_path / "out")[0].name == "edufineweb_val_000000.npy"


def test_a_hub_that_fails_for_good_is_one_line_and_the_work_is_kept(
    hub: HubServer, tmp_path: Path, undisturbed: list[bytes]
) -> None:
    def fault(handler: Handler, path: Path) -> bool:
        # From the first shard on, when one worker has begun six of the eight row groups.
        fails = path.suffix == ".parquet" and bool(shards(tmp_path / "out"))
        if fails:
            handler.answer(503)
        return fails

    hub.fault = fault
    failed = run(hub, tmp_path, "--workers", "1")
    assert failed.returncode == 1
    error_of(failed)
    kept = shards(tmp_path / "out")
    assert 0 < len(kept) < len(undisturbed)
    assert kept == undisturbed[: len(kept)]
    hub.fault = None
    finished = run(hub, tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert shards(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("endpoint", ["http://hub.invalid", "http://127.0.0.1:9", "hub.invalid"])
def test_without_a_hub_it_says_so_at_once(endpoint: str, tmp_path: Path) -> None:
    start = time.monotonic()
    failed = subprocess.run(
        [sys.executable, str(SCRIPT), "--data-dir", str(tmp_path / "out")],
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert time.monotonic() - start < 20
    assert failed.returncode == (1 if "://" in endpoint else 2)
    assert f"HF_ENDPOINT {endpoint}" in error_of(failed)


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
    failed = run(hub, tmp_path, *options)
    assert failed.returncode == 2, failed.stderr
    assert message in error_of(failed)
