#!/usr/bin/env bash
# Makes .venv beside setup.py with the pinned CPU stack and this package (editable).
# Idempotent: a stamp inside an environment holds the hash of everything it was made from.
#   bash tools/setup_env.sh             PYTHON=/path/to/python3.11 bash tools/setup_env.sh
#   bash tools/setup_env.sh --megatron 0.19.2    makes .venv-next, too: .venv with another
#                                                megatron-core in front (1 GB more, for triton)
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
lock="$root/requirements/cpu.txt"
venv="$root/.venv"
next="$root/.venv-next"

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

# hash_of FILE...: what an environment was made from.
hash_of() { cat "$@" | sha256sum | cut -d' ' -f1; }

# is_current VENV HASH
is_current() {
  [ -x "$1/bin/python" ] && [ "$(cat "$1/.setup_stamp" 2>/dev/null)" = "$2" ] || return 1
  say "$1 is up to date"
}

# finish VENV HASH MODULE...: imports the modules and stamps the environment.
finish() {
  local venv="$1" hash="$2"
  shift 2
  say "checking imports"
  # From another folder, so that the installed package is found and not the checkout.
  (cd "$venv" && "$venv/bin/python" -c '
import sys
from importlib import import_module
import torch, megatron.core
for name in sys.argv[1:]: import_module(name)
print(f"setup_env: torch {torch.__version__}, megatron-core {megatron.core.__version__}")
' "$@" 2> "$venv/.import_errors") || { cat "$venv/.import_errors" >&2; fail "an import failed"; }
  printf '%s\n' "$hash" > "$venv/.setup_stamp"
  say "done; activate with: . $venv/bin/activate"
}

make_venv() {
  local hash python
  hash="$(hash_of "$lock" "$root/setup.py")"
  ! is_current "$venv" "$hash" || return 0
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
  rm -f "$venv/.setup_stamp"
  say "installing $(grep -c '==' "$lock") pinned packages (about 3 GB unpacked, a few minutes)"
  "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-deps -r "$lock"
  say "installing megatron_qlrl (editable)"
  "$venv/bin/python" -m pip install -qq --disable-pip-version-check \
    --no-deps --no-build-isolation -e "$root"
  finish "$venv" "$hash" vllm megatron_qlrl
}

# make_next LOCK: an environment that sees the packages of .venv behind the few of its own.
make_next() {
  local lock="$1" site="lib/python3.11/site-packages" hash base script
  hash="$(hash_of "$lock" "$venv/.setup_stamp")"
  ! is_current "$next" "$hash" || return 0
  say "making $next: $(grep '==' "$lock" | tr '\n' ' ')in front of $venv (1 GB for triton)"
  base="$("$venv/bin/python" -c 'import sys; print(sys._base_executable)')"
  "$base" -m venv --clear --without-pip "$next"
  echo "import site; site.addsitedir('$venv/$site')" > "$next/$site/base.pth"
  # Scripts name their interpreter in the first line.
  for script in qlrl pytest; do
    sed "1s|.*|#!$next/bin/python|" "$venv/bin/$script" > "$next/bin/$script"
    chmod +x "$next/bin/$script"
  done
  local install=("$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-deps
    --no-compile --target "$next/$site")
  "${install[@]}" "$(grep '^triton==' "$lock")"
  # PyPI has this megatron-core for Python 3.12 only.
  "${install[@]}" --python-version 3.12 --ignore-requires-python --only-binary=:all: \
    "$(grep '^megatron-core==' "$lock")"
  finish "$next" "$hash" megatron_qlrl
}

case "$#:${1:-}" in
  0:) make_venv ;;
  2:--megatron)
    other="$root/requirements/megatron-$2.txt"
    [ -f "$other" ] || fail "megatron-core $2 is not pinned here; there is:" \
      "$(cd "$root/requirements" && echo megatron-*.txt)"
    make_venv
    make_next "$other"
    ;;
  *) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac
