#!/usr/bin/env bash
# Runs of meshyard on Kubernetes: a JobSet of TPU slices or GPU nodes that restarts itself.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu_setup/common.sh
. "$(dirname "$0")/common.sh"

usage() {
  cat <<'TEXT'
usage: gke.sh COMMAND --name=NAME [options] [-- flags of experiments.run]

commands
  image      --image=IMAGE --type=...|--gpu=...      build the container image and push it
  pool       --cluster=CLUSTER --location=REGION --node-locations=ZONE --type=v5p-64 [--spot]
                                                     create the node pools of a TPU run, one a slice
  manifest   --image=IMAGE --type=...|--gpu=... -- --config=NAME ...   print the JobSet
  apply      (the same)                              send it to the cluster of kubectl
  status     the JobSet and its pods
  tail       follow the log of the first host
  delete     delete the JobSet

options
  --name=NAME          of the JobSet
  --image=IMAGE        such as us-docker.pkg.dev/PROJECT/REPOSITORY/meshyard:1
  --type=TYPE          v4-N, v5p-N, tpu7x-N (N cores, two a chip), v5litepod-N, v6e-N (N chips)
  --topology=AxBxC     of a TPU slice whose size has no standard one
  --num-slices=N       TPU slices, each on a node pool of its own; default 1
  --gpu=ACCELERATOR    GPU nodes instead, by GKE's label, such as nvidia-h100-80gb
  --nodes=N            GPU nodes; default 1
  --gpus-per-node=N    default 8
  --spot               Spot capacity
  --gcloud-create=FLAG   passed on by pool, such as --gcloud-create=--reservation=NAME; repeatable
  --bucket=BUCKET      mount gs://BUCKET at /mnt/BUCKET (Cloud Storage FUSE driver of the cluster)
  --service-account=NAME   of Kubernetes, with access to the bucket
  --max-restarts=N     of the whole JobSet; default 100
  --env=NAME=VALUE     environment of the program; repeatable
  --dry-run            print the exact commands instead of running them
  --help               this text

In each pod a supervisor starts the program again after 75, 76 and crashes. The JobSet restarts on
lost nodes and where a supervisor gives up; 0 completes it, and 2, 77 and 130 fail it for good.
Compiler flags are those of `tpu_vm.sh flags`.
TEXT
}

name='' image='' type='' topology='' gpu='' bucket='' account='' cluster='' location='' zones=''
slices=1 nodes=1 gpus=8 max_restarts=100 spot=no variables=() create_flags=() program=()

parse() {
  while [ $# -gt 0 ]; do
    case "$1" in
      --name=*) name="${1#*=}" ;;
      --image=*) image="${1#*=}" ;;
      --type=*) type="${1#*=}" ;;
      --topology=*) topology="${1#*=}" ;;
      --num-slices=*) slices="${1#*=}" ;;
      --gpu=*) gpu="${1#*=}" ;;
      --nodes=*) nodes="${1#*=}" ;;
      --gpus-per-node=*) gpus="${1#*=}" ;;
      --spot) spot=yes ;;
      --bucket=*) bucket="${1#*=}" bucket="${bucket#gs://}" ;;
      --service-account=*) account="${1#*=}" ;;
      --max-restarts=*) max_restarts="${1#*=}" ;;
      --env=*) check_env "${1#*=}"; variables+=("${1#*=}") ;;
      --gcloud-create=*) create_flags+=("${1#*=}") ;;
      --cluster=*) cluster="${1#*=}" ;;
      --location=*) location="${1#*=}" ;;
      --node-locations=*) zones="${1#*=}" ;;
      --dry-run) DRY=yes ;;
      --help) usage; exit 0 ;;
      --) shift; program=("$@"); break ;;
      *) mistake "unknown option $1 (see --help)" ;;
    esac
    shift
  done
  check_number "$slices" --num-slices
  check_number "$nodes" --nodes
  check_number "$gpus" --gpus-per-node
  check_number "$max_restarts" --max-restarts
}

# What a pod needs and how many there are: SELECTOR, RESOURCE, PER_POD, PODS of a Job, JOBS.
parse_hardware() {
  if [ -n "$gpu" ]; then
    [ -z "$type" ] || mistake "--type and --gpu exclude each other"
    CHIP=gpu RESOURCE=nvidia.com/gpu PER_POD="$gpus" PODS="$nodes" JOBS=1
    SELECTOR="cloud.google.com/gke-accelerator: $gpu"
    return
  fi
  [ -n "$type" ] || mistake "--type=TYPE or --gpu=ACCELERATOR is needed (see --help)"
  parse_type "$type"
  topology="${topology:-$TOPOLOGY}"
  [ -n "$topology" ] || mistake "--type=$type has no standard shape: give --topology=AxBxC"
  [[ $topology =~ ^[0-9]+(x[0-9]+){1,2}$ ]] ||
    mistake "--topology=$topology is not of the form AxBxC"
  [ $((${topology//x/*})) -eq "$CHIPS" ] ||
    mistake "--topology=$topology is not the $CHIPS chips of --type=$type"
  PER_POD=$((CHIPS < 4 ? CHIPS : 4))
  RESOURCE=google.com/tpu PODS=$((CHIPS / PER_POD)) JOBS="$slices"
  case "$CHIP" in
    v4) MACHINE="ct4p-hightpu-4t" LABEL="tpu-v4-podslice" ;;
    v5litepod) MACHINE="ct5lp-hightpu-${PER_POD}t" LABEL="tpu-v5-lite-podslice" ;;
    v5p) MACHINE="ct5p-hightpu-4t" LABEL="tpu-v5p-slice" ;;
    v6e) MACHINE="ct6e-standard-${PER_POD}t" LABEL="tpu-v6e-slice" ;;
    tpu7x) MACHINE="tpu7x-standard-4t" LABEL="tpu7x" ;;
  esac
  SELECTOR="cloud.google.com/gke-tpu-accelerator: $LABEL
                cloud.google.com/gke-tpu-topology: $topology"
}

yaml() { # a double-quoted YAML scalar; Kubernetes would replace $(NAME) in it
  local text="${1//\\/\\\\}"
  text="${text//\$(/\$\$(}"
  printf '"%s"' "${text//\"/\\\"}"
}

container_env() {
  local line lines=() index="metadata.annotations['batch.kubernetes.io/job-completion-index']"
  if [ "$CHIP" = gpu ] && [ "$PODS" -gt 1 ]; then # TPU hosts are told by GKE who their peers are
    cat <<YAML
                    - name: JAX_COORDINATOR_ADDRESS
                      value: "$name-workers-0-0.$name:1234"
                    - name: JAX_NUM_PROCESSES
                      value: "$PODS"
                    - name: JAX_PROCESS_ID
                      valueFrom:
                        fieldRef:
                          fieldPath: $index
YAML
  fi
  mapfile -t lines < <(flag_env "$CHIP" "$slices")
  for line in "${lines[@]}" "${variables[@]}"; do
    printf '                    - name: %s\n                      value: %s\n' \
      "${line%%=*}" "$(yaml "${line#*=}")"
  done
}

pod_spec() {
  local word
  cat <<YAML
              restartPolicy: Never
              terminationGracePeriodSeconds: 300 # to save after SIGTERM
              nodeSelector:
                $SELECTOR
YAML
  [ "$spot" = no ] || echo '                cloud.google.com/gke-spot: "true"'
  [ -z "$account" ] || echo "              serviceAccountName: $account"
  cat <<YAML
              tolerations:
                - key: $RESOURCE
                  operator: Exists
                  effect: NoSchedule
YAML
  [ "$spot" = no ] || cat <<'YAML'
                - key: cloud.google.com/gke-spot
                  operator: Exists
                  effect: NoSchedule
YAML
  cat <<YAML
              containers:
                - name: meshyard
                  image: $image
                  command: ["python", "-u", "-m", "experiments.run", "--supervise"]
                  args:
YAML
  for word in "${program[@]}"; do echo "                    - $(yaml "$word")"; done
  echo "                  env:"
  container_env
  cat <<YAML
                  resources:
                    limits:
                      $RESOURCE: $PER_POD
YAML
  volumes
}

volumes() {
  [ -n "$bucket" ] || [ "$CHIP" = gpu ] || return 0
  echo "                  volumeMounts:"
  [ "$CHIP" != gpu ] || echo "                    - {name: shm, mountPath: /dev/shm}"
  [ -z "$bucket" ] || echo "                    - {name: bucket, mountPath: /mnt/$bucket}"
  echo "              volumes:"
  [ "$CHIP" != gpu ] || echo "                - {name: shm, emptyDir: {medium: Memory}} # for NCCL"
  [ -z "$bucket" ] || cat <<YAML
                - name: bucket
                  csi:
                    driver: gcsfuse.csi.storage.gke.io
                    volumeAttributes:
                      bucketName: $bucket
                      mountOptions: implicit-dirs,rename-dir-limit=100000
YAML
}

manifest() {
  needed "$image" --image=IMAGE
  [ "${#program[@]}" -gt 0 ] || mistake "the flags of experiments.run are needed after --"
  parse_hardware
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
YAML
  [ "$JOBS" -eq 1 ] || cat <<'YAML'
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool # a slice a Job
YAML
  cat <<YAML
spec:
  network:
    enableDNSHostnames: true
  failurePolicy: # one Job fails: all start again
    maxRestarts: $max_restarts
    rules:
      - name: final # the exit codes below
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: workers
      replicas: $JOBS
      template:
        spec:
          completionMode: Indexed
          parallelism: $PODS
          completions: $PODS
          backoffLimit: 0 # a lost node, or 75, 76 or a crash at last, restarts the JobSet
          podFailurePolicy:
            rules:
              - action: FailJob # 2 the user's mistake, 77 stopped by the guard, 130 interrupted
                onExitCodes:
                  containerName: meshyard
                  operator: In
                  values: [2, 77, 130]
          template:
YAML
  [ -z "$bucket" ] || cat <<'YAML'
            metadata:
              annotations:
                gke-gcsfuse/volumes: "true"
YAML
  echo "            spec:"
  pod_spec
}

apply() {
  local text
  text="$(manifest)"
  if [ "$DRY" = yes ]; then
    echo "kubectl apply --filename=- <<'YAML'"
    echo "$text"
    echo YAML
  else
    kubectl apply --filename=- <<< "$text"
  fi
}

pool() {
  needed "$cluster" --cluster=CLUSTER
  needed "$location" --location=REGION
  needed "$zones" --node-locations=ZONE
  [ -z "$gpu" ] || mistake "pool creates TPU node pools; GPU pools differ by machine type"
  parse_hardware
  local index shape=()
  [ "$PODS" -eq 1 ] || shape=("--tpu-topology=$topology")
  [ "$spot" = no ] || shape+=(--spot)
  for ((index = 0; index < slices; index++)); do
    run gcloud container node-pools create "$name-$index" --cluster="$cluster" \
      --location="$location" --node-locations="$zones" --machine-type="$MACHINE" \
      --num-nodes="$PODS" --workload-metadata=GKE_METADATA "${shape[@]}" \
      "${create_flags[@]}"
  done
}

image() {
  needed "$image" --image=IMAGE
  parse_hardware
  local scratch extra=tpu
  [ "$CHIP" != gpu ] || extra=cuda
  scratch="$(if [ "$DRY" = yes ]; then echo /tmp/meshyard; else mktemp -d; fi)"
  # shellcheck disable=SC2064  # the folder of now
  trap "rm -rf '$scratch'" EXIT
  build_wheel "$scratch"
  [ "$DRY" = yes ] || cat > "$scratch/wheel/Dockerfile" <<DOCKER
FROM python:3.12-slim
# Where GKE puts the driver of NVIDIA GPUs.
ENV LD_LIBRARY_PATH=/usr/local/nvidia/lib64
COPY $(wheel_name) /
RUN pip install --no-cache-dir "meshyard[$extra,gcs] @ file:///$(wheel_name)"
DOCKER
  run gcloud builds submit "$scratch/wheel" --tag="$image"
}

command="${1:-}"
case "$command" in
  '') usage >&2; exit 2 ;;
  --help) usage; exit 0 ;;
esac
parse "${@:2}"
case "$command" in
  image) ;;
  pool | manifest | apply | status | tail | delete) check_name "$name" ;;
  *) mistake "unknown command $command (see --help)" ;;
esac
case "$command" in
  image | pool | manifest | apply) "$command" ;;
  status)
    run kubectl get jobsets.jobset.x-k8s.io "$name"
    run kubectl get pods --selector="jobset.sigs.k8s.io/jobset-name=$name"
    ;;
  tail) run kubectl logs --follow --container=meshyard "job/$name-workers-0" ;;
  delete) run kubectl delete jobsets.jobset.x-k8s.io "$name" ;;
esac
