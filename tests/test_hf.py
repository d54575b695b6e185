"""Hugging Face's folder, held to transformers; what is not GPT-2 is refused; the hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from gptxs import hf, hub
from gptxs.files import sha256
from gptxs.tokenizer import get_tokenizer, vocabulary_files

ROOT = Path(__file__).resolve().parent.parent


def theirs(vocab_size: int = 50257, **options: Any) -> GPT2LMHeadModel:
    """A model of transformers with random biases and LayerNorms too."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=24, n_embd=16, n_layer=2, n_head=2, **options
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def write_ours(folder: Path, vocab_size: int = 50304) -> Path:
    """A folder that we write."""
    theirs(vocab_size).save_pretrained(folder / "source")
    weights = hf.read_weights(folder / "source")
    hf.write_model(folder / "ours", weights, hf.read_shape(folder / "source"))
    return folder / "ours"


def edit_json(path: Path, values: dict[str, Any]) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


def logits(model: GPT2LMHeadModel) -> torch.Tensor:
    """Logits (2, 24, V) of tokens that every vocabulary of these tests has."""
    idx = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(idx).logits


# ---- weights and shape ---------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [300, 50257, 50304])
@pytest.mark.parametrize("headless", [False, True])
def test_read_and_written_a_model_of_transformers_computes_the_same_there(
    tmp_path: Path, vocab_size: int, headless: bool
) -> None:
    model = theirs(vocab_size)
    # The hub's gpt2 is such a GPT2Model: its names lack the prefix "transformer.".
    (model.transformer if headless else model).save_pretrained(tmp_path / "theirs")
    shape = hf.read_shape(tmp_path / "theirs")
    assert " ".join(shape) == "d_model n_heads n_layers context_length vocab_size"
    assert list(shape.values()) == [16, 2, 2, 24, vocab_size]
    hf.write_model(tmp_path / "ours", hf.read_weights(tmp_path / "theirs"), shape)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.lm_head.weight is again.transformer.wte.weight
    assert torch.equal(logits(again), logits(model))


def test_the_file_has_openais_names_and_we_have_transformers_and_nn_linears(tmp_path: Path) -> None:
    folder = write_ours(tmp_path)
    model = theirs(50304)
    file = load_file(folder / "model.safetensors")
    assert set(file) == {name for name, _ in model.transformer.named_parameters()}
    weights = hf.read_weights(folder)
    assert set(weights) == {name for name, _ in model.named_parameters()}
    name = "transformer.h.1.mlp.c_fc.weight"
    assert torch.equal(weights[name], model.state_dict()[name].T)
    assert weights[name].shape == (64, 16)
    name = "transformer.h.1.attn.c_proj.weight"  # square: its shape would not tell
    assert torch.equal(weights[name], model.state_dict()[name].T)
    assert all(value.is_contiguous() for value in weights.values())


def test_writing_and_reading_changes_no_bit_and_16_bit_weights_are_read_as_fp32(
    tmp_path: Path,
) -> None:
    folder = write_ours(tmp_path)
    weights, shape = hf.read_weights(folder), hf.read_shape(folder)
    hf.write_model(tmp_path / "fp32", weights, shape)
    hf.write_model(tmp_path / "bf16", weights, shape, torch.bfloat16)
    again = hf.read_weights(tmp_path / "fp32")
    rounded = hf.read_weights(tmp_path / "bf16")
    for name, value in weights.items():
        assert torch.equal(again[name], value), name
        assert torch.equal(rounded[name], value.bfloat16().float()), name
    assert hf.read_shape(tmp_path / "bf16") == shape
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "bf16").dtype == torch.bfloat16


def test_a_model_in_several_files_is_read_as_the_index_says(tmp_path: Path) -> None:
    model = theirs()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    files = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(files) > 1
    (tmp_path / "many/model-00099-of-00099.safetensors").write_bytes(b"half a download")
    expected = hf.read_weights(tmp_path / "one")
    found = hf.read_weights(tmp_path / "many")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_sha_256_is_what_sha256sum_prints(tmp_path: Path) -> None:
    theirs(300).save_pretrained(tmp_path / "one")
    theirs(300).save_pretrained(tmp_path / "many", max_shard_size="10KB")
    printed = sha256(tmp_path / "one/model.safetensors")
    assert hf.weights_sha256(tmp_path / "one") == printed
    files = sorted((tmp_path / "many").glob("model-*.safetensors"))
    lines = "".join(f"{sha256(path)}  {path.name}\n" for path in files)
    assert hf.weights_sha256(tmp_path / "many") == hashlib.sha256(lines.encode()).hexdigest()


def test_the_weights_obey_the_umask_and_outlive_their_file(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        folder = write_ours(tmp_path)
    finally:
        os.umask(old)
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o640
    weights = hf.read_weights(folder)
    expected = {name: value.clone() for name, value in weights.items()}
    with (folder / "model.safetensors").open("r+b") as file:  # as a copy onto it would
        file.write(b"\0" * (folder / "model.safetensors").stat().st_size)
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_other_words_for_gpt2_are_understood(tmp_path: Path) -> None:
    folder = write_ours(tmp_path, 300)
    shape = hf.read_shape(folder)
    values = {"activation_function": "gelu_pytorch_tanh", "n_inner": 64}
    edit_json(folder / "config.json", values)
    assert hf.read_shape(folder) == shape


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "llama"},
        {"activation_function": "relu"},
        {"activation_function": "gelu"},
        {"n_inner": 128},
        {"layer_norm_epsilon": 1e-6},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"add_cross_attention": True},
        {"tie_word_embeddings": False},
        {"n_embd": None},
        {"n_layer": "2"},
        {"n_head": True},
        {"vocab_size": [300]},
    ],
)
def test_what_we_would_compute_wrong_is_refused_by_its_key(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = write_ours(tmp_path, 300)
    edit_json(folder / "config.json", change)
    ((key, value),) = change.items()
    with pytest.raises(ValueError, match=re.escape(f"{key} {value!r}")):
        hf.read_shape(folder)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_the_masks_in_openais_files_are_no_weights(tmp_path: Path, prefix: str) -> None:
    folder = write_ours(tmp_path, 300)
    expected = hf.read_weights(folder)
    file = load_file(folder / "model.safetensors")
    weights = {f"{prefix}{name}": value for name, value in file.items()}
    weights[f"{prefix}h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
    weights[f"{prefix}h.0.attn.masked_bias"] = torch.tensor(-1e4)
    weights["lm_head.weight"] = file["wte.weight"].clone()
    save_file(weights, folder / "model.safetensors")
    found = hf.read_weights(folder)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("name", "value"),
    [("h.1.mlp.c_fc.weight", torch.nan), ("ln_f.bias", -torch.inf), ("lm_head.weight", 0.5)],
)
def test_weights_that_are_not_finite_and_a_head_of_its_own_are_refused(
    tmp_path: Path, name: str, value: float
) -> None:
    folder = write_ours(tmp_path, 300)
    weights = load_file(folder / "model.safetensors")
    weights.setdefault(name, weights["wte.weight"].clone()).view(-1)[5] = value
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape(name)):
        hf.read_weights(folder)


def test_the_command_that_converts_a_pytorch_model_bin_does(tmp_path: Path) -> None:
    model = theirs()
    model.save_pretrained(tmp_path)
    expected = hf.read_weights(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError) as error:
        hf.read_weights(tmp_path)
    command = re.search(r"python -c '(.*)'", str(error.value))
    assert command
    exec(command[1])
    found = hf.read_weights(tmp_path)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_what_is_no_model_folder_is_named(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        hf.read_shape(tmp_path)
    with pytest.raises(ValueError, match=r"ckpt\.pt is a file"):
        hub.local_folder(tmp_path / "ckpt.pt")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        hub.local_folder(tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"n_embd": ')
    with pytest.raises(ValueError, match=r"config\.json: damaged"):
        hf.read_shape(tmp_path)


# ---- tokenizers ----------------------------------------------------------------------------------


def test_the_written_tokenizer_is_gpt2s_with_the_models_context(tmp_path: Path) -> None:
    folder = write_ours(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Hello, wörld! 👍\n\n  <x>"
    assert tokenizer.encode(text) == get_tokenizer().encode_ordinary(text)
    assert (tokenizer.eos_token_id, tokenizer.model_max_length) == (50256, 24)
    config = json.loads((folder / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (50256, 50256)


def test_a_vocabulary_below_gpt2s_has_neither_its_tokenizer_nor_its_end_token(
    tmp_path: Path,
) -> None:
    folder = write_ours(tmp_path, 300)
    names = ["config.json", "generation_config.json", "model.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.eos_token_id is None
    new = model.generate(torch.tensor([[1, 2]]), max_new_tokens=4, do_sample=False)
    assert new.shape == (1, 6)


def test_transformers_never_samples_a_padding_row(tmp_path: Path) -> None:
    folder = write_ours(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["ln_f.bias"] = 100 * weights["wte.weight"][50300]  # then that row has the top logit
    weights["wte.weight"][:50257] *= 0.1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = torch.tensor([[1, 2]])
    assert model(prompt).logits[0, -1].argmax() >= 50257
    assert model.generate(prompt, max_new_tokens=8, do_sample=False).max() < 50257


def test_gpt2s_tokens_are_recognised_whoever_wrote_them(tmp_path: Path) -> None:
    folder = write_ours(tmp_path)
    hf.require_gpt2_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path / "source")
    assert (tmp_path / "source/tokenizer.json").exists()
    hf.require_gpt2_tokenizer(tmp_path / "source")
    tokenizer.add_tokens(["<|user|>"])
    tokenizer.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        hf.require_gpt2_tokenizer(tmp_path / "source")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (folder / name).unlink()
    hf.require_gpt2_tokenizer(folder)  # without files by the vocabulary's size and the end token


GPT2: dict[str, int] = json.loads(vocabulary_files()[0])


def swap_two_tokens(ids: dict[str, int]) -> dict[str, int]:
    return {**ids, "Ġthe": ids["Ġking"], "Ġking": ids["Ġthe"]}


@pytest.mark.parametrize(
    ("name", "values", "named"),
    [
        ("config.json", {"eos_token_id": 50258}, "eos_token_id 50258"),
        ("config.json", {"vocab_size": 21128}, "vocab_size 21128"),
        ("vocab.json", swap_two_tokens(GPT2), "vocab.json"),
        ("added_tokens.json", {"<|user|>": 50257}, "added_tokens.json"),
        ("tokenizer.json", {"model": {"vocab": swap_two_tokens(GPT2)}}, "tokenizer.json"),
        ("tokenizer.json", {"model": {"vocab": list(GPT2.items())[1:]}}, "tokenizer.json"),
    ],
)
def test_a_model_with_other_tokens_is_refused_for_text(
    tmp_path: Path, name: str, values: dict[str, Any], named: str
) -> None:
    folder = write_ours(tmp_path)
    edit_json(folder / name, values)
    with pytest.raises(ValueError, match=re.escape(named)):
        hf.require_gpt2_tokenizer(folder)


# ---- the folder to publish -----------------------------------------------------------------------

RESULTS = "|  | this run |\n|---|---|\n| validation loss | 3.2100 |\n"
SETTINGS = "| setting | value |\n|---|---|\n| data_dir | /home/somebody |\n"
REPORT = f"# Run report: log\n\n![curves](plot.png)\n\n{RESULTS}\n± error.\n\n{SETTINGS}"


def test_an_export_has_gpt2s_rows_no_state_and_a_card(tmp_path: Path) -> None:
    log = tmp_path / "log"
    folder = shutil.copytree(write_ours(tmp_path), log / "step_000005")
    (folder / "training_state.pt").write_bytes(b"state")
    (log / "report.md").write_text(REPORT)
    (log / "plot.png").write_bytes(b"picture")
    dataset = "HuggingFaceFW/fineweb-edu"
    results = {(dataset, "loss"): 3.21, ("Rowan/hellaswag", "acc_norm"): 0.3}
    out = tmp_path / "gpt-xs"
    hf.export_model(folder, out, torch.bfloat16, dataset, results)
    assert not (out / "training_state.pt").exists()
    added = {path.name for path in out.iterdir()} - {path.name for path in folder.iterdir()}
    assert added == {"README.md", "plot.png"}
    before = load_file(folder / "model.safetensors")
    after = load_file(out / "model.safetensors")
    assert after["wte.weight"].shape == (50257, 16)
    for name, value in after.items():
        assert torch.equal(value, before[name][: len(value)].bfloat16()), name
    assert hf.read_shape(out)["vocab_size"] == 50257
    assert "suppress_tokens" not in json.loads((out / "generation_config.json").read_text())

    card = ModelCard.load(out / "README.md")
    assert (card.data.license, card.data.library_name) == ("mit", "transformers")
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.datasets == [dataset]
    found = {(r.dataset_type, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found == results
    assert RESULTS in card.text
    assert "](plot.png)" in card.text
    assert "/home/somebody" not in card.text


def test_an_export_needs_no_log_folder_and_no_results(tmp_path: Path) -> None:
    folder = write_ours(tmp_path)
    hf.export_model(folder, tmp_path / "out", torch.float32, "stdlib", {})
    assert not (tmp_path / "out/plot.png").exists()
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.datasets is None
    assert "stdlib" in card.text


def test_an_export_overwrites_nothing_and_is_gpt2s(tmp_path: Path) -> None:
    folder = write_ours(tmp_path)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())
    with pytest.raises(ValueError, match="not empty"):
        hf.export_model(folder, folder, torch.float32, "", {})
    assert sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir()) == before
    edit_json(folder / "config.json", {"eos_token_id": 1})
    with pytest.raises(ValueError, match="eos_token_id 1"):
        hf.export_model(folder, tmp_path / "out", torch.float32, "", {})
    assert not (tmp_path / "out").exists()


# ---- the hub -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("endpoint", "proxy", "error", "named"),
    [
        ("hf-mirror.com", "", ValueError, "HF_ENDPOINT hf-mirror.com"),
        ("https://hub.invalid", "", ConnectionError, "HF_ENDPOINT https://hub.invalid"),
        ("https://hf.co", "http://me:secret@127.0.0.1:9", ConnectionError, "HTTPS_PROXY 127.0.0.1"),
    ],
)
def test_a_hub_out_of_reach_is_told_at_once_with_the_variable(
    endpoint: str, proxy: str, error: type[Exception], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    monkeypatch.setattr(hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    start = time.perf_counter()
    with pytest.raises(error, match=re.escape(named)) as raised:
        hub.require_hub()
    assert "secret" not in str(raised.value)
    with pytest.raises(error, match=r"^owner/name: no such folder.*" + re.escape(named)):
        hub.local_folder("owner/name")
    assert time.perf_counter() - start < 20
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    hub.require_hub()  # nothing to check: only the cache is read


def download(hub_id: str, **environment: str) -> str:
    """What ``local_folder`` returns or raises in a process with this environment."""
    code = f"""
from gptxs import hub
try:
    print(hub.local_folder({hub_id!r}))
except Exception as error:
    print(type(error).__name__, error)
"""
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return finished.stdout.strip()


def test_a_model_of_the_hub_comes_with_its_tokenizer_and_stays_for_work_offline(
    tmp_path: Path,
) -> None:
    source = write_ours(tmp_path)
    edit_json(source / "vocab.json", swap_two_tokens(GPT2))
    (source / "pytorch_model.bin").write_bytes(b"the same again")
    with HubServer({"someone/small": source}) as hub:
        environment = hub.environment(tmp_path / "cache")
        folder = Path(download("someone/small", **environment))
        missing = download("someone/else", **environment)
    assert hf.weights_sha256(folder) == hf.weights_sha256(source)
    assert not (folder / "pytorch_model.bin").exists()
    with pytest.raises(ValueError, match=r"vocab\.json"):
        hf.require_gpt2_tokenizer(folder)
    assert missing == "FileNotFoundError someone/else: no such folder, and not on the hub"
    environment["HF_HUB_OFFLINE"] = "1"
    assert download("someone/small", **environment) == str(folder)
    assert "HF_HUB_OFFLINE" in download("someone/else", **environment)
