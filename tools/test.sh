#!/usr/bin/env bash
# Everything CI runs: environment, lint, format, types, tests.
#   bash tools/test.sh                          all of it
#   bash tools/test.sh --fast                   lint, types, unit tests and one short SFT run; not
#                                               several ranks, vLLM, RL runs, Slurm, servers
#   bash tools/test.sh tests/unit -k reward     lint, types, and pytest with these arguments
#   VENV=.venv-next bash tools/test.sh ...      the same with the other megatron-core
# Without arguments, parity and checkpoints run a second time with the other megatron-core.
# Tests run even when lint or types fail; the exit code tells of either.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
case "${1:-}" in
  -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$root/tools/test.sh"; exit 0 ;;
esac
cd "$root"
venv="${VENV:-.venv}" next=0.19.2
if [ "$venv" = .venv-next ] || [ $# -eq 0 ]; then
  bash tools/setup_env.sh --megatron "$next"
else
  bash tools/setup_env.sh
fi
# pyright and the tests' own processes are found through PATH.
export PATH="$root/$venv/bin:$root/.venv/bin:$PATH"
# Several ranks share the cores in tests: one thread each is fastest.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

failed=""
run() {
  echo "== $*"
  "$@" || failed="$failed [$*]"
}

run ruff check .
run ruff format --check .
run pyright
[ -z "$failed" ] || echo "== FAILED:$failed (see above); running the tests all the same"

code=0
# One process more than there are cores, up to four: tests wait for servers, ranks and Slurm.
cores="$(env -u OMP_NUM_THREADS nproc)"
parallel=(--numprocesses="$((cores < 4 ? cores + 1 : 4))" --dist=loadfile --no-loadscope-reorder
  --durations=20)
if [ $# -eq 0 ] && [ "$venv" = .venv ]; then
  echo "== pytest with megatron-core $next"
  .venv-next/bin/python -m pytest -q "${parallel[@]}" tests/dist_cpu/test_policy_parity.py \
    tests/dist_cpu/test_sharing.py tests/dist_cpu/test_checkpoint.py || code=$?
fi
echo "== pytest"
# Last, so that its summary is the last line.
case "${1:-}" in
  "") set -- "${parallel[@]}" ;;
  --fast) shift; set -- "${parallel[@]}" tests/unit tests/integration/test_fast.py "$@" ;;
esac
python -m pytest "$@" || code=$?
[ -z "$failed" ] || [ "$code" -ne 0 ] || code=1
exit "$code"
