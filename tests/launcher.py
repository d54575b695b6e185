"""Starts train.py many times at the price of one import.

Python's fork server imports train.py once and forks a child for each run, which has torchrun's
environment, real flags and a real exit code, and can be killed and signalled like any process.
Faults are functions that are called before each step, or before the run, and may replace what they
like: nobody else uses that process.
"""

import atexit
import functools
import itertools
import json
import multiprocessing
import os
import random
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
COUNTER = itertools.count()
TIMEOUT = 300.0  # seconds after which a run hangs; on a busy machine compiling takes a minute
# Milliseconds a step. The vocabulary is small, so prompts must be single bytes.
TINY = (
    "--model.d-model 16 --model.n-layers 1 --model.n-heads 2 --model.context-length 16"
    " --model.vocab-size 300 --batch-tokens 256 --micro-batch 8 --max-steps 40 --warmup-steps 5"
    " --max-lr 1e-2 --min-lr 1e-3 --val-every 10 --val-tokens 512 --hellaswag-every 0"
    " --sample-every 20 --sample-prompt a --checkpoint-every 7 --keep-checkpoints 3"
    " --no-compile --device cpu --dtype fp32 --data-dir data --log-dir log"
).split()
LONG = ("--max-steps", "100000")  # a run that something else has to end


@functools.cache
def fork_server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    # torch would import Inductor for each run's optimizer, which takes seconds.
    imports = ["train", "launcher", "torch.distributed.run", "torch._inductor", "preload"]
    context.set_forkserver_preload(imports)
    with pytest.MonkeyPatch.context() as patch:
        # Python 3.11 does not pass sys.path on to the server.
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        forkserver.ensure_running()
    return context


@atexit.register
def kill_what_still_runs() -> None:
    for process in multiprocessing.active_children():
        process.kill()


@dataclass
class Training:
    process: ForkServerProcess
    folder: Path
    label: str

    def wait(self) -> int:
        """Its exit code, or minus the number of the signal that ended it."""
        self.process.join(TIMEOUT)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            raise AssertionError(f"still running after {TIMEOUT} s:\n{self.out}\n{self.err}")
        return code

    def kill(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    @property
    def out(self) -> str:
        return (self.folder / f"{self.label}.out").read_text()

    @property
    def err(self) -> str:
        lines = (self.folder / f"{self.label}.err").read_text().splitlines(keepends=True)
        # A CUDA build of torch says so when it compiles on a machine without a GPU.
        return "".join(line for line in lines if "No CUDA runtime is found" not in line)


def start(folder: Path, *flags: str, ranks: int = 1, **faults: Any) -> list[Training]:
    """Starts train.py in ``folder`` with the tiny settings and these flags, once a rank."""
    return [fork(folder, tiny(*flags), world, **faults) for world in worlds(ranks)]


def worlds(ranks: int) -> list[dict[str, str]]:
    """What torchrun tells each rank."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), **shared}
        for rank in range(ranks)
    ]


def tiny(*flags: str) -> list[str]:
    """The tiny settings and these; of a flag that is given twice the last one counts."""
    return [*TINY, *flags]


def fork(
    folder: Path, flags: list[str], world: dict[str, str] | None = None, **faults: Any
) -> Training:
    """Starts train.py with these flags alone; without a ``world`` it is the only process."""
    call = functools.partial(run_train, flags, world or worlds(1)[0], **faults)
    return fork_function(folder, call)


def start_torchrun(folder: Path, *flags: str, options: tuple[str, ...]) -> Training:
    """Starts torchrun with these options; it starts train.py itself, as fresh processes."""
    command = ["torchrun", *options, str(ROOT / "train.py"), *tiny(*flags)]
    return fork_function(folder, functools.partial(run_torchrun, command))


def fork_function(folder: Path, function: Callable[[], None]) -> Training:
    """Calls a function in a fork of the server, with ``folder`` as the current one."""
    label = f"run{next(COUNTER)}"
    for name in ("out", "err"):
        (folder / f"{label}.{name}").touch()
    process = fork_server().Process(target=child, args=(folder, label, function), daemon=True)
    process.start()
    return Training(process, folder, label)


def child(folder: Path, label: str, function: Callable[[], None]) -> None:
    os.setpgid(0, 0)  # so that Ctrl-C in the tests' terminal is not for it
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{label}.{name}", os.O_WRONLY), number)
    function()


def run_train(
    flags: list[str],
    environment: dict[str, str],
    on_step: Callable[[Any], None] | None = None,
    before: Callable[[], None] | None = None,
) -> None:
    """Runs train.py with faults: a module's functions or partials of them, since they are pickled.

    What is called before each step gets a namespace with ``step``, ``model``, ``rank`` and
    ``world_size``, always the same one.
    """
    import train  # not at the top: only the server has imported it

    os.environ.update(environment)
    sys.argv = ["train.py", *flags]
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    run = SimpleNamespace(rank=rank, world_size=world_size)

    def call(progress: train.Progress, model: train.GPT) -> None:
        run.step, run.model = progress.step, model
        if on_step is not None:
            on_step(run)

    if before is not None:
        before()
    train.main(call)


def run_torchrun(command: list[str]) -> None:
    import torch.distributed.run  # takes a second

    sys.argv = command
    torch.distributed.run.main()


def run(folder: Path, *flags: str, **faults: Any) -> tuple[int, str, str]:
    """Runs to the end: exit code, standard output and standard error."""
    (training,) = start(folder, *flags, **faults)
    return training.wait(), training.out, training.err


def run_well(folder: Path, *flags: str, ranks: int = 1, **faults: Any) -> str:
    """Runs to the end without an error on any rank: rank 0's standard output."""
    trainings = start(folder, *flags, ranks=ranks, **faults)
    for training in trainings:
        assert training.wait() == 0, training.err
        assert training.err == "", training.err
    return trainings[0].out


def refused(result: tuple[int, str, str], *words: str) -> None:
    """A user's mistake: exit code 2 and one line that names it."""
    code, _, err = result
    assert code == 2, err
    assert err.count("\n") == 1, err
    assert err.startswith("train.py: ")
    for word in words:
        assert word in err


def free_port() -> int:
    """A port nobody listens on, below those that any outgoing connection may be given."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("never happened")


def write_shards(folder: Path) -> None:
    """Two training shards and one for validation, with something to learn in them."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in (("val_000000", 2000), ("train_000001", 6000), ("train_000002", 5000)):
        np.save(folder / f"tiny_{name}.npy", (rng.exponential(40, size) % 300).astype(np.uint16))


def metrics(log: Path, *kinds: str) -> dict[tuple[str, int], dict[str, Any]]:
    """The last line of each kind and step, without what depends on the clock."""
    path = log / "metrics.jsonl"
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:  # half a line, of a process that was killed or is still writing
            continue
        if line["kind"] in kinds:
            for key in ("time", "ms", "tokens_per_s", "mfu", "memory_gb", "seconds"):
                line.pop(key, None)
            lines[line["kind"], line["step"]] = line
    return lines


def steps_done(log: Path) -> int:
    return max((step for _, step in metrics(log, "train")), default=-1) + 1


def saved_steps(log: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in log.glob("step_*"))
