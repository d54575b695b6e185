"""What a run reports: lines that survive faults, a live line, and the trackers' own readers."""

import itertools
import json
import math
import os
import pty
import re
import shutil
import sys
import termios
from contextlib import suppress
from pathlib import Path
from subprocess import getoutput
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import metrics
import plot
from metrics import MetricsLogger

Capture = pytest.CaptureFixture[str]
MonkeyPatch = pytest.MonkeyPatch
CPU = torch.device("cpu")


def new_logger(log_dir: Path, enabled: bool = True) -> MetricsLogger:
    return MetricsLogger(
        log_dir, enabled, CPU, max_steps=4, tokens_per_step=100, flops_per_step=50, peak_flops=1e3
    )


@pytest.fixture
def log(tmp_path: Path) -> MetricsLogger:
    return new_logger(tmp_path)


def log_step(log: MetricsLogger, step: int, loss: float, norm: float = 1.0) -> None:
    log.log_step(step, lr=0.5, stats=torch.tensor([loss, 0.0, norm, 1.0]))


def read_rows(log: MetricsLogger) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (log.log_dir / "metrics.jsonl").open()]


def test_rows_have_kind_step_and_time_and_a_step_its_derived_numbers(log: MetricsLogger) -> None:
    log_step(log, 3, loss=2.5, norm=0.25)
    with log.timed("val", 4) as row:
        row["loss"] = 2.25
    with log.timed("checkpoint", 4):
        pass  # has nothing to report
    train, val = read_rows(log)
    assert train.items() >= {"kind": "train", "step": 3, "loss": 2.5, "grad_norm": 0.25}.items()
    assert train["tokens_per_s"] == pytest.approx(100 / (train["ms"] / 1e3))
    assert train["mfu"] == pytest.approx(50 / (train["ms"] / 1e3) / 1e3)
    assert val.items() >= {"kind": "val", "step": 4, "loss": 2.25}.items()
    assert val["seconds"] >= 0
    assert train["time"] <= val["time"]


def test_a_spike_has_a_high_z_score_and_skipped_updates_are_counted(log: MetricsLogger) -> None:
    for step in range(20):
        log_step(log, step, loss=5.0 + step % 2)
    counts = []
    for step, loss, norm in ((20, 8.0, math.inf), (21, math.nan, math.nan), (22, 5.0, 1.0)):
        log_step(log, step, loss, norm)
        counts.append(log.skipped_in_a_row)
    assert counts == [1, 2, 0]
    rows = read_rows(log)
    assert rows[15]["z"] == 0  # too few to compare with
    assert rows[20]["z"] == pytest.approx((8 - 5.5) / 0.5)
    assert [row["step"] for row in rows if row.get("skipped")] == [20, 21]


@pytest.mark.parametrize("pace", [0.0, -5.0])
def test_a_clock_that_stands_still_or_goes_back_ends_nothing(
    tmp_path: Path, monkeypatch: MonkeyPatch, pace: float
) -> None:
    times = itertools.count(100.0, pace)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(times))
    log = new_logger(tmp_path)
    for step in range(3):
        log_step(log, step, loss=1.0)
    with log.timed("val", 3) as row:
        row["loss"] = 1.0
    rows = read_rows(log)
    assert all(row["tokens_per_s"] > 0 and row["ms"] > 0 for row in rows[:3])
    assert rows[3]["seconds"] == 0


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_losses_that_do_not_change_have_no_z_score(log: MetricsLogger) -> None:
    for step in range(20):
        log_step(log, step, loss=5.0)
    assert {row["z"] for row in read_rows(log)} == {0.0}


@pytest.mark.parametrize("closed", [True, False])
def test_without_a_standard_output_nothing_is_printed(
    tmp_path: Path, monkeypatch: MonkeyPatch, closed: bool
) -> None:
    stream = (tmp_path / "out").open("w")
    stream.close()
    monkeypatch.setattr(sys, "stdout", stream if closed else None)
    log = new_logger(tmp_path)
    log_step(log, 0, loss=0.5)
    log.print("hello")
    log.close()
    assert len(read_rows(log)) == 1


def test_a_gpu_step_is_read_one_step_late(log: MetricsLogger, monkeypatch: MonkeyPatch) -> None:
    arrivals = [Mock(**{"query.side_effect": [False, True]}) for _ in range(3)]
    stream = Mock(record_event=Mock(side_effect=arrivals))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    for step in range(3):
        copy = Mock(return_value=torch.tensor([step, 0.0, 1.0, 1.0]))
        log.log_step(step, lr=0.5, stats=Mock(device=torch.device("cuda"), to=copy))
        copy.assert_called_once_with("cpu", non_blocking=True)
        assert [arrived.query.call_count for arrived in arrivals].count(2) == step
    log.flush()
    assert [(row["step"], row["loss"]) for row in read_rows(log)] == [(0, 0), (1, 1), (2, 2)]
    # It would keep a signal's handler from running while the device computes.
    assert not any(arrived.synchronize.called for arrived in arrivals)


def test_only_rank_0_writes_and_prints(tmp_path: Path, capsys: Capture) -> None:
    log = new_logger(tmp_path, enabled=False)
    log.start(0, config={}, tensorboard=True, wandb=True)
    log.log_step(0, lr=0.5, stats=torch.tensor([1.0, 1.0, 1.0, 1.0]))
    log.print("hello")
    assert log.stop_requested  # all ranks read that one of them has to stop
    assert (list(tmp_path.iterdir()), capsys.readouterr().out) == ([], "")


def test_a_row_has_null_for_what_is_not_finite(log: MetricsLogger, capsys: Capture) -> None:
    log.write("run", 0, {"config": {"grad_clip": math.inf, "model": {"d_model": 64}}})
    log_step(log, 0, loss=math.nan, norm=-math.inf)
    run, train = read_rows(log)
    assert run["config"] == {"grad_clip": None, "model": {"d_model": 64}}
    assert (train["loss"], train["grad_norm"], train["lr"]) == (None, None, 0.5)
    assert "loss     nan" in capsys.readouterr().out
    assert math.isnan(plot.read_metrics(log.log_dir).series("train", "loss")[1][0])


@pytest.mark.parametrize("torn", ['{"kind": "tra', '{"kind": "train"}'])
def test_a_line_torn_by_a_kill_does_not_spoil_the_next(log: MetricsLogger, torn: str) -> None:
    (log.log_dir / "metrics.jsonl").write_text(torn)
    log_step(log, 8, loss=1.0)
    first, second = (log.log_dir / "metrics.jsonl").read_text().splitlines()
    assert (first, json.loads(second)["step"]) == (torn, 8)
    assert metrics.parse_row(first) is None
    assert metrics.parse_row(second) == json.loads(second)


def test_a_terminal_shows_a_live_line_a_file_all(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    keyboard, screen = pty.openpty()
    termios.tcsetwinsize(screen, (24, 80))
    with open(screen, "w", encoding="utf-8") as terminal, (tmp_path / "out").open("w") as file:
        for stream in (terminal, file):
            monkeypatch.setattr(sys, "stdout", stream)
            log = new_logger(tmp_path)
            for step in range(4):
                log_step(log, step, loss=0.5)
            log.print("validation")
            log.close()
    lines = (tmp_path / "out").read_text().splitlines()
    assert len(lines) == 5
    assert lines[1].startswith("step     1/4 | loss  0.5000")
    assert lines[3].endswith("00:00 left")
    shown = b""
    with suppress(OSError):  # raised at the end of what was written
        while True:
            shown += os.read(keyboard, 4096)
    assert shown.count(b"\n") == 2  # of the line that stays, and of the bar's end
    assert "█████      step     1/4 | loss  0.5000" in shown.decode()
    assert all(len(part) < 80 for part in shown.decode().split("\r"))


def test_a_console_that_is_closed_ends_nothing(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    keyboard, screen = pty.openpty()
    terminal = open(screen, "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", terminal)
    log = new_logger(tmp_path)
    os.close(keyboard)  # from now on writing is an OSError
    log_step(log, 0, loss=0.5)
    log.print("hello")
    with suppress(OSError):
        terminal.close()  # and from now on a ValueError
    log_step(log, 1, loss=0.5)
    log.close()
    assert len(read_rows(log)) == 2


def test_tracker_files_hold_what_was_written(log: MetricsLogger, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    log.start(0, config={}, tensorboard=True, wandb=True)
    for step in range(3):
        log.write("train", step, {"loss": 5.0 - step, "mfu": None})
    log.write("val", 3, {"loss": 0.5, "note": "text is not a scalar"})
    log.close()
    events = EventAccumulator(str(log.log_dir / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss", "val/loss"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(0, 5), (1, 4), (2, 3)]
    wandb.teardown()  # its service may still be writing when finish() has returned
    (file,) = log.log_dir.glob("wandb/offline-run-*/*.wandb")
    # Protobuf: a name, the next field's number and length, its JSON. The summary repeats values.
    losses = re.findall(rb"train/loss\x82\x01.([\d.]+)", file.read_bytes(), re.DOTALL)
    assert [float(loss) for loss in dict.fromkeys(losses)] == [5.0, 4.0, 3.0]


def test_a_tracker_that_fails_is_reported_once(log: MetricsLogger, capsys: Capture) -> None:
    fail = Mock(side_effect=RuntimeError("no network\nand a second line"))
    working = Mock()
    log.trackers = [Mock(log=fail), Mock(finish=fail), working]
    for step in range(3):
        log.write("train", step, {"loss": 1.0})
    message = "Mock: no network; training continues without this tracker\n"
    assert capsys.readouterr().out == message
    log.close()
    assert capsys.readouterr().out == message
    assert (working.log.call_count, working.finish.call_count) == (3, 1)
    assert len(read_rows(log)) == 3


def test_wandb_that_cannot_start_names_the_remedy(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "init", Mock(side_effect=wandb.Error("No API key configured.\nB")))
    with pytest.raises(ValueError, match=r"^--wandb: No API key configured\.; run `wandb login`"):
        metrics.start_wandb(tmp_path, {})


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA GB300", 2500.0),
        ("NVIDIA B300 SXM6 AC", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA GH200 144G HBM3e", 989.4),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H20", None),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("A100-PCIE-40GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("GRID A100-40C", None),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA A10", None),
        ("NVIDIA A40", 149.7),
        ("NVIDIA A40-48Q", None),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40", None),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("Quadro RTX 6000", None),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", None),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA GeForce RTX 5090 D", None),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4080 SUPER", 104.4),
        ("NVIDIA GeForce RTX 4080", 97.5),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 88.2),
        ("NVIDIA GeForce RTX 4070 Ti", 80.2),
        ("NVIDIA GeForce RTX 4070", None),
        ("GeForce RTX 3090", 71.0),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 3080", 59.5),
        ("NVIDIA GeForce RTX 3080 Ti", None),
        ("NVIDIA GeForce GTX 1080", None),
        ("AMD Instinct MI300X", 1307.4),
        ("AMD Instinct MI300A", None),
        ("AMD Instinct MI250X", 191.5),
        ("AMD Instinct MI250", 181.05),
        ("AMD Instinct MI250X / MI250", 191.5),
        ("", None),
    ],
)
def test_mfu_uses_the_peak_of_that_very_device(name: str, tflops: float | None) -> None:
    peaks = [metrics.peak_flops(name, dtype) for dtype in ("bfloat16", "float16", "float32")]
    expected = None if tflops is None else pytest.approx(tflops * 1e12)
    assert peaks == [expected, expected, None]
    if tflops is not None:
        assert metrics.peak_flops(name, "bfloat16", devices=8) == pytest.approx(8 * tflops * 1e12)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("Tesla T4", 65.0),
        ("Tesla V100-SXM2-16GB", 125.0),
        ("Tesla V100-PCIE-32GB", 112.0),
        ("Tesla V100S-PCIE-32GB", None),
    ],
)
def test_a_card_without_bf16_has_a_peak_in_fp16_only(name: str, tflops: float | None) -> None:
    assert metrics.peak_flops(name, "float16") == (tflops and tflops * 1e12)
    assert metrics.peak_flops(name, "bfloat16") is None


def test_only_a_gpu_that_should_have_an_mfu_and_has_none_is_said() -> None:
    cuda = torch.device("cuda")
    for dtype in ("bfloat16", "float16"):
        message = metrics.unknown_peak(cuda, "NVIDIA L40", dtype)
        assert message is not None
        assert "NVIDIA L40" in message
        assert dtype in message
        assert metrics.unknown_peak(cuda, "NVIDIA L4", dtype) is None
        assert metrics.unknown_peak(CPU, "AMD EPYC", dtype) is None
    assert metrics.unknown_peak(cuda, "NVIDIA L40", "float32") is None
    assert metrics.unknown_peak(cuda, "Tesla T4", "float16") is None
    assert metrics.unknown_peak(cuda, "Tesla T4", "bfloat16") is not None


def test_the_start_of_a_run_names_versions_and_commit(log: MetricsLogger) -> None:
    log.start(0, config={"seed": 7}, tensorboard=False, wandb=False, dtype="fp32")
    (row,) = read_rows(log)
    assert (row["kind"], row["config"], row["dtype"]) == ("run", {"seed": 7}, "fp32")
    assert row["versions"]["torch"] == torch.__version__
    assert row["git_commit"] == metrics.git_commit()


def test_the_commit_is_that_of_the_scripts(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    for name in ("metrics.py", "common.py"):
        shutil.copy(Path(metrics.__file__).with_name(name), tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    ask = f"'{sys.executable}' -c 'import metrics; print(metrics.git_commit())'"
    assert getoutput(ask) == "None"  # not in a repository
    getoutput("git init; git -c user.name=a -c user.email=a@b commit --allow-empty -m a")
    assert getoutput(ask) == getoutput("git rev-parse HEAD")
    monkeypatch.setenv("PATH", "")
    assert getoutput(ask) == "None"  # git is not installed


def test_this_machine_has_a_name_and_a_peak_of_memory(monkeypatch: MonkeyPatch) -> None:
    assert metrics.device_name(CPU)
    assert 0.05 < metrics.peak_memory_gb(CPU) < 1000
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert math.isnan(metrics.peak_memory_gb(CPU))
