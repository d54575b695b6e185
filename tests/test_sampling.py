"""Sampling: the cache, the draw, the stop, and text as it streams."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eval import SamplingOptions, generate, token_printer
from gptxs.tokenizer import END_OF_TEXT, VOCAB_SIZE, get_tokenizer
from model import GPT, GPTConfig


def draw(model: GPT, idx: Tensor, n: int, **how: Any) -> Tensor:
    """Prompts with up to ``n`` more tokens, by default drawn from all of the vocabulary."""
    return generate(model, idx, SamplingOptions(**({"max_new_tokens": n, "top_k": None} | how)))


def random_model(context_length: int = 32, vocab_size: int = 300) -> GPT:
    """A small model whose predictions are far from uniform, and no parameter 0 or 1."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(32, 4, 2, context_length, vocab_size)).requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(4)
        if parameter.dim() == 1:  # biases would be 0, and the weights of every LayerNorm alike
            parameter.add_(torch.randn_like(parameter))
    return model


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
def test_past_the_context_the_newest_half_is_the_new_prompt(
    prompt: int, num_samples: int, temperature: float
) -> None:
    model = random_model()
    idx = torch.randint(300, (2, prompt))
    out = draw(model, idx, 90, num_samples=num_samples, temperature=temperature)
    # Greedy samples of a prompt are equal, and stand next to each other.
    assert torch.equal(out, without_cache(model, idx, 90).repeat_interleave(num_samples, 0))


def test_greedy_equals_hugging_face_over_200_tokens(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = random_model(context_length=256, vocab_size=VOCAB_SIZE)
    model.save_pretrained(tmp_path)
    reference: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    idx = torch.randint(VOCAB_SIZE, (1, 9))
    expected = reference.generate(idx, do_sample=False, max_new_tokens=200, min_new_tokens=200)
    assert torch.equal(draw(model, idx, 200, temperature=0), expected)


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
def test_the_precision_is_that_of_the_weights_and_training_goes_on(dtype: torch.dtype) -> None:
    model = random_model().to(dtype).requires_grad_(True)
    idx = torch.randint(300, (1, 5))
    expected = draw(model, idx, 40)
    with torch.autocast("cpu", torch.float16):  # as during training
        assert torch.equal(draw(model, idx, 40), expected)
    model(idx, idx).backward()
    assert model.lm_head.weight.grad is not None


def test_a_prompt_is_computed_once_and_then_one_token_of_each_sample_without_cudnn() -> None:
    model = random_model()
    calls = []

    def observe(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        backends = torch.backends.cuda
        assert backends.flash_sdp_enabled()
        assert not backends.cudnn_sdp_enabled()
        calls.append(arguments[0].shape)

    model.transformer.wte.register_forward_hook(observe)
    seen: list[Tensor] = []
    options = SamplingOptions(max_new_tokens=4, num_samples=3)
    out = generate(model, torch.tensor([[3, 1, 4, 1]]), options, on_token=seen.append)
    assert calls == [(1, 4), (3, 1), (3, 1), (3, 1)]
    assert torch.equal(torch.stack(seen, dim=1), out[:, 4:])
    assert torch.backends.cuda.cudnn_sdp_enabled()  # training chooses as before


def test_streamed_text_is_whole_characters(capsys: pytest.CaptureFixture[str]) -> None:
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
