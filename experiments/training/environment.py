"""What software a run stands on, and what of it changed since the last attempt."""

import contextlib
import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

_HERE = Path(__file__).resolve()


class EnvChange(NamedTuple):
  """A package of another version; "absent" where there was or is none."""

  package: str
  old: str
  new: str


def environment() -> dict[str, Any]:
  """Fields of a `launch` event: `versions` of Python and of every installed package,
  `env_lock_sha256` over them, and `git_commit` and `git_dirty` of this code, None where it is not
  in a repository."""
  versions = {"python": platform.python_version()}
  for distribution in importlib.metadata.distributions():
    with contextlib.suppress(Exception):  # one whose metadata is damaged
      name = distribution.name.lower().replace("_", "-")
      versions.setdefault(name, distribution.version)  # the first found is the one imported
  versions = dict(sorted(versions.items()))
  lock = "".join(f"{name}=={version}\n" for name, version in versions.items())
  commit = dirty = None
  if _git("ls-files", "--error-unmatch", _HERE.name) is not None:  # ours, not one around a venv
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no")
    dirty = None if changed is None else bool(changed)
  return {
    "versions": versions,
    "env_lock_sha256": hashlib.sha256(lock.encode()).hexdigest(),
    "git_commit": commit or None,
    "git_dirty": dirty,
  }


def _git(*arguments: str) -> str | None:
  """What git says in this file's folder; None if it is missing, or refuses."""
  command = ["git", "-C", str(_HERE.parent), *arguments]
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10)
  except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
    return None
  return done.stdout.strip() if done.returncode == 0 else None


def env_changes(old: dict[str, Any], new: dict[str, Any]) -> list[EnvChange]:
  """Packages, Python and the code's own commit that differ between two `environment()`s."""
  before, after = (_named(x) for x in (old, new))
  return [
    EnvChange(name, before.get(name, "absent"), after.get(name, "absent"))
    for name in sorted(before.keys() | after.keys())
    if before.get(name) != after.get(name)
  ]


def _named(environment: dict[str, Any]) -> dict[str, str]:
  commit = environment.get("git_commit")
  if commit is None:
    return environment["versions"]
  dirty = " with changes" if environment.get("git_dirty") else ""
  return environment["versions"] | {"code": commit[:12] + dirty}
