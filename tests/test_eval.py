"""eval.py: the validation loss for any number of ranks, and the command line."""

from common import END_OF_TEXT

import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from hub_server import HubServer
from test_hellaswag import raw_examples, write_jsonl

import hellaswag
from data_loader import TokenDataset
from dataset import get_tokenizer
from eval import main, validation_loss
from model import GPT, GPTConfig

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
TEXT = "The naïve dog runs over the water. 😀 Then she opens the door, slowly and with care. "


def small_model(context_length: int = 16) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(16, 2, 2, context_length, 50304)).requires_grad_(False)


def two_shards() -> np.ndarray:
    """Tokens (2, 801) of a few documents: 50 windows of 16 tokens in each row."""
    document = [END_OF_TEXT, *get_tokenizer().encode_ordinary(TEXT * 60)]
    return np.array((document * 4)[:1602], dtype=np.uint16).reshape(2, 801)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for i, shard in enumerate(two_shards()):
        np.save(folder / f"small_val_{i:06d}.npy", shard)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log") / "step_000010"
    small_model().save_pretrained(folder)
    return folder


def exact_loss(model: GPT, windows: int, T: int = 16) -> float:
    """The mean loss of the first windows, one at a time."""
    losses = []
    starts = [(shard, i * T) for shard in range(2) for i in range(800 // T)]
    for shard, start in starts[:windows]:
        window = two_shards()[shard, start : start + T + 1]
        idx = torch.from_numpy(window.astype(np.int64))[None]
        losses.append(F.cross_entropy(model(idx[:, :-1])[0], idx[0, 1:]))
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("micro_batch", [1, 7, 64])
@pytest.mark.parametrize("windows", [1, 60, 100])
def test_loss_is_that_of_the_first_tokens_for_any_micro_batch(
    data_dir: Path, micro_batch: int, windows: int
) -> None:
    model = small_model()
    dataset = TokenDataset(data_dir, "val", 16)
    loss = validation_loss(model, dataset, windows * 16 + 5, micro_batch, CPU)
    assert loss == pytest.approx(exact_loss(model, windows), abs=1e-5)


def measure(data_dir: Path, examples: Path, rank: int, world_size: int) -> list[Any]:
    """What train.py asks of each rank: the loss of all windows and of one, and HellaSwag."""
    model = small_model(128)
    dataset = TokenDataset(data_dir, "val", 16)
    return [
        validation_loss(model, dataset, 1600, 8, CPU, rank, world_size),
        validation_loss(model, dataset, 16, 8, CPU, rank, world_size),  # most ranks have no window
        hellaswag.predict(model, hellaswag.load_examples(examples), CPU, rank, world_size).tolist(),
    ]


def rank_main(rank: int, data_dir: Path, examples: Path, results: Path) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{results / 'rendezvous'}"
    torch.distributed.init_process_group("gloo", rendezvous, rank=rank, world_size=3)
    (results / f"{rank}.json").write_text(json.dumps(measure(data_dir, examples, rank, 3)))
    # Without this a thread of gloo's may still run when Python ends, which aborts the process: in
    # one run of ten on a busy machine. train.py does the same at its end.
    torch.distributed.destroy_process_group()


def test_three_ranks_return_what_one_process_does(data_dir: Path, tmp_path: Path) -> None:
    examples = write_jsonl(tmp_path / "examples.jsonl", raw_examples(7))
    mp.spawn(rank_main, (data_dir, examples, tmp_path), nprocs=3)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert ranks[0] == ranks[1] == ranks[2]
    *losses, predictions = measure(data_dir, examples, 0, 1)
    assert ranks[0][:2] == pytest.approx(losses, abs=1e-6)
    assert ranks[0][2] == predictions


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `python eval.py FLAGS` in this process: exit code, standard output and error."""

    def run(*flags: str | Path, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = 0
        try:
            main()
        except SystemExit as error:
            code = int(error.code or 0)
        return code, *capsys.readouterr()

    return run


def test_int8_changes_the_loss_and_the_samples_but_hardly(
    data_dir: Path, tmp_path: Path, command: Command
) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(32, 2, 2, 16, 50304)).requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(4)  # predictions far from uniform
    model.save_pretrained(tmp_path)
    flags = ("--loss", "--json", "--checkpoint", tmp_path, "--data-dir", data_dir)
    _, exact, _ = command(*flags)
    _, rounded, _ = command(*flags, "--quantize", "int8")
    losses = json.loads(exact)["loss"], json.loads(rounded)["loss"]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.005)
    sampling = ("--prompt", "The", "--max-new-tokens", "20", "--quantize", "int8")
    code, out, err = command("--checkpoint", tmp_path, "--json", *sampling)
    assert code == 0
    assert json.loads(out)["tokens"] == 20
    assert "int8" in err


@pytest.mark.parametrize("T", [8, 16])
def test_the_loss_command_measures_any_context_length_in_bits_of_the_text(
    data_dir: Path, checkpoint: Path, T: int, command: Command
) -> None:
    flags = ("--loss", "--json", "--checkpoint", checkpoint.parent, "--data-dir", data_dir)
    code, out, _ = command(*flags, "--context-length", str(T))
    assert code == 0
    result = json.loads(out)
    loss = exact_loss(small_model(), 1600 // T, T)
    assert result["loss"] == pytest.approx(loss, abs=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    targets = two_shards()[:, 1:].ravel().tolist()
    text = get_tokenizer().decode_bytes([token for token in targets if token != END_OF_TEXT])
    assert result["tokens"] == 1600
    assert result["bytes"] == len(text)
    bits = loss * 1600 / math.log(2) / len(text)
    assert result["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_samples_of_prompts_and_of_standard_input_are_json_lines(
    checkpoint: Path, command: Command
) -> None:
    flags = ("--checkpoint", checkpoint, "--json", "--max-new-tokens", "20", "--seed", "5")
    _, out, err = command(*flags, "--num-samples", "2", stdin="The dog\nA house\n\n")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["prompt"] for line in lines] == ["The dog"] * 2 + ["A house"] * 2 + [""] * 2
    assert [line["seed"] for line in lines] == [5, 6] * 3
    assert err.count("tokens/s") == 3
    prompts = ("--prompt", "The dog", "--prompt", "A house", "--prompt", "")
    _, out, _ = command(*flags, *prompts, "--seed", "6")
    # Seed 6 alone is the second sample of seed 5.
    assert [json.loads(line) for line in out.splitlines()] == lines[1::2]


def test_streaming_prints_the_same_text(checkpoint: Path, command: Command) -> None:
    flags = ("--checkpoint", checkpoint, "--prompt", "The dog", "--max-new-tokens", "30")
    _, whole, _ = command(*flags, "--num-samples", "2")
    _, streamed, _ = command(*flags, "--num-samples", "2", "--stream")
    assert streamed == whole
    assert whole.count("The dog") == 2


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--checkpoint nowhere/at/all", ["nowhere/at/all"]),
        ("--device abacus", ["abacus"]),
        ("--max-new-tokens 0", ["max_new_tokens 0"]),
        ("--temperature -1 --top-k 0", ["temperature -1", "top_k 0"]),  # both at once
        ("--top-p 1.5", ["top_p 1.5"]),
        ("--stream --json", ["stream", "json"]),
        ("--loss --prompt x", ["loss", "prompt"]),
        ("--greedy --temperature 2", ["greedy", "temperature 2"]),
        ("--temperature nan --top-p nan", ["temperature nan", "top_p nan"]),
        ("--num-samples 100000000 --seed 18446744073709551616", ["num_samples", "seed"]),
        ("--quantize int8", ["int8", "16"]),  # of 16 channels, and the kernel needs 32
        ("--prompt x --greedy --top-p 0.5", ["greedy", "top_p"]),
        ("--temperature 1e-30", ["temperature 1e-30"]),  # 0 / 0 is NaN
        (f"--seed {2**64 - 1} --num-samples 2", ["seed", "num_samples 2"]),
        ("--loss --data-dir no/such/folder", ["no/such/folder"]),
        ("--loss --val-tokens 5", ["5 validation tokens"]),
        ("--loss --context-length 17", ["17"]),
        ("--loss --context-length 900", ["900"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    flags: str, named: list[str], checkpoint: Path, data_dir: Path, command: Command
) -> None:
    defaults = ["--checkpoint", checkpoint, "--data-dir", data_dir]
    if "--loss" not in flags:
        defaults += ["--prompt", "x"]
    code, out, err = command(*defaults, *flags.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("eval.py: ")
    assert all(name in err for name in named)


def test_a_shard_of_nothing_but_delimiters_has_no_bits_per_byte(
    checkpoint: Path, command: Command, tmp_path: Path
) -> None:
    np.save(tmp_path / "small_val_000000.npy", np.full(100, END_OF_TEXT, np.uint16))
    flags = ("--loss", "--checkpoint", checkpoint, "--data-dir", tmp_path)
    code, out, _ = command(*flags, "--json")
    assert code == 0
    result = json.loads(out)
    assert (result["bytes"], result["bits_per_byte"]) == (0, None)
    assert command(*flags)[0] == 0


def test_all_prompts_must_be_in_the_vocabulary_before_one_is_continued(
    command: Command, tmp_path: Path
) -> None:
    GPT(GPTConfig(16, 2, 2, 16, 300)).save_pretrained(tmp_path)
    flags = ("--checkpoint", tmp_path, "--max-new-tokens", "2")
    code, out, err = command(*flags, "--prompt", "a", "--prompt", "Hello")
    assert (code, out) == (2, "")
    assert "token 15496" in err
    assert "vocabulary of 300" in err
    assert command(*flags, "--prompt", "a")[0] == 0


@pytest.mark.parametrize("prompt", ["<|endoftext|>", " " * 2**21, "\u3000" * 2**18, "\ud800"])
def test_any_text_is_a_prompt(prompt: str, checkpoint: Path, command: Command) -> None:
    flags = ("--checkpoint", checkpoint, "--max-new-tokens", "2", "--json")
    code, out, _ = command(*flags, "--prompt", prompt)
    assert code == 0
    assert json.loads(out)["prompt"] == prompt


def test_standard_input_is_utf_8_in_any_locale(checkpoint: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "eval.py"), "--checkpoint", str(checkpoint), "--json"],
        input="na\u00efve\n".encode() + b"\xff\n",
        env=os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    prompts = [json.loads(line)["prompt"] for line in done.stdout.splitlines()]
    assert prompts == ["na\u00efve", "\ufffd"]


def test_a_model_and_hellaswag_come_from_the_hub(tmp_path: Path) -> None:
    model = tmp_path / "model"
    small_model(128).save_pretrained(model)
    data = tmp_path / "hellaswag"
    data.mkdir()
    write_jsonl(data / "validation.jsonl", raw_examples(5))

    def hellaswag_from(repos: dict[str, Path], cache: str) -> subprocess.CompletedProcess[str]:
        flags = ["--checkpoint", "someone/small", "--json"]
        with HubServer(repos) as hub:
            return subprocess.run(
                [sys.executable, str(ROOT / "hellaswag.py"), *flags],
                env=os.environ | hub.environment(tmp_path / cache),
                capture_output=True,
                text=True,
                timeout=300,
            )

    done = hellaswag_from({"someone/small": model, "Rowan/hellaswag": data}, "cache")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["n"] == 5
    done = hellaswag_from({"someone/small": model}, "another")
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    assert error.startswith("hellaswag.py: ")
    assert "Rowan/hellaswag" in error
    assert "--data" in error  # the remedy
