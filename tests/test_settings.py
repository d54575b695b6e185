"""Settings and folders that do not fit are refused before anything is written."""

from common import END_OF_TEXT, check_options

import dataclasses
import re
import signal
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
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

import dataset
import train


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
        ("--hellaswag-every 1 --hellaswag-data data", "data is not a regular file"),
        ("--max-lr inf", "max_lr inf must be at most 100"),
        ("--min-lr nan", "min_lr nan must be a number"),
        ("--grad-clip nan", "grad_clip nan"),
        ("--grad-clip 0", "grad_clip 0.0"),
        ("--weight-decay -1", "weight_decay -1.0 must be at least 0"),
        ("--batch-tokens 1180591620717411303424", "batch_tokens 1180591620717411303424"),
        ("--seed 18446744073709551616", "seed 18446744073709551616"),
        ("--profile 1000000000", "profile 1000000000"),
        ("--profile 2 --max-steps 4 --warmup-steps 1", "profile traces from step 5 on"),
        ("--keep-checkpoints -1", "keep_checkpoints -1"),
        ("--preset quick", "invalid choice 'quick'"),
        ("--preset", "--preset"),
        ("--max-steps many", "--max-steps"),
        ("--no-such-flag", "--no-such-flag"),
        ("--data-dir=", "--data-dir is followed by an empty value"),
        ("--sample-prompt=", "token 50256 is outside the model's vocabulary of 300"),
        ("--sample-prompt hello", "prompt 'hello': token 31373 is outside"),
        ("--sample-prompt \udcff", "is outside the model's vocabulary"),
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


def test_the_defaults_and_presets_are_within_their_bounds() -> None:
    for preset in train.PRESETS.values():
        assert check_options(preset) == []


def test_a_delimiter_in_the_prompt_is_ordinary_text() -> None:
    tokens = train.encode_prompt("a<|endoftext|>b", vocab_size=50304)
    assert END_OF_TEXT not in tokens
    assert dataset.get_tokenizer().decode(tokens) == "a<|endoftext|>b"


def test_data_that_is_not_finished_is_refused_with_the_command_that_finishes_it(
    folder: Path,
) -> None:
    (folder / "text.jsonl").write_text('{"text": "a b c d e f g h i j k l m n o p q r s t"}\n' * 30)
    data_dir = folder / "unfinished"
    config = dataset.DatasetConfig(str(folder / "text.jsonl"), data_dir=data_dir, shard_size=100)
    dataset.prepare(config)
    assert train.has_all_shards(data_dir)
    (data_dir / "text_train_000003.npy").unlink()
    assert not train.has_all_shards(data_dir)  # so the quickstart finishes what it has begun
    refused(run(folder, "--data-dir", "unfinished"), "text_train_000003.npy", "dataset.py")
    assert not (folder / "log").exists()


def test_a_quickstart_finishes_its_folder_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    (data_dir / "stdlib_train_000001.npy").touch()
    begun: list[Path] = []
    monkeypatch.setattr(dataset, "check_complete", Mock(side_effect=ValueError("not finished")))
    monkeypatch.setattr(dataset, "prepare", lambda config: begun.append(config.data_dir))
    config = dataclasses.replace(train.QUICKSTART, data_dir=data_dir, log_dir=tmp_path / "log")
    train.prepare(config, world_size=1).release()
    assert begun == [data_dir]


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


def test_an_option_of_the_optimizer_takes_effect_in_a_resumed_run(copy: Path) -> None:
    out = run_well(copy, "--resume", "--max-steps", "42", "--weight-decay", "0.5")
    assert "weight_decay was 0.1, is now 0.5" in out
    state = torch.load(copy / "log/step_000042/training_state.pt", weights_only=True)
    groups = state["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]


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


@pytest.mark.parametrize("name", ["train_000002", "val_000000"])
def test_resuming_on_shards_of_other_content_is_refused(copy: Path, name: str) -> None:
    shard = copy / f"data/tiny_{name}.npy"
    tokens = np.load(shard)
    tokens[100] = (tokens[100] + 1) % 300
    np.save(shard, tokens)
    refused(run(copy, "--resume", "--max-steps", "42"), "the training shards are not the same")
