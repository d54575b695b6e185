"""gptxs/distributed.py: device and precision, the ranks, the signal that stops a run."""

from __future__ import annotations

import platform
import signal
import subprocess
import sys
from contextlib import suppress
from unittest.mock import Mock

import pytest
import torch
from launcher import ROOT

from gptxs.distributed import DistInfo, StopSignal, choose_device, choose_dtype

MonkeyPatch = pytest.MonkeyPatch
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch: MonkeyPatch) -> None:
    """What a job around these tests may have set."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


# ---- device and precision ------------------------------------------------------------------------


@pytest.fixture
def two_gpus(monkeypatch: MonkeyPatch) -> Mock:
    """torch on a machine with two GPUs, as far as choosing one goes; the mocked set_device."""
    set_device = Mock()
    monkeypatch.setattr(torch, "empty", lambda *_, device: Mock(device=torch.device(device)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    return set_device


def test_a_chosen_gpu_becomes_the_current_one(two_gpus: Mock) -> None:
    """Events and streams belong to the current device: on another one they record nothing."""
    assert choose_device("cuda:1") == torch.device("cuda:1")
    two_gpus.assert_called_once_with(torch.device("cuda:1"))


def test_each_local_rank_has_a_gpu_of_its_own(two_gpus: Mock, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert DistInfo.initialize("cpu").device == CPU
    two_gpus.assert_not_called()
    assert DistInfo.initialize("auto").device == torch.device("cuda:1")
    assert DistInfo.initialize("cuda:0").device == torch.device("cuda:0")  # as it is told


@pytest.mark.parametrize("name", ["cuda:77", "gpu", "mps", "xpu"])
def test_a_device_that_is_not_there_is_named(name: str) -> None:
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match=f"--device {name} cannot be used here: .") as error:
        choose_device(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("has_bf16", [False, True])
def test_bf16_is_chosen_only_where_the_hardware_has_it(
    monkeypatch: MonkeyPatch, has_bf16: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_tile": has_bf16})
    assert choose_dtype("auto", CPU) == (torch.bfloat16 if has_bf16 else torch.float32)
    assert choose_dtype("fp16", CPU) == torch.float16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    gpu = choose_dtype("auto", torch.device("cuda"))
    assert gpu == (torch.bfloat16 if has_bf16 else torch.float16)


COUNT_PAGES = """
import resource
import torch
from gptxs.distributed import choose_device

choose_device("cpu")
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.zeros(2**24) + 1  # two tensors of 64 MiB, freed at once
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_on_a_cpu_the_system_need_not_clear_memory_for_each_step() -> None:
    command = [sys.executable, "-c", COUNT_PAGES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 15 * 2**26  # of 40 tensors


# ---- ranks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "remedy"),
    [
        ({"RANK": "0"}, "torchrun, or unset both"),
        ({"WORLD_SIZE": "2"}, "torchrun, or unset both"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "start one torchrun on each node"),
    ],
)
def test_ranks_that_nobody_told_of_each_other_are_refused(
    environment: dict[str, str], remedy: str, monkeypatch: MonkeyPatch
) -> None:
    """Four processes that each take themselves for the only one would write to one folder."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=remedy):
        DistInfo.initialize("cpu")


def test_torchrun_in_a_task_of_slurm_counts(monkeypatch: MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "2"}.items():
        monkeypatch.setenv(name, value)
    assert DistInfo.initialize("cpu") == DistInfo(0, 1, CPU)


def test_a_single_process_needs_no_group() -> None:
    info = DistInfo.initialize("cpu")
    assert info == DistInfo(0, 1, CPU)
    assert info.gather("x") == ["x"]
    assert info.on_rank_0(lambda: 7) == 7
    info.require_equal({"seed": 7})
    assert not torch.distributed.is_initialized()


# ---- the signal that stops a run -----------------------------------------------------------------

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_asks_for_an_orderly_stop_and_ctrl_c_after_it_ends_at_once(name: str) -> None:
    before = [signal.getsignal(getattr(signal, each)) for each in SIGNALS]
    with suppress(KeyboardInterrupt), StopSignal() as stop:
        assert stop.name == ""
        signal.raise_signal(getattr(signal, name))
        assert stop.name == name
        signal.raise_signal(signal.SIGINT)
        pytest.fail("went on")
    # So that the next Ctrl-C, in a notebook, is one.
    assert [signal.getsignal(getattr(signal, each)) for each in SIGNALS] == before


def test_nohup_lets_a_run_outlive_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, before)
    assert stop.name == ""
