"""`--list`, `--show`, `--show_mesh`: what configs there are, what one is, where it would lie."""

from layers.count import count_params

from . import cli
from .config import Config
from .joining import Place
from .overrides import difference, flatten
from .start import Request
from .training.setup import count_trained


def print_list() -> None:
  """Every config: parameters, active parameters, layers, tokens of its run; a row at a time."""
  names = cli.config_names()
  row = f"{{:<{max(map(len, names))}}} {{:>17}} {{:>15}} {{:>6}} {{:>6}} {{:>8}} {{}}"
  print(row.format("config", "parameters", "active", "layers", "width", "tokens", "optimizer"))
  for name in names:
    config = cli.named_config(name)
    model, counts = config.model, count_params(config.model)
    tokens = config.train.steps * config.data.batch_size * config.data.row_length
    cells = f"{counts.total:,}", f"{counts.active:,}", model.num_layers, model.embed_dim
    print(row.format(name, *cells, f"{tokens:.3g}", config.optimizer.name), flush=True)
  print("\nTrain one:  python -m experiments.run --config=NAME")


def print_mesh(request: Request, param: str, place: Place) -> None:
  """Which device holds which part of a parameter and of the batch, see `experiments.show_mesh`."""
  # Only who asks for a picture needs what draws it.
  from .show_mesh import show_mesh

  show_mesh(request, param, place)


def print_config(named: Config, config: Config) -> None:
  """The resolved config, one field a line; changed fields are marked with their old value."""
  changed = {path: before for path, before, _ in difference(named, config)}
  for path, value in flatten(config).items():
    mark = f"    # changed, was {changed[path]}" if path in changed else ""
    print(f"{path} = {value}{mark}")
  counts = count_params(config.model)
  fields = "1 field" if len(changed) == 1 else f"{len(changed)} fields"
  trained = f"{count_trained(config):,} trained, " if config.lora.rank else ""
  print(f"\n{counts.total:,} parameters, {counts.active:,} active, {trained}{fields} changed")
