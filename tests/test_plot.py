"""plot.py: what is read from a log, what is drawn, what the report says, and the command line."""

import json
import math
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import plot

Capture = pytest.CaptureFixture[str]
BATCH = 1024
Row = dict[str, Any]


def start(step: int = 0, time: float = 1000.0, **changes: Any) -> Row:
    config = {"batch_tokens": BATCH, "max_steps": 200, "device": "auto", "model": {"d_model": 768}}
    row = {"kind": "run", "step": step, "time": time, "config": config}
    row |= {"device": "NVIDIA H100", "dataset": "edufineweb", "resumed_from": None}
    return row | changes


def train(step: int, loss: float | None, time: float, **changes: Any) -> Row:
    row = {"kind": "train", "step": step, "time": time, "loss": loss, "lr": 6e-4 / (step + 1)}
    row |= {"grad_norm": 1.5, "ms": 100.0, "tokens_per_s": 10240.0, "mfu": 0.4, "memory_gb": 3.0}
    return row | changes


def val(step: int, loss: float | None, time: float) -> Row:
    return {"kind": "val", "step": step, "time": time, "loss": loss, "tokens": 77, "seconds": 2.0}


def a_run(steps: int = 200, **changes: Any) -> list[Row]:
    """A run such as train.py logs: a power law, 0.1 s a step, the first one 30 s."""
    rows = [start(**changes)]
    now = 1000.0
    for step in range(steps + 1):
        loss = 3.0 + 7.9 * (1 + step) ** -0.4
        if step % 50 == 0:
            rows.append(val(step, loss, now + 2))
            now += 6
            row = {"kind": "hellaswag", "step": step, "time": now, "n": 400, "seconds": 4.0}
            row |= {"acc_norm": 0.25 + 0.08 * step / steps, "acc_norm_stderr": 0.0234}
            rows.append(row | {"acc": 0.32, "acc_stderr": 0.0123})
        if step < steps:
            ms = 30_000.0 if step == 0 else 100.0
            now += ms / 1000
            rows.append(train(step, loss, now, ms=ms))
    sample = {"kind": "sample", "step": steps, "time": now, "prompt": "Hello", "text": "Hello\nyou"}
    return [*rows, sample]


def log(folder: Path, rows: list[Row], name: str = "log") -> Path:
    """Write a log, and return its folder."""
    (folder / name).mkdir(exist_ok=True, parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name / "metrics.jsonl").write_text(text)
    return folder / name


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> Any:
    """Run plot.py in ``tmp_path`` with these arguments: its exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["plot.py", *map(str, args)])
        code = 0
        try:
            plot.main()
        except SystemExit as error:
            code = int(error.code or 0)
        return code, *capsys.readouterr()

    return run


def drawn(*folders: Path, x: plot.XAxis = "steps", smooth: int | None = None) -> dict[str, Axes]:
    """The figure's axes, by what is drawn in them, in the order of ``plot.PANELS``."""
    figure = Figure(plot.FIGURE_INCHES)
    plot.draw(figure, [plot.read_metrics(folder) for folder in folders], x, smooth)
    figure.draw_without_rendering()
    axes = {str(ax.get_label()): ax for ax in figure.axes}
    return {key: axes[key] for key in plot.PANELS if key in axes}


def line(ax: Axes, label: str) -> list[list[float]]:
    (found,) = [line for line in ax.lines if line.get_label() == label]
    return [list(map(float, data)) for data in found.get_data()]


def references(ax: Axes) -> list[float]:
    return sorted(ln.get_ydata()[0] for ln in ax.lines if ":" not in ln.get_label())


def reported(folder: Path) -> dict[str, list[str]]:
    """The rows of the tables of a run's report: the other cells by what the first one says."""
    rows = {}
    path = plot.report(plot.read_metrics(folder), folder / "plot.png")
    for text in path.read_text().splitlines():
        if text.startswith("|"):
            name, *cells = re.split(r"(?<!\\)\|", text.strip("|"))
            rows[name.strip()] = [cell.strip() for cell in cells]
    return rows


def test_a_resumed_run_takes_back_the_steps_beyond_its_checkpoint(tmp_path: Path) -> None:
    rows = [start(), *(train(s, 10.0 + s, 1001.0 + s) for s in range(6)), val(2, 5.0, 1036)]
    rows.append(start(2, 90_000.0, resumed_from="step_000002"))
    run = plot.read_metrics(log(tmp_path, [*rows, train(2, 1.0, 90_036), train(3, 2.0, 90_072)]))
    hours, losses = run.series("train", "loss", "hours")
    assert losses.tolist() == [10.0, 11.0, 1.0, 2.0]
    # Without the pause between the two processes.
    assert hours[2:] == pytest.approx([0.02, 0.03])
    assert run.series("val", "loss")[1].tolist() == [5.0]
    assert run.notes == ["resumed from step_000002"]
    # A start that resumes nothing is another run in the same file.
    run = plot.read_metrics(log(tmp_path, [*rows, start(0, 5000.0), train(0, 7.0, 5036)]))
    assert run.series("train", "loss")[1].tolist() == [7.0]
    assert run.hours == pytest.approx(0.01)


def test_a_loss_that_is_not_finite_is_a_gap_and_said(tmp_path: Path) -> None:
    losses = [9.0, math.nan, None, math.inf] + [6.0] * 200
    rows = [start(), *(train(s, loss, 1001.0 + s) for s, loss in enumerate(losses))]
    folder = log(tmp_path, [*rows, val(204, None, 1300.0)])
    assert plot.read_metrics(folder).notes == ["steps without a finite loss: 3, first 1"]
    loss = drawn(folder)["loss"]
    assert np.isnan(line(loss, "log: loss, each step")[1][1:4]).all()
    assert line(loss, "log: loss, smoothed")[1][:8:7] == [9.0, 6.0]
    assert reported(folder)["validation loss, step 204"][0] == "nan"
    assert "Note: steps without a finite loss: 3, first 1." in (folder / "report.md").read_text()


def test_a_log_of_build_nanogpt_is_read(tmp_path: Path) -> None:
    lines = ["0 val 10.95", "0 hella 0.2463", "0 train 10.955349", "250 val 5.9", "1 train 10.5"]
    # The last line has lost its end, perhaps in the middle of the number.
    (tmp_path / "log.txt").write_text("\n".join([*lines, "2 train 9."]))
    metrics = plot.read_metrics(tmp_path)
    assert metrics.series("val", "loss")[0].tolist() == [0, 250]
    assert metrics.series("val", "loss", "tokens")[0].tolist() == [0, 250 * 524_288]
    assert metrics.series("train", "loss")[1].tolist() == [10.955349, 10.5]
    assert metrics.notes == ["torn or unreadable lines left out: 1"]
    assert reported(tmp_path)["HellaSwag acc_norm, step 0"] == ["0.2463", "0.2955", "0.337"]
    with pytest.raises(ValueError, match="do not record hours"):
        metrics.series("val", "loss", "hours")
    (tmp_path / "log.txt").write_text("step loss\n0 1.2\n")
    with pytest.raises(ValueError, match=r"log\.txt: no line is recognised"):
        plot.read_metrics(tmp_path)


def test_the_lines_drawn_are_the_numbers_logged(tmp_path: Path) -> None:
    rows = a_run()
    axes = drawn(log(tmp_path, rows), smooth=0)
    logged = [row for row in rows if row["kind"] == "train"]
    for name in ("loss", "lr", "tokens_per_s", "grad_norm", "mfu"):
        assert line(axes[name], f"log: {name}") == [list(range(200)), [row[name] for row in logged]]
    vals = [row["loss"] for row in rows if row["kind"] == "val"]
    assert line(axes["loss"], "log: val") == [[0, 50, 100, 150, 200], vals]
    # A mean lies over the raw values, but for a schedule, which is drawn as it is.
    smooth = drawn(log(tmp_path, rows), smooth=5)
    losses = line(smooth["loss"], "log: loss, each step")[1]
    assert losses == [row["loss"] for row in logged]
    average = line(smooth["loss"], "log: loss, smoothed")[1]
    assert average[100] == pytest.approx(np.mean(losses[98:103]))
    assert [ln.get_label() for ln in smooth["lr"].lines] == ["log: lr"]
    # Two curves of a panel are told apart by the colour of their axes.
    colors = [axes[name].lines[0].get_color() for name in ("lr", "grad_norm")]
    assert colors[0] != colors[1]
    assert colors == [axes[name].yaxis.label.get_color() for name in ("lr", "grad_norm")]
    hella = axes["acc_norm"]
    assert line(hella, "log: hellaswag")[1] == pytest.approx([0.25, 0.27, 0.29, 0.31, 0.33])
    error_band = hella.collections[0].get_datalim(hella.transData).intervaly
    assert error_band == pytest.approx((0.25 - 0.0234, 0.33 + 0.0234))


@pytest.mark.parametrize(("x", "last"), [("steps", 200), ("tokens", 200 * BATCH), ("hours", 0.022)])
def test_the_horizontal_axis(tmp_path: Path, x: plot.XAxis, last: float) -> None:
    axes = drawn(log(tmp_path, a_run()), x=x)
    loss = axes["loss"]
    assert line(loss, "log: val")[0][-1] == pytest.approx(last, rel=0.05)
    assert axes["lr"].get_xlabel() == x
    scales = [above.get_xlabel() for above in loss.child_axes]
    assert scales == (["tokens"] if x == "steps" else [])
    for above in loss.child_axes:
        assert np.array(above.get_xlim()) == pytest.approx(BATCH * np.array(loss.get_xlim()))


def test_six_runs_differ_and_no_legend_covers_a_curve(tmp_path: Path) -> None:
    folder = log(tmp_path, a_run())
    names = ["AdamW, linear to 0, 0.002", "AdamW, cosine", "_a", "x", "y", "MUON WITH WSD " * 20]
    figure = Figure(plot.FIGURE_INCHES)
    with style.context(plot.STYLE):
        plot.draw(figure, [plot.read_metrics(folder, name) for name in names], "steps", None)
        figure.draw_without_rendering()
    curves = [ln for ln in figure.axes[0].lines if str(ln.get_label()).startswith(tuple(names))]
    assert {ln.get_color() for ln in curves} == set(plot.COLORS[:6])
    assert {ln.get_marker() for ln in curves} - {"None"} == set(plot.MARKERS[:6])
    # The legends are on the page, show all names, and are beside all axes and their labels.
    assert [len(legend.get_texts()) for legend in figure.legends] == [3, 6]
    boxes = [legend.get_window_extent() for legend in figure.legends]
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert not any(box.overlaps(ax.get_tightbbox()) for ax in figure.axes)
    assert not boxes[0].overlaps(boxes[1])


def test_published_figures_are_drawn_named_and_in_the_frame(tmp_path: Path) -> None:
    # A loss on another text is not compared.
    other = log(tmp_path, a_run(dataset="stdlib"))
    assert references(drawn(other)["loss"]) == []
    assert reported(other)["validation loss, step 200"][1:] == ["", ""]
    axes = drawn(log(tmp_path, a_run()))
    loss, hella = axes["loss"], axes["acc_norm"]
    assert references(hella) == [0.25, 0.2955, 0.337]
    assert references(loss) == [3.2924]
    named = " ".join(text.get_text() for text in (*hella.texts, *loss.texts))
    assert all(name in named for name in ("GPT-2", "GPT-3", "chance", "FineWeb-Edu"))
    # The frame shows the end of the loss, and not only its fall from 11.
    low, high = loss.get_ylim()
    assert low < 3.2924 < line(loss, "log: loss, smoothed")[1][-1] < high < 8.0


@pytest.mark.parametrize(("gone", "panels"), [(["mfu"], [4, 5]), (["loss", "lr"], [3, 4])])
def test_only_logged_keys_have_panels(tmp_path: Path, gone: list[str], panels: list[int]) -> None:
    rows = [row | {key: None for key in gone if key in row} for row in a_run()]
    for number in (1, 2):  # of runs
        axes = drawn(*[log(tmp_path, rows)] * number)
        assert list(axes) == [key for key in plot.PANELS if key not in gone]
        places = {ax.get_position().bounds: ax.get_position() for ax in axes.values()}.values()
        assert len(places) == panels[number - 1]
        # Together they cover most of the page, without a hole.
        assert sum(place.width * place.height for place in places) > 0.45


def test_every_number_of_the_report_is_from_the_run(tmp_path: Path) -> None:
    rows = a_run()
    rows[0]["config"] |= {"sample_prompt": "one | two\nthree"}
    folder = log(tmp_path, rows)
    recent = np.mean([row["loss"] for row in rows if row["kind"] == "train"][-100:])
    expected = {
        "steps": ["200 of 200", "", ""],
        "training tokens": [f"{200 * BATCH:,}", "", ""],
        "training loss, last 100 steps": [f"{recent:.4f}", "", ""],
        "validation loss, step 200": [f"{3.0 + 7.9 * 201**-0.4:.4f}", "3.2924", ""],
        "HellaSwag acc, step 200, 400 examples": ["0.3200 ± 0.0123", "0.2859", ""],
        "HellaSwag acc_norm, step 200, 400 examples": ["0.3300 ± 0.0234", "0.2955", "0.337"],
        "tokens/s, median": ["10,240"],
        "ms a step, median": ["100.0"],
        "MFU, median": ["40.0%"],
        "peak memory, GB": ["3.00"],
        "time, all": ["79.9 s"],
        "time, training": ["20.0 s (25.0%)"],
        "time, first steps beyond the median (compile)": ["29.9 s (37.4%)"],
        "time, validation": ["10.0 s (12.5%)"],
        "d_model": ["768"],
        "device": ["NVIDIA H100"],
        "sample_prompt": ["one \\| two three"],
    }
    found = reported(folder)
    assert {name: found.get(name) for name in expected} == expected
    plot.plot_run(folder)
    text = (folder / "report.md").read_text()
    assert "![curves](plot.png)" in text
    assert "Sample of step 200:\n\n    Hello\n    you\n" in text


@pytest.mark.parametrize(
    ("args", "magic", "written"),
    [
        ([], b"\x89PNG", ["log/plot.png", "log/report.md"]),
        (["--out", "log/deep/curves.pdf"], b"%PDF", ["log/deep/curves.pdf"]),
        (["--out", "lr_0.5", "--format", "svg"], b"<?xml", ["lr_0.5.svg"]),
    ],
)
def test_the_picture_has_the_place_and_format_asked_for(
    command: Any, args: list[str], magic: bytes, written: list[str]
) -> None:
    log(Path(), a_run(steps=20))
    assert command("log", *args)[::2] == (0, "")
    assert Path(written[0]).read_bytes().startswith(magic)
    files = {str(path) for path in Path().rglob("*") if path.is_file()}
    assert files == {"log/metrics.jsonl", *written}


def test_an_overlay_names_its_runs_apart(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path.cwd()))
    one = log(Path(), a_run(steps=5), "one/log")
    log(Path(), a_run(steps=5), "lr=1/log")
    runs = ("one/log", "lr=1/log", "ours=~/one/log", "wide=lr=1/log")
    assert command(*runs, "--format", "svg")[::2] == (0, "")
    assert sorted(path.name for path in one.iterdir()) == ["metrics.jsonl", "overlay.svg"]
    names = re.findall("<!-- (.*log|ours|wide) -->", (one / "overlay.svg").read_text())
    assert names == ["one/log", "lr=1/log", "ours", "wide"]


def test_flags_without_effect_say_so(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "plot", lambda *_: None)  # which takes a second
    monkeypatch.setattr(plot.time, "sleep", Mock(side_effect=KeyboardInterrupt))
    Path("log.txt").write_text("0 val 10.9\n")
    assert "--smooth" in command("log.txt", "--smooth", 5)[1]
    code, _, error = command("log.txt", "--smooth", -5)
    assert (code, "smooth -5" in error) == (2, True)
    for rows, has_ended in ((a_run(), True), (a_run()[:100], False)):
        assert ("--watch" in command(log(Path(), rows), "--watch")[1]) == has_ended


def test_watching_draws_until_interrupted(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.dumps(val(1, 8.0, 1001.0)) + "\n"
    contents = ['{"kind": "tr', json.dumps(start()) + "\n", line, line.replace("8.0", "7.0")]

    def next_content(seconds: float) -> None:
        if not contents:
            raise KeyboardInterrupt
        Path("log").mkdir(exist_ok=True)
        Path("log/metrics.jsonl").write_text(contents.pop(0))

    monkeypatch.setattr(plot.time, "sleep", next_content)
    code, output, _ = command("--watch")
    said = re.findall("^(?:waiting|wrote .*png)", output, re.MULTILINE)
    assert (code, said) == (0, ["waiting"] * 3 + ["wrote log/plot.png"] * 2)
    assert "7.0000" in Path("log/report.md").read_text()
