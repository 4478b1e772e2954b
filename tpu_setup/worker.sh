#!/usr/bin/env bash
# One host's side of tpu_vm.sh, which ships this file and calls it over ssh.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: worker.sh COMMAND, in ~/meshyard of a TPU host

commands
  install WHEEL [BUCKET]     Python through uv, the wheel, and gs://BUCKET mounted at /mnt/BUCKET
  start [NAME=VALUE ...] -- FLAGS   start experiments.run --supervise FLAGS, detached, with these
                                    variables
  state                      meshyard-state HOST idle | running | exit CODE | gone
  last                       the state and the last line of the log
  stop                       SIGTERM (the run saves and exits 75), after two minutes SIGKILL
  check FLAGS                check_devices.py FLAGS
The log is ~/meshyard/log, the program's exit code goes to ~/meshyard/exit_code.
TEXT
}

FOLDER="$HOME/meshyard"
PYTHON="$FOLDER/venv/bin/python"
STOP_SECONDS="${STOP_SECONDS:-120}"

is_running() { # the id may be another program's after a reboot
  [ -f "$FOLDER/pid" ] && grep -qsa experiments.run "/proc/$(cat "$FOLDER/pid")/cmdline"
}

refuse_if_running() {
  if is_running; then
    echo "error: a run is going on $(hostname); end it with the stop command first" >&2
    exit 2
  fi
}

install() {
  local wheel="$1" bucket="${2:-}"
  refuse_if_running
  [ -x "$HOME/.local/bin/uv" ] || curl -LsSf https://astral.sh/uv/install.sh | sh
  local uv="$HOME/.local/bin/uv"
  "$uv" venv --quiet --clear --python 3.12 "$FOLDER/venv"
  "$uv" pip install --quiet --python "$PYTHON" "meshyard[tpu,gcs] @ file://$FOLDER/$wheel"
  [ -z "$bucket" ] || mount_bucket "$bucket"
}

# Checkpoints are finished by renaming a folder. Cloud Storage does that at once in buckets with a
# hierarchical namespace; in others gcsfuse copies, up to this many files.
mount_bucket() {
  local bucket="$1" folder="/mnt/$1"
  if mountpoint -q "$folder"; then return; fi
  if ! command -v gcsfuse > /dev/null; then
    local key=/usr/share/keyrings/cloud.google.asc site=https://packages.cloud.google.com/apt
    curl -LsSf "$site/doc/apt-key.gpg" | sudo tee "$key" > /dev/null
    echo "deb [signed-by=$key] $site gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
    # A host that has just started is updating itself: wait for it.
    sudo apt-get -qq -o DPkg::Lock::Timeout=600 update
    sudo apt-get -qq -o DPkg::Lock::Timeout=600 install -y gcsfuse
  fi
  sudo mkdir -p "$folder"
  sudo chown "$(id -u):$(id -g)" "$folder"
  gcsfuse --implicit-dirs --rename-dir-limit=100000 "$bucket" "$folder"
}

start() {
  local variables=()
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    variables+=("$1")
    shift
  done
  shift
  refuse_if_running
  [ -x "$PYTHON" ] || { echo "error: $(hostname) has no $PYTHON; install first" >&2; exit 2; }
  rm -f "$FOLDER/exit_code"
  echo "== $(date -u +%FT%TZ) $(hostname): experiments.run $*" >> "$FOLDER/log"
  # The trap keeps this shell until the program has ended, and the program keeps its own handlers.
  # shellcheck disable=SC2016  # expanded by the inner shell
  setsid bash -c 'cd "$0"; trap : TERM INT HUP; code=0; "$@" || code=$?
    echo "$code" > exit_code.new; mv exit_code.new exit_code' \
    "$FOLDER" env "${variables[@]}" "$PYTHON" -u -m experiments.run --supervise "$@" \
    >> "$FOLDER/log" 2>&1 < /dev/null &
  echo $! > "$FOLDER/pid"
  until is_running || [ -f "$FOLDER/exit_code" ]; do sleep 0.05; done
}

state() {
  local state=gone # killed with its shell, or the host went down
  if is_running; then
    state=running
  elif [ -f "$FOLDER/exit_code" ]; then
    state="exit $(cat "$FOLDER/exit_code")"
  elif [ ! -f "$FOLDER/pid" ]; then
    state=idle
  fi
  echo "meshyard-state $(hostname) $state"
}

last() {
  local line=''
  [ ! -f "$FOLDER/log" ] || line="$(tail -n 1 "$FOLDER/log" | tr '\r' '\n' | tail -n 1)"
  echo "$(state | cut -d ' ' -f 2-): $line"
}

stop() {
  local group end=$((SECONDS + STOP_SECONDS)) family
  is_running || return 0
  group="$(cat "$FOLDER/pid")"
  kill -TERM -- "-$group"
  while is_running && [ "$SECONDS" -lt "$end" ]; do sleep 0.2; done
  if is_running; then
    family="$(descendants "$group")" # the supervisor's children have sessions of their own
    kill -KILL -- "-$group"
    # shellcheck disable=SC2086  # a list
    [ -z "$family" ] || kill -KILL $family 2> /dev/null || true
    echo 137 > "$FOLDER/exit_code"
  fi
}

descendants() { # descendants PID: the processes that it began, and that they did
  local child children=()
  read -ra children < <(cat "/proc/$1/task/$1/children" 2> /dev/null) || true
  for child in "${children[@]}"; do
    echo "$child"
    descendants "$child"
  done
}

check() {
  refuse_if_running
  "$PYTHON" "$FOLDER/check_devices.py" "$@"
}

command="${1:-}"
case "$command" in
  install | start | state | last | stop | check) shift; "$command" "$@" ;;
  --help) usage ;;
  *) usage >&2; exit 2 ;;
esac
