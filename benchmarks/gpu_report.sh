#!/usr/bin/env bash
# Measures and tests this project on one GPU in at most ten minutes, and writes one Markdown file
# to paste into an issue:
#
#   bash benchmarks/gpu_report.sh [--device cuda|cpu] [--micro-batch 64] [--out gpu_report.md]
#
# Needs what requirements.txt and tests/requirements.txt list, of which it says first what is
# missing, and no network. --micro-batch is for GPUs with less than 32 GB. Each part is printed as
# soon as it ends. One that fails is reported, does not stop the others, and makes the exit code 1.
# With --device cpu all shapes are tiny: its figures say nothing, but the script is known to work.
set -uo pipefail

device=cuda
micro_batch=
out=gpu_report.md
while (($# > 0)); do
  case "$1" in
    --device) device=${2:?--device needs a value} && shift 2 ;;
    --micro-batch) micro_batch=${2:?--micro-batch needs a value} && shift 2 ;;
    --out) out=${2:?--out needs a value} && shift 2 ;;
    *) echo "gpu_report.sh: unknown option $1; known: --device, --micro-batch, --out" >&2 && exit 2 ;;
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
  shape=(--device cpu --micro-batch "${micro_batch:-2}" --context-length 128 --size quickstart
    --no-compile)
  turns=(--turns --no-ceiling --rounds 1)
  headline='^ours$|^nanoGPT-style, fp32, eager$'
  options='^ours$|^all loss rows$'
  few_layers=(--layers 1)
  evaluations=(--hellaswag-rows 8 --val-tokens 1024)
  fp16=fp16_halves
  resume=killed
else
  patience=1
  shape=(--device "$device" --micro-batch "${micro_batch:-64}")
  turns=(--rounds 3)
  headline='^ours$|^nanoGPT-style$'
  options=
  few_layers=(--layers 2) # the compiler takes about as long as there are layers
  evaluations=(--hellaswag-rows 2510 --val-tokens 2621440) # a quarter of the default run's
  fp16=fp16
  resume=bits
fi

# part TITLE LIMIT COMMAND...: run a command for at most LIMIT seconds (on a CPU four times that);
# its command line, exit code, seconds and the end of its output are printed and go into the report.
failed=()
part() {
  local title=$1 limit=$(($2 * patience)) start=$SECONDS code=0
  shift 2
  timeout --kill-after=10 "$limit" "$@" >"$work/output" 2>&1 || code=$?
  ((code == 0)) || failed+=("$title")
  {
    printf '\n## %s\n\n`' "$title"
    printf '%s ' "${@//$work/TMP}"
    printf '`\n\nExit code %d after %d s.' "$code" $((SECONDS - start))
    ((code != 124)) || printf ' Stopped by its time limit of %d s.' "$limit"
    # An issue takes 65,536 characters. Lines of torch's profiler about itself are left out.
    printf '\n\n```\n%s\n```\n' "$(grep -av '^USDT:' "$work/output" | tail -n 60 | tail -c 6500)"
  } | tee -a "$out"
  return "$code"
}

cat >"$work/machine.py" <<'PYTHON'
"""The machine, and what this project lacks on it. Fails where train.py cannot even be imported."""
import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

print(f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores")
missing = []
for line in [*Path("requirements.txt").open(), "pytest", "transformers", "triton"]:
    name = re.match(r"[\w.-]*", line)[0]
    try:
        print(name, version(name), end="; ") if name else None
    except PackageNotFoundError:
        missing.append(name)
print(f"\nMISSING: {', '.join(missing) or 'nothing'}", flush=True)

import torch

print(f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
for i in range(torch.cuda.device_count()):
    gpu = torch.cuda.get_device_properties(i)
    print(f"cuda:{i}: {gpu.name}, {gpu.total_memory / 1e9:.1f} GB, sm_{gpu.major}{gpu.minor}")
torch.empty(1, device=sys.argv[1])  # fails here, with torch's reason, if it cannot be used
import train  # noqa: F401
PYTHON

bench=("$python" benchmarks/bench_train.py "${shape[@]}" "${turns[@]}")
parts=("$python" benchmarks/gpu_parts.py "${shape[@]}")
tests=("$python" -m pytest -o addopts= -q -s --tb=short tests/test_gpu.py -k)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 GPT_XS_TEST_DEVICE=$device
# A cache of its own, so that the first parts compile anew on every machine. What has the same
# shapes later does not.
export TORCHINDUCTOR_CACHE_DIR=$work/inductor TRITON_CACHE_DIR=$work/triton
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
{
  echo "# GPT-xs on ${device}"
  echo
  echo "Commit ${commit}, $(git status --short 2>/dev/null | wc -l) changed files, $(date -u +%FT%TZ)."
} >"$out"

# The limits are 600 s in all.
if ! part "Machine" 25 "$python" "$work/machine.py" "$device"; then
  echo "gpu_report.sh: not started, see above; what is missing comes with pip install -r" \
    "requirements.txt -r tests/requirements.txt" >&2
  exit 2
fi
part "1. Ours and nanoGPT-style" 150 "${bench[@]}" --tables variants --only "$headline"
part "2. A step by classes" 60 "${parts[@]}" --part profile
part "3. Options" 110 "${bench[@]}" --tables options --only "$options" "${few_layers[@]}" --time-limit 80
part "4. NCCL" 40 "${tests[@]}" "process_group"
part "5. fp16" 50 "${tests[@]}" "$fp16"
part "6. Deterministic resume" 60 "${tests[@]}" "$resume"
part "7. First step, cold and warm" 45 env TORCHINDUCTOR_CACHE_DIR="$work/cold" \
  TRITON_CACHE_DIR="$work/cold" bash -c '"$@" && "$@"' twice "${parts[@]}" "${few_layers[@]}" \
  --part first-step
part "8. Validation, HellaSwag, checkpoint" 60 "${parts[@]}" "${evaluations[@]}" --part evaluations

{
  printf '\n## Summary\n\n%d s in all. ' "$SECONDS"
  if ((${#failed[@]} == 0)); then
    echo "Every part ended well."
  else
    printf 'Failed: '
    printf '%s; ' "${failed[@]}"
    echo
  fi
} | tee -a "$out"
echo "report: $out" >&2
((${#failed[@]} == 0))
