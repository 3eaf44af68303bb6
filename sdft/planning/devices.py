"""The memory of a GPU, by the name of the card or as a size."""

from __future__ import annotations

import re

from sdft.errors import UsageError
from sdft.settings.checks import matching

GIB = 2**30

#: GiB of cards as they are sold; the driver keeps a little of it.
CARDS = {
    "H100": 80,
    "H200": 141 * 10**9 / GIB,
    "A100": 80,
    "L40S": 48,
    "RTX4090": 24,
    "RTX3090": 24,
    "T4": 16,
}

#: Bytes that a process has on a GPU before its first tensor: the CUDA context, and what matrix products work in. This
#: is an allowance; it differs between drivers.
RESERVED = GIB

#: Settings that say what a machine has, which transformers holds against this one; but for bf16, none takes memory.
HARDWARE = ("tf32", "bf16", "use_cpu", "report_to", "bf16_full_eval", "fp16_full_eval")


def memory_of(gpu: str) -> int:
    """The bytes that `gpu` has: the name of a card, or a size such as 80GiB."""
    card = matching(gpu.replace(" ", ""), CARDS)
    if card is not None:
        return int(CARDS[card] * GIB)
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|GB)", gpu.strip(), re.IGNORECASE)
    if size is None or not float(size[1]):
        raise UsageError(f"gpu is {gpu!r}; it may be a size such as 80GiB, {', '.join(list(CARDS)[:-1])} or T4")
    return int(float(size[1]) * (GIB if size[2].lower() == "gib" else 10**9))
