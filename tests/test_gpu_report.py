"""benchmarks/gpu_report.sh: what it reports, and that a part which fails does not stop it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from launcher import ROOT

SCRIPT = ROOT / "benchmarks/gpu_report.sh"
PARTS = (
    "Machine",
    "1. Ours and nanoGPT-style",
    "2. A step by classes",
    "3. Options",
    "4. NCCL",
    "5. fp16",
    "6. Deterministic resume",
    "7. First step, cold and warm",
    "8. Validation, HellaSwag, checkpoint",
)


def report(folder: Path, python: str, *options: str) -> tuple[int, str, str]:
    """Run the script with this interpreter: its exit code, the report, and what it has printed."""
    done = subprocess.run(
        ["bash", str(SCRIPT), "--out", "r.md", *options],
        cwd=folder,
        env={**os.environ, "PYTHON": python, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    path = folder / "r.md"
    return done.returncode, path.read_text() if path.exists() else "", done.stdout + done.stderr


def sections(text: str) -> dict[str, str]:
    """The text below each heading of the report."""
    headings = re.split(r"^## (.*)$", text, flags=re.MULTILINE)[1:]
    return dict(zip(headings[::2], headings[1::2], strict=True))


def fake_python(folder: Path, fails_on: str) -> str:
    """An interpreter that prints its arguments, and fails where one of them is ``fails_on``."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\necho "ran: $@"\ncase "$*" in *{fails_on}*) exit 7 ;; esac\n')
    python.chmod(0o755)
    return str(python)


def test_a_part_that_fails_is_reported_and_does_not_stop_the_others(tmp_path: Path) -> None:
    python = fake_python(tmp_path, fails_on="profile")
    code, text, printed = report(tmp_path, python, "--device", "cuda", "--micro-batch", "8")
    assert code == 1
    parts = sections(text)
    assert tuple(parts) == (*PARTS, "Summary")
    for name in PARTS:
        assert f"Exit code {7 if name[0] == '2' else 0} after" in parts[name]
        assert "\nran: " in parts[name]
        assert parts[name] in printed
    assert "Failed: 2. A step by classes; \n" in parts["Summary"]
    for name in PARTS[1:4]:
        assert " --micro-batch 8 " in parts[name]


def test_a_machine_that_lacks_what_train_needs_is_told_before_the_first_part(
    tmp_path: Path,
) -> None:
    code, text, printed = report(tmp_path, fake_python(tmp_path, fails_on="machine.py"))
    assert code == 2
    assert list(sections(text)) == ["Machine"]
    assert "pip install -r requirements.txt" in printed


def test_an_unknown_option_is_refused(tmp_path: Path) -> None:
    code, _, printed = report(tmp_path, sys.executable, "--devise", "cpu")
    assert code == 2
    assert "--devise" in printed


def test_the_limits_of_all_parts_are_ten_minutes() -> None:
    limits = re.findall(r'^(?:if ! )?part "[^"]*" (\d+) ', SCRIPT.read_text(), re.MULTILINE)
    assert len(limits) == len(PARTS)
    assert sum(map(int, limits)) <= 600


def test_the_whole_report_on_a_cpu_has_its_figures(tmp_path: Path) -> None:
    code, text, _ = report(tmp_path, sys.executable, "--device", "cpu")
    assert code == 0, text
    figures = ("MISSING: ", "| ours | 1.00 |", "| products |", "| all loss rows |")
    figures += (
        "1 passed",
        "2 passed",
        "2 passed",
        "\nfirst step ",
        '{"kind": "checkpoint", "step": 2',
    )
    for (name, part), figure in zip(sections(text).items(), figures, strict=False):
        assert figure in part, name
    assert len(text) < 65_536  # what an issue takes
