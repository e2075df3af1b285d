#!/usr/bin/env bash
# Checks that what `pip install .[gpu]` asks for can be installed together on Python 3.12, without
# installing it: every package must have a wheel. transformer_engine_torch alone has none: it is
# built from source, so it only has to exist in the version of Transformer Engine that was chosen.
#   PYTHON=python3.12 bash tools/check_gpu_extra.sh
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3.12}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip --disable-pip-version-check)
"${pip[@]}" install -q setuptools wheel
# setup.py itself says what it needs.
"$work/venv/bin/python" setup.py -q egg_info --egg-base "$work"
"$work/venv/bin/python" - "$work"/*.egg-info/requires.txt > "$work/needs.txt" <<'PYTHON'
import sys

section = ""
for line in open(sys.argv[1]).read().split():
    if line.startswith("["):
        section = line
    elif section in ("", "[gpu]"):
        print(line.replace("transformer-engine[pytorch]", "transformer-engine"))
PYTHON
"${pip[@]}" install -q --dry-run --ignore-installed --only-binary=:all: \
  --report "$work/report.json" -r "$work/needs.txt"
version="$("$work/venv/bin/python" - "$work/report.json" <<'PYTHON'
import json
import re
import sys

packages = [item["metadata"] for item in json.load(open(sys.argv[1]))["install"]]
versions = {re.sub(r"[-_.]+", "-", p["name"]).lower(): p["version"] for p in packages}
for name in ("torch", "vllm", "megatron-core", "transformer-engine"):
    print(f"check_gpu_extra: {name} {versions[name]}", file=sys.stderr)
print(versions["transformer-engine"])
PYTHON
)"
"${pip[@]}" index versions transformer_engine_torch 2>/dev/null | grep -qwF "$version" ||
  { echo "check_gpu_extra: error: there is no transformer_engine_torch $version" >&2; exit 1; }
echo "check_gpu_extra: everything has a wheel, and transformer_engine_torch $version has a source"
