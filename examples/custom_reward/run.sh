#!/usr/bin/env bash
# A reward of your own on the toy task: warm-up SFT, then 20 steps of RL for partial credit.
#
#   bash examples/custom_reward/run.sh
#   OUT=runs/seed1 bash examples/custom_reward/run.sh run.seed=1
#
# Arguments are settings (see config.yaml) for both stages. An interrupted run resumes.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cd "$here/../.."
out="${OUT:-runs/custom_reward}"

bash tools/setup_env.sh
export PATH="$PWD/.venv/bin:$PATH"

[ -f "$out/data/eval_long.parquet" ] || qlrl data toy "$out/data" --train 4000 --eval 256 --kind needles
files=("data.train_files=[$out/data/train.parquet]" "data.sft_files=[$out/data/sft.parquet]"
  "data.eval_files=[$out/data/eval_short.parquet]")

qlrl sft "$here/config.yaml" "${files[@]}" run.dir="$out/sft" optimizer.lr=1.0e-3 \
  optimizer.min_lr_ratio=0.1 "$@"
qlrl rl "$here/config.yaml" "${files[@]}" run.dir="$out/rl" model.path="$out/sft/hf" "$@"
