"""Whatever a user hands the scripts, mistakes end in one line and exit code 2, and change nothing.

``CASES`` lists them by class of fault; docs/faults.md has a row for each class, and a test compares
the two. Below it, bytes of every file format that is read are flipped and cut at random.
"""

import common

import contextlib
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import launcher
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import checkpoint
import dataset
from model import GPT, GPTConfig
from optim import build_optimizer

ROOT = Path(__file__).parents[1]
TIMEOUT = 20  # seconds in which a call in this process must have ended
Damage = Callable[[Path], object]
Capture = pytest.CaptureFixture[str]

# What each script is called with; the flags of a case come after these, and the last one counts.
FLAGS = {
    "train": [*launcher.TINY, "--log-dir", "new"],
    "dataset": "--data-dir new --workers 1".split(),
    "eval": "--checkpoint gpt2 --device cpu --dtype fp32 --max-new-tokens 2 --seed 1".split(),
    "hellaswag": "--checkpoint gpt2 --data hellaswag.jsonl --device cpu --dtype fp32".split(),
    "plot": [],
}
ROWS = [
    {
        "ind": 0,
        "activity_label": "Baking",
        "ctx_a": "A man opens the oven.",
        "ctx_b": "he",
        "ctx": "A man opens the oven. he",
        "label": 0,
        "endings": ["takes out the bread.", "paints.", "drives a car.", "swims away."],
    },
    {
        "ind": 1,
        "activity_label": "Sailing",
        "ctx_a": "A boat leaves.",
        "ctx_b": "the sailor",
        "ctx": "A boat leaves. the sailor",
        "label": 2,
        "endings": ["bakes a cake.", "reads.", "raises the sail.", "mows the lawn."],
    },
]
LOG_TXT = "".join(f"{step} train {5 - step / 10:.6f}\n" for step in range(20)) + "0 val 5.5\n"


# ---- the desk: a folder with one of everything ---------------------------------------------------


@pytest.fixture(scope="module")
def prepared(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and its shards, shards with an index, a model, and a file of each kind."""
    desk = tmp_path_factory.mktemp("desk")
    shutil.copytree(finished / "data", desk / "data")
    shutil.copytree(finished / "log", desk / "log")
    for step in launcher.saved_steps(desk / "log")[:-1]:
        shutil.rmtree(desk / "log" / f"step_{step:06d}")
    torch.manual_seed(0)
    GPT(GPTConfig(8, 2, 1, 32, 50304)).save_pretrained(desk / "gpt2")
    texts = [f"Document {i} of the tiny source, about nothing in particular." for i in range(80)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (desk / "source.jsonl").write_text(lines)
    (desk / "text.txt").write_text("\n".join(texts))
    write_parquet(desk / "table.parquet", texts)
    dataset.prepare(
        dataset.DatasetConfig(
            source=str(desk / "source.jsonl"), data_dir=desk / "shards", shard_size=400, workers=1
        )
    )
    (desk / "hellaswag.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (desk / "log.txt").write_text(LOG_TXT)
    (desk / "empty").mkdir()
    return desk


def write_parquet(path: Path, texts: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": texts}), path, row_group_size=20)


@pytest.fixture
def desk(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it as the working directory, in a process that train.py may have changed."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "GPT_XS_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "_exit", sys.exit)  # common ends the ranks of a failed run with it
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGALRM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    precision = torch.get_float32_matmul_precision()
    yield tmp_path
    torch.set_float32_matmul_precision(precision)
    for number, handler in handlers.items():
        signal.signal(number, handler)


class HangError(BaseException):
    """A call that does not end; no script handles this class."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def fail(number: int, frame: object) -> None:
        # A thread that waits for a FIFO cannot be interrupted, but it can be given its end.
        for path in Path().rglob("*"):
            if path.is_fifo():
                os.close(os.open(path, os.O_RDWR))
        raise HangError(f"still running after {seconds} s")

    signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def call(script: str, flags: list[str], capture: Capture) -> tuple[int, str, str]:
    """Runs a script's main() in this process: its exit code, standard output and error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *FLAGS[script], *flags])
        return call_function(importlib.import_module(script).main, capture)


def call_function(function: Callable[[], object], capture: Capture) -> tuple[int, str, str]:
    """Calls a function: the exit code that it ends with, standard output and error."""
    code = 0
    capture.readouterr()
    with time_limit(TIMEOUT):
        try:
            function()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    out, err = capture.readouterr()
    return code, out, err


def files_of(folder: Path) -> dict[str, int]:
    """A checksum of each regular file."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "lock" not in path.name]
    return {str(path.relative_to(folder)): zlib.crc32(path.read_bytes()) for path in paths}


# ---- damage --------------------------------------------------------------------------------------


def nothing(desk: Path) -> None:
    """For a case whose flags are the mistake."""


def write(name: str, content: str | bytes) -> Damage:
    data = content.encode() if isinstance(content, str) else content

    def damage(desk: Path) -> None:
        (desk / name).parent.mkdir(parents=True, exist_ok=True)
        (desk / name).write_bytes(data)

    return damage


def append(name: str, content: str | bytes) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda desk: (desk / name).write_bytes((desk / name).read_bytes() + data)


def cut(name: str, size: int) -> Damage:
    """The first bytes only; a negative number leaves out that many at the end."""
    return lambda desk: (desk / name).write_bytes((desk / name).read_bytes()[:size])


def replace(name: str, old: bytes, new: bytes) -> Damage:
    def damage(desk: Path) -> None:
        content = (desk / name).read_bytes()
        assert old in content
        (desk / name).write_bytes(content.replace(old, new, 1))

    return damage


def flip(name: str, place: int, bit: int = 0) -> Damage:
    def damage(desk: Path) -> None:
        content = bytearray((desk / name).read_bytes())
        content[place] ^= 1 << bit
        (desk / name).write_bytes(content)

    return damage


def remove(name: str) -> Damage:
    return lambda desk: (
        shutil.rmtree(desk / name) if (desk / name).is_dir() else (desk / name).unlink()
    )


def folder_instead(name: str) -> Damage:
    def damage(desk: Path) -> None:
        (desk / name).unlink(missing_ok=True)
        (desk / name).mkdir(parents=True)

    return damage


def fifo_instead(name: str) -> Damage:
    def damage(desk: Path) -> None:
        (desk / name).parent.mkdir(parents=True, exist_ok=True)
        (desk / name).unlink(missing_ok=True)
        os.mkfifo(desk / name)

    return damage


def socket_instead(name: str) -> Damage:
    def damage(desk: Path) -> None:
        (desk / name).unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(name)  # relative: its path may have only a hundred characters

    return damage


def edit_json(name: str, **values: object) -> Damage:
    """Sets keys of an object; ... deletes one, and a__b is key b in the first element of a."""

    def damage(desk: Path) -> None:
        content = json.loads((desk / name).read_text())
        for key, value in values.items():
            *outer, last = key.split("__")
            inner = content[outer[0]][0] if outer else content
            if value is ...:
                del inner[last]
            else:
                inner[last] = value
        (desk / name).write_text(json.dumps(content))

    return damage


def save_array(name: str, array: Any) -> Damage:
    return lambda desk: np.save(desk / name, array, allow_pickle=True)


STEP = "log/step_000040"


def renew_checksums(desk: Path) -> None:
    """So that what was changed in the checkpoint is not found by its checksums."""
    path = desk / STEP / "checksums.json"
    sums = {}
    for name in json.loads(path.read_text()):
        content = (desk / STEP / name).read_bytes()
        sums[name] = [len(content), zlib.crc32(content)]
    path.write_text(json.dumps(sums))


def with_sums(damage: Damage) -> Damage:
    def both(desk: Path) -> None:
        damage(desk)
        renew_checksums(desk)

    return both


def edit_state(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(desk: Path) -> None:
        path = desk / STEP / "training_state.pt"
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)
        renew_checksums(desk)

    return damage


def save_state(content: object) -> Damage:
    return with_sums(lambda desk: torch.save(content, desk / STEP / "training_state.pt"))


def edit_moments(**values: object) -> Damage:
    return edit_state(lambda state: state["optimizer"]["state"][0].update(values))


def edit_weights(folder: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(desk: Path) -> None:
        path = desk / folder / "model.safetensors"
        weights = safetensors.torch.load(path.read_bytes())
        change(weights)
        safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
        if folder == STEP:
            renew_checksums(desk)

    return damage


def set_weight(folder: str, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return edit_weights(folder, lambda w: w.update({name: change(w[name]).contiguous()}))


def hellaswag_row(**values: object) -> Damage:
    """Its second line with these values; ... deletes a key."""
    row = {**ROWS[1], **values}
    row = {key: value for key, value in row.items() if value is not ...}
    return write("hellaswag.jsonl", f"{json.dumps(ROWS[0])}\n{json.dumps(row)}\n")


def copy(source: str, target: str) -> Damage:
    def damage(desk: Path) -> None:
        if (desk / source).is_dir():
            shutil.copytree(desk / source, desk / target)
        else:
            (desk / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(desk / source, desk / target)

    return damage


def several(*damages: Damage) -> Damage:
    def damage(desk: Path) -> None:
        for each in damages:
            each(desk)

    return damage


def table(**columns: object) -> Damage:
    def damage(desk: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(columns), desk / "table.parquet")

    return damage


# ---- the cases -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A mistake: what is called, what was done before, and the words of the line that says so."""

    script: str
    flags: str
    words: str  # all of them are in the output, whatever the case of the letters
    damage: Damage = nothing
    code: int = 2
    lines: int = 1  # on standard error
    environment: dict[str, str] = field(default_factory=dict)
    changes: tuple[str, ...] = ()  # files that the call may change, where its result is right


DEEP = "[" * 100_000
VAL = "data/tiny_val_000000.npy"
TRAIN = "data/tiny_train_000001.npy"
PART = "shards/text_train_000001.npy"  # one of those with an index
RESUME = "--log-dir log --resume --max-steps 60"
VERIFY = "--data-dir shards --verify"
SOURCE = "--source source.jsonl"
AGAIN = "--source source.jsonl --data-dir shards --shard-size 400"
LOSS = "--loss --data-dir shards --val-tokens 128"
PROMPT = "--prompt a"
# Training states and checkpoints: the line that says which one is damaged, and that none is left.
LAST = 2
RANK_5 = {"RANK": "5", "WORLD_SIZE": "2"}

CASES: dict[str, list[Case]] = {
    "a flag that does not exist, or a value that is not of its type": [
        Case("train", "--no-such-flag", "no-such-flag"),
        Case("train", "--max-steps many", "max-steps"),
        Case("train", "--preset gpt5", "preset gpt5"),
        Case("train", "--dtype fp64", "dtype"),
        Case("train", "--device gpu9", "device gpu9"),
        Case("dataset", "--shard-size 1e6", "shard-size"),
        Case("dataset", "--sources x", "sources"),
        Case("eval", "--temperature warm", "temperature"),
        Case("eval", f"{PROMPT} --device meta", "meta"),
        Case("hellaswag", "--split test", "split"),
        Case("hellaswag", "--limit 1.5", "limit"),
        Case("plot", "log --x days", "days"),
        Case("plot", "log --smooth two", "smooth"),
    ],
    "a number outside its range, NaN or infinity": [
        Case("train", "--max-lr inf", "max_lr inf"),
        Case("train", "--max-lr nan", "max_lr nan"),
        Case("train", "--min-lr nan", "min_lr nan"),
        Case("train", "--grad-clip nan", "grad_clip nan"),
        Case("train", "--weight-decay inf", "weight_decay inf"),
        Case("train", "--weight-decay -1", "weight_decay -1"),
        Case("train", f"--batch-tokens {2**70}", "batch_tokens"),
        Case("train", "--micro-batch 0", "micro_batch 0"),
        Case("train", "--max-steps -1", "max_steps -1"),
        Case("train", f"--max-steps {10**30}", "max_steps"),
        Case("train", f"--seed {2**64}", "seed"),
        Case("train", "--model.n-layers 0", "n_layers 0"),
        Case("train", "--model.n-layers 10000000", "n_layers"),
        Case("train", f"--model.d-model {2**60}", "d_model"),
        Case("train", "--val-every -5", "val_every -5"),
        Case("dataset", f"{SOURCE} --shard-size {10**12}", "shard_size"),
        Case("dataset", f"{SOURCE} --shard-size 0", "shard_size 0"),
        Case("dataset", f"{SOURCE} --workers 100000000", "workers"),
        Case("dataset", f"{SOURCE} --max-tokens -3", "max_tokens -3"),
        Case("eval", f"{PROMPT} --temperature nan", "temperature nan"),
        Case("eval", f"{PROMPT} --temperature inf", "temperature inf"),
        Case("eval", f"{PROMPT} --temperature -1", "temperature -1"),
        Case("eval", f"{PROMPT} --num-samples 100000000", "num_samples"),
        Case("eval", f"{PROMPT} --num-samples 0", "num_samples 0"),
        Case("eval", f"{PROMPT} --top-p nan", "top_p nan"),
        Case("eval", f"{PROMPT} --top-p 2", "top_p 2"),
        Case("eval", f"{PROMPT} --top-k {2**70}", "top_k"),
        Case("eval", f"{PROMPT} --max-new-tokens {10**18}", "max_new_tokens"),
        Case("eval", f"{PROMPT} --seed {2**64}", "seed"),
        Case("eval", f"{LOSS} --context-length {2**40}", "context"),
        Case("hellaswag", "--limit 0", "limit 0"),
        Case("hellaswag", f"--limit {2**80}", "limit"),
        Case("plot", "log --smooth -5", "smooth -5"),
    ],
    "options that contradict each other": [
        Case("train", "--batch-tokens 257", "batch_tokens 257 multiple"),
        Case("train", "--model.n-heads 3", "multiple of"),
        Case("train", "--min-lr 1 --max-lr 0.1", "min_lr 1"),
        Case("train", "--warmup-steps 41", "warmup_steps 41"),
        Case("train", "--val-tokens 15", "val_tokens 15"),
        Case("train", "--preset finetune", "finetune --init-from"),
        Case("train", "--init-from gpt2", "d_model 16 8 vocab_size 300 50304 gpt2"),
        Case("eval", f"{PROMPT} --greedy --temperature 2", "greedy temperature"),
        Case("eval", f"{LOSS} {PROMPT}", "loss prompt"),
        Case("eval", f"{PROMPT} --stream --json", "stream json"),
        Case("plot", "log --out x.gif", "x.gif .png"),
    ],
    "RANK, WORLD_SIZE or the master's address of another job, or that contradict each other": [
        Case("train", "", "RANK=1 unset", environment={"RANK": "1"}),
        Case("train", "", "WORLD_SIZE=2 RANK", environment={"WORLD_SIZE": "2"}),
        Case("train", "", "MASTER_ADDR", environment={"RANK": "0", "WORLD_SIZE": "2"}),
        Case("train", "", "RANK unset", environment={"RANK": "first"}),
        Case("dataset", SOURCE, "RANK=5 WORLD_SIZE=2", environment=RANK_5),
        Case("dataset", SOURCE, "RANK=3", environment={"RANK": "3"}),
        Case("dataset", SOURCE, "WORLD_SIZE", environment={"RANK": "0", "WORLD_SIZE": "-2"}),
        Case("dataset", SOURCE, "RANK", environment={"RANK": "", "WORLD_SIZE": "2"}),
    ],
    "a file or folder that is missing": [
        Case("train", "--data-dir nowhere", "nowhere dataset.py"),
        Case("train", "", "val shards", remove(VAL)),
        Case("train", "--hellaswag-every 5 --hellaswag-data no.jsonl", "no.jsonl"),
        Case("train", "--init-from nowhere", "nowhere no such folder"),
        Case("train", "--init-from empty", "empty config.json"),
        Case("train", f"--init-from {STEP}", "safetensors", remove(f"{STEP}/model.safetensors")),
        Case("dataset", "--source nowhere", "nowhere"),
        Case("dataset", "--source empty", "empty .jsonl"),
        Case("dataset", "--verify --data-dir nowhere", "nowhere"),
        Case("eval", f"{PROMPT} --checkpoint nowhere", "nowhere no such folder"),
        Case("eval", f"{PROMPT} --checkpoint empty", "empty config.json"),
        Case("eval", f"{PROMPT}", "model.safetensors", remove("gpt2/model.safetensors")),
        Case("eval", "--loss --data-dir nowhere", "nowhere"),
        Case("hellaswag", "--data no.jsonl", "no.jsonl"),
        Case("hellaswag", "--output nowhere/out.jsonl", "nowhere"),
        Case("plot", "nowhere", "nowhere"),
        Case("plot", "empty", "empty"),
    ],
    "a folder, FIFO, socket or device where a file belongs, or a file where a folder does": [
        Case("train", "", VAL, folder_instead(VAL)),
        Case("train", "", TRAIN, fifo_instead(TRAIN)),
        Case("train", "--log-dir text.txt", "text.txt"),
        Case("train", "--data-dir text.txt", "text.txt"),
        Case("train", "--init-from text.txt", "text.txt"),
        Case("train", "--init-from gpt2", "config.json", fifo_instead("gpt2/config.json")),
        Case("train", "", ".lock", fifo_instead("new/.lock")),
        Case("dataset", VERIFY, PART, fifo_instead(PART), code=1, lines=0),
        Case("dataset", VERIFY, PART, folder_instead(PART), code=1, lines=0),
        Case("dataset", VERIFY, PART, socket_instead(PART), code=1, lines=0),
        Case("dataset", VERIFY, "index.json", folder_instead("shards/index.json")),
        Case("dataset", AGAIN, "index.json", fifo_instead("shards/index.json")),
        Case("dataset", f"{SOURCE} --data-dir text.txt", "text.txt"),
        Case("dataset", "--source pipe.jsonl", "pipe.jsonl", fifo_instead("pipe.jsonl")),
        Case("dataset", "--source /dev/zero", "/dev/zero"),
        Case("eval", PROMPT, "config.json", fifo_instead("gpt2/config.json")),
        Case("eval", PROMPT, "config.json", folder_instead("gpt2/config.json")),
        Case("eval", PROMPT, "model.safetensors", fifo_instead("gpt2/model.safetensors")),
        Case("eval", PROMPT, "model.safetensors", folder_instead("gpt2/model.safetensors")),
        Case("eval", f"{PROMPT} --checkpoint text.txt", "text.txt"),
        Case("hellaswag", "--data pipe", "pipe", fifo_instead("pipe")),
        Case("hellaswag", "--data empty", "empty"),
        Case("plot", "pipe", "pipe", fifo_instead("pipe")),
        Case("plot", "log", "metrics.jsonl", fifo_instead("log/metrics.jsonl")),
    ],
    "an output that is an input, a folder, or cannot be written": [
        Case("hellaswag", "--output hellaswag.jsonl", "hellaswag.jsonl"),
        Case(
            "hellaswag", "--output link", "link", lambda d: os.link(d / "hellaswag.jsonl", "link")
        ),
        Case("hellaswag", "--output gpt2/model.safetensors", "model.safetensors"),
        Case("hellaswag", "--output log/metrics.jsonl", "metrics.jsonl holds no predictions"),
        Case("hellaswag", "--output empty", "empty"),
        Case("hellaswag", "--output text.txt/out.jsonl", "text.txt"),
        Case("plot", "log --out empty", "empty"),
        Case("plot", "log --out empty.png", "empty.png", folder_instead("empty.png")),
        Case("plot", "log --out text.txt/plot.png", "text.txt"),
    ],
    "a damaged shard": [
        Case("train", "", VAL, cut(VAL, 0)),
        Case("train", "", TRAIN, cut(TRAIN, 100)),
        Case("train", "", TRAIN, cut(TRAIN, -1000)),
        Case("train", "", TRAIN, append(TRAIN, b"more")),
        Case("train", "", TRAIN, write(TRAIN, b"PK\3\4 no array")),
        Case("train", "", TRAIN, replace(TRAIN, b"'<u2'", b"'<u2(")),
        Case("train", "", TRAIN, replace(TRAIN, b"{'descr'", b"{'\xe9scr'")),
        Case("train", "", TRAIN, replace(TRAIN, b"False", b"Fals(")),
        Case("train", "", TRAIN, replace(TRAIN, b"(6000,)", b"(9e99,)")),
        Case("train", "", TRAIN, replace(TRAIN, b"(6000,)", b"(-600,)")),
        Case("train", "", TRAIN, flip(TRAIN, 8, bit=7)),
        Case("train", "", TRAIN, save_array(TRAIN, np.zeros(6000, np.float32))),
        Case("train", "", TRAIN, save_array(TRAIN, np.zeros((60, 100), np.uint16))),
        Case("train", "", TRAIN, save_array(TRAIN, np.array([{}] * 100))),
        Case("train", "", VAL, save_array(VAL, np.zeros(0, np.uint16))),
        Case("train", "", f"{TRAIN} vocabulary", save_array(TRAIN, np.full(6000, 301, np.uint16))),
        Case(
            "train",
            "--init-from log",
            f"{TRAIN} vocabulary 300",
            save_array(TRAIN, np.full(6000, 301, np.uint16)),
        ),
        Case(
            "train", "--model.context-length 16384 --batch-tokens 131072 --val-tokens 20000", "data"
        ),
        Case("eval", LOSS, "text_val_000000.npy", cut("shards/text_val_000000.npy", 60)),
        Case("dataset", VERIFY, PART, replace(PART, b"'<u2'", b"'<u2("), code=1, lines=0),
        Case("dataset", VERIFY, PART, replace(PART, b"{", b"("), code=1, lines=0),
        Case("dataset", VERIFY, PART, cut(PART, -1), code=1, lines=0),
        Case("dataset", VERIFY, PART, cut(PART, 0), code=1, lines=0),
        Case("dataset", VERIFY, PART, flip(PART, 300), code=1, lines=0),
        Case("dataset", VERIFY, PART, remove(PART), code=1, lines=0),
        Case("dataset", VERIFY, PART, copy("gpt2/model.safetensors", PART), code=1, lines=0),
    ],
    "a data folder that is unfinished": [
        Case("train", "--data-dir shards", "shards dataset.py", remove(PART)),
        Case(
            "train",
            "--data-dir shards --model.vocab-size 50304",
            "shards dataset.py",
            edit_json("shards/index.json", complete=False),
        ),
        Case(
            "train",
            "--data-dir shards --model.vocab-size 50304",
            "shards",
            several(
                copy("shards/index.json", "shards/index.0of2.json"),
                remove("shards/index.json"),
                edit_json("shards/index.0of2.json", world_size=2),
            ),
        ),
        Case(
            "dataset",
            VERIFY,
            "not finished",
            edit_json("shards/index.json", complete=False),
            code=1,
            lines=0,
        ),
    ],
    "a damaged index.json": [
        Case("dataset", VERIFY, "index.json", write("shards/index.json", "")),
        Case("dataset", VERIFY, "index.json", write("shards/index.json", "[]")),
        Case("dataset", VERIFY, "index.json", write("shards/index.json", "null")),
        Case("dataset", AGAIN, "index.json", write("shards/index.json", DEEP)),
        Case("dataset", AGAIN, "index.json", write("shards/index.json", b"\xff\xfe{}")),
        Case("dataset", AGAIN, "index.json", cut("shards/index.json", 300)),
        Case("dataset", AGAIN, "index.json units", edit_json("shards/index.json", units=...)),
        Case("dataset", AGAIN, "index.json", edit_json("shards/index.json", shards=None)),
        Case("dataset", AGAIN, "index.json", edit_json("shards/index.json", shards=[1])),
        Case("dataset", AGAIN, "index.json", edit_json("shards/index.json", shard_size="4")),
        Case("dataset", AGAIN, "index.json", edit_json("shards/index.json", shards__tokens=None)),
        Case("dataset", AGAIN, "index.json", edit_json("shards/index.json", shards__tokens=-4)),
        Case("dataset", AGAIN, "index.json", edit_json("shards/index.json", shards__file="../x")),
        Case("dataset", AGAIN, "index.json", edit_json("shards/index.json", shards__next=[])),
        Case(
            "dataset",
            AGAIN,
            "index.json",
            replace("shards/index.json", b'"units": 1', b'"units": 1' + b"0" * 400),
        ),
        Case("train", "--data-dir shards", "index.json", write("shards/index.json", "[]")),
    ],
    "a data folder that was begun with something else": [
        Case("dataset", f"{AGAIN} --shard-size 500", "shard_size 500"),
        Case("dataset", f"{AGAIN} --max-tokens 700", "max_tokens 700"),
        Case("dataset", f"{AGAIN} --source text.txt", "another --data-dir"),
        Case("dataset", AGAIN, "another --data-dir", append("source.jsonl", '{"text": "more"}\n')),
        Case("dataset", AGAIN, "another", replace("source.jsonl", b"Document 0", b"Document X")),
        Case("dataset", f"{SOURCE} --data-dir data", "no index.json"),
        Case("dataset", AGAIN, "WORLD_SIZE", environment={"RANK": "0", "WORLD_SIZE": "2"}),
    ],
    "a source that is damaged or of another form": [
        Case("dataset", SOURCE, "source.jsonl line 1", write("source.jsonl", "{")),
        Case("dataset", SOURCE, "source.jsonl line 81", append("source.jsonl", DEEP)),
        Case("dataset", SOURCE, "source.jsonl line 81", append("source.jsonl", '{"text": 4}')),
        Case("dataset", SOURCE, "source.jsonl line 81", append("source.jsonl", '{"content": ""}')),
        Case("dataset", SOURCE, "source.jsonl line 81", append("source.jsonl", "[1]")),
        Case("dataset", SOURCE, "source.jsonl line 81", append("source.jsonl", "1" * 5000)),
        Case(
            "dataset", SOURCE, "source.jsonl line 81", append("source.jsonl", b'{"text": "\xff"}')
        ),
        Case("dataset", SOURCE, "source.jsonl", write("source.jsonl", "")),
        Case("dataset", SOURCE, "source.jsonl", write("source.jsonl", '{"text": ""}\n')),
        Case("dataset", "--source text.txt", "text.txt", write("text.txt", b"\xff\xfe\0")),
        Case("dataset", "--source text.txt", "text.txt", write("text.txt", "")),
        Case("dataset", "--source log.png", "log.png", write("log.png", "picture")),
        Case("dataset", "--source table.parquet", "table.parquet", cut("table.parquet", -1)),
        Case("dataset", "--source table.parquet", "table.parquet", cut("table.parquet", 4)),
        Case("dataset", "--source table.parquet", "table.parquet", write("table.parquet", "PAR1")),
        Case("dataset", "--source table.parquet", "table.parquet text", table(body=["a"])),
        Case("dataset", "--source table.parquet", "table.parquet text", table(text=[1, 2])),
        Case("dataset", "--source table.parquet", "table.parquet text", table(text=[["a"]])),
    ],
    "a damaged config.json, or one of another model": [
        Case("eval", PROMPT, "gpt2", write("gpt2/config.json", "")),
        Case("eval", PROMPT, "gpt2", write("gpt2/config.json", "[]")),
        Case("eval", PROMPT, "gpt2", write("gpt2/config.json", "null")),
        Case("eval", PROMPT, "gpt2", write("gpt2/config.json", DEEP)),
        Case("eval", PROMPT, "gpt2", write("gpt2/config.json", b"\xff")),
        Case("eval", PROMPT, "n_layer", edit_json("gpt2/config.json", n_layer=...)),
        Case("eval", PROMPT, "n_layer", edit_json("gpt2/config.json", n_layer="1")),
        Case("eval", PROMPT, "gpt2", edit_json("gpt2/config.json", n_layer=10_000_000)),
        Case("eval", PROMPT, "gpt2", edit_json("gpt2/config.json", n_layer=2)),
        Case("eval", PROMPT, "gpt2", edit_json("gpt2/config.json", n_layer=True)),
        Case("eval", PROMPT, "gpt2", edit_json("gpt2/config.json", n_embd=-8)),
        Case("eval", PROMPT, "gpt2", edit_json("gpt2/config.json", n_embd=8.5)),
        Case("eval", PROMPT, "gpt2", edit_json("gpt2/config.json", n_head=0)),
        Case("eval", PROMPT, "gpt2", edit_json("gpt2/config.json", n_positions=10**30)),
        Case("eval", PROMPT, "gpt2", edit_json("gpt2/config.json", vocab_size=None)),
        Case("eval", PROMPT, "llama", edit_json("gpt2/config.json", model_type="llama")),
        Case("eval", PROMPT, "gelu", edit_json("gpt2/config.json", activation_function="gelu")),
        Case(
            "eval",
            PROMPT,
            "gpt2",
            replace("gpt2/config.json", b'"n_embd": 8', b'"n_embd": 8' + b"0" * 400),
        ),
        Case("hellaswag", "", "gpt2", write("gpt2/config.json", "{}")),
        Case("train", "--init-from gpt2", "gpt2", write("gpt2/config.json", "[]")),
        Case(
            "train", "--init-from gpt2", "llama", edit_json("gpt2/config.json", model_type="llama")
        ),
    ],
    "weights that are damaged, of another model, or not finite": [
        Case("eval", PROMPT, "gpt2", write("gpt2/model.safetensors", "")),
        Case("eval", PROMPT, "gpt2", write("gpt2/model.safetensors", b"\xff" * 64)),
        Case("eval", PROMPT, "gpt2", cut("gpt2/model.safetensors", -1)),
        Case("eval", PROMPT, "gpt2", cut("gpt2/model.safetensors", 100)),
        Case("eval", PROMPT, "gpt2", flip("gpt2/model.safetensors", 6, bit=3)),
        Case(
            "eval",
            PROMPT,
            "gpt2 ln_f.bias",
            edit_weights("gpt2", lambda w: w.pop("transformer.ln_f.bias")),
        ),
        Case(
            "eval",
            PROMPT,
            "gpt2 extra",
            edit_weights("gpt2", lambda w: w.update(extra=torch.zeros(1))),
        ),
        Case(
            "eval",
            PROMPT,
            "ln_f.bias",
            set_weight("gpt2", "transformer.ln_f.bias", lambda t: t[:4]),
        ),
        Case(
            "eval",
            PROMPT,
            "ln_f.bias",
            set_weight("gpt2", "transformer.ln_f.bias", lambda t: t.int()),
        ),
        Case(
            "eval",
            PROMPT,
            "ln_f.bias finite",
            set_weight("gpt2", "transformer.ln_f.bias", lambda t: t + torch.nan),
        ),
        Case(
            "hellaswag",
            "",
            "wte.weight finite",
            set_weight("gpt2", "transformer.wte.weight", lambda t: t + torch.inf),
        ),
        Case(
            "eval", f"{PROMPT} --checkpoint log", "damaged", cut(f"{STEP}/config.json", 9), lines=2
        ),
        Case(
            "train",
            f"--init-from {STEP}",
            "ln_f.bias finite",
            set_weight(STEP, "transformer.ln_f.bias", lambda t: t + torch.nan),
        ),
    ],
    "a checkpoint that does not match its checksums, or whose checksums are damaged": [
        Case("eval", f"{PROMPT} --checkpoint {STEP}", STEP, flip(f"{STEP}/model.safetensors", -9)),
        Case(
            "hellaswag", f"--checkpoint {STEP}", STEP, flip(f"{STEP}/model.safetensors", -9, bit=4)
        ),
        Case("eval", f"{PROMPT} --checkpoint {STEP}", STEP, write(f"{STEP}/checksums.json", "[]")),
        Case("eval", f"{PROMPT} --checkpoint {STEP}", STEP, write(f"{STEP}/checksums.json", DEEP)),
        Case("train", f"--init-from {STEP}", STEP, flip(f"{STEP}/model.safetensors", -9)),
        Case("train", "--init-from log", "valid", flip(f"{STEP}/model.safetensors", -9), lines=2),
        Case("train", RESUME, "valid", flip(f"{STEP}/model.safetensors", -9), lines=LAST),
        Case("train", RESUME, "valid", write(f"{STEP}/checksums.json", ""), lines=LAST),
        Case("train", RESUME, "valid", write(f"{STEP}/checksums.json", "null"), lines=LAST),
        Case("train", RESUME, "valid", write(f"{STEP}/checksums.json", DEEP), lines=LAST),
        Case("train", RESUME, "valid", write(f"{STEP}/checksums.json", '{"a": 1}'), lines=LAST),
        Case(
            "train",
            RESUME,
            "valid",
            edit_json(f"{STEP}/checksums.json", **{"../../text.txt": [1, 2]}),
            lines=LAST,
        ),
        Case(
            "train",
            RESUME,
            "valid",
            edit_json(f"{STEP}/checksums.json", **{"config.json": ["a", None]}),
            lines=LAST,
        ),
        Case("train", RESUME, "valid", fifo_instead(f"{STEP}/config.json"), lines=LAST),
        Case("train", RESUME, "valid", fifo_instead(f"{STEP}/checksums.json"), lines=LAST),
        Case("train", RESUME, "valid", folder_instead(f"{STEP}/training_state.pt"), lines=LAST),
        Case("train", RESUME, "valid", remove(f"{STEP}/model.safetensors"), lines=LAST),
    ],
    "a training state that is none, or whose parts do not fit": [
        Case("train", RESUME, "training_state.pt", save_state(None)),
        Case("train", RESUME, "training_state.pt", save_state([1, 2])),
        Case("train", RESUME, "training_state.pt", save_state({})),
        Case("train", RESUME, "training_state.pt", save_state({"step": 40})),
        Case(
            "train", RESUME, "training_state.pt", with_sums(write(f"{STEP}/training_state.pt", "x"))
        ),
        Case(
            "train", RESUME, "training_state.pt", with_sums(cut(f"{STEP}/training_state.pt", -500))
        ),
        Case("train", RESUME, "settings", edit_state(lambda s: s.pop("settings"))),
        Case("train", RESUME, "settings", edit_state(lambda s: s.update(settings=None))),
        Case("train", RESUME, "step", edit_state(lambda s: s.update(step="40")), lines=LAST),
        Case("train", RESUME, "step", edit_state(lambda s: s.update(step=-1)), lines=LAST),
        Case("train", RESUME, "best_val", edit_state(lambda s: s.update(best_val="low"))),
        Case("train", RESUME, "losses", edit_state(lambda s: s.update(losses=["x"]))),
        Case("train", RESUME, "rng", edit_state(lambda s: s.update(rng=torch.zeros(3)))),
        Case("train", RESUME, "optimizer", edit_state(lambda s: s.update(optimizer={}))),
        Case("train", RESUME, "optimizer", edit_state(lambda s: s["optimizer"].update(state={}))),
        Case(
            "train",
            RESUME,
            "optimizer",
            edit_state(lambda s: s["optimizer"].update(param_groups=[])),
        ),
        Case(
            "train",
            RESUME,
            "optimizer",
            edit_state(lambda s: s["optimizer"]["state"].pop(3)),
        ),
        Case("train", RESUME, "exp_avg", edit_moments(exp_avg=torch.zeros(2, 2))),
        Case("train", RESUME, "exp_avg", edit_moments(exp_avg=torch.zeros(300, 16).double())),
        Case("train", RESUME, "exp_avg_sq", edit_moments(exp_avg_sq=None)),
        Case("train", RESUME, "exp_avg_sq", edit_moments(exp_avg_sq=torch.full((300, 16), -1.0))),
        Case("train", RESUME, "exp_avg", edit_moments(exp_avg=torch.full((300, 16), torch.nan))),
        Case("train", RESUME, "optimizer", edit_moments(step=torch.zeros(2))),
    ],
    "a checkpoint whose folder and content disagree": [
        Case(
            "train",
            RESUME,
            "9999999 step",
            several(copy(STEP, "log/step_9999999"), remove(STEP)),
            lines=LAST,
        ),
        Case(
            "train",
            RESUME,
            "step",
            edit_state(lambda s: s.update(step=39)),
            lines=LAST,
        ),
    ],
    "another file beside the weights": [
        Case(
            "eval",
            f"{PROMPT} --json",
            "tokens",
            several(
                copy("gpt2/model.safetensors", "gpt2/model_backup.safetensors"),
                set_weight("gpt2", "transformer.wte.weight", lambda t: t),
            ),
            code=0,
        ),
        Case(
            "eval",
            f"{PROMPT} --json",
            "tokens",
            write("gpt2/model_backup.safetensors", "no weights"),
            code=0,
        ),
    ],
    "a run that is in the folder already, or --resume as another run": [
        Case("train", "--log-dir log", "log --resume"),
        Case("train", "--log-dir log --init-from log", "log --resume"),
        Case("train", f"{RESUME} --seed 7", "seed"),
        Case("train", f"{RESUME} --batch-tokens 512", "batch_tokens"),
        Case("train", f"{RESUME} --model.d-model 32", "d_model"),
        Case("train", f"{RESUME} --no-shuffle", "shuffle"),
        Case("train", RESUME, "shards", flip(TRAIN, 200)),
        Case("train", RESUME, "shards", flip(VAL, 200)),
        Case("train", RESUME, "shards", remove(TRAIN)),
    ],
    "a text that the model cannot take": [
        Case("train", "--sample-prompt Hello", "prompt vocabulary"),
        Case("train", "--sample-prompt '<|endoftext|>'", "prompt vocabulary"),
        Case("eval", f"{PROMPT} --checkpoint log --prompt Hello", "vocabulary 300"),
        Case(
            "train",
            "--hellaswag-every 5 --hellaswag-data hellaswag.jsonl",
            "hellaswag.jsonl",
        ),
        Case(
            "hellaswag", "", "line 2 context 32", hellaswag_row(endings=["a b" * 90, "b", "c", "d"])
        ),
        Case("hellaswag", "--checkpoint log", "vocabulary 300"),
    ],
    "a HellaSwag file with a line that is not an example": [
        Case("hellaswag", "", "hellaswag.jsonl", write("hellaswag.jsonl", "")),
        Case("hellaswag", "", "line 1", write("hellaswag.jsonl", "{")),
        Case("hellaswag", "", "line 1", write("hellaswag.jsonl", DEEP)),
        Case("hellaswag", "", "line 1", write("hellaswag.jsonl", "null\n")),
        Case("hellaswag", "", "line 1", write("hellaswag.jsonl", b"\xff\xff")),
        Case("hellaswag", "", "line 1", write("hellaswag.jsonl", "9" * 5000)),
        Case("hellaswag", "", "line 2 label", hellaswag_row(label=4)),
        Case("hellaswag", "", "line 2 label", hellaswag_row(label=[])),
        Case("hellaswag", "", "line 2 label", hellaswag_row(label=...)),
        Case("hellaswag", "", "line 2 endings", hellaswag_row(endings=["a", "b", "c"])),
        Case("hellaswag", "", "line 2 endings", hellaswag_row(endings="abcd")),
        Case("hellaswag", "", "line 2 ending", hellaswag_row(endings=["a", "b", "c", 4])),
        Case("hellaswag", "", "line 2 ending", hellaswag_row(endings=["a", "b", "c", " "])),
        Case("hellaswag", "", "line 2 ctx", hellaswag_row(ctx=" ")),
        Case("hellaswag", "", "line 2 ctx_b", hellaswag_row(ctx_b=None)),
        Case("hellaswag", "", "line 2 activity_label", hellaswag_row(activity_label=3)),
        Case(
            "train",
            "--hellaswag-every 5 --hellaswag-data hellaswag.jsonl",
            "line 1",
            write("hellaswag.jsonl", "{"),
        ),
    ],
    "a log with lines that are damaged": [
        Case("plot", "log", "", write("log/metrics.jsonl", "")),
        Case("plot", "log", "", write("log/metrics.jsonl", "[]\nnull\n7\n")),
        Case("plot", "log", "", write("log/metrics.jsonl", DEEP)),
        Case("plot", "log", "", write("log/metrics.jsonl", b"\xff\0\xfe")),
        Case("plot", "log.txt", "", write("log.txt", "")),
        Case("plot", "log.txt", "", write("log.txt", "step loss\n")),
        Case("plot", "log.txt --x hours", "hours"),
        Case(
            "plot",
            "log --out plot.svg",
            "left out: 9",
            append(
                "log/metrics.jsonl",
                '{"kind": "train", "step": "5", "loss": 3}\n'
                '{"kind": "train", "step": -5, "loss": 3}\n'
                '{"kind": "train", "step": 50, "loss": "low"}\n'
                '{"kind": "train", "step": 51, "loss": [3], "time": 4}\n'
                '{"kind": "run", "step": 52, "config": 7}\n'
                '{"kind": ["train"], "step": 53}\n'
                f'{{"kind": "train", "step": 1{"0" * 400}}}\n'
                '{"kind": "sample", "step": 54, "prompt": 1, "text": null}\n'
                '{"kind": "train", "step": 55, "lo',
            ),
            code=0,
            lines=0,
            changes=("log/report.md",),
        ),
    ],
}
ALL = [(fault, case) for fault, cases in CASES.items() for case in cases]


@pytest.mark.parametrize(
    ("fault", "case"), ALL, ids=[f"{n}-{case.script}" for n, (_, case) in enumerate(ALL)]
)
def test_a_mistake_is_one_line_and_changes_nothing(
    fault: str, case: Case, desk: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.damage(desk)
    before = files_of(desk)
    with monkeypatch.context() as patch:
        for name, value in case.environment.items():
            patch.setenv(name, value)
        code, out, err = call(case.script, shlex.split(case.flags), capsys)
    told = f"{case.script}.py {case.flags} ({fault}): exit code {code}\n{out[-600:]}{err[-1500:]}"
    assert "Traceback" not in err, told
    assert "GPT_XS_DEBUG" not in err, f"not expected by the script: {told}"
    assert code == case.code, told
    assert err.count("\n") == case.lines, told
    if case.code and case.lines:
        assert err.startswith(f"{case.script}.py: ") or case.lines > 1, told
    said = (err if case.lines else out).lower() if case.code else (out + err).lower()
    assert [word for word in case.words.split() if word.lower() not in said] == [], told
    after = files_of(desk)
    changed = [name for name, content in before.items() if after.get(name) != content]
    assert set(changed) <= set(case.changes), told


def test_the_table_and_the_page_have_the_same_classes() -> None:
    page = (ROOT / "docs/faults.md").read_text(encoding="utf-8")
    section = page.partition("\n## Bad input\n")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| (.+?) \|", section, flags=re.MULTILINE)
    assert listed[1:] == list(CASES)  # after the title
    assert len(ALL) >= 120


# ---- bytes that are flipped and cut --------------------------------------------------------------

# Half of the places are in the first bytes, where a format has its header.
PLACES = st.integers(0, 600) | st.integers(0, 2**31)
FLIPS = st.lists(st.tuples(PLACES, st.integers(0, 7)), max_size=4)
DAMAGES = st.tuples(FLIPS, st.sampled_from((False, False, True)), PLACES)


def resume_parts() -> None:
    """What train.py --resume reads of a checkpoint whose checksums are right."""
    renew_checksums(Path())
    with common.exit_with_one_line():
        state = checkpoint.load_state(Path(STEP))
        model = GPT(GPTConfig(16, 1, 2, 16, 300))
        checkpoint.load_model(model, Path(STEP))
        checkpoint.load_optimizer(build_optimizer(model, 0.1), state.optimizer)


ONE = "--shard-size 20000"  # one shard: each waits for the disk

# The file, what reads it, and how many examples are tried.
FORMATS: dict[str, tuple[str, list[tuple[str, str]], int]] = {
    "shard, by --verify": (PART, [("dataset", VERIFY)], 200),
    "shard, by --loss": ("shards/text_val_000000.npy", [("eval", LOSS)], 200),
    "index.json": ("shards/index.json", [("dataset", VERIFY)], 200),
    "checksums.json": (
        f"{STEP}/checksums.json",
        [("eval", f"--loss --data-dir data --val-tokens 16 --checkpoint {STEP}")],
        200,
    ),
    "config.json": ("gpt2/config.json", [("eval", LOSS)], 200),
    "model.safetensors": ("gpt2/model.safetensors", [("eval", LOSS)], 200),
    "training_state.pt": (f"{STEP}/training_state.pt", [("", "")], 200),
    "metrics.jsonl": ("log/metrics.jsonl", [("plot", "log --out plot.svg")], 200),
    "log.txt": ("log.txt", [("plot", "log.txt --out plot.svg")], 200),
    "HellaSwag's JSONL": ("hellaswag.jsonl", [("hellaswag", "")], 200),
    "source.jsonl": ("source.jsonl", [("dataset", f"{SOURCE} {ONE}")], 200),
    "text.txt": ("text.txt", [("dataset", f"--source text.txt {ONE}")], 200),
    # Each example starts a process that reads the file first, which takes half a second.
    "Parquet": ("table.parquet", [("dataset", f"--source table.parquet {ONE}")], 20),
}


@pytest.mark.parametrize("name", FORMATS)
def test_flipped_and_cut_bytes_end_in_one_line_at_most(
    name: str, desk: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, calls, examples = FORMATS[name]
    monkeypatch.setattr("plot.plot", lambda *_: None)  # to draw takes a second
    monkeypatch.setattr("eval.count_bytes", lambda *_: 1)  # this one a tenth, for 50,000 tokens
    monkeypatch.setattr(os, "fsync", lambda *_: None)  # no power cut is tested here
    whole = (desk / file).read_bytes()

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(DAMAGES)
    def check(damage: tuple[list[tuple[int, int]], bool, int]) -> None:
        flips, is_cut, size = damage
        content = bytearray(whole)
        for place, bit in flips:
            content[place % len(content)] ^= 1 << bit
        if is_cut:
            del content[size % len(content) :]
        (desk / file).write_bytes(content)
        if not name.startswith("training"):
            before = files_of(desk)
        for script, flags in calls:
            if script:
                code, out, err = call(script, flags.split(), capsys)
            else:
                code, out, err = call_function(resume_parts, capsys)
            told = f"{script}.py {flags}: exit code {code}\n{out[-600:]}{err[-1500:]}"
            assert code in (0, 1, 2), told
            assert "Traceback" not in err, told
            assert "GPT_XS_DEBUG" not in err, f"not expected by the script: {told}"
            assert code == 0 or err.count("\n") <= 1, told
        if not name.startswith("training"):
            shutil.rmtree(desk / "new", ignore_errors=True)
            (desk / "log/report.md").unlink(missing_ok=True)
            (desk / "plot.svg").unlink(missing_ok=True)
            (desk / "report.md").unlink(missing_ok=True)
            assert files_of(desk) == before

    check()
