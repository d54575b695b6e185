"""What a run tells: lines that survive faults, a live line, and the trackers' own readers."""

import io
import json
import math
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import metrics
import plot
from metrics import Metrics


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_each_write_is_a_line_with_its_kind_step_and_time(tmp_path: Path) -> None:
    log = Metrics(tmp_path, enabled=True)
    log.write("train", 3, loss=2.5, mfu=None)
    log.write("val", 3, loss=2.25)
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (first["kind"], first["step"], first["loss"], first["mfu"]) == ("train", 3, 2.5, None)
    assert second["kind"] == "val"
    assert first["time"] <= second["time"]


def test_only_rank_0_writes_and_speaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = Metrics(tmp_path, enabled=False)
    log.write("train", 0, loss=1.0)
    log.say("hello")
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_a_line_is_json_in_any_language_and_the_console_shows_what_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Metrics(tmp_path, enabled=True)
    log.write("run", 0, config={"grad_clip": math.inf, "model": {"d_model": 64}})
    numbers = dict.fromkeys(("z", "lr", "tokens_per_s", "memory_gb"), 0.5)
    log.train_step(0, 4, loss=math.nan, grad_norm=-math.inf, mfu=None, ms=1e3, **numbers)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    run, train = (json.loads(line, parse_constant=refuse) for line in text.splitlines())
    assert run["config"] == {"grad_clip": None, "model": {"d_model": 64}}
    assert (train["loss"], train["grad_norm"], train["lr"]) == (None, None, 0.5)
    assert "loss     nan" in capsys.readouterr().out
    assert np.isnan(plot.read_metrics(tmp_path).series("train", "loss")[1]).tolist() == [True]


@pytest.mark.parametrize("torn", ['{"kind": "tra', '{"kind": "train"}'])
def test_a_line_torn_by_a_kill_does_not_spoil_the_next(tmp_path: Path, torn: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(torn)
    Metrics(tmp_path, enabled=True).write("train", 8, loss=1.0)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[0] == torn
    assert json.loads(lines[1])["step"] == 8


def test_metrics_that_cannot_be_written_are_said_once_and_end_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    log = Metrics(tmp_path / "file", enabled=True)  # a folder that cannot be
    for step in range(3):
        log.write("train", step, loss=1.0)
    assert capsys.readouterr().out.count("training goes on without these metrics") == 1


def test_a_terminal_shows_one_live_line_and_a_file_one_line_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, filed = Terminal(), io.StringIO()
    for stream in (shown, filed):
        monkeypatch.setattr(sys, "stdout", stream)
        log = Metrics(tmp_path, enabled=True)
        for step in range(4):
            numbers = dict.fromkeys(("loss", "z", "lr", "grad_norm", "tokens_per_s"), 0.5)
            log.train_step(step, 4, **numbers, ms=1e3, mfu=0.4, memory_gb=1.0)
        log.say("validation")
    assert filed.getvalue().count("\n") == 5
    assert "mfu 40.0% | 1.0 GB | 0:00:02 left" in filed.getvalue()
    assert shown.getvalue().count("\n") == 1  # only what stays ends its line
    assert "█████░░░░░ step     1/4 | loss  0.5000" in shown.getvalue()
    assert all(len(part) <= 80 for part in shown.getvalue().split("\r\x1b[K"))


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = Metrics(tmp_path, enabled=True)
    log.trackers = metrics.trackers(tmp_path, {}, tensorboard=True, wandb=False)
    for step in range(5):
        log.write("train", step, loss=5.0 - step, mfu=None)
    log.write("val", 5, loss=0.5, note="text is not a scalar")
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss", "val/loss"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (step, 5.0 - step) for step in range(5)
    ]


def wandb_records(file: Path) -> Iterator[Any]:
    """The messages of a .wandb file: LevelDB's log format, in blocks of 32 KiB, after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, message = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too little for a header: the block is padded
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield Record.FromString(message)
            message = b""


def test_wandb_offline_holds_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = Metrics(tmp_path, enabled=True)
    log.trackers = metrics.trackers(tmp_path, {"seed": 7}, tensorboard=False, wandb=True)
    for step in range(3):
        log.write("train", step, loss=5.0 - step)
    log.close()
    wandb.teardown()  # its service may still be writing when finish() has returned
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    items = [item for record in wandb_records(file) for item in record.history.item]
    losses = [i.value_json for i in items if (i.key or "/".join(i.nested_key)) == "train/loss"]
    assert [json.loads(loss) for loss in losses] == [5.0, 4.0, 3.0]


def test_a_tracker_that_fails_is_said_once_and_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def log(self, numbers: dict[str, float], step: int) -> None:
            raise RuntimeError("no network\nand a second line")

    log = Metrics(tmp_path, enabled=True)
    log.trackers = [Broken(), *metrics.trackers(tmp_path, {}, tensorboard=True, wandb=False)]
    for step in range(3):
        log.write("train", step, loss=1.0)
    assert [type(tracker).__name__ for tracker in log.trackers] == ["TensorBoard"]
    log.close()
    assert capsys.readouterr().out.count("Broken: no network; training goes on") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_tracker_that_cannot_finish_keeps_no_other_from_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def finish(self) -> None:
            raise RuntimeError("no network")

    finished: list[str] = []
    log = Metrics(tmp_path, enabled=True)
    log.trackers = [Broken(), SimpleNamespace(finish=lambda: finished.append("the other"))]
    log.close()
    assert finished == ["the other"]
    assert capsys.readouterr().out.startswith("Broken: no network; training goes on")


def test_a_wandb_that_cannot_start_is_one_line_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def no_login(**_: Any) -> None:
        raise wandb.Error("No API key configured.\nSecond line")

    monkeypatch.setattr(wandb, "init", no_login)
    with pytest.raises(ValueError, match=r"^--wandb: No API key configured\.; run `wandb login`"):
        metrics.trackers(tmp_path, {}, tensorboard=False, wandb=True)


def test_mfu_uses_the_devices_own_peak_or_none() -> None:
    assert metrics.peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert metrics.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert metrics.peak_flops("NVIDIA L40S") == 362.05e12
    assert metrics.peak_flops("NVIDIA GeForce GTX 1080") is None


def test_provenance_names_versions_and_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert metrics.provenance()["versions"]["torch"] == torch.__version__
    monkeypatch.setattr(
        metrics.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout="abc123\n")
    )
    assert metrics.provenance()["git_commit"] == "abc123"


def test_without_git_there_is_no_commit_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert metrics.provenance()["git_commit"] is None


def test_this_machine_has_a_name_and_a_peak_of_memory() -> None:
    cpu = torch.device("cpu")
    assert metrics.device_name(cpu)
    assert 0.05 < metrics.peak_memory_gb(cpu) < 1000
