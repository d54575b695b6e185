"""A run that is stopped, killed or moved, and resumed, is the run that was left alone."""

import itertools
import os
import random
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from launcher import is_last_rank, metrics, run_well, start, write_shards

LOGGED = ("train", "val", "sample")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """The log folders of a run of 40 steps with each optimizer on 1 and on 2 ranks."""
    logs = {}
    for optimizer, ranks in itertools.product(("adamw", "muon"), (1, 2)):
        folder = tmp_path_factory.mktemp("undisturbed")
        write_shards(folder / "data")
        run_well(folder, "--optimizer", optimizer, ranks=ranks)
        logs[optimizer, ranks] = folder / "log"
    return logs


def stop_after(step: int, run: Any) -> None:
    """Rank 0 signals itself, so that the run stops when ``step`` steps are done."""
    if run.step == step - 1 and run.rank == 0:
        os.kill(os.getpid(), signal.SIGUSR1)


def kill_after(step: int, seconds: float, all_ranks: bool, run: Any) -> None:
    """SIGKILL to all ranks or to the last, that many seconds after a step has begun.

    The last step waits for it, so that a fast machine is hit as well.
    """
    if all_ranks or is_last_rank(run):
        if run.step >= step:  # of several timers the first one counts
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        if run.step == 39:
            time.sleep(600)


def assert_same_run(log: Path, other: Path) -> None:
    """The same bytes: weights, optimizer, random state, losses, samples."""
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


@pytest.mark.parametrize(
    ("optimizer", "ranks", "kills"),
    [("adamw", 1, 6), ("adamw", 2, 6), ("muon", 1, 3), ("muon", 2, 3)],
)
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(
    folder: Path,
    undisturbed: dict[tuple[str, int], Path],
    optimizer: str,
    ranks: int,
    kills: int,
) -> None:
    kill_and_resume(folder, "--optimizer", optimizer, ranks=ranks, kills=kills, seed=ranks)
    assert_same_run(folder / "log", undisturbed[optimizer, ranks])


@pytest.mark.soak
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_a_run_killed_at_fifty_moments_ends_with_the_same_bytes(
    folder: Path, undisturbed: dict[tuple[str, int], Path], ranks: int, seed: int
) -> None:
    optimizer = "muon" if seed % 2 else "adamw"
    flags = ("--optimizer", optimizer)
    kill_and_resume(folder, *flags, ranks=ranks, kills=10, seed=100 + seed)
    assert_same_run(folder / "log", undisturbed[optimizer, ranks])


def test_a_run_stopped_between_checkpoints_ends_with_the_same_bytes(
    folder: Path, undisturbed: dict[tuple[str, int], Path]
) -> None:
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
    folder: Path,
    undisturbed: dict[tuple[str, int], Path],
    optimizer: str,
    before: tuple[int, int],
    after: tuple[int, int],
) -> None:
    flags = ("--optimizer", optimizer)
    (ranks, rows), (ranks_after, rows_after) = before, after
    stop = partial(stop_after, 20)
    run_well(folder, "--micro-batch", str(rows), *flags, ranks=ranks, on_step=stop)
    out = run_well(folder, "--micro-batch", str(rows_after), "--resume", *flags, ranks=ranks_after)
    assert f"in {16 // (rows_after * ranks_after)} micro-steps" in out
    expected, losses = (
        {key: line["loss"] for key, line in metrics(log, "train", "val").items()}
        for log in (undisturbed[optimizer, 1], folder / "log")
    )
    assert losses == pytest.approx(expected, abs=1e-3)
    # The tolerance tells one step's tokens from another's.
    steps = [expected["train", step] for step in range(20, 40)]
    assert all(abs(a - b) > 1e-3 for a, b in itertools.pairwise(steps))
