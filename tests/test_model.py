"""The model against Hugging Face's, and its promises about loss, numbers and files."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from model import GPT, GPTConfig, LinearCrossEntropy, blocked_attention
from optim import build_optimizer

SMALL = GPTConfig(d_model=32, n_heads=4, n_layers=3, context_length=24)


def tokens(B: int, T: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 50257, (B, T), generator=torch.Generator().manual_seed(seed))


def randomised(config: GPTConfig = SMALL) -> GPT:
    """A model whose biases and LayerNorms are not at their trivial initial values."""
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def assert_same_function(ours: GPT, theirs: GPT2LMHeadModel) -> None:
    idx, targets = tokens(2, ours.config.context_length), tokens(2, ours.config.context_length, 1)
    with torch.no_grad():
        logits = theirs.eval()(idx).logits
        torch.testing.assert_close(ours(idx), logits, atol=1e-4, rtol=0)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(ours(idx, targets), loss, atol=1e-4, rtol=0)


@pytest.mark.parametrize("vocab_size", [50257, 50304])
def test_transformers_opens_our_folder_and_computes_the_same(
    tmp_path: Path, vocab_size: int
) -> None:
    model = randomised(GPTConfig(32, 4, 3, 24, vocab_size))
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.lm_head.weight is theirs.transformer.wte.weight
    assert theirs.lm_head.weight.shape[0] == vocab_size
    assert_same_function(model, theirs)


@pytest.mark.parametrize("vocab_size", [50257, 50304])
@pytest.mark.parametrize("headless", [False, True])
def test_we_open_the_folders_that_transformers_writes(
    tmp_path: Path, vocab_size: int, headless: bool
) -> None:
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=24, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0
    )
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(config)
    # The hub's gpt2 is such a GPT2Model: its names lack the prefix "transformer.".
    (theirs.transformer if headless else theirs).save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert ours.config.vocab_size == vocab_size
    assert_same_function(ours, theirs)


def test_saving_and_loading_changes_no_bit(tmp_path: Path) -> None:
    model = randomised()
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert again.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_transformers_never_samples_a_padding_row(tmp_path: Path) -> None:
    GPT(GPTConfig(16, 2, 1, 24)).save_pretrained(tmp_path)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == list(range(50257, 50304))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"activation_function": "relu"}, "activation_function 'relu'"),
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"n_embd": None}, "no n_embd"),
        ({"n_layer": 4}, "h.3.ln_1.weight is missing"),
        ({"n_positions": 48}, "wpe.weight is of shape (24, 32)"),
    ],
)
def test_a_model_that_we_would_compute_wrong_is_refused(
    tmp_path: Path, change: dict[str, object], named: str
) -> None:
    GPT(SMALL).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match="not a GPT-2") as error:
        GPT.from_pretrained(tmp_path)
    assert named in str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("size", [0, 7, 100])
def test_damaged_files_are_named_in_one_line(tmp_path: Path, name: str, size: int) -> None:
    GPT(SMALL).save_pretrained(tmp_path)
    with open(tmp_path / name, "r+b") as file:
        file.truncate(size)
    with pytest.raises(ValueError, match="damaged checkpoint") as error:
        GPT.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n_layer": 10_000_000}, "n_layer 10000000 must be at most"),
        ({"n_layer": 16_000}, "h.3.ln_1.weight is missing, n_layer is 16000"),
        ({"n_layer": 0}, "n_layer 0 must be at least 1"),
        ({"n_layer": -3}, "n_layer -3 must be at least 1"),
        ({"n_layer": 3.0}, "n_layer 3.0"),
        ({"n_layer": True}, "n_layer True"),
        ({"n_layer": "3"}, "n_layer '3'"),
        ({"n_layer": [3]}, "n_layer [3]"),
        ({"n_embd": 10**400}, "n_embd is above"),
        ({"n_embd": 2**63}, "n_embd is above"),
        ({"n_embd": 2**17}, "wte.weight is of shape (50304, 32)"),
        ({"n_head": 5}, "n_embd 32 must be a multiple of n_head 5"),
        ({"vocab_size": 10**7}, "wte.weight is of shape (50304, 32)"),
        ({"n_positions": {}}, "n_positions {}"),
        ({"activation_function": ["x" * 1000] * 1000}, "activation_function ['xxx"),
    ],
)
def test_a_shape_that_is_absurd_is_refused_before_anything_is_built(
    tmp_path: Path, change: dict[str, object], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    GPT(SMALL).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    monkeypatch.setattr("model.Transformer", None)
    with pytest.raises(ValueError, match="not a GPT-2") as error:
        GPT.from_pretrained(tmp_path)
    assert named in str(error.value)
    assert len(str(error.value)) < 800


@pytest.mark.parametrize(
    "content", ["null", "[]", "3", "[" * 100_000, '{"n_embd": ', '{"a": 1e999}']
)
def test_a_config_that_is_no_config_is_one_line(tmp_path: Path, content: str) -> None:
    GPT(SMALL).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json") as error:
        GPT.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (torch.full((32,), math.nan), "ln_f.bias is not finite"),
        (torch.tensor([1e300] * 32, dtype=torch.float64), "ln_f.bias is not finite"),
        (torch.zeros(32, dtype=torch.int64), "ln_f.bias is of type I64"),
        (torch.zeros(32, dtype=torch.float8_e4m3fn), "ln_f.bias is of type F8_E4M3"),
        (torch.zeros(32, dtype=torch.bool), "ln_f.bias is of type BOOL"),
        (torch.zeros(0), "ln_f.bias is of shape (0,)"),
        (torch.zeros(()), "ln_f.bias is of shape ()"),
        (torch.zeros(1, 32), "ln_f.bias is of shape (1, 32)"),
        (None, "ln_f.bias is missing"),
    ],
)
def test_weights_that_no_model_has_are_refused(
    tmp_path: Path, value: torch.Tensor | None, named: str
) -> None:
    GPT(SMALL).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["transformer.ln_f.bias"]
    if value is not None:
        weights["transformer.ln_f.bias"] = value
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not a GPT-2") as error:
        GPT.from_pretrained(tmp_path)
    assert named in str(error.value)


def test_a_file_in_place_of_a_folder_is_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    GPT(SMALL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.safetensors is a file"):
        GPT.from_pretrained(tmp_path / "model.safetensors")


def write_in_two_files(folder: Path) -> GPT:
    """A model in two files and their index, as transformers writes one that is large."""
    model = GPT(SMALL)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[:9], names[9:]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return model


def test_only_the_files_that_the_index_names_are_read(tmp_path: Path) -> None:
    expected = write_in_two_files(tmp_path).state_dict()
    GPT(SMALL).save_pretrained(tmp_path / "other")
    other = (tmp_path / "other/model.safetensors").read_bytes()
    (tmp_path / "model_backup.safetensors").write_bytes(other)
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes(b"half a download")
    loaded = GPT.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    # The standard name goes before the index, as in transformers.
    (tmp_path / "model.safetensors").write_bytes(other)
    loaded = GPT.from_pretrained(tmp_path).state_dict()
    expected = GPT.from_pretrained(tmp_path / "other").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("[]", "index.json"),
        ("{", "index.json"),
        ("{}", "index.json: no weight_map"),
        ('{"weight_map": {}}', "index.json: no weight_map"),
        ('{"weight_map": [1]}', "index.json: no weight_map"),
        ('{"weight_map": {"a": 3}}', "index.json: weight_map: 3 is not"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "is not a file beside it"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "is not a file beside it"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, content: str, named: str) -> None:
    write_in_two_files(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="damaged checkpoint") as error:
        GPT.from_pretrained(tmp_path)
    assert named in str(error.value)


def test_a_weight_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    GPT(SMALL).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["ln_f.bias"] = torch.ones(32)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds ln_f\.bias twice"):
        GPT.from_pretrained(tmp_path)


def test_the_default_has_the_published_size_and_cost() -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert model.num_parameters() == 124_082_688
    assert model.flops_per_token() == pytest.approx(0.799e9, rel=1e-3)


def test_loss_at_initialisation_is_that_of_a_uniform_guess() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(d_model=128, n_heads=4, n_layers=4, context_length=64))
    assert abs(model(tokens(4, 64), tokens(4, 64, 1)).item() - math.log(50304)) < 0.1


def test_initial_weights_have_gpt2s_spread() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(d_model=128, n_heads=4, n_layers=8, context_length=64))
    block = model.transformer.h[3]
    assert block.attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert model.transformer.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not block.mlp.c_fc.bias.any()
    assert torch.equal(block.ln_1.weight, torch.ones(128))


def test_optimizer_groups_hold_every_parameter_once_and_decay_only_matrices() -> None:
    model = GPT(SMALL)
    decayed, plain = build_optimizer(model, weight_decay=0.1).param_groups
    grouped = [id(p) for p in decayed["params"] + plain["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert all(p.dim() >= 2 for p in decayed["params"])
    assert all(p.dim() < 2 for p in plain["params"])
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("rows", [5, 16, 64])
def test_the_chunked_loss_has_the_gradients_of_the_plain_one(rows: int, one_hot: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(37, 16, requires_grad=True)
    weight = torch.randn(500, 16, requires_grad=True)
    targets = torch.randint(0, 500, (37,))
    plain = F.cross_entropy(hidden @ weight.T, targets)
    ours = LinearCrossEntropy.apply(hidden, weight, targets, rows, torch.float32, one_hot)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)
    # A factor other than 1 reaches backward, as gradient accumulation sends it.
    expected = torch.autograd.grad(plain / 3, (hidden, weight))
    for got, want in zip(torch.autograd.grad(ours / 3, (hidden, weight)), expected, strict=True):
        assert ((got - want).norm() / want.norm()).item() < 1e-6


@pytest.mark.parametrize("one_hot", [False, True])
def test_in_bf16_the_chunked_loss_is_as_near_to_fp32_as_the_plain_one(one_hot: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(256, 64, requires_grad=True)
    weight = (0.02 * torch.randn(5000, 64)).requires_grad_()
    targets = torch.randint(0, 5000, (256,))
    exact = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, targets), (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        plain = F.cross_entropy(F.linear(hidden, weight), targets)
        ours = LinearCrossEntropy.apply(hidden, weight, targets, 100, torch.bfloat16, one_hot)
    for got, usual, want in zip(
        torch.autograd.grad(ours, (hidden, weight)),
        torch.autograd.grad(plain, (hidden, weight)),
        exact,
        strict=True,
    ):
        error, usual_error = (got - want).norm(), (usual - want).norm()
        assert error < 1.05 * usual_error
        assert (error / want.norm()).item() < 4e-3


def test_training_and_validation_give_the_same_loss() -> None:
    model, idx, targets = randomised(), tokens(3, 24), tokens(3, 24, 1)
    with torch.no_grad():
        validation = model(idx, targets)
    torch.testing.assert_close(model(idx, targets), validation, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [None, 8])  # the CPU's choice, and the form that a GPU compiles
def test_the_training_graph_compiles_without_a_break(rows: int | None) -> None:
    model = GPT(GPTConfig(d_model=16, n_heads=2, n_layers=1, context_length=16))
    model.loss_chunk_rows = rows
    idx, targets = tokens(2, 16), tokens(2, 16, 1)
    torch._dynamo.reset()
    # "aot_eager" traces both passes as Inductor's front end does, without a C++ compiler.
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        loss = compiled(idx, targets)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("rows", [None, 20])
def test_a_compiled_step_has_the_loss_and_gradients_of_the_uncompiled_one(rows: int | None) -> None:
    # They use different forms of the loss.
    model, idx, targets = randomised(), tokens(3, 24), tokens(3, 24, 1)
    model.loss_chunk_rows = rows
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    parameters = list(model.parameters())
    expected = model(idx, targets)
    loss = compiled(idx, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for got, want in zip(
        torch.autograd.grad(loss, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        assert ((got - want).norm() / want.norm()).item() < 1e-5


@pytest.mark.parametrize("rows", [1, 7, 24, 128])
def test_blocked_attention_is_causal_attention(rows: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 6, 24, 8).requires_grad_()
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    y = blocked_attention(q, k, v, rows)
    torch.testing.assert_close(y, expected)
    weights = torch.randn_like(y)
    got = torch.autograd.grad((y * weights).sum(), (q, k, v), retain_graph=True)
    want = torch.autograd.grad((expected * weights).sum(), (q, k, v), retain_graph=True)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("limit", "bf16", "is_blocked"), [(15, True, False), (16, True, True), (16, False, False)]
)
def test_a_cpus_compiled_bf16_step_blocks_attention_up_to_a_length(
    limit: int, bf16: bool, is_blocked: bool
) -> None:
    model = GPT(GPTConfig(d_model=16, n_heads=2, n_layers=1, context_length=16))
    model.transformer.h[0].attn.blocked_tokens = limit
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph.print_readable(print_output=False))
        return graph

    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        torch.compile(model, fullgraph=True, dynamic=False, backend=keep)(tokens(2, 16))
    assert ("softmax" in graphs[0]) == is_blocked
    assert ("scaled_dot_product_attention" in graphs[0]) != is_blocked


def test_the_compiled_bf16_step_has_the_gradients_of_the_uncompiled_one() -> None:
    """On a CPU they have different attention."""
    model, idx, targets = randomised(), tokens(3, 24), tokens(3, 24, 1)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    parameters = list(model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(idx, targets)
        loss = compiled(idx, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    for got, want in zip(
        torch.autograd.grad(loss, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        assert ((got - want).norm() / want.norm()).item() < 2e-2


def test_the_uncompiled_loss_is_exact_where_the_target_is_all_but_impossible() -> None:
    # Its probability, e**-200, is 0 in fp32.
    hidden = torch.tensor([[200.0, 0.0]], requires_grad=True)
    weight = torch.eye(2, requires_grad=True)
    loss = LinearCrossEntropy.apply(hidden, weight, torch.tensor([1]), 1, torch.float32, False)
    assert loss.item() == 200
    assert torch.autograd.grad(loss, hidden)[0].tolist() == [[1, -1]]


def test_too_long_an_input_is_refused_with_the_context_named() -> None:
    with pytest.raises(ValueError, match=r"25 tokens .* context of 24"):
        GPT(SMALL)(tokens(1, 25))


@pytest.mark.parametrize(
    "shape", [{"d_model": 30, "n_heads": 4}, {"n_layers": 0}, {"d_model": 2**60}]
)
def test_an_impossible_shape_is_refused(shape: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"model\."):
        GPT(GPTConfig(**shape))
