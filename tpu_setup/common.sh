# shellcheck shell=bash
# What tpu_vm.sh, gke.sh and slurm.sh share; they source it. A user's mistake is one sentence and
# exit code 2; what gcloud, kubectl or sbatch refuse keeps their own exit code.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: these scripts need bash 4.4 or newer (on macOS: brew install bash)" >&2
  exit 2
fi

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
ROOT="$(dirname "$HERE")"
# shellcheck source-path=SCRIPTDIR source=tpu_setup/flags.sh
. "$HERE/flags.sh"

DRY=no # set by --dry-run: commands are printed, nothing is run

mistake() {
  echo "error: $1" >&2
  exit 2
}

quoted() { # one line of words that a shell reads back as the same words
  local word line='' quote="'\\''"
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+^-]+$ ]] || word="'${word//\'/$quote}'"
    line="$line $word"
  done
  printf '%s' "${line# }"
}

run() {
  if [ "$DRY" = yes ]; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

needed() { # needed VALUE OPTION
  [ -n "$1" ] || mistake "$2 is needed (see --help)"
}

check_name() { # check_name NAME: what Google Cloud and Kubernetes both accept
  needed "$1" --name=NAME
  [[ $1 =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    mistake "--name=$1: use up to 40 lower-case letters, digits and dashes, beginning with a letter"
}

check_number() { # check_number VALUE OPTION
  [[ $1 =~ ^[1-9][0-9]*$ ]] || mistake "$2=$1 is not a positive whole number"
}

check_env() { # check_env NAME=VALUE
  [[ $1 =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || mistake "--env=$1 is not of the form NAME=VALUE"
}

# The cloud's names: v4, v5p and tpu7x count TensorCores, two a chip; v5litepod and v6e count chips.
# Sets CHIP, CHIPS, TOPOLOGY ('' for a size whose shape is not standard).
parse_type() {
  local type="$1" count
  needed "$type" --type=TYPE
  [[ $type =~ ^(v4|v5p|v5litepod|v6e|tpu7x)-([1-9][0-9]*)$ ]] ||
    mistake "--type=$type is no TPU type; examples: v4-32, v5litepod-16, v5p-64, v6e-16"
  CHIP="${BASH_REMATCH[1]}" count="${BASH_REMATCH[2]}"
  case "$CHIP" in
    v5litepod | v6e)
      CHIPS="$count"
      [[ " 1 4 8 16 32 64 128 256 " == *" $count "* ]] ||
        mistake "--type=$type: sizes of $CHIP are 1, 4, 8, 16, 32, 64, 128 and 256 chips"
      ;;
    *)
      CHIPS=$((count / 2))
      ((count % 8 == 0)) ||
        mistake "--type=$type: sizes of $CHIP count cores and are multiples of 8 (4 chips a host)"
      ;;
  esac
  # shellcheck disable=SC2034  # for the scripts that source this
  TOPOLOGY="$(standard_topology)"
}

standard_topology() {
  case "$CHIP:$CHIPS" in
    v5litepod:1 | v6e:1) echo 1x1 ;;
    v5litepod:4 | v6e:4) echo 2x2 ;;
    v5litepod:8 | v6e:8) echo 2x4 ;;
    v5litepod:16 | v6e:16) echo 4x4 ;;
    v5litepod:32 | v6e:32) echo 4x8 ;;
    v5litepod:64 | v6e:64) echo 8x8 ;;
    v5litepod:128 | v6e:128) echo 8x16 ;;
    v5litepod:256 | v6e:256) echo 16x16 ;;
    *:4) echo 2x2x1 ;;
    *:8) echo 2x2x2 ;;
    *:16) echo 2x2x4 ;;
    *:32) echo 2x4x4 ;;
    *:64) echo 4x4x4 ;;
    *:128) echo 4x4x8 ;;
    *:256) echo 4x8x8 ;;
    *:512) echo 8x8x8 ;;
    *:1024) echo 8x8x16 ;;
    *:2048) echo 8x16x16 ;;
    *:4096) echo 16x16x16 ;;
    *) ;;
  esac
}

wheel_name() {
  local version
  version="$(sed -n 's/^version = "\(.*\)"$/\1/p' "$ROOT/pyproject.toml")"
  echo "meshyard-$version-py3-none-any.whl"
}

# build_wheel FOLDER: the wheel of the files as they are now, in a folder that holds nothing else.
# It is built from a copy, because setuptools also ships what an earlier build left in build/.
build_wheel() {
  local folder="$1" python="${PYTHON:-python3}" copy="$1/source"
  run mkdir -p "$copy" "$folder/wheel"
  run cp -R "$ROOT/pyproject.toml" "$ROOT/README.md" "$ROOT/LICENSE" "$ROOT/mesh" "$ROOT/layers" \
    "$ROOT/experiments" "$copy"
  run "$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder/wheel" "$copy" ||
    refuse_wheel "$python could not build the wheel (it needs pip and Python 3.11; set PYTHON)"
  [ "$DRY" = yes ] || [ -f "$folder/wheel/$(wheel_name)" ] ||
    refuse_wheel "$python built no $(wheel_name)"
}

refuse_wheel() {
  echo "error: $1; nothing was shipped" >&2
  exit 1
}
