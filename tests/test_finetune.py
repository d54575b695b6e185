"""train.py --init-from: a run that starts from another model's weights, and its preset."""

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
from launcher import ROOT, TINY, fork, metrics, refused, run_well, write_shards
from transformers import GPT2Config, GPT2LMHeadModel

import eval
import hellaswag

# The tiny settings but for the shape, which stands first: the source's counts.
SHAPELESS = TINY[10:]
SHORT = "--max-steps 4 --warmup-steps 1 --val-every 2 --sample-every 2 --checkpoint-every 2".split()
CONTEXT = 16  # of the runs; the source's is longer
FROM_SOURCE = (*SHAPELESS, *SHORT, "--init-from", "source", "--no-shuffle")
FROM_SOURCE = (*FROM_SOURCE, "--model.context-length", str(CONTEXT))


def write_source(folder: Path, vocab_size: int = 50257, context_length: int = 32) -> Path:
    """A folder that transformers wrote, whose loss is far from that of random weights."""
    torch.manual_seed(1)
    shape: dict[str, Any] = {"vocab_size": vocab_size, "n_positions": context_length}
    model = GPT2LMHeadModel(GPT2Config(**shape, n_embd=16, n_layer=1, n_head=2))
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


def sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def train_well(folder: Path, *flags: str) -> str:
    """Runs train.py with these flags alone: its standard output."""
    training = fork(folder, list(flags))
    assert training.wait() == 0, training.err
    return training.out


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``source`` and a run that has started from it, with OpenAI's vocabulary."""
    folder = tmp_path_factory.mktemp("tuned")
    write_shards(folder / "data")
    write_source(folder / "source")
    row = {"activity_label": "a", "ctx": "b c", "ctx_a": "b", "ctx_b": "c", "label": 0}
    row["endings"] = ["a", "b", "c", "d"]
    (folder / "hellaswag.jsonl").write_text(json.dumps(row) + "\n")
    hellaswag_flags = ("--hellaswag-every", "2", "--hellaswag-data", "hellaswag.jsonl")
    train_well(folder, *FROM_SOURCE, *hellaswag_flags)
    return folder


def test_the_first_losses_are_those_that_transformers_computes(tuned: Path) -> None:
    rows = metrics(tuned / "log", "train", "val", "sample")
    expected = loss_of_transformers(tuned / "source", tuned / "data/tiny_train_000001.npy", 16)
    assert rows["train", 0]["loss"] == pytest.approx(expected, abs=1e-4)
    expected = loss_of_transformers(tuned / "source", tuned / "data/tiny_val_000000.npy", 32)
    assert rows["val", 0]["loss"] == pytest.approx(expected, abs=1e-4)
    assert rows["val", 4]["loss"] < rows["val", 0]["loss"]
    assert rows["train", 0]["lr"] == 1e-2  # the schedule begins anew
    assert ("sample", 0) in rows  # of the source, to compare with
    config = run_line(tuned / "log")["config"]
    assert (config["init_from"], config["init_sha256"]) == ("source", sha256(tuned / "source"))


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
    assert run_line(folder / "log")["config"]["init_sha256"] == sha256(source)


def test_all_flags_that_contradict_the_source_are_named_with_both_values(folder: Path) -> None:
    write_source(folder / "source", vocab_size=300)
    flags = "--init-from source --model.d-model 32 --model.n-layers 3 --model.context-length 64"
    training = fork(folder, [*SHAPELESS, *flags.split()])
    words = ["d_model 32 must be 16", "n_layers 3 must be 1", "length 64 must be at most 32"]
    refused((training.wait(), training.out, training.err), *words)
    assert "vocab_size" not in training.err
    assert not (folder / "log/metrics.jsonl").exists()


def test_a_hub_id_is_a_source(folder: Path) -> None:
    """By the command itself: huggingface_hub looks for the hub as it is imported."""
    source = write_source(folder / "source", vocab_size=300)
    flags = [*SHAPELESS, "--init-from", "someone/small", *SHORT, "--max-steps", "1"]
    command = [sys.executable, ROOT / "train.py", *flags]
    with HubServer({"someone/small": source}) as hub:
        environment = os.environ | hub.environment(folder / "cache")
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    config = run_line(folder / "log")["config"]
    assert (config["init_from"], config["init_sha256"]) == ("someone/small", sha256(source))
    assert config["model"]["context_length"] == 32


def test_a_checkpoint_of_the_run_counts_before_the_source(tuned: Path, tmp_path: Path) -> None:
    """It ends with the same weights, and still knows the source when that is not named again."""
    shutil.copytree(tuned / "data", tmp_path / "data")
    log = shutil.copytree(tuned / "log", tmp_path / "log")
    shutil.rmtree(log / "step_000004")
    out = train_well(tmp_path, *FROM_SOURCE, "--resume")
    assert "resuming with another setting: hellaswag_every was 2, is now 0\n" in out
    assert run_line(log)["resumed_from"] == "step_000002"
    assert sha256(log / "step_000004") == sha256(tuned / "log/step_000004")
    flags = ("--model.vocab-size", "50257", "--no-shuffle", "--max-steps", "6", "--resume")
    out += run_well(tmp_path, *SHORT, *flags)
    assert "init_from was" not in out
    config = run_line(log)["config"]
    assert (config["init_from"], config["init_sha256"]) == ("source", sha256(tuned / "source"))


def test_the_preset_crops_the_context_and_resumes_without_the_source(folder: Path) -> None:
    flags = (
        "--preset finetune --data-dir data --sample-prompt a --device cpu --dtype fp32 --no-compile"
        " --batch-tokens 1024 --micro-batch 1 --warmup-steps 1 --resume --max-steps"
    ).split()
    log = folder / "log/finetune"
    source = write_source(folder / "source", vocab_size=300, context_length=600)
    train_well(folder, *flags, "1", "--init-from", "source")  # there is no checkpoint yet
    line = run_line(log)
    assert (line["resumed_from"], line["config"]["init_sha256"]) == (None, sha256(source))
    assert json.loads((log / "step_000001/config.json").read_text())["n_positions"] == 512
    shutil.rmtree(source)
    train_well(folder, *flags, "2")
    assert run_line(log)["resumed_from"] == "step_000001"
    assert (log / "step_000002").exists()
