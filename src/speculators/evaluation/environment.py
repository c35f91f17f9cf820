"""Where figures were measured: versions, commit, machine. Part of every report."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from speculators.provenance import find_package_repo, git_diff, git_sha, package_versions


def environment() -> dict[str, Any]:
    repo = find_package_repo()
    return {
        "versions": {"python": platform.python_version(), **package_versions()},
        "commit": git_sha(repo),
        "uncommitted_changes": bool(git_diff(repo)),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
    }
