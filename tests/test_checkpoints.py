"""Checkpoints that are damaged, dangerous, or cannot be written, and a run that goes through it."""

import json
import os
import pickle
import resource
import shutil
import signal
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from launcher import (
    TIMEOUT,
    metrics,
    read_files,
    refused,
    run,
    run_well,
    saved_steps,
)

import checkpoint
from common import lock_folder
from model import GPT, GPTConfig

# ---- damaged checkpoints -------------------------------------------------------------------------

FILES = (
    "checksums.json config.json generation_config.json merges.txt model.safetensors"
    " tokenizer_config.json training_state.pt vocab.json"
).split()


def damaged_versions(content: bytes) -> dict[str, bytes]:
    """A file's content after the accidents that happen to files."""
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 0x10
    return {
        "empty": b"",
        "half": content[: len(content) // 2],
        "one byte short": content[:-1],
        "one byte long": content + b"\0",
        "first byte flipped": bytes([content[0] ^ 0xFF]) + content[1:],
        "last byte flipped": content[:-1] + bytes([content[-1] ^ 1]),
        "a bit in the middle flipped": bytes(flipped),
    }


def test_a_checkpoint_has_these_files_and_no_others(finished: Path) -> None:
    assert sorted(path.name for path in (finished / "log/step_000040").iterdir()) == FILES


@pytest.mark.parametrize("name", FILES)
def test_any_damage_to_a_checkpoint_is_reported_and_the_one_before_is_used(
    copy: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log = copy / "log"
    newest, before = log / "step_000040", log / "step_000035"
    assert checkpoint.latest_valid(log) == newest
    file = newest / name
    for kind, content in damaged_versions(file.read_bytes()).items():
        file.write_bytes(content)
        assert checkpoint.latest_valid(log) == before, kind
        assert f"{newest}: damaged" in capsys.readouterr().err, kind
    file.unlink()
    assert checkpoint.latest_valid(log) == before
    assert f"{newest}: damaged" in capsys.readouterr().err


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(copy: Path) -> None:
    (copy / "log/step_000040/model.safetensors").write_bytes(b"")
    flags = ("--resume", "--keep-checkpoints", "1")
    code, out, err = run(copy, *flags, "--max-steps", "38")
    assert code == 0
    assert "step_000040: damaged" in err
    assert "resumed from log/step_000035" in out
    # The damaged one does not count among those to keep, and the newest whole one is never pruned.
    assert saved_steps(copy / "log") == [38, 40]
    code, out, _ = run(copy, *flags)
    assert "resumed from log/step_000038" in out
    assert saved_steps(copy / "log") == [40]
    assert checkpoint.verify(copy / "log/step_000040") is None


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_anew(copy: Path) -> None:
    for path in (copy / "log").glob("step_*"):
        (path / "training_state.pt").unlink()
    before = read_files(copy)
    code, _, err = run(copy, "--resume")
    assert code == 2
    assert err.count("damaged") == 3
    assert "no valid checkpoint" in err.splitlines()[-1]
    assert read_files(copy) == before


class Bomb:
    """What unpickling this calls would be code of whoever wrote the file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def update_checksum(state: Path) -> None:
    """Makes the checksum that of the file, as somebody who replaces a file on purpose does."""
    path = state.with_name("checksums.json")
    sums = json.loads(path.read_text())
    sums[state.name] = [state.stat().st_size, zlib.crc32(state.read_bytes())]
    path.write_text(json.dumps(sums))


@pytest.mark.parametrize("container", ["torch", "pickle"])
def test_a_pickle_bomb_is_never_run(copy: Path, container: str) -> None:
    mark = copy / "exploded"
    state = copy / "log/step_000040/training_state.pt"
    bomb = {"step": 40, "rng": Bomb(mark)}
    if container == "torch":
        torch.save(bomb, state)
    else:
        state.write_bytes(pickle.dumps(bomb))
    code, out, err = run(copy, "--resume", "--max-steps", "41")
    assert code == 0
    assert "training_state.pt does not match its checksum" in err
    assert "resumed from log/step_000035" in out
    assert not mark.exists()

    update_checksum(state)
    shutil.rmtree(copy / "log/step_000041")
    refused(run(copy, "--resume"), "step_000040/training_state.pt: not a training state")
    assert not mark.exists()
    with suppress(RuntimeError):  # a plain pickle lacks torch's magic number, too late
        torch.load(state, weights_only=False)
    assert mark.exists()  # it was live


def test_a_state_that_lacks_a_part_is_refused(copy: Path) -> None:
    path = copy / "log/step_000040/training_state.pt"
    state = torch.load(path, weights_only=True)
    del state["losses"]
    torch.save(state, path)
    update_checksum(path)
    refused(run(copy, "--resume"), "step_000040/training_state.pt: not a training state")


# ---- disks ---------------------------------------------------------------------------------------

SILENT = ("--checkpoint-every", "0", "--val-every", "0", "--sample-every", "0")


def wait_for_checkpoint(run: Any) -> None:
    """A checkpoint that is being written meets one state of the disk, and not two."""
    import train  # not at the top: only the fork server has imported it

    train.report_checkpoint(run, wait=True)


def full_disk(limit: int, first: int, last: int, run: Any) -> None:
    """No file can grow beyond ``limit`` bytes from step ``first`` until step ``last``."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    if run.step in (first, last):
        wait_for_checkpoint(run)
        size = limit if run.step == first else hard
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def leave_root() -> None:
    """Becomes a user for whom the modes of files count."""
    if os.geteuid() == 0:
        os.seteuid(65534)


def lose_write_permission(run: Any) -> None:
    """The log folder becomes read-only."""
    if run.step == 3:
        wait_for_checkpoint(run)
        os.chmod("log", 0o555)
        leave_root()


def die_while_saving(where: str, run: Any) -> None:
    """The process is killed in the save of step 7: while it writes, or before it deletes others."""
    if run.step > 0:
        return
    fsync = os.fsync

    def fatal_fsync(fd: Any) -> None:
        fsync(fd)
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        renamed = path.name == "log" and (path / "step_000007").exists()
        writing = path.parent.name == ".partial_step_000007"
        if renamed if where == "before pruning" else writing:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = fatal_fsync


@pytest.mark.parametrize("limit", [500_000, 1_300_000, 2_500_000])
def test_a_disk_that_is_full_while_saving_does_not_end_the_run(folder: Path, limit: int) -> None:
    """It fails in a tokenizer file, in the weights (1.7 MB) or in the training state (3.4 MB)."""
    flags = ("--model.d-model", "128", "--model.n-layers", "2", "--keep-checkpoints", "1")
    out = run_well(folder, *flags, "--max-steps", "21", on_step=partial(full_disk, limit, 1, 15))
    assert out.count("checkpoint not saved: ") == 2  # of steps 7 and 14
    assert saved_steps(folder / "log") == [21]
    assert not list((folder / "log").glob(".partial_*"))
    assert len(metrics(folder / "log", "train")) == 21
    # Until the next one was whole, the last good one was kept.
    stopped = ("--max-steps", "8", "--log-dir", "stopped")
    run_well(folder, *flags, *stopped, on_step=partial(full_disk, limit, 1, 10**9))
    assert saved_steps(folder / "stopped") == [0]
    assert not list((folder / "stopped").glob(".partial_*"))
    assert checkpoint.verify(folder / "stopped/step_000000") is None


def test_a_disk_that_is_full_while_logging_is_said_once(folder: Path) -> None:
    log = folder / "log"
    log.mkdir()
    (log / "metrics.jsonl").write_text("\n" * 100_000)  # what is printed stays below the limit
    out = run_well(folder, "--resume", *SILENT, on_step=partial(full_disk, 102_500, 0, 30))
    assert out.count("training continues without these metrics") == 1
    logged = [step for _, step in metrics(log, "train")]
    assert logged[-10:] == list(range(30, 40))  # half a line does not spoil those after it
    assert 0 in logged
    assert len(logged) < 35


def test_a_console_that_cannot_be_written_does_not_end_the_run(folder: Path) -> None:
    out = run_well(folder, *SILENT, on_step=partial(full_disk, 1000, 5, 35))
    assert "step    39/40" in out
    assert "step    25/40" not in out


def test_a_log_folder_that_cannot_be_written_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "file").write_text("")
    refused(run(folder, "--log-dir", "file/log"), "file/log: cannot write there", "--log-dir")
    (folder / "log").mkdir(mode=0o555)
    monkeypatch.chdir(folder)
    user = os.geteuid()
    leave_root()
    try:
        with pytest.raises(ValueError, match=r"log: cannot write there .*denied.* --log-dir"):
            lock_folder(Path("log"), flag="--log-dir")
    finally:
        os.seteuid(user)


def test_a_log_folder_that_becomes_read_only_does_not_end_the_run(folder: Path) -> None:
    folder.chmod(0o755)
    out = run_well(folder, "--max-steps", "15", on_step=lose_write_permission)
    assert out.count("checkpoint not saved: ") == 3  # of steps 7, 14 and 15
    assert "step    14/15" in out
    assert saved_steps(folder / "log") == [0]


@pytest.mark.parametrize(
    ("where", "steps", "unfinished"), [("while writing", [0], 1), ("before pruning", [0, 7], 0)]
)
def test_a_process_killed_in_a_save_leaves_only_whole_checkpoints(
    folder: Path, where: str, steps: list[int], unfinished: int
) -> None:
    log = folder / "log"
    keep = ("--keep-checkpoints", "1")
    code, _, _ = run(folder, *keep, on_step=partial(die_while_saving, where))
    assert code == -signal.SIGKILL
    assert saved_steps(log) == steps
    assert len(list(log.glob(".partial_*"))) == unfinished
    (log / ".partial_step_000999").mkdir()  # whatever step was killed before
    out = run_well(folder, *keep, "--resume")
    assert "not saved" not in out
    assert f"resumed from log/step_{steps[-1]:06d}" in out
    assert saved_steps(log) == [40]
    assert not list(log.glob(".partial_*"))


# ---- writing while training continues ------------------------------------------------------------


def delay_save(step: int, delay: Callable[[], object]) -> None:
    """No file of the checkpoint of a step is written before ``delay`` has returned."""
    mkdir = os.mkdir

    def slow_mkdir(path: Path, *arguments: Any) -> None:
        mkdir(path, *arguments)
        if Path(path).name == f".partial_step_{step:06d}":
            delay()

    os.mkdir = slow_mkdir  # type: ignore[assignment]  # without its keyword arguments


def write_slowly(run: Any) -> None:
    """The write of step 35 ends while the run, in step 40, waits for it to save that one."""
    if run.step == 0:
        run.step_39 = threading.Event()
        delay_save(35, lambda: run.step_39.wait(TIMEOUT))
        delay_save(35, lambda: time.sleep(0.5))
    if run.step == 39:
        assert Path("log/.partial_step_000035").exists()
        assert saved_steps(Path("log")) == [14, 21, 28]
        run.step_39.set()


def test_training_continues_while_a_checkpoint_is_written(folder: Path, finished: Path) -> None:
    run_well(folder, on_step=write_slowly)
    lines = (folder / "log/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    events = [(row["kind"], row["step"]) for row in rows]
    saves = [row for row in rows if row["kind"] == "checkpoint"]
    assert [row["path"] for row in saves[-2:]] == ["step_000035", "step_000040"]
    assert events.index(("checkpoint", 35)) > events.index(("train", 39))
    assert saves[-2]["seconds"] < saves[-2]["write_seconds"]
    # It holds the weights and the optimizer of its step, and not of those that were made meanwhile.
    expected, written = (read_files(at / "log/step_000035") for at in (finished, folder))
    assert written == expected


def end_while_saving(how: str, run: Any) -> None:
    """The run ends while its checkpoint of step 7 is written."""
    if run.step == 0:
        delay_save(7, lambda: time.sleep(0.5))
    if run.step == 7:
        if how == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            raise {"exit": SystemExit(5), "error": OSError("it"), "bug": TypeError("it")}[how]


@pytest.mark.parametrize(
    ("how", "expected", "steps"),
    [("signal", 0, [0, 7, 8]), ("exit", 5, [0, 7]), ("error", 1, [0, 7]), ("bug", 1, [0, 7])],
)
def test_the_end_of_a_run_waits_for_the_checkpoint_that_is_written(
    folder: Path, how: str, expected: int, steps: list[int]
) -> None:
    code, out, _ = run(folder, on_step=partial(end_while_saving, how))
    assert code == expected
    assert saved_steps(folder / "log") == steps
    assert out.count("checkpoint: path step_000007") == 1
    assert all(checkpoint.verify(path) is None for path in (folder / "log").glob("step_*"))


def test_memory_that_cannot_be_pinned_is_used_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for a GPU: tensors that claim to be on one, where nothing can be pinned."""
    model = GPT(GPTConfig(d_model=16, n_heads=2, n_layers=1, context_length=16, vocab_size=300))
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = checkpoint.TrainingState(3, {}, torch.get_rng_state(), {}, 0.0, 0, [])
    waits: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append(1))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    writer = checkpoint.Writer(tmp_path, keep=0)
    writer.start(model, state)
    assert waits == [1]  # the copies have arrived before training may change the weights
    with pytest.raises(RuntimeError, match="still being written"):
        writer.start(model, state)
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
    saved = writer.finished(wait=True)
    monkeypatch.undo()
    assert saved is not None
    assert writer.finished() is None
    loaded = GPT.from_pretrained(saved.folder).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
