"""How fast dataset.py is beside the usual recipe and beside the tokenizer alone.

    python benchmarks/bench_dataset.py [--data FOLDER_OF_PARQUET_FILES] [--repeat 10]

Four ways to tokenize the same documents on the same number of cores, alternating, each in a fresh
process; the medians of their speeds count, and the ratios, which depend less on the machine:

    ours     dataset.prepare: reading Parquet, tokenizing, writing and fsyncing shards
    command  `python dataset.py` as a user types it: the same with start-up and exit
    recipe   Pool(w).imap(tokenize, dataset, chunksize=16) with encode_ordinary, filling np.save's
             arrays in the parent, as most GPT-2 reproductions do it
    ceiling  w processes calling encode_to_numpy on text that is in memory, writing nothing

But for `command`, the clock starts when the libraries are imported, the tokenizer is loaded, and
for the recipe also its data set is prepared. Peak memory is that of the process, and of its
children if it has some. Beside the time by the clock stands the processor time of all processes,
which tells the same story when something else keeps the machine busy.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
import dataset
from gptxs.stdlib import stdlib_documents
from gptxs.tokenizer import END_OF_TEXT, get_tokenizer

SHARD_SIZE = 10_000_000
WAYS = ("ours", "command", "recipe", "ceiling")


@dataclass(frozen=True)
class Options:
    """What to tokenize, and how often."""

    data: Path | None = None
    """A folder of Parquet files with a column `text`. Default: the embedded corpus, 40 times."""
    repeat: int = 1
    """Tokenize the files that many times in one run, to see how much of a long run start-up is."""
    workers: int = os.cpu_count() or 1
    """Cores for each way."""
    rounds: int = 3
    """How often each is run."""
    ways: tuple[str, ...] = WAYS
    """Which ones to run."""
    way: str | None = None
    """For the script itself: run only this one, and print its numbers as JSON."""


def cpu_seconds() -> float:
    """Processor time so far of this process and of its finished children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def ours(data: Path, workers: int, out: Path) -> tuple[float, float, np.ndarray]:
    import pyarrow.parquet  # noqa: F401

    config = dataset.DatasetConfig(
        (str(data),), data_dir=out, workers=workers, shard_size=SHARD_SIZE
    )
    start, cpu = time.perf_counter(), cpu_seconds()
    dataset.prepare(config)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    shards = sorted(out.glob("*.npy"), key=lambda path: path.stem[-6:])
    return seconds, cpu, np.concatenate([np.load(path) for path in shards])


def command(data: Path, workers: int, out: Path) -> tuple[float, float, np.ndarray]:
    arguments = ["--source", data, "--data-dir", out, "--workers", workers]
    start, cpu = time.perf_counter(), cpu_seconds()
    subprocess.run(
        [sys.executable, dataset.__file__, *map(str, arguments), "--shard-size", str(SHARD_SIZE)],
        check=True,
    )
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    shards = sorted(out.glob("*.npy"), key=lambda path: path.stem[-6:])
    return seconds, cpu, np.concatenate([np.load(path) for path in shards])


def tokenize(document: dict[str, str]) -> np.ndarray:
    tokens = [END_OF_TEXT]
    tokens.extend(get_tokenizer().encode_ordinary(document["text"]))
    array = np.array(tokens)
    if not ((array >= 0) & (array < 2**16)).all():
        raise ValueError("a token that is no uint16")
    return array.astype(np.uint16)


def recipe(data: Path, workers: int, out: Path) -> tuple[float, float, np.ndarray]:
    import datasets

    files = [str(path) for path in sorted(data.glob("*.parquet"))]
    documents = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(out / "cache")
    )
    shard, filled, shards = np.empty(SHARD_SIZE, np.uint16), 0, 0
    start, cpu = time.perf_counter(), cpu_seconds()
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        for tokens in pool.imap(tokenize, documents, chunksize=16):
            while filled + len(tokens) >= SHARD_SIZE:
                rest = SHARD_SIZE - filled
                shard[filled:] = tokens[:rest]
                np.save(out / f"{shards:06d}.npy", shard)
                tokens, filled, shards = tokens[rest:], 0, shards + 1
            shard[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
        pool.close()
        pool.join()
    np.save(out / f"{shards:06d}.npy", shard[:filled])
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    return seconds, cpu, np.concatenate([np.load(path) for path in sorted(out.glob("*.npy"))])


def ceiling(data: Path, workers: int, out: Path) -> tuple[float, float, np.ndarray]:
    import pyarrow.parquet as pq

    files = sorted(data.glob("*.parquet"))
    texts = [t for f in files for t in pq.read_table(f, columns=["text"])["text"].to_pylist()]
    encode = get_tokenizer().encode_to_numpy
    context = multiprocessing.get_context("fork")
    barrier, times = context.Barrier(workers), context.Queue()

    def work(part: int) -> None:
        # Parts of equal length in characters, or the slowest of them would be the measurement.
        mine = texts[bounds[part] : bounds[part + 1]]
        barrier.wait()
        start, cpu = time.perf_counter(), time.process_time()
        tokens = [encode(text, disallowed_special=()) for text in mine]
        times.put((start, time.perf_counter(), time.process_time() - cpu))
        marked = [np.append(END_OF_TEXT, t) for t in tokens]
        np.save(out / f"{part:06d}.npy", np.concatenate(marked).astype(np.uint16))

    ends = np.cumsum([len(text) for text in texts])
    bounds = [int(i) for i in np.searchsorted(ends, np.linspace(0, ends[-1], workers + 1))]
    bounds[-1] = len(texts)
    processes = [context.Process(target=work, args=(part,)) for part in range(workers)]
    for process in processes:
        process.start()
    starts, stops, cpus = zip(*(times.get() for _ in processes), strict=True)
    for process in processes:
        process.join()
    tokens = np.concatenate([np.load(path) for path in sorted(out.glob("*.npy"))])
    return max(stops) - min(starts), sum(cpus), tokens


def run_one(way: str, data: Path, workers: int) -> None:
    if way != "command":
        get_tokenizer()
    with tempfile.TemporaryDirectory() as out:
        run = {"ours": ours, "command": command, "recipe": recipe, "ceiling": ceiling}[way]
        seconds, cpu, tokens = run(data, workers, Path(out))
    own, child = (
        resource.getrusage(who).ru_maxrss / 1024
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    result = {"tokens": len(tokens), "seconds": seconds, "cpu": cpu, "own": own, "child": child}
    print(json.dumps(result | {"sha256": hashlib.sha256(tokens.tobytes()).hexdigest()}))


def embedded_corpus(folder: Path) -> Path:
    """Parquet files like FineWeb-Edu's, row groups of 1,000, of the embedded corpus 40 times."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for i in range(8):
        texts = stdlib_documents() * 5
        table = pa.table({"text": texts, "id": [f"{i}-{j}" for j in range(len(texts))]})
        pq.write_table(table, folder / f"{i:03d}.parquet", row_group_size=1000, compression="zstd")
    return folder


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.way and options.data:
        run_one(options.way, options.data, options.workers)
        return
    with tempfile.TemporaryDirectory() as temporary:
        data = options.data or embedded_corpus(Path(temporary))
        if options.repeat > 1:
            files = sorted(data.glob("*.parquet"))
            data = Path(temporary, "repeated")
            data.mkdir()
            for i in range(options.repeat):
                for file in files:
                    (data / f"{i:03d}_{file.name}").symlink_to(file.resolve())
        results: dict[str, list[dict[str, float]]] = {way: [] for way in options.ways}
        for number in range(options.rounds):
            for way in options.ways:
                command = [sys.executable, __file__, "--way", way, "--data", str(data)]
                command += ["--workers", str(options.workers)]
                run = subprocess.run(command, check=True, capture_output=True, text=True)
                result = json.loads(run.stdout.splitlines()[-1])
                results[way].append(result)
                print(f"round {number + 1}  {way:8s} {result['seconds']:6.1f} s", flush=True)
    print(f"\n{results[options.ways[0]][0]['tokens']:,} tokens, {options.workers} workers, medians")
    for way in options.ways:
        clock, cpu = (
            statistics.median(r["tokens"] / r[unit] / 1e6 for r in results[way])
            for unit in ("seconds", "cpu")
        )
        peak, child = (max(r[whose] for r in results[way]) for whose in ("own", "child"))
        children = f" + {options.workers} x {child:.0f} MiB" if child else ""
        print(
            f"{way:8s} {clock:5.2f}M tokens/s, {cpu:5.2f}M tokens per processor second, "
            f"peak {peak:.0f} MiB{children}"
        )
    for name, other in itertools.product(("ours", "command"), ("recipe", "ceiling")):
        if name not in results or other not in results:
            continue
        # Round by round, since what else the machine does changes between them.
        pairs = list(zip(results[other], results[name], strict=True))
        clock, cpu = (
            statistics.median(theirs[unit] / mine[unit] for theirs, mine in pairs)
            for unit in ("seconds", "cpu")
        )
        print(f"{name} / {other}: {clock:.2f} by the clock, {cpu:.2f} by processor time")
    same = len({r["sha256"] for way in options.ways for r in results[way]}) == 1
    print("identical tokens: " + ("yes" if same else "NO"))
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
