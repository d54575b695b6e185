"""What ends a run: signals, a rank that dies, gradients that are not finite, shards that vanish."""

import os
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


def be_slow(run: Any) -> None:
    """A step takes ten minutes, and prints when it begins and when it has seen a signal."""
    if run.step == 5:
        print("the slow step begins", flush=True)
        while not run.stop_signal.name:
            time.sleep(0.01)
        print("the slow step continues", flush=True)
        time.sleep(600)


def test_a_second_interrupt_stops_at_once(folder: Path) -> None:
    (training,) = start(folder, *LONG, on_step=be_slow)
    wait_for(lambda: "the slow step begins" in training.out)
    training.kill(signal.SIGINT)
    wait_for(lambda: "the slow step continues" in training.out)
    training.kill(signal.SIGINT)
    assert training.wait() == 130


def test_a_rank_that_dies_leaves_a_checkpoint_of_the_last_finished_step(folder: Path) -> None:
    trainings = start(folder, *LONG, ranks=2)
    wait_for(lambda: steps_done(folder / "log") > 16)
    trainings[1].kill(signal.SIGKILL)
    assert [training.wait() for training in trainings] == [1, -signal.SIGKILL]
    last = steps_done(folder / "log")
    assert saved_steps(folder / "log")[-1] == last
    (message,) = trainings[0].err.splitlines()
    assert message.startswith(f"train.py: another rank has failed after step {last}: ")


class NeverArrives:
    """Stands in for a CUDA event of a step in which a rank that has died had a part."""

    def query(self) -> bool:
        return False


def lose_a_rank_of_nccl(run: Any) -> None:
    """What the survivors of a rank meet under NCCL: torchrun's SIGTERM, and a step without end."""
    import train

    if run.step == 10:
        train.HANG_SECONDS = 0.5
        run.logger.pending.append((9, 0.0, torch.ones(4), NeverArrives()))
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_step_that_a_dead_rank_leaves_hanging_ends_the_run_and_is_not_saved(folder: Path) -> None:
    trainings = start(folder, ranks=2, on_step=lose_a_rank_of_nccl)
    assert [training.wait() for training in trainings] == [1, 1]
    assert trainings[0].err.startswith("train.py: another rank has failed")
    assert saved_steps(folder / "log")[-1] == 7


def lose_the_gpu(run: Any) -> None:
    """After some errors every call of CUDA fails, also those that saving needs."""

    def fail() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    if run.step == 8:  # the checkpoint of step 7 may not be complete yet
        run.logger.flush = fail
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_gpu_that_has_failed_does_not_cost_the_checkpoint_before(folder: Path) -> None:
    code, out, err = run(folder, on_step=lose_the_gpu)
    assert code == 1
    assert "an illegal memory access" in err
    assert "checkpoint not saved: CUDA error: unspecified launch failure" in out
    assert saved_steps(folder / "log")[-1] == 7
    assert ("checkpoint", 7) in metrics(folder / "log", "checkpoint")


def test_torchrun_stops_on_sigterm_within_its_grace_period(folder: Path) -> None:
    torchrun = start_torchrun(folder, *LONG, options=("--standalone", "--nproc-per-node=2"))
    wait_for(lambda: steps_done(folder / "log") > 5)
    torchrun.kill(signal.SIGTERM)
    torchrun.wait()
    last = stopped_in_order(folder, torchrun.out)
    out = run_well(folder, "--resume", "--max-steps", str(last + 3), ranks=2)
    assert f"resumed from log/step_{last:06d}" in out


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

    if run.step == 0:
        run.model.transformer.ln_f.weight.register_hook(poison)
    torch.save(run.model.state_dict(), f"weights_{run.dist_info.rank}.pt")


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
    assert re.search(r"10 gradients in a row .* last good checkpoint: log/step_000014", line)
    weights = torch.load(folder / "weights_0.pt")
    assert all(weight.isfinite().all() for weight in weights.values())


# ---- shards --------------------------------------------------------------------------------------


def delete(path: str, step: int, run: Any) -> None:
    """A file vanishes at a step."""
    if run.step == step:
        Path(path).unlink(missing_ok=True)


def lose_disk(run: Any) -> None:
    """The last rank alone sees no shards any more, as when a node loses its disk."""
    if run.step == 20 and is_last_rank(run):
        run.train_data.paths = [Path("gone") / path.name for path in run.train_data.paths]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_training_shard_deleted_during_the_run_ends_it_with_a_checkpoint(
    folder: Path, ranks: int
) -> None:
    shard = "data/tiny_train_000001.npy"
    trainings = start(folder, *LONG, ranks=ranks, on_step=partial(delete, shard, 20))
    codes = [training.wait() for training in trainings]
    assert 2 in codes
    for code, training in zip(codes, trainings, strict=True):
        assert training.err.count(f"{shard}: the shard was removed") == (code == 2)
        assert training.err.count("\n") == (code == 2)
    last = steps_done(folder / "log")
    assert last >= 20
    assert saved_steps(folder / "log")[-1] == last
    write_shards(folder / "data")
    run_well(folder, "--resume", "--max-steps", str(last + 1), ranks=ranks)


def test_shards_that_one_rank_loses_stop_all_in_order(folder: Path) -> None:
    trainings = start(folder, *LONG, ranks=2, on_step=lose_disk)
    assert [training.wait() for training in trainings] == [0, 2]
    assert trainings[0].err == ""
    assert "stopped by another rank" in trainings[0].out
    (line,) = trainings[1].err.splitlines()
    assert "the shard was removed" in line
    assert line.endswith("(rank 1)")
    assert stopped_in_order(folder, trainings[0].out) > 20


def test_a_validation_shard_deleted_during_the_run_ends_it_with_a_checkpoint(folder: Path) -> None:
    shard = "data/tiny_val_000000.npy"
    refused(run(folder, on_step=partial(delete, shard, 18)), f"{shard}: the shard was removed")
    assert saved_steps(folder / "log")[-1] == 20
