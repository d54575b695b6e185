"""plot.py: what is read from a log, what is drawn, what the report says, and the command line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import plot

BATCH = 1024
Row = dict[str, Any]


def start(step: int = 0, time: float = 1000.0, **changes: Any) -> Row:
    config = {"preset": "gpt-xs", "batch_tokens": BATCH, "max_steps": 200, "device": "auto"}
    config["model"] = {"d_model": 768, "n_layers": 12}
    row = {"kind": "run", "step": step, "time": time, "config": config, "parameters": 124082688}
    row |= {"device": "NVIDIA H100", "world_size": 8, "versions": {"torch": "2.13.0"}}
    return row | {"git_commit": "0123abc", "resumed_from": None} | changes


def train(step: int, loss: float, time: float, **changes: Any) -> Row:
    row = {"kind": "train", "step": step, "time": time, "loss": loss, "lr": 6e-4 / (step + 1)}
    row |= {"grad_norm": 1.5, "ms": 100.0, "tokens_per_s": 10240.0, "mfu": 0.4, "memory_gb": 3.0}
    return row | changes


def val(step: int, loss: float, time: float) -> Row:
    return {"kind": "val", "step": step, "time": time, "loss": loss, "tokens": 77, "seconds": 2.0}


def a_run(steps: int = 200, preset: str = "gpt-xs", seed: int = 0) -> list[Row]:
    """A run such as train.py logs: a power law with noise, 0.1 s a step, the first one 30 s."""
    noise = np.random.default_rng(seed).normal(0, 0.05, steps)
    rows, now = [start()], 1000.0
    rows[0]["config"]["preset"] = preset
    for step in range(steps + 1):
        loss = 3.0 + 7.9 * (1 + step) ** -0.4
        if step % 50 == 0:
            now += 2.0
            rows.append(val(step, loss, now))
            accuracy = 0.25 + 0.08 * step / steps
            scores = {"acc": accuracy - 0.01, "acc_norm": accuracy, "n": 400, "seconds": 4.0}
            now += 4.0
            rows.append({"kind": "hellaswag", "step": step, "time": now, **scores})
        if step < steps:
            ms = 30_000.0 if step == 0 else 100.0
            now += ms / 1000
            rows.append(train(step, loss + noise[step], now, ms=ms))
    sample = {"kind": "sample", "step": steps, "time": now, "prompt": "Hello", "text": "Hello\nyou"}
    return [*rows, sample]


@pytest.fixture
def log(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: list[Row], name: str = "log", tail: str = "") -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows) + tail
        (folder / "metrics.jsonl").write_text(text)
        return folder

    return write


def drawn(*folders: Path, x: plot.XAxis = "steps", smooth: int | None = None) -> list[Axes]:
    """The figure's axes: loss, HellaSwag, learning rate, tokens/s, gradient norm, MFU."""
    figure = Figure()
    plot.draw(figure, [plot.read_metrics(folder) for folder in folders], x, smooth)
    return figure.axes


def line(ax: Axes, label: str) -> tuple[list[float], list[float]]:
    (found,) = [line for line in ax.lines if line.get_label() == label]
    return [list(map(float, data)) for data in found.get_data()]


def references(ax: Axes) -> list[float]:
    return sorted(ln.get_ydata()[0] for ln in ax.lines if ":" not in ln.get_label())


# ---------------------------------------------------------------- reading


def test_the_last_line_for_a_step_counts(log: Callable[..., Path]) -> None:
    rows = [start(), val(0, 9.0, 1001), val(5, 8.0, 1002), val(0, 7.0, 1003)]
    assert plot.read_metrics(log(rows)).series("val", "loss")[1].tolist() == [7.0, 8.0]


def test_a_resumed_run_takes_back_the_steps_beyond_its_checkpoint(log: Callable[..., Path]) -> None:
    rows = [start(), *(train(s, 10.0 + s, 1001.0 + s) for s in range(6)), val(2, 5.0, 1010)]
    rows += [start(2, 2000.0, resumed_from="step_000002"), train(2, 1.0, 2001), train(3, 2.0, 2002)]
    metrics = plot.read_metrics(log(rows))
    steps, losses = metrics.series("train", "loss")
    assert steps.tolist() == [0, 1, 2, 3]
    assert losses.tolist() == [10.0, 11.0, 1.0, 2.0]
    assert metrics.series("val", "loss")[1].tolist() == [5.0]
    assert metrics.notes == ["resumed from step_000002"]


def test_hours_leave_out_the_pause_between_two_processes(log: Callable[..., Path]) -> None:
    rows = [start(), train(0, 9.0, 1036), start(1, 90_000.0, resumed_from="step_000001")]
    hours, _ = plot.read_metrics(log([*rows, train(1, 8.0, 90_072)])).series(
        "train", "loss", "hours"
    )
    assert hours == pytest.approx([0.01, 0.03])


def test_a_fresh_start_in_the_same_file_is_another_run(log: Callable[..., Path]) -> None:
    rows = [
        start(),
        train(0, 9.0, 1001),
        train(1, 8.0, 1002),
        start(0, 5000.0),
        train(0, 7.0, 5036),
    ]
    metrics = plot.read_metrics(log(rows))
    assert metrics.series("train", "loss")[1].tolist() == [7.0]
    assert metrics.hours == pytest.approx(0.01)


@pytest.mark.parametrize("tail", ['{"kind": "train", "st', '{"kind"', "\ufffd", "[1, 2]", "{}\n"])
def test_a_torn_last_line_is_left_out_and_said(log: Callable[..., Path], tail: str) -> None:
    metrics = plot.read_metrics(log([start(), train(0, 9.0, 1001)], tail=tail))
    assert metrics.series("train", "loss")[1].tolist() == [9.0]
    assert metrics.notes == ["torn or unreadable lines left out: 1"]


def test_a_run_resumed_after_a_torn_line_is_read(log: Callable[..., Path]) -> None:
    again = [start(1, 2000.0, resumed_from="step_000001"), train(1, 8.0, 2001.0)]
    tail = '{"kind": "train", "step": 1, "lo\n' + "\n".join(map(json.dumps, again))
    metrics = plot.read_metrics(log([start(), train(0, 9.0, 1001)], tail=tail))
    assert metrics.series("train", "loss")[1].tolist() == [9.0, 8.0]
    assert metrics.notes == ["torn or unreadable lines left out: 1", "resumed from step_000001"]


def test_a_loss_that_is_not_finite_is_a_gap_and_said(log: Callable[..., Path]) -> None:
    losses = [9.0, math.nan, 7.0, math.inf] + [6.0] * 200
    folder = log([start(), *(train(s, loss, 1001.0 + s) for s, loss in enumerate(losses))])
    assert plot.read_metrics(folder).notes == ["steps without a finite loss: 2, first 1"]
    loss, *_ = drawn(folder)
    assert np.isnan(line(loss, "log: loss, each step")[1][1])
    assert np.isfinite(line(loss, "log: loss")[1]).all()
    assert np.isfinite(loss.get_ylim()).all()


def test_a_log_of_build_nanogpt_is_read(tmp_path: Path) -> None:
    lines = (
        "0 val 10.9500\n0 hella 0.2463\n0 train 10.955349\n250 val 5.9000\n1 train 10.5\n2 train 9."
    )
    (tmp_path / "log.txt").write_text(lines)
    metrics = plot.read_metrics(tmp_path)
    assert metrics.series("val", "loss")[0].tolist() == [0, 250]
    assert metrics.series("val", "loss", "tokens")[0].tolist() == [0, 250 * 524_288]
    assert metrics.series("hellaswag", "acc_norm")[1].tolist() == [0.2463]
    # The last line has lost its end, perhaps in the middle of the number.
    assert metrics.series("train", "loss")[1].tolist() == [10.955349, 10.5]
    assert metrics.notes == ["torn or unreadable lines left out: 1"]


# ---------------------------------------------------------------- the picture


def test_the_lines_drawn_are_the_numbers_logged(log: Callable[..., Path]) -> None:
    rows = a_run()
    loss, hella, rate, speed, norm, mfu, *_ = drawn(log(rows))
    logged = [row for row in rows if row["kind"] == "train"]
    steps = [row["step"] for row in logged]
    for ax, label, name in (
        (loss, "log: loss, each step", "loss"),
        (rate, "log: lr", "lr"),
        (speed, "log: tokens_per_s, each step", "tokens_per_s"),
        (norm, "log: grad_norm, each step", "grad_norm"),
        (mfu, "log: mfu", "mfu"),
    ):
        assert line(ax, label) == [steps, [row[name] for row in logged]]
    vals = [row for row in rows if row["kind"] == "val"]
    assert line(loss, "log: val") == [[0, 50, 100, 150, 200], [row["loss"] for row in vals]]
    assert line(hella, "log: hellaswag")[1] == pytest.approx([0.25, 0.27, 0.29, 0.31, 0.33])


def test_smoothing_is_a_centred_mean_and_zero_switches_it_off(log: Callable[..., Path]) -> None:
    folder = log(a_run())
    losses = plot.read_metrics(folder).series("train", "loss")[1]
    loss, *_ = drawn(folder, smooth=5)
    smooth = line(loss, "log: loss")[1]
    assert smooth[100] == pytest.approx(losses[98:103].mean())
    assert np.std(np.diff(smooth)) < np.std(np.diff(losses))
    loss, *_ = drawn(folder, smooth=0)
    assert [ln.get_label() for ln in loss.lines[:2]] == ["log: loss", "log: val"]
    assert line(loss, "log: loss")[1] == losses.tolist()


@pytest.mark.parametrize(("x", "last"), [("steps", 200), ("tokens", 200 * BATCH), ("hours", 0.022)])
def test_the_horizontal_axis(log: Callable[..., Path], x: plot.XAxis, last: float) -> None:
    loss, _, rate, *_ = drawn(log(a_run()), x=x)
    assert line(loss, "log: val")[0][-1] == pytest.approx(last, rel=0.05)
    assert rate.get_xlabel() == x
    tokens_above = [axis.get_xlabel() for axis in loss.child_axes]
    assert tokens_above == (["tokens"] if x == "steps" else [])


def test_the_second_axis_counts_tokens(log: Callable[..., Path]) -> None:
    loss, *_ = drawn(log(a_run()))
    loss.figure.draw_without_rendering()
    low, high = loss.get_xlim()
    assert loss.child_axes[0].get_xlim() == pytest.approx((low * BATCH, high * BATCH))


def test_several_runs_lie_over_each_other_and_differ_without_colour(
    log: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "lineage").mkdir()
    (tmp_path / "lineage/log.txt").write_text(
        "0 val 10.9\n100 val 6.0\n0 hella 0.25\n0 train 11.0\n"
    )
    folders = [log(a_run(seed=0), "one"), log(a_run(seed=1), "two"), tmp_path / "lineage"]
    loss, hella, *_ = drawn(*folders)
    assert line(loss, "one: val")[1] == line(loss, "two: val")[1]
    assert line(loss, "one: loss")[1] != line(loss, "two: loss")[1]
    assert line(loss, "lineage: val") == [[0, 100], [10.9, 6.0]]
    marks = [ln for ln in hella.lines if ":" in ln.get_label()]
    assert len({ln.get_marker() for ln in marks}) == 3
    (names,) = loss.figure.legends
    assert [text.get_text() for text in names.get_texts()] == ["one", "two", "lineage"]


def test_published_figures_are_drawn_and_named(log: Callable[..., Path]) -> None:
    loss, hella, *_ = drawn(log(a_run()))
    assert references(hella) == [0.25, 0.2955, 0.337]
    assert references(loss) == [3.2924]
    named = " ".join(text.get_text() for text in (*hella.texts, *loss.texts))
    for what in ("GPT-2\n124M\n0.2955", "GPT-3\n124M\n0.337", "chance\n0.25", "FineWeb-Edu"):
        assert what in named


def test_a_quickstart_has_no_reference_loss_as_its_text_is_another(
    log: Callable[..., Path],
) -> None:
    loss, hella, *_ = drawn(log(a_run(preset="quickstart")))
    assert references(loss) == []
    assert len(references(hella)) == 3


def test_the_frame_shows_the_end_of_the_loss_and_not_only_its_fall(
    log: Callable[..., Path],
) -> None:
    loss, *_ = drawn(log(a_run()))
    low, high = loss.get_ylim()
    end = line(loss, "log: loss")[1][-1]
    assert low < 3.2924 < end < high < 8.0


def test_what_a_run_has_not_logged_is_said(log: Callable[..., Path]) -> None:
    rows = [start(), *(train(s, 9.0, 1001.0 + s, mfu=None) for s in range(5))]
    _, hella, _, speed, _, mfu, *_ = drawn(log(rows))
    assert hella.get_ylabel() == "HellaSwag acc_norm: not logged"
    assert mfu.get_ylabel() == "MFU (thin): not logged"
    assert speed.get_ylabel() == "tokens/s (thick)"


# ---------------------------------------------------------------- the report


def test_every_number_of_the_report_is_from_the_run(log: Callable[..., Path]) -> None:
    rows = a_run()
    folder = log(rows)
    plot.plot_run(folder)
    text = (folder / "report.md").read_text()
    recent = np.mean([row["loss"] for row in rows if row["kind"] == "train"][-100:])
    error = math.sqrt(0.33 * 0.67 / 400)
    for part in (
        "![curves](plot.png)",
        f"| training loss, last 100 steps | {recent:.4f} |  |  |",
        f"| validation loss, step 200 | {3.0 + 7.9 * 201**-0.4:.4f} | 3.2924 |  |",
        f"| HellaSwag acc_norm, step 200, 400 examples | 0.3300 ± {error:.4f} | 0.2955 | 0.337 |",
        "| steps | 200 of 200 |  |  |",
        f"| training tokens | {200 * BATCH:,} |  |  |",
        "| tokens/s, median | 10,240 |",
        "| ms a step, median | 100.0 |",
        "| peak memory, GB | 3.00 |",
        "| MFU, median | 40.0% |",
        "| time, all | 79.9 s |",
        "| time, training | 20.0 s (25.0%) |",
        "| time, first steps beyond the median (compile) | 29.9 s (37.4%) |",
        "| time, validation | 10.0 s",
        "| time, HellaSwag | 20.0 s",
        "| d_model | 768 |",
        "| torch | 2.13.0 |",
        "| device | NVIDIA H100 |",
        "| git_commit | 0123abc |",
        "Sample of step 200:\n\n    Hello\n    you\n",
    ):
        assert part in text


def test_the_report_takes_the_logged_standard_error(log: Callable[..., Path]) -> None:
    scores = {"acc": 0.3, "acc_norm": 0.31, "acc_norm_stderr": 0.0123, "n": 100}
    rows = [
        start(),
        {"kind": "hellaswag", "step": 0, "time": 1002.0, **scores},
        train(0, 9.0, 1003),
    ]
    report = plot.report(log(rows)).read_text()
    assert "| 0.3100 ± 0.0123 | 0.2955 | 0.337 |" in report


def test_a_quickstart_is_not_compared_on_another_text(log: Callable[..., Path]) -> None:
    report = plot.report(log(a_run(preset="quickstart"))).read_text()
    assert "3.2924" not in report


def test_the_reports_tables_have_all_their_columns_whatever_the_cells_hold(
    log: Callable[..., Path],
) -> None:
    rows = a_run()
    rows[0]["config"] |= {"sample_prompt": "one | two\nthree"}
    text = plot.report(log(rows)).read_text()
    assert "| sample_prompt | one \\| two three |" in text
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1


def test_a_last_validation_loss_that_is_not_finite_is_reported_as_such(
    log: Callable[..., Path],
) -> None:
    rows = [start(), train(0, 9.0, 1001), {"kind": "val", "step": 1, "time": 1002.0, "loss": None}]
    assert "| validation loss, step 1 | nan |" in plot.report(log(rows)).read_text()


def test_a_log_that_has_lost_its_first_line_is_drawn_and_has_no_report(
    log: Callable[..., Path], command: Callable[..., None]
) -> None:
    folder = log([train(0, 9.0, 1001), val(1, 8.0, 1002)])
    command(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "plot.png"]
    with pytest.raises(ValueError, match="no line of kind run"):
        plot.plot_run(folder)


def test_the_report_says_what_was_unusual(log: Callable[..., Path]) -> None:
    report = plot.report(log([start(), train(0, math.nan, 1001), train(1, 9.0, 1002)])).read_text()
    assert "Note: steps without a finite loss: 1, first 0." in report


# ---------------------------------------------------------------- the command line


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def run(*args: object) -> None:
        monkeypatch.setattr("sys.argv", ["plot.py", *map(str, args)])
        plot.main()

    return run


@pytest.mark.parametrize(
    ("args", "picture", "magic"),
    [
        ([], "plot.png", b"\x89PNG"),
        (["--format", "svg"], "plot.svg", b"<?xml"),
        (["--out", "{}/deep/curves.pdf"], "deep/curves.pdf", b"%PDF"),
    ],
)
def test_the_picture_has_the_place_and_format_asked_for(
    log: Callable[..., Path],
    command: Callable[..., None],
    args: list[str],
    picture: str,
    magic: bytes,
) -> None:
    folder = log(a_run(steps=20))
    command(folder, *(arg.format(folder) for arg in args))
    assert (folder / picture).read_bytes().startswith(magic)
    assert f"![curves]({picture})" in (folder / "report.md").read_text()
    assert not list(folder.rglob(".*"))


def test_an_overlay_leaves_the_runs_own_pictures_alone(
    log: Callable[..., Path], command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = log(a_run(steps=20), "one"), log(a_run(steps=20, seed=1), "two")
    command(f"ours={one}", two / "metrics.jsonl")
    assert capsys.readouterr().out == f"wrote {one / 'overlay.png'}\n"
    assert sorted(path.name for path in one.iterdir()) == ["metrics.jsonl", "overlay.png"]
    assert sorted(path.name for path in two.iterdir()) == ["metrics.jsonl"]


def test_watching_draws_again_until_it_is_interrupted(
    log: Callable[..., Path], command: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = log([start(), val(0, 9.0, 1001.0)])
    pictures = []

    def train_on(seconds: float) -> None:
        assert seconds == 10
        if len(pictures) == 2:
            raise KeyboardInterrupt
        log([start(), val(0, 9.0, 1001.0), val(1, 8.0, 1002.0)])

    monkeypatch.setattr(plot, "plot", lambda runs, *_: pictures.append(len(runs[0].rows["val"])))
    monkeypatch.setattr(plot.time, "sleep", train_on)
    command(folder, "--watch")
    assert pictures == [1, 2]
    assert "| validation loss, step 1 | 8.0000 | 3.2924 |  |" in (folder / "report.md").read_text()


def test_showing_without_a_window_system_says_so_after_the_picture_is_written(
    log: Callable[..., Path], command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    matplotlib.use("agg")
    folder = log(a_run(steps=5))
    with pytest.raises(SystemExit) as exit_:
        command(folder, "--show")
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("plot.py: --show: no window system here")
    assert (folder / "plot.png").exists()


def no_such_run(folder: Path) -> list[object]:
    return [folder / "nowhere"]


def an_empty_folder(folder: Path) -> list[object]:
    (folder / "nothing").mkdir()
    return [folder / "nothing"]


def an_empty_log(folder: Path) -> list[object]:
    (folder / "metrics.jsonl").write_text("")
    return [folder]


def only_a_start(folder: Path) -> list[object]:
    (folder / "metrics.jsonl").write_text(json.dumps(start()) + "\n")
    return [folder]


def hours_of_a_log_txt(folder: Path) -> list[object]:
    (folder / "log.txt").write_text("0 val 10.9\n")
    return [folder, "--x", "hours"]


def a_picture_of_no_known_format(folder: Path) -> list[object]:
    (folder / "log.txt").write_text("0 val 10.9\n")
    return [folder, "--out", folder / "curves.jpg"]


@pytest.mark.parametrize(
    ("mistake", "named"),
    [
        (no_such_run, "nowhere: no such run"),
        (an_empty_folder, "nothing: no such run"),
        (an_empty_log, "metrics.jsonl: nothing to draw in it yet"),
        (only_a_start, "metrics.jsonl: nothing to draw in it yet"),
        (hours_of_a_log_txt, "log.txt: its lines do not tell hours; use --x steps"),
        (a_picture_of_no_known_format, "curves.jpg: must end in .png, .svg or .pdf"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    mistake: Callable[[Path], list[object]],
    named: str,
    tmp_path: Path,
    command: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = mistake(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exit_:
        command(*args)
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.startswith("plot.py: ")
    assert error.count("\n") == 1
    assert named in error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_picture_leaves_the_old_one(
    log: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = log(a_run(steps=5))
    (folder / "plot.png").write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(plot.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        plot.plot_run(folder)
    assert (folder / "plot.png").read_bytes() == b"old"
