"""One batch of rollouts for several optimizer steps: the order of the rows, and the rollouts kept between steps.

With `num_iterations` above 1 the prompts of a step come again in the next steps, with the same completions; each
token's weight then is the ratio of its probability now to that when it was sampled, clipped.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from torch.utils.data import Sampler

from sdft.batch import Sample
from sdft.checkpoints.files import write_text


class RepeatedRows(Sampler[int]):
    """The rows in random order, a step's worth at a time, each step's worth `repeats` times in a row.

    The order depends on the seed and the epoch alone. Rows from the epoch's start fill up its last step.
    """

    def __init__(self, rows: int, group: int, repeats: int, seed: int) -> None:
        self.rows, self.group, self.repeats, self.seed, self.epoch = rows, group, repeats, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.rows // self.group) * self.group * self.repeats

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.rows).tolist()
        endless = itertools.cycle(order)
        for _ in range(len(self) // (self.group * self.repeats)):
            group = list(itertools.islice(endless, self.group))
            for _ in range(self.repeats):
                yield from group


def save_samples(folder: str, process: int, samples: list[Sample]) -> None:
    write_text(_path(folder, process), json.dumps([asdict(sample) for sample in samples]))


def load_samples(folder: str, process: int) -> list[Sample] | None:
    """What `save_samples` put there; None where there is nothing."""
    path = _path(folder, process)
    return [Sample(**fields) for fields in json.loads(path.read_text("utf-8"))] if path.is_file() else None


def _path(folder: str, process: int) -> Path:
    return Path(folder) / f"rollouts-{process}.json"
