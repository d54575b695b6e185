"""Which files are shards, what they hold, and how a folder's mistakes are told."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_loader import TokenDataset, ignored_files
from gptxs.shards import ShardIndex, ShardRecord, digest, find_shards, read_header
from gptxs.tokenizer import END_OF_TEXT, encode_documents

ROOT = Path(__file__).parents[1]
TOKENS = np.random.default_rng(0).integers(0, 50257, 10_000).astype("<u2")


def write(path: Path, tokens: np.ndarray = TOKENS) -> Path:
    """A shard in the format that the file's name has."""
    if path.suffix == ".npy":
        np.save(path, tokens)
        return path
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    has_header = path.suffix == ".bin" and path.stem not in ("train", "val")
    path.write_bytes((header.tobytes() if has_header else b"") + tokens.tobytes())
    return path


@pytest.mark.parametrize(
    "train",
    [
        "edufineweb_train_000001.npy",  # ours and build-nanogpt's
        "fineweb_train_000001.bin",  # llm.c's and modded-nanogpt's
        "tiny_shakespeare_train.bin",  # llm.c's
        "train.bin",  # nanoGPT's
        "train_00000_unshuffled.ds",  # datatrove's
        "news_2024_train_00003_00000_doc_shuffled.ds",
        "000_news_train.ds",  # of its merger
    ],
)
def test_each_format_is_read_and_divided_by_its_names(tmp_path: Path, train: str) -> None:
    write(tmp_path / train)
    write(tmp_path / train.replace("train", "val"), TOKENS[:300])
    (tmp_path / f"{train}.index").touch()  # datatrove's; not a shard
    for split, tokens in (("train", TOKENS), ("val", TOKENS[:300])):
        (shard,) = find_shards(tmp_path, split)
        assert shard.path.name == train.replace("train", split)
        assert np.array_equal(shard.map_tokens(), tokens)


def test_copies_other_names_and_empty_files_are_not_read(tmp_path: Path) -> None:
    write(tmp_path / "x_train_000001.npy")
    for name in ("x_train_000001 (1).npy", "._x_train_000001.npy", "x_train_1.npy", "x_train.npy"):
        write(tmp_path / name)
    write(tmp_path / "val_00000_unshuffled.ds", TOKENS[:0])  # of a task that found no text
    write(tmp_path / "val_00001_unshuffled.ds")
    for split, name in (("train", "x_train_000001.npy"), ("val", "val_00001_unshuffled.ds")):
        assert [shard.path.name for shard in find_shards(tmp_path, split)] == [name]


@pytest.mark.parametrize(
    "other", ["b_train_000001.npy", "a_train_000001.bin", "train.bin", "train_00000_unshuffled.ds"]
)
def test_shards_of_two_data_sets_are_not_mixed(tmp_path: Path, other: str) -> None:
    write(tmp_path / "a_train_000001.npy")
    write(tmp_path / other)
    with pytest.raises(ValueError, match="several data sets"):
        find_shards(tmp_path, "train")


@pytest.mark.parametrize("name", ["x_train_000001.npy", "x_train_000001.bin"])
@pytest.mark.parametrize("size", [9, 91, 1024, 5000])
def test_a_truncated_shard_is_named(tmp_path: Path, name: str, size: int) -> None:
    path = write(tmp_path / name)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        find_shards(tmp_path, "train")


def test_a_digest_is_of_the_tokens_all_over_a_shard(tmp_path: Path) -> None:
    tokens = np.tile(TOKENS, 10)
    before = digest(read_header(write(tmp_path / "x_train_000001.npy", tokens)))
    assert digest(read_header(write(tmp_path / "x_train_000001.bin", tokens))) == before
    for start in range(0, len(tokens), len(tokens) // 10):  # no tenth is without a block
        changed = tokens.copy()
        changed[start : start + len(tokens) // 10] ^= 1
        assert digest(read_header(write(tmp_path / "x_train_000001.npy", changed))) != before


def test_where_there_is_an_index_only_the_shards_that_it_lists_count(tmp_path: Path) -> None:
    listed = ["x_train_000001.npy", "x_train_000002.npy", "x_val_000000.npy"]
    # The validation shard under a train name, an old shard, another data set's.
    others = ["x_train_000000.npy", "x_train_000003.npy", "y_train_000001.npy", "train.bin"]
    for name in listed + others:
        write(tmp_path / name)
    records = [ShardRecord(name, len(TOKENS), "ab" * 32, 1, [1, 0, 0]) for name in listed]
    index = ShardIndex("my_texts", "", 5000, 70000, complete=True, shards=records)
    index.write(tmp_path)
    assert ShardIndex.read(tmp_path) == index
    datasets = [TokenDataset(tmp_path, split, 8, 50257) for split in ("train", "val")]
    used = [[shard.path.name for shard in data.shards] for data in datasets]
    assert used == [listed[:2], listed[2:]]
    assert ignored_files(tmp_path, *datasets) == sorted(others)


@pytest.mark.soak
def test_the_documented_script_tokenizes_as_dataset_py(tmp_path: Path) -> None:
    pytest.importorskip("datatrove")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/cluster.md").read_text(), re.DOTALL)
    (script,) = [block for block in blocks if "DocumentTokenizer" in block]
    texts = [f"No. {i} of <|endoftext|> \u00e9\u4e2d\n\n  " + "word " * i for i in range(99)]
    (tmp_path / "corpus").mkdir()
    for part in range(3):
        lines = [json.dumps({"text": text}) for text in texts[part::3]]
        (tmp_path / "corpus" / f"{part}.jsonl").write_text("\n".join(lines))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    first = tmp_path / "data/mine/mine_train_00000_unshuffled.ds"
    first.rename(first.with_name("mine_val_00000_unshuffled.ds"))
    shards = find_shards(first.parent, "val") + find_shards(first.parent, "train")
    for part, shard in enumerate(shards):
        # datatrove ends each document with <|endoftext|>, where ours begins with it.
        tokens = np.concatenate(([END_OF_TEXT], shard.map_tokens()))
        assert np.array_equal(tokens[:-1], encode_documents(texts[part::3]))
    assert len(shards) == 3
