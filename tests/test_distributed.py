"""Device, precision and the signal that stops a run; several ranks and machines."""

import os
import platform
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from launcher import ROOT, fork, metrics, run_well, tiny, worlds, write_shards
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import train
from gptxs import checkpoint
from gptxs.distributed import DistInfo, StopSignal, choose_device, choose_dtype
from model import GPT, GPTConfig

MonkeyPatch = pytest.MonkeyPatch
CPU = torch.device("cpu")
PLAIN = ("--val-every", "0", "--sample-every", "0", "--max-steps", "20")


def test_each_rank_has_a_gpu_of_its_own_and_waits_for_the_others(monkeypatch: MonkeyPatch) -> None:
    """Events and streams belong to the current device: on another one they record nothing."""
    set_device = Mock()
    monkeypatch.setattr(torch, "empty", lambda *_, device: Mock(device=torch.device(device)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert DistInfo.initialize("cpu").device == CPU
    set_device.assert_not_called()
    assert DistInfo.initialize("auto").device == torch.device("cuda:1")
    set_device.assert_called_once_with(torch.device("cuda:1"))
    assert DistInfo.initialize("cuda:0").device == torch.device("cuda:0")  # as it is told
    # Rank 0 may download HellaSwag meanwhile: they wait for it longer than NCCL would.
    init = Mock()
    monkeypatch.setattr(dist, "init_process_group", init)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    info = DistInfo.initialize("auto")
    assert info == DistInfo(1, 2, torch.device("cuda:1"), torch.float16)
    assert init.call_args.args == ("nccl",)
    assert init.call_args.kwargs["timeout"].total_seconds() >= 1800


def lack_the_compiler_on_rank_0() -> None:
    problem = "no compiler here" if os.environ["RANK"] == "0" else None
    train.compiler.compiler_problem = lambda *_: problem
    train.compiler.compile_model = Mock(side_effect=RuntimeError("a rank compiled"))


def test_all_ranks_compile_or_none_does(folder: Path) -> None:
    """Else the others would wait for the slow one in each step, and nobody would know why."""
    flags = (*PLAIN, "--compile")
    out = run_well(folder, *flags, ranks=2, before=lack_the_compiler_on_rank_0)
    assert "training without torch.compile: no compiler here\n" in out


@pytest.mark.parametrize("name", ["cuda:77", "gpu", "xpu"])
def test_a_device_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"--device {name} cannot be used here: .") as error:
        choose_device(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("has_bf16", [False, True])
def test_bf16_is_chosen_where_the_hardware_has_it(monkeypatch: MonkeyPatch, has_bf16: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_tile": has_bf16})
    assert choose_dtype("auto", CPU) == (torch.bfloat16 if has_bf16 else torch.float32)
    assert choose_dtype("fp16", CPU) == torch.float16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    gpu = choose_dtype("auto", torch.device("cuda"))
    assert gpu == (torch.bfloat16 if has_bf16 else torch.float16)


COUNT_BYTES = """
import resource, torch
from gptxs.distributed import choose_device
choose_device("cpu")
for _ in range(20):
    torch.zeros(2**24) + 1  # two tensors of 64 MiB, freed at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt * resource.getpagesize())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_on_a_cpu_the_system_need_not_clear_memory_for_each_step() -> None:
    command = [sys.executable, "-c", COUNT_BYTES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20 * 2**26  # of 40 tensors, and the imports


def test_tasks_of_slurm_without_torchrun_are_refused(monkeypatch: MonkeyPatch) -> None:
    """Each would take itself for the only one, and all write to one folder."""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(ValueError, match="start one torchrun on each node"):
        DistInfo.initialize("cpu")
    monkeypatch.setenv("RANK", "0")  # there is a torchrun
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert DistInfo.initialize("cpu", "fp32") == DistInfo(0, 1, CPU)


def test_a_signal_asks_for_an_orderly_stop_and_ctrl_c_after_it_ends_at_once() -> None:
    before = [signal.getsignal(number) for number in signal.valid_signals()]
    with suppress(KeyboardInterrupt), StopSignal() as stop:
        assert stop.name == ""
        signal.raise_signal(signal.SIGTERM)
        assert stop.name == "SIGTERM"
        signal.raise_signal(signal.SIGINT)
        pytest.fail("went on")
    # So that the next Ctrl-C, in a notebook, is one.
    assert [signal.getsignal(number) for number in signal.valid_signals()] == before


def test_nohup_lets_a_run_outlive_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, before)
    assert stop.name == ""


def test_the_parallel_model_compiles_into_a_graph_for_each_bucket() -> None:
    """Then the exchange of one bucket overlaps the backward pass of the next."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(d_model=128, n_heads=4, n_layers=4, context_length=16, vocab_size=512))
    idx = torch.randint(512, (2, 2, 16))
    model(*idx).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.recomputed_blocks = 3
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
    assert nodes.count("tag_activation_checkpoint") == 3
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def count_exchanges() -> None:
    """Each round of all-reduce, of which every bucket has a part, leaves a line."""
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
    assert "\n4 micro-steps a step" in out
    assert [len((folder / f"rounds{i}").read_text().splitlines()) for i in range(2)] == [20, 20]


def train_apart(folders: list[Path], flags: list[list[str]]) -> list[tuple[int, str]]:
    """Two ranks with folders and flags of their own: the exit code and error of each."""
    trainings = [
        fork(folder, tiny(*own), world)
        for folder, own, world in zip(folders, flags, worlds(2), strict=True)
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
        (["--data-dir", "other"], ["train_000002.npy is (5000,", "000002.npy is missing here"]),
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
    other = copy / "other"
    write_shards(other / "data")
    flags = ["--resume", "--max-steps", "42"]
    _, (code, err) = train_apart([copy, other], [flags, flags])
    assert code == 2
    assert "share" in err
    assert "delete" not in err
    checkpoint.verify(copy / "log/step_000040")  # is good, and stays


def test_gradients_in_bf16_train_the_same_but_for_rounding(folder: Path) -> None:
    for log, flags in (("fp32", ()), ("bf16", ("--bf16-grads",))):
        run_well(folder, *PLAIN, "--log-dir", log, *flags, ranks=2)
    rows = [metrics(folder / log, "train").values() for log in ("fp32", "bf16")]
    exact, rounded = ([row["loss"] for row in run] for run in rows)
    assert exact[-1] != rounded[-1]  # the flag does something
    assert rounded == pytest.approx(exact, abs=0.02)
