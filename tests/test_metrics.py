"""What a run reports: lines that survive faults, a line a step, and the trackers' own readers."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import wandb
from launcher import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gptxs import metrics
from gptxs.metrics import MetricsLogger, StepStats, peak_flops

Capture = pytest.CaptureFixture[str]
MonkeyPatch = pytest.MonkeyPatch
NO_SPACE = OSError(28, "No space left on device")


def new_logger(log_dir: Path, enabled: bool = True) -> MetricsLogger:
    sizes: dict[str, Any] = {"world_size": 8, "max_steps": 4}
    sizes |= {"tokens_per_step": 100, "flops_per_step": 50}
    return MetricsLogger(log_dir, enabled, torch.device("cpu"), torch.bfloat16, **sizes)


@pytest.fixture
def log(tmp_path: Path) -> MetricsLogger:
    return new_logger(tmp_path)


def start(log: MetricsLogger, step: int = 0, **trackers: bool) -> None:
    row = {"config": {"seed": 7, "model": {"clip": math.inf}}, "parameters": 3}
    log.start(step, row, **{"tensorboard": False, "wandb": False, **trackers})


def log_step(
    log: MetricsLogger, step: int, loss: float, norm: float = 1.0, stop: float = 0, scale: float = 1
) -> StepStats:
    log.log_step(step, lr=0.5, stats=torch.tensor([loss, stop, norm, scale]))
    (stats,) = log.read_steps(wait=False)
    return stats


def rows(log: MetricsLogger) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (log.log_dir / "metrics.jsonl").open()]


def test_a_step_is_a_row_and_a_line_with_its_speed_and_the_time_left(
    tmp_path: Path, monkeypatch: MonkeyPatch, capsys: Capture
) -> None:
    clock = Mock(return_value=100.0)
    monkeypatch.setattr(metrics.time, "perf_counter", clock)
    monkeypatch.setattr(metrics, "device_name", lambda device: "NVIDIA L4")
    log = new_logger(tmp_path)
    start(log)
    for step in range(4):
        with log.timed("val", step) as row:
            row["loss"] = 2.25
            clock.return_value += 1000  # which is not a part of the step
        with log.timed("checkpoint", step):
            pass  # has nothing to report
        clock.return_value += 3600
        log_step(log, step, loss=2.5, norm=0.25)
    val, train = [row for row in rows(log) if row["step"] == 1]
    evaluated = {"kind": "val", "loss": 2.25, "seconds": 1000.0}
    assert val == {"step": 1, "time": val["time"], **evaluated}
    expected = {"kind": "train", "loss": 2.5, "z": 0.0, "lr": 0.5, "grad_norm": 0.25, "ms": 3.6e6}
    expected |= {"tokens_per_s": 100 / 3600, "mfu": 50 / 3600 / (8 * 121e12)}
    assert train == {"step": 1, "time": train["time"], "memory_gb": train["memory_gb"], **expected}
    assert 0.05 < train["memory_gb"] < 1000
    lines = [line for line in capsys.readouterr().out.splitlines() if "lr" in line]
    assert [line.split(" | ")[0] for line in lines] == [f"step     {n}/4" for n in range(4)]
    assert [line.split(" | ")[-1] for line in lines] == [f"{3 - n}:00:00 left" for n in range(4)]


def test_a_spike_has_a_high_z_score(log: MetricsLogger) -> None:
    for step, loss in enumerate([5.0] * 20 + [6.0] * 20 + [8.0]):
        log_step(log, step, loss)
    assert [row["z"] for row in rows(log)[:20]] == [0.0] * 20  # too few, or no deviation
    assert rows(log)[40]["z"] == pytest.approx((8 - 5.5) / 0.5)


def test_the_loop_is_told_what_was_read(log: MetricsLogger) -> None:
    overflow = log_step(log, 7, loss=2.0, norm=math.inf, scale=1024.0)  # the next scale is half
    bad_loss = log_step(log, 8, loss=math.nan, norm=math.nan, scale=1024.0)
    bad_norm = log_step(log, 9, loss=3.0, norm=math.inf, stop=0.5)
    assert overflow == StepStats(7, 2.0, math.inf, False, 1024.0, skipped=True, overflow=True)
    assert bad_norm == StepStats(9, 3.0, math.inf, True, 1.0, skipped=True, overflow=False)
    assert (bad_loss.skipped, bad_loss.overflow) == (True, False)
    assert [row["loss"] for row in rows(log)] == [2.0, None, 3.0]  # JSON has no NaN
    assert log.losses == [2.0, 3.0]


def log_gpu_step(log: MetricsLogger, step: int, stop: float = 0) -> list[int]:
    """A step whose numbers a GPU has still to copy: the steps that are read after it."""
    copy = Mock(return_value=torch.tensor([step, stop, 1.0, 1.0]))
    log.log_step(step, lr=0.5, stats=Mock(device=torch.device("cuda"), to=copy))
    copy.assert_called_once_with("cpu", non_blocking=True)
    return [stats.step for stats in log.read_steps(wait=False)]


def test_a_gpu_step_is_read_one_step_late(log: MetricsLogger, monkeypatch: MonkeyPatch) -> None:
    arrivals = [Mock(**{"query.side_effect": [False, True]}) for _ in range(5)]
    stream = Mock(record_event=Mock(side_effect=arrivals))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    assert [log_gpu_step(log, step) for step in range(3)] == [[], [0], [1]]
    assert [stats.step for stats in log.read_steps(wait=True)] == [2]
    assert [log_gpu_step(log, step, stop=1.0) for step in (3, 4)] == [[], [3, 4]]
    assert [(row["step"], row["loss"]) for row in rows(log)] == [(n, n) for n in range(5)]
    assert not any(arrived.synchronize.called for arrived in arrivals)  # which no signal ends


def test_only_rank_0_writes_and_all_read(tmp_path: Path, capsys: Capture) -> None:
    log = new_logger(tmp_path, enabled=False)
    start(log, tensorboard=True, wandb=True)
    assert log_step(log, 0, loss=1.0, stop=1.0).stop
    assert (list(tmp_path.iterdir()), capsys.readouterr().out) == ([], "")


def test_lines_that_are_none_are_counted_and_spoil_no_other(log: MetricsLogger) -> None:
    path = log.log_dir / "metrics.jsonl"
    good = '{"kind": "val", "step": 3, "loss": NaN, "more": [Infinity]}'
    bad = ["[3]", "3", "null", '{"kind": "val"}', '{"kind": 3, "step": 3}', "[" * 100_000]
    bad += ['{"kind": "val", "step": 3.0}', '{"kind": "val", "step": true}', '{"kind": "tra\u00e4']
    path.write_bytes("\n".join(["", good, " ", *bad]).encode()[:-1])  # killed in a character
    log_step(log, 8, loss=1.0)
    found, unreadable = metrics.read_rows(path)
    assert [(row["kind"], row["step"]) for row in found] == [("val", 3), ("train", 8)]
    assert math.isnan(found[0]["loss"])
    assert unreadable == len(bad)


def test_a_full_disk_is_said_and_the_next_line_that_fits_is_whole(
    log: MetricsLogger, monkeypatch: MonkeyPatch, capsys: Capture
) -> None:
    log_step(log, 0, loss=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", Mock(side_effect=NO_SPACE))
        log_step(log, 1, loss=1.0)
    assert "No space left on device" in capsys.readouterr().out
    with (log.log_dir / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')  # what still fitted
    log_step(log, 2, loss=1.0)
    found, unreadable = metrics.read_rows(log.log_dir / "metrics.jsonl")
    assert ([row["step"] for row in found], unreadable) == ([0, 2], 1)


def test_a_full_console_ends_nothing(log: MetricsLogger, monkeypatch: MonkeyPatch) -> None:
    closed = (log.log_dir / "out").open("w")
    closed.close()
    full = Mock(write=Mock(side_effect=NO_SPACE))
    for step, stream in enumerate((closed, full, None)):
        monkeypatch.setattr(sys, "stdout", stream)
        log_step(log, step, loss=0.5)
    assert len(rows(log)) == 3


def log_losses(folder: Path, first: int, losses: list[float], **trackers: bool) -> None:
    """A process that logs these losses, with the steps from ``first`` on, to a tracker."""
    log = new_logger(folder)
    start(log, first, **trackers)
    for step, loss in enumerate(losses, first):
        log.write("train", step, {"loss": loss, "mfu": None, "note": "no scalar"})
    log.close()


def test_after_a_resume_tensorboard_has_each_step_once(tmp_path: Path) -> None:
    log_losses(tmp_path, 0, [5.0, 4.0, 3.0, 2.0], tensorboard=True)
    log_losses(tmp_path, 2, [1.0, 0.5], tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    expected = [(0, 5.0), (1, 4.0), (2, 1.0), (3, 0.5)]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == expected


def test_a_resumed_run_goes_on_in_wandb(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for first, losses in ((0, [5.0, 4.0, 3.0]), (2, [2.5])):
        log_losses(tmp_path, first, losses, wandb=True)
        wandb.teardown()  # its service may still be writing when finish() has returned
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert {file.stem for file in files} == {f"run-{(tmp_path / 'wandb_id').read_text()}"}
    # Protobuf: a name, the next field's number and length, its JSON. The summary repeats values.
    found = b"".join(file.read_bytes() for file in files)
    logged = re.findall(rb"train/loss\x82\x01.([\d.]+)", found, re.DOTALL)
    assert [float(loss) for loss in dict.fromkeys(logged)] == [5.0, 4.0, 3.0, 2.5]


def test_a_tracker_that_fails_is_reported_once(log: MetricsLogger, capsys: Capture) -> None:
    fail = Mock(side_effect=RuntimeError("no network\nand a second line"))
    working = Mock()
    log._trackers = [Mock(log=fail), Mock(finish=fail), working]
    for step in range(3):
        log.write("train", step, {"loss": 1.0})
    log.close()
    message = "Mock: no network; training continues without this tracker\n"
    assert capsys.readouterr().out == message * 2
    assert (working.log.call_count, working.finish.call_count) == (3, 1)
    assert len(rows(log)) == 3


@pytest.mark.parametrize(
    ("tflops", "devices"),
    [
        (989.4, "NVIDIA GH200 480GB; NVIDIA H200; NVIDIA H100 80GB HBM3"),
        (312.0, "NVIDIA A100-SXM4-80GB; NVIDIA A100-PCIE-40GB; NVIDIA A100 80GB PCIe"),
        (165.2, "NVIDIA GeForce RTX 4090"),
        (None, "NVIDIA H200 NVL; NVIDIA H100 80GB HBM3 MIG 1g.10gb; NVIDIA A10; AMD EPYC; "),
        (None, "NVIDIA GeForce RTX 4090 Laptop GPU; NVIDIA GeForce RTX 3090 Ti; GRID A100-40C"),
    ],
)
def test_mfu_uses_the_peak_of_that_very_device(tflops: float | None, devices: str) -> None:
    for name in devices.split("; "):
        assert peak_flops(name, "bfloat16", devices=8) == (tflops and 8 * tflops * 1e12)
        assert peak_flops(name, "float32", devices=8) is None


def test_a_run_names_its_versions_and_commit(log: MetricsLogger, monkeypatch: MonkeyPatch) -> None:
    start(log)
    commit = metrics.git_commit()
    monkeypatch.setenv("PATH", "")  # git is not installed
    start(log)
    assert [row["git_commit"] for row in rows(log)] == [commit, None]
    for row in rows(log):
        assert row["config"] == {"seed": 7, "model": {"clip": None}}  # JSON has no infinity
        assert (row["kind"], row["dtype"], row["world_size"]) == ("run", "bfloat16", 8)
        assert row["versions"]["torch"] == torch.__version__
        assert row["device"]


def test_what_plots_need_does_not_wait_for_torch() -> None:
    code = "import sys, gptxs.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
