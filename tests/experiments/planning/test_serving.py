"""Memory and time of drawing tokens, against numbers written out."""

import re

import pytest

from experiments import cli
from experiments.planning import serving
from mesh.hardware import CHIPS
from tests.experiments.programs import call


def model(name):
  return cli.named_config(name).model


def test_opt_175b_on_sixteen_v100():
  """The machine that OPT's paper names: 16 V100s of 32 GB, with float16 weights."""
  machines = {chip.name: n for _, chip, n in serving.smallest(model("opt:175b"), 1, 2048, 16)}
  assert machines["v100-32gb"] == 16
  assert serving.weight_bytes(model("opt:175b"), 16) == 2 * 174_604_468_224
  assert not serving.serve(model("opt:175b"), CHIPS["v100-32gb"], 8, 1, 2048, 16).fits
  # With 8 bits half of them do, with 4 bits a quarter.
  for bits, count in ((8, 8), (4, 4)):
    found = {c.name: n for _, c, n in serving.smallest(model("opt:175b"), 1, 2048, bits)}
    assert found["v100-32gb"] == count


@pytest.mark.parametrize(
  ("name", "length", "size"),
  [
    ("llama2:70b", 4096, 2 * 80 * 2 * 8 * 128 * 4096),
    ("opt:175b", 2048, 2 * 96 * 2 * 12_288 * 2048),
    # Five layers of six see 1,024 positions (the width of their window).
    ("gemma3:1b", 32_768, 2 * 2 * 256 * (4 * 32_768 + 22 * 512)),
    ("deepseek:v3", 4096, 2 * 61 * (512 + 64) * 4096),
  ],
)
def test_caches(name, length, size):
  assert serving.cache_bytes(model(name), length) == size


def test_one_row_reads_all_weights_and_many_rows_compute():
  spec, chip = model("llama2:70b"), CHIPS["h100"]
  one, many = (serving.serve(spec, chip, 8, batch, 128, 16) for batch in (1, 512))
  read = 2 * 68_976_648_192 + serving.cache_bytes(spec, 128)
  assert one.bound == "memory" and one.seconds == pytest.approx(read / (8 * 0.8 * 3350e9))
  assert many.bound == "compute"
  assert many.tokens_per_second(8) > 50 * one.tokens_per_second(8)


def test_experts_that_no_token_chose_are_not_read():
  """Mixtral: a token reads what is active, many tokens read everything."""
  spec, chip = model("mixtral:8x7b"), CHIPS["h100"]
  total, active, _ = serving.count_params(spec)
  speed = 8 * 0.8 * 3350e9
  of = lambda batch: serving.serve(spec, chip, 8, batch, 1, 16).seconds * speed
  one = serving.cache_bytes(spec, 1)
  assert of(1) - one == pytest.approx(2 * active, rel=1e-3)
  assert of(64) - 64 * one == pytest.approx(2 * total, rel=1e-3)


def test_tables():
  """As `plan --inference` prints them."""
  out = call("plan", "--config=opt:175b", "--inference").out
  assert "weights of 16 bits 349.2 GB, the cache of a row of 2,048 positions 9.7 GB" in out
  assert re.search(r"^v100-32gb:2x8 +16 ", out, re.MULTILINE)
  out = call("plan", "--config=opt:175b", "--inference", "--topology=a100:8").out
  rows = [line.split() for line in out.splitlines() if re.match(r"\d+ ", line)]
  assert [row[0] for row in rows] == ["1", "8", "32", "128", "512"]
  assert rows[0][-1] == "memory" and rows[-1][-3:] == ["does", "not", "fit"]
  result = call("plan", "--config=bigbird:base", "--inference")
  assert result.code == 2 and "bigbird:base is an encoder" in result.err
