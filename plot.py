"""Draw a training run, or lay several over each other, and write the run's report.

A RUN is a log folder of train.py, a metrics.jsonl or build-nanogpt's log.txt; NAME=RUN names it.
One run leaves plot.png and report.md in its folder, several overlay.png in the first one's.

Example: python plot.py ours=log lineage=build-nanogpt/log/log.txt --x tokens --out curves.pdf
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

XAxis = Literal["steps", "tokens", "hours"]
WATCH_SECONDS = 10.0
LOG_TXT_BATCH_TOKENS = 524_288  # a constant of build-nanogpt's train_gpt2.py; log.txt leaves it out
# Published figures. GPT-2: OpenAI's checkpoint as build-nanogpt measured it (play.ipynb and
# hellaswag.py there). GPT-3: Brown et al. 2020, table H.1, "Small", zero-shot.
GPT2_VAL_LOSS = 3.2924  # on the validation shard of FineWeb-Edu, T=1024
GPT2 = {"acc": 0.2859, "acc_norm": 0.2955, "harness_acc": 0.2892, "harness_acc_norm": 0.3114}
GPT3 = {"acc_norm": 0.337}
CHANCE = 0.25
# What report.md says of each: its name there, the value it takes of all steps, and its format.
SPEEDS = {
    "tokens_per_s": ("tokens/s, median", np.nanmedian, "{:,.0f}"),
    "ms": ("ms a step, median", np.nanmedian, "{:,.1f}"),
    "mfu": ("MFU, median", np.nanmedian, "{:.1%}"),
    "memory_gb": ("peak memory, GB", np.nanmax, "{:.2f}"),
}
FIRST_STEPS = "first steps beyond the median (compile)"
CHORES = {"train": "training", "val": "validation", "hellaswag": "HellaSwag"}
CHORES |= {"sample": "samples", "checkpoint": "checkpoints"}
STAMPS = ("step", "time")  # of the log's line, not settings
# 7.2 inches is the text width of a two-column paper; 600 pixels wide, its 8 pt type is 9 pixels.
FIGURE_INCHES, DPI = (7.2, 5.6), 200
STYLE = {"font.size": 8, "legend.fontsize": 7, "legend.frameon": False, "axes.linewidth": 0.6}
# Okabe and Ito's colours, safe for the colour-blind; dashes and markers carry them in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (9, 3)))
MARKERS = ("o", "s", "^", "D", "v")
THIN = 0.7  # points
DOTS = {"markersize": 3.2, "markerfacecolor": "white", "markeredgewidth": 0.8, "linewidth": THIN}


@dataclass(frozen=True)
class PlotOptions:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[RUN ...]")] = (
        "log",
    )
    """Log folders, metrics.jsonl or log.txt files, each optionally as NAME=RUN."""
    out: Path | None = None
    """The picture. Default: plot.png (several runs: overlay.png) in the first run's folder."""
    format: Literal["png", "svg", "pdf"] | None = None
    """Format of the picture. Default: the ending of --out, else png."""
    smooth: int | None = None
    """Logged steps that a smoothed point averages; 0 draws raw values only. Default: 2% of them."""
    x: XAxis = "steps"
    """Horizontal axis. Hours are those that processes ran, without the pauses between them."""
    watch: bool = False
    """Draw again every 10 seconds, while training runs, until Ctrl-C."""
    show: bool = False
    """Open a window as well."""


@dataclass
class Metrics:
    """What a run has logged; `rows[kind][step]` is the line that counts for that kind and step."""

    name: str
    path: Path
    rows: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)  # the newest process's "run" line
    config: dict[str, Any] = field(default_factory=dict)  # its configuration
    hours: float = 0.0  # from each process's first line to its last, summed
    notes: list[str] = field(default_factory=list)  # what is unusual, for the user

    def series(self, kind: str, name: str, x: XAxis = "steps") -> tuple[np.ndarray, np.ndarray]:
        """Positions and values, (n,) float64 in order of step; ValueError where `x` is unknown."""
        rows = [row for _, row in sorted(self.rows.get(kind, {}).items())]
        if any(x not in row["at"] for row in rows):
            raise ValueError(f"{self.path}: its lines do not tell {x}; use --x steps")
        ys = [math.nan if row.get(name) is None else row[name] for row in rows]
        return np.array([row["at"][x] for row in rows], float), np.array(ys, float)


def parse_line(line: str) -> dict[str, Any] | None:
    """A line of metrics.jsonl or log.txt as a row; None where it is torn or something else."""
    # Without its line's end the number in a log.txt may have lost digits.
    if match := re.fullmatch(r"(\d+) (train|val|hella) (nan|inf|[\d.]+)\n", line):
        kind, name = ("hellaswag", "acc_norm") if match[2] == "hella" else (match[2], "loss")
        return {"kind": kind, "step": int(match[1]), name: float(match[3])}
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and {"kind", "step"} <= row.keys() else None


def read_metrics(path: Path | str, name: str | None = None) -> Metrics:
    """Read a log folder, a metrics.jsonl or a log.txt; the last line for a (kind, step) counts.

    A resumed process takes back the steps beyond its checkpoint, a fresh start all before it.
    Raises FileNotFoundError where there is no log, ValueError where there is nothing to draw.
    """
    places = [Path(path), Path(path, "metrics.jsonl"), Path(path, "log.txt")]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{places[0]}: no such run; train first, or name another folder")
    config = {"batch_tokens": LOG_TXT_BATCH_TOKENS} if path.suffix == ".txt" else {}
    metrics = Metrics(name or path.resolve().parent.name, path, config=config)
    text = path.read_text(encoding="utf-8", errors="replace")
    rows = [parse_line(line) for line in io.StringIO(text) if line.strip()]
    if torn := rows.count(None):
        metrics.notes.append(f"torn or unreadable lines left out: {torn}")
    previous = math.inf
    for row in filter(None, rows):
        kind, step = row.pop("kind"), row["step"]
        if kind == "run":
            if row.get("resumed_from"):
                metrics.notes.append(f"resumed from {row['resumed_from']}")
                for old, by_step in metrics.rows.items():
                    metrics.rows[old] = {s: r for s, r in by_step.items() if s <= step}
            else:
                metrics.rows, metrics.hours = {}, 0.0
            metrics.run, metrics.config = dict(row), row.get("config", {})
            previous = math.inf  # the pause before a process starts is nobody's work
        row["at"], row["process"] = {"steps": step}, metrics.run.get("time")
        if "time" in row:
            metrics.hours += max(0.0, row["time"] - previous) / 3600
            previous, row["at"]["hours"] = row["time"], metrics.hours
        if "batch_tokens" in metrics.config:
            row["at"]["tokens"] = step * metrics.config["batch_tokens"]
        metrics.rows.setdefault(kind, {})[step] = row
    if not any(metrics.rows.get(kind) for kind in ("train", "val", "hellaswag")):
        raise ValueError(f"{path}: nothing to draw in it yet; wait for the first step, or train")
    steps, losses = metrics.series("train", "loss")
    if len(lost := steps[~np.isfinite(losses)]):
        metrics.notes.append(f"steps without a finite loss: {len(lost)}, first {lost[0]:.0f}")
    return metrics


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average over (n,) values that skips what is not finite."""
    finite = np.isfinite(values)
    kernel = np.ones(min(window, len(values)))
    counts = np.convolve(finite, kernel, "same")
    sums = np.convolve(np.where(finite, values, 0.0), kernel, "same")
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def draw(figure: Figure, runs: list[Metrics], x: XAxis, smooth: int | None) -> None:
    """Fill an empty figure with four panels: loss, HellaSwag, schedule and speed.

    Lines are labelled "RUN: WHAT". Raises ValueError where a run cannot be put on this axis.
    """
    from matplotlib.ticker import EngFormatter, LogLocator

    units = EngFormatter(sep="")  # 5k steps, 1.3M tokens/s; 10G tokens are written 10B
    figure.set_layout_engine("constrained")
    (loss, hella), (rate, speed) = figure.subplots(2, 2, sharex=True)
    norm, mfu = rate.twinx(), speed.twinx()

    def curve(ax: Axes, run: Metrics, name: str, style: dict[str, Any]) -> None:
        xs, ys = run.series("train", name, x)
        window = len(ys) // 50 if smooth is None else smooth
        if window > 1:
            faint = {"color": style["color"], "linewidth": THIN, "alpha": 0.3 / len(runs) ** 0.5}
            ax.plot(xs, ys, **faint, label=f"{run.name}: {name}, each step")
            ys = smoothed(ys, window)
        ax.plot(xs, ys, **style, label=f"{run.name}: {name}")

    for i, run in enumerate(runs):
        thick = {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i % len(DASHES)]}
        thin = {**thick, "linewidth": THIN}
        dots = {**thick, **DOTS, "marker": MARKERS[i % len(MARKERS)]}
        curve(loss, run, "loss", thick)
        for ax, kind, name in ((loss, "val", "loss"), (hella, "hellaswag", "acc_norm")):
            xs, ys = run.series(kind, name, x)
            ax.plot(xs, ys, **dots, markevery=len(xs) // 25 + 1, label=f"{run.name}: {kind}")
        error = np.sqrt(ys * (1 - ys) / run.series("hellaswag", "n", x)[1])
        hella.fill_between(xs, ys - error, ys + error, color=thick["color"], alpha=0.15, lw=0)
        rate.plot(*run.series("train", "lr", x), **thick, label=f"{run.name}: lr")
        curve(norm, run, "grad_norm", thin)
        curve(speed, run, "tokens_per_s", thick)
        mfu.plot(*run.series("train", "mfu", x), **thin, label=f"{run.name}: mfu")
        if i == 0:
            what = ("training, each step", "training, smoothed")[: len(loss.lines) - 1]
            loss.legend(loss.lines, [*what, "validation"], loc="upper right")
    if len(runs) > 1:
        figure.legend(hella.lines, [r.name for r in runs], loc="outside upper center", ncols=4)
    loss.set_ylabel("loss (nats per token)")
    hella.set_ylabel("HellaSwag acc_norm")
    rate.set(xlabel=x, ylabel="learning rate (thick)")
    rate.ticklabel_format(axis="y", scilimits=(0, 0), useMathText=True)
    norm.set(ylabel="gradient norm (thin)", yscale="log")
    norm.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    norm.minorticks_off()
    speed.set(xlabel=x, ylabel="tokens/s (thick)", ylim=(0, None))
    mfu.set(ylabel="MFU (thin)", ylim=(0, 1))
    for axis in (norm.yaxis, speed.yaxis, speed.xaxis):
        axis.set_major_formatter(lambda v, _: units(v).replace("G", "B") if v >= 1 else f"{v:g}")
    for ax in (hella, rate, norm, speed, mfu):
        if not any(np.isfinite(line.get_ydata()).any() for line in ax.lines):
            ax.set_ylabel(f"{ax.get_ylabel()}: not logged")
            ax.tick_params(right=False, labelright=False)  # a second axis without a line
    batches = {run.config.get("batch_tokens") for run in runs}
    if x == "steps" and len(batches) == 1 and None not in batches:
        tokens = batches.pop()
        for ax in (loss, hella):
            top = ax.secondary_xaxis("top", functions=(lambda v: v * tokens, lambda v: v / tokens))
            top.set_xlabel("tokens")
            top.xaxis.set_major_formatter(lambda v, _: units(v).replace("G", "B"))
    framed = [y for line in loss.lines for y in line.get_ydata() if np.isfinite(y)]
    # The steep beginning, a twentieth of all points, would flatten what follows.
    low, high = np.percentile(framed or [GPT2_VAL_LOSS], (0.1, 95))
    published = [(hella, GPT2["acc_norm"], "GPT-2\n124M", "-."), (hella, CHANCE, "chance", ":")]
    published.append((hella, GPT3["acc_norm"], "GPT-3\n124M", "--"))
    # The quickstart trains on other text, where that loss means nothing.
    if any(run.config.get("preset") != "quickstart" for run in runs):
        published.append((loss, GPT2_VAL_LOSS, "GPT-2 124M,\nFineWeb-Edu,\nT=1024", "-."))
        low, high = min(low, GPT2_VAL_LOSS), max(high, GPT2_VAL_LOSS)
    for ax, value, name, dashes in published:
        label = f"{name}\n{value}"
        ax.axhline(value, color="0.35", linewidth=0.9, linestyle=dashes, zorder=1, label=label)
        ax.annotate(label, (1.02, value), xycoords=ax.get_yaxis_transform(), va="center", size=6.5)
    margin = 0.06 * (high - low) + 0.01
    loss.set_ylim(low - margin, high + margin)


def plot(runs: list[Metrics], out: Path, x: XAxis = "steps", smooth: int | None = None) -> None:
    """Draw the runs into `out`, a .png, .svg or .pdf; it needs no display."""
    from matplotlib import figure, rc_context

    picture, canvas = io.BytesIO(), figure.Figure(FIGURE_INCHES)
    with rc_context(STYLE):
        draw(canvas, runs, x, smooth)
        canvas.savefig(picture, format=out.suffix[1:], dpi=DPI)
    write(out, picture.getvalue())


def plot_run(log_dir: Path | str) -> None:
    """Write plot.png and report.md into a log folder. ValueError where there is nothing to draw."""
    plot([read_metrics(log_dir)], Path(log_dir) / "plot.png")
    report(log_dir)


def write(path: Path, content: bytes) -> None:
    """Replace a file as a whole, so that neither a reader nor a crash meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def table(rows: list[tuple[Any, ...]]) -> str:
    """A Markdown table headed by its first row; shorter rows end in empty cells."""
    lines = []
    for row in rows:
        cells = [str(cell).replace("|", "\\|").replace("\n", " ") for cell in row]
        lines.append(f"| {' | '.join(cells + [''] * (len(rows[0]) - len(cells)))} |")
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def results(run: Metrics) -> list[tuple[Any, ...]]:
    """Rows of the report: how far the run came, its last losses and accuracies."""
    rows: list[tuple[Any, ...]] = []
    _, losses = run.series("train", "loss")
    if len(losses):
        done, wanted = max(run.rows["train"]) + 1, run.config["max_steps"]
        rows.append(("steps", f"{done:,} of {wanted:,}"))
        rows.append(("training tokens", f"{done * run.config['batch_tokens']:,}"))
    if np.isfinite(losses[-100:]).any():
        recent = losses[-100:]
        rows.append((f"training loss, last {len(recent)} steps", f"{np.nanmean(recent):.4f}"))
    steps, losses = run.series("val", "loss")
    if len(losses):
        gpt2 = "" if run.config.get("preset") == "quickstart" else GPT2_VAL_LOSS
        rows.append((f"validation loss, step {steps[-1]:,.0f}", f"{losses[-1]:.4f}", gpt2))
    if run.rows.get("hellaswag"):
        step, row = max(run.rows["hellaswag"].items())
        for name in [name for name in GPT2 if name in row]:
            error = row.get(f"{name}_stderr", math.sqrt(row[name] * (1 - row[name]) / row["n"]))
            what = f"HellaSwag {name}, step {step:,}, {row['n']:,} examples"
            rows.append((what, f"{row[name]:.4f} ± {error:.4f}", GPT2[name], GPT3.get(name, "")))
    return rows


def speeds(run: Metrics) -> list[tuple[Any, ...]]:
    """Rows of the report: speed, memory, and where the time of all processes went."""
    rows: list[tuple[Any, ...]] = []
    for name, (what, pick, form) in SPEEDS.items():
        values = run.series("train", name)[1]
        if np.isfinite(values).any():
            rows.append((what, form.format(pick(values))))
    kinds = {kind: list(by_step.values()) for kind, by_step in run.rows.items()}
    seconds = {kind: sum(row.get("seconds", 0.0) for row in rs) for kind, rs in kinds.items()}
    _, ms = run.series("train", "ms")
    if len(ms):
        first = {row["process"]: row["ms"] for row in reversed(kinds["train"])}
        extra = (sum(first.values()) - len(first) * np.median(ms)) / 1000
        seconds[FIRST_STEPS] = max(0.0, extra)
        seconds["train"] = sum(ms) / 1000 - seconds[FIRST_STEPS]
    total = run.hours * 3600
    seconds["other"] = total - sum(seconds.values())
    rows.append(("time, all", f"{total:,.1f} s"))
    for kind, value in sorted(seconds.items(), key=lambda item: -item[1]):
        if value >= 0.05:
            rows.append(
                (f"time, {CHORES.get(kind, kind)}", f"{value:,.1f} s ({value / total:.1%})")
            )
    return rows


def report(run_dir: Path | str, picture: Path | None = None) -> Path:
    """Write report.md beside a run's log; it shows `picture`, by default plot.png beside it.

    Raises ValueError where the log does not say what run it is of, as a log.txt never does.
    """
    run = read_metrics(run_dir)
    if not run.run:
        raise ValueError(f"{run.path}: no line of kind run in it, so there is no report")
    folder = run.path.parent
    shown = os.path.relpath(picture or folder / "plot.png", folder)
    head = ("", "this run", "GPT-2 124M, published", "GPT-3 124M, published")
    settings = run.config | run.config.get("model", {}) | run.run.get("versions", {}) | run.run
    settings["started"] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.run["time"]))
    told = {k: v for k, v in settings.items() if not isinstance(v, dict) and k not in STAMPS}
    parts = [f"# Run report: {run.name}", f"![curves]({shown})"]
    parts += [table([head, *results(run)])]
    parts += ["± standard error. Published: build-nanogpt (loss at T=1024); GPT-3's table H.1."]
    parts += [table([("speed and time", "this run"), *speeds(run)])]
    parts += [table([("setting", "value"), *told.items()])]
    parts += [f"Note: {note}." for note in run.notes]
    samples = sorted(run.rows.get("sample", {}).items())
    for step, row in {row["prompt"]: (step, row) for step, row in samples}.values():
        parts += [f"Sample of step {step:,}:", "    " + row["text"].replace("\n", "\n    ")]
    write(folder / "report.md", ("\n\n".join(parts) + "\n").encode())
    return folder / "report.md"


def draw_once(options: PlotOptions) -> None:
    """Read the runs, write the picture and, for a single run of ours, the report."""
    runs = []
    for run in options.runs:
        name, _, path = ("", "", run) if Path(run).exists() else run.rpartition("=")
        runs.append(read_metrics(path, name or None))
    out = options.out or runs[0].path.with_name("overlay.png" if runs[1:] else "plot.png")
    out = out.with_suffix(f".{options.format}") if options.format else out
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--out {out}: must end in .png, .svg or .pdf, or name a --format")
    plot(runs, out, options.x, options.smooth)
    print(f"wrote {out}")
    if len(runs) == 1 and runs[0].run:
        print(f"wrote {report(runs[0].path, out)}")
    sys.stdout.writelines(f"{run.name}: {note}\n" for run in runs for note in run.notes)
    if options.show:
        from matplotlib import pyplot

        if pyplot.get_backend().lower() == "agg":
            raise ValueError(f"--show: no window system here; look at {out} instead")
        draw(pyplot.figure("GPT-xs", FIGURE_INCHES, clear=True), runs, options.x, options.smooth)
        pyplot.pause(0.1) if options.watch else pyplot.show()


def main() -> None:
    options = tyro.cli(PlotOptions, description=__doc__)
    try:
        draw_once(options)
        while options.watch:
            time.sleep(WATCH_SECONDS)
            draw_once(options)
    except (ValueError, FileNotFoundError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
