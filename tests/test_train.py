"""train.py: its schedule and settings, and that any split of a step is the same run."""

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train
from model import GPT, GPTConfig

ROOT = Path(__file__).parent.parent
TINY = [
    *("--model.d-model", "16", "--model.n-heads", "2", "--model.n-layers", "1"),
    *("--model.context-length", "16", "--model.vocab-size", "300"),
    *("--batch-tokens", "256", "--warmup-steps", "2", "--max-lr", "0.01", "--min-lr", "0.001"),
    *("--val-tokens", "512", "--hellaswag-every", "0", "--sample-every", "0", "--no-compile"),
    *("--device", "cpu", "--dtype", "fp32"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training shards and one validation shard of a text with structure to learn."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, n in (("val_000000", 2000), ("train_000001", 5000), ("train_000002", 3000)):
        walk = np.cumsum(rng.integers(1, 4, n)) % 300
        np.save(folder / f"tiny_{name}.npy", walk.astype(np.uint16))
    return folder


def launch(n: int, *flags: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """train.py on n CPU processes."""
    command = [sys.executable, "train.py"]
    if n > 1:
        run = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}")
        command = [sys.executable, *run, "train.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*command, *TINY, *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def read(log_dir: Path, kind: str) -> dict[int, dict[str, Any]]:
    lines = map(json.loads, (log_dir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if line["kind"] == kind}


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 6e-4 / 715),
        (714, 6e-4),
        (715, 6e-4),
        ((715 + 19_072) / 2, (6e-4 + 6e-5) / 2),  # a cosine's middle
        (19_072, 6e-5),
    ],
)
def test_the_schedule_has_its_published_values(step: int, expected: float) -> None:
    assert train.learning_rate(step, train.TrainConfig()) == pytest.approx(expected, rel=1e-9)


def test_the_schedule_rises_then_falls_and_never_leaves_its_bounds() -> None:
    config = train.TrainConfig()
    rates = [train.learning_rate(s, config) for s in range(config.max_steps)]
    assert all(a < b for a, b in itertools.pairwise(rates[:715]))
    assert all(a > b for a, b in itertools.pairwise(rates[715:]))
    assert min(rates[715:]) == rates[-1]


def test_the_default_run_is_the_published_one() -> None:
    config = train.TrainConfig()
    assert config.model == GPTConfig(768, 12, 12, 512, 50304)
    assert config.batch_tokens == 2**19
    assert config.batch_tokens * config.max_steps == pytest.approx(10e9, rel=1e-3)
    assert config.warmup_steps * config.batch_tokens == pytest.approx(375e6, rel=1e-3)
    for world_size in (1, 2, 4, 8):
        assert config.problems(world_size) == []


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("gpt2", 124), ("gpt2-medium", 355), ("gpt2-large", 774), ("gpt2-xl", 1558)],
)
def test_the_presets_of_openais_sizes_fit_one_to_eight_gpus(size: str, parameters: int) -> None:
    config = train.PRESETS[size]
    assert config.preset == size
    with torch.device("meta"):
        model = GPT(config.model)
    assert round(model.num_parameters() / 1e6) == parameters
    for world_size in (1, 2, 4, 8):
        assert config.problems(world_size) == []


def test_all_problems_of_a_configuration_are_reported_at_once() -> None:
    mistakes = {"batch_tokens": 1000, "max_lr": 1e-5, "val_tokens": 3, "grad_clip": 0.0}
    config = dataclasses.replace(train.TrainConfig(), **mistakes)
    text = "; ".join(config.problems(world_size=1))
    for named in ("batch_tokens 1000", "max_lr 1e-05", "val_tokens 3", "grad_clip 0.0"):
        assert named in text


def test_a_batch_that_three_gpus_cannot_share_names_the_nearest_that_they_can() -> None:
    problem = train.TrainConfig().problems(world_size=3)
    assert problem == [
        "batch_tokens 524288 is no multiple of micro_batch 64 x context_length 512 x 3 processes;"
        " 491520 would be"
    ]


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def one_process(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    log_dir = tmp_path_factory.mktemp("one")
    flags = ("--val-every", "10", "--checkpoint-every", "10", "--sample-every", "0")
    run = ("--micro-batch", "8", "--max-steps", "20", "--profile", "2", *flags)
    done = launch(1, "--data-dir", str(data), "--log-dir", str(log_dir), *run)
    assert done.returncode == 0, done.stderr
    return log_dir


def test_a_run_logs_every_step_and_learns(one_process: Path) -> None:
    steps = read(one_process, "train")
    assert list(steps) == list(range(20))
    config = dataclasses.replace(
        train.TrainConfig(), max_steps=20, warmup_steps=2, max_lr=0.01, min_lr=0.001
    )
    for step, line in steps.items():
        assert line["lr"] == pytest.approx(train.learning_rate(step, config))
        assert line["tokens_per_s"] == pytest.approx(256 / line["ms"] * 1e3, rel=1e-6)
        assert line["mfu"] is None  # a CPU's peak is not in the table
    val = read(one_process, "val")
    assert list(val) == [0, 10, 20]
    assert abs(val[0]["loss"] - math.log(300)) < 0.1
    assert val[20]["loss"] < val[10]["loss"] < val[0]["loss"] - 0.1
    (run,) = read(one_process, "run").values()
    assert run["config"]["batch_tokens"] == 256
    assert run["versions"]["torch"] == torch.__version__


def test_a_run_leaves_checkpoints_a_picture_and_a_report(one_process: Path) -> None:
    names = {path.name for path in one_process.iterdir()}
    assert {"step_000010", "step_000020", "metrics.jsonl", "plot.png", "report.md"} <= names
    state = torch.load(one_process / "step_000020" / "training_state.pt", weights_only=True)
    assert state["step"] == 20
    assert not [name for name in state["settings"] if name.startswith("_orig_mod")]


@pytest.mark.parametrize(("ranks", "micro_batch"), [(2, 8), (2, 2), (4, 1)])
def test_ranks_and_micro_batches_do_not_change_the_run(
    data: Path, tmp_path: Path, one_process: Path, ranks: int, micro_batch: int
) -> None:
    flags = ("--micro-batch", str(micro_batch), "--max-steps", "20", "--val-every", "10")
    done = launch(ranks, "--data-dir", str(data), "--log-dir", str(tmp_path / "log"), *flags)
    assert done.returncode == 0, done.stderr
    for kind in ("train", "val"):
        ours, reference = read(tmp_path / "log", kind), read(one_process, kind)
        assert list(ours) == list(reference)
        for step, line in ours.items():
            assert line["loss"] == pytest.approx(reference[step]["loss"], abs=1e-3)


def test_hellaswag_that_cannot_be_had_is_said_once_and_training_goes_on(
    data: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.jsonl").write_text("{not json\n")
    flags = ("--hellaswag-every", "2", "--hellaswag-data", str(tmp_path / "broken.jsonl"))
    run = ("--micro-batch", "8", "--max-steps", "5", "--val-every", "0", *flags)
    done = launch(1, "--data-dir", str(data), "--log-dir", str(tmp_path / "log"), *run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("HellaSwag is left out") == 1
    assert len(read(tmp_path / "log", "train")) == 5


def test_the_profile_holds_the_operations_of_its_steps(one_process: Path) -> None:
    events = json.loads((one_process / "trace_rank0.json").read_text())["traceEvents"]
    names = [event["name"] for event in events]
    assert names.count("ProfilerStep#4") == 1
    assert names.count("ProfilerStep#5") == 1
    assert sum(name.startswith("ProfilerStep") for name in names) == 2
    assert "LinearCrossEntropyBackward" in names


# ---------------------------------------------------------------- a user's mistakes


MISTAKES = {
    "no data": (["--data-dir", "nowhere"], "nowhere: no train shards"),
    "batch": (["--batch-tokens", "100"], "batch_tokens 100 is no multiple of micro_batch 8"),
    "micro-batch": (["--micro-batch", "0"], "micro_batch 0"),
    "steps": (["--max-steps", "0"], "max_steps 0"),
    "interval": (["--val-every", "-5"], "val_every -5 is negative"),
    "rates": (["--min-lr", "1"], "min_lr 1.0 is not between 0 and max_lr 0.01"),
    "device": (["--device", "cuda:7"], "--device cuda:7 cannot be used here"),
    "heads": (["--model.n-heads", "3"], "d_model 16 is no multiple of n_heads 3"),
    "hellaswag": (["--hellaswag-every", "1", "--hellaswag-data", "x.jsonl"], "x.jsonl: no such"),
    "vocabulary": (["--model.vocab-size", "200"], "outside the vocabulary of 200"),
    "used folder": ([], "holds a run: --resume it or give another --log-dir"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_exit_code_2_and_harms_nothing(
    data: Path,
    tmp_path: Path,
    mistake: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags, message = MISTAKES[mistake]
    log_dir = tmp_path / "log"
    if mistake == "used folder":
        log_dir.mkdir()
        (log_dir / "metrics.jsonl").write_text('{"kind": "run"}\n')
    base = ["--data-dir", str(data), "--log-dir", str(log_dir), "--micro-batch", "8"]
    base += ["--max-steps", "3"]
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, *base, *flags])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    if mistake == "used folder":
        assert (log_dir / "metrics.jsonl").read_text() == '{"kind": "run"}\n'
    else:
        assert not (log_dir / "metrics.jsonl").exists()
