"""Draw the curves of a training run, or of several over each other, and write the run's report.

A RUN is a log folder of train.py, a metrics.jsonl or build-nanogpt's log.txt; NAME=RUN names it.
One run gets plot.png and report.md in its folder, several get overlay.png in the first one's.

Example: python plot.py ours=log lineage=build-nanogpt/log/log.txt --x tokens --out curves.pdf
"""

from __future__ import annotations

import math
import os
import re
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from common import atomic_write, exit_with_one_line
from metrics import Row, parse_row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

XAxis = Literal["steps", "tokens", "hours"]
TableRow = tuple[object, ...]

# Published figures of GPT-2 are those of OpenAI's checkpoint as build-nanogpt measured it (its
# play.ipynb and hellaswag.py). GPT-3's is from Brown et al. 2020, table H.1, "Small", zero-shot.
GPT2_SCORES = {"acc": 0.2859, "acc_norm": 0.2955, "harness_acc": 0.2892, "harness_acc_norm": 0.3114}
GPT3_SCORES = {"acc_norm": 0.337}
# On the validation shard of FineWeb-Edu at T=1024: it means nothing for a run on another text. The
# data set of a run is known by what the names of its shards begin with.
GPT2_VAL_LOSS = 3.2924
FINEWEB_EDU = "edufineweb"

# What the report calls the kinds of lines that take time.
KIND_NAMES = {
    "val": "validation",
    "hellaswag": "HellaSwag",
    "sample": "samples",
    "checkpoint": "checkpoints",
}

# The text width of a two-column paper. Where it is shown 600 pixels wide, 8 pt are 9 pixels.
FIGURE_INCHES = (7.2, 5.6)
STYLE = {"font.size": 8, "legend.fontsize": 7, "legend.frameon": False, "axes.linewidth": 0.6}
# Okabe and Ito's colours, which the colour-blind can distinguish. Dashes and markers distinguish
# the runs where the page is printed in black.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (9, 3)))
MARKERS = ("o", "s", "^", "D", "v")
# Line widths in points.
THICK = 1.5
THIN = 0.7


@dataclass(frozen=True)
class PlotConfig:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[RUN ...]")] = (
        "log",
    )
    """Log folders, metrics.jsonl or log.txt files, each optionally as NAME=RUN."""
    out: Path | None = None
    """The picture. Default: plot.png (several runs: overlay.png) in the first run's folder."""
    format: Literal["png", "svg", "pdf"] | None = None
    """Format of the picture. Default: the suffix of --out, else png."""
    smooth: int | None = None
    """Logged steps in the moving average; 0 draws raw values only. Default: 2% of the steps."""
    x: XAxis = "steps"
    """Horizontal axis. Hours are running time, without the pauses between processes."""
    watch: bool = False
    """Draw again every 10 seconds while training runs, until Ctrl-C."""
    show: bool = False
    """Open a window as well."""


# ---- reading a log -------------------------------------------------------------------------------


@dataclass
class RunLog:
    """What a run has logged; ``rows[kind][step]`` is the last line of that kind and step.

    They are in order of step, each with its position on every axis that the log records as "at".
    """

    name: str
    path: Path
    rows: dict[str, dict[int, dict[str, Any]]] = field(default_factory=lambda: defaultdict(dict))
    start: Row | None = None  # the newest process's "run" line
    config: dict[str, Any] = field(default_factory=dict)  # its configuration
    dataset: str | None = None  # what the names of its shards begin with, where that is recorded
    hours: float = 0.0  # from each process's first line to its last, summed
    notes: list[str] = field(default_factory=list)  # what is unusual, for the user

    def series(self, kind: str, name: str, x: XAxis = "steps") -> tuple[np.ndarray, np.ndarray]:
        """Positions and values, (n,) float64 in order of step; NaN where a value is missing.

        Raises ValueError when the log does not record the axis ``x``.
        """
        rows = self.rows[kind].values()
        if any(x not in row["at"] for row in rows):
            raise ValueError(f"{self.path}: its lines do not record {x}; use --x steps")
        # NumPy makes NaN of None, which stands for it in JSON too.
        ys = np.array([row.get(name) for row in rows], dtype=np.float64)
        return np.array([row["at"][x] for row in rows], dtype=np.float64), ys


def parse_line(line: str) -> Row | None:
    """A line of metrics.jsonl or log.txt, or None when it is incomplete or something else."""
    # The pattern includes the end of the line: without it the number may have lost digits.
    match = re.fullmatch(r"(\d+) (train|val|hella) (nan|inf|[\d.]+)\n", line)
    if match is None:
        return parse_row(line)
    step = int(match[1])
    value = float(match[3])
    if match[2] == "hella":
        return Row(kind="hellaswag", step=step, acc_norm=value)
    return Row(kind=match[2], step=step, loss=value)


def read_metrics(path: Path | str, name: str | None = None) -> RunLog:
    """Read a log folder, a metrics.jsonl or a log.txt; the last line of a (kind, step) counts.

    Raises FileNotFoundError when there is no log, ValueError when there is nothing to draw.
    """
    candidates = (Path(path), Path(path, "metrics.jsonl"), Path(path, "log.txt"))
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{path}: no such run; train first, or give another folder")
    run = RunLog(name=name or file.resolve().parent.name, path=file)
    if file.suffix == ".txt":
        # Not in the log: these are constants of build-nanogpt's train_gpt2.py.
        run.config = {"batch_tokens": 524_288}
        run.dataset = FINEWEB_EDU

    # A process that is killed may leave half a line, or half of a character in UTF-8.
    with file.open(encoding="utf-8", errors="replace") as lines:
        parsed = [parse_line(line) for line in lines if line.strip()]
    if None in parsed:
        run.notes.append(f"torn or unreadable lines left out: {parsed.count(None)}")

    rows: list[dict[str, Any]] = []
    # Later than any line: nothing ran before the first line of a process.
    previous_time = math.inf
    for row in filter(None, parsed):
        step = row["step"]
        if row["kind"] == "run":
            if row.get("resumed_from"):
                run.notes.append(f"resumed from {row['resumed_from']}")
                # The new process computes the steps after its checkpoint again.
                rows = [old for old in rows if old["step"] <= step]
            else:
                rows = []
                run.hours = 0.0
            run.start = row
            run.config = row.get("config", {})
            # Versions before this key did not record what they trained on.
            run.dataset = row.get("dataset")
            previous_time = math.inf
        at: dict[str, float] = {"steps": step}
        if "batch_tokens" in run.config:
            at["tokens"] = step * run.config["batch_tokens"]
        if "time" in row:
            # Not below 0, in case the clock was set back.
            run.hours += max(0.0, row["time"] - previous_time) / 3600
            previous_time = row["time"]
            at["hours"] = run.hours
        rows.append({**row, "at": at})
    for logged in sorted(rows, key=lambda logged: logged["step"]):
        run.rows[logged["kind"]][logged["step"]] = logged

    if not any(run.rows[kind] for kind in ("train", "val", "hellaswag")):
        raise ValueError(f"{file}: nothing to draw in it yet; wait for the first step, or train")
    steps, losses = run.series("train", "loss")
    lost = steps[~np.isfinite(losses)]
    if len(lost):
        run.notes.append(f"steps without a finite loss: {len(lost)}, first {lost[0]:.0f}")
    return run


# ---- the picture ---------------------------------------------------------------------------------


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Centred average over (n,) values; those that are not finite do not count."""
    finite = np.isfinite(values)
    kernel = np.ones(min(window, len(values)))
    counts = np.convolve(finite, kernel, "same")
    sums = np.convolve(np.where(finite, values, 0.0), kernel, "same")
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def draw_published(ax: Axes, value: float, name: str, dashes: str) -> None:
    """A horizontal line behind those of the runs, with its name in the right margin."""
    label = f"{name}\n{value}"
    ax.axhline(value, color="0.35", linewidth=0.9, linestyle=dashes, zorder=1, label=label)
    ax.annotate(label, (1.02, value), xycoords=ax.get_yaxis_transform(), va="center", size=6.5)


def format_count(value: float, position: int | None = None) -> str:
    """5k steps, 1.3M tokens/s, 10B tokens; the second parameter is matplotlib's."""
    from matplotlib.ticker import EngFormatter

    # EngFormatter would write 500m for 0.5, and 10G for what is called 10 billion tokens.
    return f"{value:g}" if 0 < value < 1 else EngFormatter(sep="")(value).replace("G", "B")


def draw(figure: Figure, runs: list[RunLog], x: XAxis, smooth: int | None) -> None:
    """Fill an empty figure with four panels: loss, HellaSwag, schedule and speed.

    Raises ValueError when a log does not record the axis ``x``.
    """
    from matplotlib.ticker import LogLocator

    figure.set_layout_engine("constrained")
    (loss, hellaswag), (rate, speed) = figure.subplots(2, 2, sharex=True)
    norm = rate.twinx()
    # Before the lines: they may fix the range of an axis, and a linear one may begin below 0.
    norm.set_yscale("log")
    mfu = speed.twinx()

    # The raw values of several runs cover each other.
    raw_alpha = 0.3 / math.sqrt(len(runs))
    for run, color, dashes, marker in zip(runs, cycle(COLORS), cycle(DASHES), cycle(MARKERS)):
        # What is drawn below without a colour or dashes of its own takes those of the run.
        for ax in figure.axes:
            ax.set_prop_cycle(color=[color], linestyle=[dashes])
        steps = len(run.rows["train"])
        window = steps // 50 if smooth is None else min(smooth, steps)
        for ax, name in ((loss, "loss"), (norm, "grad_norm"), (speed, "tokens_per_s")):
            xs, ys = run.series("train", name, x)
            label = f"{run.name}: {name}"
            if window > 1:
                ax.plot(xs, ys, ls="-", lw=THIN, alpha=raw_alpha, label=f"{label}, each step")
                ys = moving_average(ys, window)
            ax.plot(xs, ys, lw=THIN if ax is norm else THICK, label=label)
        rate.plot(*run.series("train", "lr", x), lw=THICK, label=f"{run.name}: lr")
        mfu.plot(*run.series("train", "mfu", x), lw=THIN, label=f"{run.name}: mfu")
        for ax, kind, name in ((loss, "val", "loss"), (hellaswag, "hellaswag", "acc_norm")):
            xs, ys = run.series(kind, name, x)
            (line,) = ax.plot(xs, ys, lw=THIN, marker=marker, label=f"{run.name}: {kind}")
            line.set(markersize=3.2, markerfacecolor="white", markeredgewidth=0.8)
            # The markers of a long run would touch each other.
            line.set_markevery(len(xs) // 25 + 1)
        # The standard error of a proportion. A log.txt does not record the number of examples n:
        # the error is then NaN, and not drawn.
        xs, accuracy = run.series("hellaswag", "acc_norm", x)
        _, n = run.series("hellaswag", "n", x)
        error = np.sqrt(accuracy * (1 - accuracy) / n)
        hellaswag.fill_between(xs, accuracy - error, accuracy + error, alpha=0.15, lw=0)

        # One legend for what the lines of a run are, and below another for which run is which.
        if run is runs[0]:
            what = ["training, each step", "training, smoothed", "validation"]
            if window <= 1:
                del what[1]
            loss.legend(loss.lines, what, loc="upper right")
    if len(runs) > 1:
        names = [run.name for run in runs]
        figure.legend(hellaswag.lines, names, loc="outside upper center", ncols=4)

    loss.set_ylabel("loss (nats per token)")
    hellaswag.set_ylabel("HellaSwag acc_norm")
    rate.set(xlabel=x, ylabel="learning rate (thick)")
    rate.ticklabel_format(axis="y", scilimits=(0, 0), useMathText=True)
    norm.set_ylabel("gradient norm (thin)")
    # Norms often stay within one power of ten, where the default would label a single tick.
    norm.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    norm.yaxis.set_major_formatter(format_count)
    norm.minorticks_off()
    speed.set(xlabel=x, ylabel="tokens/s (thick)", ylim=(0, None))
    speed.yaxis.set_major_formatter(format_count)
    # Of all panels, as they have this axis in common.
    speed.xaxis.set_major_formatter(format_count)
    mfu.set(ylabel="MFU (thin)", ylim=(0, 1))
    # A scale of tokens above the steps, if a step has as many tokens in all runs.
    batches = {run.config.get("batch_tokens") for run in runs}
    if x == "steps" and len(batches) == 1 and None not in batches:
        (tokens,) = batches
        for ax in (loss, hellaswag):
            top = ax.secondary_xaxis("top", functions=(lambda s: s * tokens, lambda t: t / tokens))
            top.set_xlabel("tokens")
            top.xaxis.set_major_formatter(format_count)
    for ax in (hellaswag, rate, norm, speed, mfu):
        if not any(np.isfinite(line.get_ydata()).any() for line in ax.lines):
            ax.set_ylabel(f"{ax.get_ylabel()}: not logged")
            # A second axis without a line has no scale.
            ax.tick_params(right=False, labelright=False)

    # The range of the losses without the steep beginning, a twentieth of all points, which would
    # flatten what follows.
    losses = [y for line in loss.lines for y in line.get_ydata() if np.isfinite(y)]
    low, high = np.percentile(losses or [GPT2_VAL_LOSS], (0.1, 95))
    if any(run.dataset == FINEWEB_EDU for run in runs):
        draw_published(loss, GPT2_VAL_LOSS, "GPT-2 124M,\nFineWeb-Edu,\nT=1024", dashes="-.")
        low = min(low, GPT2_VAL_LOSS)
        high = max(high, GPT2_VAL_LOSS)
    margin = 0.06 * (high - low) + 0.01
    loss.set_ylim(low - margin, high + margin)
    # One of HellaSwag's four endings is the right one.
    draw_published(hellaswag, 0.25, "chance", dashes=":")
    draw_published(hellaswag, GPT2_SCORES["acc_norm"], "GPT-2\n124M", dashes="-.")
    draw_published(hellaswag, GPT3_SCORES["acc_norm"], "GPT-3\n124M", dashes="--")


def plot(runs: list[RunLog], out: Path, x: XAxis = "steps", smooth: int | None = None) -> None:
    """Draw the runs into ``out``, a .png, .svg or .pdf; this needs no display."""
    from matplotlib import style
    from matplotlib.figure import Figure

    # pyplot.figure() would keep every picture of --watch in memory.
    figure = Figure(FIGURE_INCHES)
    with style.context(STYLE):
        draw(figure, runs, x, smooth)
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(out) as file:
            figure.savefig(file, format=out.suffix.removeprefix("."), dpi=200)


def plot_run(log_dir: Path | str) -> None:
    """Write plot.png and report.md into a log folder; raises what ``read_metrics`` does."""
    plot([read_metrics(log_dir)], Path(log_dir) / "plot.png")
    report(log_dir)


# ---- the report ----------------------------------------------------------------------------------


def markdown_table(rows: list[TableRow]) -> str:
    """A Markdown table headed by its first row; shorter rows end in empty cells."""
    width = len(rows[0])
    lines = []
    for row in rows:
        cells = [str(cell).replace("|", "\\|").replace("\n", " ") for cell in row]
        cells += [""] * (width - len(cells))
        lines.append(f"| {' | '.join(cells)} |")
    lines.insert(1, "|---" * width + "|")
    return "\n".join(lines)


def result_rows(run: RunLog) -> list[TableRow]:
    """How far the run came, its last losses and accuracies; beside them GPT-2's and GPT-3's."""
    rows: list[TableRow] = []
    _, losses = run.series("train", "loss")
    if len(losses):
        steps_done = max(run.rows["train"]) + 1
        rows.append(("steps", f"{steps_done:,} of {run.config['max_steps']:,}"))
        rows.append(("training tokens", f"{steps_done * run.config['batch_tokens']:,}"))
    recent = losses[-100:]
    if np.isfinite(recent).any():
        rows.append((f"training loss, last {len(recent)} steps", f"{np.nanmean(recent):.4f}"))
    steps, losses = run.series("val", "loss")
    if len(losses):
        gpt2 = GPT2_VAL_LOSS if run.dataset == FINEWEB_EDU else ""
        rows.append((f"validation loss, step {steps[-1]:,.0f}", f"{losses[-1]:.4f}", gpt2))
    if run.rows["hellaswag"]:
        step, scores = max(run.rows["hellaswag"].items())
        n = scores["n"]
        for name, gpt2_score in GPT2_SCORES.items():
            # Versions before harness_acc did not record it, nor any standard error.
            score = scores.get(name)
            if score is not None:
                error = scores.get(f"{name}_stderr", math.sqrt(score * (1 - score) / n))
                what = f"HellaSwag {name}, step {step:,}, {n:,} examples"
                gpt3_score = GPT3_SCORES.get(name, "")
                rows.append((what, f"{score:.4f} ± {error:.4f}", gpt2_score, gpt3_score))
    return rows


def speed_rows(run: RunLog) -> list[TableRow]:
    """Speed and memory of the training steps, and where the time of all processes went."""
    rows: list[TableRow] = []
    # Medians, since the first step compiles and others may wait for a disk.
    for what, name, statistic, form in (
        ("tokens/s, median", "tokens_per_s", np.nanmedian, ",.0f"),
        ("ms a step, median", "ms", np.nanmedian, ",.1f"),
        ("MFU, median", "mfu", np.nanmedian, ".1%"),
        ("peak memory, GB", "memory_gb", np.nanmax, ".2f"),
    ):
        _, values = run.series("train", name)
        if np.isfinite(values).any():
            rows.append((what, format(statistic(values), form)))

    seconds = {
        KIND_NAMES.get(kind, kind): sum(row.get("seconds", 0.0) for row in by_step.values())
        for kind, by_step in run.rows.items()
    }
    _, ms = run.series("train", "ms")
    if len(ms):
        # What a process's first step takes beyond others is mostly the compiler's time. It has the
        # number of the step at which the process started.
        first_steps = run.rows["run"].keys() & run.rows["train"].keys()
        first_ms = [run.rows["train"][step]["ms"] for step in first_steps]
        extra = max(0.0, sum(first_ms) - len(first_ms) * np.median(ms)) / 1000
        seconds["first steps beyond the median (compile)"] = extra
        seconds["training"] = sum(ms) / 1000 - extra
    total = run.hours * 3600
    seconds["other"] = total - sum(seconds.values())
    rows.append(("time, all", f"{total:,.1f} s"))
    for name, value in sorted(seconds.items(), key=lambda item: -item[1]):
        # Less than that would be printed as 0.0.
        if value >= 0.05:
            rows.append((f"time, {name}", f"{value:,.1f} s ({value / total:.1%})"))
    return rows


def report(run_dir: Path | str, picture: Path | None = None) -> Path:
    """Write report.md beside a run's log; it shows ``picture``, by default the plot.png there.

    Raises ValueError when the log has no "run" line, as a log.txt never has.
    """
    run = read_metrics(run_dir)
    if run.start is None:
        raise ValueError(f"{run.path}: no line of kind run in it, so there is no report")
    folder = run.path.parent
    shown = os.path.relpath(picture or folder / "plot.png", folder)
    # The line itself last: its device and dtype are what "auto" in the configuration has become.
    model = run.config.get("model", {})
    settings = {**run.config, **model, **run.start.get("versions", {}), **run.start}
    settings["started"] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.start["time"]))
    for name in ("kind", "step", "time", "config", "model", "versions"):
        settings.pop(name, None)
    head = ("", "this run", "GPT-2 124M, published", "GPT-3 124M, published")
    parts = [
        f"# Run report: {run.name}",
        f"![curves]({shown})",
        markdown_table([head, *result_rows(run)]),
        "± standard error. Published: build-nanogpt (loss at T=1024); GPT-3's table H.1.",
        markdown_table([("speed and time", "this run"), *speed_rows(run)]),
        markdown_table([("setting", "value"), *settings.items()]),
        *(f"Note: {note}." for note in run.notes),
    ]
    # The last sample of each prompt: a run that was resumed may have had another one before.
    samples = {row["prompt"]: row for row in run.rows["sample"].values()}
    for row in samples.values():
        # Indented by four, a text is shown as it is.
        parts.append(f"Sample of step {row['step']:,}:")
        parts.append("    " + row["text"].replace("\n", "\n    "))
    with atomic_write(folder / "report.md") as file:
        file.write(("\n\n".join(parts) + "\n").encode())
    return folder / "report.md"


# ---- command line --------------------------------------------------------------------------------


def draw_once(config: PlotConfig) -> None:
    """Read the runs, write the picture and, for a single run of ours, the report."""
    runs = []
    for argument in config.runs:
        name, _, path = argument.rpartition("=")
        # A path may itself contain "=".
        if Path(argument).exists():
            name = ""
            path = argument
        runs.append(read_metrics(path, name or None))
    out = config.out or runs[0].path.with_name("plot.png" if len(runs) == 1 else "overlay.png")
    if config.format is not None:
        out = out.with_suffix(f".{config.format}")
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--out {out} must end in .png, .svg or .pdf, or give a --format")
    plot(runs, out, config.x, config.smooth)
    print(f"wrote {out}")
    if len(runs) == 1 and runs[0].start is not None:
        print(f"wrote {report(runs[0].path, out)}")
    for run in runs:
        for note in run.notes:
            print(f"{run.name}: {note}")
    if config.show:
        from matplotlib import pyplot

        if pyplot.get_backend().lower() == "agg":
            raise ValueError(f"--show: no window system here; look at {out} instead")
        draw(pyplot.figure("GPT-xs", FIGURE_INCHES, clear=True), runs, config.x, config.smooth)
        if config.watch:
            pyplot.pause(0.1)
        else:
            pyplot.show()


def main() -> None:
    config = tyro.cli(PlotConfig, description=__doc__)
    with exit_with_one_line():
        draw_once(config)
        # Ctrl-C is the way to end --watch, and so no failure.
        with suppress(KeyboardInterrupt):
            while config.watch:
                time.sleep(10.0)
                draw_once(config)


if __name__ == "__main__":
    main()
