"""The recipes beside the default one: Muon, the schedules, fp16, and activations computed again."""

import json
import math
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from launcher import metrics, refused, run, run_well
from test_train import RUN
from torch import Tensor

import train
from gptxs.optim import orthogonalize
from model import GPT, GPTConfig

TINY = GPTConfig(d_model=16, n_heads=2, n_layers=2, context_length=16, vocab_size=300)


def losses(log: Path) -> list[float]:
    return [line["loss"] for line in metrics(log, "train").values()]


# ---- schedules -----------------------------------------------------------------------------------


def test_a_run_follows_its_schedule_also_one_that_is_changed_as_it_is_resumed(folder: Path) -> None:
    flags = ("--schedule", "wsd", "--cooldown", "0.5")
    run_well(folder, *RUN, *flags)
    rates = [line["lr"] for line in metrics(folder / "log", "train").values()]
    assert rates[2:10] == pytest.approx([1e-2] * 8)
    assert rates[10:] == pytest.approx([1e-2 - 9e-4 * (i + 1) for i in range(10)])
    out = run_well(folder, *RUN, "--resume", "--max-steps", "30", "--schedule", "linear")
    assert "schedule was wsd, is now linear" in out
    last = metrics(folder / "log", "train")
    assert [last["train", step]["lr"] for step in (20, 29)] == pytest.approx([4e-3, 1e-3])


# ---- Muon ----------------------------------------------------------------------------------------


def test_orthogonalized_matrices_keep_their_directions_and_lose_their_sizes() -> None:
    torch.manual_seed(0)
    for shape in ((3, 32, 96), (96, 32)):
        matrices = torch.randn(shape)
        result = orthogonalize(matrices)
        values = torch.linalg.svdvals(result)
        assert values.min() > 0.6
        assert values.max() < 1.3
        u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
        assert torch.nn.functional.cosine_similarity(result, u @ vh, dim=-1).min() > 0.9


def test_muon_learns_and_is_another_run_than_adamw(folder: Path) -> None:
    for log in ("adamw", "muon"):
        run_well(folder, *RUN, "--optimizer", log, "--log-dir", log)
    adamw, muon = losses(folder / "adamw"), losses(folder / "muon")
    assert adamw[0] == muon[0]
    assert muon[-1] != adamw[-1]
    assert muon[-1] < muon[0] - 0.2
    flags = ("--resume", "--log-dir", "muon", "--max-steps", "30")
    refused(run(folder, *RUN, *flags), "optimizer was muon, is now adamw")


# ---- fp16 ----------------------------------------------------------------------------------------


def overflow(first: int, count: int, run: Any) -> None:
    """The gradient of a weight is too large for fp16, ``count`` steps from ``first`` on."""

    def enlarge(gradient: Tensor) -> Tensor:
        return gradient * (math.inf if first <= run.step < first + count else 1.0)

    if not hasattr(run, "hook"):
        run.hook = run.model.transformer.h[0].mlp.c_fc.weight.register_hook(enlarge)


@pytest.mark.parametrize(("ranks", "optimizer"), [(1, "adamw"), (2, "muon")])
def test_overflows_in_fp16_halve_the_scale_and_do_not_end_a_run(
    folder: Path, ranks: int, optimizer: str
) -> None:
    """More of them in a row than the non-finite gradients that end one."""
    flags = ("--dtype", "fp16", "--max-steps", "24", "--optimizer", optimizer)
    out = run_well(folder, *flags, ranks=ranks, on_step=partial(overflow, 3, 12))
    lines = list(metrics(folder / "log", "train").values())
    assert [line["step"] for line in lines if line.get("overflow")] == list(range(3, 15))
    assert not any(line.get("skipped") for line in lines)
    assert out.count("overflow in fp16") == 12
    assert [line["loss_scale"] for line in lines[2:17]] == [
        65536 / 2**i for i in (0, *range(13), 12)
    ]
    state = torch.load(folder / "log/step_000024/training_state.pt", weights_only=True)
    assert state["scaler"]["scale"] == 16
    assert state["skipped"] == 0
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
    run_well(folder, *flags, "--log-dir", "parts", "--resume", on_step=partial(overflow, 2, 3))
    assert losses(folder / "whole") == losses(folder / "parts")
    states = [
        torch.load(folder / log / "step_000014/training_state.pt", weights_only=True)
        for log in ("whole", "parts")
    ]
    assert states[0]["scaler"]["_growth_tracker"] == 9  # steps since the last overflow
    for name in ("scaler", "optimizer"):
        torch.testing.assert_close(states[0][name], states[1][name], rtol=0, atol=0)


# ---- activations computed again ------------------------------------------------------------------


def count_blocks(path: str, run: Any) -> None:
    """Write how often each block computed in a step of one micro-batch."""
    if run.step == 0:
        run.calls = [0] * len(run.model.transformer.h)
        for i, block in enumerate(run.model.transformer.h):

            def count(*_: object, i: int = i) -> None:
                run.calls[i] += 1

            block.register_forward_pre_hook(count)
    elif run.step == 1:
        Path(path).write_text(json.dumps(run.calls))


@pytest.mark.parametrize(("share", "calls"), [("0.4", [2, 1]), ("1", [2, 2])])
def test_a_share_of_the_blocks_is_computed_again_with_the_same_losses(
    folder: Path, share: str, calls: list[int]
) -> None:
    flags = (*RUN, "--model.n-layers", "2", "--val-every", "0", "--micro-batch", "16")
    run_well(folder, *flags, "--log-dir", "plain")
    on_step = partial(count_blocks, "calls.json")
    run_well(folder, *flags, "--recompute", share, on_step=on_step)
    assert json.loads((folder / "calls.json").read_text()) == calls
    assert losses(folder / "log") == losses(folder / "plain")
    flags = (*flags, "--micro-batch", "8", "--log-dir", "two")
    run_well(folder, *flags, "--recompute", share, ranks=2)
    assert losses(folder / "two") == pytest.approx(losses(folder / "plain"), abs=1e-4)


def compile_any_run() -> None:
    """Also one that is too short to recoup it."""
    train.CPU_COMPILE_STEPS = 1


def test_all_recipes_work_in_the_compiled_step(folder: Path) -> None:
    """And what it saves has the names of the plain model."""
    flags = (*RUN, "--optimizer", "muon", "--schedule", "wsd", "--recompute", "0.4")
    run_well(folder, *flags, "--log-dir", "plain")
    out = run_well(folder, *flags, "--compile", before=compile_any_run)
    assert "without torch.compile" not in out
    assert losses(folder / "log") == pytest.approx(losses(folder / "plain"), abs=1e-3)
    compiled, plain = (
        GPT.from_pretrained(folder / log / "step_000020").weights() for log in ("log", "plain")
    )
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-2)
