"""Windows and macOS: every script runs without what only Linux, or only POSIX, has.

No such machine is at hand. A child process takes those things away and then runs the quickstart and
the other scripts; what else is different there, such as the compiler, was not tested.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import launcher
from test_bad_input import ROWS

ROOT = Path(__file__).parents[1]
# What Windows lacks is taken away before anything but Python's own modules is imported, so torch
# and all other libraries have to do without it too. filelock alone keeps fcntl, and the flags of
# open that it uses with it: on Windows it locks with msvcrt, which only exists there, and with
# neither of them it would fall back to a lock of another kind.
CHILD = """
import importlib
import os
import shutil
import signal
import sys

import filelock

for name in ("fcntl", "resource", "grp", "pwd", "termios"):
    sys.modules[name] = None  # importing it raises ImportError
for name in ("pread", "preadv", "getuid", "geteuid", "getpgid", "fork"):
    delattr(os, name)
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGQUIT", "setitimer", "pthread_kill"):
    delattr(signal, name)
shutil._use_fd_functions = False  # rmtree would open folders, as it does not do there


def no_folder_and_no_proc(event, arguments):
    if event != "open" or not isinstance(arguments[0], (str, bytes, os.PathLike)):
        return
    path = os.fsdecode(arguments[0])
    if path.startswith("/proc/"):
        raise FileNotFoundError(2, "there is no /proc here", path)
    if os.path.isdir(path):
        raise PermissionError(13, "a folder cannot be opened here", path)


class Windows:
    # The module os for common.py, which asks for the system's name; pathlib must not see it.

    name = "nt"

    def __getattr__(self, attribute):
        return getattr(os, attribute)


import common

common.os = Windows()
sys.addaudithook(no_folder_and_no_proc)
for line in sys.stdin.read().splitlines():
    script, *flags = line.split()
    sys.argv = [script + ".py", *flags]
    print("##", line, flush=True)
    try:
        importlib.import_module(script).main()
    except SystemExit as stop:
        if stop.code:
            raise
for name in ("fcntl", "resource"):
    assert sys.modules[name] is None
"""
QUICK = (
    "train --preset quickstart --max-steps 4 --warmup-steps 2 --val-every 2 --sample-every 4"
    " --checkpoint-every 4 --val-tokens 2048 --device cpu --dtype fp32"
)
COMMANDS = f"""
dataset --source stdlib --data-dir manual --shard-size 20000 --max-tokens 50000 --workers 1
dataset --data-dir manual --verify
{QUICK}
{QUICK} --max-steps 6 --resume
eval --checkpoint log/quickstart --prompt hello --max-new-tokens 4 --device cpu
eval --checkpoint log/quickstart --loss --data-dir data/quickstart --val-tokens 2048 --device cpu
hellaswag --checkpoint log/quickstart --data hellaswag.jsonl --output choices.jsonl --device cpu
plot log/quickstart --out curves.svg
""".strip()


def test_every_script_runs_without_what_windows_and_macos_lack(tmp_path: Path) -> None:
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "hellaswag.jsonl").write_text(text, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=COMMANDS,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    told = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert done.returncode == 0, told
    assert "Traceback" not in done.stderr, told
    assert done.stdout.count("\n## ") == len(COMMANDS.splitlines()) - 1, told
    assert "every shard is valid" in done.stdout, told
    assert "bits_per_byte" in done.stdout, told
    assert "harness_acc_norm" in done.stdout, told
    log = tmp_path / "log/quickstart"
    assert launcher.saved_steps(log) == [0, 4, 6]
    for file in (log / "plot.png", log / "report.md", tmp_path / "curves.svg"):
        assert file.stat().st_size > 0, file
    assert len((tmp_path / "choices.jsonl").read_text().splitlines()) == len(ROWS)
