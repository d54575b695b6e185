"""Several ranks and machines: what they send each other, and what a death among them does."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launcher import (
    LONG,
    TINY,
    fork,
    free_port,
    metrics,
    run_well,
    saved_steps,
    start_torchrun,
    steps_done,
    wait_for,
    write_shards,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from model import GPT, GPTConfig

PLAIN = ("--val-every", "0", "--sample-every", "0", "--max-steps", "20")


def count_rounds(run: Any) -> None:
    """Rank 0 leaves how many rounds of all-reduce its steps have made."""

    def hook(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        run.rounds += bucket.is_last()  # a round is one of each bucket
        return allreduce_hook(group, bucket)

    if run.step == 0:
        run.rounds = 0
        run.ddp.register_comm_hook(dist.group.WORLD, hook)
    if run.dist_info.rank == 0:
        counts = [run.micro_steps, run.step, run.rounds]
        Path("rounds.json").write_text(json.dumps(counts))


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


@pytest.mark.parametrize(("ranks", "micro_batch"), [(2, 2), (4, 1)])
def test_gradients_are_exchanged_once_a_step(folder: Path, ranks: int, micro_batch: int) -> None:
    flags = (*PLAIN, "--micro-batch", str(micro_batch))
    run_well(folder, *flags, ranks=ranks, on_step=count_rounds)
    micro_steps, steps, rounds = json.loads((folder / "rounds.json").read_text())
    assert (micro_steps, steps, rounds) == (4, 19, 19)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-lr", "0.02"], ["max_lr is 0.01 on rank 0 and 0.02 on rank 1"]),
        (["--seed", "7"], ["seed is 1337 on rank 0 and 7 on rank 1"]),
        (["--resume"], ["resume is False on rank 0 and True on rank 1"]),
        (["--data-dir", "other"], ["the digest of the shards in data_dir is"]),
        (["--data-dir", "nowhere"], ["nowhere: no train shards"]),
    ],
)
def test_a_rank_that_differs_ends_all_before_the_first_step(
    folder: Path, flags: list[str], words: list[str]
) -> None:
    write_shards(folder / "other")
    (folder / "other/tiny_train_000002.npy").unlink()
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    trainings = [
        fork(folder, ["train.py", *TINY, *own], world | {"RANK": str(rank)})
        for rank, own in enumerate(([], flags))
    ]
    assert [training.wait() for training in trainings] == [2, 2]
    for training in trainings:
        assert training.err.count("\n") == 1, training.err
        for word in words:
            assert word in training.err
    assert not (folder / "log/metrics.jsonl").exists()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_gradients_in_bf16_train_the_same_but_for_rounding(folder: Path, optimizer: str) -> None:
    for log, flags in (("fp32", ()), ("bf16", ("--bf16-grads",))):
        run_well(folder, *PLAIN, "--log-dir", log, "--optimizer", optimizer, *flags, ranks=2)
    exact, rounded = (metrics(folder / log, "train") for log in ("fp32", "bf16"))
    assert list(exact) == list(rounded)
    losses = [(exact[key]["loss"], rounded[key]["loss"]) for key in exact]
    assert losses[-1][0] != losses[-1][1]  # the flag does something
    assert all(a == pytest.approx(b, abs=0.02) for a, b in losses)


def test_two_machines_train_and_the_death_of_one_ends_both_with_a_message(folder: Path) -> None:
    """Two agents of torchrun, which here share a machine."""
    options = ("--nnodes=2", "--nproc-per-node=1", f"--rdzv-endpoint=127.0.0.1:{free_port()}")
    agents = [
        start_torchrun(folder, *LONG, options=(*options, f"--node-rank={node}"))
        for node in range(2)
    ]
    wait_for(lambda: steps_done(folder / "log") > 20)
    agents[1].kill(signal.SIGKILL)  # its worker is left, as when a supervisor kills just the agent
    assert [agent.wait() for agent in agents] == [1, -signal.SIGKILL]
    assert "train.py: another rank has failed" in agents[0].err
    wait_for(lambda: "train.py: torchrun has died" in agents[1].err)
    last = steps_done(folder / "log")
    assert list(metrics(folder / "log", "train")) == [("train", step) for step in range(last)]
    assert saved_steps(folder / "log")[-1] == last
