"""train.py --init-from: a run that starts from the weights of another model, and its preset."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hub_server import HubServer
from launcher import (
    ROOT,
    TINY,
    fork,
    metrics,
    read_files,
    refused,
    run,
    run_well,
    write_shards,
)
from transformers import GPT2Config, GPT2LMHeadModel

import eval
import hellaswag
import train

# The tiny settings but for the shape, which stands first: the source's counts.
SHAPELESS = TINY[10:]
SHORT = "--max-steps 4 --warmup-steps 1 --val-every 2 --sample-every 2 --checkpoint-every 2".split()
CONTEXT = 16  # of the runs; the source's is longer


def write_source(folder: Path, vocab_size: int = 50257, context_length: int = 32) -> Path:
    """A folder that transformers wrote, whose loss is far from that of random weights."""
    torch.manual_seed(1)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size, n_positions=context_length, n_embd=16, n_layer=1, n_head=2
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def loss_of_transformers(source: Path, shard: Path, windows: int) -> float:
    """The loss of the first windows of a shard, which overlap by a token."""
    model = GPT2LMHeadModel.from_pretrained(source).eval()
    tokens = torch.from_numpy(np.load(shard)[: windows * CONTEXT + 1].astype(np.int64))
    inputs = tokens[:-1].view(windows, CONTEXT)
    targets = tokens[1:].view(windows, CONTEXT)
    with torch.no_grad():
        return float(F.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten()))


def run_line(log: Path) -> dict[str, Any]:
    """The newest line that says how a process has started."""
    lines = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "run"][-1]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def train_well(folder: Path, *flags: str) -> str:
    """Runs train.py with the source's shape: its standard output."""
    training = fork(folder, [*SHAPELESS, *flags])
    assert training.wait() == 0, training.err
    return training.out


# ---- weights and shape ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``source`` and a run that has started from it, with OpenAI's vocabulary."""
    folder = tmp_path_factory.mktemp("tuned")
    write_shards(folder / "data")
    write_source(folder / "source")
    endings = ["a", "b", "c", "d"]
    row = {"activity_label": "a", "ctx": "b c", "ctx_a": "b", "ctx_b": "c", "label": 0}
    (folder / "hellaswag.jsonl").write_text(json.dumps(row | {"endings": endings}) + "\n")
    flags = ("--init-from", "source", "--model.context-length", str(CONTEXT), "--no-shuffle")
    more = ("--hellaswag-every", "2", "--hellaswag-data", "hellaswag.jsonl")
    out = train_well(folder, *SHORT, *flags, *more)
    assert out.count("starting from the weights of source, SHA-256 ") == 1
    return folder


def test_the_first_losses_are_those_that_transformers_computes(tuned: Path) -> None:
    rows = metrics(tuned / "log", "train", "val")
    expected = loss_of_transformers(tuned / "source", tuned / "data/tiny_train_000001.npy", 16)
    assert rows["train", 0]["loss"] == pytest.approx(expected, abs=1e-4)
    expected = loss_of_transformers(tuned / "source", tuned / "data/tiny_val_000000.npy", 32)
    assert rows["val", 0]["loss"] == pytest.approx(expected, abs=1e-4)
    assert rows["val", 4]["loss"] < rows["val", 0]["loss"]
    assert rows["train", 0]["lr"] == 1e-2  # the schedule begins anew


def test_it_names_its_source_and_samples_before_the_first_step_to_compare_with(tuned: Path) -> None:
    assert [step for _, step in metrics(tuned / "log", "sample")] == [0, 2, 4]
    expected = sha256(tuned / "source/model.safetensors")
    line = run_line(tuned / "log")
    assert (line["init_from"], line["init_sha256"]) == ("source", expected)
    assert line["config"]["model"]["vocab_size"] == 50257
    assert line["config"]["model"]["context_length"] == CONTEXT


def test_a_checkpoint_of_it_is_evaluated_as_it_was_in_the_run(
    tuned: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tuned)
    rows = metrics(tuned / "log", "val", "hellaswag")
    model = "--checkpoint log --device cpu --dtype fp32 --json"
    for script, flags, name, expected in (
        (eval, "--loss --data-dir data --val-tokens 512", "loss", rows["val", 4]["loss"]),
        (hellaswag, "--data hellaswag.jsonl", "acc", rows["hellaswag", 4]["acc"]),
    ):
        monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", *model.split(), *flags.split()])
        script.main()
        assert json.loads(capsys.readouterr().out)[name] == pytest.approx(expected, abs=1e-6)
    config = json.loads((tuned / "log/step_000004/config.json").read_text())
    assert (config["vocab_size"], config["n_positions"]) == (50257, CONTEXT)


def test_two_ranks_start_from_the_same_weights(folder: Path) -> None:
    source = write_source(folder / "source", vocab_size=300)
    flags = ("--init-from", "source", "--no-shuffle", *SHORT, "--max-steps", "2")
    run_well(folder, *flags, ranks=2)
    rows = metrics(folder / "log", "train")
    expected = loss_of_transformers(source, folder / "data/tiny_train_000001.npy", 16)
    assert rows["train", 0]["loss"] == pytest.approx(expected, abs=1e-4)
    assert run_line(folder / "log")["init_sha256"] == sha256(source / "model.safetensors")


@pytest.mark.parametrize("preset", ["gpt-xs", "finetune"])
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "--model.d-model 32 --model.n-layers 3",
            ["d_model 32 must be 16", "n_layers 3 must be 1"],
        ),
        ("--model.context-length 64 --micro-batch 2", ["context_length 64 must be at most 32"]),
    ],
)
def test_flags_that_contradict_the_shape_of_the_source_are_named_with_both_values(
    folder: Path, preset: str, flags: str, words: list[str]
) -> None:
    write_source(folder / "source", vocab_size=300)
    given = ["--init-from", "source", "--preset", preset, *flags.split()]
    training = fork(folder, [*SHAPELESS, *given])
    refused((training.wait(), training.out, training.err), *words)
    assert "vocab_size" not in training.err
    assert not (folder / "log/metrics.jsonl").exists()


def test_a_hub_id_is_a_source(folder: Path) -> None:
    source = write_source(folder / "source", vocab_size=300)
    flags = [*SHAPELESS, "--init-from", "someone/small", *SHORT, "--max-steps", "1"]
    with HubServer({"someone/small": source}) as hub:
        done = subprocess.run(  # afresh: huggingface_hub looks for the hub as it is imported
            [sys.executable, ROOT / "train.py", *flags],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | hub.environment(folder / "cache"),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    line = run_line(folder / "log")
    assert line["init_from"] == "someone/small"
    assert line["init_sha256"] == sha256(source / "model.safetensors")
    assert line["config"]["model"]["context_length"] == 32


def test_of_a_log_folder_the_newest_checkpoint_that_is_not_damaged_counts(copy: Path) -> None:
    content = bytearray((copy / "log/step_000040/model.safetensors").read_bytes())
    content[-9] ^= 1
    (copy / "log/step_000040/model.safetensors").write_bytes(content)
    before = read_files(copy / "log")
    code, _, err = run(copy, "--init-from", "log", "--log-dir", "new", "--max-steps", "5")
    assert code == 0, err
    assert "step_000040: damaged" in err
    expected = sha256(copy / "log/step_000035/model.safetensors")
    assert run_line(copy / "new")["init_sha256"] == expected
    assert read_files(copy / "log") == before


# ---- resuming ------------------------------------------------------------------------------------


def test_a_checkpoint_of_the_run_counts_before_its_source_which_may_be_gone(tuned: Path) -> None:
    """And the run ends with the same weights."""
    log = shutil.copytree(tuned / "log", tuned / "again/log")
    shutil.copytree(tuned / "data", tuned / "again/data")
    expected = sha256(log / "step_000004/model.safetensors")
    shutil.rmtree(log / "step_000004")
    flags = ("--init-from", "source", "--model.context-length", str(CONTEXT), "--no-shuffle")
    out = train_well(tuned / "again", *SHORT, *flags, "--resume")
    assert sha256(log / "step_000004/model.safetensors") == expected
    assert "resuming with another setting: hellaswag_every was 2, is now 0\n" in out
    assert "init_from was" not in out
    line = run_line(log)
    assert line["resumed_from"] == "step_000002"
    assert line["init_sha256"] == sha256(tuned / "source/model.safetensors")


def test_a_run_that_is_resumed_without_naming_its_source_still_knows_it(tuned: Path) -> None:
    log = shutil.copytree(tuned / "log", tuned / "without/log")
    shutil.copytree(tuned / "data", tuned / "without/data")
    shape = ("--model.context-length", str(CONTEXT), "--model.vocab-size", "50257")
    flags = ("--no-shuffle", "--max-steps", "6", "--resume")
    out = run_well(tuned / "without", *SHORT, *shape, *flags)
    assert "init_from was" not in out
    assert run_line(log)["init_from"] == "source"
    assert run_line(log)["init_sha256"] == sha256(tuned / "source/model.safetensors")


def test_without_a_checkpoint_a_resumed_run_starts_from_the_source(folder: Path) -> None:
    source = write_source(folder / "source", vocab_size=300)
    train_well(folder, "--init-from", "source", "--resume", *SHORT, "--max-steps", "1")
    line = run_line(folder / "log")
    assert line["resumed_from"] is None
    assert line["init_sha256"] == sha256(source / "model.safetensors")


# ---- the preset ----------------------------------------------------------------------------------


def test_the_preset_fits_one_to_eight_processes() -> None:
    config = train.PRESETS["finetune"]
    assert config.preset == "finetune"
    assert config.model.context_length == train.FINETUNE_CONTEXT
    for world_size in (1, 2, 4, 8):
        assert config.validate(world_size) == []


def preset_flags(*flags: str) -> list[str]:
    """What the preset sets, on a tiny model: fewer tokens and steps."""
    common = "--preset finetune --data-dir data --sample-prompt a --device cpu --dtype fp32"
    fewer = "--batch-tokens 1200 --micro-batch 1 --max-steps 1 --warmup-steps 1 --no-compile"
    return [*common.split(), *fewer.split(), *flags]


@pytest.mark.parametrize(
    ("flags", "context_length"),
    [
        ("--batch-tokens 1024", 512),  # that of the preset
        ("--model.context-length 600", 600),  # as long as the source's
        ("--model.context-length 100", 100),
    ],
)
def test_the_preset_crops_the_context_unless_it_is_given(
    folder: Path, flags: str, context_length: int
) -> None:
    write_source(folder / "source", vocab_size=300, context_length=600)
    command = preset_flags("--init-from", "source", *flags.split())
    training = fork(folder, command)
    assert training.wait() == 0, training.err
    config = run_line(folder / "log/finetune")["config"]
    assert config["model"]["context_length"] == context_length
    assert config["val_tokens"] > 2000  # more than there are: then all of them are used
    saved = json.loads((folder / "log/finetune/step_000001/config.json").read_text())
    assert saved["n_positions"] == context_length


def test_the_preset_resumes_without_its_source_but_does_not_start_without_one(
    folder: Path,
) -> None:
    write_source(folder / "source", vocab_size=300, context_length=100)
    for flags in ([], ["--resume"]):
        training = fork(folder, preset_flags(*flags))
        result = (training.wait(), training.out, training.err)
        refused(result, "--preset finetune", "--init-from")
    assert not (folder / "log").exists()
    for flags in (["--init-from", "source"], ["--resume", "--max-steps", "2"]):
        training = fork(folder, preset_flags(*flags))
        assert training.wait() == 0, training.err
    assert run_line(folder / "log/finetune")["resumed_from"] == "step_000001"
    assert os.path.exists(folder / "log/finetune/step_000002")
