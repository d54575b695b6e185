"""Settings, shards and log folders that do not belong together, and what a run says of them."""

import dataclasses
import hashlib
import re
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from launcher import fork, metrics, refused, run, run_well, saved_steps, tiny

import dataset
import train
from gptxs.shards import ShardIndex, ShardRecord


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--preset quick", "invalid choice 'quick'"),
        ("--preset", "--preset"),
        ("--no-such-flag", "--no-such-flag"),
    ],
)
def test_flags_that_are_not_understood_are_refused(folder: Path, flags: str, message: str) -> None:
    training = fork(folder, tiny(*flags.split()))
    assert training.wait() == 2
    assert message in training.err
    assert not (folder / "log").exists()


def test_options_without_effect_are_named(folder: Path) -> None:
    settings: dict[str, Any] = {
        "muon_lr_scale": 2.0,
        "cooldown": 0.3,
        "val_tokens": 4096,
        "hellaswag_data": Path("h.jsonl"),
        "sample_prompt": "a",
        "keep_checkpoints": 7,
        "bf16_grads": True,
        "profile": 9,
    }
    off = {"max_steps": 4, "val_every": 0, "hellaswag_every": 0, "sample_every": 0}
    config = dataclasses.replace(train.TrainConfig(), checkpoint_every=0, **off, **settings)
    assert config.unused_options(world_size=1) == list(settings)
    out = run_well(folder, "--bf16-grads", "--cooldown", "0.3", "--max-steps", "5")
    assert re.findall(r"(\w+) has no effect", out) == ["cooldown", "bf16_grads"]


def test_a_quickstart_writes_or_completes_its_shards_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = Mock()
    monkeypatch.setattr(dataset, "prepare", prepare)
    config = dataclasses.replace(train.QUICKSTART, data_dir=tmp_path, log_dir=tmp_path / "log")
    train.prepare(config)
    (settings,) = prepare.call_args.args
    assert (settings.source, settings.data_dir) == (("stdlib",), tmp_path)


# ---- shards --------------------------------------------------------------------------------------


def write_index(data: Path) -> None:
    """The index.json that dataset.py would have written there."""
    records = []
    for path in sorted(data.glob("*.npy"), key=lambda path: path.name[-10:]):
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        records.append(ShardRecord(path.name, len(np.load(path)), sha256, documents=0, next=[]))
    index = ShardIndex(source="x", revision="", shard_size=6000, max_tokens=None, shards=records)
    index.complete = True
    index.write(data)


def test_files_that_the_index_does_not_list_are_named_and_not_trained_on(folder: Path) -> None:
    data = folder / "data"
    write_index(data)
    run_well(folder, "--log-dir", "clean")
    strays = ["tiny_train_000001 (1).npy", "tiny_train_000003.npy", "._tiny_train_000001.npy"]
    for name in strays:
        shutil.copy(data / "tiny_val_000000.npy", data / name)
    out = run_well(folder)
    assert metrics(folder / "log", "train") == metrics(folder / "clean", "train")
    assert "index.json" in out
    assert all(name in out for name in strays[:2])


@pytest.mark.parametrize("name", ["train_000002", "val_000000"])
def test_a_shard_that_was_changed_in_place_is_not_resumed_on(copy: Path, name: str) -> None:
    """Its size is the same, and what the index says of it too."""
    write_index(copy / "data")
    shard = copy / f"data/tiny_{name}.npy"
    tokens = np.load(shard)
    np.save(shard, tokens[::-1])
    result = run(copy, "--resume", "--max-steps", "42")
    refused(result, "log/step_000040 belongs to another run", f"{shard.name} has changed")


# ---- log folders ---------------------------------------------------------------------------------


def test_resuming_beyond_the_last_step_ends_at_once(copy: Path) -> None:
    run_well(copy, "--resume", "--max-steps", "30")
    assert saved_steps(copy / "log") == [28, 35, 40]
    assert len(metrics(copy / "log", "train")) == 40


def test_settings_that_may_change_are_named_and_take_effect_in_a_resumed_run(copy: Path) -> None:
    flags = ("--max-steps", "42", "--max-lr", "2e-2", "--micro-batch", "4", "--weight-decay", "0.5")
    out = run_well(copy, "--resume", *flags)
    assert re.findall("resuming with another setting: (.*)", out) == [
        "micro_batch was 8, is now 4",
        "max_steps was 40, is now 42",
        "max_lr was 0.01, is now 0.02",
        "weight_decay was 0.1, is now 0.5",
    ]
    state = torch.load(copy / "log/step_000042/training_state.pt", weights_only=True)
    groups = state["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
