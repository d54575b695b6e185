"""Starts train.py many times at the price of one import.

A server process imports train.py once and forks a child for each run: the child sets torchrun's
environment, runs ``train.main()`` with real flags and ends with a real exit code, so it can be
killed, starved and signalled like any process. A fault is a function of a test module that the
child calls before ``main``.
"""

import atexit
import functools
import gc
import itertools
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

COUNTER = itertools.count()
TIMEOUT = 60.0  # seconds after which a run hangs, by far more than any of them needs
# Milliseconds a step. The vocabulary is small, so prompts must be single bytes.
TINY = (
    "--model.d-model 16 --model.n-layers 1 --model.n-heads 2 --model.context-length 16"
    " --model.vocab-size 300 --batch-tokens 256 --micro-batch 8 --max-steps 40 --warmup-steps 5"
    " --max-lr 1e-2 --min-lr 1e-3 --val-every 10 --val-tokens 512 --hellaswag-every 0"
    " --sample-every 20 --sample-prompt a --checkpoint-every 7 --keep-checkpoints 3"
    " --no-compile --device cpu --dtype fp32 --data-dir data --log-dir log"
).split()


def write_shards(folder: Path) -> None:
    """Two training shards and one for validation, with something to learn in them."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in (("val_000000", 2000), ("train_000001", 6000), ("train_000002", 5000)):
        np.save(folder / f"tiny_{name}.npy", (rng.exponential(40, size) % 300).astype(np.uint16))


@dataclass
class Training:
    """One process in which train.py runs."""

    server: "Server"
    pid: int
    folder: Path
    label: str

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Its exit code, or minus the number of the signal that ended it."""
        code = self.poll(timeout)
        if code is None:
            self.kill(signal.SIGKILL)
            raise AssertionError(f"still running after {timeout} s:\n{self.out}\n{self.err}")
        return code

    def poll(self, timeout: float) -> int | None:
        """The same, but None when it has not ended after that many seconds."""
        return self.server.ask(op="wait", pid=self.pid, timeout=timeout)

    def kill(self, number: int) -> None:
        """Sends a signal. Does nothing when it has ended: it is a zombie until ``wait``."""
        os.kill(self.pid, number)

    @property
    def out(self) -> str:
        """What it has printed to standard output so far."""
        return (self.folder / f"{self.label}.out").read_text()

    @property
    def err(self) -> str:
        """What it has printed to standard error so far."""
        return (self.folder / f"{self.label}.err").read_text()


class Server:
    """The process that has imported train.py."""

    def __init__(self) -> None:
        tests = Path(__file__).parent
        paths = os.pathsep.join((str(tests.parent), str(tests)))
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__]
        pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipe)

    def ask(self, **question: Any) -> Any:
        """The server's answer to one line of JSON."""
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """Ends it, and with it what it has started."""
        self.process.stdin.close()
        self.process.wait()


@functools.cache
def server() -> Server:
    """The one server of a test session."""
    started = Server()
    atexit.register(started.close)
    return started


def start(
    folder: Path,
    *flags: str,
    ranks: int = 1,
    fault: Callable[..., None] | None = None,
    arguments: tuple[Any, ...] = (),
) -> list[Training]:
    """Starts train.py in ``folder`` with the tiny settings and these flags, once a rank."""
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    trainings = []
    for rank in range(ranks):
        label = f"run{next(COUNTER)}_rank{rank}"
        for name in ("out", "err"):
            (folder / f"{label}.{name}").touch()
        pid = server().ask(
            op="start",
            flags=[*TINY, *flags],
            environment=world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            folder=str(folder),
            label=label,
            fault=fault and [fault.__module__, fault.__name__, list(arguments)],
        )
        trainings.append(Training(server(), pid, folder, label))
    return trainings


def run(folder: Path, *flags: str, **options: Any) -> tuple[int, str, str]:
    """Runs to the end: rank 0's exit code, standard output and standard error."""
    trainings = start(folder, *flags, **options)
    codes = [training.wait() for training in trainings]
    return codes[0], trainings[0].out, trainings[0].err


def run_lines(log: Path) -> list[str]:
    """The lines of metrics.jsonl, none when there is no such file yet."""
    path = log / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def wait_for_step(training: Training, log: Path, begun: int, step: int) -> None:
    """Waits for a training step of this number or later, after line ``begun`` of the metrics."""
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        for line in run_lines(log)[begun:]:
            if '"kind": "train"' in line and int(line.split('"step": ')[1].split(",")[0]) >= step:
                return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was never logged: {training.err}")


def wait_for(condition: Callable[[], bool]) -> None:
    """Polls for two minutes, by far more than anything here takes."""
    end = time.monotonic() + 2 * TIMEOUT
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("never happened")


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def metrics(log_dir: Path, *kinds: str) -> dict[tuple[str, int], dict[str, Any]]:
    """The last line of each kind and step, without what depends on the clock."""
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    for text in run_lines(log_dir):
        try:
            line = json.loads(text)
        except ValueError:  # half a line, of a process that was killed
            continue
        if line["kind"] in kinds:
            for key in ("time", "ms", "tokens_per_s", "memory_gb", "seconds"):
                line.pop(key, None)
            lines[line["kind"], line["step"]] = line
    return lines


def serve() -> None:
    """The server: forks children and waits for them, one line of JSON after the other."""
    import importlib

    import matplotlib

    matplotlib.use("Agg")
    importlib.import_module("matplotlib.pyplot")
    importlib.import_module("torch._inductor")  # seconds, which torch spends with each optimizer
    import dataset
    import train

    dataset.get_tokenizer()
    # The rest of tyro, which a child without root's rights may not be able to read.
    train.tyro.cli(train.TrainConfig, args=[])
    # Drawing takes longer than training here, and is tested elsewhere.
    train.plot.plot_run = lambda *_: None
    gc.collect()
    gc.freeze()  # a child need not look at what was imported
    running: set[int] = set()
    for line in sys.stdin:
        question = json.loads(line)
        if question["op"] == "start":
            answer: int | None = os.fork()
            if answer == 0:
                child(question, train.main)
            running.add(answer)
        else:
            answer = wait(question["pid"], question["timeout"])
            if answer is not None:
                running.discard(question["pid"])
        print(json.dumps(answer), flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def wait(pid: int, timeout: float) -> int | None:
    """The exit code of a child, None when it still runs after ``timeout`` seconds."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def child(question: dict[str, Any], main: Callable[[], None]) -> None:
    """A forked child: runs train.py's main and never returns."""
    import importlib

    code = 1
    try:
        os.setpgid(0, 0)  # so that Ctrl-C in the tests' terminal is not for it
        os.chdir(question["folder"])
        for number, name in ((1, "out"), (2, "err")):
            flags = os.O_WRONLY | os.O_CREAT
            os.dup2(os.open(f"{question['label']}.{name}", flags), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(question["environment"])
        sys.argv = ["train.py", *question["flags"]]
        if question["fault"]:
            module, name, arguments = question["fault"]
            getattr(importlib.import_module(module), name)(*arguments)
        main()
        code = 0
        threading._shutdown()  # waits for threads, as a process does that ends by itself
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    serve()
