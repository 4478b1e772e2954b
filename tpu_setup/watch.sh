# shellcheck shell=bash disable=SC2154  # the variables and functions are those of tpu_vm.sh
# `tpu_vm.sh watch`: keep a run going from a machine that outlives the slice. Sourced by tpu_vm.sh.
#
# Each look decides from what is there, never from what was done before, so watch itself may be
# stopped and started again at any time, also over a run that launch began.

say() { echo "$(date +%T) watch: $*"; }

watch() {
  check_workdir
  parse_slice
  if [ "$DRY" = yes ]; then print_plan; return; fi
  failures=0 created=no launched_at=0 straggling=0
  local state code seen=no
  while true; do
    code=0
    state="$(slice_state)" || code=$?
    if [ "$code" -ne 0 ]; then
      [ "$seen" = yes ] || exit "$code" # the first look: a wrong zone, project or login
      say "gcloud failed with $code; looking again in $poll s"
      sleep "$poll"
      continue
    fi
    seen=yes
    case "$state" in
      '') make_slice ;;
      FAILED)
        say "the request FAILED"
        count_failure 1
        remake_slice
        ;;
      SUSPENDED | PREEMPTED | TERMINATED)
        say "the slice is $state"
        remake_slice
        ;;
      ACTIVE) look_at_run ;;
      *) say "the slice is $state" ;; # queued, being provisioned or taken away
    esac
    sleep "$poll"
  done
}

check_workdir() {
  local word
  for word in "${program[@]}"; do
    [[ $word != --workdir=/* && $word != --workdir=gs://* ]] || return 0
  done
  mistake "watch needs -- --workdir=gs://BUCKET/FOLDER, or /PATH on a shared disk, to outlive the slice"
}

print_plan() {
  echo "# every $poll s"
  slice_state
  on_hosts "$STATE"
  echo "# when the slice is preempted, suspended or failed"
  delete
  request
  echo "# when it is ACTIVE again"
  install
  echo "# then, and after 75, 76 or a crash"
  start
}

make_slice() {
  local code=0
  say "requesting $slices x $type"
  request || code=$?
  if [ "$code" -eq 0 ]; then
    created=yes
  elif [ "$created" = no ]; then
    exit "$code" # quota, permission, name: waiting does not help
  else
    count_failure "$code"
  fi
}

remake_slice() {
  delete || { say "could not delete; trying again"; return 0; }
  make_slice
}

# Crashes and failed requests in a row; a run that lasted ten minutes starts the count anew.
count_failure() {
  failures=$((failures + 1))
  if [ "$failures" -ge "$max_failures" ]; then
    say "$failures failures in a row; giving up"
    finish "$1"
  fi
}

finish() {
  say "the program ended with $1"
  if [ "$delete_at_end" = yes ]; then delete || true; fi
  exit "$1"
}

STATE='bash meshyard/worker.sh state 2> /dev/null || echo meshyard-state none new'

look_at_run() {
  local output states answered code=0
  output="$(on_hosts "$STATE" 2>&1)" || code=$?
  states="$(sed -n 's/^meshyard-state [^ ]* //p' <<< "$output")"
  answered="$(grep -c . <<< "$states" || true)"
  if [ "$code" -ne 0 ] || [ "$answered" -ne $((HOSTS * slices)) ]; then
    # Not a reason to delete the slice: this machine's ssh may be what fails.
    say "$answered of $((HOSTS * slices)) hosts answered: $(tail -n 1 <<< "$output")"
    return
  fi
  if ! grep -qvx running <<< "$states"; then
    straggling=0 # all is well
  elif grep -qx new <<< "$states"; then
    begin install
  elif ! grep -qvx idle <<< "$states"; then
    begin
  elif grep -qx running <<< "$states"; then
    end_stragglers
  else
    decide "$states"
  fi
}

# Some hosts have ended and others go on. They follow by themselves, except one that is stuck.
end_stragglers() {
  straggling=$((straggling + 1))
  if [ "$straggling" -gt 5 ]; then
    say "some hosts have ended, the others go on: stopping them"
    stop || say "could not stop them"
    straggling=0
  fi
}

decide() { # decide STATES, of which none is running
  local code codes
  straggling=0
  codes="$(sed -n -e 's/^exit //p' -e 's/^gone$/137/p' -e 's/^idle$/75/p' <<< "$1" | sort -un)"
  for code in 2 77 130; do # never restarted, whatever the other hosts say
    if grep -qx "$code" <<< "$codes"; then finish "$code"; fi
  done
  code="$(tail -n 1 <<< "$codes")"
  case "$code" in
    0) finish 0 ;;
    75 | 76) say "the program ended with $code and wants a restart" ;;
    *)
      say "the program crashed with $code"
      [ $((SECONDS - launched_at)) -lt 600 ] || failures=0
      count_failure "$code"
      ;;
  esac
  begin
}

begin() { # begin [install]
  if [ "${1:-}" = install ]; then
    say "installing"
    # A process of its own, which stops at the first command that fails.
    bash "$0" install "${options[@]}" || { say "install failed"; count_failure 1; return; }
  fi
  say "launching: experiments.run ${program[*]}"
  if start; then launched_at=$SECONDS; else say "launch failed"; count_failure 1; fi
}
