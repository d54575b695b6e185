"""Draw the curves of a training run, or of several over each other, and write the run's report.

A RUN is a log folder of train.py, a metrics.jsonl or build-nanogpt's log.txt; NAME=RUN names it.
One run gets plot.png and report.md in its folder, several get overlay.png in the first one's.
With --out in another folder nothing but that picture is written.

Example: python plot.py ours=log lineage=build-nanogpt/log/log.txt --x tokens --out curves.pdf
"""

from __future__ import annotations

import math
import os
import re
import time
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from gptxs.cli import exit_with_one_line, number_problems, parse
from gptxs.files import atomic_write
from gptxs.metrics import read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

XAxis = Literal["steps", "tokens", "hours"]
Row = dict[str, Any]
TableRow = tuple[object, ...]
Runs = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[RUN ...]")]

# Published figures of GPT-2 are those of OpenAI's checkpoint as build-nanogpt measured it (its
# play.ipynb and hellaswag.py). GPT-3's is from Brown et al. 2020, table H.1, "Small", zero-shot.
GPT2_SCORES = {"acc": 0.2859, "acc_norm": 0.2955, "harness_acc": 0.2892, "harness_acc_norm": 0.3114}
GPT3_SCORES = {"acc_norm": 0.337}
# On the validation shard of FineWeb-Edu at T=1024: it means nothing for a run on another text. The
# data set of a run is known by what the names of its shards begin with.
GPT2_VAL_LOSS = 3.2924
FINEWEB_EDU = "edufineweb"

# The panels of a picture: the key in the log, the kinds of lines that have it, and the label.
PANELS = {
    "loss": (("train", "val"), "loss (nats per token)"),
    "acc_norm": (("hellaswag",), "HellaSwag acc_norm"),
    "lr": (("train",), "learning rate"),
    "grad_norm": (("train",), "gradient norm"),
    "tokens_per_s": (("train",), "tokens/s"),
    "mfu": (("train",), "MFU"),
}
# Of a single run these are drawn in another's panel, with an axis at the right. Of several runs
# they are not: a colour is then a run, and two curves of each could not be told apart.
BESIDE = {"grad_norm": "lr", "mfu": "tokens_per_s"}

# The text width of a two-column paper, for two rows. Shown 600 pixels wide, 8 pt are 9 pixels.
FIGURE_INCHES = (7.2, 5.6)
STYLE = {"font.size": 8, "legend.fontsize": 7, "legend.frameon": False, "axes.linewidth": 0.6}
# Okabe and Ito's colours, which the colour-blind can distinguish, without the yellow. Dashes and
# markers distinguish the runs where the page is printed in black. 5 dashes and 7 of the others have
# no common factor, so 35 runs differ.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (9, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
THICK = 1.5  # width of a line in points
THIN = 0.7


@dataclass(frozen=True)
class PlotConfig:
    runs: Runs = ("log",)
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


# ---- reading a log -------------------------------------------------------------------------------


@dataclass
class RunLog:
    """What a run has logged; ``rows[kind][step]`` is the last line of that kind and step.

    They are in order of step, each with its position on every axis that the log records as "at".
    """

    name: str
    path: Path
    rows: dict[str, dict[int, Row]] = field(default_factory=lambda: defaultdict(dict))
    start: Row = field(default_factory=dict)  # the newest process's "run" line
    config: Row = field(default_factory=dict)  # its configuration
    hours: float = 0.0  # from each process's first line to its last, summed
    notes: list[str] = field(default_factory=list)  # what is unusual, for the user

    def series(self, kind: str, name: str, x: XAxis = "steps") -> tuple[np.ndarray, np.ndarray]:
        """Positions and values, (n,) float64 in order of step; NaN for what is not finite."""
        rows = self.rows[kind].values()
        xs = np.array([row["at"].get(x) for row in rows], dtype=np.float64)  # None becomes NaN
        ys = np.array([row.get(name) for row in rows], dtype=np.float64)
        if len(xs) and np.isnan(xs).all():
            raise ValueError(f"{self.path}: its lines do not record {x}; use --x steps")
        return xs, np.where(np.isfinite(ys), ys, math.nan)


def read_log_txt(path: Path) -> tuple[list[Row], int]:
    """A log of build-nanogpt as rows of metrics.jsonl, and the number of lines left out."""
    # Not in the log: these are constants of build-nanogpt's train_gpt2.py.
    config = {"batch_tokens": 524_288}
    rows: list[Row] = [{"kind": "run", "step": 0, "config": config, "dataset": FINEWEB_EDU}]
    keys = {"train": ("train", "loss"), "val": ("val", "loss"), "hella": ("hellaswag", "acc_norm")}
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    # With the end of the line: without it the number may have lost digits.
    lines = re.findall(r"^(\d+) (train|val|hella) (nan|inf|\d+\.?\d*)\n", text, re.MULTILINE)
    for step, word, value in lines:
        kind, key = keys[word]
        rows.append({"kind": kind, "step": int(step), key: float(value)})
    return rows, len(re.findall(r".*\S", text)) - len(lines)


def read_metrics(path: Path | str, name: str | None = None) -> RunLog:
    """Read a log folder, a metrics.jsonl or a log.txt; the last line of a (kind, step) counts.

    Raises FileNotFoundError without a log or a step in it, and ValueError for any other file.
    """
    path = Path(path).expanduser()
    files = [path / "metrics.jsonl", path / "log.txt"] if path.is_dir() else [path]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{path}: no such run; train first, or give another folder")
    run = RunLog(name=name or file.resolve().parent.name, path=file)
    logged, skipped = read_rows(file)
    if not logged:
        logged, skipped = read_log_txt(file)
        # Less than a line may be one that is just being written.
        if len(logged) == 1 and skipped and b"\n" in file.read_bytes():
            raise ValueError(f"{file}: no line is recognised; give a metrics.jsonl or a log.txt")
    if skipped:
        run.notes.append(f"torn or unreadable lines left out: {skipped}")

    # Later than any line: nothing ran before the first line of a process.
    previous_time = math.inf
    for row in logged:
        step = row["step"]
        if row["kind"] == "run":
            if row.get("resumed_from"):
                run.notes.append(f"resumed from {row['resumed_from']}")
                # The new process computes the steps after its checkpoint again.
                for kind, old in run.rows.items():
                    run.rows[kind] = {number: old[number] for number in old if number <= step}
            else:
                run.rows.clear()
                run.hours = 0.0
            run.start = row
            run.config = row.get("config", {})
            previous_time = math.inf
        at: dict[str, float] = {"steps": step}
        if batch_tokens := run.config.get("batch_tokens"):
            at["tokens"] = step * batch_tokens
        if "time" in row:
            # Not below 0, in case the clock was set back.
            run.hours += max(0.0, row["time"] - previous_time) / 3600
            previous_time = row["time"]
            at["hours"] = run.hours
        run.rows[row["kind"]][step] = {**row, "at": at}
    if not any(run.rows[kind] for kind in ("train", "val", "hellaswag")):
        raise FileNotFoundError(f"{file}: no step in it yet; wait for the first one, or train")
    steps, losses = run.series("train", "loss")
    if len(lost := steps[np.isnan(losses)]):
        run.notes.append(f"steps without a finite loss: {len(lost)}, first {lost[0]:.0f}")
    return run


# ---- the picture ---------------------------------------------------------------------------------


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Centred average over ``window`` <= n of (n,) values; those that are NaN do not count."""
    known = np.isfinite(values)
    sums = np.convolve(np.where(known, values, 0.0), np.ones(window), mode="same")
    counts = np.convolve(known, np.ones(window), mode="same")
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def draw_reference(ax: Axes, value: float, name: str, dashes: str) -> None:
    """A horizontal line behind those of the runs, with its name in the right margin."""
    label = f"{name}\n{value}"
    ax.axhline(value, color="0.35", linewidth=0.9, linestyle=dashes, zorder=1, label=label)
    ax.annotate(label, (1.02, value), xycoords=ax.get_yaxis_transform(), va="center", size=6.5)


def format_count(value: float, position: int | None = None) -> str:
    """5k steps, 1.3M tokens/s, 10B tokens; the second parameter is matplotlib's."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def add_panels(figure: Figure, runs: list[RunLog]) -> dict[str, Any]:
    """The Axes of what any of the runs has logged, by key of ``PANELS``. They fill the figure."""
    logged = [
        key
        for key, (kinds, _) in PANELS.items()
        if any(np.isfinite(run.series(kind, key)[1]).any() for run in runs for kind in kinds)
    ]
    beside = [key for key, left in BESIDE.items() if len(runs) == 1 and {key, left} <= {*logged}]
    panels = [key for key in logged if key not in beside] or ["loss"]
    columns = 1 if len(panels) <= 2 else 2
    # The first of an odd number is as wide as the page.
    cells = [panels[0]] * (len(panels) % columns) + panels
    mosaic = np.reshape(cells, (-1, columns)).tolist()
    figure.set_figheight(FIGURE_INCHES[1] / 2 * max(2, len(mosaic)))
    axes: dict[str, Any] = figure.subplot_mosaic(mosaic, sharex=True)
    for key, ax in axes.items():
        ax.set_ylabel(PANELS[key][1])
    for right in beside:
        left = BESIDE[right]
        axes[right] = axes[left].twinx()
        axes[right].set_label(right)
        for key, color, width in ((left, COLORS[0], "thick"), (right, COLORS[1], "thin")):
            axes[key].set_ylabel(f"{PANELS[key][1]} ({width})", color=color)
            axes[key].tick_params(axis="y", colors=color)
    return axes


def add_legends(figure: Figure, runs: list[RunLog], handles: list[Any], loss: Any) -> None:
    """Below the panels what the lines of the loss are; above, if several, which run is which."""
    lines = [line for line in loss.lines if np.isfinite(line.get_ydata()).any()] if loss else []
    # One line of each kind, the first: the others are overwritten, as they come before it here.
    kinds = {line.get_label().rpartition(": ")[2]: line for line in reversed(lines)}
    if "loss, smoothed" in kinds:
        kinds.pop("loss", None)  # of a run too short for an average, and drawn alike
    what = [k.replace("loss", "training loss").replace("val", "validation loss") for k in kinds]
    below: Any = figure.legend([*kinds.values()], what, loc="outside lower center", ncols=3)
    if len(runs) == 1:
        return
    for line in below.legend_handles:
        line.set(color="0.35", linestyle="-", alpha=None)  # this legend is of no run in particular
    # A legend has the width for 60 characters, and leaves out names that begin with "_".
    names = [" " * run.name.startswith("_") + run.name[-60:] for run in runs]
    # A character is up to 5 points wide, and what stands around a name 35.
    ncols = int(72 * FIGURE_INCHES[0] / (35 + 5 * max(map(len, names))))
    figure.legend(handles, names, loc="outside upper center", ncols=min(4, ncols))


def draw(figure: Figure, runs: list[RunLog], x: XAxis, smooth: int | None) -> None:
    """Fill an empty figure with a panel for each of ``PANELS`` that any of the runs has logged."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator

    figure.set_layout_engine("constrained")
    axes = add_panels(figure, runs)
    if norm := axes.get("grad_norm"):
        # Before the lines: they may fix the range of an axis, and a linear one may begin below 0.
        norm.set_yscale("log")
        # Norms often stay within one power of ten, where the default would label a single tick.
        norm.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        norm.minorticks_off()

    # The raw values of several runs cover each other.
    raw_alpha = 0.3 / math.sqrt(len(runs))
    handles = []  # of the legend, a line for each run
    for run, color, dashes, marker in zip(runs, cycle(COLORS), cycle(DASHES), cycle(MARKERS)):
        marks: dict[str, Any] = {"marker": marker, "ms": 3.2, "mfc": "white", "mew": 0.8}
        handles.append(Line2D([], [], color=color, linestyle=dashes, **marks))
        steps = len(run.rows["train"])
        window = steps // 50 if smooth is None else min(smooth, steps)
        for key, ax in axes.items():
            # What is drawn below without a colour or dashes of its own takes these.
            second = len(runs) == 1 and key in BESIDE
            ax.set_prop_cycle(color=[COLORS[1] if second else color], linestyle=[dashes])
            for kind in PANELS[key][0]:
                xs, ys = run.series(kind, key, x)
                if kind != "train":
                    sparse = len(xs) // 25 + 1  # every marker of a long run would touch the next
                    ax.plot(xs, ys, lw=THIN, label=f"{run.name}: {kind}", markevery=sparse, **marks)
                    continue
                label = f"{run.name}: {key}"
                # A schedule has no noise, but corners that an average would round.
                if window > 1 and key != "lr":
                    ax.plot(xs, ys, ls="-", lw=THIN, alpha=raw_alpha, label=f"{label}, each step")
                    ys = moving_average(ys, window)
                    label += ", smoothed"
                ax.plot(xs, ys, lw=THIN if key in BESIDE else THICK, label=label)
            if key == "acc_norm":
                _, error = run.series("hellaswag", "acc_norm_stderr", x)  # NaN in a log.txt
                ax.fill_between(xs, ys - error, ys + error, alpha=raw_alpha / 2, lw=0)
    add_legends(figure, runs, handles, axes.get("loss"))

    # A scale of tokens above the steps, if a step has as many tokens in all runs.
    batches = {run.config.get("batch_tokens") for run in runs}
    tokens = batches.pop() if len(batches) == 1 else None
    for key, ax in axes.items():
        ax.xaxis.set_major_formatter(format_count)
        if key in ("lr", "grad_norm", "tokens_per_s"):
            ax.yaxis.set_major_formatter(format_count)
        if key in ("tokens_per_s", "mfu"):
            ax.set_ylim(0, 1 if key == "mfu" else None)
        place = ax.get_subplotspec()
        if place.is_last_row():
            ax.set_xlabel(x)
        if place.is_first_row() and key not in BESIDE and x == "steps" and tokens is not None:
            top = ax.secondary_xaxis("top", functions=(lambda s: s * tokens, lambda t: t / tokens))
            top.set_xlabel("tokens")
            top.xaxis.set_major_formatter(format_count)
    if loss := axes.get("loss"):
        # Without the steep beginning, a twentieth of all points, which would flatten the rest.
        losses = np.concatenate([line.get_ydata() for line in loss.lines])
        losses = losses[np.isfinite(losses)]
        low, high = np.percentile(losses if len(losses) else [GPT2_VAL_LOSS], (0.1, 95))
        if any(run.start.get("dataset") == FINEWEB_EDU for run in runs):
            draw_reference(loss, GPT2_VAL_LOSS, "GPT-2 124M,\nFineWeb-Edu,\nT=1024", dashes="-.")
            low = min(low, GPT2_VAL_LOSS)
            high = max(high, GPT2_VAL_LOSS)
        margin = 0.06 * (high - low) + 0.01
        loss.set_ylim(low - margin, high + margin)
    if hellaswag := axes.get("acc_norm"):
        # One of HellaSwag's four endings is the right one.
        draw_reference(hellaswag, 0.25, "chance", dashes=":")
        draw_reference(hellaswag, GPT2_SCORES["acc_norm"], "GPT-2\n124M", dashes="-.")
        draw_reference(hellaswag, GPT3_SCORES["acc_norm"], "GPT-3\n124M", dashes="--")


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
    run = read_metrics(log_dir)
    picture = Path(log_dir) / "plot.png"
    plot([run], picture)
    report(run, picture)


# ---- the report ----------------------------------------------------------------------------------


def markdown_table(rows: list[TableRow]) -> str:
    """A Markdown table headed by its first row; shorter rows end in empty cells."""
    lines = []
    for row in rows:
        padded = [*row, *[""] * (len(rows[0]) - len(row))]
        cells = [str(cell).replace("|", "\\|").replace("\n", " ") for cell in padded]
        lines.append(f"| {' | '.join(cells)} |")
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines)


def result_rows(run: RunLog) -> list[TableRow]:
    """How far the run came, its last losses and accuracies; beside them GPT-2's and GPT-3's."""
    rows: list[TableRow] = []
    _, losses = run.series("train", "loss")
    if len(losses):
        steps_done = max(run.rows["train"]) + 1
        max_steps = run.config.get("max_steps")
        rows.append(("steps", f"{steps_done:,}{f' of {max_steps:,}' if max_steps else ''}"))
        if batch_tokens := run.config.get("batch_tokens"):
            rows.append(("training tokens", f"{steps_done * batch_tokens:,}"))
    recent = losses[-100:]
    if np.isfinite(recent).any():
        rows.append((f"training loss, last {len(recent)} steps", f"{np.nanmean(recent):.4f}"))
    steps, losses = run.series("val", "loss")
    if len(losses):
        gpt2 = GPT2_VAL_LOSS if run.start.get("dataset") == FINEWEB_EDU else ""
        rows.append((f"validation loss, step {steps[-1]:,.0f}", f"{losses[-1]:.4f}", gpt2))
    if run.rows["hellaswag"]:
        step, scores = max(run.rows["hellaswag"].items())
        examples = f", {scores['n']:,} examples" if "n" in scores else ""
        for name, gpt2_score in GPT2_SCORES.items():
            if name not in scores:
                continue  # a log.txt has acc_norm alone
            error = f" ± {scores[f'{name}_stderr']:.4f}" if f"{name}_stderr" in scores else ""
            what = f"HellaSwag {name}, step {step:,}{examples}"
            score = f"{scores[name]:.4f}{error}"
            rows.append((what, score, gpt2_score, GPT3_SCORES.get(name, "")))
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

    seconds: dict[str, float] = {}
    names = {"val": "validation", "hellaswag": "HellaSwag"}
    for kind in list(run.rows):
        seconds[names.get(kind, f"{kind}s")] = float(np.nansum(run.series(kind, "seconds")[1]))
    steps, ms = run.series("train", "ms")
    if np.isfinite(ms).any():
        # What a process's first step takes beyond others is mostly the compiler's time. It has the
        # number of the step at which the process started.
        first_ms = ms[np.isin(steps, list(run.rows["run"]))]
        extra = max(0.0, float(np.nansum(first_ms - np.nanmedian(ms)))) / 1000
        seconds["first steps beyond the median (compile)"] = extra
        seconds["training"] = float(np.nansum(ms)) / 1000 - extra
    # The system's clock, unlike that of the parts, may be set back.
    total = max(run.hours * 3600, sum(seconds.values()))
    seconds["other"] = total - sum(seconds.values())
    rows += [("time, all", f"{total:,.1f} s")] if total else []  # a log.txt has no times
    for name, value in sorted(seconds.items(), key=lambda item: -item[1]):
        if value >= 0.05:  # less would be printed as 0.0
            rows.append((f"time, {name}", f"{value:,.1f} s ({value / total:.1%})"))
    return rows


def report(run: RunLog, picture: Path) -> Path:
    """Write report.md beside the run's picture."""
    # The line itself last: its device and dtype are what "auto" in the configuration has become.
    model = run.config.get("model", {})
    settings: Row = {**run.config, **model, **run.start.get("versions", {}), **run.start}
    if "time" in run.start:
        settings["started"] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.start["time"]))
    for name in ("kind", "step", "time", "config", "model", "versions"):
        settings.pop(name, None)
    head = ("", "this run", "GPT-2 124M, published", "GPT-3 124M, published")
    parts = [
        f"# Run report: {run.name}",
        f"![curves]({picture.name})",
        markdown_table([head, *result_rows(run)]),
        "± standard error. Published: build-nanogpt (loss at T=1024); GPT-3's table H.1.",
        markdown_table([("speed and time", "this run"), *speed_rows(run)]),
        markdown_table([("setting", "value"), *settings.items()]),
        *(f"Note: {note}." for note in run.notes),
    ]
    for step, row in list(run.rows["sample"].items())[-1:]:
        # Indented by four, a text is shown as it is.
        parts.append(f"Sample of step {step:,}:")
        parts.append("    " + row["text"].replace("\n", "\n    "))
    out = picture.with_name("report.md")
    with atomic_write(out) as file:
        file.write(("\n\n".join(parts) + "\n").encode(errors="replace"))  # lone surrogates
    return out


# ---- command line --------------------------------------------------------------------------------


def draw_once(config: PlotConfig) -> None:
    """Read the runs, write the picture and, for a single run, the report."""
    runs = []
    for argument in config.runs:
        name, _, path = argument.partition("=")
        if os.path.exists(argument) or not path:  # a path may itself contain "="
            name, path = "", argument
        runs.append(read_metrics(path, name or None))
    # Folders of the same name, such as log, are told apart by the paths to them.
    names = Counter(run.name for run in runs)
    for run, argument in zip(runs, config.runs, strict=True):
        if names[run.name] > 1:
            run.name = argument

    out = config.out or runs[0].path.with_name("plot" if len(runs) == 1 else "overlay")
    suffix = config.format or out.suffix.removeprefix(".") or "png"
    if out.suffix != f".{suffix}":
        out = out.with_name(f"{out.name}.{suffix}")
    plot(runs, out, config.x, config.smooth)
    print(f"wrote {out}", flush=True)
    # With --out elsewhere nothing but the picture is written.
    if len(runs) == 1 and out.resolve().parent == runs[0].path.resolve().parent:
        print(f"wrote {report(runs[0], out)}")
    for run in runs:
        for note in run.notes:
            print(f"{run.name}: {note}")
        if config.smooth and not run.rows["train"]:
            print(f"{run.name}: no training step is logged, so that --smooth has no effect")
        if config.watch and len(run.rows["train"]) >= run.config.get("max_steps", math.inf):
            print(f"{run.name}: all steps are made, so that --watch has no effect", flush=True)


def main() -> None:
    with exit_with_one_line():
        config = parse(PlotConfig, description=__doc__)
        if problems := number_problems(config):
            raise ValueError("; ".join(problems))
        if not config.watch:
            draw_once(config)
        with suppress(KeyboardInterrupt):  # the way to end --watch, and so no failure
            while config.watch:
                try:
                    draw_once(config)
                except FileNotFoundError as error:  # the run is still to begin
                    print(f"waiting: {error}", flush=True)
                time.sleep(10.0)


if __name__ == "__main__":
    main()
