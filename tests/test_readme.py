"""The README and docs: their blocks run, and the flags, messages and tests they name exist."""

import ast
import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dataset import DatasetConfig
from eval import EvalConfig
from hellaswag import HellaSwagConfig
from plot import PlotConfig
from train import TrainConfig

ROOT = Path(__file__).parent.parent
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
FAULTS = PAGES[ROOT / "docs/faults.md"]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
CONFIGS = {  # by the names of their scripts
    config.__module__: config
    for config in (DatasetConfig, TrainConfig, EvalConfig, HellaSwagConfig, PlotConfig)
}
# A shorter run of a smaller model by the same commands: the quickstart takes minutes.
FEWER_STEPS = (
    " --max-steps 4 --warmup-steps 2 --val-every 2 --val-tokens 1024 --sample-every 4"
    " --batch-tokens 256 --micro-batch 2"
)
SHORTER = f"{FEWER_STEPS} --model.d-model 32 --model.n-layers 1"


def test_the_two_commands_come_first() -> None:
    install = "pip install -r requirements.txt"
    assert BLOCK.findall(PAGES[ROOT / "README.md"])[:2] == [
        ("bash", f"{install} && python train.py --preset quickstart\n"),
        ("bash", f"{install} -r tests/requirements.txt && python -m pytest\n"),
    ]


def test_every_command_block_runs(tmp_path: Path) -> None:
    """In a copy of the project: the README's first, then docs/, which use what those have made."""
    for file in (*ROOT.glob("*.py"), ROOT / "requirements.txt"):
        shutil.copy(file, tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    for page, text in PAGES.items():
        for kind, block in BLOCK.findall(text):
            if "python -m pytest" in block:
                continue  # this is it
            script = re.sub(r"pip install [^&]* && ", "", block)
            script = re.sub(r"(train\.py --preset quickstart.*)", rf"\1{SHORTER}", script)
            script = re.sub(r"(train\.py --preset finetune.*)", rf"\1{FEWER_STEPS}", script)
            script = re.sub(r"(eval\.py --loss.*)", r"\1 --val-tokens 2048", script)
            command = ["bash", "-ec", script] if kind == "bash" else [sys.executable, "-c", script]
            done = subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
            )
            output = f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            assert done.returncode == 0, f"{page}\n{block}\n{output}"


# ---- flags ---------------------------------------------------------------------------------------


@functools.cache
def documented_flags(script: str) -> dict[str, str]:
    """Each flag of a script's --help, and a positional argument as [NAME ...], with its text."""
    command = [sys.executable, str(ROOT / f"{script}.py"), "--help"]
    page = subprocess.check_output(command, env={**os.environ, "COLUMNS": "200"}, text=True)
    assert f"python {script}.py" in page, "there is no example"
    flags = {}
    for entry in re.split(r"^│ (?=[-[]\S)", page, flags=re.MULTILINE)[1:]:
        # The flag's own column ends with a wide gap or the line; the frame is no text.
        flag, _, text = re.sub(r"[│╭╰─╮╯\n]", "  ", entry).partition("  ")
        text = re.sub(r"\((default|required|repeatable).*?\)", "", text)
        for name in re.findall(r"--[\w.-]+|\[\w+ \.\.\.\]", flag):
            flags[name] = text.strip()
    return flags


def flags_of(config: Any, prefix: str = "--") -> list[str]:
    """The flags that a configuration's fields must have."""
    names = []
    for field in dataclasses.fields(config):
        flag = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(field.default_factory):
            names += flags_of(field.default_factory, f"{flag}.")
        else:
            names.append("[RUN ...]" if flag == "--runs" else flag)  # plot.py's, without a flag
    return names


@pytest.mark.parametrize("script", CONFIGS)
def test_help_documents_every_flag(script: str) -> None:
    flags = documented_flags(script)
    expected = flags_of(CONFIGS[script])
    assert len(expected) > 5
    assert [flag for flag in expected if len(flags.get(flag, "")) < 10] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_only_real_flags_are_named(page: Path) -> None:
    known = {flag for script in CONFIGS for flag in documented_flags(script)}
    # Those of torchrun, Slurm, TensorBoard, lm_eval and llama.cpp.
    known |= set(
        "--standalone --nnodes --node_rank --nproc_per_node --rdzv-endpoint --rdzv-backend"
        " --rdzv-id --max-restarts --nodes --ntasks-per-node --gpus-per-node --time --signal"
        " --logdir --model --model_args --tasks --outfile --help".split()
    )
    for line in PAGES[page].splitlines():
        assert set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", line)) <= known, line
        for script in CONFIGS:
            for arguments in re.findall(rf"\b{script}\.py((?: [^\s|`#&]+)+)", line):
                named = re.findall(r"(?<= )--[a-z][\w.-]*\w", arguments)
                assert set(named) <= documented_flags(script).keys(), line


# ---- what else the pages name --------------------------------------------------------------------


def test_every_message_it_explains_is_one_of_the_scripts() -> None:
    texts = [
        ast.unparse(node)  # an f-string that spans several lines becomes one text
        for script in ROOT.glob("*.py")
        for node in ast.walk(ast.parse(script.read_text()))
        if isinstance(node, ast.JoinedStr | ast.Constant)
    ]
    messages = re.findall(r"^\| `(.+?)` \|", FAULTS.split("## By message")[1], flags=re.MULTILINE)
    assert len(messages) > 10
    for message in messages:
        parts = [part.strip() for part in re.split(r"\.\.\.|\d+", message)]
        assert max(map(len, parts)) >= 8, message  # fewer letters would fit by chance
        assert any(all(part in text for part in parts) for text in texts), message


def test_every_test_that_it_names_exists() -> None:
    tests = "".join(path.read_text() for path in ROOT.glob("tests/test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", FAULTS))
    assert len(named) > 30
    assert {name for name in named if f"def {name}(" not in tests} == set()


def test_every_file_that_is_linked_exists() -> None:
    for page, text in PAGES.items():
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
