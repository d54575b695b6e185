"""Several ranks and machines: what they send each other, and what a death among them does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launcher import TINY, free_port, metrics, run, wait_for, write_shards
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from model import GPT, GPTConfig

ROOT = Path(__file__).parents[1]
PLAIN = ("--val-every", "0", "--sample-every", "0", "--max-steps", "20")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with shards in ``data``, in which runs write to ``log``."""
    write_shards(tmp_path / "data")
    return tmp_path


def count_rounds() -> None:
    """Rank 0 leaves the number of its all-reduce rounds, and the types that they carry."""
    import train

    parallel, fit = train.DistributedDataParallel, train.Run.fit
    rounds: list[bool] = []

    def counting(*arguments: Any, **options: Any) -> Any:
        ddp = parallel(*arguments, **options)

        def hook(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            rounds.append(bucket.is_last())  # a round is one of each bucket
            return allreduce_hook(group, bucket)

        ddp.register_comm_hook(dist.group.WORLD, hook)
        return ddp

    def fit_and_tell(self: Any) -> None:
        fit(self)
        if self.world.rank == 0:
            Path("rounds.json").write_text(json.dumps([self.micro_steps, sum(rounds)]))

    train.DistributedDataParallel, train.Run.fit = counting, fit_and_tell


def test_the_parallel_model_compiles_into_a_graph_for_each_bucket() -> None:
    """Then the exchange of one bucket overlaps the backward pass of the next."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(d_model=128, n_heads=4, n_layers=8, context_length=16, vocab_size=512))
    idx = torch.randint(512, (2, 2, 16))
    model(*idx).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
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
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize(("ranks", "micro_batch"), [(2, 2), (4, 1)])
def test_gradients_are_exchanged_once_a_step(folder: Path, ranks: int, micro_batch: int) -> None:
    flags = (*PLAIN, "--micro-batch", str(micro_batch))
    code, _, err = run(folder, *flags, ranks=ranks, fault=count_rounds)
    assert (code, err) == (0, "")
    micro_steps, rounds = json.loads((folder / "rounds.json").read_text())
    assert (micro_steps, rounds) == (4, 20)


def test_gradients_in_bf16_train_the_same_but_for_rounding(folder: Path) -> None:
    for log, flags in (("fp32", ()), ("bf16", ("--bf16-grads",))):
        code, _, err = run(folder, *PLAIN, "--log-dir", log, *flags, ranks=2)
        assert (code, err) == (0, "")
    exact, rounded = (metrics(folder / log, "train") for log in ("fp32", "bf16"))
    assert list(exact) == list(rounded)
    losses = [(exact[key]["loss"], rounded[key]["loss"]) for key in exact]
    assert losses[-1][0] != losses[-1][1]  # the flag does something
    assert all(a == pytest.approx(b, abs=0.02) for a, b in losses)


# -- two machines: two agents of torchrun, which here share one ----------------------------------


def start_agents(folder: Path, *flags: str) -> list[subprocess.Popen[bytes]]:
    """torchrun with --nnodes=2, once a node, printing to ``node0`` and ``node1``."""
    endpoint = f"--rdzv-endpoint=127.0.0.1:{free_port()}"
    agents = []
    for node in range(2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", endpoint]
        command += [f"--node-rank={node}", "--nproc-per-node=1", str(ROOT / "train.py")]
        with (folder / f"node{node}").open("wb") as out:
            agents.append(
                subprocess.Popen(
                    [*command, *TINY, *flags],
                    cwd=folder,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            )
    return agents


def test_two_machines_train_and_the_death_of_one_ends_both_with_a_message(folder: Path) -> None:
    agents = start_agents(folder, "--max-steps", "10", "--val-every", "0", "--sample-every", "0")
    assert [agent.wait(timeout=120) for agent in agents] == [0, 0]
    assert list(metrics(folder / "log", "train")) == [("train", step) for step in range(10)]

    agents = start_agents(folder, "--max-steps", "100000", "--log-dir", "endless")
    try:
        wait_for(lambda: ("train", 20) in metrics(folder / "endless", "train"))
        begun = time.monotonic()
        agents[1].kill()  # its worker is left behind, as when a supervisor kills just the agent
        assert agents[1].wait() == -signal.SIGKILL
        assert agents[0].wait(timeout=60) == 1
        assert time.monotonic() - begun < 60
    finally:
        for agent in agents:
            agent.kill()
    assert "train.py: another rank has died" in (folder / "node0").read_text()
    assert "train.py: torchrun has died" in (folder / "node1").read_text()
    steps = [step for _, step in metrics(folder / "endless", "train")]
    assert (folder / "endless" / f"step_{steps[-1] + 1:06d}" / "training_state.pt").exists()
