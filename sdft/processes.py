"""Work on batches that several processes share, each with the whole model or with its part of the weights."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from tqdm.auto import tqdm

Result = TypeVar("Result")


def processes() -> int:
    """How many processes there are to share with: 1 where none has been told of others."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process does what one does for all."""
    return processes() == 1 or dist.get_rank() == 0


def of_first(value: Result) -> Result:
    """The value that the first process has; all of them ask."""
    if processes() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def wait_for_all() -> None:
    """Go on once every process has come here."""
    if processes() > 1:
        dist.barrier()


def part() -> None:
    """End the work with the others, once all have come here, and once nobody holds a trainer of theirs any more.

    gloo's threads are only joined with the last reference to their group, which DDP has too. One that still runs while
    Python ends aborts the process, when all its work is done (SIGABRT, "terminate called without an active exception").
    """
    if processes() > 1:
        wait_for_all()
        gc.collect()
        dist.destroy_process_group()


def each_batch(
    batches: list[list[int]],
    work: Callable[[list[int]], Result],
    *,
    share: bool = False,
    progress: str | None = None,
) -> list[Result]:
    """What `work` makes of each batch, in the batches' order; `progress` describes a bar, None is no bar.

    With `share` every process calls this with the same batches, does some of them and gets the results of all. All
    processes do the same number of batches, since sharded weights are there only while all compute; where the batches
    do not divide evenly, some are done twice.
    """
    count, process = (processes(), dist.get_rank()) if share and processes() > 1 else (1, 0)
    turns = range(process, process + len(batches), count)
    done: dict[int, Result] = {}
    for turn in tqdm(turns, desc=progress, leave=False, disable=progress is None, dynamic_ncols=True):
        number = min(turn, len(batches) - 1)
        done[number] = work(batches[number])
    if count > 1:
        parts: list[dict[int, Result]] = [{} for _ in range(count)]
        dist.all_gather_object(parts, done)
        done = {number: result for part in parts for number, result in part.items()}
    return [done[number] for number in range(len(batches))]
