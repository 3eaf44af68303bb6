"""The versions of packages, ours among them, which may run from a checkout that is not installed."""

from __future__ import annotations

import importlib.metadata

OURS = "sdft-kernels"


def version_of(package: str) -> str | None:
    """None where the package is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
