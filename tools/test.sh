#!/usr/bin/env bash
# Everything CI runs: environment, lint, format, types, tests. Arguments go to pytest:
#   bash tools/test.sh -k reward
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
bash tools/setup_env.sh
bin="$root/.venv/bin"
# pyright, pytest's children and torchrun are found through PATH.
export PATH="$bin:$PATH"
# Many ranks share the cores in tests: one thread each is fastest.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

echo "== ruff check" && "$bin/ruff" check .
echo "== ruff format --check" && "$bin/ruff" format --check .
echo "== pyright" && "$bin/pyright"
echo "== pytest"
suites=()
for suite in unit dist_cpu integration; do
  [ ! -d "tests/$suite" ] || suites+=("tests/$suite")
done
exec "$bin/python" -m pytest "${suites[@]}" "$@"
