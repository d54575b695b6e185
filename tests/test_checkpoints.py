"""Checkpoints: whole or absent, checked, free of code; found, written in a thread, resumed."""

import itertools
import json
import math
import os
import shutil
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from gptxs import checkpoint
from gptxs.checkpoint import TrainingState, Writer, compare_settings
from gptxs.optim import build_optimizer
from model import GPT, GPTConfig

Capture = pytest.CaptureFixture[str]
MonkeyPatch = pytest.MonkeyPatch
SHAPE = {"d_model": 16, "n_heads": 2, "n_layers": 1, "context_length": 16, "vocab_size": 300}
Run = tuple[GPT, torch.optim.Optimizer]
FILES = "config.json generation_config.json model.safetensors training_state.pt".split()


def update(model: GPT, optimizer: torch.optim.Optimizer) -> None:
    idx = torch.arange(8).view(1, 8)
    model(idx, idx).backward()
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    optimizer.zero_grad()


def updated() -> Run:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE))
    optimizer = build_optimizer(model, weight_decay=0.1)
    update(model, optimizer)
    return model, optimizer


def state_of(optimizer: torch.optim.Optimizer, step: int) -> TrainingState:
    settings = {"model": dict(SHAPE), "data": [["a_train_000001.npy", 5, "x"]]}
    progress = {"step": step, "best_val": math.inf, "losses": [3.0, 2.5]}
    return TrainingState(progress, settings, optimizer.state_dict(), scaler={})


def save(log: Path, step: int, keep: int = 0, run: Run | None = None) -> Path:
    model, optimizer = run or updated()
    checkpoint.save(log, model.weights(), SHAPE, state_of(optimizer, step), keep)
    return log / checkpoint.folder_name(step)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log folder with checkpoints of steps 6 and 7."""
    save(tmp_path, 6)
    return save(tmp_path, 7).parent


@pytest.fixture
def newest(log: Path) -> Path:
    return log / "step_000007"


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :]


def flip(file: Path) -> None:
    file.write_bytes(flipped(file.read_bytes()))


@pytest.mark.parametrize("name", ["checksums.json", *FILES])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(
    newest: Path, name: str, capsys: Capture
) -> None:
    assert names(newest) == ["checksums.json", *FILES]
    assert checkpoint.latest_valid(newest.parent) == newest
    assert capsys.readouterr().err == ""
    content = (newest / name).read_bytes()
    # Checksums that list no file vouch for none.
    damages = [None, b"", b"{}", b"[3]", content[:-1], content + b"\0", flipped(content)]
    for damage in damages:
        (newest / name).unlink(missing_ok=True)
        if damage is not None:
            (newest / name).write_bytes(damage)
        assert checkpoint.latest_valid(newest.parent) == newest.with_name("step_000006")
        err = capsys.readouterr().err
        assert err.startswith(str(newest))
        assert err.count("\n") == 1


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


def test_a_pickle_bomb_is_never_run(newest: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.chdir(newest)
    state = newest / "training_state.pt"
    torch.save({"step": 7, "scaler": Bomb()}, state)
    sums = json.loads((newest / "checksums.json").read_text())  # made to fit, as on purpose
    sums[state.name] = [state.stat().st_size, zlib.crc32(state.read_bytes())]
    (newest / "checksums.json").write_text(json.dumps(sums))
    checkpoint.verify(newest)
    with pytest.raises(ValueError, match=r"step_000007/training_state\.pt") as error:
        checkpoint.load_state(newest)
    assert "weights_only" not in str(error.value)  # torch's own advice is to run it
    assert not (newest / "exploded").exists()
    torch.load(state, weights_only=False)
    assert (newest / "exploded").exists()  # it was live


def test_a_model_is_found_in_a_checkpoint_a_log_folder_and_on_the_hub(
    newest: Path, log: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    find = checkpoint.find_checkpoint
    assert find(str(newest)) == find(str(log)) == newest
    (tmp_path / "empty").mkdir()
    for check in (True, False):
        with pytest.raises(FileNotFoundError, match="empty"):
            find(str(tmp_path / "empty"), check)
    (newest / "training_state.pt").unlink()  # a copy of the model alone is whole
    assert find(str(newest)) == find(str(log)) == newest
    flip(newest / "model.safetensors")
    with pytest.raises(ValueError, match=r"step_000007/model\.safetensors"):
        find(str(newest))
    assert find(str(log)) == log / "step_000006"
    assert find(str(newest), check=False) == find(str(log), check=False) == newest
    (newest / "checksums.json").unlink()  # another program's model has none
    assert find(str(newest)) == find(str(log)) == newest
    monkeypatch.setattr(checkpoint, "local_folder", lambda source: Path("copy of") / source)
    assert find("owner/name") == Path("copy of/owner/name")


def test_the_next_is_taken_when_the_newest_is_pruned_meanwhile(
    newest: Path, monkeypatch: MonkeyPatch, capsys: Capture
) -> None:
    checksum = checkpoint._checksum
    later = newest.with_name("step_000008")

    def slow_checksum(path: Path) -> list[int]:
        if newest.exists():
            newest.rename(later)
        return checksum(path)

    monkeypatch.setattr(checkpoint, "_checksum", slow_checksum)
    assert checkpoint.find_checkpoint(str(newest.parent)) == later
    assert capsys.readouterr().err == ""


def test_the_newest_are_kept_and_later_ones_do_not_count(log: Path) -> None:
    save(log, 8)
    (log / "step_9.tar").touch()  # neither is a checkpoint
    (log / "step_final").mkdir()
    assert checkpoint.contains_run(log)
    assert checkpoint.list_checkpoints(log)[0].name == "step_000008"
    save(log, 7, keep=2)  # as a run that has resumed at 6, because 7 and 8 were damaged
    assert names(log) == ["step_000006", "step_000007", "step_000008", "step_9.tar", "step_final"]
    save(log, 1_000_000, keep=1)
    assert names(log) == ["step_1000000", "step_9.tar", "step_final"]


@pytest.mark.parametrize("moved", ["step_000006", "step_000008"])
def test_a_moved_checkpoint_ends_no_save(log: Path, monkeypatch: MonkeyPatch, moved: str) -> None:
    def listed_and_moved(_: Path) -> list[Path]:
        (log / moved).rename(log / "away")
        return [log / "step_000007", log / "step_000006"]

    monkeypatch.setattr(checkpoint, "list_checkpoints", listed_and_moved)
    save(log, 8, keep=1)
    checkpoint.verify(log / "away")
    assert not (log / "step_000007").exists()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_not_saved(log: Path, value: float) -> None:
    for part in ("weight", "exp_avg"):
        model, optimizer = updated()
        weight = model.transformer.ln_f.weight
        tensor = weight if part == "weight" else optimizer.state[weight][part]
        tensor.data[3] = value
        with pytest.raises(OSError, match="not finite"):
            save(log, 8, keep=1, run=(model, optimizer))
    assert names(log) == ["step_000006", "step_000007"]


def die_at(call: int) -> None:
    """The process is killed before its ``call``-th change of the disk."""
    changes = itertools.count()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *a, **k: os._exit(9) if next(changes) == call else function(*a, **k)

    for name in ("fsync", "mkdir", "rename", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))


def test_a_process_killed_at_any_moment_of_a_save_leaves_whole_checkpoints(log: Path) -> None:
    flip(save(log, 8) / "model.safetensors")  # saved again, in place of a damaged one
    newest = set()
    for call in range(100):
        folder = shutil.copytree(log, log.with_name(f"log_{call}"))
        child = os.fork()
        if child == 0:
            die_at(call)
            save(folder, 8, keep=1)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        newest.add(getattr(checkpoint.latest_valid(folder), "name", None))
        save(folder, 8, keep=1)  # the process that resumes leaves nothing else
        assert names(folder) == ["step_000008"]
        if code == 0:
            break
    assert code == 0
    assert newest == {"step_000007", "step_000008"}


def test_training_goes_on_during_a_save(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    folder = save(tmp_path, 1)
    expected = contents(folder)
    shutil.rmtree(folder)
    model, optimizer = updated()
    write, may_write = checkpoint._write_files, threading.Event()
    synchronize, report = Mock(), Mock()
    monkeypatch.setattr(checkpoint, "_write_files", lambda *a: may_write.wait(60) and write(*a))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    writer = Writer(tmp_path, keep=0, report=report, warn=Mock())
    writer.start(model.weights(), SHAPE, state_of(optimizer, 1))
    synchronize.assert_called_once()  # the copies must arrive before training changes the weights
    writer.collect()
    update(model, optimizer)
    assert (writer.saved_step, checkpoint.list_checkpoints(tmp_path)) == (None, [])
    may_write.set()
    writer.collect(wait=True)
    writer.collect(wait=True)
    ((kind, step, row),) = [call.args for call in report.call_args_list]  # once
    assert (writer.saved_step, kind, step, row["path"]) == (1, "checkpoint", 1, folder.name)
    assert 0 < row["seconds"] < row["write_seconds"]
    assert contents(folder) == expected  # and not the weights or moments of the next step


def test_a_save_that_fails_costs_nothing(log: Path, monkeypatch: MonkeyPatch) -> None:
    model, optimizer = updated()
    warn = Mock()
    writer = Writer(log, keep=1, report=Mock(), warn=warn)
    with monkeypatch.context() as patch:  # without arguments to unpack it raises TypeError
        patch.setattr(checkpoint, "write_model", lambda: None)
        writer.start(model.weights(), SHAPE, state_of(optimizer, 8))
        writer.collect(wait=True)
    assert "step_000008" in warn.call_args.args[0]
    assert (writer.saved_step, names(log)) == (None, ["step_000006", "step_000007"])
    writer.start(model.weights(), SHAPE, state_of(optimizer, 9))
    writer.collect(wait=True)
    assert (writer.saved_step, names(log)) == (9, ["step_000009"])


def test_a_resumed_run_writes_the_same_bytes(tmp_path: Path) -> None:
    run = updated()
    first = save(tmp_path, 1, run=run)
    update(*run)
    second = save(tmp_path, 2, run=run)
    expected = contents(second)
    state = checkpoint.load_state(first)
    resumed = GPT.from_pretrained(first)
    optimizer = build_optimizer(resumed, weight_decay=0.1)
    checkpoint.load_optimizer(optimizer, state.optimizer, first)
    update(resumed, optimizer)
    save(tmp_path, 2, run=(resumed, optimizer))
    assert contents(second) == expected


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "step"])
@pytest.mark.parametrize("shape", [(3,), (16, 300)])
def test_moments_of_another_shape_are_refused(name: str, shape: tuple[int, ...]) -> None:
    """The fused AdamW would read and write outside of its tensors."""
    model, saved = updated()
    optimizer = build_optimizer(model, weight_decay=0.1)
    state_dict = saved.state_dict()
    state_dict["state"][0][name] = torch.zeros(shape)
    with pytest.raises(ValueError, match="step_6: " + name):
        checkpoint.load_optimizer(optimizer, state_dict, Path("step_6"))
    assert optimizer.state_dict()["state"] == {}


def test_all_settings_that_make_another_run_are_refused_at_once() -> None:
    saved = {"model": {"d_model": 16}, "seed": 1, "max_lr": 0.1, "optimizer": "adamw"}
    saved |= {"log_dir": "a", "resume": False, "init_sha256": "x", "init_from": "gpt2"}
    same = {"log_dir": "b", "resume": True, "init_sha256": None, "init_from": None}
    assert compare_settings(saved, saved | same, Path("step_6")) == []
    (change,) = compare_settings(saved, saved | {"max_lr": 0.2}, Path("step_6"))
    assert change.endswith("max_lr was 0.1, is now 0.2")
    other = {"model": {"d_model": 32}, "seed": 2, "optimizer": "muon", "init_from": "mine"}
    with pytest.raises(ValueError, match=r"step_6.*16.*32.*seed was 1.*2.*adamw.*muon.*mine"):
        compare_settings(saved, saved | other, Path("step_6"))
    shards = [["a_train_000001.npy", 5, "x"], ["a_train_000002.npy", 6, "y"]]
    changed = [shards[0], ["a_train_000002.npy", 6, "other"]]
    for now, named in ((shards[:1], "2 then, 1 now"), (changed, "a_train_000002.npy has changed")):
        with pytest.raises(ValueError, match=named):
            compare_settings({"data": shards}, {"data": now}, Path("step_6"))
