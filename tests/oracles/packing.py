"""Concat-and-chunk packing, one token at a time."""


def pack(documents, eod, T, pad):
  """Rows as dicts of lists, from lists of ids. Each token knows its document and place."""
  line = []
  for number, ids in enumerate(documents):
    for place, token in enumerate([*ids, eod]):
      line.append((token, number, place))
  rows = []
  for start in range(0, len(line) - 1, T):
    row = {"tokens": [], "targets": [], "segments": [], "positions": [], "weights": []}
    for i in range(start, min(start + T, len(line) - 1)):
      (token, number, place), (target, next_number, _) = line[i], line[i + 1]
      _, first_number, first_place = line[start]
      row["tokens"].append(token)
      row["targets"].append(target)
      row["segments"].append(number - first_number + 1)
      row["positions"].append(place - first_place if number == first_number else place)
      row["weights"].append(1.0 if next_number == number else 0.0)
    if len(row["tokens"]) < T:
      if not pad:
        break
      for values in row.values():
        values.extend([0] * (T - len(values)))
    rows.append(row)
  return rows
