"""eval.py: one validation loss for any number of ranks, and a command that says what is wrong."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from hub_server import HubServer
from test_hellaswag import raw_examples, write_jsonl

import eval as eval_script
import hellaswag
from data_loader import TokenDataset
from dataset import get_tokenizer
from eval import validation_loss
from model import END_OF_TEXT, GPT, GPTConfig

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
TEXT = "The naïve dog runs over the water. 😀 Then she opens the door, slowly and with care. "


def small_model(context_length: int = 16) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(16, 2, 2, context_length, 50304)).requires_grad_(False)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    """Two documents, 50 windows of 16 tokens in each of two shards."""
    document = [END_OF_TEXT, *get_tokenizer().encode_ordinary(TEXT * 60)]
    return np.array((document * 4)[:1602], dtype=np.uint16)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory, tokens: np.ndarray) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for i, shard in enumerate(tokens.reshape(2, 801)):
        np.save(folder / f"small_val_{i:06d}.npy", shard)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log") / "step_000010"
    small_model().save_pretrained(folder)
    return folder


def exact_loss(model: GPT, tokens: np.ndarray, windows: int, T: int = 16) -> float:
    losses = []
    for start in [shard * 801 + i * T for shard in range(2) for i in range(800 // T)][:windows]:
        idx = torch.from_numpy(tokens[start : start + T + 1].astype(np.int64))[None]
        losses.append(F.cross_entropy(model(idx[:, :-1])[0], idx[0, 1:]))
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("micro_batch", [1, 7, 64])
@pytest.mark.parametrize("windows", [1, 60, 100])
def test_loss_is_that_of_the_first_tokens_for_any_micro_batch(
    data_dir: Path, tokens: np.ndarray, micro_batch: int, windows: int
) -> None:
    model, dataset = small_model(), TokenDataset(data_dir, "val", 16)
    loss = validation_loss(model, dataset, windows * 16 + 5, micro_batch, CPU)
    assert loss == pytest.approx(exact_loss(model, tokens, windows), abs=1e-5)


def rank_main(rank: int, data_dir: Path, examples: Path, results: Path) -> None:
    """What train.py asks of each rank; its answers go to a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{results / 'rendezvous'}", rank=rank, world_size=3
    )
    model, dataset = small_model(128), TokenDataset(data_dir, "val", 16)
    loss = validation_loss(model, dataset, 1600, 8, CPU, rank, 3)
    few = validation_loss(model, dataset, 16, 8, CPU, rank, 3)  # two of the ranks have no window
    chosen = hellaswag.predict(model, hellaswag.load_examples(examples), CPU, rank, 3)
    (results / f"{rank}.json").write_text(json.dumps([loss, few, chosen.tolist()]))


def test_three_ranks_return_what_one_process_does(data_dir: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "examples.jsonl", raw_examples(7))
    mp.spawn(rank_main, (data_dir, path, tmp_path), nprocs=3)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert ranks[0] == ranks[1] == ranks[2]
    model, dataset = small_model(128), TokenDataset(data_dir, "val", 16)
    assert ranks[0][0] == pytest.approx(validation_loss(model, dataset, 1600, 8, CPU), abs=1e-6)
    assert ranks[0][1] == pytest.approx(validation_loss(model, dataset, 16, 8, CPU), abs=1e-6)
    assert ranks[0][2] == hellaswag.predict(model, hellaswag.load_examples(path), CPU).tolist()


def run(monkeypatch: pytest.MonkeyPatch, *flags: str | Path, stdin: str = "") -> int:
    """The exit code of `python eval.py FLAGS`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    try:
        eval_script.main()
    except SystemExit as error:
        return int(error.code or 0)
    return 0


@pytest.mark.parametrize("context_length", [8, 16])
def test_the_loss_command_measures_any_context_length_in_bits_of_the_text(
    data_dir: Path,
    checkpoint: Path,
    tokens: np.ndarray,
    context_length: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ("--loss", "--json", "--checkpoint", checkpoint.parent, "--data-dir", data_dir)
    assert run(monkeypatch, *flags, "--context-length", str(context_length)) == 0
    result = json.loads(capsys.readouterr().out)
    loss = exact_loss(small_model(), tokens, 1600 // context_length, context_length)
    assert result["loss"] == pytest.approx(loss, abs=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    targets = np.concatenate((tokens[1:801], tokens[802:1602]))  # windows overlap by one token
    text = get_tokenizer().decode_bytes([t for t in targets.tolist() if t != END_OF_TEXT])
    assert result["tokens"] == 1600
    assert result["bytes"] == len(text)
    bits = loss * 1600 / math.log(2) / len(text)
    assert result["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_samples_of_prompts_and_of_standard_input_are_json_lines(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--checkpoint", checkpoint, "--json", "--max-new-tokens", "20", "--seed", "5")
    assert run(monkeypatch, *flags, "--num-samples", "2", stdin="The dog\nA house\n\n") == 0
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [line["prompt"] for line in lines] == ["The dog"] * 2 + ["A house"] * 2 + [""] * 2
    assert [line["seed"] for line in lines] == [5, 6] * 3
    assert captured.err.count("tokens/s") == 3
    prompts = ("--prompt", "The dog", "--prompt", "A house", "--prompt", "")
    assert run(monkeypatch, *flags, *prompts, "--seed", "6") == 0
    alone = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert alone == lines[1::2]  # seed 6 alone, and as the second sample of seed 5


def test_streaming_prints_the_same_text(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--checkpoint", checkpoint, "--prompt", "The dog", "--max-new-tokens", "30")
    assert run(monkeypatch, *flags, "--num-samples", "2") == 0
    whole = capsys.readouterr().out
    assert run(monkeypatch, *flags, "--num-samples", "2", "--stream") == 0
    assert capsys.readouterr().out == whole
    assert whole.count("The dog") == 2


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--checkpoint", "nowhere/at/all"), "nowhere/at/all"),
        (("--device", "abacus"), "abacus"),
        (("--max-new-tokens", "0"), "max_new_tokens 0"),
        (("--temperature", "-1", "--top-k", "0"), "top_k 0 is not at least 1; temperature -1"),
        (("--top-p", "1.5"), "top_p 1.5"),
        (("--stream", "--json"), "stream and json"),
        (("--loss", "--data-dir", "no/such/folder"), "no/such/folder"),
        (("--loss", "--val-tokens", "5"), "5 validation tokens"),
        (("--loss", "--context-length", "17"), "17"),
        (("--loss", "--context-length", "900"), "900"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    flags: tuple[str, ...],
    named: str,
    checkpoint: Path,
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    defaults = ("--checkpoint", checkpoint, "--data-dir", data_dir, "--prompt", "x")
    assert run(monkeypatch, *defaults, *flags) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("eval.py: ")
    assert named in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_model_and_hellaswag_come_from_the_hub(checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "hellaswag"
    (data / "data").mkdir(parents=True)
    write_jsonl(data / "data" / "validation.jsonl", raw_examples(5))
    (data / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - split: validation\n    path: data/validation.jsonl\n---\n"
    )
    model = tmp_path / "model"
    small_model(128).save_pretrained(model)

    def hellaswag_from(hub: HubServer, cache: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, ROOT / "hellaswag.py", "--checkpoint", "someone/small", "--json"]
        environment = os.environ | hub.environment(tmp_path / cache)
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    with HubServer({"someone/small": model, "Rowan/hellaswag": data}) as hub:
        done = hellaswag_from(hub, "cache")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["n"] == 5
    with HubServer({"someone/small": model}) as hub:
        done = hellaswag_from(hub, "another")
    assert done.returncode == 2
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("hellaswag.py: Rowan/hellaswag: not to be had")
    assert "--data" in error
