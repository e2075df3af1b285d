#!/usr/bin/env bash
# Scores model.path on data.eval_files; writes <run.dir>/eval. From the repository's root:
#
#   sbatch slurm/evaluate.sh examples/quickstart model.path=runs/rl/hf run.dir=runs/eval
#
# Arguments and environment as in slurm/phase_rl.sh. An evaluation is not saved on its way: after a
# failure it begins again, and its time must suffice.
#SBATCH --job-name=qlrl-eval
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$PWD}"
. slurm/common.sh
run eval "$@"
