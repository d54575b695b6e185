"""What can go wrong on the way of a run, and what then happens."""

import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launcher import TINY, metrics, run, start, wait_for, wait_for_step, write_shards

import checkpoint

ROOT = Path(__file__).parents[1]
NEVER = ("--checkpoint-every", "0", "--val-every", "0", "--sample-every", "0")
LONG = ("--max-steps", "100000")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with shards in ``data``, in which runs write to ``log``."""
    write_shards(tmp_path / "data")
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has ended."""
    folder = tmp_path_factory.mktemp("finished")
    write_shards(folder / "data")
    code, _, err = run(folder)
    assert (code, err) == (0, "")
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the folder of a run that has ended."""
    return shutil.copytree(finished, tmp_path / "copy")


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the lock, which each run opens, and the tests' own."""
    paths = [p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".out", ".err")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.name != ".lock"}


def steps(log: Path) -> list[int]:
    """The steps of the checkpoints in a log folder."""
    return sorted(int(path.name[5:]) for path in log.glob("step_*"))


def refused(result: tuple[int, str, str], *words: str) -> None:
    """A user's mistake: exit code 2 and one line that names it."""
    code, _, err = result
    assert code == 2, err
    assert err.count("\n") == 1, err
    assert err.startswith("train.py: ")
    for word in words:
        assert word in err


# -- faults: called in the process of a run, before its main --------------------------------------


def at_step(step: int, act: Callable[[Any], None]) -> None:
    """Calls ``act(run)`` in each process when ``step`` steps are done."""
    import train

    update = train.Run.update

    def act_and_update(self: Any) -> None:
        if self.step == step:
            act(self)
        update(self)

    train.Run.update = act_and_update


def not_a_number(first: int, count: int) -> None:
    """One number of one gradient of the last rank is NaN, ``count`` steps from ``first`` on.

    Each rank leaves its final weights behind.
    """
    import train

    prepare, fit = train.Run.parallel_and_compiled, train.Run.fit

    def poison(self: Any) -> torch.nn.Module:
        def hook(gradient: torch.Tensor) -> torch.Tensor:
            if self.world.rank == self.world.size - 1 and first <= self.step < first + count:
                gradient = gradient.clone()
                gradient[0] = float("nan")
            return gradient

        self.model.transformer["ln_f"].weight.register_hook(hook)
        return prepare(self)

    def fit_and_keep(self: Any) -> None:
        try:
            fit(self)
        finally:
            torch.save(self.model.state_dict(), f"weights_{self.world.rank}.pt")

    train.Run.parallel_and_compiled, train.Run.fit = poison, fit_and_keep


def full_disk(limit: int, first: int, last: int) -> None:
    """No file can grow beyond ``limit`` bytes from step ``first`` until step ``last``."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def set_limit(size: int) -> Callable[[Any], None]:
        return lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    at_step(first, set_limit(limit))
    at_step(last, set_limit(hard))


def read_only(folder: str, step: int) -> None:
    """The folder becomes read-only at a step; root, who may write everywhere, is left behind."""

    def close(_: Any) -> None:
        os.chmod(folder, 0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)

    if step:
        at_step(step, close)
    else:
        close(None)


def delete(path: str, step: int) -> None:
    """A file vanishes at a step."""
    at_step(step, lambda _: Path(path).unlink(missing_ok=True))


def lose_disk(step: int) -> None:
    """The last rank alone sees no shards any more, as when a node loses its disk."""

    def unmount(run: Any) -> None:
        if run.world.rank == run.world.size - 1:
            run.train_data.paths = [Path("gone") / path.name for path in run.train_data.paths]

    at_step(step, unmount)


def die(where: str) -> None:
    """The process is killed in its second save: while it writes, or before it prunes."""
    fsync, save, count = checkpoint._fsync, checkpoint.save, [0]

    def counting_save(*arguments: Any) -> Path:
        count[0] += 1
        return save(*arguments)

    def fatal_fsync(path: Path) -> None:
        fsync(path)
        renamed = path.name == "log"
        if count[0] == 2 and renamed == (where == "before pruning"):
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint._fsync, checkpoint.save = fatal_fsync, counting_save


def slow_validation() -> None:
    """A validation that takes a minute, and says when it begins."""
    import train

    def validate(self: Any) -> dict[str, Any]:
        self.metrics.say("validation begins")
        time.sleep(60)
        return {"loss": 1.0}

    train.Run.validate = validate


# -- signals --------------------------------------------------------------------------------------


def stopped_in_order(log: Path, out: str) -> int:
    """The step where a run was stopped: the same in its metrics, checkpoint and last line."""
    last = max(step for _, step in metrics(log, "train")) + 1
    assert steps(log)[-1] == last
    line = out.splitlines()[-1]
    assert f"after {last} steps" in line
    assert "--resume" in line
    return last


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(folder: Path, name: str) -> None:
    (training,) = start(folder, *LONG)
    wait_for_step(training, folder / "log", 0, 11)
    training.kill(signal.Signals[name])
    assert training.wait() == 0
    assert training.err == ""
    assert f"stopped by {name}" in training.out
    assert stopped_in_order(folder / "log", training.out) > 11


def test_a_signal_to_one_rank_stops_all_at_the_same_step(folder: Path) -> None:
    trainings = start(folder, *LONG, ranks=2)
    wait_for_step(trainings[0], folder / "log", 0, 5)
    trainings[1].kill(signal.SIGTERM)
    assert [training.wait() for training in trainings] == [0, 0]
    stopped_in_order(folder / "log", trainings[0].out)


def test_a_second_interrupt_stops_at_once(folder: Path) -> None:
    (training,) = start(folder, *LONG, fault=slow_validation)
    # Not before: the interrupt must find the run in its validation, not on the way there.
    wait_for(lambda: "validation begins" in training.out)
    training.kill(signal.SIGINT)
    assert training.poll(0.5) is None
    begun = time.monotonic()
    training.kill(signal.SIGINT)
    assert training.wait() != 0
    assert time.monotonic() - begun < 5


def test_a_rank_that_dies_leaves_a_checkpoint_of_the_last_finished_step(folder: Path) -> None:
    trainings = start(folder, *LONG, ranks=2)
    wait_for_step(trainings[0], folder / "log", 0, 16)
    trainings[1].kill(signal.SIGKILL)
    assert [training.wait() for training in trainings] == [1, -signal.SIGKILL]
    last = max(step for _, step in metrics(folder / "log", "train")) + 1
    assert steps(folder / "log")[-1] == last
    message = trainings[0].err
    assert message.startswith(f"train.py: another rank has died after step {last}: ")
    assert message.count("\n") == 1


def test_torchrun_stops_on_sigterm_within_its_grace_period(folder: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", str(ROOT / "train.py"), *TINY, *LONG]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        launched = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=err)
        try:
            wait_for(lambda: metrics(folder / "log", "train").get(("train", 5)) is not None)
            launched.send_signal(signal.SIGTERM)
            launched.wait(timeout=30)
        finally:
            launched.kill()
    last = stopped_in_order(folder / "log", (folder / "out").read_text())
    code, out_text, _ = run(folder, "--resume", "--max-steps", str(last + 3), ranks=2)
    assert code == 0
    assert f"resumed from log/step_{last:06d}" in out_text


# -- gradients ------------------------------------------------------------------------------------


def test_an_update_that_is_not_finite_on_one_rank_is_skipped_on_all(folder: Path) -> None:
    fault = {"fault": not_a_number, "arguments": (5, 2)}
    code, out, err = run(folder, "--max-steps", "12", ranks=2, **fault)
    assert (code, err) == (0, "")
    lines = metrics(folder / "log", "train")
    assert [step for (_, step), line in lines.items() if line.get("skipped")] == [5, 6]
    assert len(lines) == 12
    assert out.count("not finite") == 2
    state = torch.load(folder / "log/step_000012/training_state.pt", weights_only=True)
    assert {int(s["step"]) for s in state["optimizer"]["state"].values()} == {10}
    ours, theirs = (torch.load(folder / f"weights_{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(weight.isfinite().all() for weight in ours.values())
    # What was skipped left the weights as they were, so the loss went on from there.
    assert lines["train", 11]["loss"] < lines["train", 5]["loss"]


def test_ten_updates_in_a_row_that_are_not_finite_end_the_run(folder: Path) -> None:
    trainings = start(folder, ranks=2, fault=not_a_number, arguments=(9, 1000))
    assert [training.wait() for training in trainings] == [1, 1]
    (line,) = trainings[0].err.splitlines()
    assert re.search(r"10 gradients in a row .* last good checkpoint: log/step_000014", line)
    weights = torch.load(folder / "weights_0.pt")
    assert all(weight.isfinite().all() for weight in weights.values())


# -- damaged checkpoints --------------------------------------------------------------------------

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "one byte": lambda content: content[:1],
    "half": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "one byte long": lambda content: content + b"\0",
    "first byte flipped": lambda content: bytes([content[0] ^ 0xFF]) + content[1:],
    "last byte flipped": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "a bit in the middle flipped": lambda content: _flip(content, len(content) // 2),
}


def _flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]


@pytest.mark.parametrize(
    "name",
    [
        *sorted(
            "config.json generation_config.json tokenizer_config.json vocab.json merges.txt"
            " model.safetensors training_state.pt checksums.json".split()
        )
    ],
)
def test_any_damage_to_a_checkpoint_is_reported_and_the_one_before_is_used(
    copy: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log = copy / "log"
    newest, before = log / "step_000040", log / "step_000035"
    assert checkpoint.newest_whole(log) == newest
    file = newest / name
    content = file.read_bytes()
    for kind, damage in DAMAGE.items():
        file.write_bytes(damage(content))
        assert checkpoint.newest_whole(log) == before, kind
        assert f"{newest}: damaged" in capsys.readouterr().err, kind
    file.unlink()
    assert checkpoint.newest_whole(log) == before
    assert str(newest) in capsys.readouterr().err


def test_the_checkpoint_has_no_other_files(finished: Path) -> None:
    names = [path.name for path in (finished / "log/step_000040").iterdir()]
    assert len(names) == 8


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(copy: Path) -> None:
    (copy / "log/step_000040/model.safetensors").write_bytes(b"")
    flags = ("--resume", "--keep-checkpoints", "1", "--max-steps", "38")
    code, out, err = run(copy, *flags)
    assert code == 0
    assert "step_000040: damaged" in err
    assert "resumed from log/step_000035" in out
    # The damaged one does not count among those to keep, and the newest whole one is never pruned.
    assert steps(copy / "log") == [38, 40]
    code, out, _ = run(copy, "--resume", "--keep-checkpoints", "1")
    assert "resumed from log/step_000038" in out
    assert steps(copy / "log") == [40]
    assert checkpoint.find_damage(copy / "log/step_000040") is None


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_anew(copy: Path) -> None:
    for path in (copy / "log").glob("step_*"):
        (path / "training_state.pt").unlink()
    before = files(copy)
    code, _, err = run(copy, "--resume")
    assert code == 2
    assert err.count("damaged") == 3
    assert "no checkpoint is whole" in err.splitlines()[-1]
    assert files(copy) == before


class Bomb:
    """What unpickling this calls would be code of whoever wrote the file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("container", ["torch", "pickle"])
def test_a_pickle_bomb_is_never_run(copy: Path, container: str) -> None:
    mark, newest = copy / "exploded", copy / "log/step_000040"
    state, bomb = newest / "training_state.pt", {"step": 40, "rng": Bomb(mark)}
    if container == "torch":
        torch.save(bomb, state)
    else:
        state.write_bytes(pickle.dumps(bomb))
    code, out, err = run(copy, "--resume", "--max-steps", "41")
    assert code == 0
    assert "training_state.pt is not what was written" in err
    assert "resumed from log/step_000035" in out
    assert not mark.exists()

    sums = json.loads((newest / "checksums.json").read_text())
    sums["training_state.pt"] = [state.stat().st_size, zlib.crc32(state.read_bytes())]
    (newest / "checksums.json").write_text(json.dumps(sums))
    shutil.rmtree(copy / "log/step_000041")
    refused(run(copy, "--resume"), "step_000040/training_state.pt: not a training state")
    assert not mark.exists()
    with suppress(RuntimeError):  # a plain pickle lacks torch's magic number, too late
        torch.load(state, weights_only=False)
    assert mark.exists()  # it was live


def test_a_state_that_lacks_a_part_is_refused(copy: Path) -> None:
    newest = copy / "log/step_000040"
    state = newest / "training_state.pt"
    torch.save({"step": 40}, state)
    sums = json.loads((newest / "checksums.json").read_text())
    sums["training_state.pt"] = [state.stat().st_size, zlib.crc32(state.read_bytes())]
    (newest / "checksums.json").write_text(json.dumps(sums))
    refused(run(copy, "--resume"), "step_000040/training_state.pt: not a training state")


# -- disks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [500_000, 1_300_000, 2_500_000])
def test_a_disk_that_is_full_while_saving_does_not_end_the_run(folder: Path, limit: int) -> None:
    """It fails in a tokenizer file, in the weights (1.7 MB) or in the training state (3.4 MB)."""
    bigger = ("--model.d-model", "128", "--model.n-layers", "2", "--keep-checkpoints", "1")
    fault = {"fault": full_disk, "arguments": (limit, 1, 15)}
    code, out, err = run(folder, *bigger, "--max-steps", "21", **fault)
    assert (code, err) == (0, "")
    assert out.count("no checkpoint: ") == 2  # of steps 7 and 14
    assert steps(folder / "log") == [21]
    assert not list((folder / "log").glob(".partial_*"))
    assert len(metrics(folder / "log", "train")) == 21
    # Until the next one was whole, the last good one was kept.
    stopped = folder / "stopped"
    fault = {"fault": full_disk, "arguments": (limit, 1, 10**9)}
    code, out, err = run(folder, *bigger, "--max-steps", "8", "--log-dir", str(stopped), **fault)
    assert (code, err) == (0, "")
    assert steps(stopped) == [0]
    assert not list(stopped.glob(".partial_*"))
    assert checkpoint.find_damage(stopped / "step_000000") is None


def test_a_disk_that_is_full_while_logging_is_said_once(folder: Path) -> None:
    log = folder / "log"
    log.mkdir()
    (log / "metrics.jsonl").write_text("\n" * 100_000)  # what is printed stays below the limit
    fault = {"fault": full_disk, "arguments": (102_500, 0, 30)}
    code, out, err = run(folder, "--resume", *NEVER, **fault)
    assert (code, err) == (0, "")
    assert out.count("training goes on without these metrics") == 1
    logged = [step for _, step in metrics(log, "train")]
    assert logged[-10:] == list(range(30, 40))  # half a line does not spoil those after it
    assert 0 in logged
    assert len(logged) < 35


def test_a_console_that_cannot_be_written_does_not_end_the_run(folder: Path) -> None:
    fault = {"fault": full_disk, "arguments": (1000, 5, 35)}
    code, out, err = run(folder, *NEVER, **fault)
    assert (code, err) == (0, "")
    assert "step    39/40" in out
    assert "step    25/40" not in out


def test_a_log_folder_that_cannot_be_written_is_named(folder: Path) -> None:
    (folder / "file").write_text("")
    refused(run(folder, "--log-dir", "file/log"), "file/log: cannot write there", "--log-dir")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    (folder / "log").mkdir()
    result = run(folder, fault=read_only, arguments=("log", 0))
    refused(result, "log: cannot write there", "Permission denied")


def test_a_log_folder_that_becomes_read_only_does_not_end_the_run(folder: Path) -> None:
    folder.chmod(0o755)
    code, out, err = run(folder, "--max-steps", "15", fault=read_only, arguments=("log", 3))
    assert (code, err) == (0, "")
    assert out.count("no checkpoint: ") == 3  # of steps 7, 14 and 15
    assert "step    14/15" in out
    assert steps(folder / "log") == [0]


@pytest.mark.parametrize("where", ["while writing", "before pruning"])
def test_a_process_killed_in_a_save_leaves_only_whole_checkpoints(folder: Path, where: str) -> None:
    log, keep = folder / "log", ("--keep-checkpoints", "1")
    code, _, _ = run(folder, *keep, fault=die, arguments=(where,))
    assert code == -signal.SIGKILL
    renamed = where == "before pruning"
    assert steps(log) == ([0, 7] if renamed else [0])
    assert len(list(log.glob(".partial_*"))) == (0 if renamed else 1)
    (log / ".partial_step_000999").mkdir()  # whatever step was killed before
    code, out, err = run(folder, *keep, "--resume")
    assert (code, err) == (0, "")
    assert "no checkpoint" not in out
    assert f"resumed from log/step_{7 if renamed else 0:06d}" in out
    assert steps(log) == [40]
    assert not list(log.glob(".partial_*"))


# -- shards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_training_shard_deleted_during_the_run_ends_it_with_a_checkpoint(
    folder: Path, ranks: int
) -> None:
    shard = "data/tiny_train_000001.npy"
    trainings = start(folder, *LONG, ranks=ranks, fault=delete, arguments=(shard, 20))
    codes = [training.wait(30) for training in trainings]
    errors = [training.err for training in trainings]
    assert 2 in codes
    for code, err in zip(codes, errors, strict=True):
        assert err.count("\n") == (code == 2), err
        assert (f"{shard}: the shard was removed" in err) == (code == 2)
    last = max(step for _, step in metrics(folder / "log", "train")) + 1
    assert last >= 20
    assert steps(folder / "log")[-1] == last
    write_shards(folder / "data")
    assert run(folder, "--resume", "--max-steps", str(last + 1), ranks=ranks)[0] == 0


def test_shards_that_one_rank_loses_stop_all_in_order(folder: Path) -> None:
    trainings = start(folder, *LONG, ranks=2, fault=lose_disk, arguments=(20,))
    assert [training.wait(30) for training in trainings] == [0, 2]
    assert trainings[0].err == ""
    assert "stopped by another rank" in trainings[0].out
    (line,) = trainings[1].err.splitlines()
    assert "the shard was removed" in line
    assert line.endswith("(rank 1)")
    assert stopped_in_order(folder / "log", trainings[0].out) > 20


def test_a_validation_shard_deleted_during_the_run_ends_it_with_a_checkpoint(folder: Path) -> None:
    shard = "data/tiny_val_000000.npy"
    refused(run(folder, fault=delete, arguments=(shard, 18)), f"{shard}: the shard was removed")
    assert steps(folder / "log")[-1] == 20


def truncated(path: Path) -> None:
    """Half of the file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    """Nothing of the file."""
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    """Not an array."""
    path.write_text("some text, and not an array" * 100)


def of_wide_integers(path: Path) -> None:
    """An array of another type."""
    np.save(path, np.arange(300, dtype=np.int64))


def pickled(path: Path) -> None:
    """An array of objects, which NumPy reads with pickle."""
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def out_of_range(path: Path) -> None:
    """A token that the model does not know."""
    np.save(path, np.append(np.load(path), np.uint16(300)))


@pytest.mark.parametrize(
    "harm", [truncated, emptied, foreign, of_wide_integers, pickled, out_of_range]
)
def test_a_bad_shard_is_named_before_the_first_step(
    folder: Path, harm: Callable[[Path], None]
) -> None:
    for name in ("train_000002", "val_000000"):
        shard = folder / f"data/tiny_{name}.npy"
        content = shard.read_bytes()
        harm(shard)
        result = run(folder)
        refused(result, f"data/{shard.name}: ")
        assert not (folder / "log/metrics.jsonl").exists()
        shard.write_bytes(content)


# -- settings -------------------------------------------------------------------------------------


def test_a_second_run_cannot_write_into_the_same_folder(folder: Path) -> None:
    (training,) = start(folder, *LONG)
    wait_for_step(training, folder / "log", 0, 1)
    refused(run(folder, "--resume"), "log: another run is writing there")
    training.kill(signal.SIGKILL)  # and the lock goes with its process
    training.wait()
    assert run(folder, "--resume", "--max-steps", "9")[0] == 0


def test_resuming_beyond_the_last_step_ends_at_once(copy: Path) -> None:
    assert run(copy, "--resume", "--max-steps", "30")[0] == 0
    assert steps(copy / "log") == [28, 35, 40]
    assert len(metrics(copy / "log", "train")) == 40


def test_a_folder_that_holds_a_run_is_not_written_over(copy: Path) -> None:
    before = files(copy)
    refused(run(copy), "log holds a run: --resume it or give another --log-dir")
    assert files(copy) == before


def test_resuming_with_other_settings_says_which(copy: Path) -> None:
    flags = ("--max-steps", "42", "--max-lr", "2e-2", "--micro-batch", "4")
    code, out, _ = run(copy, "--resume", *flags)
    assert code == 0
    said = [line for line in out.splitlines() if "another setting" in line]
    text = "resuming with another setting: "
    assert said == [
        f"{text}micro_batch was 8, is now 4",
        f"{text}max_steps was 40, is now 42",
        f"{text}max_lr was 0.01, is now 0.02",
    ]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.d-model", "32"], ["model", "'d_model': 16", "'d_model': 32"]),
        (["--batch-tokens", "512"], ["batch_tokens was 256, is 512"]),
        (["--seed", "7"], ["seed was 1337, is 7"]),
        (["--no-shuffle"], ["shuffle was True, is False"]),
        (["--data-dir", "other"], ["the training shards are not the same"]),
        (["--seed", "7", "--data-dir", "other"], ["seed was 1337", "the training shards are"]),
    ],
)
def test_resuming_as_another_run_is_refused(copy: Path, flags: list[str], words: list[str]) -> None:
    write_shards(copy / "other")
    (copy / "other/tiny_train_000002.npy").unlink()
    before = files(copy)
    refused(run(copy, "--resume", *flags), "log/step_000040: this is another run", *words)
    assert files(copy) == before


def test_resuming_where_there_is_nothing_starts_a_run(folder: Path) -> None:
    code, out, _ = run(folder, "--resume", "--max-steps", "6")
    assert code == 0
    assert "resumed" not in out
    assert steps(folder / "log") == [0, 6]
