"""What only a GPU can show: `python -m pytest -n 0 tests/test_gpu.py`, under 5 minutes on one GPU.

Skipped where there is no CUDA device. With GPT_XS_TEST_DEVICE=cpu the same tests run on a CPU, with
small shapes: that says nothing about a GPU, but shows that the tests themselves work.
"""

import common

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from launcher import ROOT, metrics, saved_steps
from test_hellaswag import raw_examples, write_jsonl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import eval
import hellaswag
from eval import Sampler, SamplingOptions
from model import GPT, GPTConfig

DEVICE = os.environ.get("GPT_XS_TEST_DEVICE", "cuda")
ON_CUDA = DEVICE.startswith("cuda")
GPUS = torch.cuda.device_count() if ON_CUDA else 0
TIMEOUT = 240  # seconds after which a run hangs
LOGGED = ("train", "val", "sample")
PATHS = (str(ROOT), os.environ.get("PYTHONPATH", ""))
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, PATHS))}

pytestmark = pytest.mark.skipif(ON_CUDA and GPUS == 0, reason="there is no CUDA device")

# One process a test, so that each has a GPU's memory and a compiler's state to itself.
NOTHING_BUT_STEPS = (
    "--val-every 0 --hellaswag-every 0 --sample-every 0 --checkpoint-every 0 --warmup-steps 2"
).split()
# The default model but for its depth, which a compiler needs time for; on a CPU a tiny one.
MODEL = (
    "--model.n-layers 3 --model.context-length 512 --micro-batch 8 --batch-tokens 8192"
    if ON_CUDA
    else "--model.d-model 32 --model.n-heads 2 --model.n-layers 1 --model.vocab-size 512"
    " --model.context-length 32 --micro-batch 4 --batch-tokens 256 --max-lr 1e-2"
).split()
# A whole run with everything that changes its state.
RUN = (
    "--model.d-model 128 --model.n-heads 2 --model.n-layers 2 --model.context-length 64"
    " --model.vocab-size 512 --micro-batch 8 --batch-tokens 1024 --max-steps 40 --warmup-steps 5"
    " --val-every 10 --val-tokens 512 --hellaswag-every 0 --sample-every 20 --sample-prompt a"
    " --checkpoint-every 10 --deterministic"
).split()
KILL = "lambda run: run.step == 27 and os.kill(os.getpid(), signal.SIGKILL)"
# Rank 1 fails as if by a mistake in the code, and leaves the time.
RAISE = """
def on_step(run):
    if run.step == 5 and run.dist_info.rank == 1:
        pathlib.Path("raised").write_text(str(time.time()))
        raise ValueError("the fault of this test")
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards, with tokens below 300 of which some are far more frequent."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for name, size in (("val_000000", 5000), ("train_000001", 300_000)):
        np.save(folder / f"tiny_{name}.npy", (rng.exponential(40, size) % 300).astype(np.uint16))
    return folder


def train(
    data: Path, log: Path, *flags: str, on_step: str = "None", cache: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run train.py in a process of its own; ``on_step`` is an expression, called at each step.

    ``cache`` is where compiled kernels go and come from instead of the user's own cache.
    """
    # Drawing takes longer than training here, and is tested elsewhere.
    code = f"import os, signal, train; train.plot.plot_run = lambda *_: None; train.main({on_step})"
    command = [sys.executable, "-c", code, f"--data-dir={data}", f"--log-dir={log}"]
    if "--device" not in flags:
        command += ["--device", DEVICE]
    environment = dict(ENVIRONMENT)
    if cache is not None:
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "inductor")
        environment["TRITON_CACHE_DIR"] = str(cache / "triton")
    return subprocess.run(
        [*command, *flags], env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )


def train_well(data: Path, log: Path, *flags: str, cache: Path | None = None) -> None:
    """The same for a run that must not fail."""
    done = train(data, log, *flags, cache=cache)
    assert done.returncode == 0, done.stdout + done.stderr


def losses(log: Path) -> list[float]:
    """The training loss of each step."""
    return [row["loss"] for row in metrics(log, "train").values()]


# ---- the training step ---------------------------------------------------------------------------


def test_20_compiled_bf16_steps_have_the_losses_of_eager_fp32_ones(
    data: Path, tmp_path: Path
) -> None:
    flags = (*MODEL, *NOTHING_BUT_STEPS, "--max-steps", "20")
    train_well(data, tmp_path / "bf16", *flags, "--dtype", "bf16", "--compile")
    train_well(data, tmp_path / "fp32", *flags, "--dtype", "fp32", "--no-compile")
    exact = losses(tmp_path / "fp32")
    assert len(exact) == 20
    assert exact[-1] < exact[0] - 0.1  # something was learned
    assert losses(tmp_path / "bf16") == pytest.approx(exact, abs=2e-2)


def test_a_step_of_64_rows_of_1024_tokens_needs_less_than_32_gb(data: Path, tmp_path: Path) -> None:
    B, T = (64, 1024) if ON_CUDA else (2, 64)
    shape = (f"--model.context-length={T}", f"--micro-batch={B}", f"--batch-tokens={2 * B * T}")
    model = () if ON_CUDA else MODEL  # the default model; of two flags the last one counts
    # From the second step on there is all that a step ever has: AdamW's moments, two micro-steps.
    train_well(data, tmp_path, *model, *shape, *NOTHING_BUT_STEPS, "--max-steps=3")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # A GPU's by max_memory_allocated, in GB.
    memory = [row["memory_gb"] for row in rows if row["kind"] == "train"]
    print(f"{memory[-1]:.2f} GB")
    assert 0 < memory[-1] < 32


# ---- a whole run ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log folder of a deterministic run."""
    log = tmp_path_factory.mktemp("undisturbed") / "log"
    train_well(data, log, *RUN)
    return log


def assert_same_run(log: Path, other: Path) -> None:
    """The same bits: weights, optimizer, losses, samples."""
    last, same = log / "step_000040", other / "step_000040"
    lines = metrics(log, *LOGGED)
    assert lines == metrics(other, *LOGGED)
    assert ("sample", 40) in lines
    assert (last / "model.safetensors").read_bytes() == (same / "model.safetensors").read_bytes()
    ours, theirs = (
        torch.load(at / "training_state.pt", weights_only=True, mmap=True) for at in (last, same)
    )
    torch.testing.assert_close(ours["optimizer"], theirs["optimizer"], rtol=0, atol=0)


def test_a_deterministic_run_repeats_bit_for_bit_with_a_cold_compile_cache(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    train_well(data, tmp_path / "log", *RUN, cache=tmp_path / "cache")
    if ON_CUDA:
        assert any((tmp_path / "cache").rglob("*.*"))  # it was compiled again
    assert_same_run(undisturbed, tmp_path / "log")


def test_a_killed_run_resumes_to_the_same_bits(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    killed = train(data, tmp_path / "log", *RUN, on_step=KILL)
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    assert max(saved_steps(tmp_path / "log")) in (10, 20)  # that of step 20 may be unfinished
    train_well(data, tmp_path / "log", *RUN, "--resume")
    assert_same_run(undisturbed, tmp_path / "log")


# ---- sampling ------------------------------------------------------------------------------------


@pytest.fixture
def model() -> GPT:
    """A model whose predictions are far from uniform, with heads of 64 channels, on the device."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(d_model=256, n_heads=4, n_layers=2, context_length=96, vocab_size=512))
    for parameter in model.requires_grad_(False).parameters():
        parameter.mul_(4)
    return model.to(DEVICE)


@torch.inference_mode()
def math_reference(model: GPT, idx: Tensor, n: int) -> tuple[Tensor, float]:
    """Greedy tokens with no cache, no capture and no fused kernel; the smallest lead of a token."""
    leads = []
    with sdpa_kernel(SDPBackend.MATH):
        for _ in range(n):
            best, tokens = model(idx)[:, -1].topk(2)  # (B, 2) each
            leads.append(float((best[:, 0] - best[:, 1]).min()))
            idx = torch.cat((idx, tokens[:, :1]), dim=1)
    return idx, min(leads)


@pytest.mark.parametrize("num_samples", [1, 8])
def test_samples_of_a_captured_graph_equal_uncaptured_ones_and_a_plain_reference(
    model: GPT, num_samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    idx = torch.tensor([[5, 6, 7]], device=DEVICE)
    samples = {}
    for temperature, dtype in ((0, torch.float32), (1, torch.float32), (1, torch.bfloat16)):
        options = SamplingOptions(60, num_samples=num_samples, temperature=temperature, top_k=None)
        with monkeypatch.context() as patch:
            # The same kernels. Without a graph there would be no mask, so another attention kernel,
            # and its rounding could turn a draw.
            patch.setattr(eval, "capture_cuda_graph", lambda step, *inputs: step)
            expected = Sampler(model, dtype=dtype).generate(idx, options)
        samples[temperature, dtype] = expected
        captured = Sampler(model, dtype=dtype)
        assert captured.use_graph == ON_CUDA
        assert torch.equal(captured.generate(idx, options), expected)  # captures
        captured.update()
        assert torch.equal(captured.generate(idx, options), expected)  # uses what was captured
    assert len({tuple(row) for row in samples[1, torch.float32].tolist()}) == num_samples
    expected, lead = math_reference(model, idx, 60)
    assert lead > 1e-2  # so that rounding decides nothing
    assert torch.equal(samples[0, torch.float32], expected.expand(num_samples, -1))


# ---- HellaSwag -----------------------------------------------------------------------------------


def log_likelihoods(
    model: GPT, requests: tuple[hellaswag.Request, ...], device: str, batch_tokens: int
) -> Tensor:
    """The scores (R, 4) of all choices, fp32, on the CPU."""
    scores = torch.zeros(len(requests) * 4, device=device)
    with torch.no_grad():
        for batch in hellaswag.pack(requests, model.config.context_length, batch_tokens):
            hellaswag.add_log_likelihoods(model, batch, scores)
    return scores.view(-1, 4).cpu()


def disagreements(chosen: Tensor, expected: Tensor, values: Tensor) -> dict[str, float]:
    """Where two predictions (n, 2, 2) differ, and by how much in ``values`` (n, 2, 2, 4)."""
    leads = {}
    for example, convention, by in (chosen != expected).nonzero().tolist():
        candidates = values[example, convention, by]
        best = candidates[expected[example, convention, by]]
        lead = float(best - candidates[chosen[example, convention, by]])
        name = f"example {example}, {list(hellaswag.CONVENTIONS)[convention]}, "
        leads[name + ("acc_norm" if by else "acc")] = lead
    return leads


def test_hellaswag_predictions_equal_those_of_a_cpu(tmp_path: Path) -> None:
    rows = 100 if ON_CUDA else 20
    examples = hellaswag.load_examples(write_jsonl(tmp_path / "rows.jsonl", raw_examples(rows)))
    requests = tuple(request for example in examples for request in example.requests)
    torch.manual_seed(0)
    model = GPT(GPTConfig(d_model=256, n_heads=4, n_layers=2, context_length=96))
    model.requires_grad_(False)
    cpu = torch.device("cpu")
    expected = hellaswag.predict(model, examples, cpu)  # (rows, 2 conventions, acc and acc_norm)
    exact = log_likelihoods(model, requests, "cpu", hellaswag.BATCH_TOKENS)
    model.to(DEVICE)
    chosen = hellaswag.predict(model, examples, torch.device(DEVICE)).cpu()
    scores = log_likelihoods(model, requests, DEVICE, hellaswag.CUDA_BATCH_TOKENS)
    torch.testing.assert_close(scores, exact, atol=1e-3, rtol=1e-4)
    lengths = torch.tensor([request.lengths for request in requests])
    values = torch.stack((exact, exact / lengths), dim=1).view(rows, 2, 2, 4)
    near_ties = disagreements(chosen, expected, values)
    print(f"near-ties, nats apart: {near_ties}")
    assert all(lead < 1e-3 for lead in near_ties.values()), near_ties


# ---- two GPUs ------------------------------------------------------------------------------------


@pytest.fixture
def _first_gpu_again() -> Iterator[None]:
    yield
    torch.cuda.set_device(0)


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
@pytest.mark.usefixtures("_first_gpu_again")
def test_the_second_gpu_trains_and_samples_like_the_first(
    model: GPT, data: Path, tmp_path: Path
) -> None:
    flags = (*MODEL, *NOTHING_BUT_STEPS, "--max-steps", "10")
    for number in ("0", "1"):
        train_well(data, tmp_path / number, *flags, "--device", f"cuda:{number}")
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "0"), abs=1e-3)

    idx = torch.tensor([[5, 6, 7]])
    options = SamplingOptions(60, temperature=0)
    first = Sampler(model).generate(idx.to("cuda:0"), options)
    device = common.choose_device("cuda:1")
    assert torch.cuda.current_device() == 1
    second = Sampler(model.to(device)).generate(idx.to(device), options)
    assert torch.equal(first.cpu(), second.cpu())


@pytest.mark.skipif(ON_CUDA and GPUS < 2, reason="needs two GPUs")
def test_a_rank_that_raises_ends_the_job_within_30_seconds(data: Path, tmp_path: Path) -> None:
    script = tmp_path / "fault.py"
    script.write_text(f"import pathlib, time\nimport train\n{RAISE}\ntrain.main(on_step)\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(script), f"--data-dir={data}", f"--log-dir={tmp_path / 'log'}"]
    command += ["--device", DEVICE, *MODEL, *NOTHING_BUT_STEPS]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    ended = time.time()
    assert "the fault of this test (rank 1)" in done.stderr, done.stdout + done.stderr
    assert done.returncode != 0
    assert ended - float((tmp_path / "raised").read_text()) < 30
