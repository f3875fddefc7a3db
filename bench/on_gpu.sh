#!/bin/sh
# Build, test and measure on one GPU, in about eight minutes: sh bench/on_gpu.sh [folder for the results]
# A stage that runs out of time is interrupted, and the bench then keeps what it has measured.
# Needs torch, triton, pytest, pytest-benchmark, transformers, matplotlib, hypothesis and numpy; the extension also nvcc,
# pybind11 and ninja.
set -u
cd "$(dirname "$0")/.."
out=${1:-bench/results/$(python3 -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))')}
mkdir -p "$out"
export PYTHONPATH=. PYTHONUNBUFFERED=1
failed=0
step() {  # name, seconds it may take, command: the log goes to the folder, its end to the screen
    name=$1 limit=$2; shift 2
    echo "== $name"
    timeout -s INT -k 20 "$limit" "$@" >"$out/$name.log" 2>&1 || { echo "$name: exit $?"; failed=1; }
    tail -n "${lines:-12}" "$out/$name.log"
}

step build 60 python3 -m pip install --quiet --no-build-isolation --no-deps -e .
step test 120 python3 -m pytest -q -o addopts= tests/test_gpu.py
step sanitizer 60 compute-sanitizer --error-exitcode 1 \
    python3 -m pytest -q -o addopts= tests/test_optim_cuda.py -k test_more_tensors_and_groups
name=$(date -u +%Y-%m-%d)-$(git rev-parse --short=7 HEAD 2>/dev/null || echo unknown)
lines=150 step bench 240 python3 -m bench adapter optimizer step memory --json "$out/$name.json"
lines=30 step sweep 80 python3 -m bench sweep -r 64 --json "$out/sweep.json"
exit $failed
