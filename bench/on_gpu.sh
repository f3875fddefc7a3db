#!/bin/sh
# A GPU for a few minutes: sh bench/on_gpu.sh prepare|first|second [--help]
# `prepare` needs git and no GPU: it fills .gpu/ with what to bring along, for the versions of the interpreter that PYTHON
# names. `first` (8 minutes) and `second` (4) leave one archive of results each in --out; with --rehearse they run on a
# CPU, at tiny sizes. `--help` says what goes where.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m bench.gpu "$@"
