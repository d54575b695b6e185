"""The order of the data: a formula that is the same for any number of ranks."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_loader import StepLayout, TokenDataset, TokenLoader, permute, window_order

T = 8


def load(
    dataset: TokenDataset, layout: StepLayout, seed: int = 0, start_step: int = 0
) -> TokenLoader:
    """A loader of a rank's shuffled micro-batches, as train.py starts one."""
    batches = layout.batches(len(dataset), seed=seed, shuffle=True, start_step=start_step)
    return TokenLoader(dataset, batches, torch.device("cpu"), prefetch=6)


def write_shards(folder: Path, *sizes: int) -> TokenDataset:
    """The data set of shards in which each token is its own position."""
    folder.mkdir(exist_ok=True)
    tokens = np.arange(sum(sizes), dtype=np.uint16)
    for index, shard in enumerate(np.split(tokens, np.cumsum(sizes)[:-1])):
        np.save(folder / f"test_train_{index:06d}.npy", shard)
    return TokenDataset(folder, "train", T)


def test_the_permutation_is_the_same_forever() -> None:
    # Written down once. A change here would send every resumed run to other data.
    assert permute(np.arange(10), 10, 1337, 0).tolist() == [4, 9, 2, 7, 8, 5, 0, 1, 6, 3]
    assert permute(np.arange(10), 10, 1337, 1).tolist() == [1, 9, 0, 8, 7, 4, 2, 5, 6, 3]


def test_a_row_takes_the_position_of_the_documented_formula() -> None:
    layout = StepLayout(windows_per_step=12, micro_batch=2, rank=1, world_size=3)
    # j = (m * world_size + r) * B + b, with m = 1, r = 1 and b = 0, 1
    assert layout.positions(step=5, micro_step=1).tolist() == [5 * 12 + 8, 5 * 12 + 9]


def test_epochs_and_seeds_give_unrelated_orders() -> None:
    n = 5000
    orders = [permute(np.arange(n), n, seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    orders.append(np.arange(n))
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.06


@given(
    n=st.integers(1, 3000),
    seed=st.integers(-(2**63), 2**64),
    epoch=st.integers(0, 10**6),
    shuffle=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_epoch_visits_every_window_once(n: int, seed: int, epoch: int, shuffle: bool) -> None:
    windows = window_order(np.arange(epoch * n, (epoch + 1) * n), n, seed, shuffle)
    assert sorted(windows) == list(range(n))


@pytest.mark.parametrize(
    ("world_size", "micro_batch"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1)]
)
def test_ranks_load_disjoint_tokens_that_make_up_the_step(
    tmp_path: Path, world_size: int, micro_batch: int
) -> None:
    # The last token of the second shard has no successor, so it begins no window.
    dataset = write_shards(tmp_path, 101, 104, 60)
    assert len(dataset) == 12 + 12 + 7
    rows = []
    for rank in range(world_size):
        layout = StepLayout(8, micro_batch, rank, world_size)
        loader = load(dataset, layout, seed=5, start_step=3)
        for _ in range(layout.micro_steps()):
            inputs, targets = next(loader)
            assert inputs.shape == targets.shape == (micro_batch, T)
            assert torch.equal(inputs, inputs[:, :1] + torch.arange(T))
            assert torch.equal(targets, inputs + 1)
            rows += inputs[:, 0].tolist()
        loader.close()
    # No window reaches from one shard into the next.
    starts = np.concatenate([np.arange(12) * T, 101 + np.arange(12) * T, 205 + np.arange(7) * T])
    expected = starts[window_order(np.arange(24, 32), n=31, seed=5, shuffle=True)]
    assert sorted(rows) == sorted(expected)


def test_a_loader_started_later_continues_as_one_that_ran_through(tmp_path: Path) -> None:
    dataset = write_shards(tmp_path, 500)
    layout = StepLayout(4, 2)
    through = load(dataset, layout, seed=1)
    batches = [next(through)[0] for _ in range(80)]  # 40 steps: more than two epochs of 62 windows
    later = load(dataset, layout, seed=1, start_step=33)
    assert torch.equal(torch.stack([next(later)[0] for _ in range(14)]), torch.stack(batches[66:]))
    through.close()
    later.close()


def test_a_loader_of_a_few_batches_ends_after_them(tmp_path: Path) -> None:
    dataset = write_shards(tmp_path, 500)
    batches = [np.array([0, 3]), np.array([5])]
    loader = TokenLoader(dataset, batches, torch.device("cpu"), prefetch=1)
    inputs = [inputs[:, 0].tolist() for inputs, _ in loader]
    assert inputs == [[0, 3 * T], [5 * T]]
    assert list(loader) == []
    loader.close()


def test_an_error_in_the_thread_reaches_the_training_loop_every_time(tmp_path: Path) -> None:
    dataset = write_shards(tmp_path, 5000)
    (tmp_path / "test_train_000000.npy").unlink()
    loader = load(dataset, StepLayout(4, 2))
    for _ in range(2):
        with pytest.raises(OSError, match=r"test_train_000000.npy: the shard was removed"):
            next(loader)
    loader.close()


def test_a_shard_cut_short_during_the_run_is_named_and_does_not_kill(tmp_path: Path) -> None:
    dataset = write_shards(tmp_path, 5000)
    with open(tmp_path / "test_train_000000.npy", "r+b") as file:
        file.truncate(4096)
    with pytest.raises(OSError, match="removed or changed"):
        dataset.windows(np.array([600]))


def test_mistakes_in_a_data_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no train shards .* `python dataset.py"):
        TokenDataset(tmp_path / "missing", "train", T)
    with pytest.raises(ValueError, match="no train shard holds 9 tokens"):
        write_shards(tmp_path / "short", 5)
    write_shards(tmp_path / "mixed", 50)
    np.save(tmp_path / "mixed" / "other_train_000001.npy", np.zeros(50, np.uint16))
    with pytest.raises(ValueError, match="several data sets"):
        TokenDataset(tmp_path / "mixed", "train", T)


@pytest.mark.parametrize(
    "shard",
    [np.zeros(50, np.int32), np.zeros((5, 10), np.uint16), np.array([{}], dtype=object)],
    ids=["dtype", "shape", "pickle"],
)
def test_a_foreign_array_is_no_shard(tmp_path: Path, shard: np.ndarray) -> None:
    np.save(tmp_path / "x_train_000000.npy", shard, allow_pickle=True)
    with pytest.raises(ValueError, match=r"x_train_000000\.npy"):
        TokenDataset(tmp_path, "train", T)


@pytest.mark.parametrize("size", [0, 10, 90, 200])
def test_a_truncated_shard_is_named(tmp_path: Path, size: int) -> None:
    write_shards(tmp_path, 100)
    with open(tmp_path / "test_train_000000.npy", "r+b") as file:
        file.truncate(size)
    with pytest.raises(ValueError, match=r"test_train_000000.npy is not a valid .npy file"):
        TokenDataset(tmp_path, "train", T)


def test_a_token_outside_the_vocabulary_is_named_with_its_shard(tmp_path: Path) -> None:
    dataset = write_shards(tmp_path, 100, 100)
    dataset.check_tokens(vocab_size=200)
    with pytest.raises(ValueError, match=r"test_train_000001\.npy: token 199"):
        dataset.check_tokens(vocab_size=199)
    dataset.check_tokens(vocab_size=199, rank=0, world_size=2)  # reads the first shard only


def test_the_fingerprint_is_the_content_with_an_index_and_without(tmp_path: Path) -> None:
    def fingerprint() -> list[list[str | int]]:
        return TokenDataset(tmp_path, "train", T).fingerprint()

    write_shards(tmp_path, 5000, 100)
    before = fingerprint()
    assert [entry[:2] for entry in before] == [
        ["test_train_000000.npy", 5000],
        ["test_train_000001.npy", 100],
    ]
    shard = tmp_path / "test_train_000000.npy"
    np.save(shard, np.load(shard)[::-1].copy())
    assert fingerprint() != before
    assert fingerprint()[1] == before[1]
    record = {"file": shard.name, "tokens": 5000, "sha256": "ab" * 32, "documents": 1}
    index = {
        "tokenizer": "gpt2",
        "source": "1 files",
        "revision": "",
        "units": 1,
        "shard_size": 5000,
        "max_tokens": None,
        "world_size": 1,
        "rank": 0,
        "shards": [{**record, "next": [1, 0, 0]}],
    }
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert fingerprint() == [[shard.name, 5000, "ab" * 32], before[1]]


@pytest.mark.parametrize("damage", ["zero", "folder", "fifo", "npz"])
def test_what_is_no_shard_is_named(damage: str, tmp_path: Path) -> None:
    write_shards(tmp_path, 100, 100)
    path = tmp_path / "test_train_000001.npy"
    path.unlink()
    if damage == "zero":
        np.save(path, np.zeros(0, np.uint16))
    elif damage == "folder":
        path.mkdir()
    elif damage == "fifo":
        os.mkfifo(path)
    else:
        with path.open("wb") as file:
            np.savez(file, np.zeros(5, np.uint16))
    with pytest.raises(ValueError, match=r"test_train_000001\.npy"):
        TokenDataset(tmp_path, "train", T)
