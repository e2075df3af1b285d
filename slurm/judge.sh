#!/usr/bin/env bash
# The LLM judge as a job of its own: one GPU serves the training runs of many nodes.
#
#   sbatch slurm/judge.sh                                    Qwen2.5-1.5B-Instruct, port 8000
#   MODEL=/models/judge PORT=8100 sbatch slurm/judge.sh      another model (or its folder), port
#   sbatch slurm/judge.sh --max-model-len 8192               arguments go to vLLM's server
#
# The server listens on all of the node's interfaces and asks for a key: the one in VLLM_API_KEY of
# sbatch's environment, else a new one. When it is ready, URL_FILE (default: judge_<job id>.url in
# the folder of submission) holds its address, and KEY_FILE (judge_<job id>.key, mode 0600) the new
# key; both go when it ends. The run's config names a variable that holds the key:
#
#   export JUDGE_KEY="$(cat judge_42.key)"
#   qlrl rl config.yaml "reward.judge.urls=[$(cat judge_42.url)]" \
#     reward.judge.api_key_env=JUDGE_KEY reward.judge.model=...
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
key_file="${KEY_FILE:-${SLURM_SUBMIT_DIR:-$PWD}/judge_${SLURM_JOB_ID:-local}.key}"
key=() mine=("$url_file")
if [ -z "${VLLM_API_KEY:-}" ]; then
  key=(--key-file "$key_file")
  [ -e "$key_file" ] || mine+=("$key_file") # one that was there before stays
fi

cd "${SLURM_SUBMIT_DIR:-$PWD}"
[ ! -f .venv/bin/activate ] || . .venv/bin/activate

# In the background, so that a signal for this script is handed on at once.
python -m megatron_qlrl judge serve --model "$model" --host 0.0.0.0 --port "$port" \
  "${key[@]}" -- "$@" \
  > >(while read -r line; do
    echo "$line"
    case "$line" in "judge ready"*) echo "http://$(hostname -f):$port/v1" > "$url_file" ;; esac
  done) &
server=$!
trap 'kill -TERM "$server"' TERM INT
trap 'rm -f "${mine[@]}"' EXIT
code=0
# A signal ends the first wait; the second one is for the server's own end.
wait "$server" || code=$?
wait "$server" || code=$?
exit "$code"
