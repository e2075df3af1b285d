#!/usr/bin/env bash
# Reinforcement learning, all phases, one process for each GPU. From the repository's root:
#
#   sbatch --nodes=4 slurm/phase_rl.sh examples/quickstart
#   sbatch --nodes=4 --account=me --time=12:00:00 slurm/phase_rl.sh my.yaml run.dir=/scratch/run
#   CONTAINER=image.sqsh MOUNTS=/scratch:/scratch sbatch slurm/phase_rl.sh examples/quickstart
#   sbatch --gpus-per-node=0 --ntasks-per-node=2 --cpus-per-task=4 slurm/...    without GPUs
#
# Arguments after the example are settings. The job checks its nodes first. When its time does not
# suffice for another step, or five minutes before it is up, it saves and goes back into the queue;
# so it does after a failure. Slurm lets a job that comes back wait for two minutes
# (`scontrol update JobId=... StartTime=now` shortens it).
# More: slurm/common.sh.
#SBATCH --job-name=qlrl-rl
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
run rl "$@"
