"""Kernels: one folder each, with a reference, an XLA form for any platform, and Pallas forms."""
