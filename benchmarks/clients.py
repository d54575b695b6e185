"""Greedy text of an exported checkpoint in other programs, held against eval.py's.

The checkpoint is exported, and a few prompts are continued by eval.py, transformers, CTranslate2
and llama.cpp, all in fp32. A program that is not there is skipped with a line. Exit code 1: a text
differs. CTranslate2 needs `pip install ctranslate2`, llama.cpp its program llama-completion and
--converter, the script of its repository that writes a GGUF file.

Example: python benchmarks/clients.py --converter llama.cpp/convert_hf_to_gguf.py
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
# Blanks, line ends and what takes several bytes: each program also splits the text into tokens.
PROMPTS = ("The function returns", "def f(x):\n    return", "Don't 123 \u00fcber\u4e2d\U0001f600")
# With the prompt they must fit into the context: after a full one each program goes on differently.
NEW_TOKENS = 40
CONVERTER = Path("llama.cpp/convert_hf_to_gguf.py")


def run(*command: str | Path) -> str:
    """What a command prints; its messages are shown only if it fails."""
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    if result.returncode:
        sys.exit(f"{command[0]} failed:\n{result.stderr.decode(errors='replace')}")
    return result.stdout.decode(errors="replace")


def in_eval(model: Path) -> list[str]:
    flags = f"--max-new-tokens {NEW_TOKENS} --greedy --dtype fp32 --device cpu --json".split()
    prompts = [flag for prompt in PROMPTS for flag in ("--prompt", prompt)]
    lines = run(sys.executable, ROOT / "eval.py", "--checkpoint", model, *flags, *prompts)
    return [json.loads(line)["text"] for line in lines.splitlines()]


def in_transformers(model: Path) -> tuple[str, list[str]]:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    gpt2 = transformers.AutoModelForCausalLM.from_pretrained(model)
    texts = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        (out,) = gpt2.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        new = out[inputs["input_ids"].size(1) :]
        texts.append(str(tokenizer.decode(new, skip_special_tokens=True)))
    return transformers.__version__, texts


def in_ctranslate2(model: Path) -> tuple[str, list[str]]:
    import ctranslate2
    from ctranslate2.converters import TransformersConverter
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    converted = TransformersConverter(str(model)).convert(str(model.with_name("ct2")))
    generator = ctranslate2.Generator(converted, compute_type="float32")
    texts = []
    for prompt in PROMPTS:
        tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode(prompt))
        how = {"max_length": NEW_TOKENS, "sampling_topk": 1, "include_prompt_in_result": False}
        (result,) = generator.generate_batch([tokens], **how)
        texts.append(str(tokenizer.decode(result.sequences_ids[0])))
    return ctranslate2.__version__, texts


def in_llama_cpp(model: Path, converter: Path) -> tuple[str, list[str]]:
    if not converter.exists() or not shutil.which("llama-completion"):
        raise ImportError(f"no llama-completion, or no {converter} (see --converter)")
    gguf = model.with_name("model.gguf")
    run(sys.executable, converter, model, "--outfile", gguf, "--outtype", "f32")
    # The cache is in fp16 by default, and so are the operands of its Flash Attention.
    flags = f"--predict {NEW_TOKENS} --temp 0 --cache-type-k f32 --cache-type-v f32"
    flags += " --flash-attn off --no-conversation --no-display-prompt --no-escape"
    texts = []
    for prompt in PROMPTS:
        text = run("llama-completion", "--model", gguf, *flags.split(), "--prompt", prompt)
        # It ends a text so, and the words are there where the model itself has ended it.
        texts.append(text.removesuffix("\n\n").removesuffix(" [end of text]"))
    version = subprocess.check_output(["llama-completion", "--version"], stderr=subprocess.STDOUT)
    return version.decode().splitlines()[0].removeprefix("version: "), texts


def main(checkpoint: str = "log/quickstart", converter: Path = CONVERTER) -> int:
    programs: dict[str, Callable[[Path], tuple[str, list[str]]]] = {
        "transformers": in_transformers,
        "CTranslate2": in_ctranslate2,
        "llama.cpp": partial(in_llama_cpp, converter=converter),
    }
    exit_code = 0
    print("| program | version | greedy text |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        run(sys.executable, ROOT / "eval.py", "--checkpoint", checkpoint, "--export", model)
        expected = in_eval(model)
        for name, program in programs.items():
            try:
                version, texts = program(model)
            except ImportError as error:
                print(f"| {name} | | skipped: {error} |")
                continue
            print(f"| {name} | {version} | {'equal' if texts == expected else 'different'} |")
            if texts != expected:
                exit_code = 1
                print(f"eval.py: {expected}\n{name}: {texts}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
