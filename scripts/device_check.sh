#!/usr/bin/env bash
# Checks one GPU in at most 8 minutes: scripts/device_check.sh --out FILE.json [--small]; PYTHON=python3 names another Python.
# A shell script, since Python's packages for command lines may be missing on the machine of the GPU.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
PYTHONPATH="$root:$root/scripts${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m benchmarks.device_check "$@"
