#!/usr/bin/env bash
# Cloud TPU slices by queued resources: create one, run meshyard on all its hosts, see to it that a
# preempted run goes on, delete the slice.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu_setup/common.sh
. "$(dirname "$0")/common.sh"

usage() {
  cat <<'TEXT'
usage: tpu_vm.sh COMMAND --name=NAME --zone=ZONE [options] [-- flags of experiments.run]

commands
  create    --type=v5p-64 [--spot|--reserved] [--num-slices=N]   request a slice, wait until ACTIVE
                                   (--async: do not wait)
  install   [--bucket=BUCKET]      build the wheel; ship it, Python and the bucket to all hosts
  launch    -- --config=NAME ...   start the program on all hosts, detached and supervised; with
                                   --type=... create and install come first
  status                           the slice, and state and last log line of every host
  tail      [--worker=N] [--node=N]   follow one host's log
  check     [--type=...] [-- flags of check_devices.py]   psum, matmul and all-reduce rates; names
                                   slow and missing hosts
  stop                             SIGTERM: the run saves and ends with 75
  watch     --type=... -- --workdir=gs://... ...   create, install, launch, and again after preemption
                                   and where supervisors gave up, until the program ends with 0,
                                   2, 77 or 130
  flags     --type=...             the compiler flags that launch sets, and why (also --type=gpu)
  delete                           delete the slice

options
  --name=NAME         of the queued resource; its slices are NAME, or NAME-0, NAME-1, ...
  --zone=ZONE         such as us-east5-a
  --project=PROJECT   default: that of gcloud config
  --type=TYPE         v4-N, v5p-N (N cores, two a chip), v5litepod-N, v6e-N (N chips)
  --num-slices=N      slices joined over the data-centre network (multislice); default 1
  --spot, --reserved  instead of on-demand
  --version=IMAGE     of the TPU VM; default by type
  --bucket=BUCKET     mount gs://BUCKET at /mnt/BUCKET on every host
  --env=NAME=VALUE    environment of the program, also in place of a recommended flag; repeatable
  --gcloud-create=FLAG, --gcloud-ssh=FLAG   passed on, such as --gcloud-ssh=--tunnel-through-iap
  --poll=SECONDS      between looks of create and watch; default 30
  --max-failures=N    watch gives up after N crashes or failed requests in a row; default 5
  --delete-at-end     watch deletes the slice when the program has ended
  --dry-run           print the exact commands instead of running them
  --help              this text

Each host logs to ~/meshyard/log and leaves the program's exit code in ~/meshyard/exit_code. The
slice's own Python is too old, so install brings one. Commands on several hosts need your key in
ssh-agent: ssh-add ~/.ssh/google_compute_engine
TEXT
}

name='' zone='' type='' version='' project='' bucket='' worker=0 node=0
slices=1 poll=30 max_failures=5 delete_at_end=no wait=yes
place=() capacity=() variables=() create_flags=() ssh_flags=() options=() program=()

parse() {
  while [ $# -gt 0 ]; do
    case "$1" in
      --name=*) name="${1#*=}" ;;
      --zone=*) zone="${1#*=}" ;;
      --project=*) project="${1#*=}" ;;
      --type=*) type="${1#*=}" ;;
      --num-slices=*) slices="${1#*=}" ;;
      --spot | --reserved) capacity+=("$1") ;;
      --version=*) version="${1#*=}" ;;
      --bucket=*) bucket="${1#*=}" bucket="${bucket#gs://}" ;;
      --worker=*) worker="${1#*=}" ;;
      --node=*) node="${1#*=}" ;;
      --env=*) check_env "${1#*=}"; variables+=("${1#*=}") ;;
      --gcloud-create=*) create_flags+=("${1#*=}") ;;
      --gcloud-ssh=*) ssh_flags+=("${1#*=}") ;;
      --poll=*) poll="${1#*=}" ;;
      --max-failures=*) max_failures="${1#*=}" ;;
      --delete-at-end) delete_at_end=yes ;;
      --dry-run) DRY=yes ;;
      --help) usage; exit 0 ;;
      --async) wait=no ;;
      --) shift; program=("$@"); break ;;
      *) mistake "unknown option $1 (see --help)" ;;
    esac
    options+=("$1")
    shift
  done
  check_number "$slices" --num-slices
  check_number "$max_failures" --max-failures
  [[ $poll =~ ^[0-9]+(\.[0-9]+)?$ ]] || mistake "--poll=$poll is not a number of seconds"
  [ "${#capacity[@]}" -le 1 ] || mistake "--spot and --reserved exclude each other"
  [[ $bucket != */* ]] || mistake "--bucket=$bucket: give the bucket alone, without a path"
}

parse_slice() { # checks --type for commands that need one
  parse_type "$type"
  [ "$CHIP" != tpu7x ] ||
    mistake "--type=$type: TPU7x is rented through Kubernetes only; use tpu_setup/gke.sh"
  case "$CHIP:$CHIPS" in
    *:1 | v5litepod:8 | v6e:8) HOSTS=1 ;;
    *) HOSTS=$((CHIPS / 4)) ;;
  esac
}

image() {
  case "$CHIP" in
    v4) echo tpu-ubuntu2204-base ;;
    v5litepod) echo v2-alpha-tpuv5-lite ;;
    v5p) echo v2-alpha-tpuv5 ;;
    v6e) echo v2-alpha-tpuv6e ;;
  esac
}

queued() { # queued SUBCOMMAND ARGUMENTS of gcloud compute tpus queued-resources
  run gcloud compute tpus queued-resources "$@" --quiet "${place[@]}"
}

on_hosts() { # on_hosts COMMAND [FLAG ...]
  local remote="$1"
  shift
  queued ssh "$name" --node=all --worker=all --command="$remote" "$@" "${ssh_flags[@]}"
}

request() {
  parse_slice
  local nodes=("--node-id=$name")
  [ "$slices" -eq 1 ] || nodes=("--node-count=$slices" "--node-prefix=$name")
  queued create "$name" "${nodes[@]}" --accelerator-type="$type" \
    --runtime-version="${version:-$(image)}" "${capacity[@]}" "${create_flags[@]}" --async
}

# The state of the queued resource; '' when there is none; PREEMPTED when a slice of an ACTIVE one
# is gone. Listing, not describing: an absent resource is no error then, a failing gcloud is one.
slice_state() {
  local state nodes
  state="$(queued list --filter="name~/$name\$" --format="value(state.state)")" || return
  if [ "$state" = ACTIVE ]; then
    nodes="$(run gcloud compute tpus tpu-vm list "${place[@]}" \
      --filter="queuedResource~/$name\$" --format="value(state)")" || return
    if grep -qxE 'PREEMPTED|TERMINATED' <<< "$nodes"; then state=PREEMPTED; fi
  fi
  echo "$state"
}

create() {
  request
  [ "$wait" = yes ] || return 0
  if [ "$DRY" = yes ]; then slice_state; return; fi
  local state='' last=none
  while [ "$state" != ACTIVE ]; do
    sleep "$poll"
    state="$(slice_state)"
    [ "$state" = "$last" ] || echo "$(date +%T) $name: ${state:-requested}"
    last="$state"
    case "$state" in
      FAILED | SUSPENDED | PREEMPTED)
        echo "error: the request for $name ended as $state; see: gcloud compute tpus" \
          "queued-resources describe $name --zone=$zone" >&2
        exit 1
        ;;
    esac
  done
}

install() {
  local scratch
  scratch="$(if [ "$DRY" = yes ]; then echo /tmp/meshyard; else mktemp -d; fi)"
  # shellcheck disable=SC2064  # the folder of now
  trap "rm -rf '$scratch'" EXIT
  build_wheel "$scratch"
  on_hosts "mkdir -p meshyard && rm -f meshyard/*.whl"
  queued scp "$scratch/wheel/$(wheel_name)" "$HERE/worker.sh" "$name:meshyard/" \
    --node=all --worker=all "${ssh_flags[@]}"
  on_hosts "$(quoted bash meshyard/worker.sh install "$(wheel_name)" ${bucket:+"$bucket"})"
}

launch() {
  [ "${#program[@]}" -gt 0 ] || mistake "launch needs the flags of experiments.run after --"
  if [ -n "$type" ]; then
    create
    install
  fi
  start
}

start() {
  local text settings=()
  text="$(chip_settings)" || return
  [ -z "$text" ] || mapfile -t settings <<< "$text"
  on_hosts "$(quoted bash meshyard/worker.sh start "${settings[@]}" "${variables[@]}" -- \
    "${program[@]}")"
}

# Recommended flags by --type, or by asking gcloud for the type of the slice.
chip_settings() {
  local known="$type" count="$slices" answer
  if [ -z "$known" ]; then
    [ "$DRY" = no ] || return 0
    answer="$(queued list --filter="name~/$name\$" \
      --format="value(tpu.nodeSpec[0].node.acceleratorType.basename(),tpu.nodeSpec.len())")" ||
      return
    read -r known count <<< "$answer"
    [ -n "$known" ] || { echo "error: there is no slice $name in $zone" >&2; return 1; }
  fi
  parse_type "$known"
  flag_env "$CHIP" "$count"
}

status() {
  queued list --filter="name~/$name\$"
  on_hosts "bash meshyard/worker.sh last"
}

follow() {
  queued ssh "$name" --node="$node" --worker="$worker" \
    --command="tail -n 50 -F meshyard/log" "${ssh_flags[@]}"
}

check() {
  local expected=() output code=0
  if [ -n "$type" ]; then
    parse_slice
    expected=("--expect-hosts=$((HOSTS * slices))" "--expect-devices=$((CHIPS * slices))")
  fi
  queued scp "$HERE/check_devices.py" "$HERE/worker.sh" "$name:meshyard/" \
    --node=all --worker=all "${ssh_flags[@]}"
  local remote
  remote="$(quoted bash meshyard/worker.sh check "${expected[@]}" "${program[@]}")"
  if [ "$DRY" = yes ]; then on_hosts "$remote" --batch-size=all; return; fi
  output="$(on_hosts "$remote" --batch-size=all)" || code=$?
  echo "$output"
  [ -z "$type" ] || [ "$code" -eq 0 ] || name_absent "$output" || true
  exit "$code"
}

# A host that never came keeps the others from starting; each one that did has said so.
name_absent() {
  local here index absent=''
  here="$(sed -n 's/^host \(.*\) is here$/\1/p' <<< "$1" | sort -u)"
  [ "$(grep -c . <<< "$here")" -lt $((HOSTS * slices)) ] || return 0
  if [ "$slices" -eq 1 ]; then # hosts of one slice are called t1v-n-ID-w-INDEX
    for ((index = 0; index < HOSTS; index++)); do
      grep -qE -- "-w-$index\$" <<< "$here" || absent="$absent $index"
    done
  fi
  echo "missing:${absent:+ worker$absent;} only $(grep -c . <<< "$here") of $((HOSTS * slices))" \
    "hosts came: $(tr '\n' ' ' <<< "$here")" >&2
}

stop() { on_hosts "bash meshyard/worker.sh stop"; }

delete() { queued delete "$name" --force; }

command="${1:-}"
case "$command" in
  '') usage >&2; exit 2 ;;
  --help) usage; exit 0 ;;
esac
parse "${@:2}"
case "$command" in
  create | install | launch | status | tail | check | stop | watch | delete)
    check_name "$name"
    needed "$zone" --zone=ZONE
    place=("--zone=$zone" ${project:+"--project=$project"})
    ;;
  flags) ;;
  *) mistake "unknown command $command (see --help)" ;;
esac
case "$command" in
  create | install | launch | status | check | stop | delete) "$command" ;;
  tail) follow ;;
  flags)
    if [ "$type" = gpu ]; then CHIP=gpu; else parse_type "$type"; fi
    print_flags "$CHIP" "$slices"
    ;;
  watch)
    # shellcheck source=tpu_setup/watch.sh
    . "$HERE/watch.sh"
    watch
    ;;
esac
