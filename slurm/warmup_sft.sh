#!/usr/bin/env bash
# Warm-up SFT, one process for each GPU; ends with <run.dir>/hf. From the repository's root:
#
#   sbatch --nodes=2 slurm/warmup_sft.sh examples/quickstart run.dir=/scratch/sft
#
# Arguments, environment, signals and returns as in slurm/phase_rl.sh.
#SBATCH --job-name=qlrl-sft
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$PWD}"
. slurm/common.sh
run sft "$@"
