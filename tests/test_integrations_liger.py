"""The losses by Liger's names are Liger's losses."""

import inspect

import pytest
import torch
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss as LigersLoss
from liger_kernel.transformers import LigerFusedLinearJSD as LigersJSD

from sdft_kernels.integrations.liger import LigerFusedLinearJSD, LigerFusedLinearJSDLoss
from tests.cases import relative_error

pytestmark = pytest.mark.peers

SOFT = {"weight_hard_loss": 0.0, "weight_soft_loss": 0.7, "compiled": False, "chunk_size": 8}


def tensors(vocabulary=53, wider=0, bias=False):
    """Arguments of either loss, of which the student's take gradients; every third token is ignored."""
    torch.manual_seed(0)
    student = [torch.randn(37, 16), torch.randn(vocabulary, 16)]
    teacher = [torch.randn(37, 24), torch.randn(vocabulary + wider, 24)]
    labels = torch.randint(vocabulary, (37,))
    labels[::3] = -100
    biases = [torch.randn(vocabulary), torch.randn(vocabulary + wider)] if bias else [None, None]
    return [*student, *teacher, labels, *biases]


def loss_and_gradients(loss, arguments):
    arguments = [
        tensor.clone().requires_grad_() if place in (0, 1, 5) and tensor is not None else tensor
        for place, tensor in enumerate(arguments)
    ]
    found = loss(*arguments)
    losses = found if isinstance(found, tuple) else (found,)
    (3 * losses[0]).backward()
    return [
        *losses,
        *(arguments[place].grad for place in (0, 1, 5) if place < len(arguments) and arguments[place] is not None),
    ]


def assert_same(ours, theirs, arguments):
    got, expected = (loss_and_gradients(loss, arguments) for loss in (ours, theirs))
    assert len(got) == len(expected)
    for ours_, theirs_ in zip(got, expected, strict=True):
        assert relative_error(ours_, theirs_) < 1e-5


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("wider", [0, 11])
@pytest.mark.parametrize("parts", [False, True])
def test_the_chunked_loss_is_ligers(beta, bias, wider, parts):
    settings = {**SOFT, "beta": beta, "temperature": 1.7, "return_soft_hard_loss": parts}
    assert_same(LigerFusedLinearJSDLoss(**settings), LigersLoss(**settings), tensors(wider=wider, bias=bias))


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.3, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("wider", [0, 11])
@pytest.mark.parametrize("parts", [False, True])
def test_the_hard_loss_is_ligers(shares, wider, parts):
    settings = {**SOFT, "temperature": 1.7, "return_soft_hard_loss": parts}
    settings |= dict(zip(("weight_hard_loss", "weight_soft_loss"), shares, strict=True))
    assert_same(LigerFusedLinearJSDLoss(**settings), LigersLoss(**settings), tensors(wider=wider, bias=True))


def test_tokens_that_are_all_ignored_make_no_loss():
    arguments = tensors()
    arguments[4] = torch.full((37,), -100)
    settings = {**SOFT, "return_soft_hard_loss": True}
    assert_same(LigerFusedLinearJSDLoss(**settings), LigersLoss(**settings), arguments)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("labelled", [False, True])
def test_the_fused_jsd_is_ligers(beta, labelled):
    settings = {"jsd_beta": beta, "temperature": 1.7}
    arguments = tensors()[: 5 if labelled else 4] + ([] if labelled else [None])
    assert_same(LigerFusedLinearJSD(**settings), LigersJSD(**settings), arguments)


@pytest.mark.parametrize(("ours", "theirs"), [(LigerFusedLinearJSDLoss, LigersLoss), (LigerFusedLinearJSD, LigersJSD)])
def test_the_arguments_are_ligers(ours, theirs):
    for method in ("__init__", "forward"):
        got, expected = (inspect.signature(getattr(kind, method)).parameters for kind in (ours, theirs))
        assert list(got) == list(expected)
        for name, parameter in expected.items():
            assert parameter.default in (got[name].default, inspect.Parameter.empty), name
    assert vars(theirs()).keys() <= vars(ours()).keys()


def test_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match="student_weight has 60 rows and teacher_weight 53"):
        LigerFusedLinearJSD()(torch.randn(2, 4), torch.randn(60, 4), torch.randn(2, 4), torch.randn(53, 4))
    labels, message = torch.arange(2), r"true_labels must be whole numbers of shape \(2,\), not "
    arguments = torch.randn(2, 4), torch.randn(60, 4), torch.randn(2, 4), torch.randn(60, 4)
    for wrong, found in [
        (None, "None; LigerFusedLinearJSD takes none"),
        (labels[:1], r"torch.int64 of shape \(1,\)"),
        (labels.float(), r"torch.float32 of shape"),
    ]:
        with pytest.raises(ValueError, match=message + found):
            LigerFusedLinearJSDLoss(weight_hard_loss=0.0)(*arguments, wrong)
    with pytest.raises(ValueError, match="shift_labels must be whole numbers of shape"):
        LigerFusedLinearJSD()(*arguments, labels[:1])
    for loss, name in [(LigerFusedLinearJSDLoss(beta=1e-4), "beta"), (LigerFusedLinearJSD(jsd_beta=1e-4), "jsd_beta")]:
        with pytest.raises(
            ValueError, match=rf"^{name} is 0.0001; it may be 0 \(forward KL\), 1 \(reverse KL\)"
        ) as error:
            loss(*arguments, labels)
        assert "_kl" not in str(error.value)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.randn(1, 2, 4), r"^student_input must have shape \(N, H\), not \(1, 2, 4\)"),
        (2, torch.randn(1, 2, 4), "^teacher_input must have shape"),
        (1, torch.randn(60, 5), "^student_weight has 5 columns and student_input 4"),
        (4, torch.tensor([0, 60]), "true_labels"),
    ],
)
def test_errors_have_ligers_names(place, value, message):
    arguments = [torch.randn(2, 4), torch.randn(60, 4), torch.randn(2, 4), torch.randn(60, 4), torch.arange(2)]
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearJSDLoss()(*arguments)
