"""The exported model gives the same greedy text in other programs (benchmarks/clients.py)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launcher import ROOT

from model import GPT, GPTConfig


def compare(model: Path, *flags: str, **environment: str) -> tuple[int, list[list[str]]]:
    """Exit code and table of the script."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/clients.py", "--checkpoint", model, *flags],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.returncode, [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that continues each prompt with many different tokens."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(d_model=64, n_heads=2, n_layers=2, context_length=64))
    with torch.no_grad():
        for weight in gpt.parameters():  # where biases of 0 and gains of 1 are, mistakes hide
            weight.add_(torch.randn_like(weight), alpha=0.5)
    folder = tmp_path_factory.mktemp("clients") / "model"
    gpt.save_pretrained(folder)
    return folder


@pytest.mark.soak
def test_other_programs_give_the_text_of_eval_py(model: Path) -> None:
    pytest.importorskip("ctranslate2")
    converter = shutil.which("llama-completion") and shutil.which("convert_hf_to_gguf.py")
    code, table = compare(model, *(("--converter", converter) if converter else ()))
    assert code == 0
    assert [row[-1] for row in table[:2]] == ["equal", "equal"]
    assert (table[2][-1] == "equal") if converter else ("skipped" in table[2][-1])


@pytest.mark.soak
def test_another_text_ends_with_1(model: Path, tmp_path: Path) -> None:
    (tmp_path / "converter.py").touch()
    program = tmp_path / "llama-completion"
    program.write_text("#!/bin/sh\necho another text\n")
    program.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    code, table = compare(model, "--converter", str(tmp_path / "converter.py"), PATH=path)
    assert code == 1
    assert (table[0][-1], table[2][-1]) == ("equal", "different")
