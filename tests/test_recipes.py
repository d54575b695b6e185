"""The recipes beside the default one: Muon, the schedules, fp16, and activations computed again."""

import math
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from launcher import metrics, run, run_well
from test_train import RUN
from torch import Tensor

import train
from model import GPT


def losses(log: Path) -> list[float]:
    return [line["loss"] for line in metrics(log, "train").values()]


def saved_state(log: Path, step: int) -> dict[str, Any]:
    return torch.load(log / f"step_{step:06d}/training_state.pt", weights_only=True)


def test_a_run_follows_its_schedule_also_one_that_is_changed_as_it_is_resumed(folder: Path) -> None:
    flags = ("--schedule", "wsd", "--cooldown", "0.5")
    run_well(folder, *RUN, *flags)
    out = run_well(folder, *RUN, "--resume", "--max-steps", "30", "--schedule", "linear")
    assert "schedule was wsd, is now linear" in out
    rates = [line["lr"] for line in metrics(folder / "log", "train").values()]
    assert rates[2:10] == pytest.approx([1e-2] * 8)
    assert rates[10:20] == pytest.approx([1e-2 - 9e-4 * (i + 1) for i in range(10)])
    assert [rates[20], rates[29]] == pytest.approx([4e-3, 1e-3])


def overflow(first: int, count: int, run: Any) -> None:
    """The gradient of a weight is too large for fp16, ``count`` steps from ``first`` on."""

    def enlarge(gradient: Tensor) -> Tensor:
        return gradient * (math.inf if first <= run.step < first + count else 1.0)

    if not hasattr(run, "hook"):
        run.hook = run.model.transformer.h[0].mlp.c_fc.weight.register_hook(enlarge)


def test_overflows_in_fp16_halve_the_scale_and_end_no_run(folder: Path) -> None:
    flags = ("--dtype", "fp16", "--max-steps", "24", "--optimizer", "muon")
    run_well(folder, *flags, ranks=2, on_step=partial(overflow, 3, 12))
    lines = list(metrics(folder / "log", "train").values())
    assert [line["step"] for line in lines if line.get("overflow")] == list(range(3, 15))
    assert not any(line.get("skipped") for line in lines)
    scales = [line["loss_scale"] for line in lines]
    assert scales[2:16] == [65536, *(65536 / 2**i for i in range(13))]
    assert scales[16:] == [16] * 8
    state = saved_state(folder / "log", 24)
    assert state["scaler"]["scale"] == 16
    assert "momentum" in state["optimizer"]["param_groups"][0]  # it is Muon's
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_a_gradient_that_no_scale_makes_finite_ends_a_run_in_fp16(folder: Path) -> None:
    code, out, err = run(folder, "--dtype", "fp16", on_step=partial(overflow, 0, 1000))
    assert code == 1
    assert "10 gradients in a row were not finite" in err
    assert out.count("overflow in fp16") == 16  # down to a scale of 1


def stop_after_nine(run: Any) -> None:
    overflow(2, 3, run)
    if run.step == 8:
        os.kill(os.getpid(), signal.SIGUSR1)


def test_a_run_in_fp16_resumes_exactly(folder: Path) -> None:
    flags = ("--dtype", "fp16", "--max-steps", "14")
    run_well(folder, *flags, "--log-dir", "whole", on_step=partial(overflow, 2, 3))
    run_well(folder, *flags, "--log-dir", "parts", on_step=stop_after_nine)
    run_well(folder, *flags, "--log-dir", "parts", "--resume")
    assert losses(folder / "whole") == losses(folder / "parts")
    whole, parts = saved_state(folder / "whole", 14), saved_state(folder / "parts", 14)
    assert whole["scaler"]["_growth_tracker"] == 9  # steps since the last overflow
    for name in ("scaler", "optimizer"):
        torch.testing.assert_close(whole[name], parts[name], rtol=0, atol=0)


def expect_one_recomputed(run: Any) -> None:
    assert run.model.recomputed_blocks == 1


def test_a_share_of_the_blocks_is_computed_again_with_the_same_losses(folder: Path) -> None:
    flags = (*RUN, "--model.n-layers", "2", "--val-every", "0", "--micro-batch", "16")
    run_well(folder, *flags, "--log-dir", "plain")
    flags = (*flags, "--recompute", "0.4")
    run_well(folder, *flags, on_step=expect_one_recomputed)
    assert losses(folder / "log") == losses(folder / "plain")
    run_well(folder, *flags, "--micro-batch", "8", "--log-dir", "two", ranks=2)
    assert losses(folder / "two") == pytest.approx(losses(folder / "plain"), abs=1e-4)


def compile_any_run() -> None:
    """Also one that is too short to recoup it."""
    train.compiler.CPU_STEPS = 1


def test_all_recipes_work_in_the_compiled_step(folder: Path) -> None:
    """And what it saves has the names of the plain model."""
    flags = (*RUN, "--optimizer", "muon", "--schedule", "wsd", "--recompute", "0.4")
    run_well(folder, *flags, "--log-dir", "plain")
    out = run_well(folder, *flags, "--compile", before=compile_any_run)
    assert "without torch.compile" not in out
    assert losses(folder / "log") == pytest.approx(losses(folder / "plain"), abs=1e-3)
    assert losses(folder / "log")[-1] < losses(folder / "log")[0] - 0.2
    compiled, plain = (
        GPT.from_pretrained(folder / log / "step_000020").weights() for log in ("log", "plain")
    )
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-2)
