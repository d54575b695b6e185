"""The tokenizer is GPT-2's, for any text, without a network."""

import common

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer

import dataset


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> ByteLevelBPETokenizer:
    """Hugging Face's implementation in Rust, on the files that `save_tokenizer` writes."""
    folder = tmp_path_factory.mktemp("model")
    dataset.save_tokenizer(folder, context_length=64)
    return ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


def test_the_saved_tokenizer_has_the_models_context_and_the_delimiter(tmp_path: Path) -> None:
    dataset.save_tokenizer(tmp_path, context_length=64)
    names = ["merges.txt", "tokenizer_config.json", "vocab.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    content = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (content["model_max_length"], content["eos_token"]) == (64, "<|endoftext|>")


# GPT-2's ids, of which anyone can find the first ones in the documentation of tiktoken.
@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", []),
        ("hello world", [31373, 995]),
        ("hello <|endoftext|>", [31373, 1279, 91, 437, 1659, 5239, 91, 29]),
        ("<|endoftext|>", [27, 91, 437, 1659, 5239, 91, 29]),
        ("0", [15]),
        ("today\n ", [40838, 198, 220]),
        ("This is some text", [1212, 318, 617, 2420]),
        ("indivisible", [521, 452, 12843]),
        ("👍", [41840, 235]),
    ],
)
def test_published_examples(text: str, tokens: list[int]) -> None:
    assert dataset.get_tokenizer().encode(text, disallowed_special=()) == tokens
    assert dataset.encode([text]).tolist() == [50256, *tokens]


def test_the_vocabulary_is_gpt2s() -> None:
    tokenizer = dataset.get_tokenizer()
    assert tokenizer.n_vocab == common.VOCAB_SIZE == 50257
    assert tokenizer.eot_token == common.END_OF_TEXT == 50256
    assert dataset.get_tokenizer() is tokenizer


@pytest.mark.parametrize(
    "text",
    [
        "It's we'll they've I'd 'S 'LL",
        "  two  spaces   and\ttabs \n\n\n lines \r\n",
        "été, naïve “quotes” Ελληνικά 中文 한국어 العربية ไทย 🇨🇭👩‍👩‍👧‍👦",
        "x = {'a': [1, 22, 333]}; // ≤≥≠ ½ ² Ⅷ ٣",
        "\x00\x01\x7f\x85\xa0\u2028\u3000\ufeff\ufffd",
        "a" * 1000,
        " " * 1000 + "x",
    ],
)
def test_awkward_texts_agree_with_another_implementation(
    text: str, other: ByteLevelBPETokenizer
) -> None:
    tokens = dataset.encode([text])
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [50256, *other.encode(text).ids]
    assert dataset.get_tokenizer().decode(tokens[1:].tolist()) == text


@settings(deadline=None)  # the first call loads the vocabulary
@given(texts=st.lists(st.text(min_size=1, max_size=50), min_size=1, max_size=5))
def test_texts_together_give_the_tokens_of_each(texts: list[str]) -> None:
    encode = dataset.get_tokenizer().encode_ordinary
    apart = [token for text in texts for token in (50256, *encode(text))]
    assert dataset.encode(texts).tolist() == apart


def test_the_delimiter_inside_a_text_is_text() -> None:
    texts = ["plain", "a<|endoftext|>b", "<|endoftext|", "|endoftext|>"]
    tokens = dataset.encode(texts)
    assert np.count_nonzero(tokens == 50256) == len(texts)
    documents = np.split(tokens, np.flatnonzero(tokens == 50256))[1:]
    assert [dataset.get_tokenizer().decode(d[1:].tolist()) for d in documents] == texts


@given(text=st.text(max_size=60) | st.text(alphabet=" \n\u3000\x1ca<|>\ud800", max_size=40))
@settings(deadline=None)
def test_ordinary_text_has_no_delimiter_in_front_and_the_tokens_of_tiktoken(text: str) -> None:
    valid = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    tokens = dataset.get_tokenizer().encode_ordinary(valid)
    assert dataset.encode_ordinary(text) == tokens
    assert dataset.encode([text]).tolist() == [50256, *tokens]


@pytest.mark.parametrize(
    "text",
    [
        "\u3000" * 3_000_000 + "x",
        " " * 3_000_000 + "x",
        (" " * 65_535 + "x") * 50,
        " " * 65_535 + "a b " * 500_000,
        "\ud800" * 500_000,
        "<|endoftext|>" * 200_000,
    ],
)
def test_megabytes_of_any_text_take_seconds(text: str) -> None:
    start = time.perf_counter()
    tokens = dataset.encode_ordinary(text)
    assert time.perf_counter() - start < 20
    assert dataset.get_tokenizer().decode(tokens) == text.replace("\ud800", "\ufffd")


def test_half_a_surrogate_pair_becomes_a_replacement_character() -> None:
    assert dataset.encode(["a\ud800b", "c"]).tolist() == dataset.encode(["a\ufffdb", "c"]).tolist()


@pytest.mark.parametrize("text", ["a" * 100_000, "^" * 100_000, "é" * 50_000, "ab1" * 33_000])
def test_a_hundred_kilobytes_without_a_space_take_a_moment(text: str) -> None:
    start = time.perf_counter()
    tokens = dataset.encode([text])
    assert time.perf_counter() - start < 30
    assert dataset.get_tokenizer().decode(tokens[1:].tolist()) == text


@pytest.mark.parametrize("blank", [" ", "\n", " \t"])
def test_megabytes_of_blanks_do_not_overflow(blank: str) -> None:
    text = "before" + blank * 1_500_000 + "after"
    tokens = dataset.encode(["first", text])[len(dataset.encode(["first"])) :]
    assert dataset.get_tokenizer().decode(tokens[1:].tolist()) == text
    # The tokens must be those of a run short enough for tiktoken, only more of them in the middle.
    short = dataset.get_tokenizer().encode_ordinary("before" + blank * 100_000 + "after")
    assert tokens[1:50].tolist() == short[:49]
    assert tokens[-50:].tolist() == short[-50:]
