"""How much of what the teacher would begin an answer with is out of the student's reach.

Every divergence but forward KL moves a token's logit in proportion to the student's own probability p of the token.
Where the teacher's q is ten thousand times p, that is about a thousandth of forward KL's gradient, which is p - q, and
many steps hardly teach such a token. That is measured at the first token of each completion. A manner or a format is
chosen there, and after it the teacher goes on with what the student has written.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdft.head import Head
from sdft.likeliest import CHUNK_BYTES
from sdft.settings.config import SDFTConfig

#: How many times likelier than to the student a token is to the teacher when it is out of reach. What was a thousand
#: times likelier was reached in a few steps (docs/choosing.md).
FAR = 10_000
#: From this share of the teacher on, mixtures have gradients as small as reverse KL's there; below, forward KL's.
REVERSE_FROM = 0.01


def hardly_reaches(config: SDFTConfig) -> bool:
    """Whether the run's loss hardly teaches what the student gives next to no probability."""
    if config.demonstration_weight or config.divergence == "forward_kl":
        return False
    return config.divergence in ("reverse_kl", "skew_reverse_kl") or config.beta >= REVERSE_FROM


@torch.no_grad()
def out_of_reach(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    *,
    temperature: float = 1.0,
    max_chunk_bytes: int | None = None,
) -> Tensor:
    """(N,) the teacher's probability of all the tokens that are `FAR` times likelier to it than to the student.

    Hidden states are (N, H), of few tokens. A teacher that is uncertain in the way the student is has 0.
    """
    vocab = min(len(student_head.weight), len(teacher_head.weight))

    def logprobs(hidden: Tensor, head: Head) -> Tensor:
        logits = head.logits(hidden.to(head.weight.dtype))[:, :vocab]
        return (logits.float() / temperature).log_softmax(-1)

    most = CHUNK_BYTES.get(student_hidden.device.type, CHUNK_BYTES["cuda"])
    chunk = max(1, min(max_chunk_bytes or most, most) // (32 * vocab))  # 8 numbers at once for each logit
    shares = [student_hidden.new_empty(0, dtype=torch.float32)]
    with torch.autocast(student_hidden.device.type, enabled=False):  # which would keep its copies of the heads
        for of_student, of_teacher in zip(student_hidden.split(chunk), teacher_hidden.split(chunk), strict=True):
            p, q = logprobs(of_student, student_head), logprobs(of_teacher, teacher_head)
            shares.append(torch.where(q - math.log(FAR) > p, q.exp(), 0).sum(-1))
    return torch.cat(shares)
