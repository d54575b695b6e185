"""common.py: which device a process uses, options, ranks, locks, and how a script ends."""

import common
from common import Bounds, DistInfo, check_options, choose_device, read_json, read_rank

import errno
import importlib
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
import typing
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import Mock

import pytest
import torch
from launcher import ROOT, free_port, is_last_rank, start

MonkeyPatch = pytest.MonkeyPatch


@pytest.fixture
def two_gpus(monkeypatch: MonkeyPatch) -> Mock:
    """torch on a machine with two GPUs, as far as choosing one goes; the mocked set_device."""
    set_device = Mock()
    monkeypatch.setattr(torch, "empty", lambda *_, device: Mock(device=torch.device(device)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    return set_device


def test_a_chosen_gpu_becomes_the_current_one(two_gpus: Mock) -> None:
    """Events and CUDA graphs belong to the current device: on another one they record nothing."""
    assert choose_device("cuda:1") == torch.device("cuda:1")
    two_gpus.assert_called_once_with(torch.device("cuda:1"))


def test_each_local_rank_has_a_gpu_of_its_own(two_gpus: Mock, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert DistInfo.initialize("auto").device == torch.device("cuda:1")


def test_a_rank_on_the_cpu_touches_no_gpu(two_gpus: Mock, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "7")  # more than there are GPUs
    assert DistInfo.initialize("cpu").device == torch.device("cpu")
    two_gpus.assert_not_called()


def fail_where_ending_blocks(run: Any) -> None:
    """The last rank fails. Destroying the process group waits for ranks that will never come."""
    torch.distributed.destroy_process_group = lambda: time.sleep(600)  # as NCCL does
    if run.step == 5 and is_last_rank(run):
        raise ValueError("this rank is broken")


def test_a_rank_that_fails_ends_at_once_so_that_torchrun_can_stop_the_others(folder: Path) -> None:
    trainings = start(folder, ranks=2, on_step=fail_where_ending_blocks)
    assert [training.wait() for training in trainings] == [1, 2]
    assert trainings[1].err == "train.py: this rank is broken (rank 1)\n"
    assert "another rank has failed" in trainings[0].err


# ---- options -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nested:
    width: Annotated[int, Bounds(1, 8)] = 4


@dataclass(frozen=True)
class Example:
    rate: Annotated[float, Bounds(0, 1)] = 0.5
    limit: Annotated[int | None, Bounds(1, 10)] = None
    nested: Nested = Nested()


def test_every_option_outside_its_bounds_is_named() -> None:
    assert check_options(Example()) == []
    problems = check_options(Example(rate=float("nan"), limit=0, nested=Nested(width=9)))
    assert [problem.split()[0] for problem in problems] == ["rate", "limit", "nested.width"]
    assert check_options(Example(rate=float("inf"))) == ["rate inf must be at most 1"]


OPTIONS = ("train.TrainConfig", "eval.EvalConfig", "hellaswag.HellaSwagConfig")


@pytest.mark.parametrize("name", [*OPTIONS, "dataset.DatasetConfig", "plot.PlotConfig"])
def test_every_number_among_a_scripts_options_has_bounds(name: str) -> None:
    """NaN, infinity and 2**70 are accepted by the parser."""
    module, _, class_name = name.partition(".")

    def unbounded(config_class: Any) -> list[str]:
        hints = typing.get_type_hints(config_class, include_extras=True)
        found = []
        for field in fields(config_class):
            hint = hints[field.name]
            if is_dataclass(hint):
                found += unbounded(hint)
            annotated = typing.get_origin(hint) is Annotated
            base = typing.get_args(hint)[0] if annotated else hint
            extras = hint.__metadata__ if annotated else ()
            is_number = base in (int, float, int | None, float | None)
            if is_number and not any(isinstance(extra, Bounds) for extra in extras):
                found.append(field.name)
        return found

    assert unbounded(getattr(importlib.import_module(module), class_name)) == []


# ---- ranks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "1"},
        {"RANK": "3"},
        {"RANK": "5", "WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "-2"},
        {"WORLD_SIZE": "0"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"RANK": "", "WORLD_SIZE": "2"},
        {"RANK": "one", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"},
    ],
)
def test_leftover_ranks_of_another_job_are_refused(
    environment: dict[str, str], monkeypatch: MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="unset RANK and WORLD_SIZE"):
        read_rank()


def test_a_group_that_nobody_joins_ends_and_names_the_missing(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(common, "JOIN_SECONDS", 0.5)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(ConnectionError, match="missing: 1, 2"):
        common.join_group("gloo", rank=0, world_size=3)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(ConnectionError, match="cannot reach rank 0"):
        common.join_group("gloo", rank=1, world_size=3)


# ---- files and locks -----------------------------------------------------------------------------


def test_a_lock_never_truncates_what_a_link_points_to(tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("data")
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / ".lock").symlink_to(precious)
    with pytest.raises(ValueError, match="cannot write there"):
        common.lock_folder(tmp_path / "log", flag="--log-dir")
    assert precious.read_text() == "data"


def test_a_lock_notices_that_its_folder_was_renamed(tmp_path: Path) -> None:
    lock = common.lock_folder(tmp_path / "log", flag="--log-dir")
    lock.check()
    (tmp_path / "log").rename(tmp_path / "old")
    with pytest.raises(OSError, match="renamed"):
        lock.check()
    other = common.lock_folder(tmp_path / "log", flag="--log-dir")
    with pytest.raises(OSError, match="renamed"):
        lock.check()
    other.release()
    lock.release()


def test_a_disk_that_does_not_answer_is_no_renamed_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = common.lock_folder(tmp_path / "log", flag="--log-dir")
    monkeypatch.setattr(Path, "stat", Mock(side_effect=OSError(errno.EIO, "input/output error")))
    lock.check()
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "log")
    (tmp_path / "log").write_text("a file in its place")
    with pytest.raises(OSError, match="replaced"):
        lock.check()


def test_only_a_second_process_is_told_that_another_run_is_writing(tmp_path: Path) -> None:
    lock = common.lock_folder(tmp_path, flag="--log-dir")
    command = f"import common; common.lock_folder(common.Path({str(tmp_path)!r}), '--log-dir')"
    result = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True)
    assert b"another run is writing there" in result.stderr
    lock.release()
    with pytest.raises(ValueError, match="cannot write there"):
        common.lock_folder(Path("/proc"), flag="--log-dir")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b'{"width": "x"}', b"[" * 100_000, b"\xff\xfe", b"{"]
)
def test_json_of_another_type_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"some\.json"):
        read_json(path, Nested)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        with pytest.raises(ValueError, match="not a regular file"):
            read_json(path, Nested)


# ---- how a script ends ---------------------------------------------------------------------------

SCRIPT = """
import sys
import common
sys.argv[0] = "script.py"
with common.exit_with_one_line():
    exec(sys.argv[1])
"""


def end(code: str, shell: str = "", **environment: str) -> tuple[int, str, str]:
    """Runs Python code in a script's main; ``shell`` redirects its streams."""
    command = f'"{sys.executable}" -c "$SCRIPT" "$CODE" {shell}'
    variables = {**os.environ, "SCRIPT": SCRIPT, "CODE": code, **environment}
    arguments = ["bash", "-o", "pipefail", "-c", command]
    result = subprocess.run(arguments, cwd=ROOT, env=variables, capture_output=True, text=True)
    return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize(
    ("code", "shell", "expected_code", "lines"),
    [
        ("{}['x']", "", 1, 1),  # a bug
        ("raise ValueError('a\\n' * 100_000)", "", 2, 1),
        ("raise OSError(36, 'File name too long')", "", 2, 1),
        ("print('x\\n' * 100_000)", "| head -1", 0, 0),
        ("print('x')", ">/dev/full", 1, 1),
        ("print('x')", ">&-", 0, 0),
        ("print(sys.stdin.read())", "<&-", 0, 0),
        ("{}['x']", "2>&-", 1, 0),
        ("{}['x']", "2>/dev/full", 1, 0),
    ],
)
def test_a_script_ends_with_at_most_one_line(
    code: str, shell: str, expected_code: int, lines: int
) -> None:
    returncode, _, err = end(code, shell)
    assert (returncode, err.count("\n")) == (expected_code, lines), err
    assert len(err) < 3000


def test_a_bug_is_named_with_its_place_and_its_traceback_on_request() -> None:
    assert "KeyError: 'x' (<string>:1); set GPT_XS_DEBUG=1" in end("{}['x']")[2]
    assert "Traceback" in end("{}['x']", GPT_XS_DEBUG="1")[2]


def test_a_console_that_cannot_encode_a_character_shows_its_code() -> None:
    assert end("print('\u0109')", PYTHONIOENCODING="ascii", LC_ALL="C")[:2] == (0, "\\u0109\n")


@pytest.mark.parametrize("script", ["plot.py", "train.py"])
def test_ctrl_c_during_the_imports_is_one_line(script: str) -> None:
    trace = [sys.executable, "-X", "importtime", script, "--help"]  # a line for each import
    pipe = subprocess.PIPE
    with subprocess.Popen(trace, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.rstrip().endswith("| common"):
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    lines = [line for line in rest.splitlines() if not line.startswith("import time:")]
    assert (process.returncode, lines) == (130, [f"{script}: interrupted"])


COUNT_PAGES = """
import resource
import torch
import common

common.choose_device("cpu")
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.zeros(2**24) + 1  # two tensors of 64 MiB, freed at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_on_a_cpu_the_system_need_not_clear_memory_for_each_step() -> None:
    command = [sys.executable, "-c", COUNT_PAGES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 15 * 2**26 / resource.getpagesize()  # of 40 tensors
