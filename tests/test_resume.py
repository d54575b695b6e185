"""A run that is stopped, killed or moved, and resumed, is the run that was left alone."""

import itertools
import os
import random
import re
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launcher import metrics, refused, run, run_well, saved_steps, start, write_shards

LOGGED = ("train", "val", "sample")
Logs = dict[tuple[str, int], Path]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Logs:
    """The log folders of a run of 40 steps with each optimizer on 1 and on 2 ranks."""
    logs = {}
    for optimizer, ranks in itertools.product(("adamw", "muon"), (1, 2)):
        folder = tmp_path_factory.mktemp("undisturbed")
        write_shards(folder / "data")
        run_well(folder, "--optimizer", optimizer, ranks=ranks)
        logs[optimizer, ranks] = folder / "log"
    return logs


def stop_after(step: int, run: Any) -> None:
    if run.step == step - 1 and run.rank == 0:
        os.kill(os.getpid(), signal.SIGUSR1)


def kill_after(step: int, seconds: float, all_ranks: bool, run: Any) -> None:
    """SIGKILL to all ranks or to the last, that many seconds after a step has begun.

    The last step waits for it, so that a fast machine is hit as well.
    """
    if all_ranks or run.rank == run.world_size - 1:
        if run.step >= step:  # of several timers the first one counts
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        if run.step == 39:
            time.sleep(600)


def assert_same_run(log: Path, other: Path) -> None:
    last, same = log / "step_000040", other / "step_000040"
    ours, theirs = (folder / "model.safetensors" for folder in (last, same))
    assert ours.read_bytes() == theirs.read_bytes()
    states = [
        torch.load(at / "training_state.pt", weights_only=True, mmap=True) for at in (last, same)
    ]
    for state in states:
        del state["settings"]  # say whether the run was resumed
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert metrics(log, *LOGGED) == metrics(other, *LOGGED)


def kill_and_resume(folder: Path, *flags: str, ranks: int, kills: int, seed: int) -> None:
    """A run of 40 steps, killed at random moments that are spread over it, and resumed."""
    rng = random.Random(seed)
    for part in range(kills):
        step = (40 * part + rng.randrange(40)) // kills
        # A machine that fails takes all ranks along; the out-of-memory killer takes one.
        fault = partial(kill_after, step, rng.random() * 0.08, rng.random() < 0.5)
        trainings = start(folder, "--resume", *flags, ranks=ranks, on_step=fault)
        assert [training.wait() for training in trainings][-1] == -signal.SIGKILL
    run_well(folder, "--resume", *flags, ranks=ranks)


SOAK = [pytest.param("adamw", 10, seed, marks=pytest.mark.soak) for seed in (100, 102, 104)]
SOAK += [pytest.param("muon", 10, seed, marks=pytest.mark.soak) for seed in (101, 103)]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("optimizer", "kills", "seed"), [("adamw", 6, 1), ("muon", 3, 2), *SOAK])
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(
    folder: Path, undisturbed: Logs, optimizer: str, kills: int, seed: int, ranks: int
) -> None:
    kill_and_resume(folder, "--optimizer", optimizer, ranks=ranks, kills=kills, seed=seed)
    assert_same_run(folder / "log", undisturbed[optimizer, ranks])


def test_a_stopped_run_ends_with_the_same_bytes(folder: Path, undisturbed: Logs) -> None:
    for step in (3, 7, 25):
        out = run_well(folder, "--resume", on_step=partial(stop_after, step))
        assert f"stopped by SIGUSR1 after {step} steps" in out
    run_well(folder, "--resume")
    assert_same_run(folder / "log", undisturbed["adamw", 1])


@pytest.mark.parametrize(
    ("optimizer", "before", "after"),
    [
        ("adamw", (2, 8), (1, 8)),
        ("adamw", (1, 8), (2, 8)),
        ("adamw", (1, 8), (1, 4)),
        ("adamw", (2, 4), (1, 16)),
        ("adamw", (4, 1), (2, 2)),
        ("muon", (2, 8), (1, 8)),
        ("muon", (1, 8), (2, 4)),
    ],
)
def test_a_run_resumed_on_other_devices_sees_the_same_tokens(
    folder: Path, undisturbed: Logs, optimizer: str, before: tuple[int, int], after: tuple[int, int]
) -> None:
    flags = ("--optimizer", optimizer, "--micro-batch")
    ranks, rows = before
    run_well(folder, *flags, str(rows), ranks=ranks, on_step=partial(stop_after, 20))
    assert ("val", 20) not in metrics(folder / "log", "val")  # that comes when it is resumed
    ranks, rows = after
    out = run_well(folder, *flags, str(rows), "--resume", ranks=ranks)
    assert f"\n{16 // (rows * ranks)} micro-steps" in out
    expected, losses = (
        {key: line["loss"] for key, line in metrics(log, "train", "val").items()}
        for log in (undisturbed[optimizer, 1], folder / "log")
    )
    assert losses == pytest.approx(expected, abs=1e-3)
    # The tolerance tells one step's tokens from another's.
    steps = [expected["train", step] for step in range(20, 40)]
    assert all(abs(a - b) > 1e-3 for a, b in itertools.pairwise(steps))


def test_a_validation_shard_that_was_changed_in_place_is_not_resumed_on(copy: Path) -> None:
    shard = copy / "data/tiny_val_000000.npy"
    np.save(shard, np.load(shard)[::-1])
    result = run(copy, "--resume", "--max-steps", "42")
    refused(result, "log/step_000040 belongs to another run", f"{shard.name} has changed")


def test_resuming_beyond_the_last_step_ends_at_once(copy: Path) -> None:
    run_well(copy, "--resume", "--max-steps", "30")
    assert saved_steps(copy / "log") == [28, 35, 40]
    assert len(metrics(copy / "log", "train")) == 40


def test_settings_that_may_change_are_named_and_take_effect_in_a_resumed_run(copy: Path) -> None:
    flags = ("--max-steps", "42", "--max-lr", "2e-2", "--micro-batch", "4", "--weight-decay", "0.5")
    out = run_well(copy, "--resume", *flags)
    assert re.findall("resuming with another setting: (.*)", out) == [
        "micro_batch was 8, is now 4",
        "max_steps was 40, is now 42",
        "max_lr was 0.01, is now 0.02",
        "weight_decay was 0.1, is now 0.5",
    ]
    state = torch.load(copy / "log/step_000042/training_state.pt", weights_only=True)
    groups = state["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
