"""train.py: its schedule, its presets, and what a run leaves."""

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from launcher import (
    ROOT,
    TINY,
    fork,
    metrics,
    refused,
    run,
    run_well,
    saved_steps,
    write_shards,
)
from safetensors import safe_open

import train
from model import GPT, GPTConfig
from optim import learning_rate

RUN = ("--max-steps", "20", "--warmup-steps", "2", "--val-every", "10", "--sample-every", "0")


# ---- settings ------------------------------------------------------------------------------------


def published_rate(step: float) -> float:
    """The learning rate of the default run."""
    return learning_rate(step, max_steps=19_073, warmup_steps=715, max_lr=6e-4, min_lr=6e-5)


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
def test_the_schedule_has_its_published_values(step: float, expected: float) -> None:
    assert published_rate(step) == pytest.approx(expected, rel=1e-9)


def test_the_schedule_rises_then_falls_and_never_leaves_its_bounds() -> None:
    rates = [published_rate(step) for step in range(19_073)]
    assert all(a < b for a, b in itertools.pairwise(rates[:715]))
    assert all(a > b for a, b in itertools.pairwise(rates[715:]))
    assert min(rates[715:]) == rates[-1]


def test_the_default_run_is_the_published_one() -> None:
    config = train.TrainConfig()
    assert config.model == GPTConfig(768, 12, 12, 512, 50304)
    assert config.batch_tokens == 2**19
    assert config.batch_tokens * config.max_steps == pytest.approx(10e9, rel=1e-3)
    assert config.warmup_steps * config.batch_tokens == pytest.approx(375e6, rel=1e-3)
    assert (config.max_lr, config.min_lr) == (6e-4, 6e-5)


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("gpt-xs", 124), ("gpt2", 124), ("gpt2-medium", 355), ("gpt2-large", 774), ("gpt2-xl", 1558)],
)
def test_the_presets_have_their_size_and_fit_one_to_eight_gpus(size: str, parameters: int) -> None:
    config = train.PRESETS[size]
    assert config.preset == size
    with torch.device("meta"):
        model = GPT(config.model)
    assert round(model.num_parameters() / 1e6) == parameters
    for world_size in (1, 2, 4, 8):
        assert config.validate(world_size) == []


def test_all_problems_of_a_configuration_are_reported_at_once() -> None:
    config = dataclasses.replace(
        train.TrainConfig(), batch_tokens=1000, max_lr=1e-5, val_tokens=3, grad_clip=0.0
    )
    problems = config.validate(world_size=1)
    assert len(problems) == 4
    for named in ("batch_tokens 1000", "max_lr 1e-05", "val_tokens 3", "grad_clip 0.0"):
        assert sum(named in problem for problem in problems) == 1


def test_a_batch_that_three_gpus_cannot_share_names_the_nearest_that_they_can() -> None:
    (problem,) = train.TrainConfig().validate(world_size=3)
    assert problem.startswith("batch_tokens 524288 must be a multiple of 98304 ")
    assert problem.endswith("nearest: 491520")


# ---- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log folder of a run by the command itself, `python train.py`."""
    folder = tmp_path_factory.mktemp("one")
    write_shards(folder / "data")
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *TINY, *RUN, "--profile", "2"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder / "log"


def test_a_run_logs_every_step_and_learns(one_process: Path) -> None:
    rows = [json.loads(line) for line in (one_process / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in steps] == list(range(20))
    for row in steps:
        assert row["lr"] == pytest.approx(learning_rate(row["step"], 20, 2, 1e-2, 1e-3))
        assert row["tokens_per_s"] == pytest.approx(256 / row["ms"] * 1e3, rel=1e-6)
        assert row["mfu"] is None  # a CPU's peak is not in the table
    val = {row["step"]: row["loss"] for row in rows if row["kind"] == "val"}
    assert list(val) == [0, 10, 20]
    assert abs(val[0] - math.log(300)) < 0.1
    assert val[20] < val[10] < val[0] - 0.1
    (start,) = [row for row in rows if row["kind"] == "run"]
    assert start["config"]["batch_tokens"] == 256
    assert start["dataset"] == "tiny"
    assert start["versions"]["torch"] == torch.__version__


def read_late(run: Any) -> None:
    """Read a step's numbers one step later, as on a GPU."""

    def log_step(step: int, lr: float, stats: torch.Tensor) -> None:
        run.logger.pending.append((step, lr, stats, None))
        run.logger.flush(keep=1)

    run.logger.log_step = log_step


def test_a_gpu_logs_the_last_step_of_a_run_in_which_nothing_else_is_due(folder: Path) -> None:
    nothing = ("--val-every", "0", "--sample-every", "0", "--checkpoint-every", "0")
    run_well(folder, *nothing, on_step=read_late)
    assert len(metrics(folder / "log", "train")) == 40


def test_a_run_leaves_checkpoints_a_picture_and_a_report(one_process: Path) -> None:
    names = {path.name for path in one_process.iterdir()}
    assert {"step_000014", "step_000020", "plot.png", "report.md"} <= names


def test_a_machine_without_a_compiler_trains_uncompiled(folder: Path) -> None:
    flags = ("--compile", "--max-steps", "200", "--val-every", "0", "--sample-every", "0")
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *TINY, *flags],
        cwd=folder,
        env=os.environ | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(folder / "ti")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("training without torch.compile: ") == 1
    assert len(metrics(folder / "log", "train")) == 200


def test_the_profile_holds_the_operations_of_its_steps(one_process: Path) -> None:
    events = json.loads((one_process / "trace_rank0.json").read_text())["traceEvents"]
    names = [event["name"] for event in events]
    assert names.count("ProfilerStep#4") == 1
    assert names.count("ProfilerStep#5") == 1
    assert sum(name.startswith("ProfilerStep") for name in names) == 2
    assert "LinearCrossEntropyBackward" in names


def end_before_the_first_step(run: Any) -> None:
    """The checkpoint of step 0 is saved by then, and the compiler has nothing to do yet."""
    assert any("_orig_mod" in name for name in run.training_model.state_dict())
    run.loader.close()
    raise SystemExit


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_weights_of_a_compiled_run_have_hugging_faces_names(folder: Path, ranks: int) -> None:
    """The compiled module and the parallel one both prefix the names of their weights."""
    # A CPU compiles no shorter run. Nothing is exchanged right before the end: Gloo's thread may
    # wait for Python's lock to free that tensor, while DDP's end holds the lock and waits for it.
    flags = ("--compile", "--max-steps", "200", "--val-every", "0", "--sample-every", "0")
    run_well(folder, *flags, ranks=ranks, on_step=end_before_the_first_step)
    with safe_open(folder / "log/step_000000/model.safetensors", framework="pt") as weights:
        names = set(weights.keys())
    model = GPT(GPTConfig(d_model=16, n_heads=2, n_layers=1, context_length=16, vocab_size=300))
    assert names == {name for name, _ in model.named_parameters()}  # once for the tied head


def test_hellaswag_that_cannot_be_loaded_is_reported_once_and_training_continues(
    folder: Path,
) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "WORLD_SIZE": "1"}
    flags = ("--hellaswag-every", "2", "--max-steps", "5")
    training = fork(folder, ["train.py", *TINY, *flags], offline)
    assert training.wait() == 0, training.err
    assert training.out.count("HellaSwag is skipped") == 1
    assert len(metrics(folder / "log", "train")) == 5


ROW = {"activity_label": "a", "ctx": "b c", "ctx_a": "b", "ctx_b": "c", "label": 0}


@pytest.mark.parametrize(
    ("line", "vocab", "word"),
    [
        ("{not json", "300", "line 1"),
        ('{"ctx": 1}', "300", "line 1"),
        (json.dumps(ROW | {"endings": ["a", "b", "c", "d " * 50]}), "50304", "an ending of"),
        (json.dumps(ROW | {"endings": ["a", "b", "c", "hello"]}), "300", "vocabulary of 300"),
    ],
)
def test_a_hellaswag_file_that_cannot_be_used_is_refused_before_the_first_step(
    folder: Path, line: str, vocab: str, word: str
) -> None:
    (folder / "broken.jsonl").write_text(f"{line}\n")
    flags = ("--hellaswag-every", "2", "--hellaswag-data", "broken.jsonl")
    refused(run(folder, *flags, "--model.vocab-size", vocab), "broken.jsonl", word)
    assert not (folder / "log/metrics.jsonl").exists()


def break_chores(run: Any) -> None:
    """Samples and HellaSwag fail from step 1 on."""
    run.sampler.generate = Mock(side_effect=RuntimeError("no memory\nand a second line"))
    run.hellaswag_examples = [None]


def test_a_chore_that_fails_is_skipped_and_costs_no_checkpoint(folder: Path) -> None:
    (folder / "h.jsonl").write_text(json.dumps(ROW | {"endings": ["a", "b", "c", "d"]}) + "\n")
    flags = ("--sample-every", "7", "--hellaswag-every", "7", "--hellaswag-data", "h.jsonl")
    more = ("--model.vocab-size", "50304", "--max-steps", "8")
    out = run_well(folder, *flags, *more, on_step=break_chores)
    assert out.count("step     7 | sample is skipped: no memory\n") == 1
    assert out.count("step     7 | hellaswag is skipped: ") == 1
    assert saved_steps(folder / "log") == [0, 7, 8]


def test_a_checkpoint_is_saved_before_the_validation_of_its_step(folder: Path) -> None:
    """Whatever stops the validation: even a kill."""
    flags = ("--checkpoint-every", "10", "--val-every", "10")
    run_well(folder, *flags, "--max-steps", "20")
    kinds = [json.loads(line) for line in (folder / "log/metrics.jsonl").open()]
    state = torch.load(folder / "log/step_000020/training_state.pt", weights_only=True)
    val = {row["step"]: row["loss"] for row in kinds if row["kind"] == "val"}
    assert state["best_val"] == val[10] > val[20]


def break_saving(first: int, run: Any) -> None:
    """No checkpoint of step ``first`` or later can be written."""
    if run.step == first:
        run.writer.start = Mock(side_effect=OSError("No space left on device"))


@pytest.mark.parametrize(("first", "newest"), [(0, "step_000000"), (10, "step_000007")])
def test_a_run_whose_last_checkpoint_could_not_be_written_ends_with_1(
    folder: Path, first: int, newest: str
) -> None:
    fault = partial(break_saving, first)
    code, out, err = run(folder, "--max-steps", "12", on_step=fault)
    assert code == 1
    assert err.startswith("train.py: the last checkpoint was not saved, the newest is log/")
    assert err.endswith(f"{newest}: No space left on device\n")
    assert err.count("\n") == 1
    assert "checkpoint not saved: No space left on device\n" in out  # and not that it continues
    assert "done: metrics.jsonl" in out


def test_the_last_lines_name_no_checkpoints_where_there_are_none(folder: Path) -> None:
    out = run_well(folder, "--max-steps", "5", "--checkpoint-every", "0")
    assert out.splitlines()[-1] == "done: metrics.jsonl are in log/"


def break_plot(run: Any) -> None:
    train.plot.plot_run = Mock(side_effect=RuntimeError("no fonts"))


def test_a_plot_that_fails_does_not_fail_the_run(folder: Path) -> None:
    out = run_well(folder, "--max-steps", "5", on_step=break_plot)
    assert "no plot: no fonts\n" in out
    assert "done: metrics.jsonl and checkpoints are in log/" in out


def rename_log(run: Any) -> None:
    """The log folder is moved away, and another one is where it was."""
    if run.step == 5:
        Path("log").rename("moved")
        Path("log").mkdir()


def test_a_log_folder_that_is_replaced_stops_the_run_which_writes_no_more(folder: Path) -> None:
    code, _, err = run(folder, on_step=rename_log)
    assert code == 1
    assert err == "train.py: log was renamed, removed or replaced during the run\n"
    assert list((folder / "log").iterdir()) == []
    assert len(metrics(folder / "moved", "train")) == 5
