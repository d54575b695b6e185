"""torch.compile for the training step, the profiler, and what to do when a GPU cannot go on."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch
import torch._functorch.config

from gptxs.cli import first_line

FIRST_TRACED_STEP = 5  # counted from 1: earlier ones compile and allocate
CPU_STEPS = 200  # compiling takes a CPU about a minute: fewer steps do not recoup it


def compiler_problem(device: torch.device, steps: int) -> str | None:
    """Why not to compile a run of that many steps; None where torch.compile works and pays.

    A laptop may lack the C++ compiler that Inductor needs. The model itself would fail only in its
    first backward pass, where torch's fall-back to uncompiled code does not apply.
    """
    if device.type == "mps":
        return "on mps compiled code may compute other numbers (pytorch#171764)"
    if device.type == "cpu" and steps < CPU_STEPS:
        return f"fewer than {CPU_STEPS} steps do not recoup it"
    x = torch.ones(2, device=device, requires_grad=True)
    try:
        torch.compile(torch.sin)(x).sum().backward()
    except Exception as error:  # whatever the compiler raises: the run goes on without it
        return first_line(error)
    return None


def compile_model(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model, or its DDP wrapper, compiled for static shapes."""
    from torch._inductor import config as inductor  # takes a second

    # A budget below 1 computes norms and GELU again in the backward pass instead of keeping them.
    # On a CPU that is nothing beside the matrix products, and saves a fifth of the memory at 124M
    # in bf16. On a GPU these operations wait for memory.
    torch._functorch.config.activation_memory_budget = 0.95 if device.type == "cpu" else 1.0
    # Otherwise Inductor chooses between kernels by their time, and they add in different orders.
    inductor.deterministic = torch.are_deterministic_algorithms_enabled()
    # DDP's forward has a mark for the profiler, of which every rank would say that it is ignored.
    logging.getLogger("torch._dynamo.variables.ctx_manager").setLevel(logging.ERROR)
    # Compiling the DDP wrapper, not the module in it, splits the graph at its buckets, so that the
    # all-reduce of the last layers' gradients overlaps the backward pass of the first.
    return torch.compile(model, dynamic=False)  # type: ignore[return-value]  # typed as a callable


def explain(error: RuntimeError, micro_batch: int) -> Exception:
    """An error of a run with its remedy, where it is the GPU's memory or the compiler that failed.

    A backend may fail after the probe: a full temporary folder, a kernel that does not build.
    """
    if isinstance(error, torch.OutOfMemoryError):
        remedy = f"--micro-batch {micro_batch // 2}" if micro_batch > 1 else "--recompute 1"
        return MemoryError(f"out of GPU memory at --micro-batch {micro_batch}; use {remedy}")
    dynamo = sys.modules.get("torch._dynamo.exc")  # which takes seconds to import
    if dynamo is not None and isinstance(error, dynamo.TorchDynamoException):
        return RuntimeError(
            f"torch.compile failed ({first_line(error)}): train with --no-compile, or give"
            " TORCHINDUCTOR_CACHE_DIR and TMPDIR a folder with space"
        )
    return error


def step_profiler(path: Path, steps: int) -> torch.profiler.profile:
    """A profiler that traces ``steps`` steps into ``path``, beginning with FIRST_TRACED_STEP."""
    wait = FIRST_TRACED_STEP - 2
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=wait, warmup=1, active=steps, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    )
