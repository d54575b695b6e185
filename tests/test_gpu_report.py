"""benchmarks/gpu_report.sh: what it reports, and that a part which fails does not stop it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launcher import ROOT

PARTS = (
    "Machine",
    "Test suite",
    "HellaSwag",
    "Sampling",
    "Shards of the embedded corpus",
    "A run with validation and checkpoints",
    "What this run has logged",
    "Training step, context 32",
)


def report(folder: Path, python: str, *options: str) -> tuple[int, str]:
    """Run the script with this interpreter: its exit code, and what it has written."""
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks/gpu_report.sh"), "--out", "r.md", *options],
        cwd=folder,
        env={**os.environ, "PYTHON": python},
        capture_output=True,
        text=True,
        timeout=900,
    )
    path = folder / "r.md"
    return done.returncode, path.read_text() if path.exists() else done.stderr


def sections(text: str) -> dict[str, str]:
    """The text below each heading of the report."""
    headings = re.split(r"^## (.*)$", text, flags=re.MULTILINE)[1:]
    return dict(zip(headings[::2], headings[1::2], strict=True))


def test_a_part_that_fails_is_reported_and_does_not_stop_the_others(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho "ran: $@"\n[ "$1" != benchmarks/bench_sampling.py ] || exit 7\n'
    )
    python.chmod(0o755)
    code, text = report(tmp_path, str(python), "--device", "cpu")
    assert code == 1
    parts = sections(text)
    assert len(parts) == len(PARTS) + 1  # and the summary
    for part, (heading, body) in zip(PARTS, parts.items(), strict=False):
        assert heading.startswith(part)
        assert f"Exit code {7 if part == 'Sampling' else 0} after" in body
        assert "\nran: " in body
    assert "Failed: Sampling; \n" in parts["Summary"]


def test_an_unknown_option_is_refused(tmp_path: Path) -> None:
    code, text = report(tmp_path, sys.executable, "--devise", "cpu")
    assert code == 2
    assert "--devise" in text


@pytest.mark.soak  # two minutes on idle cores, much of it for the products of 124M
def test_the_whole_report_on_a_cpu_has_its_figures(tmp_path: Path) -> None:
    code, text = report(tmp_path, sys.executable, "--device", "cpu")
    assert code == 0, text
    parts = sections(text)
    figures = {
        "Machine": "\ntorch 2",
        "Test suite": " passed",
        "HellaSwag, 20 synthetic rows": "second pass: ",
        "Sampling": "ours, batch 8 ",
        "What this run has logged": '{"kind": "checkpoint", "step": 8',
        "Training step, context 32": "| ours, not compiled | 1.00 |",
    }
    for heading, figure in figures.items():
        assert figure in parts[heading]
    assert len(text) < 65_536  # what an issue takes
