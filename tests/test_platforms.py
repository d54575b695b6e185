"""The layout of the code, what an import does, and systems without what only Linux has.

No Windows or macOS is at hand: a process takes away what they lack, and runs the scripts.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launcher import ROOT, saved_steps

SCRIPTS = {"data_loader", "dataset", "eval", "hellaswag", "model", "plot", "train"}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in (*ROOT.glob("*.py"), *ROOT.glob("gptxs/[!_]*.py"))
}
LEAVES = {"gptxs.cli", "gptxs.memory", "gptxs.files", "gptxs.tokenizer"}
# What each module of the package may import of ours, but for those that may import the leaves.
PACKAGE: dict[str, set[str]] = {name: set() for name in LEAVES | {"gptxs.kernels", "gptxs.optim"}}
PACKAGE |= {
    "gptxs.hf": LEAVES | {"gptxs.hub"},
    "gptxs.sources": LEAVES | {"gptxs.hub"},
    "gptxs.checkpoint": LEAVES | {"gptxs.hf", "gptxs.hub"},
    "gptxs.finetune": LEAVES | {"gptxs.checkpoint", "gptxs.hf"},
}
# What each script may import of the others.
STORY = {"train": SCRIPTS, "eval": {"data_loader", "model"}, "hellaswag": {"model"}}


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "gptxs":
            found |= {f"gptxs.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found & set(MODULES)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_flow_one_way_and_stand_at_the_top(name: str) -> None:
    body = ast.parse(MODULES[name].read_text(encoding="utf-8")).body
    kinds = [isinstance(node, ast.Import | ast.ImportFrom) for node in body[1:]]
    assert kinds == sorted(kinds, reverse=True)  # after the docstring, and none after other code
    found = imports(MODULES[name])
    if name.startswith("gptxs."):
        assert found <= PACKAGE.get(name, LEAVES)
    else:
        assert name in SCRIPTS  # no others stand at the top
        assert {module for module in found if "." not in module} <= STORY.get(name, set())
    assert "train" not in found


IMPORT = """
import importlib, json, os, signal, sys, threading
import torch, numpy, tyro

def state():
    variables = {name: value for name, value in os.environ.items() if not name.startswith("TORCH")}
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    return variables, handlers, torch.get_rng_state().tolist()

before = state()
for name in sys.argv[1:]:
    importlib.import_module(name)
assert state() == before
assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()
assert threading.active_count() == 1 and not os.listdir()
heavy = ["matplotlib", "datasets", "pyarrow", "pandas", "wandb", "tensorboard", "transformers"]
print([name for name in heavy if name in sys.modules])
"""


def test_importing_does_no_work(tmp_path: Path) -> None:
    command = [sys.executable, "-B", "-c", IMPORT, *sorted(MODULES)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


# What Windows lacks is taken away before anything but Python's own modules is imported, so torch
# and all other libraries have to do without it too. filelock alone keeps fcntl, and the flags of
# open that it uses with it: on Windows it locks with msvcrt, which only exists there.
CHILD = """
import errno, fcntl, importlib, os, shutil, signal, sys
import filelock

def fsync(descriptor, real=os.fsync, get=fcntl.fcntl, mode=fcntl.F_GETFL):
    if get(descriptor, mode) & (os.O_WRONLY | os.O_RDWR) == 0:
        raise OSError(errno.EBADF, "what was opened for reading cannot be flushed here")
    real(descriptor)

os.fsync = fsync
for name in ("fcntl", "resource", "grp", "pwd"):
    sys.modules[name] = None  # importing it raises ImportError
for name in ("pread", "preadv", "getuid", "geteuid", "getpgid", "fork", "sched_getaffinity"):
    delattr(os, name)
os.process_cpu_count = os.cpu_count  # since Python 3.13, and by sched_getaffinity where that is
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
    # The module os for files.py, which asks for the system's name; pathlib must not see it.
    name = "nt"
    def __getattr__(self, attribute):
        return getattr(os, attribute)

import gptxs.files
gptxs.files.os = Windows()
sys.addaudithook(no_folder_and_no_proc)
for line in sys.stdin.read().splitlines():
    script, *flags = line.split()
    sys.argv = [script + ".py", *flags]
    importlib.import_module(script).main()
"""
QUICK = (
    "train --preset quickstart --warmup-steps 2 --val-every 2 --sample-every 4 --val-tokens 2048"
    " --checkpoint-every 4 --device cpu --dtype fp32 --max-steps"
)
CHECKPOINT = "--checkpoint log/quickstart --device cpu"
COMMANDS = f"""
{QUICK} 4
{QUICK} 6 --resume
dataset --source rows.jsonl --column ctx --data-dir rows
eval {CHECKPOINT} --prompt hello --max-new-tokens 4
eval {CHECKPOINT} --loss --data-dir data/quickstart --val-tokens 2048
hellaswag {CHECKPOINT} --data rows.jsonl --output choices.jsonl
plot log/quickstart --out curves.svg
""".strip()
ROW = {"label": 0, "activity_label": "Baking", "ctx": "A man", "ctx_a": "A man", "ctx_b": ""}
ROW |= {"endings": ["bakes.", "paints.", "drives.", "swims."]}


def test_every_script_runs_without_what_windows_and_macos_lack(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text((json.dumps(ROW) + "\n") * 9, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CHILD]
    done = subprocess.run(
        command, input=COMMANDS, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    told = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert done.returncode == 0, told
    assert "Traceback" not in done.stderr, told
    assert "bits_per_byte" in done.stdout, told
    assert "harness_acc_norm" in done.stdout, told
    log = tmp_path / "log/quickstart"
    assert saved_steps(log) == [0, 4, 6]
    for file in ("plot.png", "report.md", "../../curves.svg", "../../choices.jsonl"):
        assert (log / file).stat().st_size > 0, file
