"""A user's mistake: one line that says what to do, exit code 2, and nothing written or lost."""

import contextlib
import os
import resource
import shutil
import subprocess
import tomllib
import types

import pytest

from experiments.training.checkpoint import Checkpoints, saved_steps
from tests.experiments.programs import ONE, QUICK, ROOT, call, spawn, state_hash, steps

pytestmark = pytest.mark.xdist_group("run")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp("files")
  (folder / "empty.txt").touch()
  (folder / "binary.txt").write_bytes(bytes(range(256)) * 40)
  (folder / "short.txt").write_text("too short")
  (folder / "latin.txt").write_bytes("Stra\xdfe ".encode("latin-1") * 900)
  (folder / "lines.jsonl").write_text('{"text": "good"}\n{"body": "bad"}\n')
  (folder / "broken.jsonl").write_text('{"text": "good"}\n\n{"text": \n')
  (folder / "a.txt").write_text("a regular file")
  (folder / "cut.txt.gz").write_bytes(b"\x1f\x8b\x08\x00cut")
  return folder


MISTAKES = {
  # the command
  "unknown config": (["--config=moe_tinny"], ["'moe_tinny'", "did you mean", "moe_tiny"]),
  "unlike any config": (["--config=zzz"], ["'zzz'", "debug", "moe_70b"]),
  "family without a size": (["--config=bloom"], ["'bloom'", "bloom:560m", "bloom:176b"]),
  "size that a family lacks": (["--config=qwen3:7b"], ["'qwen3:7b'", "qwen3:8b", "qwen3:30b-a3b"]),
  "config without a name": (["--config="], ["no config named ''"]),
  "size of a config without sizes": (["--config=debug:7b"], ["'debug:7b'", "debug"]),
  "unknown field": (["--config.train.stepz=3"], ["train", "'stepz'", "did you mean steps"]),
  "unknown section": (["--config.trian.steps=3"], ["'trian'", "train"]),
  "field of no section": (["--config.steps=3"], ["'steps'", "train.steps"]),
  "no field": (["--config.=3"], ["has no field ''"]),
  "wrong type": (["--config.train.steps=many"], ["train.steps", "an integer", "'many'"]),
  "wrong choice": (["--config.optimizer.name=adam"], ["optimizer.name", "adamw", "'adam'"]),
  "missing value": (["--config.train.steps"], ["--config.train.steps needs a value"]),
  "flag as value": (["--config.train.steps", "--list"], ["--config.train.steps needs a value"]),
  "missing flag value": (["--workdir"], ["workdir"]),
  "positional junk": (["moe_tiny"], ["unexpected argument 'moe_tiny'"]),
  "unknown flag": (["--worksdir=x"], ["worksdir", "workdir"]),
  "section as value": (["--config.train=3"], ["train is a section", "train.steps"]),
  "two values": (["--config.train.steps=3", "--config.train.steps=4"], ["both 3 and 4"]),
  "profile in words": (["--profile=nonsense"], ["--profile=nonsense", "START:STOP"]),
  "profile backwards": (["--profile=5:3"], ["--profile=5:3", "START:STOP"]),
  "profile from zero": (["--profile=0:3"], ["--profile=0:3"]),
  "URL of no bucket": (["--workdir=http://x/run"], ["http://x/run", "gs://BUCKET/FOLDER"]),
  # sizes
  "axis that does not divide": (
    ["--config.mesh.fsdp=8", "--config.model.embed_dim=60"],
    ["embed", "60", "fsdp", "8"],
  ),
  "experts that do not divide": (["--config.mesh.expert=8"], ["expert", "4", "8"]),
  "too many devices": (["--config.mesh.fsdp=16"], ["16 devices", "there are 8"]),
  "negative axis": (["--config.mesh.fsdp=-2"], ["fsdp=-2"]),
  "two rests": (["--config.mesh.fsdp=-1", "--config.mesh.expert=-1"], ["fsdp and expert"]),
  "batch over the mesh": (
    ["--config.mesh.data=8", "--config.data.batch_size=12"],
    ["data.batch_size=12", "data=8"],
  ),
  "microbatches": (["--config.train.microbatches=3"], ["data.batch_size=8", "microbatches=3"]),
  "no microbatches": ([ONE, "--config.train.microbatches=0"], ["train.microbatches=0"]),
  "row beyond the context": ([ONE, "--config.data.row_length=512"], ["512", "max_length=256"]),
  "no steps": ([ONE, "--config.train.steps=0"], ["train.steps=0", "at least 1"]),
  "no logging": ([ONE, "--config.train.log_every=0"], ["train.log_every=0"]),
  "no checkpoints": ([ONE, "--config.checkpoint.every=0"], ["checkpoint.every=0"]),
  "no evaluation": ([ONE, "--config.eval.batches=0"], ["eval.batches=0"]),
  "warmup beyond the end": ([ONE, "--config.train.steps=4"], ["warmup_steps=5", "train.steps=4"]),
  "bad remat": ([ONE, "--config.train.remat=some"], ["'some'", "none, full, dots, minimal"]),
  "bad heads": (
    ["--config.model.segments.*.layers.*.attention.num_kv_heads=3"], ["num_kv_heads=3"],
  ),
  "small vocabulary": ([ONE, "--config.model.vocab_size=100"], ["vocab_size=100", "257"]),
  "routing groups": (
    [ONE, "--config.model.segments.0.layers.1.mlp.group_size=48"], ["64", "48"],
  ),
  "next token in view": (
    ["--config.model.segments.*.layers.*.attention.causal=false"],
    ["attention.causal=false", "next token", "data.objective=masked"],
  ),
  "no room for a mask token": (
    [ONE, "--config.data.objective=masked", "--config.model.vocab_size=257"],
    ["vocab_size=257", "no id for a mask token", "vocab_size=384"],
  ),
  "unknown twin": ([ONE, "--config.eval.twin=dense_tinny"], ["eval.twin", "dense_tiny"]),
  "unknown kernel": (
    [ONE, "--config.model.segments.*.layers.*.attention.implementation=fast"], ["'fast'", "xla"],
  ),
  "stages without layers": (["--config.mesh.stage=8"], ["stage=8", "multiple of 8 repeats"]),
  "odd chunks": (
    ["--config.mesh.context=8", "--config.data.row_length=56"], ["row_length=56", "16"],
  ),
  "kernel without a ring": (
    [
      "--config.mesh.context=4",
      "--config.model.segments.*.layers.*.mlp.group_size=8",
      "--config.model.segments.*.layers.*.attention.implementation=reference",
      "--config.mesh.context_method=ring",
    ],
    ["implementation=reference", "all_gather"],
  ),
  "halo of a whole row": (
    [
      "--config.mesh.context=4",
      "--config.model.segments.*.layers.*.mlp.group_size=8",
      "--config.mesh.context_method=halo",
    ],
    ["context_method=halo", "window", "use auto"],
  ),
  "states across devices": (
    ["--config=hybrid_tiny", "--config.mesh.context=8"], ["linear attention", "context=8"],
  ),
  "groups across devices": (["--config.mesh.context=8"], ["group_size", "divisor of 4"]),
  "impossible mesh rules": ([ONE, "--config.mesh.rules=every"], ["mesh.rules", "fsdp"]),
  # data
  "no such file": ([ONE, "--config.data.path={files}/none.txt"], ["{files}/none.txt"]),
  "a folder": ([ONE, "--config.data.path={files}"], ["{files}", "glob"]),
  "empty file": ([ONE, "--config.data.path={files}/empty.txt"], ["empty.txt is empty"]),
  "binary file": ([ONE, "--config.data.path={files}/binary.txt"], ["binary.txt", "NUL at byte 0"]),
  "other encoding": ([ONE, "--config.data.path={files}/latin.txt"], ["latin.txt", "byte 4"]),
  "damaged gzip": ([ONE, "--config.data.path={files}/cut.txt.gz"], ["cut.txt.gz", "gzip"]),
  "too short": ([ONE, "--config.data.path={files}/short.txt"], ["10 tokens", "1300", "byte"]),
  "line without the field": (
    [ONE, "--config.data.path={files}/lines.jsonl"], ["lines.jsonl line 2", "'text'", "body"],
  ),
  "line that is not JSON": (
    [ONE, "--config.data.path={files}/broken.jsonl"], ["broken.jsonl line 3", "not JSON"],
  ),
  "missing tokenizer": (
    [ONE, "--config.data.tokenizer={files}/none"], ["{files}/none", "train_tokenizer"],
  ),
  # places
  "below a file": ([ONE, "--workdir={files}/a.txt/run"], ["a.txt/run", "Not a directory"]),
  "a file": ([ONE, "--workdir={files}/a.txt"], ["a.txt", "File exists"]),
  "kernel's folder": ([ONE, "--workdir=/proc/meshyard/run"], ["/proc/meshyard/run", "write"]),
  "endless name": ([ONE, "--workdir=" + "x" * 300], ["xxx", "File name too long"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name, files, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  before = sorted(files.iterdir())
  arguments, expected = MISTAKES[name]
  arguments = [argument.format(files=files) for argument in arguments]
  if not any(a.startswith(("--config=", "--workdir")) for a in arguments):
    arguments = ["--workdir=run", *arguments]
  if not any(a.startswith("--config=") for a in arguments):
    arguments = ["--config=debug", *arguments]
  result = call("run", *arguments)
  assert result.code == 2, result.err
  assert result.out == ""
  assert result.err.startswith("error: ") and "Traceback" not in result.err
  for piece in expected:
    assert piece.format(files=files) in result.err, result.err
  if name not in ("no such file", "missing tokenizer"):  # they add the commands that make one
    assert result.err.count("\n") == 1
  assert list(tmp_path.iterdir()) == []  # nothing was written
  assert sorted(files.iterdir()) == before


def test_a_process_says_one_line_too(tmp_path):
  """What libraries write on their own does not come before it."""
  result = spawn(tmp_path, "run", "--config=debug", "--config.train.stepz=3")
  assert (result.code, result.out) == (2, "")
  assert (
    result.err
    == "error: train.stepz: train (TrainConfig) has no field 'stepz'; did you mean steps?\n"
  )


def test_platform_that_is_not_there(tmp_path):
  result = spawn(tmp_path, "run", "--config=debug", "--workdir=run", JAX_PLATFORMS="cuda")
  assert result.code == 2 and result.err.startswith("error: JAX finds no device for cuda")
  assert result.err.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "content",
  (b"", b"{", b"[]", b'{"type": "Config"}', b"\xff\xfe", b'{"type": "Config", "name": 3}'),
)
def test_damaged_config_json(trained, tmp_path, content):
  folder = tmp_path / "run"
  shutil.copytree(trained, folder)
  (folder / "config.json").write_bytes(content)
  for program in ("run", "generate", "evaluate"):
    result = call(program, f"--workdir={folder}")
    assert result.code == 2, result.err
    assert "config.json" in result.err and result.err.count("\n") == 1
  assert (folder / "config.json").read_bytes() == content
  assert saved_steps(folder / "checkpoints") == [10, 20]


def test_damaged_metrics_are_named(trained, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(trained, folder)
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  (folder / "metrics.jsonl").write_text("\n".join([lines[0], "oh no", *lines[1:]]))
  result = call("run", f"--workdir={folder}", "--config.train.steps=21")
  assert result.code == 2 and "metrics.jsonl line 2 is not JSON" in result.err


@pytest.mark.parametrize("program", ("generate", "evaluate"))
def test_programs_that_read_need_a_run(program, trained, tmp_path):
  result = call(program, f"--workdir={tmp_path}/none")
  assert result.code == 2 and "holds no run" in result.err and "experiments.run" in result.err
  bare = tmp_path / "bare"
  bare.mkdir()
  shutil.copy(trained / "config.json", bare)
  result = call(program, f"--workdir={bare}")
  assert result.code == 2 and "no checkpoint yet" in result.err
  assert sorted(p.name for p in bare.iterdir()) == ["config.json"]
  result = call(program, f"--workdir={trained}", "--config.model.embed_dim=32")
  assert result.code == 2 and "params/embedding/table is float32[320, 64]" in result.err


@pytest.mark.parametrize(
  ("arguments", "pieces"),
  (
    (["--prompt=" + "x" * 256], ["256 tokens", "context is 256"]),
    (["--temperature=nan"], ["--temperature=nan"]),
    (["--temperature=-1"], ["temperature"]),
    (["--max_tokens=0"], ["max_tokens"]),
    (["--top_k=-1"], ["top_k"]),
    (["--seed=-1"], ["seed"]),
    (["--prompt=\udcff"], ["UTF-8"]),
    (["The"], ["unexpected argument 'The'"]),
  ),
)
def test_generate_refuses(trained, arguments, pieces):
  result = call("generate", f"--workdir={trained}", *arguments)
  assert result.code == 2 and result.out == "" and result.err.count("\n") == 1
  assert all(piece in result.err for piece in pieces), result.err


@pytest.mark.parametrize(
  ("arguments", "piece"),
  (
    (["--compile"], "--compile needs a --topology"),
    (["--print_overrides"], "--print_overrides needs a --topology"),
    (["--topology=nonsense"], "of the form v5p:4x4x4, v5p-128, h100:8 or h100:4x8 (4 nodes of 8)"),
    (["--topology=v9:2x2"], "'v9' is none of v4, v5e, v5p"),
    (["--topology=v5p-100"], "the nearest are v5p-64 (2x4x4) and v5p-128 (4x4x4)"),
    (["--topology=v5p:3x5x7", "--compile"], "the nearest are v5p:4x4x4 and v5p:4x4x8"),
    (["--topology=a100:9x7"], "a100:8x8, or a100:63 in all"),
    (["--topology=h100:8", "--compile"], "only TPUs"),
    (["--tokens=-1"], "--tokens=-1: must be positive"),
    (["--tokens=nan", "--topology=v5e:2x2"], "--tokens=nan: must be positive"),
    (["--budget_usd=100"], "--budget_usd needs a --topology"),
    (["--budget_flops=-1"], "must be positive"),
    (["--budget_flops=1e3"], "1e+03 model FLOP (as asked) is too little for the published laws"),
    (["--budget_flops=1e300"], "is too much for the published laws"),
    (["--days=1e-9", "--topology=h100:8"], "8 h100 for 1e-09 days at an MFU of 45%) is too"),
    (["--budget_usd=0.001", "--topology=h100:8"], "(0.001 USD: 0.00025 hours of h100"),
    (["--days=3", "--budget_flops=1e20", "--topology=h100:8"], "two budgets"),
    (["--topology=tpu7x:2x2x1", "--budget_usd=100"], "--prices=FILE"),
    (["--prices=/nowhere.toml"], "can't read the prices"),
    (["--fit=/nowhere/*"], "no such folder"),
    (["--topology=v5p:4x4"], "v5p has no such slice"),
  ),
)
def test_plan_refuses(arguments, piece):
  result = call("plan", "--config=debug", *arguments)
  assert result.code == 2 and piece in result.err and result.err.count("\n") == 1


@pytest.mark.parametrize(
  ("program", "arguments"), (("plan", ["--compile"]), ("run", ["--show_mesh=embedding/table"]))
)
def test_describing_without_libtpu_names_the_package(program, arguments, tmp_path):
  """In a process that cannot import it."""
  script = "import sys; sys.modules['libtpu'] = None"
  arguments = ["--config=debug", "--topology=v5e:2x2", *arguments]
  result = spawn(tmp_path, program, *arguments, script=script)
  assert (result.code, result.out) == (2, ""), result.err
  assert "pip install 'meshyard[tpu]'" in result.err and result.err.count("\n") == 1
  extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
  assert any(name.startswith("jax[tpu]") for name in extras["tpu"])  # jax's own brings libtpu
  assert any(name.startswith("libtpu") for name in extras["test"])


@contextlib.contextmanager
def crowded(folder, megabytes):
  """A disk of that size mounted at `folder`, or where that is not allowed, a limit on files.

  Yields a function that makes room.
  """
  size = f"size={megabytes}m"
  mount = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], check=False,
                         capture_output=True)  # fmt: skip
  if mount.returncode == 0:
    try:
      yield lambda: subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
    finally:
      subprocess.run(["umount", folder], check=True)
    return
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_while_saving_keeps_the_earlier_checkpoint(tmp_path):
  """Step 10 fits on the disk, step 20 does not; with room made, the same command finishes."""
  folder = tmp_path / "disk" / "run"
  folder.parent.mkdir()
  with crowded(folder.parent, 4) as make_room:
    first = call("run", *QUICK, f"--workdir={folder}", "--config.train.steps=10")
    assert first.code == 0, first.err
    if not os.path.ismount(folder.parent):
      resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    before = state_hash(folder)
    full = call("run", *QUICK, f"--workdir={folder}", "--config.train.steps=20")
    make_room()
    assert full.code == 2, full.err
    assert full.err.count("\n") == 1
    assert f"can't write to the work directory {folder}" in full.err
    assert "No space left on device" in full.err or "File too large" in full.err
    assert "step 10 is saved" in full.err
    assert state_hash(folder) == before
    again = call("run", *QUICK, f"--workdir={folder}", "--config.train.steps=20")
    assert again.code == 0, again.err
    assert "resuming after step 10" in again.out
    assert steps(folder) == list(range(1, 21))
    assert saved_steps(folder / "checkpoints") == [10, 20]


def test_no_room_at_all_is_found_before_training(tmp_path):
  disk = tmp_path / "disk"
  disk.mkdir()
  filled = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", disk], check=False,
                          capture_output=True)  # fmt: skip
  if filled.returncode:
    pytest.skip("mounting a small disk is not allowed here")
  try:
    with contextlib.suppress(OSError):
      (disk / "filler").write_bytes(b"x" * 8192)
    result = call("run", *QUICK, f"--workdir={disk}/run")
    assert result.code == 2 and "No space left on device" in result.err
    assert result.err.count("\n") == 1 and "compiling" not in result.out
  finally:
    subprocess.run(["umount", disk], check=True)


def test_another_write_error_of_orbax_is_not_hidden(trained, monkeypatch):
  """Only what the system refuses is the user's to repair."""

  def wait(*_, **__):
    raise ValueError("ours")

  with (
    Checkpoints(trained / "checkpoints", read_only=True) as checkpoints,
    monkeypatch.context() as patch,
    pytest.raises(ValueError, match="ours"),
  ):
    patch.setattr(checkpoints._orbax, "save", wait)
    checkpoints.save(99, types.SimpleNamespace(params={}, step=0, opt_state={}), {})
