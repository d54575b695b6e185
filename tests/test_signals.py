"""What ends a run: signals, a rank that dies, gradients that are not finite, shards that vanish."""

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

import train
from gptxs import checkpoint
from gptxs.distributed import DistInfo


def stopped_in_order(folder: Path, out: str) -> int:
    """The step where a run was stopped: the same in its metrics, checkpoint and last line."""
    last = steps_done(folder / "log")
    assert saved_steps(folder / "log")[-1] == last
    line = out.splitlines()[-1]
    assert f"after {last} steps" in line
    assert "--resume" in line
    return last


@pytest.mark.parametrize(
    ("name", "ranks"),
    [("SIGTERM", 1), ("SIGINT", 1), ("SIGUSR1", 1), ("SIGHUP", 1), ("SIGTERM", 2)],
)
def test_a_signal_to_a_rank_stops_all_at_the_same_step(folder: Path, name: str, ranks: int) -> None:
    trainings = start(folder, *LONG, ranks=ranks)
    wait_for(lambda: steps_done(folder / "log") > 11)
    trainings[-1].kill(signal.Signals[name])
    assert [(training.wait(), training.err) for training in trainings] == [(0, "")] * ranks
    assert f"stopped by {name if ranks == 1 else 'another rank'}" in trainings[0].out
    assert stopped_in_order(folder, trainings[0].out) > 11


def test_torchrun_stops_two_machines_on_sigterm_within_its_grace_period(folder: Path) -> None:
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

    def save_slowly(*arguments: Any) -> float:
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


def not_a_number(first: int, count: int, run: Any) -> None:
    """A number of a gradient of the last rank is NaN, ``count`` steps from ``first`` on.

    Each rank leaves the weights that its last step began with.
    """

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        if run.rank == run.world_size - 1 and first <= run.step < first + count:
            gradient = gradient.clone()
            gradient[0] = float("nan")
        return gradient

    if not hasattr(run, "hook"):
        run.hook = run.model.transformer.ln_f.weight.register_hook(poison)
    torch.save(run.model.state_dict(), f"weights_{run.rank}.pt")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_not_finite_on_one_rank_is_skipped_on_all(folder: Path, optimizer: str) -> None:
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
    assert lines["train", 11]["loss"] < lines["train", 5]["loss"]


def test_ten_updates_in_a_row_that_are_not_finite_end_the_run(folder: Path) -> None:
    """They are counted across a resume."""
    fault = partial(not_a_number, 9, 1000)
    run_well(folder, "--max-steps", "14", ranks=2, on_step=fault)
    trainings = start(folder, "--resume", ranks=2, on_step=fault)
    assert [training.wait() for training in trainings] == [1, 1]
    (line,) = trainings[0].err.splitlines()
    assert "10 gradients in a row were not finite" in line
    assert (steps_done(folder / "log"), saved_steps(folder / "log")[-1]) == (19, 14)
    weights = torch.load(folder / "weights_0.pt")
    assert all(weight.isfinite().all() for weight in weights.values())


class NameOfMps(str):
    """A device that is computed on the CPU and calls itself "mps"."""

    type = "mps"


class OldFusedAdamW(torch.optim.AdamW):
    """It updates whatever found_inf says, as MPS's did before torch 2.13."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.found_inf = None
        super().step()


def call_it_mps() -> None:
    device: Any = NameOfMps("cpu")
    train.DistInfo.initialize = lambda *_: DistInfo(0, 1, device)
    train.build_optimizer = lambda model, *_, **__: OldFusedAdamW(model.parameters())


def test_on_mps_an_update_that_is_not_finite_is_skipped_by_the_host(folder: Path) -> None:
    fault = partial(not_a_number, 5, 2)
    run_well(folder, "--max-steps", "12", on_step=fault, before=call_it_mps)
    lines = metrics(folder / "log", "train")
    assert [step for (_, step), line in lines.items() if line.get("skipped")] == [5, 6]
    assert lines["train", 11]["loss"] < lines["train", 5]["loss"]


def delete(path: str, run: Any) -> None:
    if run.step == 18:
        Path(path).unlink()


@pytest.mark.parametrize("name", ["train_000001", "val_000000"])
def test_a_shard_that_is_deleted_ends_the_run_with_its_name(folder: Path, name: str) -> None:
    shard = f"data/tiny_{name}.npy"
    result = run(folder, *LONG, on_step=partial(delete, shard))
    refused(result, f"{shard}: the shard was removed")
    last = steps_done(folder / "log")
    assert last >= 18
    assert saved_steps(folder / "log")[-1] == last - last % 7
    write_shards(folder / "data")
    run_well(folder, "--resume", "--max-steps", str(last + 1))
