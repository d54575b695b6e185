"""What all tests share: one thread, signals that work, and the folders in which runs are made."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from launcher import run_well, write_shards

# Two test processes share the cores already, and so do the runs that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell starts background jobs with SIGINT ignored, nohup with SIGHUP, and children inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
    os.environ.pop(name, None)  # of a job around the tests


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with shards in ``data``, in which runs write to ``log``."""
    write_shards(tmp_path / "data")
    return tmp_path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    write_shards(folder / "data")
    run_well(folder)
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "copy")
