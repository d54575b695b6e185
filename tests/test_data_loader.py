"""From shards to batches: the order of the data, what reaches the device, and whose fault it is."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_loader import StepLayout, TokenDataset, TokenLoader, permute, window_order

T = 8


def write_shards(folder: Path, *sizes: int) -> TokenDataset:
    """The data set of shards in which each token is its own position."""
    tokens = np.arange(sum(sizes), dtype=np.uint16)
    for index, shard in enumerate(np.split(tokens, np.cumsum(sizes)[:-1])):
        np.save(folder / f"test_train_{index:06d}.npy", shard)
    return TokenDataset(folder, "train", T, vocab_size=2**16)


def load(dataset: TokenDataset, layout: StepLayout, start_step: int = 0) -> TokenLoader:
    """A loader of a rank's shuffled micro-batches, as train.py starts one."""
    batches = layout.batches(len(dataset), seed=5, shuffle=True, start_step=start_step)
    return TokenLoader(dataset, batches, torch.device("cpu"), prefetch=6)


def test_the_permutation_is_the_same_forever() -> None:
    # Written down once. A change here would send every resumed run to other data.
    assert permute(np.arange(10), 10, 1337, 0).tolist() == [4, 9, 2, 7, 8, 5, 0, 1, 6, 3]
    assert permute(np.arange(10), 10, 1337, 1).tolist() == [1, 9, 0, 8, 7, 4, 2, 5, 6, 3]
    n = 19_335_937  # windows of 99 shards: two epochs' border, and a negative seed
    order = window_order(np.arange(2 * n - 500, 2 * n + 500), n, seed=-7, shuffle=True)
    assert (
        hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()
        == "3e075aad9cb913b016bc6b597dced9d24fb493edccd14caa3cf3f93f5a79a6ec"
    )


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


@given(st.integers(1, 3000), st.integers(-(2**63), 2**64), st.integers(0, 10**6), st.booleans())
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
        loader = load(dataset, layout, start_step=3)
        for _ in range(layout.micro_steps()):
            inputs, targets = next(loader)
            assert inputs.shape == targets.shape == (micro_batch, T)
            assert inputs.dtype == targets.dtype == torch.int64
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
    through = load(dataset, layout)
    batches = [next(through)[0] for _ in range(80)]  # 40 steps: more than two epochs of 62 windows
    later = load(dataset, layout, start_step=33)
    assert torch.equal(torch.stack([next(later)[0] for _ in range(14)]), torch.stack(batches[66:]))
    through.close()
    later.close()


def test_copies_to_the_device_are_of_uint16_and_not_in_the_background_but_on_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = []  # MPS would read pageable memory after it was freed (pytorch#189690)

    def to(tokens: torch.Tensor, device: torch.device, non_blocking: bool) -> torch.Tensor:
        copies.append((tokens.dtype, device.type, non_blocking))
        return tokens

    monkeypatch.setattr(torch.Tensor, "to", to)
    loader = TokenLoader(write_shards(tmp_path, 50), [np.array([0])], torch.device("mps"), 1)
    next(loader)
    loader.close()
    assert copies == [(torch.uint16, "mps", False)]


def test_more_shards_than_a_process_may_open_files(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    dataset = write_shards(tmp_path, *[T + 1] * 300)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        windows = dataset.windows(np.arange(300))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert np.array_equal(windows.ravel(), np.arange(300 * (T + 1)))


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 9000)])
def test_a_shard_lost_during_the_run_is_named_each_time(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    dataset = write_shards(tmp_path, 5000)
    damage(tmp_path / "test_train_000000.npy")
    loader = load(dataset, StepLayout(4, 2))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"test_train_000000\.npy: .*removed or cut short"):
            next(loader)
    loader.close()
