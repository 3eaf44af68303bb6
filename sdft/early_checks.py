"""What can be checked before anything is loaded: files and folders, and the packages that a setting takes."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdft.data.files import is_hub_name, is_saved_folder
from sdft.errors import UsageError
from sdft.rollouts.server_calls import describe

#: The optimizers of transformers that are in another package. sdft.planning.optimizers has what they keep.
TORCHAO = ("adamw_torch_8bit", "adamw_torch_4bit")
BITSANDBYTES = (
    *("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"),
    *("ademamix", "ademamix_8bit", "paged_ademamix_8bit", "paged_ademamix_32bit"),
    *("lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit"),
    *("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
)


def check_package(asked: str, package: str) -> None:
    """UsageError if a package is not installed, which `asked` (a setting and its value) takes."""
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"{asked}, which needs {package}: pip install {package}")


def check_packages_of(values: Mapping[str, Any]) -> None:
    """UsageError if a package is not installed that `optim` or `use_liger_kernel` takes, of settings by name."""
    optimizer = values.get("optim")
    for package, optimizers in (("torchao", TORCHAO), ("bitsandbytes", BITSANDBYTES)):
        if optimizer in optimizers:
            check_package(f"optim is {optimizer!r}", package)
    if values.get("use_liger_kernel"):
        check_package("use_liger_kernel is True", "liger_kernel")


def check_vllm(server: str | None) -> None:
    """UsageError if there is no vLLM: the package, or where a server's URL is given that server."""
    if server is None:
        check_package("rollout_backend is 'vllm'", "vllm")
    else:
        describe(server)


def check_readable(field: str, name: str | None) -> None:
    """UsageError if the file that a field names is not there or cannot be read."""
    if not name:
        return
    try:
        found = os.path.isfile(name)
    except ValueError:  # a zero in the name
        found = False
    if not found:
        what = "that is a folder, and it must be a file" if os.path.isdir(name) else "there is no such file"
        raise UsageError(f"{field} is {name!r}; {what}")
    if not os.access(name, os.R_OK):
        raise UsageError(f"{field} is {name!r}, which may not be read")


def check_rows(field: str, source: str | Collection[str] | None) -> None:
    """UsageError if a source of rows, or one of several, is not there or cannot be read."""
    for name in [source] if isinstance(source, str) else source or ():
        if is_hub_name(name):
            check_package(f"{field} is {name!r}, a dataset of the hub", "datasets")
        elif is_saved_folder(name):
            check_package(f"{field} is {name!r}, which datasets has saved", "datasets")
        elif os.path.isdir(name):
            raise UsageError(
                f"{field} is {name!r}, a folder that datasets has not saved; it must name a file, or several"
            )
        else:
            check_readable(field, name)


def check_writable(folder: str | Path) -> None:
    """UsageError if nothing could be written to output_dir; leaves nothing."""
    path = Path(folder).absolute()
    refused = f"output_dir is {str(folder)!r}, which cannot be"
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{refused} written: its name is no text in UTF-8, or the locale has none") from error
    try:
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        if not existing.is_dir():
            raise UsageError(f"{refused} made: {existing} is a file")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise UsageError(f"{refused} written: {existing} is read-only here")
        os.rmdir(tempfile.mkdtemp(dir=existing, prefix=".sdft"))  # there are folders that permissions say nothing of
    except OSError as error:
        raise UsageError(f"{refused} written: {error.strerror}") from error


def check_output_file(field: str, name: str | None, *, inputs: Sequence[str | None] = ()) -> None:
    """UsageError if the file that a field names could not be written, or if that would cost one of the inputs."""
    if name is None:
        return
    path = Path(name)
    refused = f"{field} is {name!r}"
    try:
        if path.is_dir():
            raise UsageError(f"{refused}, a folder; it must be a file to write")
        if path.exists() and not path.is_file():  # its place would be taken by a file
            raise UsageError(f"{refused}, a device or a pipe; it must be a file to write")
        if not path.parent.is_dir():
            raise UsageError(f"{refused}; there is no such folder to write it in")
        if any(os.path.realpath(path) == os.path.realpath(each) for each in inputs if each):
            raise UsageError(f"{refused}, which is read or written too; it must be another file")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UsageError(f"{refused}, which may not be written")
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{refused}, which cannot be written: {error}") from error
