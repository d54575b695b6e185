"""The exported model gives the same greedy text in other programs (benchmarks/clients.py)."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launcher import ROOT

from model import GPT, GPTConfig


@pytest.mark.soak
def test_other_programs_give_the_text_of_eval_py(tmp_path: Path) -> None:
    pytest.importorskip("ctranslate2")
    torch.manual_seed(0)
    model = GPT(GPTConfig(d_model=64, n_heads=2, n_layers=2, context_length=64))
    with torch.no_grad():  # so that it continues each prompt with many different tokens
        for weight in model.parameters():  # where biases of 0 and gains of 1 are, mistakes hide
            weight.add_(torch.randn_like(weight), alpha=0.5)
    model.save_pretrained(tmp_path)
    converter = shutil.which("llama-completion") and shutil.which("convert_hf_to_gguf.py")
    command = [sys.executable, ROOT / "benchmarks/clients.py", "--checkpoint", tmp_path]
    command += ["--converter", converter] if converter else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    table = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [row[-1] for row in table[:2]] == ["equal", "equal"]
    assert (table[2][-1] == "equal") if converter else ("skipped" in table[2][-1])
