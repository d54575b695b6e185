"""Hugging Face's folder of a GPT-2: its shape, weights, tokenizer and model card.

What would load without a word, and then compute or say something else than GPT-2, is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptxs.cli import first_line
from gptxs.files import sha256
from gptxs.hub import TOKENIZER_FILES
from gptxs.tokenizer import DELIMITER, END_OF_TEXT, VOCAB_SIZE, vocabulary_files

# GPT-2's Conv1D layers store their weight as (in, out), the transpose of nn.Linear's.
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# What config.json calls GPTConfig's fields.
HF_NAMES = {
    "d_model": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
    "context_length": "n_positions",
    "vocab_size": "vocab_size",
}
# What else config.json says, and must not contradict in a model that ours computes.
ARCHITECTURE: dict[str, Any] = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "n_inner": None,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({first_line(error)}); use another") from None


def read_shape(folder: Path) -> dict[str, int]:
    """The fields of GPTConfig in config.json; ValueError names what our model does not compute."""
    path = folder / "config.json"
    config = _read_json(path)
    problems = [name for name in HF_NAMES.values() if type(config.get(name)) is not int]
    if not problems and config.get("n_inner") == 4 * config["n_embd"]:
        config["n_inner"] = None  # which means the same
    if config.get("activation_function") == "gelu_pytorch_tanh":
        config["activation_function"] = "gelu_new"  # two names of one function
    problems += [name for name, value in ARCHITECTURE.items() if config.get(name, value) != value]
    if problems:
        found = ", ".join(f"{name} {config.get(name)!r}" for name in problems)
        raise ValueError(f"{path}: not a GPT-2 that this program computes: {found}")
    return {ours: config[theirs] for ours, theirs in HF_NAMES.items()}


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights by our names, such as "transformer.wte.weight", in fp32 on the CPU.

    Matrices have nn.Linear's orientation. The tied head is left out. Raises ValueError for values
    that are not finite; missing names and other shapes are for ``load_state_dict`` to find.
    """
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        tensors |= load_file(path)
    head = tensors.pop("lm_head.weight", None)
    weights = {}
    for name, tensor in tensors.items():
        # OpenAI's files hold the causal mask, which is not a parameter.
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        oriented = tensor.T if name.endswith(CONV1D) else tensor
        # A copy, since safetensors' tensors are the file itself, which may change.
        value = oriented.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if not all(math.isfinite(extreme) for extreme in torch.aminmax(value)):
            raise ValueError(f"{folder}: {name} is not finite; use another checkpoint")
        weights[f"transformer.{name.removeprefix('transformer.')}"] = value
    if head is not None and not torch.equal(head.float(), weights["transformer.wte.weight"]):
        raise ValueError(f"{folder}: lm_head.weight is not tied to the embedding, as GPT-2's is")
    return weights


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the files that the index of a model in several files names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if index.exists():
        return [folder / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
    raise FileNotFoundError(
        f"{folder}: no model.safetensors; if pytorch_model.bin is there (from the hub: hf download"
        " ID --local-dir DIR), convert it: python -c 'from transformers import GPT2LMHeadModel;"
        f' GPT2LMHeadModel.from_pretrained("{folder}").save_pretrained("{folder}")\''
    )


def weights_sha256(folder: Path) -> str:
    """What ``sha256sum`` prints of the weights' file; of several, of its lines for them."""
    paths = _weight_files(folder)
    if len(paths) == 1:
        return sha256(paths[0])
    lines = [f"{sha256(path)}  {path.name}\n" for path in paths]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def require_gpt2_tokenizer(folder: Path) -> None:
    """Raise ValueError where a model's tokens are not GPT-2's, so that text would be garbage."""
    config = _read_json(folder / "config.json")
    gpt2 = json.loads(vocabulary_files()[0])
    problems = []
    if config["vocab_size"] < VOCAB_SIZE:
        problems.append(f"vocab_size {config['vocab_size']}")
    if config.get("eos_token_id", END_OF_TEXT) not in (END_OF_TEXT, None):
        problems.append(f"eos_token_id {config['eos_token_id']}")
    for path in [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]:
        ids = _read_json(path)  # of each token
        if path.name == "tokenizer.json":
            added = {token["content"]: token["id"] for token in ids.get("added_tokens", [])}
            ids = dict(ids["model"]["vocab"]) | added
        elif path.name == "added_tokens.json":
            ids = gpt2 | ids
        if ids != gpt2:
            problems.append(f"other tokens in {path.name}")
    if problems:
        raise ValueError(
            f"{folder}: not GPT-2's tokens ({', '.join(problems)}), so no text can go in or out;"
            " eval.py --loss measures it on shards of its own tokens"
        )


def write_model(
    folder: Path,
    weights: Mapping[str, Tensor],
    shape: Mapping[str, int],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write what ``read_weights`` and ``read_shape`` return, as a folder that other tools open.

    The tensors have OpenAI's names, without "transformer.", in ``dtype``. A vocabulary that holds
    GPT-2's gets its end token and the tokenizer's files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    is_gpt2 = shape["vocab_size"] >= VOCAB_SIZE
    end = END_OF_TEXT if is_gpt2 else None
    special_tokens = {"bos_token_id": end, "eos_token_id": end}
    config = {
        **ARCHITECTURE,
        **{theirs: shape[ours] for ours, theirs in HF_NAMES.items()},
        **special_tokens,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        "architectures": ["GPT2LMHeadModel"],
        "n_ctx": shape["context_length"],  # the name that llama.cpp's converter looks for
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    generation: dict[str, Any] = dict(special_tokens)
    if shape["vocab_size"] > VOCAB_SIZE:
        # transformers' generate would otherwise sample rows that only pad the vocabulary
        generation["suppress_tokens"] = list(range(VOCAB_SIZE, shape["vocab_size"]))
    contents = {"config.json": config, "generation_config.json": generation}
    if is_gpt2:
        contents["tokenizer_config.json"] = {
            "tokenizer_class": "GPT2Tokenizer",
            "model_max_length": shape["context_length"],
            **dict.fromkeys(("bos_token", "eos_token", "unk_token"), DELIMITER),
        }
        for name, data in zip(("vocab.json", "merges.txt"), vocabulary_files(), strict=True):
            (folder / name).write_bytes(data)
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tensors = {}
    for name, value in weights.items():
        stored = value.detach().T if name.endswith(CONV1D) else value.detach()
        tensors[name.removeprefix("transformer.")] = stored.to(dtype).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # safetensors makes its file private to the user; give it the mode of its neighbour
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def export_model(
    folder: Path,
    out: Path,
    dtype: torch.dtype,
    dataset: str,
    results: Mapping[tuple[str, str], float],
) -> None:
    """Write the model in ``folder`` to ``out`` as it is published: 50,257 rows and a model card.

    ``dataset`` is what it was trained on; ``results`` holds the value of each (data set, metric),
    such as ("Rowan/hellaswag", "acc_norm"). From a run's log folder come its table and picture.
    Raises ValueError where ``out`` holds anything or the model's tokens are not GPT-2's.
    """
    from huggingface_hub import EvalResult, ModelCardData  # half a second

    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give a new folder")
    require_gpt2_tokenizer(folder)
    shape = {**read_shape(folder), "vocab_size": VOCAB_SIZE}
    weights = read_weights(folder)
    # CTranslate2 refuses rows that only pad the vocabulary, and vLLM may sample them.
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:VOCAB_SIZE]
    write_model(out, weights, shape, dtype)
    name = out.resolve().name
    task = "text-generation"
    measured = [EvalResult(task, where, where, what, v) for (where, what), v in results.items()]
    data = ModelCardData(
        license="mit",
        library_name="transformers",
        pipeline_tag=task,
        datasets=[dataset] if "/" in dataset else None,  # ids of the hub only
        model_name=name,
        eval_results=measured,
    )
    millions = sum(value.numel() for value in weights.values()) / 1e6
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        f"GPT-2 of {millions:.1f}M parameters, trained with GPT-xs on {dataset}.",
    ]
    report = folder.parent / "report.md"
    if report.exists():
        # Its first table, of results. The others hold the paths of this machine.
        parts += re.findall(r"(?:^\|.*\n)+", report.read_text(encoding="utf-8"), re.MULTILINE)[:1]
    if (folder.parent / "plot.png").exists():
        shutil.copy(folder.parent / "plot.png", out)
        parts.append("![The run's curves](plot.png)")
    (out / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
