#!/usr/bin/env bash
# Create a TPU VM slice, install meshyard on all its workers, launch a run, delete the slice.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: tpu_vm.sh COMMAND --name=NAME --zone=ZONE [options] [-- flags of experiments.run]

commands
  create   --type=v5p-64 [--version=IMAGE] [--spot]   create the slice
  install                                             ship the wheel, install it on all workers
  launch   [--type=...] -- --config=moe_70b ...       create if --type is given, install, start
  status                                              last line of every worker's log
  delete                                              delete the slice

options
  --name=NAME     of the TPU VM
  --zone=ZONE     where it is, such as us-east5-a
  --dry-run       print the exact commands instead of running them
  --help          this text

A launched run is detached: it goes on when the connection is lost, one log a worker in
~/meshyard.log. The slice's own Python is too old, so install brings one of its own.
TEXT
}

command="${1:-}"
[ "$command" = "--help" ] && { usage; exit 0; }
[ -n "$command" ] || { usage >&2; exit 2; }
shift

name='' zone='' type='' version='v2-alpha-tpuv5' spot='' dry=no
while [ $# -gt 0 ]; do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --version=*) version="${1#*=}" ;;
    --spot) spot=--spot ;;
    --dry-run) dry=yes ;;
    --help) usage; exit 0 ;;
    --) shift; break ;;
    *) echo "error: unknown option $1 (see --help)" >&2; exit 2 ;;
  esac
  shift
done
[ -n "$name" ] && [ -n "$zone" ] || { echo "error: --name and --zone are needed" >&2; exit 2; }

run() {
  if [ "$dry" = yes ]; then printf '%q ' "$@"; printf '\n'; else "$@"; fi
}

tpu() { run gcloud compute tpus tpu-vm "$@" --zone="$zone"; }

everywhere() { tpu ssh "$name" --worker=all --command="$1"; }

create() {
  [ -n "$type" ] || { echo "error: create needs --type, such as v5p-64" >&2; exit 2; }
  tpu create "$name" --accelerator-type="$type" --version="$version" ${spot:+"$spot"}
}

install() {
  local root wheel
  root="$(cd "$(dirname "$0")/.." && pwd)"
  run python3 -m pip wheel --quiet --no-deps --wheel-dir "$root/dist" "$root"
  wheel="$(ls -t "$root"/dist/meshyard-*.whl 2>/dev/null | head -1 || true)"
  wheel="${wheel:-$root/dist/meshyard-0.1.0-py3-none-any.whl}"
  tpu scp "$wheel" "$name:" --worker=all
  everywhere "curl -LsSf https://astral.sh/uv/install.sh | sh && ~/.local/bin/uv venv --clear --python 3.12 ~/venv && ~/.local/bin/uv pip install --python ~/venv/bin/python 'meshyard[tpu] @ file://'\$HOME/$(basename "$wheel")"
}

launch() {
  [ $# -gt 0 ] || { echo "error: launch needs the flags of experiments.run after --" >&2; exit 2; }
  [ -z "$type" ] || create
  install
  everywhere "nohup ~/venv/bin/python -m experiments.run $(printf '%q ' "$@")> ~/meshyard.log 2>&1 < /dev/null &"
}

case "$command" in
  create) create ;;
  install) install ;;
  launch) launch "$@" ;;
  status) everywhere "tail -n 1 ~/meshyard.log" ;;
  delete) tpu delete "$name" --quiet ;;
  *) echo "error: unknown command $command" >&2; usage >&2; exit 2 ;;
esac
