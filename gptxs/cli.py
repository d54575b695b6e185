"""Flags from a dataclass, and the one handler that turns an error into a line and an exit code."""

from __future__ import annotations

import argparse
import math
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import tyro

Config = TypeVar("Config", bound=Any)

# What the user can mend in the command or its files; anything else is the machine or a bug.
FILE_ERRORS = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError)
USER_ERRORS = (ValueError, PermissionError, *FILE_ERRORS)


def parse(
    config_class: type[Config], description: str | None, presets: Mapping[Any, Config] | None = None
) -> Config:
    """Parse the command line; of a flag that is given twice the last value counts.

    With ``presets`` the flag --preset chooses the defaults of all others; the first is its own.
    """
    if presets is None:
        config = tyro.cli(config_class, description=description)
    else:
        # First only --preset, because tyro needs the defaults before it parses anything. It is
        # tyro that refuses a name that is missing or unknown, with the names that there are.
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--preset", nargs="?")
        name = parser.parse_known_args()[0].preset
        default = presets.get(name, next(iter(presets.values())))
        config = tyro.cli(config_class, description=description, default=default)
    # A shell leaves the ~ of --data-dir=~/folder as it is.
    paths = {k: v.expanduser() for k, v in vars(config).items() if isinstance(v, Path)}
    return replace(config, **paths)


def number_problems(config: Any, at_least_one: Iterable[str] = (), prefix: str = "") -> list[str]:
    """A message for each number of a dataclass that cannot be; ``at_least_one``: nor can 0."""
    problems = []
    for name in (field.name for field in fields(config)):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value) or value < 0:
            problems.append(f"{prefix}{name} {value} must be finite and not negative")
        elif value < 1 and name in at_least_one:
            problems.append(f"{prefix}{name} {value} must be at least 1")
    return problems


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def exit_with_one_line(remedy: str = "") -> Iterator[None]:
    """Turn any error into a line and an exit code: 130 for Ctrl-C, 2 for a mistake, else 1.

    ``remedy`` says how to continue where the command was right. GPT_XS_DEBUG=1 adds the traceback.
    """
    try:
        yield
        print(end="", flush=True)  # here, where a full disk is one line
    except SystemExit:
        raise
    except BrokenPipeError:  # the reader of standard output, such as `head`, has what it wanted
        _discard_unwritten()
    except BaseException as error:  # tiktoken's panics are no Exception
        code = 2 if isinstance(error, USER_ERRORS) else 1
        code = 130 if isinstance(error, KeyboardInterrupt) else code
        if os.environ.get("GPT_XS_DEBUG") == "1":
            traceback.print_exception(error)
        line = f"{Path(sys.argv[0]).name}: {_describe(error)}"
        if remedy and code != 2:
            line += f"; {remedy}"
        if os.environ.get("RANK", "0") != "0":
            line += f" (rank {os.environ['RANK']})"
        with suppress(OSError):
            print(line, file=sys.stderr)
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
    """Drop what a full disk or a closed pipe does not take: Python would try again at its end."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed from the start
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
