#!/usr/bin/env bash
# Makes .venv beside setup.py with the pinned CPU stack and this package (editable).
# Idempotent: a stamp inside .venv holds the hash of everything it was made from.
#   bash tools/setup_env.sh             PYTHON=/path/to/python3.11 bash tools/setup_env.sh
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
lock="$root/requirements/cpu.txt"
venv="$root/.venv"
stamp="$venv/.setup_stamp"
hash="$(cat "$lock" "$root/setup.py" | sha256sum | cut -d' ' -f1)"

say() { printf 'setup_env: %s\n' "$*"; }
fail() { printf 'setup_env: error: %s\n' "$*" >&2; exit 1; }

# Prints "major.minor" of a Python, nothing when it does not run or cannot make environments.
version_of() {
  "$1" -c 'import sys, venv, ensurepip; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

find_python() {
  local candidate found=""
  local candidates=("python3.11" "python3" "python" "$HOME/.pyenv/versions"/3.11*/bin/python3.11)
  [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    candidate="$(command -v "$candidate" 2>/dev/null)" || continue
    if [ "$(version_of "$candidate")" = "3.11" ]; then
      # An active environment's Python would tie ours to it: go to the one it was made from.
      "$candidate" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))'
      return 0
    fi
    found="$found $candidate ($("$candidate" --version 2>&1 | head -n 1))"
  done
  fail "Python 3.11 with the venv module is needed (the pinned CPU stack is built for it);" \
    "found:${found:- no Python at all}. Install python3.11 and python3.11-venv," \
    "or name one: PYTHON=/path/to/python3.11 bash tools/setup_env.sh"
}

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$hash" ] && [ -x "$venv/bin/python" ]; then
  say "$venv is up to date"
  exit 0
fi

[ "$(uname -s)-$(uname -m)" = "Linux-x86_64" ] ||
  fail "the pinned CPU stack is for Linux x86-64, this is $(uname -s) $(uname -m)"
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
  say "this machine has a GPU; the environment made here is for CPU only (tests, planning)." \
    "For training on GPUs install the 'gpu' extra: see docs/gpus.md"
fi

if [ ! -x "$venv/bin/python" ] || [ "$(version_of "$venv/bin/python")" != "3.11" ]; then
  python="$(find_python)"
  say "making $venv with $python"
  "$python" -m venv --clear "$venv"
fi
rm -f "$stamp"
say "installing $(grep -c '==' "$lock") pinned packages (about 3 GB unpacked, a few minutes)"
"$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-deps -r "$lock"
say "installing megatron_qlrl (editable)"
"$venv/bin/python" -m pip install -qq --disable-pip-version-check \
  --no-deps --no-build-isolation -e "$root"
say "checking imports"
# From another folder, so that the installed package is found and not the checkout.
(cd "$venv" && "$venv/bin/python" -c '
import torch, vllm, megatron.core, megatron_qlrl
print(f"setup_env: torch {torch.__version__}, vllm {vllm.__version__},",
      f"megatron-core {megatron.core.__version__}")
' 2> "$venv/.import_errors") || { cat "$venv/.import_errors" >&2; fail "an import failed"; }
printf '%s\n' "$hash" > "$stamp"
say "done; activate with: . $venv/bin/activate"
