#!/usr/bin/env bash
# The LLM judge as a job of its own: one GPU serves the training runs of many nodes.
#
#   sbatch slurm/judge.sh                                    Qwen2.5-1.5B-Instruct, port 8000
#   MODEL=/models/judge PORT=8100 sbatch slurm/judge.sh      another model (or its folder), port
#   sbatch slurm/judge.sh --max-model-len 8192               arguments go to vLLM's server
#
# When it is ready, URL_FILE (default: judge_<job id>.url in the folder of submission) holds the
# address for the run's config:
#
#   qlrl rl config.yaml "reward.judge.urls=[$(cat judge_*.url)]" reward.judge.model=...
#
# With VLLM_API_KEY in the environment of sbatch the server asks for that key; the run names a
# variable that holds it: reward.judge.api_key_env=VLLM_API_KEY.
#SBATCH --job-name=qlrl-judge
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@60
set -euo pipefail

model="${MODEL:-Qwen/Qwen2.5-1.5B-Instruct}"
port="${PORT:-8000}"
url_file="${URL_FILE:-${SLURM_SUBMIT_DIR:-$PWD}/judge_${SLURM_JOB_ID:-local}.url}"

cd "${SLURM_SUBMIT_DIR:-$PWD}"
[ ! -f .venv/bin/activate ] || . .venv/bin/activate

# In the background, so that a signal for this script is handed on at once.
python -m megatron_qlrl judge serve --model "$model" --host 0.0.0.0 --port "$port" -- "$@" \
  > >(while read -r line; do
    echo "$line"
    case "$line" in "judge ready"*) echo "http://$(hostname -f):$port/v1" > "$url_file" ;; esac
  done) &
server=$!
trap 'kill -TERM "$server"' TERM INT
trap 'rm -f "$url_file"' EXIT
code=0
# A signal ends the first wait; the second one is for the server's own end.
wait "$server" || code=$?
wait "$server" || code=$?
exit "$code"
