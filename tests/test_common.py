"""common.py: which device a process uses, and how a script ends."""

import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from launcher import is_last_rank, start

from common import DistInfo, choose_device

MonkeyPatch = pytest.MonkeyPatch


@pytest.fixture
def two_gpus(monkeypatch: MonkeyPatch) -> Mock:
    """torch on a machine with two GPUs, as far as choosing one goes; the mocked set_device."""
    set_device = Mock()
    monkeypatch.setattr(torch, "empty", lambda *_, device: Mock(device=torch.device(device)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    return set_device


def test_a_chosen_gpu_becomes_the_current_one(two_gpus: Mock) -> None:
    """Events and CUDA graphs belong to the current device: on another one they record nothing."""
    assert choose_device("cuda:1") == torch.device("cuda:1")
    two_gpus.assert_called_once_with(torch.device("cuda:1"))


def test_each_local_rank_has_a_gpu_of_its_own(two_gpus: Mock, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert DistInfo.initialize("auto").device == torch.device("cuda:1")


def test_a_rank_on_the_cpu_touches_no_gpu(two_gpus: Mock, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "7")  # more than there are GPUs
    assert DistInfo.initialize("cpu").device == torch.device("cpu")
    two_gpus.assert_not_called()


def fail_where_ending_blocks(run: Any) -> None:
    """The last rank fails. Destroying the process group waits for ranks that will never come."""
    torch.distributed.destroy_process_group = lambda: time.sleep(600)  # as NCCL does
    if run.step == 5 and is_last_rank(run):
        raise ValueError("this rank is broken")


def test_a_rank_that_fails_ends_at_once_so_that_torchrun_can_stop_the_others(folder: Path) -> None:
    trainings = start(folder, ranks=2, on_step=fail_where_ending_blocks)
    assert [training.wait() for training in trainings] == [1, 2]
    assert trainings[1].err == "train.py: this rank is broken (rank 1)\n"
    assert "another rank has failed" in trainings[0].err
