"""`experiments.convert` as a user runs it."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import cli
from experiments.restore import open_run, restore
from experiments.training.checkpoint import Checkpoints
from experiments.training.folder import read_config
from experiments.training.metrics import read_metrics
from tests.experiments.programs import ONE, call, metrics
from tests.experiments.weights.test_source import CONFIG, shapes

DENSE = "--config.model.segments.*.layers.*.mlp"
QUIET = ("--config.eval.sample_prompt=", "--config.eval.batches=2")


def convert(given, output, *more):
  return call("convert", ONE, f"--input={given}", f"--output={output}", *more)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
  """A LLaMA without a tokenizer, of bytes: its vocabulary has room for them."""
  folder = tmp_path_factory.mktemp("theirs")
  rng = np.random.default_rng(0)
  config = CONFIG | {"vocab_size": 300, "max_position_embeddings": 64, "bos_token_id": 1}
  tensors = {}
  for name, shape in shapes().items():
    shape = tuple(300 if n == CONFIG["vocab_size"] else n for n in shape)
    tensors[name] = (0.3 * rng.standard_normal(shape)).astype(np.float32)
  (folder / "config.json").write_text(json.dumps(config))
  save_file(tensors, folder / "model.safetensors")
  return folder


@pytest.fixture(scope="module")
def native(theirs, tmp_path_factory):
  output = tmp_path_factory.mktemp("native") / "run"
  result = convert(theirs, output, "--format=native", "--check", "--config.data.tokenizer=byte",
                   "--config.data.row_length=32")  # fmt: skip
  assert result.code == 0, result.err
  return output, result.out


def test_to_theirs(theirs, tmp_path):
  result = convert(theirs, tmp_path / "out", "--check")
  assert result.code == 0, result.err
  found, given = (load_file(f / "model.safetensors") for f in (tmp_path / "out", theirs))
  assert found.keys() == given.keys()
  for name, tensor in given.items():
    np.testing.assert_array_equal(found[name], tensor, name)
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
  assert config["bos_token_id"] == 1 and config["eos_token_id"] is None
  count = sum(t.size for t in given.values())
  assert f"llama, {count:,} parameters, 2 layers" in result.out
  assert "no tokenizer: " in result.out and "has no tokenizer.json" in result.out
  assert "differ by 0 at most" in result.out
  assert "from_pretrained(" in result.out


def test_in_bfloat16_and_shards(theirs, tmp_path):
  result = convert(theirs, tmp_path / "out", "--check", "--dtype=bfloat16", "--shard_gb=1e-5")
  assert result.code == 0, result.err
  assert "rounding to bfloat16 had" in result.out and "differ by 0 at most" in result.out
  assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
  files = sorted((tmp_path / "out").glob("model-*.safetensors"))
  assert len(files) > 1 and f"model-00001-of-{len(files):05}" in result.out


def test_a_damaged_output_is_told(theirs, tmp_path, monkeypatch):
  """Exit code 1 where the output, read again, is another model."""
  from experiments import convert as program

  whole = program.landing

  def damaging(output):
    class Landing:
      def __enter__(self):
        self._inner = whole(output)
        self._folder = self._inner.__enter__()
        return self._folder

      def __exit__(self, *error):
        path = self._folder / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-400:] = np.full(100, 0.5, np.float32).tobytes()
        path.write_bytes(data)
        return self._inner.__exit__(*error)

    return Landing()

  monkeypatch.setattr(program, "landing", damaging)
  result = convert(theirs, tmp_path / "out", "--check")
  assert result.code == 1 and "its weights are not what was to be written" in result.err


def test_to_a_run_and_back(theirs, native, tmp_path):
  folder, said = native
  assert "checkpoints/" in said and "differ by 0 at most" in said
  config = read_config(folder)
  assert config.data.tokenizer == "byte" and config.mesh.data is None
  result = convert(folder, tmp_path / "back")
  assert result.code == 0, result.err
  found = load_file(tmp_path / "back" / "model.safetensors")
  given = load_file(theirs / "model.safetensors")
  assert found.keys() == given.keys()
  for name, tensor in given.items():
    np.testing.assert_array_equal(found[name], tensor, name)
  assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == 256


@pytest.mark.full
def test_a_run_from_weights(theirs, native):
  """The run directory holds them, generates from them and starts to train from them."""
  folder, _ = native
  result = call("generate", ONE, f"--workdir={folder}", "--prompt=a", "--max_tokens=2")
  assert result.code == 0, result.err
  result = call("evaluate", ONE, f"--workdir={folder}", *QUIET[1:], "--config.data.batch_size=2")
  assert result.code == 0, result.err
  before = float(re.search(r"loss +([\d.]+)", result.out)[1])
  # A rate of next to nothing leaves them as they are; other data and another recipe may be chosen.
  result = call(
    "run", ONE, f"--workdir={folder}", "--config.train.steps=2", "--config.optimizer.name=sgd",
    "--config.optimizer.learning_rate=1e-12", "--config.optimizer.warmup_steps=1",
    "--config.data.seed=3", "--config.data.batch_size=2",
    "--config.train.log_every=1", "--config.checkpoint.keep=3", *QUIET,
  )  # fmt: skip
  assert result.code == 0, result.err
  held = [row["heldout_loss"] for row in read_metrics(folder) if "heldout_loss" in row]
  assert held[-1] == pytest.approx(before, abs=1e-5)
  assert len(metrics(folder)) == 2
  given = load_file(theirs / "model.safetensors")
  with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
    assert checkpoints.newest() == 2
  back = convert(folder, folder.parent / "back")
  assert back.code == 0, back.err
  found = load_file(folder.parent / "back" / "model.safetensors")
  for name, tensor in given.items():
    np.testing.assert_allclose(found[name], tensor, rtol=1e-6, atol=1e-9, err_msg=name)


def test_weights_of_a_run_keep_their_model(theirs, tmp_path):
  output = tmp_path / "run"
  assert convert(theirs, output, "--format=native", "--config.data.tokenizer=byte").code == 0
  theta = "--config.model.segments.*.layers.*.attention.position.theta=5"
  result = call("run", ONE, f"--workdir={output}", theta)
  assert result.code == 2 and "this would be another run" in result.err


@pytest.mark.full
def test_a_trained_run_to_theirs(tmp_path):
  """Of bytes: `transformers` and we say the same of a text, ids and logits."""
  why = "needs the extra `parity`: pip install 'meshyard[parity]'"
  torch = pytest.importorskip("torch", reason=why)
  transformers = pytest.importorskip("transformers", reason=why)
  run, output = tmp_path / "run", tmp_path / "out"
  result = call(
    "run", "--config=dense_tiny", ONE, f"--workdir={run}", "--config.train.steps=3",
    "--config.optimizer.warmup_steps=1", "--config.eval.baselines=false", *QUIET,
  )  # fmt: skip
  assert result.code == 0, result.err
  result = convert(run, output, "--check")
  assert result.code == 0, result.err
  tokenizer = transformers.AutoTokenizer.from_pretrained(output)
  model = transformers.AutoModelForCausalLM.from_pretrained(output)
  ids = tokenizer("The é", return_tensors="pt")["input_ids"]
  assert ids[0].tolist() == list("The é".encode())
  assert model.config.eos_token_id == model.generation_config.eos_token_id == 256
  cli._overrides[:] = [("mesh.data", "1")]
  setup = open_run(run, batch=False)
  ours = setup.model.apply({"params": restore(setup, run).params}, ids.numpy()).logits_BTV
  cli._overrides.clear()
  with torch.no_grad():
    expected = model(ids).logits.numpy()
  np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_what_is_refused(theirs, tmp_path):
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "x").write_text("")
  for arguments, said in (
    ((), "give --input=PATH and --output=FOLDER"),
    ((f"--input={theirs}", f"--output={tmp_path / 'full'}"), "is not empty"),
    ((f"--input={tmp_path / 'none'}", f"--output={tmp_path / 'o'}"), "--input="),
    ((f"--input={theirs}", f"--output={tmp_path / 'o'}", "--family=gpt2"), "gpt2 can't hold"),
    ((f"--input={theirs}", f"--output={tmp_path / 'o'}", "--format=native", "--family=llama"),
     "--family belongs to --format=hf"),
  ):  # fmt: skip
    result = call("convert", ONE, *arguments)
    assert result.code == 2 and said in result.err, result.err
    assert result.err.count("\n") == 1
  assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]
