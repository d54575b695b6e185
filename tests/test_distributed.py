"""Several ranks and machines: what they send each other, and in what they must not differ."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from launcher import (
    fork,
    free_port,
    metrics,
    read_files,
    run_well,
    saved_steps,
    tiny,
    write_shards,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import train
from gptxs.distributed import DistInfo
from model import GPT, GPTConfig

PLAIN = ("--val-every", "0", "--sample-every", "0", "--max-steps", "20")


@pytest.mark.parametrize("recomputed", [0, 3])
def test_the_parallel_model_compiles_into_a_graph_for_each_bucket(recomputed: int) -> None:
    """Then the exchange of one bucket overlaps the backward pass of the next."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(d_model=128, n_heads=4, n_layers=4, context_length=16, vocab_size=512))
    idx = torch.randint(512, (2, 2, 16))
    model(*idx).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.recomputed_blocks = recomputed
    # "aot_eager" traces both passes as Inductor's front end does, without a C++ compiler.
    graphs = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=1)
        compiled = torch.compile(ddp, dynamic=False, backend=graphs)
        with torch._dynamo.config.patch(suppress_errors=False):
            for ddp.require_backward_grad_sync in (False, True):
                (compiled(*idx) / 2).backward()
    finally:
        dist.destroy_process_group()
    assert len(graphs.graphs) > 2
    nodes = [str(node.target) for graph in graphs.graphs for node in graph.graph.nodes]
    assert nodes.count("tag_activation_checkpoint") == recomputed
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def count_exchanges() -> None:
    """Each round of all-reduce, which is one of every bucket, leaves a line."""
    wrap = train.wrap_ddp

    def hook(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        if bucket.is_last():
            with Path(f"rounds{dist.get_rank()}").open("a") as file:
                file.write("a round\n")
        return allreduce_hook(group, bucket)

    def wrap_and_count(*arguments: Any) -> DistributedDataParallel:
        ddp = wrap(*arguments)
        ddp.register_comm_hook(dist.group.WORLD, hook)
        return ddp

    train.wrap_ddp = wrap_and_count


@pytest.mark.parametrize(("ranks", "micro_batch"), [(2, 2), (4, 1)])
def test_gradients_are_exchanged_once_a_step(folder: Path, ranks: int, micro_batch: int) -> None:
    flags = (*PLAIN, "--micro-batch", str(micro_batch))
    out = run_well(folder, *flags, ranks=ranks, before=count_exchanges)
    assert "in 4 micro-steps" in out
    assert [len((folder / f"rounds{i}").read_text().splitlines()) for i in range(2)] == [20, 20]


def train_apart(folders: list[Path], flags: list[list[str]]) -> list[tuple[int, str]]:
    """Two ranks with folders and flags of their own: the exit code and error of each."""
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    trainings = [
        fork(folder, tiny(*own), world | {"RANK": str(rank)})
        for rank, (folder, own) in enumerate(zip(folders, flags, strict=True))
    ]
    results = [(training.wait(), training.err) for training in trainings]
    assert [err.count("\n") for _, err in results] == [1, 1], results
    return results


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--max-lr", "0.02"], ["max_lr is 0.01 here and 0.02", "max_lr is 0.02 here and 0.01"]),
        (["--resume"], ["resume is False here and True", "resume is True here and False"]),
        (["--init-from", "source"], ["init_from is None", "init_from is source"]),
        (["--data-dir", "other"], ["the digest of the shards in data_dir is"] * 2),
        (["--data-dir", "nowhere"], ["", "nowhere has no train shards"]),
    ],
)
def test_a_rank_that_differs_ends_all_before_the_first_step(
    folder: Path, flags: list[str], names: list[str]
) -> None:
    write_shards(folder / "other")
    (folder / "other/tiny_train_000002.npy").unlink()
    results = train_apart([folder, folder], [[], flags])
    assert results[1][0] == 2
    for (_, err), name in zip(results, names, strict=True):
        assert name in err
    assert not (folder / "log/metrics.jsonl").exists()


def test_a_machine_that_does_not_see_the_log_folder_is_told_to_share_it(copy: Path) -> None:
    """The checkpoint that the other one has found is good, and stays."""
    other = copy / "other"
    write_shards(other / "data")
    before = read_files(copy / "log")
    flags = ["--resume", "--max-steps", "42"]
    _, (code, err) = train_apart([copy, other], [flags, flags])
    assert code == 2
    assert "share" in err
    assert "delete" not in err
    assert read_files(copy / "log") == before
    assert saved_steps(copy / "log")[-1] == 40


def test_ranks_wait_for_each_other_longer_than_nccl_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 may download HellaSwag, or verify a checkpoint of 20 GB, meanwhile."""
    init = Mock()
    monkeypatch.setattr(dist, "init_process_group", init)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    info = DistInfo.initialize("cpu")
    assert (info.rank, info.world_size) == (1, 2)
    assert init.call_args.kwargs["timeout"].total_seconds() >= 1800


def test_gradients_in_bf16_train_the_same_but_for_rounding(folder: Path) -> None:
    for log, flags in (("fp32", ()), ("bf16", ("--bf16-grads",))):
        run_well(folder, *PLAIN, "--log-dir", log, *flags, ranks=2)
    exact, rounded = (metrics(folder / log, "train") for log in ("fp32", "bf16"))
    assert list(exact) == list(rounded)
    losses = [(exact[key]["loss"], rounded[key]["loss"]) for key in exact]
    assert losses[-1][0] != losses[-1][1]  # the flag does something
    assert all(a == pytest.approx(b, abs=0.02) for a, b in losses)
