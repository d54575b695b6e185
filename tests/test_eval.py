"""eval.py: the validation loss for any number of ranks, the command line, and sampling."""

import io
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import ModelCard
from launcher import fork_function
from torch import Tensor

import eval
from data_loader import TokenDataset
from eval import SamplingOptions, encode_prompt, generate, token_printer, validation_loss
from gptxs.distributed import DistInfo
from gptxs.tokenizer import END_OF_TEXT, VOCAB_SIZE, get_tokenizer
from model import GPT, GPTConfig

Capture = pytest.CaptureFixture[str]
CPU = DistInfo(rank=0, world_size=1, device=torch.device("cpu"))
TEXT = "The naïve dog runs over the water. 😀 Then she opens the door, slowly and with care. "


def random_model(context_length: int = 16, vocab_size: int = 50304) -> GPT:
    """A small model whose predictions are far from uniform, and no parameter 0 or 1."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(32, 4, 2, context_length, vocab_size)).requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(4)
        if parameter.dim() == 1:  # biases would be 0, and the weights of every LayerNorm alike
            parameter.add_(torch.randn_like(parameter))
    return model


def two_shards() -> np.ndarray:
    """Tokens (2, 801) of a few documents: 50 windows of 16 tokens in each row."""
    document = [END_OF_TEXT, *get_tokenizer().encode_ordinary(TEXT * 60)]
    return np.array((document * 4)[:1602], dtype=np.uint16).reshape(2, 801)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and shards where eval.py looks for them by default."""
    folder = tmp_path_factory.mktemp("home")
    random_model().save_pretrained(folder / "log" / "step_000010")
    (folder / "edu_fineweb10B").mkdir()
    for i, shard in enumerate(two_shards()):
        np.save(folder / "edu_fineweb10B" / f"small_val_{i:06d}.npy", shard)
    return folder


def dataset(home: Path) -> TokenDataset:
    return TokenDataset(home / "edu_fineweb10B", "val", 16, 50304)


def exact_loss(windows: int, T: int = 16) -> float:
    """The mean loss of the first windows, one at a time."""
    model = random_model()
    losses = []
    starts = [(shard, i * T) for shard in range(2) for i in range(800 // T)]
    for shard, start in starts[:windows]:
        window = two_shards()[shard, start : start + T + 1]
        idx = torch.from_numpy(window.astype(np.int64))[None]
        losses.append(F.cross_entropy(model(idx[:, :-1])[0], idx[0, 1:]))
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("micro_batch", [1, 7, 64])
@pytest.mark.parametrize("windows", [1, 60, 100])
def test_the_loss_is_that_of_the_first_tokens(home: Path, micro_batch: int, windows: int) -> None:
    rows: list[int] = []
    compiled = random_model()  # stands in: it would be compiled again for other numbers of rows
    compiled.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    model, data = random_model(), dataset(home)
    loss = validation_loss(model, data, windows * 16 + 5, micro_batch, CPU, compiled=compiled)
    assert loss == pytest.approx(exact_loss(windows), abs=1e-5)
    assert rows == [micro_batch] * (windows // micro_batch)


def measure_as_rank(rank: int, home: Path) -> None:
    """Write what one of three ranks returns."""
    rendezvous = f"file://{Path('rendezvous').resolve()}"
    dist.init_process_group("gloo", rendezvous, rank=rank, world_size=3)
    data = dataset(home)
    # Of a single window two of the ranks have none.
    info = DistInfo(rank, world_size=3, device=CPU.device)
    losses = [validation_loss(random_model(), data, n, 8, info) for n in (1600, 16)]
    Path(f"{rank}.json").write_text(json.dumps(losses))
    # Without this a thread of gloo's may still run when Python ends, which aborts the process.
    dist.destroy_process_group()


def test_three_ranks_return_what_one_process_does(home: Path, tmp_path: Path) -> None:
    ranks = [fork_function(tmp_path, partial(measure_as_rank, rank, home)) for rank in range(3)]
    assert [rank.wait() for rank in ranks] == [0, 0, 0], ranks[0].err
    losses = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert losses[0] == losses[1] == losses[2]
    assert losses[0] == pytest.approx([exact_loss(n) for n in (100, 1)], abs=1e-5)


@pytest.fixture
def command(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> Any:
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


def test_the_loss_of_any_context_length_in_bits_of_the_text(command: Any) -> None:
    T = 8  # of a model with 16
    code, out, err = command("--loss", "--context-length", str(T), "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    loss = exact_loss(1600 // T, T)
    assert result["loss"] == pytest.approx(loss, abs=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    targets = two_shards()[:, 1:].ravel().tolist()
    text = get_tokenizer().decode_bytes([token for token in targets if token != END_OF_TEXT])
    assert (result["tokens"], result["bytes"]) == (1600, len(text))
    bits = loss * 1600 / math.log(2) / len(text)
    assert result["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    _, out, _ = command("--loss", "--context-length", str(T))
    assert all(f"{name} {result[name]:.4f}" in out for name in ("loss", "bits_per_byte"))


def test_tokens_of_another_tokenizer_have_only_a_loss(command: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "own_val_000000.npy", np.full(100, 7, np.uint16))
    random_model(vocab_size=300).save_pretrained(tmp_path / "own")
    flags = ("--checkpoint", tmp_path / "own")
    code, out, _ = command(*flags, "--loss", "--data-dir", tmp_path, "--json")
    result = json.loads(out)
    assert (code, result["bytes"], result["bits_per_byte"]) == (0, 0, None)
    code, out, err = command(*flags, "--prompt", "a")
    assert (code, out, "own" in err) == (2, "", True)


def test_samples_of_prompts_and_of_standard_input_are_json_lines(command: Any) -> None:
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


def test_a_prompt_is_asked_for_and_must_be_utf_8(command: Any) -> None:
    code, out, err = command("--greedy", stdin=b"A\n", terminal=True)
    assert (code, out[:1], err.count("\n")) == (0, "A", 2)  # it says what it waits for
    for stdin, named in ((b"", "--prompt"), (b"\xe9\n", "standard input")):
        code, out, err = command(stdin=stdin)
        assert (code, out, named in err) == (2, "", True)


def test_streaming_prints_the_same_text(command: Any) -> None:
    flags = ("--prompt", "The dog", "--max-new-tokens", "30", "--num-samples", "2")
    _, whole, _ = command(*flags)
    _, streamed, err = command(*flags, "--stream")
    assert streamed == whole
    assert err.startswith("60 tokens in")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--top-k -2 --top-p 1.5 --stream --json", ["top_k -2", "top_p 1.5", "stream and json"]),
        ("--data-dir d --micro-batch 3", ["data_dir", "micro_batch"]),
        ("--greedy --temperature 2 --top-p 0.5", ["temperature", "top_p"]),
        ("--export out --json --device cpu", ["device", "json"]),
        ("--loss --val-tokens 5", ["5 validation tokens"]),
        ("--loss --context-length 17", ["17"]),
    ],
)
def test_a_mistake_is_one_line(flags: str, named: list[str], command: Any) -> None:
    code, out, err = command(*flags.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("eval.py: ")
    assert all(name in err for name in named)


def test_any_text_is_a_prompt(command: Any) -> None:
    prompts = ["<|endoftext|>", "\ud800"]
    flags = [f"--prompt={prompt}" for prompt in prompts]
    code, out, _ = command("--max-new-tokens", "2", "--json", *flags)
    assert code == 0
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == prompts
    assert encode_prompt("", vocab_size=50257) == [END_OF_TEXT]
    assert encode_prompt("\ufeffa", vocab_size=300) == encode_prompt("a", vocab_size=300)


# A run's report, whose settings name folders of its machine.
RESULTS = "|  | this run |\n|---|---|\n| validation loss | 3.2500 |\n"
SETTINGS = "| setting | value |\n|---|---|\n| data_dir | /home/somebody |\n"
ROWS = [
    {"kind": "run", "step": 0, "dataset": "owner/books"},
    {"kind": "val", "step": 10, "loss": 3.25},
    {"kind": "hellaswag", "step": 5, "harness_acc": 0.5},  # of another checkpoint, as is
    {"kind": "hellaswag", "step": 10, "acc_norm": 0.25, "harness_acc_norm": 0.3125},
    {"kind": "val", "step": 20, "loss": 2.5},
]


def test_an_export_is_gpt2s_rows_and_a_card(home: Path, command: Any, tmp_path: Path) -> None:
    log, folder, out = home / "log", home / "log/step_000010", tmp_path / "out"
    (folder / "training_state.pt").write_bytes(b"state")
    (log / "metrics.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (log / "report.md").write_text(f"# Run report\n\n{RESULTS}\n± error.\n\n{SETTINGS}")
    (log / "plot.png").write_bytes(b"picture")
    code, _, err = command("--export", out)
    assert (code, err) == (0, "")
    names = {path.name for path in folder.iterdir()} | {"README.md", "plot.png"}
    assert {path.name for path in out.iterdir()} == names - {"training_state.pt"}
    exported = GPT.from_pretrained(out).lm_head.weight
    assert torch.equal(exported, random_model().lm_head.weight[:50257])
    card = ModelCard.load(out / "README.md")
    assert card.data.datasets == ["owner/books"]
    results = {(r.dataset_type, r.metric_type): r.metric_value for r in card.data.eval_results}
    hellaswag = ("Rowan/hellaswag", "acc_norm")
    assert results == {("owner/books", "validation loss"): 3.25, hellaswag: 0.3125}
    assert RESULTS in card.text
    assert "](plot.png)" in card.text
    assert "/home/somebody" not in card.text


def draw(model: GPT, idx: Tensor, n: int, **how: Any) -> Tensor:
    """Prompts with up to ``n`` more tokens, by default drawn from all of the vocabulary."""
    return generate(model, idx, SamplingOptions(**({"max_new_tokens": n, "top_k": None} | how)))


def constant_model(logits: dict[int, float]) -> GPT:
    """A model of 50,304 rows that always has these logits, and -30 for all other tokens."""
    model = GPT(GPTConfig(2, 1, 1, 16, 50304)).requires_grad_(False)
    model.transformer.ln_f.weight.zero_()
    model.transformer.ln_f.bias.copy_(torch.tensor([1.0, 0.0]))
    model.lm_head.weight[:, 0] = -30.0
    for token, value in logits.items():
        model.lm_head.weight[token, 0] = value
    return model


def without_cache(model: GPT, idx: Tensor, n: int) -> Tensor:
    """Greedy decoding with a full pass for each token, and the rule of the sliding window."""
    context = model.config.context_length
    window = idx[:, -context:]
    new: list[Tensor] = []
    for _ in range(n):
        if window.size(1) > context:
            window = window[:, -(context // 2) :]
        new.append(model(window)[:, -1:].argmax(-1))
        window = torch.cat((window, new[-1]), dim=1)
    return torch.cat((idx, *new), dim=1)


@pytest.mark.parametrize(("num_samples", "temperature"), [(1, 0), (3, 1e-30)])
@pytest.mark.parametrize("prompt", [1, 16, 31, 32, 50])
def test_text_is_that_of_full_passes(prompt: int, num_samples: int, temperature: float) -> None:
    model = random_model(context_length=32, vocab_size=300)
    idx = torch.randint(300, (2, prompt))
    # Greedy samples of a prompt are equal, and stand next to each other.
    expected = without_cache(model, idx, 90).repeat_interleave(num_samples, 0)
    calls: list[Any] = []
    model.transformer.wte.register_forward_hook(lambda _, args, out: calls.append(args[0].shape))
    out = draw(model, idx, 90, num_samples=num_samples, temperature=temperature)
    assert torch.equal(out, expected)
    assert calls[0] == (2, min(prompt, 32))  # a prompt once for all of its samples
    assert calls.count((2 * num_samples, 1)) > 80  # then a token of each


HOW = [{"top_k": 0}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 1.7, "top_k": 12, "top_p": 0.9}]


@pytest.mark.parametrize("how", HOW, ids=str)
def test_20000_samples_agree_with_the_exact_distribution(how: dict[str, Any]) -> None:
    model = random_model(vocab_size=40)
    idx = torch.tensor([[3, 1, 4]])
    p = (model(idx)[0, -1].double() / how.get("temperature", 1.0)).softmax(-1)
    order = p.argsort(descending=True)
    kept = order[: how.get("top_k", 0) or 40]
    mass = (p[kept] / p[kept].sum()).cumsum(0)
    kept = kept[: 1 + int((mass < how.get("top_p", 2.0)).sum())]
    expected = torch.zeros(40, dtype=torch.float64)
    expected[kept] = 20_000 * p[kept] / p[kept].sum()

    drawn = draw(model, idx, 1, num_samples=20_000, seed=1, **how)[:, -1]
    counts = torch.bincount(drawn, minlength=40)
    assert counts[expected == 0].sum() == 0
    cells = expected >= 5  # what chi-square needs
    statistic = ((counts - expected) ** 2 / expected)[cells].sum()
    # The chance of a statistic as large as this, if the samples have the exact distribution.
    degrees = cells.sum().double() - 1
    assert torch.special.gammaincc(degrees / 2, statistic / 2) > 3e-5


@pytest.mark.parametrize("how", HOW, ids=str)
def test_a_seed_gives_the_same_text_alone_and_among_others(how: dict[str, Any]) -> None:
    model = random_model(vocab_size=5000)
    idx = torch.randint(5000, (1, 5))
    batch = draw(model, idx, 60, num_samples=4, seed=11, **how)
    for i in range(4):
        assert torch.equal(batch[i : i + 1], draw(model, idx, 60, seed=11 + i, **how))
    assert len({tuple(row) for row in batch.tolist()}) == 4


def test_a_row_ends_at_end_of_text_and_the_others_continue() -> None:
    model = constant_model({END_OF_TEXT: 2.0, 7: 4.0})
    idx = torch.tensor([[5, END_OF_TEXT]])  # in a prompt it ends nothing
    out = draw(model, idx, 100, num_samples=4, seed=2)
    lengths = [row.index(END_OF_TEXT) for row in out[:, 2:].tolist()]
    expected = torch.full((4, max(lengths) + 1), END_OF_TEXT)
    for row, length in zip(expected, lengths, strict=True):
        row[:length] = 7
    assert torch.equal(out, torch.cat((idx.expand(4, -1), expected), dim=1))
    assert len(set(lengths)) > 1


def test_rows_that_only_pad_the_vocabulary_are_never_sampled() -> None:
    model = constant_model({50257: 50.0, 50303: 60.0, 9: 1.0})
    for how in ({"temperature": 0}, {}, {"top_k": 3}, {"top_p": 0.99}):
        assert draw(model, torch.tensor([[1]]), 20, num_samples=2, **how).max() < VOCAB_SIZE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_precision_is_the_weights_and_training_goes_on(dtype: torch.dtype) -> None:
    model = random_model().to(dtype).requires_grad_(True)
    idx = torch.randint(300, (1, 5))
    expected = draw(model, idx, 40)
    with torch.autocast("cpu", torch.float16):  # as during training
        assert torch.equal(draw(model, idx, 40), expected)
    model(idx, idx).backward()
    assert model.lm_head.weight.grad is not None


def test_streamed_text_is_whole_characters(capsys: Capture) -> None:
    text = "na\u00efve \U0001f600 ma\u00f1ana \ud55c\uad6d\uc5b4 \U0001d400 e\u0301 end"
    pieces = []
    print_token = token_printer()
    for token in [*get_tokenizer().encode_ordinary(text), END_OF_TEXT]:
        print_token(token)
        pieces.append(capsys.readouterr().out)
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    for token in [*get_tokenizer().encode_ordinary("a\U0001f600")[:-1], END_OF_TEXT]:
        print_token(token)  # cut off within a character
    assert capsys.readouterr().out == "a\N{REPLACEMENT CHARACTER}"
