"""Every `bash` and `python` block of the README runs, in its order, in a copy of the project."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
# A shorter run of a smaller model by the same commands: the quickstart takes minutes.
SHORTER = (
    " --max-steps 4 --warmup-steps 2 --val-every 2 --val-tokens 1024 --sample-every 4"
    " --batch-tokens 256 --micro-batch 2 --model.d-model 16 --model.n-layers 1"
)


def test_the_two_commands_come_first() -> None:
    assert BLOCKS[0] == (
        "bash",
        "pip install -r requirements.txt && python train.py --preset quickstart\n",
    )
    assert BLOCKS[1] == (
        "bash",
        "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest\n",
    )


def test_every_command_block_runs(tmp_path: Path) -> None:
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    for kind, block in BLOCKS:
        if "python -m pytest" in block:
            continue  # this is it
        script = re.sub(r"pip install [^&]* && ", "", block)
        script = re.sub(r"(train\.py --preset quickstart.*)", rf"\1{SHORTER}", script)
        script = re.sub(r"(eval\.py --loss.*)", r"\1 --val-tokens 2048", script)
        command = ["bash", "-ec", script] if kind == "bash" else [sys.executable, "-c", script]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_every_message_it_explains_is_one_of_the_scripts() -> None:
    sources = "".join(script.read_text() for script in ROOT.glob("*.py"))
    section = README.split("## Troubleshooting, by message")[1].split("\n## ")[0]
    messages = [
        text
        for row in section.splitlines()[4:]
        for text in re.findall("`(.*?)`", row.split("|")[1])
    ]
    assert len(messages) > 10
    for message in messages:
        # What a script fills in is a number, a name in front or three dots here.
        fixed = max(re.split(r"\.\.\.|\d+|[(:]", message), key=len).strip()
        assert len(fixed) > 8, message
        assert fixed in sources, message


@pytest.mark.parametrize("script", ["dataset.py", "train.py", "eval.py", "hellaswag.py", "plot.py"])
def test_help_documents_every_flag_and_the_readme_names_only_real_ones(script: str) -> None:
    done = subprocess.run(
        [sys.executable, script, "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=True,
    )
    flags = set(re.findall(r"--[a-z][a-z0-9.-]*", done.stdout))
    used = re.findall(rf"{re.escape(script)}((?: [^\s|`#&]+)*)", README)
    named = {flag for call in used for flag in re.findall(r"--[a-z][a-z0-9.-]*", call)}
    assert named <= flags
    assert "example" in done.stdout.lower() or f"python {script}" in done.stdout
