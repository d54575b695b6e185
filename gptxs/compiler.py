"""torch.compile for the training step, and the profiler that shows what it has made."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch._functorch.config

from gptxs.cli import first_line

FIRST_TRACED_STEP = 5  # counted from 1: earlier ones compile and allocate


def compiler_problem(device: torch.device) -> str | None:
    """Compile a tiny function: the error's first line, or None where torch.compile works.

    A laptop may lack the C++ compiler that Inductor needs. The model itself would fail only in its
    first backward pass, where torch's fall-back to uncompiled code does not apply.
    """
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
    # Compiling the DDP wrapper, not the module in it, splits the graph at its buckets, so that the
    # all-reduce of the last layers' gradients overlaps the backward pass of the first.
    return torch.compile(model, dynamic=False)  # type: ignore[return-value]  # typed as a callable


def is_compile_error(error: Exception) -> bool:
    """Whether a backend has failed after the probe, such as by a full temporary folder."""
    dynamo = sys.modules.get("torch._dynamo.exc")  # which takes seconds to import
    return dynamo is not None and isinstance(error, dynamo.TorchDynamoException)


@contextmanager
def profile_steps(path: Path, steps: int) -> Iterator[torch.profiler.profile]:
    """Trace ``steps`` steps into ``path``, beginning with FIRST_TRACED_STEP."""
    with torch.profiler.profile(
        schedule=torch.profiler.schedule(
            wait=FIRST_TRACED_STEP - 2, warmup=1, active=steps, repeat=1
        ),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    ) as profiler:
        yield profiler
