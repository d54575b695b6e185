"""The model against Hugging Face's, its loss and attention against torch's, its optimizers."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from gptxs.kernels import LinearCrossEntropy, blocked_attention, linear_cross_entropy
from gptxs.optim import MuonWithAdamW, Schedule, build_optimizer, learning_rate, orthogonalize
from model import GPT, GPTConfig
from train import TrainConfig

SMALL = GPTConfig(d_model=32, n_heads=4, n_layers=2, context_length=24)
TINY = GPTConfig(d_model=16, n_heads=2, n_layers=2, context_length=16, vocab_size=300)


def tokens(B: int, T: int, seed: int = 0, vocab_size: int = 50257) -> Tensor:
    return torch.randint(0, vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def randomise(model: torch.nn.Module) -> None:
    """Move biases and LayerNorms away from their trivial initial values."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def random_model(config: GPTConfig = SMALL) -> GPT:
    torch.manual_seed(0)
    model = GPT(config)
    randomise(model)
    return model


def difference(got: Tensor, want: Tensor) -> float:
    """The norm of the error as a share of the norm."""
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("headless", [False, True])
@pytest.mark.parametrize("vocab_size", [300, 50257, 50304])
def test_we_compute_what_transformers_does(tmp_path: Path, vocab_size: int, headless: bool) -> None:
    torch.manual_seed(0)
    shape = {"n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": vocab_size}
    # The defaults in other words.
    config = GPT2Config(**shape, n_inner=128, activation_function="gelu_pytorch_tanh")
    theirs = GPT2LMHeadModel(config).eval()
    randomise(theirs)
    # The hub's gpt2 is such a GPT2Model: its names lack the prefix "transformer.", as ours must.
    (theirs.transformer if headless else theirs).save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(tmp_path / "theirs")
    assert ours.config == replace(SMALL, vocab_size=vocab_size)
    idx, targets = tokens(2, 24, 0, vocab_size), tokens(2, 24, 1, vocab_size)
    with torch.no_grad():
        logits = theirs(idx).logits
        torch.testing.assert_close(ours(idx), logits, atol=1e-4, rtol=0)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        torch.testing.assert_close(ours(idx, targets), loss, atol=1e-4, rtol=0)
    # Read and written by us, no bit has changed, and the head is tied to the embedding.
    folder = tmp_path / "ours"
    ours.save_pretrained(folder)
    names = {name for name, _ in theirs.transformer.named_parameters()}
    assert set(load_file(folder / "model.safetensors")) == names
    again = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(again.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert ours.lm_head.weight is ours.transformer.wte.weight
    # A smaller vocabulary has neither GPT-2's tokenizer nor its end token.
    is_gpt2s = vocab_size >= 50257
    assert (folder / "vocab.json").exists() == is_gpt2s
    assert again.config.eos_token_id == (50256 if is_gpt2s else None)


def test_the_default_has_the_published_size_and_cost() -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert model.num_parameters() == 124_082_688
    assert model.flops_per_token() == pytest.approx(0.799e9, rel=1e-3)


def test_initial_weights_have_gpt2s_spread_and_guess_uniformly() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(d_model=128, n_heads=4, n_layers=8, context_length=64))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones(128))
        else:
            std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02  # 4: sqrt(2 * 8 layers)
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.05 * std
    assert abs(model(tokens(4, 64), tokens(4, 64, 1)).item() - math.log(50304)) < 0.1


def test_an_impossible_shape_is_named_with_all_its_problems() -> None:
    assert GPTConfig().validate() == []
    problems = GPTConfig(d_model=0, n_layers=-1).validate()
    assert [problem.split()[0] for problem in problems] == ["model.d_model", "model.n_layers"]
    assert "multiple of model.n_heads 4" in GPTConfig(d_model=30, n_heads=4).validate()[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [[1] * 24, [23, 1], [5, 1, 1, 9, 8], [24]])
@torch.no_grad()
def test_with_a_cache_the_states_are_the_same(parts: list[int], dtype: torch.dtype) -> None:
    model, idx = random_model().to(dtype), tokens(3, 24)
    expected = model.hidden_states(idx)
    cache = model.make_cache(batch=3, length=24)
    for _ in range(2):  # an emptied cache is as a new one
        pieces = [model.hidden_states(part, cache=cache) for part in idx.split(parts, dim=1)]
        tolerance = 1e-5 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=tolerance, rtol=0)
        with pytest.raises(ValueError, match=r"25 tokens .* context of 24"):
            model.hidden_states(idx[:, :1], cache=cache)
        for layer in cache:
            assert layer.tokens == 24
            layer.tokens = 0
    with pytest.raises(ValueError, match=r"5 tokens .* context of 4"):
        model.hidden_states(idx[:, :5], cache=model.make_cache(batch=3, length=4))


def gradients(model: torch.nn.Module, idx: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The loss, and its gradients as the optimizer will get them."""
    loss = model(idx, targets)
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize(("chunk_rows", "bf16"), [(None, False), (20, False), (None, True)])
def test_the_compiled_step_has_the_same_gradients(chunk_rows: int | None, bf16: bool) -> None:
    """On a CPU it has other forms of the loss, and of attention in bf16."""
    model = random_model(replace(SMALL, n_layers=1, vocab_size=3000))
    idx, targets = tokens(3, 24, 0, 3000), tokens(3, 24, 1, 3000)
    model.loss_chunk_rows = chunk_rows
    torch._dynamo.reset()
    # "aot_eager" traces both passes as Inductor's front end does, without a C++ compiler.
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        with torch.no_grad():
            validation = model(idx, targets)
        expected, wanted = gradients(model, idx, targets)
        loss, got = gradients(compiled, idx, targets)
    tolerance = 1e-3 if bf16 else 1e-6
    torch.testing.assert_close(validation, expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    errors = [difference(ours, want) for ours, want in zip(got, wanted, strict=True)]
    assert max(errors) < (2e-2 if bf16 else 1e-5)


@pytest.mark.parametrize("rows", [1, 7, 24, 128])
def test_blocked_attention_is_causal_attention(rows: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 6, 24, 8).requires_grad_()
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    y = blocked_attention(q, k, v, rows)
    torch.testing.assert_close(y, expected)
    weights = torch.randn_like(y)
    got = torch.autograd.grad(y, (q, k, v), weights)
    want = torch.autograd.grad(expected, (q, k, v), weights)
    torch.testing.assert_close(got, want)


def loss_inputs(N: int, C: int, V: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, C), torch.randn(V, C) / math.sqrt(C)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, V, (N,))


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("rows", [5, 37, 64])
def test_the_chunked_loss_has_the_gradients_of_the_plain_one(rows: int, one_hot: bool) -> None:
    hidden, weight, targets = loss_inputs(37, 16, 500)
    plain = F.cross_entropy(hidden @ weight.T, targets)
    ours = LinearCrossEntropy.apply(hidden, weight, targets, rows, torch.float32, one_hot)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)
    # A factor other than 1 reaches backward, as gradient accumulation sends it.
    expected = torch.autograd.grad(plain / 3, (hidden, weight))
    for got, want in zip(torch.autograd.grad(ours / 3, (hidden, weight)), expected, strict=True):
        assert difference(got, want) < 1e-6
    for chunk_rows in (0, rows, None):
        value = linear_cross_entropy(hidden, weight, targets, chunk_rows)
        torch.testing.assert_close(value, plain, rtol=1e-6, atol=0)
        with torch.no_grad():
            value = linear_cross_entropy(hidden, weight, targets, chunk_rows)
        torch.testing.assert_close(value, plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_is_as_near_to_fp32(dtype: torch.dtype, one_hot: bool) -> None:
    hidden, weight, targets = loss_inputs(256, 64, 5000)
    inputs = (hidden, weight)
    exact = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, targets), inputs)
    with torch.autocast("cpu", dtype):
        plain = F.cross_entropy(F.linear(hidden, weight).float(), targets)
        ours = LinearCrossEntropy.apply(hidden, weight, targets, 100, dtype, one_hot)
    usual = torch.autograd.grad(plain, inputs)
    for got, theirs, want in zip(torch.autograd.grad(ours, inputs), usual, exact, strict=True):
        assert difference(got, want) < 1.05 * difference(theirs, want)
        assert difference(got, want) < 4e-3


@pytest.mark.parametrize("one_hot", [False, True])
def test_the_gradient_of_the_loss_in_fp16_holds_sums_that_fp16_does_not(one_hot: bool) -> None:
    """The gradient of a weight is a sum over all rows, before any scale of the loss is applied."""
    torch.manual_seed(0)
    rows = 4096
    hidden = (40 + torch.randn(rows, 16)).requires_grad_()
    weight = (torch.randn(32, 16) / 100).requires_grad_()
    targets = torch.zeros(rows, dtype=torch.long)
    exact = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, targets), (hidden, weight))
    assert rows * exact[1].abs().max() > 65504
    loss = LinearCrossEntropy.apply(hidden, weight, targets, rows, torch.float16, one_hot)
    for got, want in zip(torch.autograd.grad(loss, (hidden, weight)), exact, strict=True):
        assert difference(got, want) < 0.02


def test_the_loss_is_exact_where_the_target_is_all_but_impossible() -> None:
    # Its probability, e**-200, is 0 in fp32.
    hidden = torch.tensor([[200.0, 0.0]], requires_grad=True)
    weight = torch.eye(2, requires_grad=True)
    loss = LinearCrossEntropy.apply(hidden, weight, torch.tensor([1]), 1, torch.float32, False)
    assert loss.item() == 200
    assert torch.autograd.grad(loss, hidden)[0].tolist() == [[1, -1]]


@pytest.mark.parametrize(
    ("schedule", "cooldown", "expected"),
    [
        ("cosine", 0.4, {4: 0.5, 10: 1.0, 60: 0.55 + 0.45 * math.cos(math.pi * 5 / 9), 100: 0.1}),
        ("linear", 0.4, {4: 0.5, 9: 1.0, 10: 1.0, 55: 0.55, 100: 0.1}),
        ("wsd", 0.4, {9: 1.0, 10: 1.0, 60: 1.0, 80: 0.55, 100: 0.1}),
        ("wsd", 0.0, {10: 1.0, 100: 1.0}),
        ("wsd", 1.0, {10: 1.0, 55: 0.55, 100: 0.1}),  # never before the end of the warm-up
    ],
)
def test_the_schedules_reach_their_published_values(
    schedule: Schedule, cooldown: float, expected: dict[int, float]
) -> None:
    config = TrainConfig(
        max_steps=101, warmup_steps=10, max_lr=1.0, min_lr=0.1, schedule=schedule, cooldown=cooldown
    )
    assert {step: learning_rate(step, config) for step in expected} == pytest.approx(expected)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_has_one_group_and_only_matrices_decay(name: Any) -> None:
    model = GPT(TINY)
    groups = build_optimizer(model, 0.1, name).param_groups
    decays = [(id(p), group["weight_decay"]) for group in groups for p in group["params"]]
    assert sorted(decays) == sorted((id(p), 0.1 * (p.dim() >= 2)) for p in model.parameters())
    if name == "muon":
        ends = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        names = [f"transformer.h.{i}.{end}.weight" for i in range(2) for end in ends]
        expected = [id(model.get_parameter(name)) for name in names]
        assert list(map(id, groups[0]["params"])) == expected


@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
def test_the_updates_are_those_of_torchs_muon(shape: tuple[int, int]) -> None:
    """Which computes them in bf16, one weight after the other."""
    torch.manual_seed(0)
    starts = torch.randn(2, *shape)
    ours, theirs = ([torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], fused=True)
    optimizers = [
        MuonWithAdamW(ours, adamw, weight_decay=0.1, lr_scale=1.0),
        torch.optim.Muon(theirs, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(5):
        for i, size in enumerate((1, 100)):  # that of a gradient does not matter
            ours[i].grad = size * torch.randn(shape)
            theirs[i].grad = ours[i].grad.clone()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.02
            optimizer.step()
    for i in range(2):
        assert (ours[i] - theirs[i]).norm() < 0.02 * (ours[i] - starts[i]).norm()


def test_query_key_and_value_are_made_orthogonal_apart() -> None:
    model = GPT(TINY)
    optimizer = build_optimizer(model, 0.0, "muon")
    optimizer.param_groups[0]["lr"] = 0.02
    weight = model.transformer.h[0].attn.c_attn.weight
    before = weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape)
    thirds = weight.grad.view(3, 16, 16) * 0.0975  # what Nesterov's momentum makes of the first
    optimizer.step()
    update = (before - weight.detach()).view(3, 16, 16)
    expected = 0.02 * 0.2 * math.sqrt(16) * orthogonalize(thirds)
    torch.testing.assert_close(update, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_skipped_update_changes_neither_weights_nor_state(name: Any) -> None:
    model = GPT(TINY)
    optimizer: Any = build_optimizer(model, 0.1, name)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    idx = tokens(1, 16, 0, 300)
    model(idx, idx).backward()
    optimizer.step()
    weights = copy.deepcopy(model.weights())
    state = copy.deepcopy(optimizer.state_dict()["state"])
    model.transformer.h[1].mlp.c_fc.weight.grad[0, 0] = math.inf
    model.transformer.ln_f.weight.grad[0] = math.nan
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    torch.testing.assert_close(model.weights(), weights, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
