"""Programs: train, evaluate, generate. Start one with `python -m experiments.run`."""
