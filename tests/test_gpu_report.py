"""benchmarks/gpu_report.sh: what it reports, and that a part which fails does not stop it."""

import os
import re
import subprocess
import sys
from pathlib import Path

from launcher import ROOT

SCRIPT = ROOT / "benchmarks/gpu_report.sh"
# Each part's title, and what a whole report on a CPU has in it.
PARTS = {
    "Machine": "MISSING: ",
    "1. Ours and nanoGPT-style": "| ours | 1.00 |",
    "2. A step by classes": "| gradient accumulation |",
    "3. Options": "| all loss rows |",
    "4. NCCL": "1 passed",
    "5. fp16": "1 passed",
    "6. Deterministic resume": "1 passed",
    "7. First step, cold and warm": "\nfirst step ",
    "8. Validation, HellaSwag, checkpoint": '{"kind": "checkpoint", "step": 2',
}


def report(folder: Path, python: str, *options: str) -> tuple[int, dict[str, str], str]:
    """Run the script: its exit code, the report's text by headings, and what it has printed."""
    environment = {**os.environ, "PYTHON": python, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(SCRIPT), "--out", "r.md", *options]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    text = (folder / "r.md").read_text()
    assert len(text) < 65_536  # what an issue takes
    headings = re.split(r"^## (.*)$", text, flags=re.MULTILINE)[1:]
    sections = dict(zip(headings[::2], headings[1::2], strict=True))
    return done.returncode, sections, done.stdout + done.stderr


def fake_python(folder: Path, fails_on: str) -> str:
    """An interpreter that prints its arguments, and fails where one of them is ``fails_on``."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\necho "ran: $@"\ncase "$*" in *{fails_on}*) exit 7 ;; esac\n')
    python.chmod(0o755)
    return str(python)


def test_a_part_that_fails_is_reported_and_does_not_stop_the_others(tmp_path: Path) -> None:
    python = fake_python(tmp_path, fails_on="profile")
    code, parts, printed = report(tmp_path, python, "--device", "cuda", "--micro-batch", "8")
    assert code == 1
    assert list(parts) == [*PARTS, "Summary"]
    for name in PARTS:
        assert f"Exit code {7 if name[0] == '2' else 0} after" in parts[name]
        assert "\nran: " in parts[name]
        assert parts[name] in printed
        assert (" --micro-batch 8 " in parts[name]) == (name[0] in "12378")
    assert "Failed: 2. A step by classes; \n" in parts["Summary"]


def test_a_machine_that_lacks_packages_is_told_before_the_first_part(tmp_path: Path) -> None:
    code, parts, printed = report(tmp_path, fake_python(tmp_path, fails_on="machine.py"))
    assert (code, list(parts)) == (2, ["Machine"])
    assert "pip install -r requirements.txt -r tests" in printed


def test_the_limits_of_all_parts_are_ten_minutes() -> None:
    limits = re.findall(r'^(?:if ! )?part "[^"]*" (\d+) ', SCRIPT.read_text(), re.MULTILINE)
    assert len(limits) == len(PARTS)
    assert sum(map(int, limits)) <= 600


def test_the_whole_report_on_a_cpu_has_its_figures(tmp_path: Path) -> None:
    code, parts, printed = report(tmp_path, sys.executable, "--device", "cpu")
    assert code == 0, printed
    for name, figure in PARTS.items():
        assert figure in parts[name], name
