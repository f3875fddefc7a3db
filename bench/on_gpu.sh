#!/bin/sh
# Measuring in a few minutes on a GPU: sh bench/on_gpu.sh prepare|first|second|cost [--help]
# `prepare` needs git and no GPU: it fills .gpu/ with what to copy there, for the versions of the interpreter that PYTHON
# names. `first` (8 minutes), `second` (4) and `cost` (5) write one archive of results each to --out; with --rehearse they
# run on a CPU, with tiny sizes. `--help` describes the calls.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m bench.gpu "$@"
