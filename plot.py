"""Draw the curves of a training run, or of several over each other, and write the run's report.

A RUN is a log folder of train.py, a metrics.jsonl or build-nanogpt's log.txt; NAME=RUN names it.
One run gets plot.png and report.md in its folder, several get overlay.png in the first one's.
With --out in another folder nothing but that picture is written.

Example: python plot.py ours=log lineage=build-nanogpt/log/log.txt --x tokens --out curves.pdf
"""

from __future__ import annotations

from common import (
    Bounds,
    atomic_write,
    check_options,
    exit_with_one_line,
    parse_options,
    require_regular_file,
)

import errno
import math
import os
import re
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from metrics import Row, RunConfig, parse_row

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
# Line widths in points.
THICK = 1.5
THIN = 0.7
NAME_LENGTH = 60  # characters of a run's name that a legend has room for

# The numbers of a run are computed in float32: what is larger than its largest is damaged, and
# would overflow the scale of an axis.
MAX_FLOAT32 = float(np.finfo(np.float32).max)
# No log has such lines or such a size, at 250 bytes a step. Reading more would fill the memory.
MAX_LINE = 2**24  # characters
MAX_LOG = 2**32  # bytes


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
    smooth: Annotated[int | None, Bounds(0, 2**31)] = None
    """Logged steps in the moving average; 0 draws raw values only. Default: 2% of the steps."""
    x: XAxis = "steps"
    """Horizontal axis. Hours are running time, without the pauses between processes."""
    watch: bool = False
    """Draw again every 10 seconds while training runs, until Ctrl-C."""
    show: bool = False
    """Open a window as well."""


# ---- reading a log -------------------------------------------------------------------------------


class NothingToDraw(ValueError):
    """A log without any line that could be drawn, such as that of a run that has just started."""


@dataclass
class RunLog:
    """What a run has logged; ``rows[kind][step]`` is the last line of that kind and step.

    They are in order of step, each with its position on every axis that the log records as "at".
    """

    name: str
    path: Path
    rows: dict[str, dict[int, dict[str, Any]]] = field(default_factory=lambda: defaultdict(dict))
    start: Row | None = None  # the newest process's "run" line
    config: RunConfig = field(default_factory=RunConfig)  # its configuration
    dataset: str | None = None  # what the names of its shards begin with, where that is recorded
    hours: float = 0.0  # from each process's first line to its last, summed
    notes: list[str] = field(default_factory=list)  # what is unusual, for the user

    def series(self, kind: str, name: str, x: XAxis = "steps") -> tuple[np.ndarray, np.ndarray]:
        """Positions and values, (n,) float64 in order of step; NaN where one is missing.

        Raises ValueError when the log does not record the axis ``x``.
        """
        rows = self.rows[kind].values()
        xs = as_numbers(row["at"].get(x) for row in rows)
        if len(xs) and np.isnan(xs).all():
            raise ValueError(f"{self.path}: its lines do not record {x}; use --x steps")
        return xs, as_numbers(row.get(name) for row in rows)


def as_numbers(values: Iterable[Any]) -> np.ndarray:
    """Values of a log as (n,) float64; NaN for what is not a number, or too large to be one."""
    # Compared before they become floats: JSON's integers may have any number of digits.
    numbers = [v if type(v) in (int, float) and abs(v) <= MAX_FLOAT32 else math.nan for v in values]
    return np.array(numbers, dtype=np.float64)


def parse_line(line: str) -> Row | None:
    """A line of metrics.jsonl or log.txt, or None when it is incomplete or something else."""
    # The pattern includes the end of the line: without it the number may have lost digits. 15
    # digits are more than any step has, and what is beyond them is no line of such a log.
    match = re.fullmatch(r"([0-9]{1,15}) (train|val|hella) (nan|inf|[0-9]+[.]?[0-9]*)\n", line)
    if match is None:
        return parse_row(line)
    step = int(match[1])
    value = float(match[3])
    if match[2] == "hella":
        return Row(kind="hellaswag", step=step, acc_norm=value)
    return Row(kind=match[2], step=step, loss=value)


def find_log(path: Path) -> Path:
    """The log that a RUN of the command line is: a file, or the one in a folder.

    Raises FileNotFoundError when there is none, ValueError when it cannot be a log.
    """
    candidates = [path / "metrics.jsonl", path / "log.txt"] if path.is_dir() else [path]
    file = next((candidate for candidate in candidates if candidate.exists()), None)
    if file is None:
        raise FileNotFoundError(f"{path}: no such run; train first, or give another folder")
    require_regular_file(file)
    if file.stat().st_size > MAX_LOG:
        raise ValueError(f"{file}: {file.stat().st_size:,} bytes are too many for a log")
    return file


def read_metrics(path: Path | str, name: str | None = None) -> RunLog:
    """Read a log folder, a metrics.jsonl or a log.txt; the last line of a (kind, step) counts.

    Raises FileNotFoundError when there is no log, NothingToDraw when no step is in it, and
    ValueError when it cannot be a log.
    """
    file = find_log(Path(path))
    # A name may be anything: matplotlib cannot draw line breaks and what is not Unicode.
    shown = name or file.resolve().parent.name
    run = RunLog(name="".join(c if c.isprintable() else "?" for c in shown), path=file)
    if file.suffix == ".txt":
        # Not in the log: these are constants of build-nanogpt's train_gpt2.py.
        run.config = {"batch_tokens": 524_288}
        run.dataset = FINEWEB_EDU

    # A process that is killed may leave half a line, or an incomplete character in UTF-8.
    with file.open(encoding="utf-8", errors="replace") as log:
        lines = iter(lambda: log.readline(MAX_LINE), "")
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
        batch_tokens = run.config.get("batch_tokens")
        if batch_tokens is not None:
            at["tokens"] = step * batch_tokens
        if "time" in row:
            # Not below 0, in case the clock was set back.
            run.hours += max(0.0, row["time"] - previous_time) / 3600
            previous_time = row["time"]
            at["hours"] = run.hours
        rows.append({**row, "at": at})
    for logged in sorted(rows, key=lambda logged: logged["step"]):
        run.rows[logged["kind"]][logged["step"]] = logged

    if not any(run.rows[kind] for kind in ("train", "val", "hellaswag")):
        raise NothingToDraw(f"{file}: nothing to draw in it yet; wait for the first step, or train")
    steps, losses = run.series("train", "loss")
    lost = steps[~np.isfinite(losses)]
    if len(lost):
        run.notes.append(f"steps without a finite loss: {len(lost)}, first {lost[0]:.0f}")
    return run


# ---- the picture ---------------------------------------------------------------------------------


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Centred average over (n,) values; those that are not finite do not count."""
    window = min(window, len(values))
    finite = np.isfinite(values)
    counts = moving_sum(finite.astype(np.float64), window)
    sums = moving_sum(np.where(finite, values, 0.0), window)
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def moving_sum(values: np.ndarray, window: int) -> np.ndarray:
    """Centred sums over (n,) values, in n log(window) additions.

    Unlike in differences of cumulative sums, one very large value costs the others no precision.
    """
    # terms[i] is the sum of the ``size`` values from i on. The window is put together from the
    # powers of two of which it is the sum.
    terms = np.pad(values, (window // 2, max(0, window - 1) // 2))
    sums = np.zeros(len(values))
    position = 0
    size = 1
    while size <= window:
        if window & size:
            sums += terms[position : position + len(values)]
            position += size
        terms = terms[:-size] + terms[size:]
        size *= 2
    return sums


def standard_error(accuracy: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Of the proportion of ``n`` examples; NaN where they are not known, or not a proportion."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.sqrt(accuracy * (1 - accuracy) / n)


def draw_reference(ax: Axes, value: float, name: str, dashes: str) -> None:
    """A horizontal line behind those of the runs, with its name in the right margin."""
    label = f"{name}\n{value}"
    ax.axhline(value, color="0.35", linewidth=0.9, linestyle=dashes, zorder=1, label=label)
    ax.annotate(label, (1.02, value), xycoords=ax.get_yaxis_transform(), va="center", size=6.5)


def format_count(value: float, position: int | None = None) -> str:
    """5k steps, 1.3M tokens/s, 10B tokens; the second parameter is matplotlib's."""
    from matplotlib.ticker import EngFormatter

    # EngFormatter would write 500m for 0.5, and 10G for what is called 10 billion tokens.
    return f"{value:g}" if 0 < value < 1 else EngFormatter(sep="")(value).replace("G", "B")


def add_panels(figure: Figure, runs: list[RunLog]) -> dict[str, Any]:
    """The Axes of what any of the runs has logged, by key of ``PANELS``. They fill the figure."""
    logged = [
        key
        for key, (kinds, _) in PANELS.items()
        if any(np.isfinite(run.series(kind, key)[1]).any() for run in runs for kind in kinds)
    ]
    beside: dict[str, str] = {}  # the panel's key by that of the axis at its right
    if len(runs) == 1:
        beside = {key: BESIDE[key] for key in logged if BESIDE.get(key) in logged}
    panels = [key for key in logged if key not in beside] or ["loss"]
    columns = 1 if len(panels) <= 2 else 2
    # The first of an odd number is as wide as the page.
    cells = [panels[0]] * (len(panels) % columns) + panels
    mosaic = np.reshape(cells, (-1, columns)).tolist()
    figure.set_figheight(FIGURE_INCHES[1] / 2 * max(2, len(mosaic)))
    axes: dict[str, Any] = figure.subplot_mosaic(mosaic, sharex=True)
    for key, ax in axes.items():
        ax.set_ylabel(PANELS[key][1])
    for right, left in beside.items():
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
    names = [f"{r.name[:NAME_LENGTH]}..." if len(r.name) > NAME_LENGTH else r.name for r in runs]
    # A character is up to 5 points wide, and what stands around a name 35.
    ncols = int(72 * FIGURE_INCHES[0] / (35 + 5 * max(map(len, names))))
    numbers = [str(number) for number in range(len(runs))]
    above = figure.legend(handles, numbers, loc="outside upper center", ncols=min(4, ncols))
    for text, name in zip(above.get_texts(), names, strict=True):
        # Not as labels above: matplotlib skips those that begin with "_". Nor is "$" a formula.
        text.set_parse_math(False)
        text.set_text(name)


def draw(figure: Figure, runs: list[RunLog], x: XAxis, smooth: int | None) -> None:
    """Fill an empty figure with a panel for each of ``PANELS`` that any of the runs has logged.

    Raises ValueError when a log does not record the axis ``x``.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator

    figure.set_layout_engine("constrained")
    axes = add_panels(figure, runs)
    loss = axes.get("loss")
    hellaswag = axes.get("acc_norm")
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
                    # Every marker of a long run would touch the next.
                    sparse = len(xs) // 25 + 1
                    label = f"{run.name}: {kind}"
                    ax.plot(xs, ys, lw=THIN, label=label, markevery=sparse, **marks)
                    continue
                label = f"{run.name}: {key}"
                # A schedule has no noise, but corners that an average would round.
                if window > 1 and key != "lr":
                    ax.plot(xs, ys, ls="-", lw=THIN, alpha=raw_alpha, label=f"{label}, each step")
                    ys = moving_average(ys, window)
                    label += ", smoothed"
                ax.plot(xs, ys, lw=THIN if key in BESIDE else THICK, label=label)
        if hellaswag:
            # The standard error of a proportion. A log.txt does not record the number of examples
            # n: the error is then NaN, and not drawn.
            xs, acc = run.series("hellaswag", "acc_norm", x)
            error = standard_error(acc, run.series("hellaswag", "n", x)[1])
            hellaswag.fill_between(xs, acc - error, acc + error, alpha=raw_alpha / 2, lw=0)
    add_legends(figure, runs, handles, loss)

    # A scale of tokens above the steps, if a step has as many tokens in all runs.
    batches = {run.config.get("batch_tokens") for run in runs}
    tokens = next(iter(batches)) if len(batches) == 1 else None
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

    if loss:
        # The range of the losses without the steep beginning, a twentieth of all points, which
        # would flatten what follows.
        losses = np.concatenate([line.get_ydata() for line in loss.lines])
        losses = losses[np.isfinite(losses)]
        low, high = np.percentile(losses if len(losses) else [GPT2_VAL_LOSS], (0.1, 95))
        if any(run.dataset == FINEWEB_EDU for run in runs):
            draw_reference(loss, GPT2_VAL_LOSS, "GPT-2 124M,\nFineWeb-Edu,\nT=1024", dashes="-.")
            low = min(low, GPT2_VAL_LOSS)
            high = max(high, GPT2_VAL_LOSS)
        margin = 0.06 * (high - low) + 0.01
        loss.set_ylim(low - margin, high + margin)
    if hellaswag:
        # One of HellaSwag's four endings is the right one.
        draw_reference(hellaswag, 0.25, "chance", dashes=":")
        draw_reference(hellaswag, GPT2_SCORES["acc_norm"], "GPT-2\n124M", dashes="-.")
        draw_reference(hellaswag, GPT3_SCORES["acc_norm"], "GPT-3\n124M", dashes="--")


def plot(runs: list[RunLog], out: Path, x: XAxis = "steps", smooth: int | None = None) -> None:
    """Draw the runs into ``out``, a .png, .svg or .pdf; this needs no display."""
    require_matplotlib()
    from matplotlib import style
    from matplotlib.figure import Figure

    # pyplot.figure() would keep every picture of --watch in memory.
    figure = Figure(FIGURE_INCHES)
    with style.context(STYLE), warnings.catch_warnings():
        # Matplotlib warns about characters that the font lacks, and panels without room.
        warnings.filterwarnings("ignore", category=UserWarning)
        draw(figure, runs, x, smooth)
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(out) as file:
            figure.savefig(file, format=out.suffix.removeprefix("."), dpi=200)


def require_matplotlib() -> None:
    """Raise ValueError that says how to install matplotlib where it is missing."""
    try:
        import matplotlib  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise ValueError(f"no matplotlib ({error}): pip install -r requirements.txt") from None


def plot_run(log_dir: Path | str) -> None:
    """Write plot.png and report.md into a log folder.

    Raises what ``read_metrics`` does, and OSError when they cannot be written.
    """
    run = read_metrics(log_dir)
    picture = Path(log_dir) / "plot.png"
    plot([run], picture)
    report(run, picture)


# ---- the report ----------------------------------------------------------------------------------


def cell_text(value: object) -> str:
    """A value of a log as text."""
    try:
        return str(value)
    except (RecursionError, ValueError):  # nested too deep, or an integer of too many digits
        return "(too large to show)"


def markdown_table(rows: list[TableRow]) -> str:
    """A Markdown table headed by its first row; shorter rows end in empty cells."""
    width = len(rows[0])
    lines = []
    for row in rows:
        cells = [cell_text(cell).replace("|", "\\|").replace("\n", " ") for cell in row]
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
        max_steps = run.config.get("max_steps")
        rows.append(("steps", f"{steps_done:,}{f' of {max_steps:,}' if max_steps else ''}"))
        batch_tokens = run.config.get("batch_tokens")
        if batch_tokens is not None:
            rows.append(("training tokens", f"{steps_done * batch_tokens:,}"))
    recent = losses[-100:]
    if np.isfinite(recent).any():
        rows.append((f"training loss, last {len(recent)} steps", f"{np.nanmean(recent):.4f}"))
    steps, losses = run.series("val", "loss")
    if len(losses):
        gpt2 = GPT2_VAL_LOSS if run.dataset == FINEWEB_EDU else ""
        rows.append((f"validation loss, step {steps[-1]:,.0f}", f"{losses[-1]:.4f}", gpt2))
    if run.rows["hellaswag"]:
        step, scores = max(run.rows["hellaswag"].items())
        (n,) = as_numbers([scores.get("n")])
        examples = f", {n:,.0f} examples" if n > 0 else ""
        for name, gpt2_score in GPT2_SCORES.items():
            # Versions before harness_acc did not record it, nor any standard error.
            names = (name, f"{name}_stderr")
            score, error = as_numbers(scores.get(key) for key in names)
            if np.isnan(score):
                continue
            if np.isnan(error):
                error = standard_error(score, n)
            value = f"{score:.4f}" if np.isnan(error) else f"{score:.4f} ± {error:.4f}"
            what = f"HellaSwag {name}, step {step:,}{examples}"
            rows.append((what, value, gpt2_score, GPT3_SCORES.get(name, "")))
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
    for kind, rows_by_step in run.rows.items():
        logged = as_numbers(row.get("seconds") for row in rows_by_step.values())
        seconds[KIND_NAMES.get(kind, kind)] = float(np.nansum(logged))
    _, ms = run.series("train", "ms")
    if np.isfinite(ms).any():
        # What a process's first step takes beyond others is mostly the compiler's time. It has the
        # number of the step at which the process started.
        first_steps = run.rows["run"].keys() & run.rows["train"].keys()
        first_ms = as_numbers(run.rows["train"][step].get("ms") for step in first_steps)
        extra = max(0.0, float(np.nansum(first_ms - np.nanmedian(ms)))) / 1000
        seconds["first steps beyond the median (compile)"] = extra
        seconds["training"] = float(np.nansum(ms)) / 1000 - extra
    parts = sum(seconds.values())
    # The system's clock, unlike that of the parts, may be set back.
    total = max(run.hours * 3600, parts)
    seconds["other"] = total - parts
    rows.append(("time, all", f"{total:,.1f} s"))
    for name, value in sorted(seconds.items(), key=lambda item: -item[1]):
        # Less than that would be printed as 0.0.
        if value >= 0.05:
            rows.append((f"time, {name}", f"{value:,.1f} s ({value / total:.1%})"))
    return rows


def report(run: RunLog, picture: Path) -> Path:
    """Write report.md beside the run's picture.

    Raises ValueError when the log has no "run" line, as a log.txt never has.
    """
    if run.start is None:
        raise ValueError(f"{run.path}: no line of kind run in it, so there is no report")
    # The line itself last: its device and dtype are what "auto" in the configuration has become.
    model = run.config.get("model", {})
    settings: dict[str, Any] = {**run.config, **model, **run.start.get("versions", {}), **run.start}
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
    # The last sample of each prompt: a run that was resumed may have had another one before.
    samples = {row.get("prompt"): row for row in run.rows["sample"].values()}
    for row in samples.values():
        # Indented by four, a text is shown as it is.
        parts.append(f"Sample of step {row['step']:,}:")
        parts.append("    " + row.get("text", "").replace("\n", "\n    "))
    out = picture.with_name("report.md")
    with atomic_write(out) as file:
        # JSON's strings may hold lone surrogates, which UTF-8 cannot encode.
        file.write(("\n\n".join(parts) + "\n").encode(errors="replace"))
    return out


# ---- command line --------------------------------------------------------------------------------


def read_runs(arguments: tuple[str, ...]) -> list[RunLog]:
    """The runs that the command line names as RUN or NAME=RUN."""
    runs = []
    for argument in arguments:
        name, _, path = argument.rpartition("=")
        # A path may itself contain "=". Unlike pathlib's, this exists() answers for any text.
        if os.path.exists(argument):
            name = ""
            path = argument
        runs.append(read_metrics(path, name or None))
    return runs


def choose_picture(config: PlotConfig, runs: list[RunLog]) -> Path:
    """The file of the picture. Raises ValueError when it cannot be written or is an input."""
    out = config.out or runs[0].path.with_name("plot.png" if len(runs) == 1 else "overlay.png")
    suffixes = (".png", ".svg", ".pdf")
    if config.format is not None and out.name:
        name = out.stem if out.suffix in suffixes else out.name  # which may contain dots
        out = out.with_name(f"{name}.{config.format}")
    if out.suffix not in suffixes:
        raise ValueError(f"--out {out} must end in .png, .svg or .pdf; or give a --format")
    if out.exists():
        if not out.is_file():
            raise ValueError(f"--out {out} is not a regular file; give another")
        if any(out.samefile(run.path) for run in runs):
            raise ValueError(f"--out {out} is the log itself; give another")
    return out


def draw_once(config: PlotConfig) -> None:
    """Read the runs, write the picture and, for a single run of ours, the report."""
    runs = read_runs(config.runs)
    out = choose_picture(config, runs)
    try:
        plot(runs, out, config.x, config.smooth)
        print(f"wrote {out}")
        # With --out elsewhere nothing but the picture is written.
        beside = out.resolve().parent == runs[0].path.resolve().parent
        is_report = runs[0].path.name == "report.md"  # a log may have any name
        if len(runs) == 1 and runs[0].start is not None and beside and not is_report:
            print(f"wrote {report(runs[0], out)}")
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT):
            raise
        raise ValueError(f"cannot write {out} ({error.strerror}); give another --out") from None
    for run in runs:
        for note in run.notes:
            print(f"{run.name}: {note}")
    if config.show:
        from matplotlib import pyplot

        if pyplot.get_backend().lower() == "agg":
            raise ValueError(f"--show: no window system here; look at {out} instead")
        pyplot.style.use(STYLE)  # not for this block only: the window draws after it
        draw(pyplot.figure("GPT-xs", FIGURE_INCHES, clear=True), runs, config.x, config.smooth)
        if not config.watch:
            pyplot.show()


def watch(config: PlotConfig) -> None:
    """Draw again every 10 seconds, until Ctrl-C. A log that is not there yet is waited for."""
    while True:
        try:
            draw_once(config)
        except (FileNotFoundError, NothingToDraw) as error:
            print(f"waiting: {error}", flush=True)
        if config.show:
            from matplotlib import pyplot

            pyplot.pause(10.0)  # and let the window react to the user
        else:
            time.sleep(10.0)


def main() -> None:
    with exit_with_one_line():
        config = parse_options(PlotConfig, description=__doc__)
        if problems := check_options(config):
            raise ValueError("; ".join(problems))
        require_matplotlib()
        if not config.watch:
            draw_once(config)
            return
        # Ctrl-C is the way to end --watch, and so no failure.
        with suppress(KeyboardInterrupt):
            watch(config)


if __name__ == "__main__":
    main()
