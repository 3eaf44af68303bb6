"""The step's loss as others compute it, to be run aside: with full logits, and as TRL's DistillationTrainer does it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

#: Tokens and words of a tile of TRL's (trl/kernels/chunked_divergence.py of TRL 1.16).
TRL_TILE = (4096, 32_768)

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], None]  # hidden states and head of the student, and of the teacher


def full_logits(student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> None:
    """Reverse KL of float32 log-softmaxes of all logits, and its gradients by autograd."""
    hidden = student_hidden.detach().requires_grad_()
    weight = student_weight.detach().requires_grad_(student_weight.requires_grad)
    device, shared = hidden.device.type, min(len(student_weight), len(teacher_weight))
    mixed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype

    def log_softmax(hidden: Tensor, weight: Tensor) -> Tensor:
        return functional.linear(hidden.to(mixed), weight.to(mixed)).log_softmax(-1, dtype=torch.float32)

    with torch.autocast(device, enabled=False):  # which would keep its copy of the head for the rest of the step
        log_p = log_softmax(hidden, weight[:shared])
        with torch.no_grad():
            log_q = log_softmax(teacher_hidden, teacher_weight[:shared])
        functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).sum().backward()


@torch.no_grad()
def trl_tiles(student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> None:
    """What TRL's loss takes at its peak, by its source: a tile of float32 logits of each model, a tile of gradients,
    and float32 gradients that are then rounded."""
    rows, columns = min(len(student_hidden), TRL_TILE[0]), TRL_TILE[1]
    tiles = [student_hidden.new_empty(rows, columns, dtype=torch.float32) for _ in range(2)]
    tiles.append(student_hidden.new_empty(rows, columns))
    trained = [student_hidden, *([student_weight] if student_weight.requires_grad else [])]
    gradients = [each.new_empty(each.shape, dtype=torch.float32) for each in trained]
    tiles.pop()  # rounding comes after the last tile of gradients
    tiles += [gradient.to(each.dtype) for gradient, each in zip(gradients, trained, strict=True)]


#: By the name that reports give them.
OTHERS: dict[str, Loss] = {"full logits": full_logits, "TRL's tiles": trl_tiles}
