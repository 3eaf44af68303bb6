"""What the integrations use of TRL and Liger that is private: still there, and the same."""

import inspect
import re

import pytest
import trl
from trl import DistillationTrainer
from trl.experimental.gold import GOLDTrainer
from trl.experimental.iw_opd import IWOPDTrainer
from trl.experimental.sdft import SDFTTrainer
from trl.experimental.sdpo import SDPOTrainer

from sdft_kernels.integrations import _compat
from sdft_kernels.integrations.trl.distillation import fused_divergence_loss

pytestmark = pytest.mark.peers

TRAINERS = {
    "SDFTTrainer": [SDFTTrainer, SDPOTrainer],
    "SDPOTrainer": [SDPOTrainer],
    "DistillationTrainer": [DistillationTrainer],
}


@pytest.mark.parametrize("name", _compat.OVERRIDES)
def test_trl_has_the_methods_that_are_replaced(name):
    wanted = _compat.OVERRIDES[name]
    for trainer in TRAINERS[wanted.trainer]:
        method = getattr(trainer, name, None)
        assert method is not None, f"TRL {trl.__version__} has no {trainer.__name__}.{name}, where {wanted.reason}"
        parameters = tuple(inspect.signature(method).parameters)[1:]
        assert parameters == wanted.parameters, f"TRL {trl.__version__} gives {trainer.__name__}.{name} {parameters}"


@pytest.mark.parametrize(
    ("trainer", "name", "parameters"),
    [
        (SDFTTrainer, "_log_self_distillation_metric", ["self", "mode", "value"]),
        (SDPOTrainer, "_log_self_distillation_metric", ["self", "mode", "value"]),
        (GOLDTrainer, "_get_model_forward_kwargs", ["self", "inputs", "exclude"]),
        (
            IWOPDTrainer,
            "_compute_iw_opd_loss",
            [
                "self",
                "student_logits",
                "completion_tokens",
                "labels",
                "teacher_actual_logprobs",
                "rollout_logprobs",
                "num_items_in_batch",
            ],
        ),
        (IWOPDTrainer, "_raise_if_local_teacher_tokenizer_mismatch", ["self"]),
    ],
)
def test_trl_has_the_methods_that_are_called(trainer, name, parameters):
    method = getattr(trainer, name, None)
    assert method is not None, f"TRL {trl.__version__} has no {trainer.__name__}.{name}: see integrations._compat"
    assert list(inspect.signature(method).parameters) == parameters, f"TRL {trl.__version__} has changed {name}"


def test_trls_chunked_loss_takes_what_ours_takes():
    from trl.trainer import distillation_trainer

    theirs = inspect.signature(distillation_trainer._chunked_divergence_loss).parameters
    ours = inspect.signature(fused_divergence_loss).parameters
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()], (
        f"TRL {trl.__version__} gives its loss other arguments: see integrations.trl.distillation"
    )


def test_a_name_that_a_method_no_longer_uses_is_missed():
    with pytest.raises(ImportError, match="no longer uses _another_loss"):
        _compat.with_names(DistillationTrainer._compute_loss, _another_loss=print)


@pytest.mark.parametrize(("found", "warns"), [("1.16.3", False), ("1.17.0", True), ("2.16.0", True)])
def test_a_release_that_was_not_tried_is_warned_of(found, warns, monkeypatch, recwarn):
    monkeypatch.setattr(_compat, "version", lambda package: found)
    _compat.warn_of_untried("trl")
    assert [bool(re.match(rf"trl is {found}; .* was tried with 1.16, ", str(w.message))) for w in recwarn] == [
        True
    ] * warns
