#!/usr/bin/env bash
# Checks a machine with a GPU: kernels against the reference and against torch, tile_resample against Pillow, TensorRT if
# it is installed, TensorRT-RTX likewise. Writes docs/gpu_report.md and .json in at most 9 minutes; --help lists the
# other options. scripts/pack_rtx.sh packs TensorRT-RTX for a machine that has no package index.
#   lab/gpu_check.sh [OPTION ...]
# Needs torch, triton and numpy; the package need not be installed. PYTHON names the interpreter: .venv's by default, or
# python3.
set -euo pipefail
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
[ -z "${PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ] && PYTHON=$root/.venv/bin/python
python=${PYTHON:-python3}
command -v "$python" >/dev/null || { echo "error: there is no $python; set PYTHON to the Python that has torch" >&2; exit 2; }

export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1
"$python" "$root/lab/gpu_check" "$@" # not -m, which would put the current directory before the packages
