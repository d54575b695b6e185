"""train.py: its settings, what a run leaves, and a run that is called from Python."""

import gc
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import tyro
from launcher import (
    LONG,
    ROOT,
    fork,
    fork_function,
    metrics,
    run,
    run_well,
    saved_steps,
    start,
    steps_done,
    tiny,
    wait_for,
    write_shards,
)
from transformers import GPT2LMHeadModel

import train
from gptxs import checkpoint
from gptxs.distributed import DistInfo
from gptxs.metrics import MetricsLogger, StepStats
from gptxs.optim import learning_rate
from model import GPT, GPTConfig

RUN = ("--max-steps", "20", "--warmup-steps", "2", "--val-every", "10", "--sample-every", "0")
NOTHING_DUE = ("--val-every", "0", "--sample-every", "0", "--checkpoint-every", "0")
# A CPU compiles no shorter run.
COMPILED = ("--compile", "--max-steps", "200", "--val-every", "0", "--sample-every", "0")

# ---- settings ------------------------------------------------------------------------------------


def test_the_schedule_rises_and_falls_through_its_published_values() -> None:
    rates = [learning_rate(step, train.TrainConfig()) for step in range(19_073)]
    assert rates[0] == pytest.approx(6e-4 / 715, rel=1e-9)
    assert rates[714] == rates[715] == 6e-4
    cosine = 0.5 + 0.5 * math.cos(math.pi * (10_000 - 715) / (19_072 - 715))
    assert rates[10_000] == pytest.approx(6e-5 + cosine * (6e-4 - 6e-5), rel=1e-9)
    assert rates[19_072] == pytest.approx(6e-5, rel=1e-9)
    assert all(a < b for a, b in itertools.pairwise(rates[:715]))
    assert all(a > b for a, b in itertools.pairwise(rates[715:]))


def test_the_default_run_is_the_published_one() -> None:
    config = train.TrainConfig()
    assert config.model == GPTConfig(768, 12, 12, 512, 50304)
    assert config.batch_tokens == 2**19
    assert config.batch_tokens * config.max_steps == pytest.approx(10e9, rel=1e-3)
    assert config.warmup_steps * config.batch_tokens == pytest.approx(375e6, rel=1e-3)
    assert (config.max_lr, config.min_lr) == (6e-4, 6e-5)
    assert config.val_every == config.hellaswag_every == config.checkpoint_every == 250


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


# ---- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log folder of a run by the command itself, `python train.py`."""
    folder = tmp_path_factory.mktemp("one")
    write_shards(folder / "data")
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *tiny(*RUN, "--profile", "2")],
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
    assert all(row["mfu"] is None for row in steps)  # a CPU's peak is not in the table
    val = {row["step"]: row["loss"] for row in rows if row["kind"] == "val"}
    assert list(val) == [0, 10, 20]
    assert abs(val[0] - math.log(300)) < 0.1
    assert val[20] < val[10] < val[0] - 0.1
    (first,) = [row for row in rows if row["kind"] == "run"]
    assert first["config"]["batch_tokens"] == 256
    assert first["dataset"] == "tiny"
    assert first["versions"]["torch"] == torch.__version__
    names = {path.name for path in one_process.iterdir()}
    assert {"step_000014", "step_000020", "plot.png", "report.md"} <= names


def test_the_profile_holds_the_operations_of_its_steps(one_process: Path) -> None:
    events = json.loads((one_process / "trace_rank0.json").read_text())["traceEvents"]
    names = [event["name"] for event in events]
    steps = {name for name in names if name.startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#4", "ProfilerStep#5"}
    assert "LinearCrossEntropyBackward" in names


def test_the_losses_are_those_of_an_independent_loop(folder: Path) -> None:
    """Hugging Face's model and AdamW, written as the README describes a run."""
    run_well(folder, "--no-shuffle", "--keep-checkpoints", "0")
    losses = [line["loss"] for line in metrics(folder / "log", "train").values()]

    model = GPT2LMHeadModel.from_pretrained(folder / "log/step_000000").train()
    parameters = list(model.parameters())
    decayed = {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1}
    others = {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([decayed, others], betas=(0.9, 0.95), eps=1e-8)
    windows = []  # the documented order: windows of a shard overlap by a token
    for name in ("tiny_train_000001.npy", "tiny_train_000002.npy"):
        tokens = torch.from_numpy(np.load(folder / "data" / name).astype(np.int64))
        windows += [tokens[i : i + 17] for i in range(0, len(tokens) - 16, 16)]
    expected = []
    for step in range(40):
        batch = torch.stack([windows[(step * 16 + j) % len(windows)] for j in range(16)])
        logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        cosine = 0.5 + 0.5 * math.cos(math.pi * (step - 5) / 34)
        lr = 1e-2 * (step + 1) / 5 if step < 5 else 1e-3 + cosine * 9e-3
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, abs=1e-4)


def read_late() -> None:
    """The numbers of a step are read when the next one is queued, as on a GPU."""

    def log_step(self: Any, step: int, lr: float, stats: torch.Tensor) -> list[StepStats]:
        self._pending.append((step, lr, stats, None))
        return self.flush(keep=1)

    MetricsLogger.log_step = log_step  # type: ignore[method-assign]


def test_a_gpu_logs_the_last_step_of_a_run_in_which_nothing_else_is_due(folder: Path) -> None:
    run_well(folder, *NOTHING_DUE, before=read_late)
    assert len(metrics(folder / "log", "train")) == 40


def test_a_gpu_logs_the_last_step_of_a_run_that_is_stopped(folder: Path) -> None:
    (training,) = start(folder, *LONG, *NOTHING_DUE[:4], before=read_late)
    wait_for(lambda: steps_done(folder / "log") > 5)
    training.kill(signal.SIGTERM)
    assert training.wait() == 0
    assert saved_steps(folder / "log")[-1] == steps_done(folder / "log")


def lose_the_compiler(probe: bool) -> None:
    """There is no C++ compiler; without the probe it is missed in the first step only."""
    from torch._inductor import config

    config.cpp.cxx = ("no-such-compiler",)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path("inductor").resolve())
    if not probe:
        train.compiler_problem = lambda device: None


@pytest.mark.parametrize("probe", [True, False])
def test_without_a_compiler_a_run_is_not_compiled_or_says_how(folder: Path, probe: bool) -> None:
    code, out, err = run(folder, *COMPILED, before=partial(lose_the_compiler, probe))
    assert code == (0 if probe else 1)
    assert out.count("training without torch.compile: ") == probe
    assert ("--no-compile" in err) != probe
    assert err.count("\n") == (not probe)
    assert steps_done(folder / "log") == (200 if probe else 0)


def test_the_last_line_shows_how_to_sample_where_there_is_a_checkpoint(folder: Path) -> None:
    flags = ("--max-steps", "5", "--log-dir", "new", "--checkpoint-every")
    assert run_well(folder, *flags, "0").endswith("are in new/\n")
    last = run_well(folder, *flags, "5", "--resume").splitlines()[-1]
    assert last == 'python eval.py --checkpoint new --prompt "a"'


def break_plot() -> None:
    train.plot.plot_run = Mock(side_effect=RuntimeError("no fonts"))  # type: ignore[attr-defined]


def test_a_plot_that_fails_does_not_fail_the_run(folder: Path) -> None:
    out = run_well(folder, "--max-steps", "5", before=break_plot)
    assert "no plot: no fonts\n" in out
    assert len(metrics(folder / "log", "train")) == 5


def test_hellaswag_that_cannot_be_loaded_is_reported_once_and_training_continues(
    folder: Path,
) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    training = fork(folder, tiny("--hellaswag-every", "2", "--max-steps", "5"), offline)
    assert training.wait() == 0, training.err
    assert training.out.count("HellaSwag is skipped") == 1
    assert len(metrics(folder / "log", "train")) == 5


# ---- checkpoints ---------------------------------------------------------------------------------


def break_evaluation(name: str) -> None:
    setattr(train, name, Mock(side_effect=RuntimeError("no memory\nand a second line")))


@pytest.mark.parametrize("name", ["validation_loss", "sample"])
def test_an_evaluation_that_fails_costs_no_step(folder: Path, name: str) -> None:
    flags = ("--val-every", "7", "--sample-every", "7")
    fault = partial(at_step, 1, partial(break_evaluation, name))
    code, _, err = run(folder, *flags, on_step=fault)
    assert code == 1
    assert err.count("\n") == 1
    assert "no memory" in err
    assert saved_steps(folder / "log") == [0, 7]


def at_step(step: int, fault: Callable[[], None], run: Any) -> None:
    if run.step == step:
        fault()


def stop_and_kill_in_validation() -> None:
    """torchrun sends SIGTERM, and SIGKILL to who has not ended 30 seconds later."""

    def validation_loss(*_: Any, **__: Any) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: 14 in saved_steps(Path("log")))
        os.kill(os.getpid(), signal.SIGKILL)
        return 0.0

    train.validation_loss = validation_loss


def test_a_stop_during_an_evaluation_loses_no_step_even_if_it_takes_too_long(folder: Path) -> None:
    """The checkpoint comes first. Its best validation loss is that before this evaluation."""
    fault = partial(at_step, 13, stop_and_kill_in_validation)
    (training,) = start(folder, "--val-every", "7", on_step=fault)
    assert training.wait() == -signal.SIGKILL
    assert saved_steps(folder / "log") == [0, 7, 14]
    run_well(folder, "--resume", "--val-every", "7")
    val = {step: line["loss"] for (_, step), line in metrics(folder / "log", "val").items()}
    assert list(val) == [0, 7, 14, 21, 28, 35, 40]


def fill_the_disk() -> None:
    checkpoint.save = Mock(side_effect=OSError("No space left on device"))  # type: ignore[assignment]


@pytest.mark.parametrize(("first", "saved"), [(0, [0]), (10, [0, 7])])
def test_a_run_whose_last_checkpoint_could_not_be_written_ends_with_1(
    folder: Path, first: int, saved: list[int]
) -> None:
    """A full disk does not stop it before."""
    fault = partial(at_step, first, fill_the_disk)
    code, out, err = run(folder, "--max-steps", "12", on_step=fault)
    assert code == 1
    assert err.startswith("train.py: the last checkpoint was not saved")
    assert err.count("\n") == 1
    assert "checkpoint not saved: No space left on device\n" in out
    assert saved_steps(folder / "log") == saved
    assert len(metrics(folder / "log", "train")) == 12


def move_checkpoints(run: Any) -> None:
    """A job of the user's uploads the checkpoints, and deletes the lock files that it finds."""
    Path("log/.lock").unlink(missing_ok=True)
    for folder in Path("log").glob("step_*"):
        folder.rename(f"away/{folder.name}")


def test_a_run_survives_the_loss_of_its_checkpoints_and_of_its_lock_file(folder: Path) -> None:
    (folder / "away").mkdir()
    flags = ("--checkpoint-every", "1", "--keep-checkpoints", "1")
    run_well(folder, *flags, on_step=move_checkpoints)
    assert saved_steps(folder / "log")[-1] == 40
    assert len(metrics(folder / "log", "train")) == 40


# ---- called from Python --------------------------------------------------------------------------

CPU = DistInfo(rank=0, world_size=1, device=torch.device("cpu"))


def config(*flags: str) -> train.TrainConfig:
    settings = tiny("--warmup-steps", "1", "--max-steps", "3", "--checkpoint-every", "2", *flags)
    return tyro.cli(train.TrainConfig, args=settings)


def raise_interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def notebook() -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    train.train(config(), CPU)
    # A cell that fails or is interrupted: its traceback, which holds the run, is kept.
    kept = []
    for fault in (Mock(side_effect=RuntimeError), raise_interrupt):
        with pytest.raises((RuntimeError, KeyboardInterrupt)) as caught:
            train.train(config("--resume", "--max-steps", "6"), CPU, fault)
        kept.append(caught)
        assert gc.get_freeze_count() == 0
        assert {number: signal.getsignal(number) for number in handlers} == handlers
    train.train(config("--resume", "--max-steps", "6"), CPU)
    assert gc.get_freeze_count() == 0
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    thread = threading.Thread(
        target=train.train, args=(config("--log-dir", "log_of_a_thread"), CPU)
    )
    thread.start()
    thread.join()


def test_a_notebook_trains_again_and_again_and_in_a_thread(folder: Path) -> None:
    """Afterwards Ctrl-C interrupts as before, and Python collects all garbage."""
    training = fork_function(folder, notebook)
    assert training.wait() == 0, training.err
    assert len(metrics(folder / "log", "train")) == 6
    assert saved_steps(folder / "log_of_a_thread")[-1] == 3


class NameOfMps(str):
    """A device that is computed on the CPU and calls itself "mps"."""

    type = "mps"


class OldFusedAdamW(torch.optim.AdamW):
    """It updates whatever found_inf says, as MPS's did before torch 2.13."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.found_inf = None
        super().step()


def train_on_mps() -> None:

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * (math.nan if run.step == 1 else 1.0)

    def on_step(progress: train.Progress, model: GPT) -> None:
        if progress.step == 0:
            model.transformer.ln_f.weight.register_hook(poison)
        run.step = progress.step

    run = SimpleNamespace(step=0)
    train.build_optimizer = lambda model, *_, **__: OldFusedAdamW(model.parameters())
    device: Any = NameOfMps("cpu")
    train.train(config(), DistInfo(rank=0, world_size=1, device=device), on_step)


def test_on_mps_an_update_that_is_not_finite_is_skipped_by_the_host(folder: Path) -> None:
    training = fork_function(folder, train_on_mps)
    assert training.wait() == 0, training.err
    lines = metrics(folder / "log", "train")
    assert [step for (_, step), line in lines.items() if line.get("skipped")] == [1]
    assert lines["train", 2]["loss"] is not None  # as NaN would be written
    assert saved_steps(folder / "log") == [0, 2, 3]
