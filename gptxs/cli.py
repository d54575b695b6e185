"""Flags from a dataclass, and the one handler that turns an error into a line and an exit code."""

from __future__ import annotations

import math
import os
import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import tyro

Config = TypeVar("Config", bound=Any)

# What the user can mend in the command or its files; anything else is the machine, the network or a
# bug.
USER_ERRORS = (
    ValueError,
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)


def parse(
    config_class: type[Config], description: str | None, default: Config | None = None
) -> Config:
    """Parse the command line.

    ``default`` holds the values of flags that are not given, as a preset's: then a flag also
    overrides an earlier one, so that a job script can append to a list of settings. Otherwise a
    flag that is given twice but takes one value raises ValueError: one would be lost in silence.
    """
    flags = [word for word in sys.argv[1:] if word.startswith("--")]
    names = Counter(flag[2:].split("=")[0].replace("-", "_") for flag in flags)
    for entry in fields(config_class):
        if default is None and names[entry.name] > 1 and "tuple" not in str(entry.type):
            flag = entry.name.replace("_", "-")
            raise ValueError(f"--{flag} is given {names[entry.name]} times; it takes one value")
    if default is None:
        config = tyro.cli(config_class, description=description)
    else:
        config = tyro.cli(config_class, description=description, default=default)
    values = {entry.name: getattr(config, entry.name) for entry in fields(config)}
    # A shell leaves the ~ of --data-dir=~/folder as it is.
    paths = {k: path.expanduser() for k, path in values.items() if isinstance(path, Path)}
    return replace(config, **paths)


def number_problems(config: Any, at_least_one: Iterable[str] = (), prefix: str = "") -> list[str]:
    """A message for each number of a dataclass that is negative, not finite, or 0 but must not be.

    ``at_least_one`` names the fields that must be 1 or more; None stands for no number.
    """
    problems = []
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{prefix}{field.name} {value} must be finite")
        elif value < 0:
            problems.append(f"{prefix}{field.name} {value} must not be negative")
        elif value < 1 and field.name in at_least_one:
            problems.append(f"{prefix}{field.name} {value} must be at least 1")
    return problems


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def exit_with_one_line(remedy: str = "") -> Iterator[None]:
    """Turn any error into one line on standard error and an exit code.

    130 for Ctrl-C, 2 for a mistake of the user, 1 for all else. ``remedy`` says how to continue
    where the command was right. With GPT_XS_DEBUG=1 the traceback comes first.
    """
    try:
        yield
        print(end="", flush=True)  # here, where a full disk is one line
        _discard_unwritten()  # of standard error
    except (SystemExit, GeneratorExit):
        raise
    except BrokenPipeError:  # the reader of standard output, such as `head`, has what it wanted
        _discard_unwritten()
    except BaseException as error:  # tiktoken's panics are no Exception
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
        code = 2 if isinstance(error, USER_ERRORS) else code
        if os.environ.get("GPT_XS_DEBUG") == "1":
            traceback.print_exception(error)
        line = _describe(error)
        if remedy and code != 2:
            line += f"; {remedy}"
        if os.environ.get("RANK", "0") != "0":
            line += f" (rank {os.environ['RANK']})"
        with suppress(OSError):
            print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
        _discard_unwritten()
        if code == 130 or os.environ.get("WORLD_SIZE", "1") != "1":
            # At once: threads may wait for the network, and NCCL for ranks that will never come.
            os._exit(code)
        raise SystemExit(code) from None


def _describe(error: BaseException) -> str:
    """An error in one line. One that nobody expected is named with its place in the code."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    message = " ".join(str(error).split())
    if message and isinstance(error, (*USER_ERRORS, OSError, MemoryError, ArithmeticError)):
        return message
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {message} ({Path(place.filename).name}:{place.lineno})"


def _discard_unwritten() -> None:
    """Flush the standard streams; what a full disk or a closed pipe does not take is dropped."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed from the start
        try:
            stream.flush()
        except (OSError, ValueError):  # Python would try again at its end, and exit with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
