"""What made a result: package versions and the state of the source tree they came from."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from speculators.utils.files import atomic_write

__all__ = [
    "TRACKED_PACKAGES",
    "atomic_write",
    "find_package_repo",
    "find_repo_root",
    "git_diff",
    "git_sha",
    "package_versions",
    "pkg_version",
    "run_git",
]

TRACKED_PACKAGES = ("speculators", "torch", "transformers", "datasets", "safetensors", "pydantic", "numpy", "vllm")
GIT_TIMEOUT_S = 10.0


def pkg_version(name: str) -> str | None:
    """Installed version of a distribution; None when it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def package_versions() -> dict[str, str | None]:
    return {name: pkg_version(name) for name in TRACKED_PACKAGES}


def find_repo_root(path: str | os.PathLike) -> Path | None:
    """The git work tree that holds `path`."""
    start = Path(path).resolve()
    return next((folder for folder in (start, *start.parents) if (folder / ".git").exists()), None)


def find_package_repo(package: str = "speculators") -> Path | None:
    """The git work tree a package is imported from; None when it is installed, not checked out."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None or "site-packages" in Path(spec.origin).parts:
        return None
    return find_repo_root(spec.origin)


def run_git(*args: str, cwd: str | os.PathLike) -> str | None:
    """What a git command prints; None when git is missing or says no."""
    try:
        done = subprocess.run(["git", *args], cwd=cwd, capture_output=True, text=True, timeout=GIT_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def git_sha(repo: str | os.PathLike | None) -> str | None:
    sha = run_git("rev-parse", "HEAD", cwd=repo) if repo is not None else None
    return sha.strip() if sha else None


def git_diff(repo: str | os.PathLike | None) -> str | None:
    """Uncommitted changes to tracked files; "" when there are none."""
    return run_git("diff", "HEAD", cwd=repo) if repo is not None else None
