"""Sampling: the cache, the draw, the stop, and the text that eval.py prints."""

from common import END_OF_TEXT, VOCAB_SIZE

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import eval
from dataset import get_tokenizer
from eval import (
    Sampler,
    SamplingOptions,
    decode,
    prepare_for_decoding,
    sample_next_token,
    stream_text,
)
from model import GPT, GPTConfig


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """In models this small, two threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def generate(
    model: GPT, idx: Tensor, n: int, dtype: torch.dtype | None = None, **how: Any
) -> Tensor:
    """Prompts with up to ``n`` more tokens, by default drawn from all of the vocabulary."""
    options = SamplingOptions(**({"max_new_tokens": n, "top_k": None} | how))
    return Sampler(model, dtype).generate(idx, options)


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


@pytest.mark.parametrize("rows", [1, 3], ids=["plain", "packed"])
@pytest.mark.parametrize("prompt", [1, 2, 7, 31])
def test_cached_logits_equal_those_of_the_full_pass_at_every_position(
    prompt: int, rows: int
) -> None:
    model = random_model()
    idx = torch.randint(300, (rows, 32))
    full = model(idx)
    prepared, _ = prepare_for_decoding(model, rows, torch.float32)
    cache = torch.zeros(2, 2, rows, 4, 32, 8)  # layers, key and value, B, H, positions, D
    for start, end in [(0, prompt), *((t, t + 1) for t in range(prompt, 32))]:
        for up_to in (end, None):  # attention to the tokens so far, or to a masked whole cache
            logits = decode(prepared, cache, idx[:, start:end], torch.arange(start, end), up_to)
            torch.testing.assert_close(logits, full[:, end - 1], atol=2e-4, rtol=1e-4)


def test_another_precision_is_that_of_a_converted_model() -> None:
    model = random_model()
    idx = torch.randint(300, (2, 5))
    converted = random_model().to(torch.bfloat16)
    expected = generate(converted, idx, 60, seed=4)
    assert torch.equal(generate(model, idx, 60, seed=4, dtype=torch.bfloat16), expected)


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("prompt", [1, 16, 31, 32, 50])
def test_past_the_context_the_newest_half_is_the_new_prompt(prompt: int, num_samples: int) -> None:
    model = random_model()
    idx = torch.randint(300, (2, prompt))
    out = generate(model, idx, 90, num_samples=num_samples, temperature=0)
    # Greedy samples of a prompt are equal, and stand next to each other.
    assert torch.equal(out, without_cache(model, idx, 90).repeat_interleave(num_samples, 0))


def test_greedy_equals_hugging_face_over_200_tokens(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = random_model(context_length=256, vocab_size=VOCAB_SIZE)
    model.save_pretrained(tmp_path)
    reference: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    idx = torch.randint(VOCAB_SIZE, (1, 9))
    expected = reference.generate(idx, do_sample=False, max_new_tokens=200, min_new_tokens=200)
    assert torch.equal(generate(model, idx, 200, temperature=0), expected)


SETTINGS = [
    {},
    {"temperature": 0.6},
    {"top_k": 5},
    {"top_p": 0.8},
    {"temperature": 1.7, "top_k": 12, "top_p": 0.9},
]


@pytest.mark.parametrize("how", SETTINGS, ids=str)
def test_20000_samples_agree_with_the_exact_distribution(how: dict[str, Any]) -> None:
    model = random_model(vocab_size=40)
    idx = torch.tensor([[3, 1, 4]])
    p = (model(idx)[0, -1].double() / how.get("temperature", 1.0)).softmax(-1)
    order = p.argsort(descending=True)
    kept = order[: how.get("top_k", 40)]
    mass = (p[kept] / p[kept].sum()).cumsum(0)
    kept = kept[: 1 + int((mass < how.get("top_p", 2.0)).sum())]
    exact = torch.zeros(40, dtype=torch.float64)
    exact[kept] = p[kept] / p[kept].sum()

    n = 20_000
    drawn = generate(model, idx, 1, num_samples=n, seed=1, **how)[:, -1]
    counts = torch.bincount(drawn, minlength=40)
    assert counts[exact == 0].sum() == 0
    common = exact * n >= 5  # chi-square holds for cells of at least 5; the rest is one cell
    cells = [(counts[common], exact[common] * n)]
    if (rest := exact[~common].sum() * n) >= 5:
        cells.append((counts[~common].sum()[None], rest[None]))
    observed, expected = (torch.cat(column) for column in zip(*cells, strict=True))
    statistic = ((observed - expected) ** 2 / expected).sum()
    # The chance of a statistic as large as this, if the samples have the exact distribution.
    degrees = torch.tensor(len(observed) - 1, dtype=torch.float64)
    assert torch.special.gammaincc(degrees / 2, statistic / 2) > 3e-5


def test_a_sequence_of_draws_of_one_generator_is_independent() -> None:
    logits = torch.zeros(1, 2)
    generator = torch.Generator().manual_seed(3)
    options = SamplingOptions()
    draws = torch.cat([sample_next_token(logits, [generator], options) for _ in range(4000)])
    pairs = torch.bincount(draws[:-1] * 2 + draws[1:], minlength=4) / 3999
    assert (pairs - 0.25).abs().max() < 0.03  # 4 standard deviations


@pytest.mark.parametrize("how", [{}, {"top_k": 50}, {"top_p": 0.9, "temperature": 0.8}], ids=str)
def test_a_seed_gives_the_same_text_alone_and_among_others(how: dict[str, Any]) -> None:
    model = random_model(vocab_size=5000)
    idx = torch.randint(5000, (1, 5))
    batch = generate(model, idx, 60, num_samples=4, seed=11, **how)
    for i in range(4):
        assert torch.equal(batch[i : i + 1], generate(model, idx, 60, seed=11 + i, **how))
    assert len({tuple(row) for row in batch.tolist()}) == 4


def test_a_row_ends_at_end_of_text_and_the_others_continue() -> None:
    model = constant_model({END_OF_TEXT: 2.0, 7: 4.0})
    idx = torch.tensor([[5, 6]])
    out = generate(model, idx, 100, num_samples=4, seed=2)
    assert out[:, :2].eq(idx).all()
    lengths = []
    for row in out[:, 2:].tolist():
        lengths.append(row.index(END_OF_TEXT))
        assert set(row[: lengths[-1]]) <= {7}
        assert set(row[lengths[-1] :]) == {END_OF_TEXT}
    assert len(set(lengths)) > 1
    assert out.size(1) == 2 + max(lengths) + 1


def test_rows_that_only_pad_the_vocabulary_are_never_sampled() -> None:
    model = constant_model({50257: 50.0, 50303: 60.0, 9: 1.0})
    for how in ({"temperature": 0}, {}, {"top_k": 3}, {"top_p": 0.99}):
        assert generate(model, torch.tensor([[1]]), 20, num_samples=2, **how).max() < VOCAB_SIZE


def test_sampling_works_under_autocast_and_leaves_training_alone() -> None:
    model = random_model(vocab_size=50304).requires_grad_(True)
    idx = torch.randint(VOCAB_SIZE, (1, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert generate(model, idx, 40, top_k=50).shape == (1, 45)
    model(idx, idx).backward()
    assert model.lm_head.weight.grad is not None


def test_a_sampler_keeps_its_graph_and_takes_new_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    captures = []

    def capture(step: Callable[..., Tensor], *inputs: Tensor) -> Callable[..., Tensor]:
        captures.append([x.shape for x in inputs])
        return step  # stands in for a graph: it knows only the tensors that it was captured with

    monkeypatch.setattr(eval, "capture_cuda_graph", capture)
    model = random_model()
    idx = torch.randint(300, (2, 5))
    # fp64: these are copies of the weights, and rounding cannot turn a draw.
    options = SamplingOptions(max_new_tokens=60, num_samples=3, top_k=None)  # past the context
    sampler = Sampler(model, torch.float64)
    sampler.use_graph = True
    texts = []
    for _ in range(3):
        texts.append(sampler.generate(idx, options))
        assert torch.equal(texts[-1], Sampler(model, torch.float64).generate(idx, options))
        for parameter in model.parameters():  # in place, as a training step does
            parameter.add_(torch.randn_like(parameter))
        sampler.update()
    assert not torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[1], texts[2])
    assert len(captures) == 1


def test_cached_attention_leaves_cudnn_out(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = []
    attention = F.scaled_dot_product_attention

    def observed(*args: Any, **kwargs: Any) -> Tensor:
        backends = torch.backends.cuda
        allowed.append((backends.cudnn_sdp_enabled(), backends.flash_sdp_enabled()))
        return attention(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", observed)
    generate(random_model(), torch.tensor([[3, 1]]), 3)
    assert set(allowed) == {(False, True)}
    assert torch.backends.cuda.cudnn_sdp_enabled()  # training chooses as before


@pytest.mark.parametrize("rows", [1, 3, 40], ids=["one", "a few", "a prompt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_logits_are_those_of_the_rounded_weights(dtype: torch.dtype, rows: int) -> None:
    model = random_model()
    idx = torch.randint(300, (rows, 1))
    prepared, _ = prepare_for_decoding(model, rows, dtype, int8=True)
    cache = torch.zeros(2, 2, rows, 4, 1, 8, dtype=dtype)
    logits = decode(prepared, cache, idx, torch.tensor([0]))
    rounded = random_model()
    rounded.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # not the embedding
    for layer in rounded.modules():
        if isinstance(layer, torch.nn.Linear):
            scale = (layer.weight.abs().amax(1, keepdim=True) / 127).bfloat16().float()
            layer.weight = torch.nn.Parameter((layer.weight / scale).round() * scale)
    difference = (logits - rounded(idx)[:, -1]).norm() / logits.norm()
    assert difference < 0.02  # of activations in bf16
    unrounded = (rounded(idx) - model(idx)).norm() / logits.norm()
    assert 1e-4 < unrounded < 0.03
    assert not torch.equal(logits, model(idx)[:, -1])


def trained_model() -> GPT:
    """Counts: the token after t is t + 1, of 64."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(32, 2, 2, 32, 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        sequence = (torch.randint(64, (16, 1)) + torch.arange(33)) % 64
        model(sequence[:, :-1], sequence[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False)


@pytest.mark.parametrize("num_samples", [1, 4])
def test_int8_writes_the_greedy_text_of_a_trained_model(num_samples: int) -> None:
    model = trained_model()
    idx = torch.tensor([[5, 6, 7]])
    options = SamplingOptions(max_new_tokens=80, num_samples=num_samples, temperature=0)
    out = Sampler(model, int8=True).generate(idx, options)
    assert torch.equal(out, (torch.arange(5, 88) % 64).expand(num_samples, -1))


def test_int8_needs_rows_that_its_kernel_can_read() -> None:
    model = GPT(GPTConfig(24, 2, 1, 16, 64))
    with pytest.raises(ValueError, match="24"):
        Sampler(model, int8=True).generate(torch.tensor([[1]]), SamplingOptions())


def test_int8_is_refused_by_other_devices_than_a_cpu() -> None:
    with pytest.raises(ValueError, match="meta"):  # stands in for a GPU
        prepare_for_decoding(GPT(GPTConfig(32, 2, 1, 16, 64)).to("meta"), 1, torch.float32, True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_a_captured_step_equals_the_eager_one_on_cuda() -> None:
    model = random_model().cuda()
    idx = torch.randint(300, (2, 5), device="cuda")
    assert torch.equal(generate(model, idx, 90, temperature=0), without_cache(model, idx, 90))


AWKWARD = "naïve 😀 mañana 한국어 \N{MATHEMATICAL BOLD CAPITAL A} e\u0301 end"


def test_streamed_text_is_whole_characters_and_equals_the_decoded_text() -> None:
    tokens = get_tokenizer().encode_ordinary(AWKWARD)
    assert len(tokens) > len(AWKWARD.split())
    pieces = list(stream_text(iter([*tokens, END_OF_TEXT, 5])))
    assert "".join(pieces) == AWKWARD
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "" in pieces  # part of a character waited


def test_a_character_cut_off_by_the_end_is_marked() -> None:
    tokens = get_tokenizer().encode_ordinary("a😀")[:-1]
    assert "".join(stream_text(tokens)) == "a\N{REPLACEMENT CHARACTER}"
