"""Checkpoints that are damaged, dangerous, or cannot be written, and a run that goes through it."""

from common import lock_folder

import json
import math
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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
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
from model import GPT, GPTConfig
from optim import build_optimizer

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
    assert not list((copy / "log").glob(".partial*"))  # the damaged one takes no room any more


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


def test_settings_nested_too_deep_are_named() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    state = checkpoint.TrainingState(0, {}, torch.get_rng_state(), {"a": deep}, 0.0, 0, [])
    with pytest.raises(ValueError, match=r"settings"):
        checkpoint.TrainingState.from_state_dict(state.state_dict())


def test_a_state_that_lacks_a_part_is_refused(copy: Path) -> None:
    path = copy / "log/step_000040/training_state.pt"
    state = torch.load(path, weights_only=True)
    del state["losses"]
    torch.save(state, path)
    update_checksum(path)
    refused(run(copy, "--resume"), "step_000040/training_state.pt: not a training state")


def test_moments_of_another_shape_do_not_crash_a_resumed_run(copy: Path) -> None:
    path = copy / "log/step_000040/training_state.pt"
    state = torch.load(path, weights_only=True)
    for entry in state["optimizer"]["state"].values():
        entry["exp_avg"] = torch.zeros(1)
    torch.save(state, path)
    update_checksum(path)
    refused(run(copy, "--resume", "--max-steps", "41"), "optimizer.state[0].exp_avg is of shape")


def test_a_weight_decay_that_is_announced_takes_effect(copy: Path) -> None:
    losses = []
    for decay in ("0.1", "20"):
        log = copy / f"with_{decay}"
        shutil.copytree(copy / "log", log)
        flags = ("--max-steps", "42", "--log-dir", log.name, "--weight-decay", decay)
        out = run_well(copy, "--resume", *flags)
        assert ("weight_decay was 0.1, is now 20.0" in out) == (decay == "20")
        losses.append(metrics(log, "train")["train", 41]["loss"])
    assert losses[0] != losses[1]


# ---- files that are whole but not what they should be --------------------------------------------

TINY = GPTConfig(d_model=16, n_heads=2, n_layers=1, context_length=16, vocab_size=300)


SCALER = torch.amp.GradScaler("cpu").state_dict()


def stepped(config: GPTConfig = TINY) -> tuple[GPT, torch.optim.Optimizer]:
    """A model and its optimizer after one update."""
    model = GPT(config)
    optimizer = build_optimizer(model, weight_decay=0.1)
    idx = torch.zeros(1, 4, dtype=torch.long)
    model(idx, idx).backward()
    optimizer.step()
    return model, optimizer


def tiny_state(step: int, optimizer: torch.optim.Optimizer) -> checkpoint.TrainingState:
    settings = {"data": [["a", 1]]}
    rng = torch.get_rng_state()
    return checkpoint.TrainingState(step, optimizer.state_dict(), rng, settings, 2.0, 0, [3.0])


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A log folder with checkpoints of steps 6 and 7."""
    model, optimizer = stepped()
    for step in (6, 7):
        checkpoint.save(tmp_path, model, tiny_state(step, optimizer), keep=0)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: state["state"][1].update(exp_avg=torch.zeros(3)), r"state\[1\]\.exp_avg is"),
        (lambda state: state["state"][0].update(exp_avg_sq=torch.zeros(16, 300)), "of shape"),
        (lambda state: state["state"][0].update(exp_avg=torch.zeros(300, 16).half()), "float16"),
        (lambda state: state["state"][0]["exp_avg"].fill_(math.nan), "not finite"),
        (lambda state: state["state"][0]["exp_avg_sq"].fill_(-1), "negative"),
        (lambda state: state["state"][0]["step"].fill_(-2), "step is negative"),
        (lambda state: state["state"][0].update(step=7), "step is not a tensor"),
        (lambda state: state["state"][0].update(step=torch.zeros(9)), "step is of shape"),
        (
            lambda state: state["state"][0].update(exp_avg=torch.zeros(1).expand(300, 16)),
            "not a plain tensor",
        ),
        (
            lambda state: state["state"][0].update(exp_avg=torch.zeros(300, 16).to_sparse()),
            "not a plain tensor",
        ),
        (lambda state: state["state"][0].update(exp_avg=torch.ones(300, 16).to("meta")), "plain"),
        (
            lambda state: state["state"][0].update(
                exp_avg=torch.nested.nested_tensor([torch.ones(1)], layout=torch.jagged)
            ),
            "exp_avg is not a tensor",
        ),
        (lambda state: state["state"][0].pop("exp_avg"), "does not hold exp_avg, exp_avg_sq, step"),
        (lambda state: state["state"].pop(2), "the optimizer's state is not that"),
        (lambda state: state["state"].update({99: {}}), "the optimizer's state is not that"),
        (lambda state: state.update(state=[]), "the optimizer's state is not that"),
        (lambda state: state["param_groups"].pop(), "groups are not those"),
        (lambda state: state["param_groups"][0]["params"].pop(), "groups are not those"),
        (lambda state: state["param_groups"][0]["params"].reverse(), "groups are not those"),
        (lambda state: state.update(param_groups=None), "groups are not those"),
    ],
)
def test_moments_that_do_not_fit_their_parameters_are_refused(
    change: Callable[[dict[str, Any]], object], named: str
) -> None:
    """The fused AdamW would read and write outside of its tensors."""
    _, saved = stepped()
    model, optimizer = stepped()
    state_dict = saved.state_dict()
    change(state_dict)
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match=rf"^step_6/training_state\.pt: .*{named}"):
        checkpoint.load_optimizer(optimizer, state_dict, Path("step_6"))
    assert optimizer.state_dict()["state"].keys() == before["state"].keys()
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_options_of_a_resumed_optimizer_are_those_of_today() -> None:
    model, saved = stepped()
    today = build_optimizer(model, weight_decay=0.5)
    for group in today.param_groups:
        group.update(betas=(0.5, 0.6), eps=1e-3)
    checkpoint.load_optimizer(today, saved.state_dict())
    assert [group["weight_decay"] for group in today.param_groups] == [0.5, 0.0]
    assert [group["betas"] for group in today.param_groups] == [(0.5, 0.6)] * 2
    assert [group["eps"] for group in today.param_groups] == [1e-3] * 2
    for index, expected in saved.state_dict()["state"].items():
        for name, value in expected.items():
            assert torch.equal(today.state_dict()["state"][index][name], value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", -1),
        ("step", "7"),
        ("step", 7.5),
        ("step", True),
        ("step", 10**400),
        ("optimizer", []),
        ("optimizer", {}),
        ("optimizer", {"state": {}, "param_groups": []}),
        ("rng", None),
        ("rng", torch.zeros(7, dtype=torch.uint8)),
        ("rng", torch.zeros(5056)),
        ("rng", torch.zeros(5056, dtype=torch.uint8)),
        ("settings", 3),
        ("settings", {1: 2}),
        ("settings", {"model": torch.zeros(2)}),
        ("best_val", "low"),
        ("best_val", math.nan),
        ("skipped", None),
        ("losses", 3.0),
        ("losses", [1.0, "2"]),
        ("scaler", {"scale": 2.0}),
        ("scaler", SCALER | {"scale": 0.0}),
        ("scaler", SCALER | {"scale": math.nan}),
        ("scaler", SCALER | {"growth_interval": 2.5}),
        ("scaler", SCALER | {"scale": "1"}),
    ],
)
def test_a_part_of_a_state_of_another_type_is_named(tiny: Path, key: str, value: object) -> None:
    path = tiny / "step_000007/training_state.pt"
    torch.save(torch.load(path, weights_only=True) | {key: value}, path)
    with pytest.raises(ValueError, match=rf"training_state\.pt: not a .*`\$\.{key}") as error:
        checkpoint.load_state(path.parent)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, [1], 3, torch.zeros(3), {}])
def test_a_state_that_is_no_state_is_named(tiny: Path, content: object) -> None:
    path = tiny / "step_000007/training_state.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"training_state\.pt: not a training state"):
        checkpoint.load_state(path.parent)


def test_a_folder_of_another_step_than_its_name_is_not_resumed(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny / "step_000006", tiny / "step_9999999")
    assert checkpoint.latest_valid(tiny) == tiny / "step_000007"
    assert "step_9999999: damaged (it is of step 6)" in capsys.readouterr().err
    assert checkpoint.find_checkpoint(tiny, check=True) == tiny / "step_000007"
    with pytest.raises(ValueError, match="of step 6, not"):
        checkpoint.load_state(tiny / "step_9999999")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "null",
        "[]",
        "3",
        "{}",
        '{"config.json": 3}',
        '{"config.json": [1, "x"]}',
        '{"config.json": [1.5, 2]}',
        '{"config.json": [' + "9" * 400 + ", 2]}",
        "[" * 100_000,
    ],
)
def test_checksums_that_are_not_checksums_are_one_line(tiny: Path, content: str) -> None:
    newest = tiny / "step_000007"
    (newest / "checksums.json").write_text(content)
    damage = checkpoint.verify(newest)
    assert damage is not None
    assert "checksums.json" in damage
    assert "\n" not in damage
    assert checkpoint.latest_valid(tiny) == tiny / "step_000006"
    with pytest.raises(ValueError, match=r"step_000007: damaged .*--no-verify"):
        checkpoint.open_checkpoint(str(newest), check=True)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "..", "", "a\\b", "x\0y"])
def test_checksums_are_of_files_in_the_folder(tiny: Path, name: str) -> None:
    newest = tiny / "step_000007"
    (tiny / "outside").write_text("")
    sums = json.loads((newest / "checksums.json").read_text())
    (newest / "checksums.json").write_text(json.dumps(sums | {name: [0, 0]}))
    damage = checkpoint.verify(newest)
    assert damage is not None
    assert "not a file of this folder" in damage


@pytest.mark.parametrize(
    "name", ["checksums.json", "model.safetensors", "config.json", "training_state.pt"]
)
def test_what_is_not_a_file_is_not_opened(tiny: Path, name: str) -> None:
    newest = tiny / "step_000007"
    (newest / name).unlink()
    os.mkfifo(newest / name)
    assert checkpoint.latest_valid(tiny) == tiny / "step_000006"
    opener = checkpoint.load_state if name == "training_state.pt" else GPT.from_pretrained
    if name == "checksums.json":
        opener = partial(checkpoint.open_checkpoint, check=True)
    with pytest.raises(ValueError, match=r"not a training state|damaged"):
        opener(newest)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_is_found_before_a_model_is_used(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = tiny / "step_000007"
    expected = GPT.from_pretrained(newest).state_dict()
    flip_a_bit(newest / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors does not match.* --no-verify"):
        checkpoint.open_checkpoint(str(newest), check=True)
    flipped = checkpoint.open_checkpoint(str(newest), check=False).state_dict()
    assert not all(torch.equal(flipped[name], value) for name, value in expected.items())
    # Of a log folder the newest is taken that is whole.
    before = checkpoint.open_checkpoint(str(tiny), check=True).state_dict()
    assert all(torch.equal(before[name], value) for name, value in expected.items())
    assert "step_000007: damaged" in capsys.readouterr().err
    flip_a_bit(tiny / "step_000006/config.json")
    with pytest.raises(ValueError, match="no valid checkpoint"):
        checkpoint.open_checkpoint(str(tiny), check=True)


def test_a_model_copied_without_its_training_state_is_whole(tiny: Path) -> None:
    (tiny / "step_000007/training_state.pt").unlink()
    checkpoint.open_checkpoint(str(tiny / "step_000007"), check=True)
    (tiny / "step_000007/checksums.json").unlink()
    checkpoint.open_checkpoint(str(tiny), check=True)


@pytest.mark.parametrize("where", ["weight", "moment"])
def test_a_checkpoint_that_could_not_be_resumed_is_not_written(tiny: Path, where: str) -> None:
    model, optimizer = stepped()
    weight = model.transformer.ln_f.weight
    with torch.no_grad():
        (weight if where == "weight" else optimizer.state[weight]["exp_avg"])[3] = math.inf
    with pytest.raises(OSError, match=r"step_000008 was not written: .* not finite"):
        checkpoint.save(tiny, model, tiny_state(8, optimizer), keep=1)
    assert saved_steps(tiny) == [6, 7]
    assert not list(tiny.glob(".partial_*"))


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_deny_the_new_one(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def rename_none_of_the_old(path: Path, target: Path) -> Path:
        if path.name.startswith("step_"):
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_none_of_the_old)
    model, optimizer = stepped()
    saved = checkpoint.save(tiny, model, tiny_state(8, optimizer), keep=1)
    assert checkpoint.verify(saved) is None
    assert saved_steps(tiny) == [6, 7, 8]


def test_too_little_memory_is_not_called_a_damaged_file(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "load", Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        checkpoint.load_state(tiny / "step_000007")


def test_a_stray_file_of_weights_is_not_read(tiny: Path) -> None:
    newest = tiny / "step_000007"
    expected = GPT.from_pretrained(newest).state_dict()
    GPT(TINY).save_pretrained(tiny / "other")
    shutil.copy(tiny / "other/model.safetensors", newest / "model_backup.safetensors")
    loaded = checkpoint.open_checkpoint(str(tiny), check=True).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_a_model_of_another_shape_is_not_resumed(tiny: Path) -> None:
    newest = tiny / "step_000007"
    with pytest.raises(ValueError, match=r"step_000007/config\.json: the model is"):
        checkpoint.load_model(GPT(replace(TINY, n_layers=2)), newest)
    model = GPT(TINY)
    embedding = model.transformer.wte.weight
    checkpoint.load_model(model, newest)
    assert model.transformer.wte.weight is embedding
    assert torch.equal(embedding, GPT.from_pretrained(newest).transformer.wte.weight)


OLD = [["a_train_000001.npy", 5], ["a_train_000002.npy", 6]]
NEW = [["a_train_000001.npy", 5, "x"], ["a_train_000002.npy", 6, "y"], ["a_val_000000.npy", 7, "z"]]


@pytest.mark.parametrize(
    ("saved", "now", "same"),
    [
        (OLD, OLD, True),
        (NEW, NEW, True),
        (OLD, NEW, True),
        (OLD[:1], NEW, False),
        ([OLD[0], ["a_train_000002.npy", 7]], NEW, False),
        (NEW, [NEW[0], ["a_train_000002.npy", 6, "other"], NEW[2]], False),
        (NEW, NEW[:2], False),
        (None, NEW, False),
        ([3, "x"], NEW, False),
        ([], NEW, False),
    ],
)
def test_data_is_compared_on_what_both_know(saved: object, now: object, same: bool) -> None:
    if same:
        assert checkpoint.compare_settings({"data": saved}, {"data": now}, Path("x")) == []
        return
    with pytest.raises(ValueError, match="the training shards are not the same"):
        checkpoint.compare_settings({"data": saved}, {"data": now}, Path("x"))


def test_signals_that_windows_lacks_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    handled: list[int] = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: handled.append(number))
    monkeypatch.delattr(signal, "SIGHUP")
    monkeypatch.delattr(signal, "SIGUSR1")
    checkpoint.StopSignal()
    assert handled == [signal.SIGTERM, signal.SIGINT]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of step 7."""
    model, optimizer = stepped()
    return checkpoint.save(tmp_path_factory.mktemp("whole"), model, tiny_state(7, optimizer), 0)


def read_everything(folder: Path) -> None:
    """All that a run resumed from a checkpoint reads, without the checksums' help, and a step."""
    model, optimizer = stepped()
    state = checkpoint.load_state(folder)
    checkpoint.load_model(model, folder)
    checkpoint.load_optimizer(optimizer, state.optimizer, folder)
    checkpoint.compare_settings(state.settings, state.settings, folder)
    optimizer.step()
    torch.Generator().set_state(state.rng)


@pytest.mark.parametrize(
    "name", ["config.json", "checksums.json", "model.safetensors", "training_state.pt"]
)
@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(
    places=st.lists(st.floats(0, 1, exclude_max=True), max_size=4),
    near_start=st.booleans(),
    bit=st.integers(0, 7),
    length=st.none() | st.floats(0, 1),
)
def test_flipped_and_lost_bytes_are_one_line_or_harmless(
    whole: Path,
    name: str,
    places: list[float],
    near_start: bool,
    bit: int,
    length: float | None,
) -> None:
    """Where the checksums do not tell, as for a folder of which somebody has changed them."""
    file = whole / name
    content = file.read_bytes()
    damaged = bytearray(content)
    for place in places:  # the headers of safetensors are at the start
        damaged[int(place * (min(2000, len(content)) if near_start else len(content)))] ^= 1 << bit
    if length is not None:
        del damaged[int(length * len(content)) :]
    file.write_bytes(damaged)
    message = str(whole)
    try:
        if name == "checksums.json":
            assert checkpoint.verify(whole) or damaged == content
        else:
            read_everything(whole)
    except ValueError as error:
        message = str(error)
    finally:
        file.write_bytes(content)
    assert str(whole) in message
    assert "\n" not in message


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
    code, _, err = run(folder, *flags, *stopped, on_step=partial(full_disk, limit, 1, 10**9))
    assert code == 1  # what was trained since is lost
    assert "the last checkpoint was not saved, the newest is stopped/step_000000" in err
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
    code, out, err = run(folder, "--max-steps", "15", on_step=lose_write_permission)
    assert code == 1
    assert "the last checkpoint was not saved, the newest is log/step_000000" in err
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
