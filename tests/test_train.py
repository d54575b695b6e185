"""train.py: its presets, what a run leaves, and a run that is called from Python."""

import dataclasses
import json
import math
import os
import re
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import tyro
from launcher import (
    LONG,
    fork_function,
    metrics,
    run,
    run_well,
    saved_steps,
    start,
    steps_done,
    tiny,
    wait_for,
)
from transformers import GPT2LMHeadModel

import train
from gptxs import checkpoint
from gptxs.distributed import DistInfo
from gptxs.metrics import MetricsLogger
from model import GPT, GPTConfig

RUN = ("--max-steps", "20", "--warmup-steps", "2", "--val-every", "10", "--sample-every", "0")
NOTHING_DUE = ("--val-every", "0", "--sample-every", "0", "--checkpoint-every", "0")
# A CPU compiles no shorter run.
COMPILED = ("--compile", "--max-steps", "200", "--val-every", "0", "--sample-every", "0")


def test_the_default_run_is_the_published_one() -> None:
    config = train.TrainConfig()
    assert config.model == GPTConfig(768, 12, 12, 512, 50304)
    assert config.batch_tokens == 2**19
    assert config.batch_tokens * config.max_steps == pytest.approx(10e9, rel=1e-3)
    assert config.warmup_steps * config.batch_tokens == pytest.approx(375e6, rel=1e-3)
    assert (config.max_lr, config.min_lr) == (6e-4, 6e-5)
    assert config.val_every == config.hellaswag_every == config.checkpoint_every == 250


SIZES = [("gpt-xs", 124), ("finetune", 124), ("gpt2", 124)]
SIZES += [("gpt2-medium", 355), ("gpt2-large", 774), ("gpt2-xl", 1558)]


@pytest.mark.parametrize(("name", "millions"), SIZES)
def test_a_preset_has_its_size_and_fits_one_to_eight_devices(name: Any, millions: int) -> None:
    config = train.PRESETS[name]
    assert config.preset == name
    with torch.device("meta"):
        model = GPT(config.model)
    assert round(model.num_parameters() / 1e6) == millions
    for world_size in (1, 2, 4, 8):
        assert config.validate(world_size) == []


def test_options_without_effect_are_named(folder: Path) -> None:
    settings: dict[str, Any] = {"muon_lr_scale": 2.0, "cooldown": 0.3, "val_tokens": 4096}
    settings |= {"hellaswag_data": Path("h.jsonl"), "sample_prompt": "a", "keep_checkpoints": 7}
    settings |= {"bf16_grads": True}
    off: Any = dict.fromkeys(
        ("val_every", "hellaswag_every", "sample_every", "checkpoint_every"), 0
    )
    config = dataclasses.replace(train.TrainConfig(), max_steps=4, **off, **settings)
    notes = config.unused_options(world_size=1)
    assert [note.split()[0] for note in notes] == list(settings)
    out = run_well(folder, "--bf16-grads", "--cooldown", "0.3", "--max-steps", "5")
    assert re.findall(r"(\w+) has no effect", out) == ["cooldown", "bf16_grads"]


def test_a_run_logs_every_step_learns_and_leaves_what_it_says(folder: Path) -> None:
    code, out, err = run(folder, *RUN, "--profile", "2")
    assert code == 0, err  # the profiler says something there
    assert out.splitlines()[-1] == 'python eval.py --checkpoint log --prompt "a"'
    rows = [json.loads(line) for line in (folder / "log/metrics.jsonl").open()]
    steps = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in steps] == list(range(20))
    assert all(row["mfu"] is None for row in steps)  # a CPU's peak is not in the table
    val = {row["step"]: row["loss"] for row in rows if row["kind"] == "val"}
    assert list(val) == [0, 10, 20]
    assert abs(val[0] - math.log(300)) < 0.1
    assert val[20] < val[10] < val[0] - 0.1
    (first,) = [row for row in rows if row["kind"] == "run"]
    assert (first["config"]["batch_tokens"], first["dataset"]) == (256, "tiny")
    assert saved_steps(folder / "log") == [7, 14, 20]
    trace = json.loads((folder / "log/trace_rank0.json").read_text())
    names = {event["name"] for event in trace["traceEvents"]}
    traced = {name for name in names if name.startswith("ProfilerStep")}
    assert traced == {"ProfilerStep#4", "ProfilerStep#5"}
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

    def log_step(self: Any, step: int, lr: float, stats: torch.Tensor) -> None:
        self._pending.append((step, lr, stats, Mock()))

    MetricsLogger.log_step = log_step  # type: ignore[method-assign]


def test_a_gpu_logs_the_last_step_of_a_run_that_is_stopped_or_ends(folder: Path) -> None:
    (training,) = start(folder, *LONG, *NOTHING_DUE[:4], before=read_late)
    wait_for(lambda: steps_done(folder / "log") > 5)
    training.kill(signal.SIGTERM)
    assert training.wait() == 0
    last = steps_done(folder / "log")
    assert saved_steps(folder / "log")[-1] == last
    flags = (*NOTHING_DUE, "--resume", "--max-steps", str(last + 5))
    run_well(folder, *flags, before=read_late)
    assert steps_done(folder / "log") == last + 5


def lose_the_compiler(probe: bool) -> None:
    """There is no C++ compiler; without the probe it is missed in the first step only."""
    from torch._inductor import config

    config.cpp.cxx = ("no-such-compiler",)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path("inductor").resolve())
    if not probe:
        train.compiler.compiler_problem = lambda device, steps: None


def test_neither_a_short_run_on_a_cpu_nor_any_on_mps_is_compiled() -> None:
    for device, steps in (("cpu", 199), ("mps", 19_073)):
        assert train.compiler.compiler_problem(torch.device(device), steps)


@pytest.mark.parametrize("probe", [True, False])
def test_without_a_compiler_a_run_is_not_compiled_or_says_how(folder: Path, probe: bool) -> None:
    code, out, err = run(folder, *COMPILED, before=partial(lose_the_compiler, probe))
    assert code == (0 if probe else 1)
    assert out.count("training without torch.compile: ") == probe
    assert "fewer than" not in out
    assert ("--no-compile" in err) != probe
    assert err.count("\n") == (not probe)
    assert steps_done(folder / "log") == (200 if probe else 0)


def be_offline_and_break_plot() -> None:
    os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=str(Path("hub").resolve()))
    train.plot.plot_run = Mock(side_effect=RuntimeError("no fonts"))


def test_a_run_does_without_hellaswag_and_its_plot_where_they_fail(folder: Path) -> None:
    """And without a checkpoint it recommends no command that reads one."""
    flags = ("--hellaswag-every", "2", "--max-steps", "5", "--checkpoint-every", "0")
    out = run_well(folder, *flags, before=be_offline_and_break_plot)
    assert out.count("HellaSwag is skipped") == 1
    assert out.endswith("no plot: no fonts\n")
    assert len(metrics(folder / "log", "train")) == 5


def overflow_in_hellaswag() -> None:
    train.hellaswag.load_or_skip = Mock(return_value=(Mock(),))
    train.hellaswag.pack_for = Mock()
    train.hellaswag.predict = Mock(side_effect=FloatingPointError("not finite in fp16"))


def move_the_log_folder(run: Any) -> None:
    if run.step == 11:
        wait_for(lambda: 7 in saved_steps(Path("log")))
        Path("log").rename("moved")


def test_a_run_goes_on_where_an_evaluation_overflows_and_its_log_folder_moves(folder: Path) -> None:
    """A resumed run would overflow again, and what was trained since would be lost again."""
    flags = ("--hellaswag-every", "20", "--max-steps", "20", "--checkpoint-every", "7")
    out = run_well(folder, *flags, before=overflow_in_hellaswag, on_step=move_the_log_folder)
    assert out.count("no HellaSwag at step 0: not finite in fp16\n") == 1
    assert saved_steps(folder / "moved") == [0, 7]
    assert saved_steps(folder / "log") == [14, 20]


def stop_and_kill_in_validation(run: Any) -> None:
    """torchrun sends SIGTERM, and SIGKILL to who has not ended 30 seconds later."""

    def validation_loss(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: 14 in saved_steps(Path("log")))
        os.kill(os.getpid(), signal.SIGKILL)

    if run.step == 13:
        train.validation_loss = validation_loss


def test_a_stop_during_an_evaluation_loses_no_step_even_if_it_takes_too_long(folder: Path) -> None:
    """The checkpoint comes first. Its best validation loss is that before this evaluation."""
    (training,) = start(folder, "--val-every", "7", on_step=stop_and_kill_in_validation)
    assert training.wait() == -signal.SIGKILL
    assert saved_steps(folder / "log") == [0, 7, 14]
    run_well(folder, "--resume", "--val-every", "7")
    val = {step: line["loss"] for (_, step), line in metrics(folder / "log", "val").items()}
    assert list(val) == [0, 7, 14, 21, 28, 35, 40]


def fill_the_disk(run: Any) -> None:
    if run.step == 1:
        checkpoint.save = Mock(side_effect=OSError("No space left on device"))


def test_a_full_disk_ends_a_run_with_1_where_the_last_checkpoint_is_missing(folder: Path) -> None:
    code, out, err = run(folder, "--max-steps", "12", on_step=fill_the_disk)
    assert code == 1
    assert err.startswith("train.py: the last checkpoint was not saved")
    assert err.count("\n") == 1
    assert out.count("checkpoint not saved: No space left on device\n") == 2
    assert "python eval.py" not in out  # which would find no checkpoint of this step
    assert saved_steps(folder / "log") == [0]
    assert len(metrics(folder / "log", "train")) == 12


CPU = DistInfo(rank=0, world_size=1, device=torch.device("cpu"))


def config(*flags: str) -> train.TrainConfig:
    settings = tiny("--warmup-steps", "1", "--max-steps", "3", "--checkpoint-every", "2", *flags)
    return tyro.cli(train.TrainConfig, args=settings)


def notebook() -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    train.train(config(), CPU)
    # A cell that fails or is interrupted: its traceback, which holds the run, is kept.
    kept = []
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error) as caught:
            train.train(config("--resume", "--max-steps", "6"), CPU, Mock(side_effect=error))
        kept.append(caught)
        assert {number: signal.getsignal(number) for number in handlers} == handlers
    train.train(config("--resume", "--max-steps", "6"), CPU)
    other = config("--log-dir", "log_of_a_thread")
    thread = threading.Thread(target=train.train, args=(other, CPU))
    thread.start()
    thread.join()


def test_a_notebook_trains_again_and_again_and_in_a_thread(folder: Path) -> None:
    training = fork_function(folder, notebook)
    assert training.wait() == 0, training.err
    assert len(metrics(folder / "log", "train")) == 6
    assert saved_steps(folder / "log_of_a_thread")[-1] == 3
