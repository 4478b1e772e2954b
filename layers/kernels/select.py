"""Which implementation of a kernel runs: one rule, used by every kernel folder."""

from collections.abc import Callable, Mapping

import jax

from .partition import free_axes

TPU = ("tpu",)
GPU = ("gpu", "cuda")  # names of one platform, the first of devices, the second of compilers
LANES = 128  # the last dim of a TPU's register

Supports = Callable[[str], str | None]


def anywhere(platform: str) -> None:
  """Supports every platform."""


def kernel_on(platforms: tuple[str, ...], supports: Supports) -> Supports:
  """Of a kernel for these platforms, which no compiler splits over devices.

  Args:
    supports: why it can't run the arguments at hand, or None; asked on a platform of its own only,
      so that it may import the kernel.
  """

  def reason(platform: str) -> str | None:
    if platform not in platforms:
      return f"the kernel is for {platforms[0].upper()}s, not for {platform}"
    if free := free_axes():
      return f"no compiler spreads it over {', '.join(free)}: call it in a shard_map"
    return supports(platform)

  return reason


def current_platform() -> str:
  """Where a jit here would run: cpu, gpu or tpu. A mesh in context decides, described or real."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def select(requested: str | None, platform: str, candidates: Mapping[str, Supports]) -> str:
  """Names the implementation to run.

  `candidates` maps each name, best first, to `supports(platform)`: None if it can run these
  arguments there, otherwise the reason why not. `requested=None` takes the first that can, "xla"
  in the end; a requested name is never replaced by another.

  Raises:
    ValueError: the requested name is unknown.
    NotImplementedError: the requested implementation cannot run; the message says why.
  """
  if requested is None:
    return next((name for name, supports in candidates.items() if not supports(platform)), "xla")
  if requested not in candidates:
    raise ValueError(f"unknown implementation {requested!r}; known: {', '.join(candidates)}")
  reason = candidates[requested](platform)
  if reason is not None:
    raise NotImplementedError(f"implementation {requested!r} cannot run here: {reason}")
  return requested
