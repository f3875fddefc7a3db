#!/bin/sh
# Build, test and measure on one GPU, in about eight minutes: sh bench/on_gpu.sh [folder for the results]
# Needs torch, triton, pytest, hypothesis and numpy; the extension also nvcc, pybind11 and ninja.
set -u
cd "$(dirname "$0")/.."
out=${1:-bench/results/$(python3 -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))')}
mkdir -p "$out"
export PYTHONPATH=. PYTHONUNBUFFERED=1
failed=0
step() {  # name, seconds it may take, command: the log goes to the folder, its end to the screen
    name=$1 limit=$2; shift 2
    echo "== $name"
    timeout "$limit" "$@" >"$out/$name.log" 2>&1 || { echo "$name: exit $?"; failed=1; }
    tail -n "${lines:-12}" "$out/$name.log"
}

step build 90 python3 -m pip install --quiet --no-build-isolation --no-deps -e .
step test 150 python3 -m pytest -q -o addopts= tests/test_gpu.py
lines=24 step adapter 90 python3 -m bench adapter -T 8192 -d 4096 -r 64 --compiled --json "$out/adapter-main.json"
lines=40 step table 120 python3 -m bench adapter --rounds 5 -r 16 64 256 -d 2048 4096 8192 -T 1 128 2048 8192 \
    --json "$out/adapter.json"
lines=30 step sweep 150 python3 -m bench sweep -r 64 --json "$out/sweep.json"
exit $failed
