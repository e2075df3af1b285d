#!/usr/bin/env bash
# Everything CI runs: environment, lint, format, types, tests. Without arguments all tests, in two
# processes side by side; arguments go to pytest:
#   bash tools/test.sh                 bash tools/test.sh tests/unit -k reward
# Tests run even when lint or types fail; the exit code tells of either.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
bash tools/setup_env.sh
bin="$root/.venv/bin"
# pyright and the tests' own processes are found through PATH.
export PATH="$bin:$PATH"
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

echo "== pytest"
# Last, so that its summary is the last line.
code=0
# The order of pyproject.toml's testpaths, longest first, so that both processes end together.
[ $# -gt 0 ] || set -- --numprocesses=2 --dist=loadfile --no-loadscope-reorder --durations=20
python -m pytest "$@" || code=$?
[ -z "$failed" ] || [ "$code" -ne 0 ] || code=1
exit "$code"
