#!/usr/bin/env bash
# Tests and measures this project on a GPU, and writes one Markdown file to paste into an issue:
#
#   bash benchmarks/gpu_report.sh [--device cuda|cpu] [--out gpu_report.md]
#
# Needs requirements.txt, tests/requirements.txt, no network, and less than 10 minutes on one GPU.
# A part that fails is reported, does not stop the others, and makes the exit code 1. With
# --device cpu all shapes are tiny: its figures say nothing, but the script is known to work.
set -uo pipefail

device=cuda
out=gpu_report.md
while (($# > 0)); do
  case "$1" in
    --device) device=${2:?--device needs a value} && shift 2 ;;
    --out) out=${2:?--out needs a value} && shift 2 ;;
    *) echo "gpu_report.sh: unknown option $1; known are --device and --out" >&2 && exit 2 ;;
  esac
done
# The report goes to where the user is; the commands below run in the repository.
touch "$out" || exit 2
out=$(realpath "$out")
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [[ $device == cpu ]]; then
  patience=4 # a CPU may be busy
  bench=(--micro-batch 1 --rounds 1 --no-ceiling)
  declare -A rows=([32]='^ours, not compiled$')
  contexts=(32)
  hellaswag_rows=20
  sampling=(--dtype fp32 --new-tokens 3 --rounds 1 --no-hugging-face --no-uncached)
  run=(--preset quickstart --max-steps 8 --warmup-steps 2 --val-every 4 --val-tokens 1024
    --checkpoint-every 4 --sample-every 8)
else
  patience=1
  bench=(--rounds 5)
  # Rows that are compiled take the compiler up to a minute each. By default the loss has 4096 rows
  # in the first context and 8192 in the second.
  declare -A rows=(
    [512]='^ours$|8192 loss rows|^ours, not compiled|^nanoGPT|^Hugging Face$'
    [1024]='^ours$|4096 loss rows|^nanoGPT'
  )
  contexts=(512 1024)
  hellaswag_rows=10042
  sampling=(--dtype bf16)
  run=(--max-steps 500 --warmup-steps 50 --batch-tokens 32768 --hellaswag-every 0
    --val-every 100 --val-tokens 16384 --checkpoint-every 250 --sample-every 250)
fi

failed=()
end=$((SECONDS + 600 * patience)) # of the whole report: a part that hangs may not use up the others' time

# part TITLE LIMIT COMMAND...: run a command for at most LIMIT seconds (on a CPU four times that);
# its command line, exit code, seconds and the end of its output go into the report.
part() {
  local title=$1 limit=$(($2 * patience)) start=$SECONDS code=0
  shift 2
  echo "$title ..." >&2
  ((limit < end - SECONDS)) || limit=$((end - SECONDS))
  if ((limit > 0)); then
    timeout --kill-after=10 "$limit" "$@" >"$work/output" 2>&1 || code=$?
  else
    code=124
    echo "not started: the time for the whole report was over" >"$work/output"
  fi
  ((code == 0)) || failed+=("$title")
  {
    printf '\n## %s\n\n`' "$title"
    printf '%s ' "${@//$work/TMP}"
    printf '`\n\nExit code %d after %d s.' "$code" $((SECONDS - start))
    ((code != 124)) || printf ' Stopped by its time limit of %d s.' "$limit"
    # An issue takes 65,536 characters. Progress bars rewrite their line with carriage returns.
    printf '\n\n```\n%s\n```\n' "$(tr '\r' '\n' <"$work/output" | tail -n 60 | tail -c 7000)"
  } >>"$out"
}

cat >"$work/machine.py" <<'PYTHON'
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

print(f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores")
for name in ("torch", "triton", "numpy", "transformers"):
    try:
        print(name, version(name))
    except PackageNotFoundError:
        print(name, "not installed")
print(f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
for i in range(torch.cuda.device_count()):
    gpu = torch.cuda.get_device_properties(i)
    print(f"cuda:{i}: {gpu.name}, {gpu.total_memory / 1e9:.1f} GB, sm_{gpu.major}{gpu.minor}")
torch.empty(1, device=sys.argv[1])  # fails here, with torch's reason, if it cannot be used
PYTHON

cat >"$work/hellaswag_passes.py" <<'PYTHON'
"""HellaSwag on synthetic rows of the real ones' lengths, twice in one process, as in training."""
import json
import random
import sys
import time
from pathlib import Path

import torch

import common
import hellaswag
from model import GPT, GPTConfig

device = common.choose_device(sys.argv[1])
rows = int(sys.argv[2])
path = Path(sys.argv[3])
dtype = common.choose_dtype("auto", device)
draw = random.Random(0)
words = "the man a dog runs over water red house she opens door and then he with it".split()


def text(low: int, high: int) -> str:
    return " ".join(draw.choices(words, k=draw.randint(low, high))) + "."


with path.open("w") as file:
    for ind in range(rows):
        ctx_a, ctx_b = text(10, 80), draw.choice(["", "she", "he"])
        row = {"ind": ind, "activity_label": "Work", "ctx_a": ctx_a, "ctx_b": ctx_b}
        row["ctx"] = f"{ctx_a} {ctx_b}".rstrip()
        row["endings"] = [text(8, 45) for _ in range(4)]
        row["label"] = draw.randrange(4)
        file.write(json.dumps(row) + "\n")
start = time.perf_counter()
examples = hellaswag.load_examples(path)
print(f"tokenized {rows} rows: {time.perf_counter() - start:.2f} s")
torch.manual_seed(0)
config = GPTConfig() if device.type == "cuda" else GPTConfig(64, 4, 2, 512)
model = GPT(config).to(device)
predictions = []
for name in ("first", "second"):
    start = time.perf_counter()
    predictions.append(hellaswag.predict(model, examples, device, dtype=dtype).cpu())
    seconds = time.perf_counter() - start
    print(f"{name} pass: {seconds:.2f} s, {rows / seconds:.0f} examples/s, {dtype}")
# Sums in another order may decide a near-tie.
different = int((predictions[0] != predictions[1]).sum())
print(f"{different} of {predictions[0].numel()} predictions differ between the passes")
PYTHON

cat >"$work/figures.py" <<'PYTHON'
"""What a run has logged: its speed, its memory and its losses."""
import json
import sys
from pathlib import Path
from statistics import median

rows = [json.loads(line) for line in Path(sys.argv[1], "metrics.jsonl").read_text().splitlines()]
steps = [row for row in rows if row["kind"] == "train"]
last = steps[len(steps) // 2 :]
print(f"{len(steps)} steps, training loss {steps[0]['loss']:.4f} to {steps[-1]['loss']:.4f}")
print(f"median of the second half: {median(row['ms'] for row in last):.2f} ms a step,")
print(f"  {median(row['tokens_per_s'] for row in last):,.0f} tokens/s, MFU {last[-1]['mfu']}")
print(f"memory {last[-1]['memory_gb']:.2f} GB")
for row in rows:
    if row["kind"] in ("val", "checkpoint", "sample"):
        print(json.dumps({key: value for key, value in row.items() if key != "time"}))
PYTHON

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 GPT_XS_TEST_DEVICE=$device
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
{
  echo "# GPT-xs on ${device}"
  echo
  echo "Commit ${commit}, $(git status --short 2>/dev/null | wc -l) changed files, $(date -u +%FT%TZ)."
} >"$out"

part "Machine" 60 "$python" "$work/machine.py" "$device"
if [[ $device != cpu ]]; then
  part "Driver" 30 nvidia-smi
fi
part "Test suite" 300 "$python" -m pytest -n 0 -v -rA --durations=0 tests/test_gpu.py
part "HellaSwag, ${hellaswag_rows} synthetic rows" 60 \
  "$python" "$work/hellaswag_passes.py" "$device" "$hellaswag_rows" "$work/rows.jsonl"
part "Sampling" 60 \
  "$python" benchmarks/bench_sampling.py --device "$device" --batch 8 "${sampling[@]}"
part "Shards of the embedded corpus" 60 \
  "$python" dataset.py --source stdlib --data-dir "$work/data" --shard-size 50000
part "A run with validation and checkpoints" 150 \
  "$python" train.py --device "$device" "${run[@]}" --data-dir "$work/data" --log-dir "$work/log"
part "What this run has logged" 30 "$python" "$work/figures.py" "$work/log"
for context in "${contexts[@]}"; do
  part "Training step, context $context" 240 "$python" benchmarks/bench_train.py \
    --device "$device" --tables variants --context-length "$context" --only "${rows[$context]}" \
    "${bench[@]}"
done

{
  printf '\n## Summary\n\n%d s in all. ' "$SECONDS"
  if ((${#failed[@]} == 0)); then
    echo "Every part ended well."
  else
    printf 'Failed: '
    printf '%s; ' "${failed[@]}"
    echo
  fi
} >>"$out"
echo "report: $out" >&2
((${#failed[@]} == 0))
