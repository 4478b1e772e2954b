"""What a run needs, before it is started: memory, and the slices that hold it."""
