"""A run that is stopped, killed or moved, and resumed, is the run that was left alone."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from launcher import metrics, run, run_lines, start, wait_for_step, write_shards

LOGGED = ("train", "val", "sample")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The log folders of a run of 40 steps on 1 and on 2 ranks."""
    logs = {}
    for ranks in (1, 2):
        folder = tmp_path_factory.mktemp(f"undisturbed_{ranks}")
        write_shards(folder / "data")
        code, _, err = run(folder, ranks=ranks)
        assert code == 0, err
        logs[ranks] = folder / "log"
    return logs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with shards in ``data``, in which runs write to ``log``."""
    write_shards(tmp_path / "data")
    return tmp_path


def stop_after(step: int) -> None:
    """A fault: the process signals itself when ``step`` steps are done."""
    import train

    update = train.Run.update

    def update_and_signal(self: train.Run) -> None:
        if self.step == step - 1 and self.world.rank == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        update(self)

    train.Run.update = update_and_signal


def assert_same_run(log: Path, other: Path) -> None:
    """The same bytes: weights, optimizer, random state, losses, samples."""
    last, same = log / "step_000040", other / "step_000040"
    assert (last / "model.safetensors").read_bytes() == (same / "model.safetensors").read_bytes()
    states = [
        torch.load(at / "training_state.pt", weights_only=True, mmap=True) for at in (last, same)
    ]
    for state in states:
        del state["settings"]  # say whether the run was resumed
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert metrics(log, *LOGGED) == metrics(other, *LOGGED)


def kill_and_resume(folder: Path, ranks: int, kills: int, seed: int) -> int:
    """A run of 40 steps, killed at random moments and resumed; returns how often it was hit.

    The moments are spread over the run: some milliseconds after a random step of each part.
    """
    rng, hit = random.Random(seed), 0
    for part in range(kills):
        begun = len(run_lines(folder / "log"))
        trainings = start(folder, "--resume", ranks=ranks)
        step = (40 * part + rng.randrange(40)) // kills
        wait_for_step(trainings[0], folder / "log", begun, step)
        time.sleep(rng.random() * 0.08)
        # A machine that fails takes all ranks along; the out-of-memory killer takes one.
        for training in trainings if rng.random() < 0.5 else trainings[-1:]:
            training.kill(signal.SIGKILL)
        codes = [training.wait() for training in trainings]
        hit += codes[-1] == -signal.SIGKILL
    code, _, err = run(folder, "--resume", ranks=ranks)
    assert code == 0, err
    return hit


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(
    folder: Path, undisturbed: dict[int, Path], ranks: int
) -> None:
    assert kill_and_resume(folder, ranks, kills=6, seed=ranks) >= 5
    assert_same_run(folder / "log", undisturbed[ranks])


@pytest.mark.soak
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_a_run_killed_at_fifty_moments_ends_with_the_same_bytes(
    folder: Path, undisturbed: dict[int, Path], ranks: int, seed: int
) -> None:
    assert kill_and_resume(folder, ranks, kills=10, seed=100 + seed) >= 8
    assert_same_run(folder / "log", undisturbed[ranks])


def test_a_run_stopped_between_checkpoints_ends_with_the_same_bytes(
    folder: Path, undisturbed: dict[int, Path]
) -> None:
    for step in (3, 7, 25):
        code, out, err = run(folder, "--resume", fault=stop_after, arguments=(step,))
        assert (code, err) == (0, "")
        assert f"stopped by SIGUSR1 after {step} steps" in out
    assert run(folder, "--resume")[0] == 0
    assert_same_run(folder / "log", undisturbed[1])


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, 8), (1, 8)), ((1, 8), (2, 8)), ((1, 8), (1, 4)), ((2, 4), (1, 16))],
)
def test_a_run_resumed_on_other_devices_sees_the_same_tokens(
    folder: Path, undisturbed: dict[int, Path], before: tuple[int, int], after: tuple[int, int]
) -> None:
    fault = {"fault": stop_after, "arguments": (20,)}
    (ranks, rows), (ranks_after, rows_after) = before, after
    code, _, err = run(folder, "--micro-batch", str(rows), ranks=ranks, **fault)
    assert code == 0, err
    code, out, err = run(folder, "--micro-batch", str(rows_after), "--resume", ranks=ranks_after)
    assert code == 0, err
    assert f"in {16 // (rows_after * ranks_after)} micro-steps" in out
    expected, losses = (
        {step: line["loss"] for (_, step), line in metrics(log, "train").items()}
        for log in (undisturbed[1], folder / "log")
    )
    assert list(losses) == list(range(40))
    assert losses == pytest.approx(expected, abs=1e-3)
    # The tolerance tells one step's tokens from another's.
    assert all(abs(expected[s] - expected[s + 1]) > 1e-3 for s in range(20, 39))
