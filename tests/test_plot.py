"""plot.py: what is read from a log, what is drawn, what the report says, and the command line."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import plot

BATCH = 1024
Row = dict[str, Any]
Command = Callable[..., tuple[int, str, str]]


def start(step: int = 0, time: float = 1000.0, **changes: Any) -> Row:
    config = {"preset": "gpt-xs", "batch_tokens": BATCH, "max_steps": 200, "device": "auto"}
    config["model"] = {"d_model": 768, "n_layers": 12}
    row = {"kind": "run", "step": step, "time": time, "config": config, "parameters": 124082688}
    row |= {"device": "NVIDIA H100", "world_size": 8, "versions": {"torch": "2.13.0"}}
    row |= {"dataset": "edufineweb", "git_commit": "0123abc", "resumed_from": None}
    return row | changes


def train(step: int, loss: float, time: float, **changes: Any) -> Row:
    row = {"kind": "train", "step": step, "time": time, "loss": loss, "lr": 6e-4 / (step + 1)}
    row |= {"grad_norm": 1.5, "ms": 100.0, "tokens_per_s": 10240.0, "mfu": 0.4, "memory_gb": 3.0}
    return row | changes


def val(step: int, loss: float | None, time: float) -> Row:
    return {"kind": "val", "step": step, "time": time, "loss": loss, "tokens": 77, "seconds": 2.0}


def a_run(steps: int = 200, seed: int = 0, **changes: Any) -> list[Row]:
    """A run such as train.py logs: a power law with noise, 0.1 s a step, the first one 30 s."""
    noise = np.random.default_rng(seed).normal(0, 0.05, steps)
    rows = [start(**changes)]
    now = 1000.0
    for step in range(steps + 1):
        loss = 3.0 + 7.9 * (1 + step) ** -0.4
        if step % 50 == 0:
            accuracy = 0.25 + 0.08 * step / steps
            rows.append(val(step, loss, now + 2))
            now += 6
            row = {"kind": "hellaswag", "step": step, "time": now, "n": 400, "seconds": 4.0}
            rows.append(row | {"acc": 0.32, "acc_stderr": 0.0123, "acc_norm": accuracy})
        if step < steps:
            ms = 30_000.0 if step == 0 else 100.0
            now += ms / 1000
            rows.append(train(step, loss + noise[step], now, ms=ms))
    sample = {"kind": "sample", "step": steps, "time": now, "prompt": "Hello", "text": "Hello\nyou"}
    return [*rows, sample]


def log(folder: Path, rows: list[Row], name: str = "log", tail: str = "") -> Path:
    """Write a log, and return its folder."""
    (folder / name).mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows) + tail
    (folder / name / "metrics.jsonl").write_text(text)
    return folder / name


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Run plot.py in ``tmp_path`` with these arguments: its exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["plot.py", *map(str, args)])
        code = 0
        try:
            plot.main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        return code, *capsys.readouterr()

    return run


def drawn(*folders: Path, x: plot.XAxis = "steps", smooth: int | None = None) -> dict[str, Axes]:
    """The figure's axes, by what is drawn in them, in the order of ``plot.PANELS``."""
    figure = Figure()
    plot.draw(figure, [plot.read_metrics(folder) for folder in folders], x, smooth)
    axes = {str(ax.get_label()): ax for ax in figure.axes}
    return {key: axes[key] for key in plot.PANELS if key in axes}


def panels(axes: dict[str, Axes]) -> list[tuple[float, float, float, float]]:
    """The sides of the panels, which two axes may share, in shares of the page."""
    figure = next(iter(axes.values())).get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    places = [ax.get_position() for ax in axes.values()]
    return sorted({(place.x0, place.y0, place.x1, place.y1) for place in places})


def line(ax: Axes, label: str) -> list[list[float]]:
    (found,) = [line for line in ax.lines if line.get_label() == label]
    return [list(map(float, data)) for data in found.get_data()]


def references(ax: Axes) -> list[float]:
    return sorted(ln.get_ydata()[0] for ln in ax.lines if ":" not in ln.get_label())


def report_of(folder: Path | str) -> Path:
    return plot.report(plot.read_metrics(folder), Path(folder) / "plot.png")


def reported(folder: Path) -> dict[str, list[str]]:
    """The rows of the tables of a run's report: the other cells by what the first one says."""
    rows = {}
    for text in report_of(folder).read_text().splitlines():
        if text.startswith("|"):
            name, *cells = re.split(r"(?<!\\)\|", text.strip("|"))
            rows[name.strip()] = [cell.strip() for cell in cells]
    return rows


# ---------------------------------------------------------------- reading


def test_a_resumed_run_takes_back_the_steps_beyond_its_checkpoint(tmp_path: Path) -> None:
    rows = [start(), *(train(s, 10.0 + s, 1001.0 + s) for s in range(6)), val(2, 5.0, 1036)]
    rows.append(start(2, 90_000.0, resumed_from="step_000002"))
    run = plot.read_metrics(log(tmp_path, [*rows, train(2, 1.0, 90_036), train(3, 2.0, 90_072)]))
    hours, losses = run.series("train", "loss", "hours")
    assert losses.tolist() == [10.0, 11.0, 1.0, 2.0]
    # Without the pause between the two processes.
    assert hours[2:] == pytest.approx([0.02, 0.03])
    assert run.series("train", "loss")[0].tolist() == [0, 1, 2, 3]
    assert run.series("val", "loss")[1].tolist() == [5.0]
    assert run.notes == ["resumed from step_000002"]


def test_a_fresh_start_in_the_same_file_is_another_run(tmp_path: Path) -> None:
    rows = [start(), train(0, 9.0, 1001), train(1, 8.0, 1002), start(0, 5000.0)]
    run = plot.read_metrics(log(tmp_path, [*rows, train(0, 7.0, 5036)]))
    assert run.series("train", "loss")[1].tolist() == [7.0]
    assert run.hours == pytest.approx(0.01)


@pytest.mark.parametrize("torn", ['{"kind": "train", "st', '{"kind"', "\ufffd", "[1, 2]", "{}"])
def test_torn_lines_are_left_out_and_said(tmp_path: Path, torn: str) -> None:
    again = [start(1, 2000.0, resumed_from="step_000001"), train(1, 8.0, 2001.0)]
    tail = "\n".join([torn, *map(json.dumps, again), torn])
    run = plot.read_metrics(log(tmp_path, [start(), train(0, 9.0, 1001)], tail=tail))
    assert run.series("train", "loss")[1].tolist() == [9.0, 8.0]
    assert run.notes == ["torn or unreadable lines left out: 2", "resumed from step_000001"]


DEEP: Any = []
for _ in range(400):
    DEEP = [DEEP]
# What a key of a line may hold in a damaged log. The first are no valid value of any key of Row.
WRONG = [[1], True, "\udc00", DEEP, 10**400, -1, math.nan, math.inf, 2.0**60]
STRANGE = [None, 0, "", "text", {}, 1e-320, 1e308, -1e308, 2**53, 0.5]


@pytest.mark.parametrize(
    "changes",
    [
        *({"step": value} for value in (-1, 2**53 + 1, 1.5, "1", None, True, [1], 10**400)),
        *({"kind": value} for value in (None, 1, [], {})),
        *({"time": value} for value in (None, "now", -1, 1e300, math.nan, math.inf, True)),
        *({"config": value} for value in (None, [], "text", 1)),
        *({"config": {"batch_tokens": value}} for value in (0, -1, "512", 1.5, [], 2**60)),
        *({"config": {"max_steps": value}} for value in (0, "600", {})),
        *({"config": {"model": value}} for value in (None, [1], "x")),
        {"versions": []},
        {"resumed_from": 5},
        {"dataset": {}},
        {"prompt": None},
        {"text": 5},
        {"n": 0},
        {"seconds": -1},
        {"loss": "low"},
        {"ms": []},
    ],
)
def test_a_line_of_wrong_types_counts_as_torn(tmp_path: Path, changes: Row) -> None:
    folder = log(tmp_path, [*a_run(steps=3), train(3, 5.0, 1040.0) | changes])
    run = plot.read_metrics(folder)
    assert run.notes == ["torn or unreadable lines left out: 1"]
    assert list(run.rows["train"]) == [0, 1, 2]
    report_of(folder)


@pytest.mark.parametrize(
    "line", ["[" * 100_000, "1" * 5000, '{"kind": "val", "step": 1, "loss": 1e9' + "9" * 400]
)
def test_a_line_that_is_hard_to_parse_counts_as_torn(tmp_path: Path, line: str) -> None:
    run = plot.read_metrics(log(tmp_path, a_run(steps=3), tail=line))
    assert run.notes == ["torn or unreadable lines left out: 1"]


def test_other_keys_may_hold_anything(tmp_path: Path) -> None:
    """Every key of every line without a value, and with strange ones: the rest is drawn."""
    rows = a_run(steps=3)
    everything = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", category=RuntimeWarning)  # NumPy's
        for value in (*WRONG, *STRANGE):
            changed = []
            for number, row in enumerate(rows):
                keys = sorted(row.keys() - {"kind", "step"})
                if number % 2:
                    changed.append(row | {keys[number % len(keys)]: value})
                extra = {"z": value, "harness_acc": value, "mfu": value, "grad_norm": value}
                changed.append(row | extra | {"lr": value, "tokens_per_s": value})
            folder = log(tmp_path, changed)
            drawn(folder)
            assert report_of(folder).read_text().startswith("# Run report: log\n")
            everything += changed
        plot.plot_run(log(tmp_path, everything))


@pytest.mark.parametrize("kind", ["run", "train", "hellaswag", "val", "sample"])
def test_any_key_may_be_missing(tmp_path: Path, kind: str) -> None:
    rows = a_run(steps=3)
    keys = {key for row in rows if row["kind"] == kind for key in row} - {"kind", "step"}
    for gone in (*({key} for key in sorted(keys)), keys):
        folder = log(
            tmp_path,
            [
                {k: v for k, v in row.items() if row["kind"] != kind or k not in gone}
                for row in rows
            ],
        )
        report_of(folder)
    drawn(folder)


A_LOG = "".join(json.dumps(row) + "\n" for row in a_run(steps=3)).encode()


@given(
    flips=st.lists(st.tuples(st.integers(0, len(A_LOG) - 1), st.integers(0, 255)), max_size=20),
    length=st.one_of(st.just(len(A_LOG)), st.integers(0, len(A_LOG))),
    log_txt=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_a_damaged_log_is_read_or_refused(
    flips: list[tuple[int, int]], length: int, log_txt: bool
) -> None:
    content = bytearray(b"0 val 10.9\n1 train 9.5\n" * 100 if log_txt else A_LOG)
    for position, value in flips:
        content[position % len(content)] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "log.txt" if log_txt else "metrics.jsonl")
        path.write_bytes(content[:length])
        try:
            run = plot.read_metrics(folder)
        except plot.NothingToDraw:
            return
        for x in ("tokens", "hours"):
            with suppress(ValueError):  # an axis that is not recorded any more
                plot.moving_average(run.series("train", "loss", x)[1], 2)
        if run.start is not None:
            report_of(folder)
        assert path.read_bytes() == content[:length]


@pytest.mark.parametrize("clock", [[1000.0] * 4, [1000.0, 900.0, 800.0, 700.0], [0.0] * 4])
def test_a_clock_that_stands_still_or_goes_backwards(tmp_path: Path, clock: list[float]) -> None:
    first, *others = clock
    rows = [start(time=first), *(train(i, 9.0, now) for i, now in enumerate(others))]
    folder = log(tmp_path, [*rows, val(3, 9.0, clock[-1])])
    plot.plot_run(folder)
    assert reported(folder)["time, all"] == ["2.3 s"]
    assert reported(folder)["time, validation"] == ["2.0 s (87.0%)"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn(folder, x="hours")


def test_a_wide_average_is_that_of_all_and_takes_no_time() -> None:
    values = np.random.default_rng(0).normal(size=200_001)
    values[7] = np.nan
    values[9] = 1e30  # which must not swallow its neighbours' digits
    average = plot.moving_average(values, 100_001)
    assert average[100_000] == pytest.approx(np.nanmean(values[50_000:150_001]), rel=1e-9)
    assert plot.moving_average(values, 2**31)[0] == pytest.approx(np.nanmean(values[:100_001]))
    assert plot.moving_average(values[:0], 5).tolist() == []


def test_a_loss_that_is_not_finite_is_a_gap_and_said(tmp_path: Path) -> None:
    losses = [9.0, math.nan, 7.0, math.inf] + [6.0] * 200
    rows = [start(), *(train(s, loss, 1001.0 + s) for s, loss in enumerate(losses))]
    folder = log(tmp_path, [*rows, val(204, None, 1300.0)])
    assert plot.read_metrics(folder).notes == ["steps without a finite loss: 2, first 1"]
    loss = drawn(folder)["loss"]
    assert np.isnan(line(loss, "log: loss, each step")[1][1])
    assert np.isfinite(line(loss, "log: loss, smoothed")[1]).all()
    assert np.isfinite(loss.get_ylim()).all()
    assert reported(folder)["validation loss, step 204"][0] == "nan"
    assert "Note: steps without a finite loss: 2, first 1." in (folder / "report.md").read_text()


def test_a_log_of_build_nanogpt_is_read(tmp_path: Path) -> None:
    lines = ["0 val 10.95", "0 hella 0.2463", "0 train 10.955349", "250 val 5.9", "1 train 10.5"]
    # The last line has lost its end, perhaps in the middle of the number.
    (tmp_path / "log.txt").write_text("\n".join([*lines, "2 train 9."]))
    metrics = plot.read_metrics(tmp_path)
    assert metrics.series("val", "loss")[0].tolist() == [0, 250]
    assert metrics.series("val", "loss", "tokens")[0].tolist() == [0, 250 * 524_288]
    assert metrics.series("hellaswag", "acc_norm")[1].tolist() == [0.2463]
    assert metrics.series("train", "loss")[1].tolist() == [10.955349, 10.5]
    assert metrics.notes == ["torn or unreadable lines left out: 1"]


# ---------------------------------------------------------------- the picture


def test_the_lines_drawn_are_the_numbers_logged(tmp_path: Path) -> None:
    rows = a_run()
    axes = drawn(log(tmp_path, rows), smooth=0)
    logged = [row for row in rows if row["kind"] == "train"]
    steps = [row["step"] for row in logged]
    for name in ("loss", "lr", "tokens_per_s", "grad_norm", "mfu"):
        assert line(axes[name], f"log: {name}") == [steps, [row[name] for row in logged]]
    vals = [row for row in rows if row["kind"] == "val"]
    val_line = line(axes["loss"], "log: val")
    assert val_line == [[0, 50, 100, 150, 200], [row["loss"] for row in vals]]
    accuracies = line(axes["acc_norm"], "log: hellaswag")[1]
    assert accuracies == pytest.approx([0.25, 0.27, 0.29, 0.31, 0.33])


def test_smoothing_is_a_centred_mean_behind_which_the_raw_values_stay(tmp_path: Path) -> None:
    folder = log(tmp_path, a_run())
    losses = plot.read_metrics(folder).series("train", "loss")[1]
    axes = drawn(folder, smooth=5)
    loss = axes["loss"]
    smooth = line(loss, "log: loss, smoothed")[1]
    assert smooth[100] == pytest.approx(losses[98:103].mean())
    assert np.std(np.diff(smooth)) < np.std(np.diff(losses))
    assert line(loss, "log: loss, each step")[1] == losses.tolist()
    # A schedule is drawn as it is.
    assert [ln.get_label() for ln in axes["lr"].lines] == ["log: lr"]


@pytest.mark.parametrize(("x", "last"), [("steps", 200), ("tokens", 200 * BATCH), ("hours", 0.022)])
def test_the_horizontal_axis(tmp_path: Path, x: plot.XAxis, last: float) -> None:
    axes = drawn(log(tmp_path, a_run()), x=x)
    loss = axes["loss"]
    assert line(loss, "log: val")[0][-1] == pytest.approx(last, rel=0.05)
    assert axes["lr"].get_xlabel() == x
    assert len(loss.child_axes) == (1 if x == "steps" else 0)
    loss.figure.draw_without_rendering()
    for above in loss.child_axes:
        assert above.get_xlabel() == "tokens"
        assert np.array(above.get_xlim()) == pytest.approx(BATCH * np.array(loss.get_xlim()))


def test_several_runs_lie_over_each_other_and_differ_without_colour(tmp_path: Path) -> None:
    (tmp_path / "lineage").mkdir()
    lines = "0 val 10.9\n100 val 6.0\n0 hella 0.25\n0 train 11.0\n"
    (tmp_path / "lineage/log.txt").write_text(lines)
    ours = [log(tmp_path, a_run(seed=i), name) for i, name in enumerate(("one", "two"))]
    axes = drawn(*ours, tmp_path / "lineage")
    loss = axes["loss"]
    assert line(loss, "one: val")[1] == line(loss, "two: val")[1]
    assert line(loss, "one: loss, smoothed")[1] != line(loss, "two: loss, smoothed")[1]
    assert line(loss, "lineage: val") == [[0, 100], [10.9, 6.0]]
    marks = [ln for ln in axes["acc_norm"].lines if ":" in ln.get_label()]
    assert len({ln.get_marker() for ln in marks}) == 3
    assert len({ln.get_linestyle() for ln in marks}) > 1
    what, names = loss.figure.legends
    assert [text.get_text() for text in names.get_texts()] == ["one", "two", "lineage"]
    assert len(what.get_texts()) == 3


NAMES = ("AdamW, linear to 0, 0.002", "AdamW, cosine, 1e-3 (the default)", *"abc")


@pytest.mark.parametrize("repeated", [1, 2, 20])
def test_six_runs_differ_and_no_legend_covers_a_curve(tmp_path: Path, repeated: int) -> None:
    folder = log(tmp_path, a_run())
    names = [*NAMES, "MUON WITH WSD, 0.002 " * repeated]
    figure = Figure(plot.FIGURE_INCHES)
    with matplotlib.style.context(plot.STYLE):
        plot.draw(figure, [plot.read_metrics(folder, name) for name in names], "steps", None)
        figure.draw_without_rendering()
    labels = tuple(f"{name}: " for name in names)
    for key in plot.PANELS:
        (ax,) = (ax for ax in figure.axes if ax.get_label() == key)
        curves = [ln for ln in ax.lines if str(ln.get_label()).startswith(labels)]
        assert {ln.get_color() for ln in curves} == set(plot.COLORS[:6])
        if key in ("loss", "acc_norm"):
            assert {ln.get_marker() for ln in curves} - {"None"} == set(plot.MARKERS[:6])
    # More runs repeat a colour, and on paper a dash, but not with the same other.
    for looks in (plot.COLORS, plot.MARKERS):
        pairs = zip(range(35), cycle(plot.DASHES), cycle(looks), strict=False)
        assert len({pair[1:] for pair in pairs}) == 35
    # The legends are on the page, show all names, and are beside all axes and their labels.
    what, runs = (legend.get_window_extent() for legend in figure.legends)
    assert [len(legend.get_texts()) for legend in figure.legends] == [3, 6]
    for box in (what, runs):
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        for ax in figure.axes:
            axis_and_labels = ax.get_tightbbox()
            assert axis_and_labels is not None
            assert not box.overlaps(axis_and_labels)
    assert not what.overlaps(runs)


def test_runs_without_a_gradient_norm_are_drawn_together(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("0 train 11.0\n0 hella 0.25\n1 train 10.0\n")
    axes = drawn(tmp_path, tmp_path)
    assert list(axes) == ["loss", "acc_norm"]
    assert len(panels(axes)) == 2


def test_published_figures_are_drawn_named_and_in_the_frame(tmp_path: Path) -> None:
    axes = drawn(log(tmp_path, a_run()))
    loss, hella = axes["loss"], axes["acc_norm"]
    assert references(hella) == [0.25, 0.2955, 0.337]
    assert references(loss) == [3.2924]
    named = " ".join(text.get_text() for text in (*hella.texts, *loss.texts))
    for what in ("GPT-2\n124M\n0.2955", "GPT-3\n124M\n0.337", "chance\n0.25", "FineWeb-Edu"):
        assert what in named
    # The frame shows the end of the loss, and not only its fall from 11.
    low, high = loss.get_ylim()
    assert low < 3.2924 < line(loss, "log: loss, smoothed")[1][-1] < high < 8.0


@pytest.mark.parametrize("dataset", ["stdlib", None])
def test_a_loss_on_another_text_is_not_compared(tmp_path: Path, dataset: str | None) -> None:
    folder = log(tmp_path, a_run(dataset=dataset))
    axes = drawn(folder)
    assert references(axes["loss"]) == []
    assert len(references(axes["acc_norm"])) == 3
    assert reported(folder)["validation loss, step 200"][1:] == ["", ""]


def test_two_curves_of_a_panel_have_axes_of_their_own_and_the_colours_of_these(
    tmp_path: Path,
) -> None:
    axes = drawn(log(tmp_path, a_run()))
    for left, right, labels in (
        ("lr", "grad_norm", ("learning rate", "gradient norm")),
        ("tokens_per_s", "mfu", ("tokens/s", "MFU")),
    ):
        pair = (axes[left], axes[right])
        assert pair[0].get_position().bounds == pair[1].get_position().bounds
        colors = []
        for ax, label, side in zip(pair, labels, ("left", "right"), strict=True):
            assert ax.get_ylabel().startswith(label)
            assert ax.yaxis.get_label_position() == side
            (color,) = {ln.get_color() for ln in ax.lines}
            assert ax.yaxis.label.get_color() == color
            assert {tick.get_color() for tick in ax.get_yticklabels()} == {color}
            colors.append(color)
        assert colors[0] != colors[1]
    # Of several runs the colours are the runs', so that each curve has a panel.
    folder = log(tmp_path, a_run())
    assert len(panels(drawn(folder, folder))) == len(plot.PANELS)


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize(
    ("gone", "alone", "together"),
    [
        ([], 4, 6),
        (["mfu"], 4, 5),
        (["mfu", "acc_norm"], 3, 4),
        (["mfu", "acc_norm", "grad_norm"], 3, 3),
        (["mfu", "acc_norm", "tokens_per_s", "lr"], 2, 2),
        (["mfu", "acc_norm", "tokens_per_s", "lr", "grad_norm"], 1, 1),
        (["loss", "lr"], 3, 4),
    ],
)
def test_what_was_not_logged_has_no_panel_and_the_others_fill_the_page(
    tmp_path: Path, runs: int, gone: list[str], alone: int, together: int
) -> None:
    rows = [row | {key: None for key in gone if key in row} for row in a_run()]
    axes = drawn(*[log(tmp_path, rows)] * runs)
    assert list(axes) == [key for key in plot.PANELS if key not in gone]
    sides = panels(axes)
    assert len(sides) == (alone if runs == 1 else together)
    # Left, right, top and bottom: each row of panels is as wide as the widest, without a hole.
    rows_of_panels: dict[float, list[tuple[float, float]]] = {}
    for left, bottom, right, _ in sides:
        rows_of_panels.setdefault(round(bottom, 2), []).append((left, right))
    for row in rows_of_panels.values():
        assert min(row)[0] < 0.2
        assert max(row)[1] > 0.8
    xlabels = {key for key, ax in axes.items() if ax.get_xlabel()}
    lowest = min(bottom for _, bottom, _, _ in sides)
    assert xlabels == {k for k, ax in axes.items() if ax.get_position().y0 < lowest + 0.01}


def test_a_log_without_a_finite_number_is_an_empty_frame(tmp_path: Path) -> None:
    folder = log(tmp_path, [start(), {"kind": "train", "step": 0, "time": 1001.0, "loss": None}])
    assert list(drawn(folder, folder)) == ["loss"]


# ---------------------------------------------------------------- the report


def test_every_number_of_the_report_is_from_the_run(tmp_path: Path) -> None:
    rows = a_run()
    rows[0]["config"] |= {"sample_prompt": "one | two\nthree"}
    folder = log(tmp_path, rows)
    recent = np.mean([row["loss"] for row in rows if row["kind"] == "train"][-100:])
    # The standard error that is logged, or that of a proportion.
    error = math.sqrt(0.33 * 0.67 / 400)
    expected = {
        "steps": ["200 of 200", "", ""],
        "training tokens": [f"{200 * BATCH:,}", "", ""],
        "training loss, last 100 steps": [f"{recent:.4f}", "", ""],
        "validation loss, step 200": [f"{3.0 + 7.9 * 201**-0.4:.4f}", "3.2924", ""],
        "HellaSwag acc, step 200, 400 examples": ["0.3200 ± 0.0123", "0.2859", ""],
        "HellaSwag acc_norm, step 200, 400 examples": [f"0.3300 ± {error:.4f}", "0.2955", "0.337"],
        "tokens/s, median": ["10,240"],
        "ms a step, median": ["100.0"],
        "MFU, median": ["40.0%"],
        "peak memory, GB": ["3.00"],
        "time, all": ["79.9 s"],
        "time, training": ["20.0 s (25.0%)"],
        "time, first steps beyond the median (compile)": ["29.9 s (37.4%)"],
        "time, validation": ["10.0 s (12.5%)"],
        "time, HellaSwag": ["20.0 s (25.0%)"],
        "d_model": ["768"],
        "torch": ["2.13.0"],
        "device": ["NVIDIA H100"],
        "git_commit": ["0123abc"],
        "sample_prompt": ["one \\| two three"],
    }
    found = reported(folder)
    assert {name: found.get(name) for name in expected} == expected
    plot.plot_run(folder)
    text = (folder / "report.md").read_text()
    assert "![curves](plot.png)" in text
    assert "Sample of step 200:\n\n    Hello\n    you\n" in text


def test_a_log_without_its_first_line_is_only_drawn(tmp_path: Path, command: Command) -> None:
    folder = log(tmp_path, [train(0, 9.0, 1001), val(1, 8.0, 1002)])
    assert command(folder)[0] == 0
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "plot.png"]
    with pytest.raises(ValueError, match="no line of kind run"):
        plot.plot_run(folder)


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("args", "picture", "magic"),
    [
        ([], "plot.png", b"\x89PNG"),
        (["--format", "svg"], "plot.svg", b"<?xml"),
        (["--out", "{}/deep/curves.pdf"], "deep/curves.pdf", b"%PDF"),
        (["--out", "{}/lr_0.5", "--format", "svg"], "lr_0.5.svg", b"<?xml"),
    ],
)
def test_the_picture_has_the_place_and_format_asked_for(
    tmp_path: Path, command: Command, args: list[str], picture: str, magic: bytes
) -> None:
    folder = log(tmp_path, a_run(steps=20))
    command(folder, *(arg.format(folder) for arg in args))
    path = folder / picture
    assert path.read_bytes().startswith(magic)
    files = {file.name for file in folder.rglob("*") if file.is_file()}
    beside = path.parent == folder
    assert files == {"metrics.jsonl", path.name} | ({"report.md"} if beside else set())
    if beside:
        assert f"![curves]({path.name})" in (folder / "report.md").read_text()


def test_the_report_has_the_name_that_was_given(tmp_path: Path, command: Command) -> None:
    folder = log(tmp_path, a_run(steps=5))
    command(f"ours={folder}")
    assert (folder / "report.md").read_text().startswith("# Run report: ours\n")


def test_elsewhere_only_the_picture_is_written(tmp_path: Path, command: Command) -> None:
    folder = log(tmp_path, a_run(steps=5))
    out = tmp_path / "paper/curves.pdf"
    assert command(folder, "--out", out) == (0, f"wrote {out}\n", "")
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]
    assert [path.name for path in out.parent.iterdir()] == ["curves.pdf"]


def test_a_log_that_is_called_report_md_is_not_overwritten(
    tmp_path: Path, command: Command
) -> None:
    path = (log(tmp_path, a_run(steps=5)) / "metrics.jsonl").rename(tmp_path / "report.md")
    before = path.read_bytes()
    assert command(path)[0] == 0
    assert path.read_bytes() == before


def test_a_name_is_drawn_as_it_is(tmp_path: Path, command: Command) -> None:
    folder = log(tmp_path, a_run(steps=5))
    names = ["$x_{", "_hidden", "a\nb\udcff", "\u540d\U0001f600", "long" * 1000]
    assert command(*(f"{name}={folder}" for name in names))[::2] == (0, "")
    figure = Figure()
    plot.draw(figure, [plot.read_metrics(folder, name) for name in names], "steps", None)
    _, legend = figure.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == ["$x_{", "_hidden", "a?b?", names[3], "long" * 15 + "..."]


def test_without_matplotlib_it_says_how_to_get_it(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = log(tmp_path, a_run(steps=5))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, error = command(folder)
    assert (code, error.count("\n")) == (2, 1)
    assert "pip install" in error


def test_an_overlay_leaves_the_runs_own_pictures_alone(tmp_path: Path, command: Command) -> None:
    one = log(tmp_path, a_run(steps=20), "one")
    two = log(tmp_path, a_run(steps=20, seed=1), "two")
    assert command(f"ours={one}", two / "metrics.jsonl") == (0, f"wrote {one}/overlay.png\n", "")
    assert sorted(path.name for path in one.iterdir()) == ["metrics.jsonl", "overlay.png"]
    assert [path.name for path in two.iterdir()] == ["metrics.jsonl"]


def test_watching_draws_again_until_it_is_interrupted(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [start(), val(0, 9.0, 1001.0)]
    folder = log(tmp_path, rows)

    def train_on(seconds: float) -> None:
        assert seconds == 10
        if len(rows) == 3:
            raise KeyboardInterrupt
        rows.append(val(1, 8.0, 1002.0))
        log(tmp_path, rows)

    monkeypatch.setattr(plot.time, "sleep", train_on)
    code, output, _ = command(folder, "--watch")
    assert (code, output.count("plot.png")) == (0, 2)
    assert "8.0000" in (folder / "report.md").read_text()


def test_watching_waits_for_a_log(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = iter(['{"kind": "tr', json.dumps(train(0, 9.0, 1001.0)) + "\n"])
    (tmp_path / "log").mkdir()

    def next_content(_: float) -> None:
        content = next(contents, None)
        if content is None:
            raise KeyboardInterrupt
        (tmp_path / "log/metrics.jsonl").write_text(content)

    monkeypatch.setattr(plot.time, "sleep", next_content)
    code, output, _ = command("log", "--watch")
    assert code == 0
    assert [line.split()[0] for line in output.splitlines()] == ["waiting:", "waiting:", "wrote"]


def test_showing_without_a_window_system_says_so(tmp_path: Path, command: Command) -> None:
    matplotlib.use("agg")
    folder = log(tmp_path, a_run(steps=5))
    code, _, error = command(folder, "--show")
    assert code == 2
    assert "--show" in error
    assert (folder / "plot.png").exists()


@pytest.mark.parametrize(
    ("file", "content", "args", "named"),
    [
        ("other/log.txt", "", ["nowhere"], "nowhere"),
        ("nothing/other", "", ["nothing"], "nothing"),
        ("metrics.jsonl", "", ["."], "metrics.jsonl"),
        ("metrics.jsonl", json.dumps(start()), ["."], "metrics.jsonl"),
        ("log.txt", "0 val 10.9\n", [".", "--x", "hours"], "hours"),
        ("log.txt", "0 val 10.9\n", [".", "--out", "curves.jpg"], "curves.jpg"),
        ("log.txt", "0 val 10.9\n", [".", "--out", "folder.png"], "folder.png is not a regular"),
        ("log.txt", "0 val 10.9\n", [".", "--out", "log.txt/x.png"], "log.txt"),
        (
            "log.txt",
            "0 val 10.9\n",
            [".", "--out", "", "--format", "png"],
            "--out is followed by an empty value",
        ),
        (
            "log.txt",
            "0 val 10.9\n",
            [".", "--watch", "--out", "/proc/x.png"],
            "cannot write /proc/x",
        ),
        ("log.png", "0 val 10.9\n", ["log.png", "--out", "./log.png"], "is the log itself"),
        ("log.txt", "0 val 10.9\n", [".", "--smooth", "-5"], "smooth -5"),
        ("log.txt", "0 val 10.9\n", [".", "--smooth", "9" * 40], "smooth 999"),
        ("log.txt", "0 val 10.9\n", [".", "--smooth", "x"], "--smooth"),
        ("log.txt", "0 val 10.9\n", [".", "--no-such"], "--no-such"),
        ("log.txt", "0 val 10.9\n", [".", "--x", "miles"], "--x"),
        (
            "log.txt",
            "0 val 1.2.3\n\u0660 val 1\n" + "9" * 400 + " val 1\n",
            ["."],
            "nothing to draw",
        ),
        ("log.txt", "", ["fifo"], "fifo is not a regular file"),
        ("log.txt", "", ["fifo", "--watch"], "fifo is not a regular file"),
        ("metrics.jsonl/x", "", ["."], "metrics.jsonl is not a regular file"),
        ("log.txt", "", ["/dev/zero"], "/dev/zero is not a regular file"),
        ("log.txt", "\0" * 1000, ["."], "nothing to draw"),
        ("log.txt", "", ["huge"], "too many"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    tmp_path: Path, command: Command, file: str, content: str, args: list[str], named: str
) -> None:
    Path(file).parent.mkdir(exist_ok=True)
    Path(file).write_text(content)
    os.mkfifo("fifo")
    Path("folder.png").mkdir()
    with open("huge", "wb") as huge:
        huge.truncate(2**40)
    before = sorted(tmp_path.rglob("*"))
    code, _, error = command(*args)
    assert code == 2
    assert error.startswith("plot.py: ")
    assert error.count("\n") == 1
    assert named in error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failure_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = log(tmp_path, a_run(steps=5))
    (folder / "plot.png").write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        plot.plot_run(folder)
    assert (folder / "plot.png").read_bytes() == b"old"
