# What the batch scripts share; they source it in the folder of submission, the repository's root.
#
# Environment:
#   CONTAINER     image for pyxis/enroot (a name or a .sqsh file); none: .venv, or what is active
#   MOUNTS        more mounts for the container, /a:/a,/b:/b; the repository is mounted where it is
#   MAX_FAILURES  failures without a new checkpoint in between that end the job (3)
# Nodes, time, account: flags of sbatch, which win over the #SBATCH lines of the scripts
# (SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_TIMELIMIT do too).
#
# Exit codes of a run: 0 done; 2 a user's mistake, never tried again; 85 asked to stop and saved:
# the job comes back; anything else is a failure: it comes back unless it failed too often.

repository="$PWD"
step_options=(--unbuffered --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}")
if [ -n "${CONTAINER:-}" ]; then
  step_options+=(--container-image="$CONTAINER" --container-workdir="$repository"
    --container-mounts="$repository:$repository${MOUNTS:+,$MOUNTS}")
elif [ -f .venv/bin/activate ]; then
  . .venv/bin/activate
fi

node_names="$(scontrol show hostnames "${SLURM_JOB_NODELIST:?this is a batch script: use sbatch}")"
MASTER_ADDR="$(head -n 1 <<< "$node_names")" # the port comes from the job's and step's numbers
export MASTER_ADDR PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"

# The run stops by itself when the time does not suffice for another step. Newer Slurms say when
# it is up; a limit that is changed later is left to --signal.
ends_at="$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e 2> /dev/null || true)"
if [ -z "${SLURM_JOB_END_TIME:-}" ] && [ -n "$ends_at" ]; then # an empty date means today
  SLURM_JOB_END_TIME="$(date --date="$ends_at" +%s 2> /dev/null || true)"
fi
export SLURM_JOB_END_TIME="${SLURM_JOB_END_TIME:-}"

# A USR1 for this script (#SBATCH --signal=B:USR1@300) goes on to the tasks of the step that runs.
told=0 srun_pid=""
trap 'told=$((told + 1)); [ -z "$srun_pid" ] || kill -USR1 "$srun_pid" 2> /dev/null || true' USR1

# step SRUN_OPTIONS... -- QLRL_ARGUMENTS...: a step of the job, waited for.
step() {
  local options=() code=0 before
  while [ "$1" != "--" ]; do options+=("$1") && shift; done
  shift
  srun "${step_options[@]}" "${options[@]}" python -m megatron_qlrl "$@" &
  srun_pid=$!
  while :; do # a signal ends `wait`, not the step
    before="$told" code=0
    wait "$srun_pid" || code=$?
    [ "$before" != "$told" ] || break
  done
  srun_pid=""
  return "$code"
}

# run sft|rl|eval EXAMPLE [KEY=VALUE ...]: checks the nodes, runs one process for each task, and
# ends the job or sends it back into the queue. EXAMPLE: a folder with a config.yaml, or a file.
run() {
  local command="$1" config="${2:?usage: sbatch [SBATCH_OPTIONS] slurm/SCRIPT.sh EXAMPLE [KEY=VALUE ...]}"
  shift 2
  [ ! -d "$config" ] || config="${config%/}/config.yaml"
  # Else a job told not to resume would begin anew each time that it comes back.
  [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] || set -- "$@" checkpoint.resume=true
  local code=0
  echo "qlrl: job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on ${node_names//$'\n'/ }"
  step --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 -- \
    slurm check "$command" "$config" "$@" --nodes "${node_names//$'\n'/,}" --tasks "$SLURM_NTASKS" ||
    code=$?
  [ "$code" -ne 0 ] || [ "$told" -eq 0 ] || code=85
  # --wait: when a process is gone, the others get so many seconds to leave by themselves. They do
  # when they stop or fail together; --kill-on-bad-exit would cut off what they still write.
  [ "$code" -ne 0 ] || step --ntasks="$SLURM_NTASKS" --kill-on-bad-exit=0 --wait=60 -- \
    "$command" "$config" "$@" || code=$?
  case "$code" in
    0 | 2) exit "$code" ;;
    85) ;;
    *)
      echo "qlrl: the run ended with exit code $code" >&2
      step --nodes=1 --ntasks=1 -- slurm after-failure "$config" "$@" --code "$code" \
        --limit "${MAX_FAILURES:-3}" || exit "$code"
      ;;
  esac
  echo "qlrl: job $SLURM_JOB_ID goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID" ||
    echo "qlrl: it cannot be requeued here; submit it again: the run goes on" >&2
  exit "$code"
}
