"""Settings and folders that do not fit are refused before anything is written."""

import re
import signal
from pathlib import Path

import numpy as np
import pytest
from launcher import (
    LONG,
    metrics,
    read_files,
    refused,
    run,
    run_well,
    saved_steps,
    start,
    steps_done,
    wait_for,
    write_shards,
)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data-dir nowhere", "nowhere: no train shards"),
        ("--batch-tokens 100", "batch_tokens 100 must be a multiple of 128"),
        ("--micro-batch 0", "micro_batch 0"),
        ("--max-steps 0", "max_steps 0"),
        ("--max-steps 3", "warmup_steps 5 must not exceed max_steps 3"),
        ("--val-every -5", "val_every -5"),
        ("--min-lr 1", "min_lr 1.0 must be between 0 and max_lr 0.01"),
        ("--device cuda:7", "--device cuda:7"),
        ("--model.n-heads 3", "model.d_model 16 must be a multiple of model.n_heads 3"),
        ("--hellaswag-every 1 --hellaswag-data x.jsonl", "x.jsonl: no such file"),
    ],
)
def test_a_mistake_is_one_line_exit_code_2_and_harms_nothing(
    folder: Path, flags: str, message: str
) -> None:
    refused(run(folder, *flags.split()), message)
    assert not (folder / "log/metrics.jsonl").exists()


@pytest.mark.parametrize("name", ["train_000002", "val_000000"])
def test_a_bad_shard_is_named_before_the_first_step(folder: Path, name: str) -> None:
    """test_data_loader.py has all kinds of bad shards; here one is met in a run."""
    shard = folder / f"data/tiny_{name}.npy"
    np.save(shard, np.append(np.load(shard), np.uint16(300)))
    refused(run(folder), f"data/{shard.name}: token 300 is outside the vocabulary of 300")
    assert not (folder / "log/metrics.jsonl").exists()


def test_a_second_run_cannot_write_into_the_same_folder(folder: Path) -> None:
    (training,) = start(folder, *LONG)
    wait_for(lambda: steps_done(folder / "log") > 1)
    refused(run(folder, "--resume"), "log: another run is writing there")
    training.kill(signal.SIGKILL)  # and the lock goes with its process
    training.wait()
    run_well(folder, "--resume", "--max-steps", "9")


def test_resuming_beyond_the_last_step_ends_at_once(copy: Path) -> None:
    run_well(copy, "--resume", "--max-steps", "30")
    assert saved_steps(copy / "log") == [28, 35, 40]
    assert len(metrics(copy / "log", "train")) == 40


def test_a_folder_that_holds_a_run_is_not_written_over(copy: Path) -> None:
    before = read_files(copy)
    refused(run(copy), "log contains a run")
    assert read_files(copy) == before


def test_resuming_with_other_settings_says_which(copy: Path) -> None:
    flags = ("--max-steps", "42", "--max-lr", "2e-2", "--micro-batch", "4")
    out = run_well(copy, "--resume", *flags)
    assert re.findall("resuming with another setting: (.*)", out) == [
        "micro_batch was 8, is now 4",
        "max_steps was 40, is now 42",
        "max_lr was 0.01, is now 0.02",
    ]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.d-model", "32"], ["model", "'d_model': 16", "'d_model': 32"]),
        (["--batch-tokens", "512"], ["batch_tokens was 256, is now 512"]),
        (["--seed", "7"], ["seed was 1337, is now 7"]),
        (["--no-shuffle"], ["shuffle was True, is now False"]),
        (["--data-dir", "other"], ["the training shards are not the same"]),
        (["--seed", "7", "--data-dir", "other"], ["seed was 1337", "the training shards are"]),
    ],
)
def test_resuming_as_another_run_is_refused(copy: Path, flags: list[str], words: list[str]) -> None:
    write_shards(copy / "other")
    (copy / "other/tiny_train_000002.npy").unlink()
    before = read_files(copy)
    refused(run(copy, "--resume", *flags), "log/step_000040 belongs to another run", *words)
    assert read_files(copy) == before
