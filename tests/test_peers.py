"""The installed peers compute the same loss and gradients, wherever they offer it."""

import pytest
import torch

from tests.cases import Case, Result, fused, random_case, relative_error

#: TRL's and Liger's β for each divergence they have.
PEER_BETA = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}


def trainable(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    return case.student_hidden.clone().requires_grad_(), case.student_weight.clone().requires_grad_()


def assert_same(actual: Result, loss: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> None:
    assert relative_error(loss, actual.output.loss) < 1e-5
    assert relative_error(hidden.grad, actual.gradients["student_hidden"]) < 1e-5
    assert relative_error(weight.grad, actual.gradients["student_weight"]) < 1e-5


@pytest.mark.peers
@pytest.mark.parametrize("divergence", PEER_BETA)
def test_liger_fused_linear_jsd(divergence: str) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    case = random_case(divergence=divergence, beta=0.5, temperature=1.5)
    hidden, weight = trainable(case)
    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=PEER_BETA[divergence], temperature=1.5, compiled=False
    )
    loss = module(hidden, weight, case.teacher_hidden, case.teacher_weight, torch.zeros(37, dtype=torch.int64))
    loss.backward()
    assert_same(fused(case), loss, hidden, weight)


@pytest.mark.peers
@pytest.mark.parametrize("divergence", [*PEER_BETA, "jsd of 0.3"])
@pytest.mark.parametrize("softcaps", [(None, None), (6.0, 9.0), (None, 7.0)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_trl_chunked_divergence(
    divergence: str, softcaps: tuple[float | None, float | None], reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl.kernels import chunked_divergence

    # TRL asks whether triton is installed, not whether this is a GPU's tensor, where the interpreter is on
    monkeypatch.setattr(chunked_divergence, "_use_triton", lambda device: False)
    name, _, share = divergence.partition(" of ")
    beta = float(share) if share else PEER_BETA[name]
    case = random_case(
        divergence=name,
        beta=beta if name == "jsd" else 0.5,
        temperature=1.3,
        student_logit_scale=1.4,
        teacher_logit_scale=0.7,
        student_softcap=softcaps[0],
        teacher_softcap=softcaps[1],
        reduction=reduction,
    )
    upstream = torch.rand(37) if reduction == "none" else None
    hidden, weight = trainable(case)
    per_token, entropy = chunked_divergence.ChunkedDivergenceFunction.apply(
        hidden,
        weight,
        None,
        case.teacher_hidden,
        case.teacher_weight,
        None,
        beta,
        1.3,
        1.4,
        softcaps[0],
        0.7,
        softcaps[1],
    )
    loss = per_token if reduction == "none" else per_token.mean()
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)
    actual = fused(case, upstream)
    assert_same(actual, loss, hidden, weight)
    assert relative_error(entropy, actual.output.student_entropy) < 1e-5
    assert relative_error(per_token, actual.output.token_loss) < 1e-5
