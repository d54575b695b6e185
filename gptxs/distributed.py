"""The device and its precision, the ranks of a distributed run, and the signal that stops it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from gptxs.cli import first_line
from gptxs.memory import keep_freed_memory

DtypeName = Literal["auto", "bf16", "fp16", "fp32"]
Result = TypeVar("Result")

# That ranks wait for each other: at the start, when rank 0 may download HellaSwag or verify
# checkpoints, and once they train, when only a dead rank takes as long.
START_TIMEOUT = timedelta(minutes=30)
STEP_TIMEOUT = timedelta(minutes=10)


def choose_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is the machine's accelerator, or the CPU without one.

    Raises ValueError when the device does not exist or cannot be used.
    """
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        device = torch.empty(0, device=name).device  # fails here rather than during the run
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used here: {first_line(error)}") from None
    if device.type == "cuda":
        # Events and streams are created on the current device unless told otherwise.
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def choose_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """The precision of the matrix products.

    "auto" is bf16 where the hardware has it, fp16 on other GPUs, and fp32 on other CPUs.
    """
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    has_bf16 = True
    if device.type == "cpu":  # without these instructions bf16 is emulated, slower than fp32
        capabilities = torch.cpu.get_capabilities()
        has_bf16 = capabilities.get("avx512_bf16", False) or capabilities.get("amx_tile", False)
    elif device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if has_bf16:
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def _rank_from_environment() -> tuple[int, int, int]:
    """Rank, number of processes and rank on this machine, as torchrun sets them."""
    env = os.environ
    if "RANK" not in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise ValueError(
            "srun has started several processes; let it start one torchrun on each node instead"
            " (docs/cluster.md)"
        )
    rank, world_size = int(env.get("RANK", "0")), int(env.get("WORLD_SIZE", "1"))
    if ("RANK" in env) != ("WORLD_SIZE" in env) or rank >= world_size:
        raise ValueError(
            f"RANK {env.get('RANK')} and WORLD_SIZE {env.get('WORLD_SIZE')} do not fit each other;"
            " start with torchrun, or unset both"
        )
    return rank, world_size, int(env.get("LOCAL_RANK", "0"))


@dataclass(frozen=True)
class DistInfo:
    """This process among those of a distributed run."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype = torch.float32  # of the matrix products

    @classmethod
    def initialize(cls, device_name: str, dtype_name: DtypeName = "auto") -> DistInfo:
        """Choose this process's device, and join the process group where there are several."""
        rank, world_size, local_rank = _rank_from_environment()
        if device_name in ("auto", "cuda") and torch.cuda.is_available():
            device_name = f"cuda:{local_rank}"  # one GPU for each process
        device = choose_device(device_name)
        if world_size > 1:
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=START_TIMEOUT)
        return cls(rank, world_size, device, choose_dtype(dtype_name, device))

    def autocast(self) -> torch.autocast:
        """The block computes its matrix products in ``dtype``; weights stay in fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def limit_waits(self) -> None:
        """From now on end the process where another rank keeps it waiting for STEP_TIMEOUT."""
        if self.world_size > 1:
            # torch 2.14 has a public name for it.
            set_timeout = getattr(dist, "set_timeout", None) or c10d._set_pg_timeout
            set_timeout(STEP_TIMEOUT)

    def on_rank_0(self, function: Callable[[], Result]) -> Result:
        """The result of ``function``, which rank 0 alone calls, on every rank.

        Where it raises, rank 0 ends and torchrun stops the others.
        """
        outcome: list[Any] = [function() if self.rank == 0 else None]
        if self.world_size > 1:
            dist.broadcast_object_list(outcome)
        return outcome[0]

    def require_equal(self, facts: Mapping[str, object]) -> None:
        """Raise ValueError, on every rank, that names the facts in which the ranks differ."""
        texts = {name: str(value) for name, value in facts.items()}
        of_all_ranks = [texts] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(of_all_ranks, texts)
        for rank, other in enumerate(of_all_ranks):
            for name in {**texts, **other}:
                here, there = texts.get(name, "missing"), other.get(name, "missing")
                if here != there:
                    raise ValueError(
                        f"all ranks must have the same settings and data, but {name} is {here}"
                        f" here and {there} on rank {rank}"
                    )


def wrap_ddp(
    model: torch.nn.Module, device: torch.device, bf16_grads: bool
) -> DistributedDataParallel:
    """The model with its gradients averaged over the ranks in the backward pass.

    ``bf16_grads`` halves the traffic: the gradients are rounded to bf16 before they are summed.
    """
    # Not static_graph: with gradient accumulation it stops synchronizing (pytorch#187732).
    ddp = DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        # Gradients stay in the buckets that were exchanged: no copy back. One into them remains,
        # 148 kernels that read and write 0.5 GB at 124M, since zero_grad frees the gradients. With
        # set_to_none=False they would be zeroed, added to and divided: three passes, not one.
        gradient_as_bucket_view=True,
        # The compiled step is split into a graph for each bucket. DDP's default of 25 MB makes 13
        # graphs of 124M, cut inside the blocks, which write and read 3.3 GB more in a micro-step of
        # 64 x 512 tokens; 100 MB makes 4 and 0.55 GB, by Inductor's own count.
        bucket_cap_mb=100,
    )
    if bf16_grads:
        # A function around torch's own hook, whose name DDP refuses in a build without CUDA.
        ddp.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
    return ddp


class StopSignal:
    """Within its block SIGTERM, SIGINT, SIGUSR1 and SIGHUP ask for an orderly stop.

    A SIGINT after any of them raises KeyboardInterrupt. Python lets the main thread alone handle
    signals: in another thread, as in a notebook's, nothing is changed.
    """

    def __init__(self) -> None:
        self.name = ""  # of the newest signal; empty until there is one
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows lacks the last two
                # nohup has SIGHUP ignored, so that a run survives the end of its terminal.
                ignored = name == "SIGHUP" and number and signal.getsignal(number) == signal.SIG_IGN
                if number and not ignored:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
