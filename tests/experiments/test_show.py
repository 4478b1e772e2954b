"""`--list`, `--show` and `--help`."""

import re

import pytest

from experiments import cli
from layers.count import count_params
from tests.experiments.programs import PROGRAMS, call

CONFIGS = (
  "debug", "deepseek:v3", "dense_1b", "dense_tiny", "gemma3:4b", "gpt3:175b", "gpt_neo:1.3b",
  "hybrid_tiny", "mixtral:8x22b", "mixtral:8x7b", "moe_70b", "moe_8x1b", "moe_small", "moe_tiny",
)  # fmt: skip


def test_list_has_every_config_with_its_sizes():
  result = call("run", "--list")
  assert (result.code, result.err) == (0, "")
  rows = {line.split()[0]: line for line in result.out.splitlines() if line.strip()}
  assert set(CONFIGS) <= rows.keys() >= set(cli.config_names())
  assert "70,317,772,800" in rows["moe_70b"] and "3,729,002,496" in rows["moe_70b"]
  for name in CONFIGS:
    counts = count_params(cli.named_config(name).model)
    assert re.search(rf"\b{counts.total:,}\b.*\b{counts.active:,}\b", rows[name])
  assert "--config=NAME" in result.out
  assert max(map(len, result.out.splitlines())) <= 100


def test_show_marks_what_was_changed(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  result = call("run", "--config=moe_tiny", "--show", "--config.train.steps=7")
  assert (result.code, result.err) == (0, "")
  assert "train.steps = 7    # changed, was " in result.out
  assert result.out.count("# changed") == 1
  assert re.search(r"^optimizer.name = \w+$", result.out, re.MULTILINE)
  assert re.search(r"^model.segments.0.layers.1.mlp.type = MoeSpec$", result.out, re.MULTILINE)
  assert result.out.splitlines()[-1].endswith("active, 1 field changed")
  assert not list(tmp_path.iterdir())


@pytest.mark.xdist_group("run")
def test_show_of_a_run_is_its_stored_config(trained):
  """Also with a change that resuming would refuse: nothing is resumed."""
  result = call("run", f"--workdir={trained}", "--show", "--config.data.seed=1")
  assert result.code == 0, result.err
  assert "optimizer.decay_steps = 40    # changed, was None" in result.out
  assert "data.seed = 1    # changed, was 0" in result.out


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("flag", ("--help", "-h"))
def test_help_is_short_and_ours(program, flag):
  result = call(program, flag)
  assert (result.code, result.err) == (0, "")
  assert f"python -m experiments.{program} " in result.out
  assert "--config=" in result.out and "--workdir=" in result.out
  assert "--config.SECTION.FIELD=VALUE" in result.out
  assert len(result.out.splitlines()) < 46
