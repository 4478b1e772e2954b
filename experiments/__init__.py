"""Programs: train, evaluate, generate. Start one with `python -m experiments.run`."""

from .huge_pages import relaunch

relaunch()
