"""Hugging Face's folder, held to transformers; what is not GPT-2 is refused; the hub."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import ModelCard
from launcher import ROOT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptxs import hf, hub
from gptxs.files import sha256
from gptxs.tokenizer import get_tokenizer, vocabulary_files
from model import GPT, GPTConfig


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A model that we have written."""
    torch.manual_seed(0)
    GPT(GPTConfig(16, 2, 2, 24, 50304)).save_pretrained(tmp_path / "ours")
    return tmp_path / "ours"


def edit_json(path: Path, values: dict[str, Any]) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_several_files_are_read_and_summed_as_one_model(ours: Path, tmp_path: Path) -> None:
    many = tmp_path / "many"
    AutoModelForCausalLM.from_pretrained(ours).save_pretrained(many, max_shard_size="10KB")
    files = sorted(many.glob("model-*.safetensors"))
    assert len(files) > 1
    lines = "".join(f"{sha256(path)}  {path.name}\n" for path in files)
    assert hf.weights_sha256(many) == hashlib.sha256(lines.encode()).hexdigest()
    assert hf.weights_sha256(ours) == sha256(ours / "model.safetensors")
    one = shutil.copytree(ours, tmp_path / "one")
    (one / "model.safetensors").rename(one / "model-1.safetensors")
    index = {"weight_map": {"wte.weight": "model-1.safetensors"}}
    (one / "model.safetensors.index.json").write_text(json.dumps(index))
    assert hf.weights_sha256(one) == hf.weights_sha256(ours)
    # A file that the index does not name is not read.
    (many / "model-00099-of-00099.safetensors").write_bytes(b"half a download")
    assert_equal(hf.read_weights(many), hf.read_weights(ours))


def test_the_file_has_the_mode_of_the_others_and_may_change_once_it_is_read(ours: Path) -> None:
    assert len({path.stat().st_mode for path in ours.iterdir()}) == 1
    weights = hf.read_weights(ours)
    expected = {name: value.clone() for name, value in weights.items()}
    with (ours / "model.safetensors").open("r+b") as file:  # as a copy onto it would
        file.write(b"\0" * (ours / "model.safetensors").stat().st_size)
    assert_equal(weights, expected)


# What a GPT-2 of another kind has in its config.json, and numbers that are none.
KEYS = (
    "model_type activation_function layer_norm_epsilon n_inner scale_attn_weights"
    " scale_attn_by_inverse_layer_idx add_cross_attention tie_word_embeddings n_embd n_layer"
).split()


@pytest.mark.parametrize("key", KEYS)
def test_what_we_would_compute_wrong_is_refused(ours: Path, key: str) -> None:
    edit_json(ours / "config.json", {key: "other"})
    with pytest.raises(ValueError, match=f"{key} 'other'"):
        hf.read_shape(ours)


def test_the_masks_in_openais_files_are_no_weights(ours: Path) -> None:
    expected = hf.read_weights(ours)
    weights = load_file(ours / "model.safetensors")
    weights["h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
    weights["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    weights["lm_head.weight"] = weights["wte.weight"].clone()
    save_file(weights, ours / "model.safetensors")
    assert_equal(hf.read_weights(ours), expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [("h.1.mlp.c_fc.weight", torch.nan), ("ln_f.bias", -torch.inf), ("lm_head.weight", 0.5)],
)
def test_infinite_or_untied_weights_are_refused(ours: Path, name: str, value: float) -> None:
    weights = load_file(ours / "model.safetensors")
    weights.setdefault(name, weights["wte.weight"].clone()).view(-1)[5] = value
    save_file(weights, ours / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape(name)):
        hf.read_weights(ours)


def test_the_command_that_converts_a_pytorch_model_bin_does(ours: Path) -> None:
    expected = hf.read_weights(ours)
    model = AutoModelForCausalLM.from_pretrained(ours)
    torch.save(model.state_dict(), ours / "pytorch_model.bin")
    (ours / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError) as error:
        hf.read_weights(ours)
    exec(str(error.value).split("'")[1])
    assert_equal(hf.read_weights(ours), expected)


def test_the_written_tokenizer_is_gpt2s_and_is_recognised(ours: Path) -> None:
    hf.require_gpt2_tokenizer(ours)
    tokenizer = AutoTokenizer.from_pretrained(ours)
    text = "Hello, wörld! 👍\n\n  <x>"
    assert tokenizer.encode(text) == get_tokenizer().encode_ordinary(text)
    assert (tokenizer.eos_token_id, tokenizer.model_max_length) == (50256, 24)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (ours / name).unlink()
    hf.require_gpt2_tokenizer(ours)  # without files by the vocabulary's size and the end token
    tokenizer.save_pretrained(ours)  # as other programs write it
    assert (ours / "tokenizer.json").exists()
    hf.require_gpt2_tokenizer(ours)


def test_transformers_never_samples_a_padding_row(ours: Path) -> None:
    weights = load_file(ours / "model.safetensors")
    weights["ln_f.bias"] = 100 * weights["wte.weight"][50300]  # then that row has the top logit
    weights["wte.weight"][:50257] *= 0.1
    save_file(weights, ours / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(ours)
    prompt = torch.tensor([[1, 2]])
    assert model(prompt).logits[0, -1].argmax() >= 50257
    assert model.generate(prompt, max_new_tokens=8, do_sample=False).max() < 50257


GPT2: dict[str, int] = json.loads(vocabulary_files()[0])
SWAPPED = GPT2 | {"Ġthe": GPT2["Ġking"], "Ġking": GPT2["Ġthe"]}
ADDED = {"model": {"vocab": GPT2}, "added_tokens": [{"content": "<|user|>", "id": 50257}]}


@pytest.mark.parametrize(
    ("name", "values", "named"),
    [
        ("config.json", {"eos_token_id": 50258}, "eos_token_id 50258"),
        ("config.json", {"vocab_size": 21128}, "vocab_size 21128"),
        ("vocab.json", SWAPPED, "vocab.json"),
        ("added_tokens.json", {"<|user|>": 50257}, "added_tokens.json"),
        ("tokenizer.json", {"model": {"vocab": SWAPPED}}, "tokenizer.json"),
        ("tokenizer.json", {"model": {"vocab": list(GPT2.items())[1:]}}, "tokenizer.json"),
        ("tokenizer.json", ADDED, "tokenizer.json"),
    ],
)
def test_other_tokens_are_refused(ours: Path, name: str, values: Any, named: str) -> None:
    edit_json(ours / name, values)
    with pytest.raises(ValueError, match=re.escape(named)):
        hf.require_gpt2_tokenizer(ours)


def test_an_export_in_16_bits_overwrites_nothing(ours: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    hf.export_model(ours, out, torch.bfloat16, "stdlib", {})
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    for name, value in hf.read_weights(out).items():  # again in fp32, but rounded
        expected = hf.read_weights(ours)[name][: len(value)]
        assert torch.equal(value, expected.bfloat16().float()), name
    card = ModelCard.load(out / "README.md")
    assert card.data.datasets is None  # which names those of the hub alone
    assert "stdlib" in card.text
    with pytest.raises(ValueError, match="not empty"):
        hf.export_model(ours, out, torch.float32, "another", {})
    assert ModelCard.load(out / "README.md").text == card.text
    edit_json(ours / "config.json", {"eos_token_id": 1})  # nor is it of another tokenizer
    with pytest.raises(ValueError, match="eos_token_id 1"):
        hf.export_model(ours, tmp_path / "other", torch.float32, "", {})
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("endpoint", "proxy", "error", "named"),
    [
        ("hf-mirror.com", "", ValueError, "HF_ENDPOINT hf-mirror.com"),
        ("https://hub.invalid", "", ConnectionError, "HF_ENDPOINT https://hub.invalid"),
        ("https://hf.co", "http://me:secret@127.0.0.1:9", ConnectionError, "HTTPS_PROXY 127.0.0.1"),
    ],
)
def test_a_hub_out_of_reach_is_told_with_the_variable(
    endpoint: str, proxy: str, error: type[Exception], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    monkeypatch.setattr(hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(error, match=re.escape(named)) as raised:
        hub.require_hub()
    assert "secret" not in str(raised.value)
    with pytest.raises(error, match=r"^owner/name: no such folder.*" + re.escape(named)):
        hub.local_folder("owner/name")


def download(*hub_ids: str, **environment: str) -> list[str]:
    """What ``local_folder`` returns or raises for each, in a process with this environment."""
    code = f"""
from gptxs import hub
for hub_id in {hub_ids}:
    try:
        print(hub.local_folder(hub_id))
    except Exception as error:
        print(type(error).__name__, error)
"""
    command = [sys.executable, "-c", code]
    output = subprocess.check_output(command, cwd=ROOT, env=os.environ | environment, text=True)
    return output.splitlines()


def test_a_model_of_the_hub_has_its_tokenizer_and_stays(ours: Path, tmp_path: Path) -> None:
    edit_json(ours / "vocab.json", SWAPPED)
    (ours / "pytorch_model.bin").write_bytes(b"the same again")
    with HubServer({"someone/small": ours}) as server:
        environment = server.environment(tmp_path / "cache")
        found, missing = download("someone/small", "someone/else", **environment)
    folder = Path(found)
    assert hf.weights_sha256(folder) == hf.weights_sha256(ours)
    assert not (folder / "pytorch_model.bin").exists()
    with pytest.raises(ValueError, match=r"vocab\.json"):
        hf.require_gpt2_tokenizer(folder)
    assert missing == "FileNotFoundError someone/else: no such folder, and not (for you) on the hub"
    environment["HF_HUB_OFFLINE"] = "1"
    found, missing = download("someone/small", "someone/else", **environment)
    assert found == str(folder)
    assert "HF_HUB_OFFLINE" in missing
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a file"):
        hub.local_folder(ours / "pytorch_model.bin")
