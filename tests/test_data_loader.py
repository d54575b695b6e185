"""The order of the data: a formula that is the same for any number of ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_loader import DataLoader, Share, TokenDataset, permute, window_order

T = 8


def write_shards(folder: Path, sizes: list[int], split: str = "train") -> np.ndarray:
    """Shards of consecutive integers; returns them all."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = np.arange(sum(sizes), dtype=np.uint16)
    start = 0
    for index, size in enumerate(sizes):
        np.save(folder / f"test_{split}_{index:06d}.npy", tokens[start : start + size])
        start += size
    return tokens


@given(n=st.integers(1, 3000), seed=st.integers(-(2**63), 2**64), epoch=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_every_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert sorted(permute(np.arange(n), n, seed, epoch)) == list(range(n))


def test_the_permutation_is_the_same_forever() -> None:
    # Written down once. A change here would send every resumed run to other data.
    assert permute(np.arange(10), 10, 1337, 0).tolist() == [4, 9, 2, 7, 8, 5, 0, 1, 6, 3]
    assert permute(np.arange(10), 10, 1337, 1).tolist() == [1, 9, 0, 8, 7, 4, 2, 5, 6, 3]


def test_epochs_and_seeds_give_unrelated_orders() -> None:
    n = 5000
    orders = [permute(np.arange(n), n, seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    orders.append(np.arange(n))
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.06


@given(
    n=st.integers(1, 200),
    start=st.integers(0, 500),
    length=st.integers(1, 400),
    seed=st.integers(0, 9),
    shuffle=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_starting_at_a_position_equals_skipping_to_it(
    n: int, start: int, length: int, seed: int, shuffle: bool
) -> None:
    whole = window_order(np.arange(start + length), n, seed, shuffle)
    part = window_order(np.arange(start, start + length), n, seed, shuffle)
    assert np.array_equal(whole[start:], part)


@given(shuffle=st.booleans(), n=st.integers(1, 300), epoch=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_an_epoch_visits_every_window_once(shuffle: bool, n: int, epoch: int) -> None:
    windows = window_order(np.arange(epoch * n, (epoch + 1) * n), n, 3, shuffle)
    assert sorted(windows) == list(range(n))


@given(
    world_size=st.sampled_from([1, 2, 4, 8]),
    micro_batch=st.sampled_from([1, 2, 4, 8]),
    step=st.integers(0, 50),
)
@settings(max_examples=60, deadline=None)
def test_every_step_sees_the_same_positions_for_any_ranks_and_micro_batch(
    world_size: int, micro_batch: int, step: int
) -> None:
    seen = []
    for rank in range(world_size):
        share = Share(64, micro_batch, rank, world_size)
        seen += [share.positions(step, m) for m in range(share.micro_steps())]
    assert sorted(np.concatenate(seen)) == list(range(64 * step, 64 * (step + 1)))


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_ranks_load_disjoint_tokens_that_make_up_the_step(
    tmp_path: Path, world_size: int, micro_batch: int
) -> None:
    tokens = write_shards(tmp_path, [101, 101, 60])
    dataset = TokenDataset(tmp_path, "train", T)
    assert len(dataset) == 12 + 12 + 7
    rows = []
    for rank in range(world_size):
        share = Share(8, micro_batch, rank, world_size)
        loader = DataLoader(dataset, share, torch.device("cpu"), seed=5, start_step=3)
        for _ in range(share.micro_steps()):
            inputs, targets = next(loader)
            assert inputs.shape == targets.shape == (micro_batch, T)
            assert torch.equal(inputs[:, 1:], targets[:, :-1])
            assert torch.equal(targets, inputs + 1)  # the shards count upwards
            rows += inputs[:, 0].tolist()
        loader.close()
    starts = [0, 101, 202]
    firsts = np.concatenate(
        [s + T * np.arange(n) for s, n in zip(starts, (12, 12, 7), strict=True)]
    )
    expected = tokens[firsts[window_order(np.arange(24, 32), 31, 5, True)]]
    assert sorted(rows) == sorted(expected.tolist())


def test_a_loader_started_later_goes_on_as_one_that_ran_through(tmp_path: Path) -> None:
    write_shards(tmp_path, [500])
    dataset, share = TokenDataset(tmp_path, "train", T), Share(4, 2)
    through = DataLoader(dataset, share, torch.device("cpu"), seed=1)
    batches = [next(through)[0] for _ in range(80)]  # 40 steps: more than two epochs of 62 windows
    later = DataLoader(dataset, share, torch.device("cpu"), seed=1, start_step=33)
    assert torch.equal(torch.stack([next(later)[0] for _ in range(14)]), torch.stack(batches[66:]))
    through.close()
    later.close()


def test_an_error_in_the_thread_reaches_the_training_loop_every_time(tmp_path: Path) -> None:
    write_shards(tmp_path, [5000])
    dataset = TokenDataset(tmp_path, "train", T)
    (tmp_path / "test_train_000000.npy").unlink()
    loader = DataLoader(dataset, Share(4, 2), torch.device("cpu"))
    for _ in range(2):
        with pytest.raises(OSError, match=r"test_train_000000.npy: the shard was removed"):
            next(loader)
    loader.close()


def test_a_shard_cut_short_during_the_run_is_named_and_does_not_kill(tmp_path: Path) -> None:
    write_shards(tmp_path, [5000])
    dataset = TokenDataset(tmp_path, "train", T)
    with open(tmp_path / "test_train_000000.npy", "r+b") as file:
        file.truncate(4096)
    with pytest.raises(OSError, match="removed or changed"):
        dataset.windows(np.array([600]))


def test_mistakes_in_a_data_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no train shards .* `python dataset.py"):
        TokenDataset(tmp_path / "missing", "train", T)
    write_shards(tmp_path / "short", [5])
    with pytest.raises(ValueError, match="no train shard holds 9 tokens"):
        TokenDataset(tmp_path / "short", "train", T)
    write_shards(tmp_path / "mixed", [50])
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
    write_shards(tmp_path, [100])
    with open(tmp_path / "test_train_000000.npy", "r+b") as file:
        file.truncate(size)
    with pytest.raises(ValueError, match=r"test_train_000000.npy: not a whole .npy file"):
        TokenDataset(tmp_path, "train", T)


def test_a_token_outside_the_vocabulary_is_named_with_its_shard(tmp_path: Path) -> None:
    write_shards(tmp_path, [100, 100])
    dataset = TokenDataset(tmp_path, "train", T)
    dataset.check_tokens(vocab_size=200)
    with pytest.raises(ValueError, match=r"test_train_000001\.npy: token 199"):
        dataset.check_tokens(vocab_size=199)
    dataset.check_tokens(vocab_size=199, rank=0, world_size=2)  # reads the first shard only
