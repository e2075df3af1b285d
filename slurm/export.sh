#!/usr/bin/env bash
# The newest checkpoint of a run's folder (or the checkpoint named) as a Hugging Face folder; one
# process, on the CPU if there is no GPU. From the repository's root:
#
#   sbatch slurm/export.sh runs/rl runs/release
#
# Environment as in slurm/common.sh.
#SBATCH --job-name=qlrl-export
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --output=%x_%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$PWD}"
. slurm/common.sh
step --nodes=1 --ntasks=1 -- export "$@"
