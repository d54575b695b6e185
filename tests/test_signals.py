"""What ends a run: signals, a rank that dies, gradients that are not finite, shards that vanish."""

import re
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from launcher import (
    LONG,
    free_port,
    is_last_rank,
    metrics,
    refused,
    run,
    run_well,
    saved_steps,
    start,
    start_torchrun,
    steps_done,
    wait_for,
    write_shards,
)

from gptxs import checkpoint

# ---- signals -------------------------------------------------------------------------------------


def stopped_in_order(folder: Path, out: str) -> int:
    """The step where a run was stopped: the same in its metrics, checkpoint and last line."""
    last = steps_done(folder / "log")
    assert saved_steps(folder / "log")[-1] == last
    line = out.splitlines()[-1]
    assert f"after {last} steps" in line
    assert "--resume" in line
    return last


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(folder: Path, name: str) -> None:
    (training,) = start(folder, *LONG)
    wait_for(lambda: steps_done(folder / "log") > 11)
    training.kill(signal.Signals[name])
    assert training.wait() == 0
    assert training.err == ""
    assert f"stopped by {name}" in training.out
    assert stopped_in_order(folder, training.out) > 11


def test_a_signal_to_one_rank_stops_all_at_the_same_step(folder: Path) -> None:
    trainings = start(folder, *LONG, ranks=2)
    wait_for(lambda: steps_done(folder / "log") > 5)
    trainings[1].kill(signal.SIGTERM)
    assert [training.wait() for training in trainings] == [0, 0]
    stopped_in_order(folder, trainings[0].out)


def test_torchrun_stops_two_machines_on_sigterm_within_its_grace_period(folder: Path) -> None:
    """Two agents of torchrun, which here share a machine."""
    options = ("--nnodes=2", "--nproc-per-node=1", f"--rdzv-endpoint=127.0.0.1:{free_port()}")
    agents = [
        start_torchrun(folder, *LONG, options=(*options, f"--node-rank={node}"))
        for node in range(2)
    ]
    wait_for(lambda: steps_done(folder / "log") > 5)
    for agent in agents:
        agent.kill(signal.SIGTERM)
    for agent in agents:
        agent.wait()
    last = stopped_in_order(folder, agents[0].out)
    out = run_well(folder, "--resume", "--max-steps", str(last + 3), ranks=2)
    assert f"resumed from log/step_{last:06d}" in out


# ---- a rank that dies ----------------------------------------------------------------------------


def test_a_rank_that_dies_ends_the_others_and_leaves_the_last_checkpoint(folder: Path) -> None:
    trainings = start(folder, *LONG, ranks=2)
    wait_for(lambda: steps_done(folder / "log") > 16)
    trainings[1].kill(signal.SIGKILL)
    assert [training.wait() for training in trainings] == [1, -signal.SIGKILL]
    (message,) = trainings[0].err.splitlines()
    assert message.startswith("train.py: ")
    assert "--resume" in message
    last = steps_done(folder / "log")
    assert saved_steps(folder / "log")[-1] == last - last % 7
    out = run_well(folder, "--resume", "--max-steps", str(last + 3), ranks=2)
    assert f"resumed from log/step_{last - last % 7:06d}" in out


def fail_while_saving(run: Any) -> None:
    """The checkpoint of step 7 is still being written when the run fails."""
    save = checkpoint.save

    def save_slowly(*arguments: Any) -> checkpoint.Saved:
        time.sleep(1)
        return save(*arguments)

    if run.step == 6:
        checkpoint.save = save_slowly
    if run.step == 8:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_run_that_fails_completes_the_checkpoint_that_is_being_written(folder: Path) -> None:
    trainings = start(folder, ranks=2, on_step=fail_while_saving)
    assert [training.wait() for training in trainings] == [1, 1]
    for training in trainings:
        assert "illegal memory access" in training.err
        assert training.err.count("\n") == 1
    assert saved_steps(folder / "log") == [0, 7]
    assert ("checkpoint", 7) in metrics(folder / "log", "checkpoint")


# ---- gradients -----------------------------------------------------------------------------------


def not_a_number(first: int, count: int, run: Any) -> None:
    """One number of one gradient of the last rank is NaN, ``count`` steps from ``first`` on.

    Each rank leaves the weights that its last step began with.
    """

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        if is_last_rank(run) and first <= run.step < first + count:
            gradient = gradient.clone()
            gradient[0] = float("nan")
        return gradient

    if not hasattr(run, "hook"):
        run.hook = run.model.transformer.ln_f.weight.register_hook(poison)
    torch.save(run.model.state_dict(), f"weights_{run.rank}.pt")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_that_is_not_finite_on_one_rank_is_skipped_on_all(
    folder: Path, optimizer: str
) -> None:
    flags = ("--max-steps", "12", "--optimizer", optimizer)
    out = run_well(folder, *flags, ranks=2, on_step=partial(not_a_number, 5, 2))
    lines = metrics(folder / "log", "train")
    assert [step for (_, step), line in lines.items() if line.get("skipped")] == [5, 6]
    assert len(lines) == 12
    assert out.count("not finite") == 2
    state = torch.load(folder / "log/step_000012/training_state.pt", weights_only=True)
    states = state["optimizer"]["state"].values()
    assert {int(s["step"]) for s in states if "step" in s} == {10}  # Muon counts none
    ours, theirs = (torch.load(folder / f"weights_{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(weight.isfinite().all() for weight in ours.values())
    # What was skipped left the weights as they were, so the loss went on from there.
    assert lines["train", 11]["loss"] < lines["train", 5]["loss"]


def test_ten_updates_in_a_row_that_are_not_finite_end_the_run(folder: Path) -> None:
    trainings = start(folder, ranks=2, on_step=partial(not_a_number, 9, 1000))
    assert [training.wait() for training in trainings] == [1, 1]
    (line,) = trainings[0].err.splitlines()
    assert re.search(r"10 gradients in a row .* last checkpoint: log/step_000014", line)
    weights = torch.load(folder / "weights_0.pt")
    assert all(weight.isfinite().all() for weight in weights.values())


def test_bad_gradients_are_counted_across_a_resume(folder: Path) -> None:
    """A run that is stopped among them does not begin to count anew."""
    flags = ("--checkpoint-every", "1")
    run_well(folder, *flags, "--max-steps", "6", on_step=partial(not_a_number, 0, 1000))
    code, _, err = run(folder, *flags, "--resume", on_step=partial(not_a_number, 0, 1000))
    assert code == 1
    assert "10 gradients in a row" in err
    assert steps_done(folder / "log") == 10


# ---- shards --------------------------------------------------------------------------------------


def delete(path: str, step: int, run: Any) -> None:
    """A file vanishes at a step."""
    if run.step == step:
        Path(path).unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["train_000001", "val_000000"])
def test_a_shard_that_is_deleted_during_the_run_ends_it_with_its_name(
    folder: Path, name: str
) -> None:
    shard = f"data/tiny_{name}.npy"
    result = run(folder, *LONG, on_step=partial(delete, shard, 18))
    refused(result, f"{shard}: the shard was removed")
    last = steps_done(folder / "log")
    assert last >= 18
    assert saved_steps(folder / "log")[-1] == last - last % 7
    write_shards(folder / "data")
    run_well(folder, "--resume", "--max-steps", str(last + 1))
