"""The tokenizer is GPT-2's, for any text, in linear time, without a network."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer

from gptxs import tokenizer
from gptxs.tokenizer import DELIMITER, encode, encode_documents, get_tokenizer


def test_a_vocabulary_file_that_was_changed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder_json, vocab_bpe = tokenizer.vocabulary_files()
    (tmp_path / "encoder.json").write_bytes(encoder_json)
    (tmp_path / "vocab.bpe").write_bytes(vocab_bpe.replace(b"\nt he\n", b"\nh et\n", 1))
    paths = (str(tmp_path / "encoder.json"), str(tmp_path / "vocab.bpe"))
    monkeypatch.setattr(tokenizer, "_vocabulary_paths", lambda: paths)
    with pytest.raises(ValueError, match=r"vocab\.bpe"):
        tokenizer.vocabulary_files()
    with pytest.raises(ValueError, match=r"vocab\.bpe"):
        get_tokenizer.__wrapped__()


def test_awkward_texts_agree_with_another_implementation(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("vocab.json", "merges.txt")]
    for path, content in zip(paths, tokenizer.vocabulary_files(), strict=True):
        Path(path).write_bytes(content)
    other = ByteLevelBPETokenizer(*paths)  # Hugging Face's, in Rust
    assert encode("hello world").tolist() == [31373, 995]  # as tiktoken's documentation has it
    for text in (
        "It's we'll they've I'd 'S 'LL  two  spaces   and\ttabs \n\n\n lines \r\n",
        "été, naïve “quotes” Ελληνικά 中文 한국어 العربية ไทย 🇨🇭👩‍👩‍👧‍👦 ½ ² Ⅷ ٣",
        "\x00\x01\x7f\x85\xa0\u2028\u3000\ufeff\ufffd",
        " " * 1000 + "x" + "a" * 1000,
    ):
        tokens = encode(text)
        assert tokens.dtype == np.uint16
        assert tokens.tolist() == other.encode(text).ids
        assert get_tokenizer().decode(tokens.tolist()) == text


# The second has what is special here: the delimiter's parts, lone surrogates, kinds of whitespace.
TEXTS = st.text(max_size=60) | st.text(alphabet=" \n\u3000\x1ca<|>\ud800", max_size=40)
PARTS = TEXTS | st.sampled_from([DELIMITER, f"a{DELIMITER}b", "<|endoftext|", "|endoftext|>"])


@settings(deadline=None)  # the first call loads the vocabulary
@given(texts=st.lists(PARTS, max_size=5))
def test_any_texts_have_tiktokens_tokens_alone_and_together(texts: list[str]) -> None:
    expected = []
    for text in texts:
        valid = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        tokens = get_tokenizer().encode_ordinary(valid)
        assert encode(text).tolist() == tokens
        expected += [50256, *tokens]
    assert encode_documents(texts).tolist() == expected


# Of 65,536 and more a run is cut in two, if there is something behind it.
@pytest.mark.parametrize("size", [65_535, 65_536, 65_537, 65_538])
@pytest.mark.parametrize("after", ["", "x", " x", "\x1c"])
def test_long_whitespace_has_tiktokens_tokens(size: int, after: str) -> None:
    text = "before" + "\n" * size + after
    assert encode(text).tolist() == get_tokenizer().encode_ordinary(text)


@pytest.mark.parametrize(
    "text",
    [
        "\u3000" * 3_000_000 + "x",
        "before" + " \t" * 1_500_000 + "after",
        "\n" * 3_000_000,
        (" " * 65_535 + "x") * 50,
        " " * 65_535 + "a b " * 500_000,
        "\ud800" * 500_000,
        DELIMITER * 200_000,
        "a" * 100_000,
        "ab1" * 33_000,
    ],
)
def test_megabytes_of_any_text_take_seconds(text: str) -> None:
    start = time.perf_counter()
    tokens = encode_documents(["first", text])
    assert time.perf_counter() - start < 20
    decoded = get_tokenizer().decode(tokens[2:].tolist())
    assert decoded == DELIMITER + text.replace("\ud800", "\ufffd")
