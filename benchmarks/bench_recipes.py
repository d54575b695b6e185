"""Recipes compared over seeds: the quickstart trained by each of them, and its validation losses.

Learning rates are chosen first, with the first seed: AdamW's peak, which all recipes but the
default then use, and Muon's multiple of it. Then every recipe is trained with every seed. A run is
a process and a folder of --log-dir. The script can be stopped at any time, and goes on where it
was: complete runs are not repeated, the others are resumed. At the end it times the recipes, which
alternate, prints the tables in Markdown, and draws the first seed's curves.

Example: python benchmarks/bench_recipes.py --jobs 2
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from gptxs.cli import exit_with_one_line
from plot import RunLog, plot, read_metrics

ROOT = Path(__file__).parent.parent

LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3)  # the first is the quickstart's own
MUON_LR_SCALES = (1.0, 2.0, 3.0, 5.0)
DEFAULT = "AdamW, cosine, 1e-3 (the default)"


@dataclass(frozen=True)
class Options:
    log_dir: Path = Path("log/recipes")
    """Folder of the runs."""
    out: Path = Path("log/recipes/recipes.png")
    """The picture."""
    seeds: int = 5
    """Runs of each recipe."""
    steps: int = 600
    """Updates of each run. The quickstart makes 600."""
    timing_steps: int = 40
    """Updates of each run of the timing; 0 leaves the timing out."""
    jobs: int = 1
    """Runs at the same time, which divide the processor's cores."""


@dataclass(frozen=True)
class Job:
    """A run that is needed: what it adds to the quickstart's flags."""

    folder: str
    seed: int
    flags: tuple[str, ...]


def adamw(max_lr: float, schedule: str = "cosine", final: float = 0.1) -> tuple[str, ...]:
    """Flags of a recipe whose learning rate ends at ``final`` of its peak."""
    rates = ("--max-lr", f"{max_lr:g}", "--min-lr", f"{final * max_lr:g}")
    return (*rates, "--schedule", schedule)


def muon(max_lr: float, scale: float, schedule: str, final: float) -> tuple[str, ...]:
    return (
        *adamw(max_lr, schedule, final),
        "--optimizer",
        "muon",
        "--muon-lr-scale",
        f"{scale:g}",
    )


def train(job: Job, log_dir: Path, steps: int, cores: int, evaluate: bool = True) -> RunLog:
    """The finished run of a job, which is made or resumed if it has to be."""
    folder = log_dir / job.folder
    try:
        run = read_metrics(folder)
        if steps in run.rows["val"]:
            return run
    except (FileNotFoundError, ValueError):  # not begun
        pass
    every = max(1, steps // 6) if evaluate else 0
    command = [
        *(sys.executable, str(ROOT / "train.py"), "--preset", "quickstart", "--resume"),
        *("--log-dir", str(folder), "--seed", str(job.seed), "--max-steps", str(steps)),
        *("--warmup-steps", str(steps // 12), "--val-every", str(every), "--sample-every", "0"),
        *("--checkpoint-every", str(2 * every), "--keep-checkpoints", "1", *job.flags),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(cores)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip()}")
    for checkpoint in folder.glob("step_*"):  # 87 MB each; only the metrics are needed
        shutil.rmtree(checkpoint)
    run = read_metrics(folder)
    if evaluate and steps not in run.rows["val"]:
        raise KeyboardInterrupt  # it was stopped by a signal, and so is this script
    print(f"{job.folder}: {final_loss(run) if evaluate else median_ms(run):.4f}", flush=True)
    return run


def final_loss(run: RunLog) -> float:
    return float(run.series("val", "loss")[1][-1])


def median_ms(run: RunLog) -> float:
    return float(np.median(run.series("train", "ms")[1]))


def steps_to_reach(runs: list[RunLog], loss: float) -> str:
    """Where the mean of the validation curves, a line between two of their points, is ``loss``."""
    steps = runs[0].series("val", "loss")[0]
    losses = np.mean([run.series("val", "loss")[1] for run in runs], axis=0)
    below = np.flatnonzero(losses <= loss)
    if len(below) == 0:
        return "not reached"
    i = int(below[0])
    share = (losses[i - 1] - loss) / (losses[i - 1] - losses[i])
    return f"{steps[i - 1] + share * (steps[i] - steps[i - 1]):.0f}"


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    seeds = range(1337, 1337 + options.seeds)  # the first is the quickstart's own
    cores = max(1, (os.cpu_count() or 1) // options.jobs)
    # Before the runs, of which only one could write it.
    command = [sys.executable, str(ROOT / "dataset.py"), "--source", "stdlib"]
    command += ["--data-dir", "data/quickstart", "--shard-size", "50000"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    with ThreadPoolExecutor(options.jobs) as pool:

        def train_all(jobs: list[Job]) -> list[RunLog]:
            return list(
                pool.map(lambda job: train(job, options.log_dir, options.steps, cores), jobs)
            )

        def grid(flags: dict[float, tuple[str, ...]], name: str) -> tuple[float, list[RunLog]]:
            """The best of some values of a setting, with the first seed; and all of the runs."""
            jobs = [Job(f"{name}-{value:g}_{seeds[0]}", seeds[0], flags[value]) for value in flags]
            runs = train_all(jobs)
            print(f"\n| {name} | validation loss |\n|---|---|")
            for value, run in zip(flags, runs, strict=True):
                print(f"| {value:g} | {final_loss(run):.4f} |")
            losses = dict(zip(flags, map(final_loss, runs), strict=True))
            return min(losses, key=lambda value: losses[value]), runs

        lr, _ = grid({value: adamw(value) for value in LEARNING_RATES}, "max-lr")
        scale, _ = grid(
            {value: muon(lr, value, "cosine", 0.1) for value in MUON_LR_SCALES}, "muon-lr-scale"
        )
        # Name, folder and flags. A folder's name is that of the grid where that has the same run.
        recipes = [
            (DEFAULT, f"max-lr-{LEARNING_RATES[0]:g}", adamw(LEARNING_RATES[0])),
            (f"AdamW, cosine, {lr:g}", f"max-lr-{lr:g}", adamw(lr)),
            (f"AdamW, linear to 0, {lr:g}", "adamw-linear", adamw(lr, "linear", 0)),
            (f"AdamW, wsd to 0, {lr:g}", "adamw-wsd", adamw(lr, "wsd", 0)),
            (
                f"Muon, cosine, {scale:g} x {lr:g}",
                f"muon-lr-scale-{scale:g}",
                muon(lr, scale, "cosine", 0.1),
            ),
            (f"Muon, linear to 0, {scale:g} x {lr:g}", "muon-linear", muon(lr, scale, "linear", 0)),
        ]
        jobs = [Job(f"{folder}_{s}", s, flags) for s in seeds for _, folder, flags in recipes]
        # All recipes of a seed before the next seed: a table of what there is can be made early.
        trained = train_all(jobs)
        runs = {name: trained[i :: len(recipes)] for i, (name, _, _) in enumerate(recipes)}

    # One after the other with all cores, the recipes alternating: other jobs slow all of them.
    milliseconds: dict[str, list[float]] = {name: [] for name, _, _ in recipes}
    for repetition in range(2 if options.timing_steps else 0):
        for name, folder, flags in recipes:
            timing = options.log_dir / "timing"
            job = Job(f"{folder}_{repetition}", seeds[0], flags)
            shutil.rmtree(timing / job.folder, ignore_errors=True)
            run = train(job, timing, options.timing_steps, os.cpu_count() or 1, evaluate=False)
            milliseconds[name].append(median_ms(run))

    target = fmean(map(final_loss, runs[DEFAULT]))
    print(f"\n| recipe | validation loss, {options.seeds} seeds | steps to {target:.3f} | ms |")
    print("|---|---|---|---|")
    for name, _, _ in recipes:
        losses = [final_loss(run) for run in runs[name]]
        deviation = stdev(losses) if len(losses) > 1 else 0.0
        ms = f"{median(milliseconds[name]):.0f}" if milliseconds[name] else ""
        steps = steps_to_reach(runs[name], target)
        print(f"| {name} | {fmean(losses):.3f} ± {deviation:.3f} | {steps} | {ms} |")

    for name in runs:
        runs[name][0].name = name
        for row in runs[name][0].rows["train"].values():
            row.pop("tokens_per_s", None)  # of runs that had to share the machine
    plot([runs[name][0] for name in runs], options.out)
    print(f"\nwrote {options.out}")


if __name__ == "__main__":
    with exit_with_one_line():
        main()
