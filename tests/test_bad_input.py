"""The mistakes that get a message of their own (docs/faults.md), and bits that flip."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import launcher
import numpy as np
import pytest
import torch
from test_dataset import read_files

import dataset
import train
from data_loader import TokenDataset
from gptxs import checkpoint, shards
from gptxs.files import lock_folder
from model import GPT, GPTConfig

Capture = pytest.CaptureFixture[str]
Damage = Callable[[Path], object]

HELLASWAG = {"ind": 0, "label": 0, "activity_label": "Baking", "ctx": "A man opens the oven. he"}
HELLASWAG |= {"ctx_a": "A man opens the oven.", "ctx_b": "he", "endings": ["a.", "b.", "c.", "d."]}
STEP = "log/step_000040"
VAL = "data/tiny_val_000000.npy"
TRAIN = "data/tiny_train_000001.npy"


@pytest.fixture(scope="module")
def prepared(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and its shards, shards with an index, a model, and a file of each kind."""
    desk = tmp_path_factory.mktemp("desk")
    shutil.copytree(finished / "data", desk / "data")
    shutil.copytree(finished / STEP, desk / STEP)
    shutil.copy(finished / "log/metrics.jsonl", desk / "log")
    torch.manual_seed(0)
    GPT(GPTConfig(8, 2, 1, 32, 50304)).save_pretrained(desk / "gpt2")
    texts = [f"Document {i} of the tiny source, about nothing in particular." for i in range(80)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (desk / "source.jsonl").write_text(lines)
    config = dataset.DatasetConfig(("source.jsonl",), data_dir=Path("shards"), shard_size=400)
    with chdir(desk):
        dataset.prepare(config)
    (desk / "hellaswag.jsonl").write_text(json.dumps(HELLASWAG) + "\n")
    (desk / "empty").mkdir()
    return desk


@pytest.fixture
def desk(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it as the working directory, in a process that train.py may have changed."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GPT_XS_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "_exit", sys.exit)  # with which a rank of several ends
    monkeypatch.setattr("eval.count_bytes", lambda *_: 1)  # a tenth of a second
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    precision = torch.get_float32_matmul_precision()
    yield tmp_path
    torch.set_float32_matmul_precision(precision)


def call(script: str, flags: str, capture: Capture, *arguments: Any) -> tuple[int, str, str]:
    """Runs a script's main() in this process: its exit code, standard output and error."""
    words = shlex.split(flags)
    if script == "train":
        words = launcher.tiny("--log-dir", "new", *words)
    code = 0
    capture.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *words])
        try:
            importlib.import_module(script).main(*arguments)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    out, err = capture.readouterr()
    return code, out, err


def write(name: str, content: str) -> Damage:
    return lambda desk: (desk / name).write_text(content)


def edit(name: str, **values: object) -> Damage:
    """Sets keys of a JSON object."""
    return lambda d: (d / name).write_text(json.dumps(json.loads((d / name).read_text()) | values))


def remove(name: str) -> Damage:
    return lambda desk: (desk / name).unlink()


def cut(name: str, size: int) -> Damage:
    """The first bytes only; a negative number leaves out that many at the end."""
    return lambda desk: (desk / name).write_bytes((desk / name).read_bytes()[:size])


def flip(path: Path, place: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def lock(name: str) -> Damage:
    """Held until the test ends; flock does not ask in which process."""
    return lambda desk: setattr(lock, "held", lock_folder(desk / name, flag=""))


@dataclass(frozen=True)
class Case:
    """A mistake: what is called, what was done before, and the words of the line that says so."""

    script: str
    flags: str
    words: str  # all of them are in the line
    damage: Damage | None = None
    lines: int = 1  # on standard error
    environment: dict[str, str] = field(default_factory=dict)


SHARDS = "--data-dir shards --model.vocab-size 50304"
SOURCE = "--source source.jsonl"
INDEX = "shards/index.json"
FINISH = f"`python dataset.py {SOURCE} --data-dir shards --shard-size 400"
AGAIN = f"{SOURCE} --data-dir shards --shard-size"
RESUME = "--log-dir log --resume --max-steps 60"
HELLA = "--hellaswag-every 5 --hellaswag-data hellaswag.jsonl"
TOKENS = np.arange(6000, dtype=np.uint16) % 300
GPT2 = "--checkpoint gpt2 --device cpu --dtype fp32"
PROMPT = f"{GPT2} --prompt a"
DATA = "--data hellaswag.jsonl"
ACCURACY = f"{DATA} --checkpoint gpt2"

CASES = [
    # Data.
    Case("train", "--data-dir nowhere", "nowhere `python dataset.py --data-dir nowhere`"),
    Case("train", "", "val dataset.py", remove(VAL)),
    Case("train", SHARDS, f"{FINISH} --max-tokens 9", edit(INDEX, complete=False, max_tokens=9)),
    Case("train", SHARDS, FINISH, remove("shards/text_train_000001.npy")),
    Case("train", "", TRAIN, cut(TRAIN, -2)),
    Case("train", "", f"{TRAIN} float32", lambda d: np.save(d / TRAIN, TOKENS.astype(np.float32))),
    Case("train", "", f"{TRAIN} >u2", lambda d: np.save(d / TRAIN, TOKENS.astype(">u2"))),
    Case("train", "", f"{TRAIN} (60, 100)", lambda d: np.save(d / TRAIN, TOKENS.reshape(60, 100))),
    Case("train", "", "tiny other", lambda d: np.save(d / "data/other_train_000001.npy", TOKENS)),
    Case("train", "", f"{TRAIN} 300 vocabulary", lambda d: np.save(d / TRAIN, TOKENS + 1)),
    Case("train", "--model.context-length 8192 --batch-tokens 65536 --val-tokens 9000", "8193"),
    Case("dataset", "--source nowhere", "nowhere fineweb-edu, stdlib"),
    Case("dataset", "--source nowhere/a.jsonl", "nowhere/a.jsonl"),
    Case("dataset", "--source empty", "empty"),
    Case("dataset", "--source a.jsonl", "a.jsonl no text", lambda d: os.mkfifo(d / "a.jsonl")),
    Case("dataset", f"{SOURCE} --column body", "body text"),
    Case("dataset", f"{SOURCE} --column body", "holds no text", write("source.jsonl", "")),
    Case("dataset", "--source a.txt --column body", "--column body", write("a.txt", "text")),
    Case("dataset", "--source empty", "empty/caf UTF-8", write("empty/caf\udce9.txt", "text")),
    Case("dataset", "--source log.png", "log.png .jsonl", write("log.png", "picture"), lines=2),
    Case("dataset", SOURCE, "source.jsonl text", write("source.jsonl", '{"text": ""}\n')),
    Case("dataset", f"{AGAIN} 500", "shards 400 500"),
    Case("dataset", f"{AGAIN} 400", "shards", write("source.jsonl", '{"text": "another one"}\n')),
    Case("dataset", f"{AGAIN} 400 --max-tokens 700", "shards 700"),
    Case("dataset", f"{AGAIN} 400 --column id", "shards source --column id"),
    Case("dataset", "--source owner/name --data-dir shards", "source.jsonl owner/name"),
    Case("dataset", f"{AGAIN} 400", INDEX, write(INDEX, "{")),
    Case("dataset", f"{SOURCE} --data-dir data", "data"),
    Case("dataset", f"{SOURCE} --data-dir new", "new --data-dir", lock("new")),
    Case("dataset", "--workers -1 --max-tokens 0 --shard-size 0", "workers max_tokens shard_size"),
    Case("dataset", "--source a.jsonl --split test", "--split"),
    Case("dataset", "--verify --max-tokens 5", "--verify"),
    Case("dataset", "--verify --data-dir empty", "empty --data-dir"),
    # Training.
    Case("train", "--batch-tokens 257", "257 128 nearest: 256"),
    Case("train", "--warmup-steps 41", "warmup_steps 41 40"),
    Case("train", "--min-lr 1 --max-lr 0.1", "min_lr 1.0 max_lr 0.1"),
    Case("train", "--val-tokens 15", "val_tokens 15 16"),
    Case("train", "--max-lr nan --micro-batch 0 --val-every -5", "max_lr micro_batch val_every"),
    Case("train", "--log-dir log", "log --resume --log-dir"),
    Case("train", f"{RESUME} --seed 7", "log/step_000040 seed 1337 7"),
    Case("train", RESUME, "log/step_000040 shards train", lambda d: flip(d / TRAIN, 200, 0)),
    Case("train", RESUME, "log valid", cut(f"{STEP}/model.safetensors", -9), lines=2),
    Case("train", "--init-from gpt2", "d_model 16 8 vocab_size 300 50304 gpt2"),
    Case("train", "--preset finetune", "finetune --init-from"),
    Case("train", "--wandb", "pip wandb"),
    Case("train", "", "new --log-dir", lock("new")),
    # Models.
    Case("eval", "--prompt a --checkpoint nowhere", "nowhere"),
    Case("eval", "--prompt a --checkpoint empty", "empty config.json"),
    Case("eval", PROMPT, "gelu_fast", edit("gpt2/config.json", activation_function="gelu_fast")),
    Case("eval", PROMPT, "gpt2 h.1.", edit("gpt2/config.json", n_layer=2)),
    Case("eval", PROMPT, "gpt2 wpe", edit("gpt2/config.json", n_positions=64)),
    Case("eval", PROMPT, "config.json", write("gpt2/config.json", '{"n_embd": ')),
    Case("eval", PROMPT, "pytorch_model.bin convert", remove("gpt2/model.safetensors")),
    Case("eval", "--loss --checkpoint log", "log valid", cut(f"{STEP}/config.json", 9), lines=2),
    Case("hellaswag", f"{DATA} --checkpoint {STEP}", STEP, cut(f"{STEP}/model.safetensors", -9)),
    # Evaluation.
    Case("train", "--sample-prompt Hello", "Hello vocabulary 300"),
    Case("eval", "--prompt a --checkpoint log", "vocab_size 300"),
    Case("hellaswag", ACCURACY, "line 1", write("hellaswag.jsonl", "{")),
    Case("hellaswag", ACCURACY, "line 1 label", edit("hellaswag.jsonl", label=4)),
    Case("train", HELLA, "hellaswag.jsonl line 1 vocabulary 300"),
    Case("hellaswag", f"{ACCURACY} --output hellaswag.jsonl", "hellaswag.jsonl input"),
    Case("hellaswag", f"{ACCURACY} --output nowhere/out.jsonl", "nowhere"),
    Case("eval", "--prompt a --checkpoint gpt2 --device cuda:77", "--device cuda:77"),
    Case("plot", "nowhere", "nowhere"),
    Case("plot", "log", "log", write("log/metrics.jsonl", "no metrics\n")),
    # Environment, and what would be merely ignored.
    Case("train", "", "RANK WORLD_SIZE torchrun", environment={"RANK": "1"}),
    Case("train", "", "RANK WORLD_SIZE torchrun", environment={"WORLD_SIZE": "2"}),
    Case("eval", f"{PROMPT} --loss", "prompt"),
    Case("eval", f"{PROMPT} --greedy --top-k 5", "top_k"),
]


@pytest.mark.parametrize("case", CASES, ids=[f"{n}-{c.script}" for n, c in enumerate(CASES)])
def test_a_mistake_is_one_line_with_its_remedy_and_changes_nothing(
    case: Case, desk: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case.damage is not None:
        case.damage(desk)
    before = read_files(desk)
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    code, out, err = call(case.script, case.flags, capsys)
    told = f"{case.script}.py {case.flags}: exit code {code}\n{out[-600:]}{err[-1500:]}"
    assert code == 2, told
    assert err.count("\n") == case.lines, told
    line = err.splitlines()[-1]
    assert line.startswith(f"{case.script}.py: "), told
    assert [word for word in case.words.split() if word not in line] == [], told
    after = read_files(desk)
    assert {name: after.get(name) for name in before} == before, told


def test_a_gpu_too_small_is_told_a_micro_batch_that_may_fit(desk: Path, capsys: Capture) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB.")

    code, _, err = call("train", "", capsys, fail)
    assert (code, err.count("\n")) == (1, 1)
    assert "--micro-batch 8; use --micro-batch 4" in err


def test_every_preset_is_valid() -> None:
    for preset in train.PRESETS.values():
        assert preset.validate(world_size=1) == preset.unused_options(world_size=1) == []


def flips(path: Path, count: int) -> Iterator[None]:
    """The file with one bit after another flipped; of a shard only in its header."""
    whole = path.read_bytes()
    size = 128 if path.suffix == ".npy" else len(whole)
    rng = np.random.default_rng(0)
    for position in rng.choice(size * 8, min(count, size * 8), replace=False).tolist():
        flip(path, position // 8, position % 8)
        yield
        path.write_bytes(whole)


CHECKED = [f"{STEP}/{name}" for name in ("checksums.json", "config.json", "model.safetensors")]


@pytest.mark.parametrize("name", ["shards/text_train_000001.npy", INDEX, *CHECKED])
def test_a_flipped_bit_is_an_error_or_changes_nothing(desk: Path, name: str) -> None:
    def read() -> list[Any]:
        shards.check_complete(Path("shards"))
        data = TokenDataset("shards", "train", context_length=16, vocab_size=50304)
        checkpoint.verify(Path(STEP))
        files = read_files(Path(STEP))
        sums = json.loads(files.pop("checksums.json"))
        return [data.fingerprint(), data.windows(np.arange(len(data))).tolist(), files, sums]

    expected = read()
    for _ in flips(desk / name, count=400 if name.startswith("shards") else 100):
        with suppress(ValueError, OSError):
            assert read() == expected


def test_a_flipped_bit_of_a_config_changes_no_loss(desk: Path, capsys: Capture) -> None:
    """Of a model without checksums, as the hub's are."""
    flags = f"{GPT2} --loss --json --data-dir shards --val-tokens 128"
    code, expected, _ = call("eval", flags, capsys)
    assert code == 0
    for _ in flips(desk / "gpt2/config.json", count=80):
        code, out, err = call("eval", flags, capsys)
        told = f"exit code {code}\n{out}{err}"
        assert err.count("\n") <= 1, told
        if code == 0:
            assert json.loads(out)["loss"] == json.loads(expected)["loss"], told
        else:
            assert err.startswith("eval.py: "), told
