"""Checkpoints: whole or absent, checked, free of code; found, written in a thread, resumed."""

import itertools
import json
import math
import os
import shutil
import threading
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gptxs import checkpoint
from gptxs.checkpoint import TrainingState, Writer, compare_settings
from gptxs.optim import build_optimizer
from model import GPT, GPTConfig

SHAPE = {"d_model": 16, "n_heads": 2, "n_layers": 1, "context_length": 16, "vocab_size": 300}
FILES = "config.json generation_config.json model.safetensors training_state.pt".split()


def update(model: GPT, optimizer: torch.optim.Optimizer) -> None:
    idx = torch.arange(8).view(1, 8)
    model(idx, idx).backward()
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    optimizer.zero_grad()


def updated() -> tuple[GPT, torch.optim.Optimizer]:
    """A model and its optimizer after one update."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE))
    optimizer = build_optimizer(model, weight_decay=0.1)
    update(model, optimizer)
    return model, optimizer


def state_of(optimizer: torch.optim.Optimizer, step: int) -> TrainingState:
    settings = {"model": dict(SHAPE), "data": [["a_train_000001.npy", 5, "x"]]}
    rng = torch.get_rng_state()
    return TrainingState(step, optimizer.state_dict(), rng, settings, math.inf, 0, [3.0, 2.5])


def save(log: Path, step: int, keep: int = 0) -> Path:
    model, optimizer = updated()
    return checkpoint.save(log, model.weights(), SHAPE, state_of(optimizer, step), keep).folder


def names(log: Path) -> list[str]:
    return sorted(path.name for path in log.iterdir())


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


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 0x10
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["checksums.json", *FILES])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(
    newest: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert names(newest) == ["checksums.json", *FILES]
    assert checkpoint.latest_valid(newest.parent) == newest
    assert capsys.readouterr().err == ""
    content = (newest / name).read_bytes()
    damages: list[Callable[[Path], object]] = [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"{}"),  # checksums that list no file vouch for none
        lambda file: file.write_bytes(b"[3]"),
        lambda file: file.write_bytes(content[:-1]),
        lambda file: file.write_bytes(content + b"\0"),
        lambda file: flip(file, 0),
        lambda file: flip(file, -1),
        lambda file: flip(file, len(content) // 2),
        lambda file: file.unlink(),
    ]
    for damage in damages:
        (newest / name).write_bytes(content)
        damage(newest / name)
        assert checkpoint.latest_valid(newest.parent) == newest.with_name("step_000006")
        err = capsys.readouterr().err
        assert err.startswith(str(newest))
        assert err.count("\n") == 1


def test_damaged_checkpoints_alone_are_an_error_and_none_is_a_new_run(tmp_path: Path) -> None:
    assert checkpoint.latest_valid(tmp_path) is None
    assert not checkpoint.contains_run(tmp_path)
    flip(save(tmp_path, 6) / "training_state.pt", -5)
    with pytest.raises(ValueError, match=str(tmp_path)):
        checkpoint.latest_valid(tmp_path)
    assert checkpoint.contains_run(tmp_path)


class Bomb:
    """What unpickling this calls would be code of whoever wrote the file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


def test_a_pickle_bomb_is_never_run(newest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(newest)
    state = newest / "training_state.pt"
    torch.save({"step": 7, "rng": Bomb()}, state)
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
    newest: Path, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = checkpoint.find_checkpoint
    assert find(str(newest)) == find(str(log)) == newest
    (tmp_path / "empty").mkdir()
    for check in (True, False):
        with pytest.raises(FileNotFoundError, match="empty"):
            find(str(tmp_path / "empty"), check)
    (newest / "training_state.pt").unlink()  # a copy of the model alone is whole
    assert find(str(newest)) == find(str(log)) == newest
    flip(newest / "model.safetensors", -5)
    with pytest.raises(ValueError, match=r"step_000007/model\.safetensors"):
        find(str(newest))
    assert find(str(log)) == log / "step_000006"
    assert find(str(newest), check=False) == find(str(log), check=False) == newest
    (newest / "checksums.json").unlink()  # another program's model has none
    assert find(str(newest)) == find(str(log)) == newest
    monkeypatch.setattr(checkpoint, "local_folder", lambda source: Path("copy of") / source)
    assert find("owner/name") == Path("copy of/owner/name")


def test_the_next_is_taken_when_the_newest_is_pruned_meanwhile(
    newest: Path, log: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checksum = checkpoint._checksum

    def slow_checksum(path: Path) -> list[int]:
        if newest.exists():
            newest.rename(log / "step_000008")
        return checksum(path)

    monkeypatch.setattr(checkpoint, "_checksum", slow_checksum)
    assert checkpoint.find_checkpoint(str(log)) == log / "step_000008"
    assert capsys.readouterr().err == ""


def test_the_newest_are_kept_and_later_ones_do_not_count(log: Path) -> None:
    save(log, 8)
    (log / "step_9.tar").touch()  # neither is a checkpoint
    (log / "step_final").mkdir()
    assert checkpoint.list_checkpoints(log)[0].name == "step_000008"
    save(log, 7, keep=2)  # as a run that has resumed at 6, because 7 and 8 were damaged
    assert names(log) == ["step_000006", "step_000007", "step_000008", "step_9.tar", "step_final"]
    save(log, 1_000_000, keep=1)
    assert names(log) == ["step_1000000", "step_9.tar", "step_final"]


@pytest.mark.parametrize("moved", ["step_000006", "step_000008"])
def test_a_checkpoint_that_somebody_moves_ends_no_save(
    log: Path, monkeypatch: pytest.MonkeyPatch, moved: str
) -> None:
    def listed_and_moved(_: Path) -> list[Path]:
        (log / moved).rename(log / "away")
        return [log / "step_000007", log / "step_000006"]

    monkeypatch.setattr(checkpoint, "list_checkpoints", listed_and_moved)
    save(log, 8, keep=1)
    checkpoint.verify(log / "away")
    assert not (log / "step_000007").exists()


@pytest.mark.parametrize("where", ["weight", "moment"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_not_saved(log: Path, where: str, value: float) -> None:
    model, optimizer = updated()
    weight = model.transformer.ln_f.weight
    (weight if where == "weight" else optimizer.state[weight]["exp_avg"]).data[3] = value
    with pytest.raises(OSError, match="not finite"):
        checkpoint.save(log, model.weights(), SHAPE, state_of(optimizer, 8), keep=1)
    assert names(log) == ["step_000006", "step_000007"]


def die_at(call: int) -> None:
    """The process is killed before its ``call``-th change of the disk."""
    changes = itertools.count()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *a, **k: os._exit(9) if next(changes) == call else function(*a, **k)

    for name in ("fsync", "mkdir", "rename", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))


def test_a_process_killed_at_any_moment_of_a_save_leaves_whole_checkpoints(log: Path) -> None:
    flip(save(log, 8) / "model.safetensors", -5)  # saved again, in place of a damaged one
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


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path, 1)
    expected = contents(folder)
    shutil.rmtree(folder)
    model, optimizer = updated()
    write, may_write = checkpoint._write_files, threading.Event()
    waits: list[int] = []
    monkeypatch.setattr(checkpoint, "_write_files", lambda *a: may_write.wait(60) and write(*a))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    writer = Writer(tmp_path, keep=0)
    writer.start(model.weights(), SHAPE, state_of(optimizer, 1))
    assert waits == [1]  # the copies have arrived before training may change the weights
    assert writer.finished() is None
    with pytest.raises(RuntimeError, match="still being written"):
        writer.start(model.weights(), SHAPE, state_of(optimizer, 2))
    update(model, optimizer)
    assert checkpoint.list_checkpoints(tmp_path) == []
    may_write.set()
    saved = writer.finished(wait=True)
    assert saved is not None
    assert (saved.step, saved.folder) == (1, folder)
    assert 0 < saved.pause < saved.seconds
    assert writer.finished() is None
    assert contents(folder) == expected  # and not the weights or moments of the next step


def test_a_save_that_fails_costs_nothing_and_the_next_succeeds(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = updated()
    writer = Writer(log, keep=1)
    with monkeypatch.context() as patch:  # without arguments to unpack it raises TypeError
        patch.setattr(checkpoint, "write_model", lambda: None)
        writer.start(model.weights(), SHAPE, state_of(optimizer, 8))
        with pytest.raises(OSError, match="step_000008"):
            writer.finished(wait=True)
    assert writer.finished() is None
    assert names(log) == ["step_000006", "step_000007"]
    writer.start(model.weights(), SHAPE, state_of(optimizer, 9))
    assert writer.finished(wait=True) is not None
    assert names(log) == ["step_000009"]


def test_a_resumed_run_writes_the_same_bytes(tmp_path: Path) -> None:
    model, optimizer = updated()
    first = checkpoint.save(tmp_path, model.weights(), SHAPE, state_of(optimizer, 1), 0).folder
    update(model, optimizer)
    second = checkpoint.save(tmp_path, model.weights(), SHAPE, state_of(optimizer, 2), 0).folder
    expected = contents(second)
    state = checkpoint.load_state(first)
    resumed = GPT.from_pretrained(first)
    optimizer = build_optimizer(resumed, weight_decay=0.1)
    checkpoint.load_optimizer(optimizer, state.optimizer, first)
    torch.set_rng_state(state.rng)
    update(resumed, optimizer)
    state = replace(state, step=2, optimizer=optimizer.state_dict(), rng=torch.get_rng_state())
    checkpoint.save(tmp_path, resumed.weights(), SHAPE, state, 0)
    assert contents(second) == expected


def test_the_options_of_a_resumed_optimizer_are_those_of_today() -> None:
    model, saved = updated()
    today = build_optimizer(model, weight_decay=0.5)
    checkpoint.load_optimizer(today, saved.state_dict(), Path())
    assert [group["weight_decay"] for group in today.param_groups] == [0.5, 0.0]


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "step"])
@pytest.mark.parametrize("shape", [(3,), (16, 300)])
def test_moments_of_another_shape_are_refused(name: str, shape: tuple[int, ...]) -> None:
    """The fused AdamW would read and write outside of its tensors."""
    model, saved = updated()
    optimizer = build_optimizer(model, weight_decay=0.1)
    state_dict = saved.state_dict()
    state_dict["state"][0][name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"step_6.training_state\.pt.*" + name):
        checkpoint.load_optimizer(optimizer, state_dict, Path("step_6"))
    assert optimizer.state_dict()["state"] == {}


def test_a_node_without_the_log_folder_is_told_to_share_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"step_000007.*share") as error:
        checkpoint.load_state(tmp_path / "step_000007")
    assert "delete" not in str(error.value)


def test_all_settings_that_make_another_run_are_refused_at_once() -> None:
    saved = {"model": {"d_model": 16}, "seed": 1, "max_lr": 0.1, "optimizer": "adamw"}
    saved |= {"log_dir": "a", "resume": False, "init_sha256": "x", "init_from": "gpt2"}
    same = {"log_dir": "b", "resume": True, "init_sha256": None, "init_from": None}
    assert compare_settings(saved, saved | same, Path("step_6")) == []
    (change,) = compare_settings(saved, saved | {"max_lr": 0.2}, Path("step_6"))
    assert change == "max_lr was 0.1, is now 0.2"
    other = {"model": {"d_model": 32}, "seed": 2, "max_lr": 0.2, "optimizer": "muon"}
    with pytest.raises(ValueError, match=r"step_6.*16.*32.*seed was 1.*2.*adamw.*muon"):
        compare_settings(saved, saved | other, Path("step_6"))


def test_other_shards_are_another_run() -> None:
    saved = [["a_train_000001.npy", 5, "x"], ["a_train_000002.npy", 6, "y"]]
    assert compare_settings({"data": saved}, {"data": list(saved)}, Path("step_6")) == []
    changed = [saved[0], ["a_train_000002.npy", 6, "other"]]
    for now, named in ((saved[:1], "2 then, 1 now"), (changed, "a_train_000002.npy has changed")):
        with pytest.raises(ValueError, match=named):
            compare_settings({"data": saved}, {"data": now}, Path("step_6"))
