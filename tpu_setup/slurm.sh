#!/usr/bin/env bash
# Runs of meshyard under SLURM: writes a batch script, one process a node, that requeues itself.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu_setup/common.sh
. "$(dirname "$0")/common.sh"

usage() {
  cat <<'TEXT'
usage: slurm.sh COMMAND --name=NAME [options] -- flags of experiments.run

commands
  script   print the batch script
  submit   give it to sbatch

options
  --name=NAME          of the job
  --nodes=N            default 1
  --gpus-per-node=N    GPUs of each node; all belong to its one process
  --tpu=CHIP           TPU nodes instead: v4, v5litepod, v5p or v6e
  --time=HH:MM:SS      limit of one go; the run is told five minutes before and goes on in the next
  --partition=NAME, --account=NAME
  --python=PATH        that has meshyard, on a disk that all nodes see; default python3
  --max-restarts=N     default 100
  --env=NAME=VALUE     environment of the program; repeatable
  --dry-run            print the command of submit instead of running it
  --help               this text

On each node a supervisor starts the program again after 75, 76 and crashes. The job is requeued
when its time is over, a node is lost or a supervisor gives up; it ends on 0, 2, 77 and 130.
TEXT
}

name='' nodes=1 gpus='' tpu='' time='' partition='' account='' python=python3 max_restarts=100
variables=() program=()

parse() {
  while [ $# -gt 0 ]; do
    case "$1" in
      --name=*) name="${1#*=}" ;;
      --nodes=*) nodes="${1#*=}" ;;
      --gpus-per-node=*) gpus="${1#*=}" ;;
      --tpu=*) tpu="${1#*=}" ;;
      --time=*) time="${1#*=}" ;;
      --partition=*) partition="${1#*=}" ;;
      --account=*) account="${1#*=}" ;;
      --python=*) python="${1#*=}" ;;
      --max-restarts=*) max_restarts="${1#*=}" ;;
      --env=*) check_env "${1#*=}"; variables+=("${1#*=}") ;;
      --dry-run) DRY=yes ;;
      --help) usage; exit 0 ;;
      --) shift; program=("$@"); break ;;
      *) mistake "unknown option $1 (see --help)" ;;
    esac
    shift
  done
  check_name "$name"
  check_number "$nodes" --nodes
  check_number "$max_restarts" --max-restarts
  [ "${#program[@]}" -gt 0 ] || mistake "the flags of experiments.run are needed after --"
  if [ -n "$tpu" ]; then
    [ -z "$gpus" ] || mistake "--tpu and --gpus-per-node exclude each other"
    [[ $tpu =~ ^(v4|v5litepod|v5p|v6e)$ ]] ||
      mistake "--tpu=$tpu is none of v4, v5litepod, v5p, v6e"
  else
    needed "$gpus" "--gpus-per-node=N or --tpu=CHIP"
    check_number "$gpus" --gpus-per-node
  fi
}

directives() {
  echo "#SBATCH --job-name=$name"
  echo "#SBATCH --nodes=$nodes"
  echo "#SBATCH --ntasks-per-node=1"
  [ -z "$gpus" ] || echo "#SBATCH --gpus-per-node=$gpus"
  echo "#SBATCH --exclusive"
  [ -z "$time" ] || echo "#SBATCH --time=$time"
  [ -z "$partition" ] || echo "#SBATCH --partition=$partition"
  [ -z "$account" ] || echo "#SBATCH --account=$account"
  cat <<'TEXT'
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=TERM@300
TEXT
}

script() {
  local line lines=() words=("$python" -u -m experiments.run --supervise "${program[@]}")
  # Without this variable JAX asks the TPU, not SLURM, which process is which.
  [ -z "$tpu" ] || words=(env -u SLURM_LOCALID "${words[@]}")
  echo "#!/bin/bash"
  directives
  echo
  mapfile -t lines < <(flag_env "${tpu:-gpu}" 1)
  for line in "${lines[@]}" "${variables[@]}"; do
    echo "export ${line%%=*}=$(quoted "${line#*=}")"
  done
  cat <<TEXT

# One process a node, with a supervisor; srun answers with the highest exit code. Nobody is killed
# when one ends, since the others may be saving; JAX ends those that have lost a peer.
code=0
srun --kill-on-bad-exit=0 --label $(quoted "${words[@]}") || code=\$?
echo "experiments.run ended with \$code, restart \${SLURM_RESTART_COUNT:-0}"

case \$code in
  0 | 2 | 77 | 130) exit \$code ;; # finished, the user's mistake, stopped by the guard, interrupted
esac
if [ "\${SLURM_RESTART_COUNT:-0}" -lt $max_restarts ]; then
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit \$code
TEXT
}

submit() {
  local text
  text="$(script)"
  if [ "$DRY" = yes ]; then
    echo "sbatch <<'SCRIPT'"
    echo "$text"
    echo SCRIPT
  else
    sbatch <<< "$text"
  fi
}

command="${1:-}"
case "$command" in
  '') usage >&2; exit 2 ;;
  --help) usage; exit 0 ;;
  script | submit) parse "${@:2}"; "$command" ;;
  *) mistake "unknown command $command (see --help)" ;;
esac
