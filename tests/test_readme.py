"""The README and docs: their blocks run, and the flags, messages and tests they name exist."""

import ast
import contextlib
import functools
import importlib
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from launcher import ROOT

from dataset import DatasetConfig
from eval import EvalConfig
from hellaswag import HellaSwagConfig
from plot import PlotConfig
from train import TrainConfig

PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
CONFIGS = {  # by the names of their scripts
    config.__module__: config
    for config in (DatasetConfig, TrainConfig, EvalConfig, HellaSwagConfig, PlotConfig)
}
# Of torchrun, Slurm, pip, the hub's client and the programs that open a checkpoint.
OTHER_FLAGS = set(
    "--standalone --nnodes --node_rank --nproc_per_node --rdzv-endpoint --rdzv-backend --rdzv-id"
    " --max-restarts --shutdown-timeout --nodes --ntasks-per-node --gpus-per-node --time --signal"
    " --index-url --repo-type --include --local-dir --logdir --model --model_args --tasks --outfile"
    " --temp --max-tokens --prompt --output_dir --quantization --help --outtype --predict"
    " --cache-type-k --cache-type-v --flash-attn --no-conversation --no-display-prompt"
    " --no-escape".split()
)
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
    shutil.copytree(ROOT / "gptxs", tmp_path / "gptxs")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    for page, text in PAGES.items():
        for kind, block in BLOCK.findall(text):
            if "python -m pytest" in block or "DocumentTokenizer" in block:
                continue  # this is the first, and test_shards.py runs the second
            script = re.sub(r"pip install [^&]* && ", "", block)
            script = re.sub(r"(train\.py --preset quickstart.*)", rf"\1{SHORTER}", script)
            script = re.sub(r"(train\.py --preset finetune.*)", rf"\1{FEWER_STEPS}", script)
            script = re.sub(r"(eval\.py.* --loss.*)", r"\1 --val-tokens 2048", script)
            command = ["bash", "-ec", script] if kind == "bash" else [sys.executable, "-c", script]
            done = subprocess.run(command, cwd=tmp_path, env=environment, timeout=300)
            assert done.returncode == 0, f"{page}\n{block}"


@functools.cache
def documented_flags(script: str) -> dict[str, str]:
    """Each flag of a script's --help, and a positional argument as [NAME ...], with its text."""
    page = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # with a frame around the flags
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(page),
        contextlib.suppress(SystemExit),
    ):
        patch.setenv("COLUMNS", "200")
        tyro.cli(CONFIGS[script], args=["--help"])
    page.seek(0)
    flags = {}
    for entry in re.split(r"^│ (?=[-[]\S)", page.read(), flags=re.MULTILINE)[1:]:
        # The flag's own column ends with a wide gap or the line; the frame is no text.
        flag, _, text = re.sub(r"[│╭╰─╮╯\n]", "  ", entry).partition("  ")
        text = re.sub(r"\((default|required|repeatable).*?\)", "", text)
        for name in re.findall(r"--[\w.-]+|\[\w+ \.\.\.\]", flag):
            flags[name] = text.strip()
    return flags


@pytest.mark.parametrize("script", CONFIGS)
def test_help_documents_every_flag(script: str) -> None:
    assert f"python {script}.py" in str(importlib.import_module(script).__doc__)  # an example
    flags = documented_flags(script)
    assert len(flags) > 5
    assert [flag for flag, text in flags.items() if len(text) < 10] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_only_real_flags_are_named(page: Path) -> None:
    known = OTHER_FLAGS.union(*(documented_flags(script) for script in CONFIGS))
    for line in PAGES[page].splitlines():
        assert set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", line)) <= known, line
        for script in CONFIGS:
            for arguments in re.findall(rf"\b{script}\.py((?: [^\s|`#&]+)+)", line):
                named = re.findall(r"(?<= )--[a-z][\w.-]*\w", arguments)
                assert set(named) <= documented_flags(script).keys(), line


def test_every_message_it_explains_is_one_of_the_scripts() -> None:
    texts = [
        ast.unparse(node)  # an f-string that spans several lines becomes one text
        for script in (*ROOT.glob("*.py"), *ROOT.glob("gptxs/*.py"))
        for node in ast.walk(ast.parse(script.read_text()))
        if isinstance(node, ast.JoinedStr | ast.Constant)
    ]
    rows = re.findall(r"^\| (`[^|]+`) \|", PAGES[ROOT / "docs/faults.md"], flags=re.MULTILINE)
    messages = re.findall(r"`(.+?)`", " ".join(rows))
    assert len(messages) > 30
    for message in messages:
        parts = [part.strip() for part in re.split(r"\.\.\.|\d+", message)]
        assert max(map(len, parts)) >= 8, message  # fewer letters would fit by chance
        assert any(all(part in text for part in parts) for text in texts), message


def test_every_file_and_test_that_is_named_exists() -> None:
    tests = "".join(path.read_text() for path in ROOT.glob("tests/test_*.py"))
    for page, text in PAGES.items():
        named = re.findall(r"\]\((?!https?:)([^)#]+)", text)
        assert [name for name in named if not (page.parent / name).exists()] == [], page
        files = re.findall(r"\b(?:tests|benchmarks|docs|gptxs)/[\w./-]+\.\w+\b", text)
        assert [name for name in files if not (ROOT / name).exists()] == [], page
        functions = re.findall(r"`(test_\w+)`", text)
        assert [name for name in functions if f"def {name}(" not in tests] == [], page
