#!/bin/sh
# Build, test, measure and profile on one GPU: sh bench/on_gpu.sh [folder for the results] [stage ...]
# Without stages all of them, in at most 19 minutes; where a command may take ten, give `build test sanitizer`, `build bench`
# and `build sweep profile` in turn. A stage that runs out of time is interrupted. The bench's parts run one by one, those that
# are done soonest first, into one file: a part that is interrupted keeps its finished cases and costs no other its own.
# Needs torch, triton, pytest, pytest-benchmark, pytest-timeout, transformers, matplotlib, hypothesis and numpy; the
# extension also nvcc, setuptools>=77, pybind11 and ninja. compute-sanitizer, ncu, peft and liger-kernel are used where
# they are there.
set -u
cd "$(dirname "$0")/.."
out=${1:-bench/results/$(python3 -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))')}
[ $# -gt 0 ] && shift
stages=${*:-build test sanitizer bench sweep profile}
mkdir -p "$out"
export PYTHONPATH=. PYTHONUNBUFFERED=1
failed=0
step() {  # name, seconds it may take, command: the log goes to the folder, its end to the screen
    name=$1 limit=$2; shift 2
    echo "== $name"
    timeout -s INT -k 20 "$limit" "$@" >"$out/$name.log" 2>&1 || { echo "$name: exit $?"; failed=1; }
    tail -n "${lines:-12}" "$out/$name.log"
}
check() {  # a tool of compute-sanitizer, over small sizes: the extension, every kernel of the adapter, a mixed batch
    step "$1" 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 1 \
        python3 -m pytest -q -o addopts= tests/test_optim_cuda.py tests/test_gpu.py \
        -k "test_more_tensors_and_groups or test_activations or test_mixed_adapters or (test_shapes and 577)"
}

for stage in $stages; do
    case $stage in
    build) step build 60 python3 -m pip install --quiet --no-build-isolation --no-deps -e . ;;
    test) step test 240 python3 -m pytest -q -o addopts= tests/test_gpu.py tests/test_optim_cuda.py ;;
    sanitizer) check memcheck; check racecheck ;;
    bench)
        json=$out/$(date -u +%Y-%m-%d)-$(git rev-parse --short=7 HEAD 2>/dev/null || echo unknown).json
        for part in optimizer:60 memory:60 step:150 adapter:180; do
            lines=150 step "bench-${part%:*}" "${part#*:}" \
                python3 -m bench "${part%:*}" --append --json "$json"
        done
        ;;
    sweep) lines=30 step sweep 80 python3 -m bench sweep -r 64 --json "$out/sweep.json" ;;
    profile)
        lines=200 step profile 90 ncu --profile-from-start off --clock-control none --section SpeedOfLight \
            --section MemoryWorkloadAnalysis --section ComputeWorkloadAnalysis --section Occupancy \
            python3 -m bench profiled
        ;;
    *) echo "on_gpu.sh: no stage $stage: build test sanitizer bench sweep profile"; exit 2 ;;
    esac
done
exit $failed
