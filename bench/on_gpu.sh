#!/bin/sh
# A GPU for a few minutes: sh bench/on_gpu.sh prepare|first|second [--help]
# `prepare` needs git and no GPU: it fills .gpu/ with what to bring along. `first` (8 minutes) and `second` (4) leave one
# archive of results each; with --rehearse they run on a CPU, at tiny sizes. PYTHON names the interpreter.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m bench.gpu "$@"
