"""What must be settled before JAX starts: the platform and the caches."""

import logging
import os
from pathlib import Path

import jax

# Device files of TPUs (PCI accelerator or VFIO), NVIDIA and AMD GPUs.
_ACCELERATORS = ("/dev/accel0", "/dev/vfio/0", "/dev/nvidia0", "/dev/kfd")


def prepare() -> None:
  """Choose CPU where no accelerator is present, and keep compiled programs between runs.

  An installed libtpu looks for a TPU for many seconds, and complains; naming the platform keeps it
  quiet. `JAX_PLATFORMS` and `JAX_COMPILATION_CACHE_DIR` of the user win; an empty
  JAX_COMPILATION_CACHE_DIR, or JAX_ENABLE_COMPILATION_CACHE=false, switches the cache off, and so
  does a home that can't be written. Matplotlib's list of fonts goes into the same cache folder.
  """
  if not os.environ.get("JAX_PLATFORMS") and not any(map(os.path.exists, _ACCELERATORS)):
    os.environ["JAX_PLATFORMS"] = "cpu"  # for child processes
    jax.config.update("jax_platforms", "cpu")
  logging.getLogger("matplotlib").setLevel(logging.ERROR)  # of a home that can't be written
  base = _cache_folder()
  if base is not None:
    os.environ.setdefault("MPLCONFIGDIR", str(base / "matplotlib"))
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
      jax.config.update("jax_compilation_cache_dir", str(base / "jax"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _cache_folder() -> Path | None:
  """The user's cache folder for this project, or None where none can be made."""
  try:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "meshyard"
    folder.mkdir(parents=True, exist_ok=True)
  except (OSError, RuntimeError):  # RuntimeError: a user without a home
    return None
  return folder if os.access(folder, os.W_OK | os.X_OK) else None
