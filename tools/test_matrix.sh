#!/usr/bin/env bash
# Unit and multi-rank tests with the vector instructions of older processors and with two threads:
# rounding differs there, and no bound may notice. Then once with the other megatron-core.
#   bash tools/test_matrix.sh            bash tools/test_matrix.sh tests/unit/policy
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"
[ $# -gt 0 ] || set -- tests/dist_cpu tests/unit

code=0
for threads in 1 2; do
  for isa in "" ATEN_CPU_CAPABILITY=avx2 ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2; do
    echo "== $isa OMP_NUM_THREADS=$threads"
    env $isa OMP_NUM_THREADS="$threads" python -m pytest -q "$@" || code=$?
  done
done
echo "== .venv-next"
bash tools/setup_env.sh --megatron 0.19.2
OMP_NUM_THREADS=1 .venv-next/bin/python -m pytest -q "$@" || code=$?
exit "$code"
