"""The JobSet that gke.sh writes, against the published schema, and what it asks of the cluster."""

import json
import re
from pathlib import Path

import pytest
import yaml

from mesh.hardware import cloud_slices
from mesh.slices import parse_topology

SCHEMA = json.loads((Path(__file__).parent / "jobset.schema.json").read_text())
KINDS = {
  "object": dict, "array": list, "string": str, "integer": int, "boolean": bool,
}  # fmt: skip
PROGRAM = ("--", "--config=moe_70b", '--config.data.path=/mnt/a "b" \\$(X)')


def complaints(value, schema, where="JobSet") -> list[str]:
  """Where `value` is not of `schema`, for the few words of JSON Schema that the file uses."""
  if "$ref" in schema:
    schema = SCHEMA["definitions"][schema["$ref"]]
  if "enum" in schema:
    return [] if value in schema["enum"] else [f"{where}: {value!r}"]
  kind = KINDS[schema["type"]]
  if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
    return [f"{where}: {value!r} is no {schema['type']}"]
  found = []
  if "pattern" in schema and not re.search(schema["pattern"], value):
    found.append(f"{where}: {value!r}")
  if "minimum" in schema and value < schema["minimum"]:
    found.append(f"{where}: {value!r}")
  if kind is list:
    for index, item in enumerate(value):
      found += complaints(item, schema["items"], f"{where}[{index}]")
  if kind is dict:
    found += [
      f"{where}.{name} is missing" for name in schema.get("required", ()) if name not in value
    ]
    for name, item in value.items():
      inner = schema.get("properties", {}).get(name, schema.get("additionalProperties", True))
      if inner is False:
        found.append(f"{where}.{name} is unknown")
      elif inner is not True:
        found += complaints(item, inner, f"{where}.{name}")
  return found


def manifest(cloud, *options):
  done = cloud.run("gke.sh", "manifest", "--name=moe-70b", "--image=images/meshyard:1", *options)
  assert done.returncode == 0, done.stderr
  return yaml.safe_load(done.stdout)


def parts(jobset):
  job = jobset["spec"]["replicatedJobs"][0]
  pod = job["template"]["spec"]["template"]["spec"]
  return job, pod, pod["containers"][0]


def test_the_validator_finds_what_is_wrong(cloud):
  jobset = manifest(cloud, "--type=v5p-64", *PROGRAM)
  assert complaints(jobset, SCHEMA) == []
  jobset["spec"]["failurePolicy"]["maxRestarts"] = "100"
  jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["backofLimit"] = 0
  del parts(jobset)[2]["name"]
  assert complaints(jobset, SCHEMA) == [
    "JobSet.spec.failurePolicy.maxRestarts: '100' is no integer",
    "JobSet.spec.replicatedJobs[0].template.spec.template.spec.containers[0].name is missing",
    "JobSet.spec.replicatedJobs[0].template.spec.backofLimit is unknown",
  ]


def test_tpu_slices(cloud):
  jobset = manifest(
    cloud, "--type=v5p-64", "--num-slices=2", "--spot", "--bucket=gs://my-bucket",
    "--service-account=trainer", "--env=A=b c", *PROGRAM,
  )  # fmt: skip
  assert complaints(jobset, SCHEMA) == []
  job, pod, container = parts(jobset)
  assert job["replicas"] == 2
  assert job["template"]["spec"]["completions"] == job["template"]["spec"]["parallelism"] == 8
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
    "cloud.google.com/gke-tpu-topology": "2x4x4",
    "cloud.google.com/gke-spot": "true",
  }
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  # Kubernetes turns $$( back into $(.
  assert container["args"] == ["--config=moe_70b", '--config.data.path=/mnt/a "b" \\$$(X)']
  env = {e["name"]: e["value"] for e in container["env"]}
  assert set(env) == {"LIBTPU_INIT_ARGS", "A"}  # GKE tells TPU hosts who their peers are
  assert "--xla_tpu_enable_megascale_barrier=true" in env["LIBTPU_INIT_ARGS"].split()
  assert container["volumeMounts"] == [{"name": "bucket", "mountPath": "/mnt/my-bucket"}]
  topology_key = "alpha.jobset.sigs.k8s.io/exclusive-topology"
  assert jobset["metadata"]["annotations"] == {topology_key: "cloud.google.com/gke-nodepool"}


def test_exit_codes(cloud):
  """A Job fails for good on the final codes, and that fails the JobSet; any other failure of a pod
  fails the Job too (no retries), and the JobSet starts again."""
  jobset = manifest(cloud, "--type=v5p-64", "--max-restarts=7", *PROGRAM)
  job, pod, container = parts(jobset)
  spec = job["template"]["spec"]
  (rule,) = spec["podFailurePolicy"]["rules"]
  assert rule["action"] == "FailJob"
  assert rule["onExitCodes"] == {
    "containerName": container["name"], "operator": "In", "values": [2, 77, 130],
  }  # fmt: skip
  assert spec["backoffLimit"] == 0
  assert pod["restartPolicy"] == "Never"
  assert container["command"][-2:] == ["experiments.run", "--supervise"]
  policy = jobset["spec"]["failurePolicy"]
  assert policy["maxRestarts"] == 7
  assert [(r["action"], r["onJobFailureReasons"]) for r in policy["rules"]] == [
    ("FailJobSet", ["PodFailurePolicy"])
  ]


def test_gpu_nodes_find_each_other(cloud):
  jobset = manifest(cloud, "--gpu=nvidia-h100-80gb", "--nodes=4", *PROGRAM)
  assert complaints(jobset, SCHEMA) == []
  job, _, container = parts(jobset)
  assert (job["replicas"], job["template"]["spec"]["completions"]) == (1, 4)
  assert job["template"]["spec"]["completionMode"] == "Indexed"
  assert jobset["spec"]["network"]["enableDNSHostnames"] is True
  env = {e["name"]: e.get("value", e.get("valueFrom")) for e in container["env"]}
  # Pods are called <jobset>-<job>-<job index>-<pod index>.<subdomain>, by default the JobSet's.
  assert env["JAX_COORDINATOR_ADDRESS"] == "moe-70b-workers-0-0.moe-70b:1234"
  assert env["JAX_NUM_PROCESSES"] == "4"
  path = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
  assert env["JAX_PROCESS_ID"] == {"fieldRef": {"fieldPath": path}}
  assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
  assert "XLA_FLAGS" in env
  alone = parts(manifest(cloud, "--gpu=nvidia-h100-80gb", *PROGRAM))[2]["env"]
  assert not [e for e in alone if e["name"].startswith("JAX_")]


@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
def test_shapes_are_those_of_the_chip_table(cloud, chip):
  slices = [s for s in cloud_slices(chip) if s.topology not in ("16x16x24", "16x16x32")]
  for rented in (slices[0], slices[1], slices[3], slices[-1]):
    job, pod, container = parts(manifest(cloud, f"--type={rented.name}", *PROGRAM))
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == rented.topology
    per_pod = container["resources"]["limits"]["google.com/tpu"]
    assert per_pod * job["template"]["spec"]["completions"] == rented.chips
  shape = parse_topology(f"{chip}:{slices[-1].topology}").shape
  assert "x".join(map(str, shape)) == slices[-1].topology


def test_pool_apply_and_the_rest_reach_their_tools(cloud):
  pool = ("--cluster=c", "--location=us-east5", "--node-locations=us-east5-a", "--type=v5p-64")
  assert cloud.run("gke.sh", "pool", "--name=n", *pool, "--num-slices=2", "--spot").returncode == 0
  first, second = cloud.calls()
  assert first[:5] == ["gcloud", "container", "node-pools", "create", "n-0"]
  assert second[4] == "n-1"
  for flag in ("--machine-type=ct5p-hightpu-4t", "--tpu-topology=2x4x4", "--num-nodes=8", "--spot"):
    assert flag in first
  apply = ("apply", "--name=n", "--image=i", "--type=v6e-4", *PROGRAM)
  assert cloud.run("gke.sh", *apply).returncode == 0
  assert complaints(yaml.safe_load((cloud.folder / "manifest").read_text()), SCHEMA) == []
  dry = cloud.run("gke.sh", *apply[:-3], "--dry-run", *PROGRAM).stdout.splitlines()
  assert dry[0] == "kubectl apply --filename=- <<'YAML'"
  assert yaml.safe_load("\n".join(dry[1:-1])) == yaml.safe_load(
    (cloud.folder / "manifest").read_text()
  )
  image = cloud.run("gke.sh", "image", "--image=r/i:1", "--type=v6e-4")
  assert image.returncode == 0, image.stderr
  dockerfile = (cloud.folder / "Dockerfile").read_text()
  wheel = re.search(r"^COPY (meshyard-[\d.]+-py3-none-any.whl) /$", dockerfile, re.MULTILINE)[1]
  assert f'"meshyard[tpu,gcs] @ file:///{wheel}"' in dockerfile
  for command in ("status", "tail", "delete"):
    assert cloud.run("gke.sh", command, "--name=n").returncode == 0
  assert [c[:2] for c in cloud.calls()[3:]] == [
    ["gcloud", "builds"], ["kubectl", "get"], ["kubectl", "get"], ["kubectl", "logs"],
    ["kubectl", "delete"],
  ]  # fmt: skip


def test_mistakes(cloud):
  name = "--name=n"
  for arguments, message in (
    ((), "usage"),
    (("dance", name), "unknown command dance"),
    (("manifest",), "--name=NAME is needed"),
    (("manifest", "--name=A_b"), "lower-case"),
    (("manifest", name, *PROGRAM), "--image=IMAGE is needed"),
    (("manifest", name, "--image=i"), "flags of experiments.run are needed"),
    (("manifest", name, "--image=i", *PROGRAM), "--type=TYPE or --gpu=ACCELERATOR is needed"),
    (("manifest", name, "--image=i", "--type=v5p-7", *PROGRAM), "multiples of 8"),
    (("manifest", name, "--image=i", "--type=v5p-96", *PROGRAM), "no standard shape"),
    (
      ("manifest", name, "--image=i", "--type=v5p-64", "--topology=4x4x4", *PROGRAM),
      "is not the 32 chips",
    ),
    (("apply", name, "--tpye=x"), "unknown option --tpye=x"),
    (("pool", name, "--type=v5p-64"), "--cluster=CLUSTER is needed"),
  ):
    done = cloud.run("gke.sh", *arguments)
    assert done.returncode == 2, arguments
    assert message in done.stderr
    assert "usage" in message or len(done.stderr.splitlines()) == 1
  assert not cloud.calls()
