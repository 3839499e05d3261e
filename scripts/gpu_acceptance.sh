#!/usr/bin/env bash
# Tests and measures crislit on a GPU, within 25 minutes and without a network.
#
#   scripts/gpu_acceptance.sh [FOLDER [STAGE ...]]
#
# FOLDER receives environment.txt, tests.log, tests.xml, benchmark.log, speed.csv and summary.txt
# (default: outputs/gpu_acceptance). The stages, in the order of their value; without one, all:
#
#   tests       the tests that need a GPU, at most 8 minutes
#   benchmark   all that follow, parts of `python -m crislit.benchmark`: rows training evaluation
#               latency agreement data
#
# Where a command may run for 10 minutes only, call it once for each: FOLDER tests, FOLDER rows,
# FOLDER training, FOLDER evaluation latency agreement data. A stage that fails or hangs does not
# end the others. Environment variables:
#
#   PYTHON          the Python that has PyTorch (default: python3)
#   WHEELS          a folder of wheels that this Python lacks (default: .whl of the project, if there
#                   is one; empty: none). They are installed into a temporary folder
#   DEVICE          cuda, cuda:1, ... (default: cuda). With cpu, the tests are skipped
#   BENCHMARK_ARGS  more arguments of the benchmark, such as "--model tiny --image-size 64"
set -euo pipefail

declare -A BUDGET=(
  [tests]=480 [rows]=280 [training]=300 [evaluation]=140 [latency]=90 [agreement]=90 [data]=120
) # seconds, 25 minutes in all; what a stage leaves is for those after it
PARTS=(rows training evaluation latency agreement data)

fail() {
  echo "error: $*" >&2
  exit 2
}

# -- Arguments

[[ ${1:-} != --help && ${1:-} != -h ]] || { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0; }
folder=${1:-outputs/gpu_acceptance}
[[ -z ${BUDGET[$folder]:-} && $folder != benchmark ]] || fail "the folder comes first: $0 FOLDER $folder"
stages=()
for name in "${@:2}"; do
  if [[ $name == benchmark ]]; then
    stages+=("${PARTS[@]}")
  elif [[ -n ${BUDGET[$name]:-} ]]; then
    stages+=("$name")
  else
    fail "unknown stage $name: expected tests, benchmark, or of its parts ${PARTS[*]}"
  fi
done
(($# > 1)) || stages=(tests "${PARTS[@]}")
mkdir -p "$folder" || fail "cannot write to $folder"
folder=$(cd "$folder" && pwd)
device=${DEVICE:-cuda} wheels=
if [[ -n ${WHEELS:-} ]]; then
  compgen -G "$WHEELS/*.whl" > /dev/null || fail "WHEELS=$WHEELS is not a folder with wheels"
  wheels=$(cd "$WHEELS" && pwd)
fi
python=$(command -v "${PYTHON:-python3}") || fail "there is no ${PYTHON:-python3}: set PYTHON"
[[ $python != */* ]] || python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
cd "$(dirname "$0")/.."
[[ -n ${WHEELS+set} ]] || ! compgen -G ".whl/*.whl" > /dev/null || wheels=.whl

# -- Environment

export NO_ALBUMENTATIONS_UPDATE=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline PYTHONUNBUFFERED=1
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 # the tests need no plugin
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
if [[ -n $wheels ]]; then
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
    --target "$temporary/site" "$wheels"/*.whl || fail "the wheels in $wheels do not install"
  PYTHONPATH=$temporary/site:$PYTHONPATH
fi

# Import what the stages need, and use the device.
"$python" - "$device" "${stages[@]}" << 'CODE' || exit 2
import importlib, sys

device, *stages = sys.argv[1:]
names = "torch torchvision lightning torchmetrics hydra omegaconf open_clip albumentations wandb numpy"
names += " PIL cv2 pycocotools.mask huggingface_hub safetensors matplotlib rich tqdm"
missing = []
for name in names.split() + ["pytest"] * ("tests" in stages):
    try:
        importlib.import_module(name)
    except ImportError as error:
        absent = error.name or name
        reason = "" if isinstance(error, ModuleNotFoundError) else f" ({error})"
        missing.append((absent if absent == name else f"{absent} (for {name})") + reason)
if missing:
    sys.exit("error: this Python cannot import " + ", ".join(dict.fromkeys(missing))
             + ": put their wheels into a folder and set WHEELS")
import torch
try:
    torch.zeros(1, device=device).add(1).cpu()
except (RuntimeError, AssertionError) as error:
    sys.exit(f"error: PyTorch {torch.__version__} cannot compute on {device}: "
             + str(error).strip().splitlines()[0])
CODE

describe_environment() {
  echo "date: $(date -u '+%Y-%m-%d %H:%M:%S UTC')"
  echo "commit: $(git rev-parse HEAD 2> /dev/null || echo unknown)"
  echo "changed files: $(git status --porcelain 2> /dev/null | wc -l)"
  echo "machine: $(uname -srm), $(getconf _NPROCESSORS_ONLN) cores, device $device"
  "$python" - << 'CODE'
import sys, cv2, torch
print(f"python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
      f"cuDNN {torch.backends.cudnn.version()}, OpenCV {cv2.__version__}")
for number in range(torch.cuda.device_count()):
    print(f"GPU {number}: {torch.cuda.get_device_properties(number)}")
CODE
  echo "compilers: $(type -p gcc g++ cc nvcc | tr '\n' ' ')"
  nvidia-smi 2> /dev/null || echo "no nvidia-smi"
  "$python" -m pip freeze --disable-pip-version-check 2>&1 || echo "no pip"
}
describe_environment > "$folder/environment.txt"
sed -n '1,/^GPU\|^no nvidia/p' "$folder/environment.txt"

# -- Stages

run_tests() {
  rm -f "$folder/tests.xml"
  # Compiling takes longest, so it comes last. Warnings are not errors: each version of CUDA's
  # libraries has its own.
  local tests=tests/training/gpu
  "${limited[@]}" "$python" -m pytest "$tests"/test_[!c]*.py \
    "$tests/test_compile.py" -m gpu -W default -p no:cacheprovider \
    -o faulthandler_timeout=200 --durations=0 --durations-min=1 -rA --junitxml="$folder/tests.xml"
}

run_benchmark() {
  local arguments
  read -ra arguments <<< "${BENCHMARK_ARGS:-}"
  "${limited[@]}" "$python" -m crislit.benchmark "--$1" --device "$device" --output "$folder" \
    "${arguments[@]}"
}

# Run a stage, and show its log meanwhile. No pipe: processes that it leaves behind would hold it.
log_stage() {
  local size=0 code=0
  [[ ! -f $log ]] || size=$(stat --format=%s "$log")
  echo "== $stage" >> "$log"
  tail --bytes="+$((size + 1))" --follow --sleep-interval=0.1 --pid=$$ "$log" &
  local tail=$!
  disown
  "$@" >> "$log" 2>&1 < /dev/null || code=$?
  sleep 0.2
  kill "$tail"
  return "$code"
}

began=$(date +%s) left=0 failed=0 lines=()
for stage in "${stages[@]}"; do ((left += BUDGET[$stage])); done
deadline=$((began + left))
for stage in "${stages[@]}"; do
  ((left -= BUDGET[$stage])) || true
  start=$(date +%s)
  limit=$((deadline - left - start))
  # Killing takes seconds that the next stage has less, but not all of them.
  ((limit > BUDGET[$stage] / 2)) || limit=$((BUDGET[$stage] / 2))
  # An interrupted test run still writes what it found.
  # Shells start background jobs with interrupts ignored, and their programs inherit that.
  limited=(timeout --signal=INT --kill-after=15 "$limit" env --default-signal=INT)
  log=$folder/benchmark.log command=(run_benchmark "$stage")
  [[ $stage != tests ]] || { log=$folder/tests.log command=(run_tests); rm -f "$log"; }
  code=0
  log_stage "${command[@]}" || code=$?
  result=passed
  case $code in
    0) ;;
    124 | 137) result="ended after its limit of $limit s" failed=1 ;;
    *) result="failed with exit code $code" failed=1 ;;
  esac
  lines+=("$stage: $result, $(($(date +%s) - start)) s")
done

# -- Summary

summarize() {
  echo "== summary of $folder, $(($(date +%s) - began)) s"
  printf '%s\n' "${lines[@]}"
  "$python" - "$folder" << 'CODE'
import csv, sys, collections, xml.etree.ElementTree as xml
from pathlib import Path

tests, speed = Path(sys.argv[1], "tests.xml"), Path(sys.argv[1], "speed.csv")
if tests.is_file():
    [suite] = xml.parse(tests).getroot().iter("testsuite")
    count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    bad = count["failures"] + count["errors"]
    print(f"tests: {count['tests'] - bad - count['skipped']} passed, {bad} failed, "
          f"{count['skipped']} skipped")
    for case in suite.iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            print(f"  failed: {case.get('name')}")
if speed.is_file():
    with speed.open(newline="") as file:
        parts = collections.Counter(row["part"] for row in csv.DictReader(file))
    print("rows measured: " + ", ".join(f"{part} {count}" for part, count in parts.items()))
CODE
}
summarize | tee "$folder/summary.txt"
exit "$failed"
