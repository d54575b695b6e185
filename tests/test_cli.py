"""gptxs/cli.py: flags from a dataclass; every script ends with one line at most and its code."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
from launcher import ROOT

from gptxs.cli import number_problems, parse

SCRIPT = """
import os, signal, sys, threading, time
from gptxs.cli import exit_with_one_line
sys.argv[0] = "folder/script.py"
with exit_with_one_line(remedy="try again"):
    exec(sys.argv[1])
"""


def end(code: str, shell: str = "", **environment: str) -> tuple[int, str]:
    """Runs Python code in a script's main: its exit code and standard error."""
    command = f'"{sys.executable}" -c "$SCRIPT" "$CODE" {shell}'
    variables = {**os.environ, "SCRIPT": SCRIPT, "CODE": code, **environment}
    # Unbuffered streams have nothing left to flush at the end.
    variables.pop("PYTHONUNBUFFERED", None)
    arguments = ["bash", "-o", "pipefail", "-c", command]
    result = subprocess.run(arguments, cwd=ROOT, env=variables, capture_output=True, text=True)
    return result.returncode, result.stderr


@pytest.mark.parametrize(
    ("code", "shell", "expected_code", "lines"),
    [
        ("raise ValueError('a\\n' * 1000)", "", 2, 1),
        ("open('nowhere')", "", 2, 1),
        ("raise OSError(28, 'No space left on device')", "", 1, 1),
        ("{}['x']", "", 1, 1),
        ("raise SystemExit(7)", "", 7, 0),
        ("print('x\\n' * 100_000)", "| head -1", 0, 0),
        ("print('x')", ">/dev/full", 1, 1),
        ("print('x'); raise ValueError('y')", ">/dev/full", 2, 1),
        ("print('x'); raise ValueError('y')", ">/dev/full 2>/dev/full", 2, 0),
        ("raise ValueError('y')", "2>/dev/full", 2, 0),
        ("print('x')", ">&- 2>&-", 0, 0),
        ("raise ValueError('y')", ">&-", 2, 1),
        ("raise ValueError('y')", ">&- 2>&-", 2, 0),
    ],
)
def test_a_script_ends_with_its_code_and_at_most_one_line(
    code: str, shell: str, expected_code: int, lines: int
) -> None:
    """A mistake of the user is 2, all else 1: the machine, the network or a bug."""
    returncode, err = end(code, shell)
    assert (returncode, err.count("\n")) == (expected_code, lines), err


def test_the_line_says_what_and_how_to_go_on_where_the_command_was_right() -> None:
    assert end("raise ValueError('a is 1;\\n use 2')")[1] == "script.py: a is 1; use 2\n"
    assert end("raise OSError('disk')")[1] == "script.py: disk; try again\n"
    assert end("raise OSError('disk')", RANK="3")[1] == "script.py: disk; try again (rank 3)\n"


def test_a_bug_is_named_with_its_place_and_any_error_has_its_traceback_on_request() -> None:
    assert end("{}['x']")[1].startswith("script.py: KeyError: 'x' (<string>:1)")
    for code in ("{}['x']", "raise ValueError('y')"):
        err = end(code, GPT_XS_DEBUG="1")[1]
        assert err.startswith("Traceback")
        assert err.splitlines()[-1].startswith("script.py: ")


# A thread that Python would wait for at its end, as for one that waits for the network.
THREAD = "threading.Thread(target=time.sleep, args=(100,)).start();"


@pytest.mark.parametrize(
    ("code", "environment", "expected_code", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(100)", {}, 130, "interrupted; try"),
        # NCCL would wait for the other ranks, and torchrun for this one.
        ("raise ValueError('x')", {"WORLD_SIZE": "2", "RANK": "1"}, 2, "x (rank 1)\n"),
    ],
)
def test_ctrl_c_and_a_rank_that_fails_end_at_once(
    code: str, environment: dict[str, str], expected_code: int, message: str
) -> None:
    start = time.monotonic()
    returncode, err = end(THREAD + code, **environment)
    assert time.monotonic() - start < 50
    assert returncode == expected_code
    assert err.startswith(f"script.py: {message}")


@dataclass(frozen=True)
class Settings:
    preset: Literal["one", "two"] = "one"
    steps: int = 3
    rate: float = 0.5
    limit: int | None = None
    data_dir: Path = Path("data")
    out: Path | None = None


def parsed(
    monkeypatch: pytest.MonkeyPatch, *flags: str, presets: dict[str, Settings] | None = None
) -> Settings:
    monkeypatch.setattr(sys, "argv", ["script.py", *flags])
    return parse(Settings, description=None, presets=presets)


def test_flags_override_a_preset_and_the_flags_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--steps", "5", "--steps=7")
    expected = Settings(steps=7)
    assert parsed(monkeypatch, *flags) == expected
    presets = {"one": Settings(limit=2), "two": Settings(preset="two", rate=0.25)}
    assert parsed(monkeypatch, *flags, presets=presets) == replace(expected, limit=2)
    config = parsed(monkeypatch, *flags, "--preset=two", presets=presets)
    assert config == replace(expected, preset="two", rate=0.25)
    for wrong in ("--preset=three", "--preset", "--no-such-flag"):
        with pytest.raises(SystemExit) as stop:
            parsed(monkeypatch, wrong, presets=presets)
        assert stop.value.code == 2


def test_the_home_folder_is_meant_by_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/some/home")
    config = parsed(monkeypatch, "--data-dir=~/data", "--out=~/out")
    assert config.data_dir == Path("/some/home/data")
    assert config.out == Path("/some/home/out")


def test_each_number_that_is_none_is_named_at_once() -> None:
    assert number_problems(Settings(limit=1), at_least_one=("steps", "limit")) == []
    wrong = Settings(steps=0, rate=float("nan"), limit=-1)
    problems = number_problems(wrong, at_least_one=("steps", "limit"), prefix="run.")
    found = [problem.split()[:2] for problem in problems]
    assert found == [["run.steps", "0"], ["run.rate", "nan"], ["run.limit", "-1"]]
    (problem,) = number_problems(Settings(rate=float("inf"), steps=0))
    assert problem == "rate inf must be finite and not negative"
