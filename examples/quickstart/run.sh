#!/usr/bin/env bash
# The whole method on a toy task, on any machine, in about ten minutes after installation:
# environment, data, warm-up SFT, two RL phases, evaluation, Hugging Face folder, report, a check of
# that folder, table. The seconds in the last line leave the check out.
#
#   bash examples/quickstart/run.sh                        one process
#   bash examples/quickstart/run.sh policy.tp=2            two processes, tensor parallel
#   bash examples/quickstart/run.sh policy.cp=2            two processes, context parallel
#   OUT=runs/seed1 bash examples/quickstart/run.sh run.seed=1
#   VENV=.venv-next bash examples/quickstart/run.sh       with the other Megatron-core
#
# Arguments are settings (see config.yaml) for both stages. An interrupted run resumes.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cd "$here/../.."
out="${OUT:-runs/quickstart}"

bash tools/setup_env.sh
export PATH="$PWD/${VENV:-.venv}/bin:$PATH"
started="$(date +%s)"

[ -f "$out/data/eval_long.parquet" ] || qlrl data toy "$out/data" --train 10000 --eval 256
files=("data.train_files=[$out/data/train.parquet]" "data.sft_files=[$out/data/sft.parquet]"
  "data.eval_files=[$out/data/eval_short.parquet,$out/data/eval_long.parquet]")

echo "== warm-up SFT"
qlrl sft "$here/config.yaml" "${files[@]}" run.dir="$out/sft" evaluation.before_training=true \
  optimizer.lr=1.0e-3 optimizer.min_lr_ratio=0.1 "$@"
echo "== RL: phase 1 (short documents), phase 2 (long documents)"
qlrl rl "$here/config.yaml" "${files[@]}" run.dir="$out/rl" model.path="$out/sft/hf" "$@"

echo "== report: $out/rl/report.html; check of the Hugging Face folder $out/rl/hf"
trained="$(date +%s)" checked=0
qlrl release check "$out/rl/hf" || checked=$?

python "$here/summary.py" "$out" --started "$((started + $(date +%s) - trained))"
exit "$checked"
