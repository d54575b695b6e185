"""Which files are shards, what they hold, and how a folder's mistakes are told."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gptxs.shards import ShardIndex, ShardRecord, check_complete, digest, find_shards, read_header
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


def write_index(folder: Path, *files: str, complete: bool = True) -> ShardIndex:
    """An index of shards with ``TOKENS`` in them."""
    records = [ShardRecord(file, len(TOKENS), "ab" * 32, 1, [1, 0, 0]) for file in files]
    index = ShardIndex("my_texts", "", 5000, 70000, complete=complete, shards=records)
    index.write(folder)
    return index


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


def test_missing_shards_are_told_with_the_command_that_writes_them(tmp_path: Path) -> None:
    write(tmp_path / "x_train_000001.npy")
    for folder in (tmp_path / "missing", tmp_path):
        command = re.escape(f"`python dataset.py --data-dir {folder}`")
        with pytest.raises(FileNotFoundError, match=rf"no val shards.*{command}"):
            find_shards(folder, "val")


@pytest.mark.parametrize(
    "array",
    [np.zeros(9, np.int32), np.zeros(9, ">u2"), np.zeros((3, 3), "<u2"), np.array([{}])],
    ids=["dtype", "big-endian", "shape", "pickle"],
)
def test_an_array_that_is_not_tokens_is_named(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "x_train_000000.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=r"x_train_000000\.npy"):
        find_shards(tmp_path, "train")


@pytest.mark.parametrize("name", ["x_train_000001.npy", "x_train_000001.bin", "train.bin"])
@pytest.mark.parametrize("size", [9, 91, 1025, 5001])
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
    index = write_index(tmp_path, *listed)
    assert ShardIndex.read(tmp_path) == index
    check_complete(tmp_path)
    assert [shard.path.name for shard in find_shards(tmp_path, "train")] == listed[:2]
    assert [shard.path.name for shard in find_shards(tmp_path, "val")] == listed[2:]


@pytest.mark.parametrize("complete", [True, False])
def test_an_unfinished_folder_names_the_command_that_finishes_it(
    tmp_path: Path, complete: bool
) -> None:
    write_index(tmp_path, "x_train_000001.npy", complete=complete)
    command = f"python dataset.py --source my_texts --data-dir {tmp_path} --shard-size 5000"
    with pytest.raises(ValueError, match=re.escape(f"`{command} --max-tokens 70000`")):
        check_complete(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "\0", "[]", "null", "{}", '{"shards": [3]}', '{"shards": 3}', "[" * 100_000]
)
def test_a_damaged_index_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "index.json"))):
        ShardIndex.read(tmp_path)


@pytest.mark.soak
def test_the_documented_script_tokenizes_as_dataset_py_and_its_shards_train(tmp_path: Path) -> None:
    pytest.importorskip("datatrove")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/cluster.md").read_text(), re.DOTALL)
    (script,) = [block for block in blocks if "DocumentTokenizer" in block]
    texts = [f"No. {i} of <|endoftext|> \u00e9\u4e2d\n\n  " + "word " * i for i in range(99)]
    (tmp_path / "corpus").mkdir()
    for part in range(3):
        lines = [json.dumps({"text": text}) for text in texts[part::3]]
        (tmp_path / "corpus" / f"{part}.jsonl").write_text("\n".join(lines))

    def run(*command: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, check=True)

    run("-c", script)
    first = tmp_path / "data/mine/mine_train_00000_unshuffled.ds"
    first.rename(first.with_name("mine_val_00000_unshuffled.ds"))
    shards = find_shards(first.parent, "val") + find_shards(first.parent, "train")
    for part, shard in enumerate(shards):
        # datatrove ends each document with <|endoftext|>, where ours begins with it.
        tokens = np.concatenate(([END_OF_TEXT], shard.map_tokens()))
        assert np.array_equal(tokens[:-1], encode_documents(texts[part::3]))
    assert len(shards) == 3
    flags = "--batch-tokens 256 --micro-batch 8 --max-steps 2 --warmup-steps 1 --val-tokens 256"
    flags += " --model.d-model 16 --model.n-layers 1 --model.n-heads 2 --model.context-length 16"
    flags += " --device cpu --no-compile --hellaswag-every 0 --data-dir data/mine"
    run(str(ROOT / "train.py"), *flags.split())
    assert (tmp_path / "log/step_000002").is_dir()
