"""eval.py: the validation loss for any number of ranks, the export, and the command line."""

import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

import eval
from data_loader import TokenDataset
from eval import encode_prompt, validation_loss
from gptxs.tokenizer import END_OF_TEXT, get_tokenizer
from model import GPT, GPTConfig

CPU = torch.device("cpu")
TEXT = "The naïve dog runs over the water. 😀 Then she opens the door, slowly and with care. "


def small_model(vocab_size: int = 50304) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(16, 2, 2, 16, vocab_size)).requires_grad_(False)


def two_shards() -> np.ndarray:
    """Tokens (2, 801) of a few documents: 50 windows of 16 tokens in each row."""
    document = [END_OF_TEXT, *get_tokenizer().encode_ordinary(TEXT * 60)]
    return np.array((document * 4)[:1602], dtype=np.uint16).reshape(2, 801)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and shards where eval.py looks for them by default."""
    folder = tmp_path_factory.mktemp("home")
    small_model().save_pretrained(folder / "log" / "step_000010")
    (folder / "edu_fineweb10B").mkdir()
    for i, shard in enumerate(two_shards()):
        np.save(folder / "edu_fineweb10B" / f"small_val_{i:06d}.npy", shard)
    return folder


def dataset(home: Path) -> TokenDataset:
    return TokenDataset(home / "edu_fineweb10B", "val", 16, 50304)


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
    home: Path, micro_batch: int, windows: int
) -> None:
    model = small_model()
    loss = validation_loss(model, dataset(home), windows * 16 + 5, micro_batch, CPU)
    assert loss == pytest.approx(exact_loss(model, windows), abs=1e-5)


def test_full_batches_go_through_the_compiled_model(home: Path) -> None:
    model = small_model()
    compiled = small_model()  # stands in: it would be compiled again for other rows
    rows: list[int] = []
    compiled.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    loss = validation_loss(model, dataset(home), 1600, 8, CPU, compiled=compiled)
    assert loss == validation_loss(model, dataset(home), 1600, 8, CPU)
    assert rows == [8] * 12  # of 100 windows


def rank_main(rank: int, home: Path, results: Path) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{results / 'rendezvous'}"
    torch.distributed.init_process_group("gloo", rendezvous, rank=rank, world_size=3)
    data = dataset(home)
    # Of a single window two of the ranks have none.
    losses = [validation_loss(small_model(), data, n, 8, CPU, rank, 3) for n in (1600, 16)]
    (results / f"{rank}.json").write_text(json.dumps(losses))
    # Without this a thread of gloo's may still run when Python ends, which aborts the process.
    torch.distributed.destroy_process_group()


def test_three_ranks_return_what_one_process_does(home: Path, tmp_path: Path) -> None:
    mp.spawn(rank_main, (home, tmp_path), nprocs=3)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert ranks[0] == ranks[1] == ranks[2]
    assert ranks[0] == pytest.approx([exact_loss(small_model(), n) for n in (100, 1)], abs=1e-5)


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Runs `python eval.py FLAGS` in this process: exit code, standard output and error."""

    def run(*flags: str | Path, stdin: bytes = b"", terminal: bool = False) -> tuple[int, str, str]:
        standard_input = io.TextIOWrapper(io.BytesIO(stdin), encoding="ascii")
        monkeypatch.setattr(standard_input, "isatty", lambda: terminal)
        monkeypatch.setattr(sys, "stdin", standard_input)
        monkeypatch.setattr(sys, "argv", ["eval.py", "--dtype", "fp32", *map(str, flags)])
        monkeypatch.chdir(home)
        code = 0
        try:
            eval.main()
        except SystemExit as error:
            code = int(error.code or 0)
        return code, *capsys.readouterr()

    return run


def test_the_loss_command_measures_any_context_length_in_bits_of_the_text(
    command: Command,
) -> None:
    T = 8  # of a model with 16
    code, out, err = command("--loss", "--context-length", str(T), "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    loss = exact_loss(small_model(), 1600 // T, T)
    assert result["loss"] == pytest.approx(loss, abs=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    targets = two_shards()[:, 1:].ravel().tolist()
    text = get_tokenizer().decode_bytes([token for token in targets if token != END_OF_TEXT])
    assert (result["tokens"], result["bytes"]) == (1600, len(text))
    bits = loss * 1600 / math.log(2) / len(text)
    assert result["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    _, out, _ = command("--loss", "--context-length", str(T))
    assert all(f"{name} {result[name]:.4f}" in out for name in ("loss", "bits_per_byte"))


def test_tokens_of_another_tokenizer_have_a_loss_but_no_bytes_and_no_samples(
    command: Command, tmp_path: Path
) -> None:
    np.save(tmp_path / "own_val_000000.npy", np.full(100, 7, np.uint16))
    small_model(vocab_size=300).save_pretrained(tmp_path / "own")
    flags = ("--checkpoint", tmp_path / "own")
    code, out, _ = command(*flags, "--loss", "--data-dir", tmp_path, "--json")
    result = json.loads(out)
    assert (code, result["bytes"], result["bits_per_byte"]) == (0, 0, None)
    code, out, err = command(*flags, "--prompt", "a")
    assert (code, out, "own" in err) == (2, "", True)


def test_samples_of_prompts_and_of_standard_input_are_json_lines(command: Command) -> None:
    flags = ("--json", "--max-new-tokens", "20")
    stdin = "\ufeffThe d\u00f6g\r\nA house\n\n".encode()
    _, out, err = command(*flags, "--seed", "5", "--num-samples", "2", stdin=stdin)
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["prompt"] for line in lines] == ["The d\u00f6g"] * 2 + ["A house"] * 2 + [""] * 2
    assert [line["seed"] for line in lines] == [5, 6] * 3
    assert err.count("tokens/s") == 3
    prompts = ("--prompt", "The d\u00f6g", "--prompt", "A house", "--prompt", "")
    _, out, _ = command(*flags, *prompts, "--seed", "6")
    # Seed 6 alone is the second sample of seed 5.
    assert [json.loads(line) for line in out.splitlines()] == lines[1::2]


def test_what_is_typed_is_asked_for_and_no_prompt_or_no_utf_8_is_an_error(
    command: Command,
) -> None:
    code, out, err = command("--greedy", stdin=b"A\n", terminal=True)
    assert (code, out[:1], err.count("\n")) == (0, "A", 2)  # it says what it waits for
    for stdin, named in (("", "--prompt"), ("\ufeffna\u00efve\n", "UTF-16"), ("\xe9\n", "iconv")):
        encoding = "utf-16-le" if named == "UTF-16" else "latin-1"
        code, out, err = command(stdin=stdin.encode(encoding))
        assert (code, out) == (2, "")
        assert named in err


def test_streaming_prints_the_same_text(command: Command) -> None:
    flags = ("--prompt", "The dog", "--max-new-tokens", "30", "--num-samples", "2")
    _, whole, _ = command(*flags)
    _, streamed, err = command(*flags, "--stream")
    assert streamed == whole
    assert err.startswith("60 tokens in")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--checkpoint nowhere/at/all", ["nowhere/at/all"]),
        ("--device abacus", ["abacus"]),
        ("--max-new-tokens 0 --top-k -2", ["max_new_tokens 0", "top_k -2"]),  # both at once
        ("--top-p 1.5 --stream --json", ["top_p 1.5", "stream and json"]),
        ("--loss --prompt x --seed 3", ["prompt", "seed"]),
        ("--data-dir d --micro-batch 3", ["data_dir", "micro_batch"]),
        ("--greedy --temperature 2 --top-p 0.5", ["temperature", "top_p"]),
        ("--export out --json --device cpu", ["device", "json"]),
        ("--loss --data-dir no/such/folder", ["no/such/folder"]),
        ("--loss --val-tokens 5", ["5 validation tokens"]),
        ("--loss --context-length 17", ["17"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    flags: str, named: list[str], command: Command
) -> None:
    code, out, err = command(*flags.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("eval.py: ")
    assert all(name in err for name in named)


def test_any_text_is_a_prompt(command: Command) -> None:
    prompts = ["<|endoftext|>", " " * 2**21, "\u3000" * 2**18, "\ud800"]
    flags = [f"--prompt={prompt}" for prompt in prompts]
    code, out, _ = command("--max-new-tokens", "2", "--json", *flags)
    assert code == 0
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == prompts


def test_a_prompt_must_be_in_the_vocabulary() -> None:
    assert encode_prompt("", vocab_size=50257) == [END_OF_TEXT]
    assert encode_prompt("\ufeffa", vocab_size=300) == encode_prompt("a", vocab_size=300)
    with pytest.raises(ValueError, match="Hello"):
        encode_prompt("Hello", vocab_size=300)


def test_an_export_is_the_model_with_what_its_log_says_up_to_its_step(
    home: Path, command: Command, tmp_path: Path
) -> None:
    rows = [
        {"kind": "run", "step": 0, "dataset": "owner/books"},
        {"kind": "val", "step": 10, "loss": 3.25},
        {"kind": "hellaswag", "step": 10, "acc": 0.3, "acc_norm": 0.3125},
        {"kind": "val", "step": 20, "loss": 2.5},  # of another checkpoint
    ]
    (home / "log" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, _, err = command("--export", tmp_path / "out")
    assert (code, err) == (0, "")
    card = (tmp_path / "out" / "README.md").read_text()
    assert [fact in card for fact in ("owner/books", "3.25", "0.3125", "2.5")] == [1, 1, 1, 0]
    exported = GPT.from_pretrained(tmp_path / "out").lm_head.weight
    assert torch.equal(exported, small_model().lm_head.weight[:50257])
