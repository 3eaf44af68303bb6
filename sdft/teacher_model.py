"""Another model as the teacher: loaded, and checked against the student before anything is trained on what it says.

Student and teacher are compared token by token, so both must read the same tokens in the same text. Their sizes and
types may differ, and so may the padding of their vocabularies: what only one of them has takes no part in the loss.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdft._compat import is_compiled
from sdft.data import TeacherReads
from sdft.errors import UsageError, kind_of
from sdft.head import check_head, find_head
from sdft.models.adapters import causal_lm
from sdft.models.files import named_by
from sdft.models.load import eos_token_ids, limits, load_model
from sdft.settings.config import SDFTConfig
from sdft.settings.inputs import Trust
from sdft.settings.teachers import MODEL, OtherTeacher, check_named
from sdft.teacher import ModelTeacher, Teacher, make_teacher
from sdft_kernels.arguments import PADDING_SHARE, PADDING_TOKENS

#: A model that teaches, as a trainer is given it: a model, its name, or a model with its tokenizer.
GivenTeacher = nn.Module | str | tuple[nn.Module, PreTrainedTokenizerBase | None] | None

logger = logging.getLogger(__name__)

NO_TRUST: Trust = {"trust_remote_code": False, "allow_pickle": False}


class OtherModel(NamedTuple):
    """A model that teaches another, and its tokenizer where that is known."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def reads(self) -> TeacherReads:
        """What rows are checked by, which this teacher is to read."""
        return TeacherReads(self.tokenizer, limits(self.model))


def teachers_device(args: SDFTConfig) -> torch.device:
    """Where training loads the teacher: weights of few bits where they stay, and others in host memory."""
    return args.device if args.teacher_bits is not None else torch.device("cpu")


def load_teacher(settings: OtherTeacher, device: torch.device | str = "cpu", trust: Trust = NO_TRUST) -> OtherModel:
    """The model that `teacher_model` names, in `teacher_dtype` or `teacher_bits`, and its tokenizer."""
    name, dtype, bits = str(settings.teacher_model), settings.teacher_dtype, settings.teacher_bits
    with named_by("teacher_model"):
        return OtherModel(*load_model(name, dtype, device, bits=bits, **trust))


def other_teacher(
    given: GivenTeacher,
    args: SDFTConfig,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> OtherModel | None:
    """The model that teaches the student, where that is another one: `given` to the trainer, or named in `args`.

    An OtherModel is what was loaded by that name. UsageError where it cannot be.
    """
    if given is not None and args.teacher != MODEL:
        raise UsageError(
            f"teacher_model is given, and teacher is {args.teacher!r} in args; it must be 'model' (SDFTConfig)"
        )
    if given is not None and args.teacher_model is not None and not isinstance(given, OtherModel):
        raise UsageError(
            f"teacher_model is given, and is {args.teacher_model!r} in args too; it must be set in one of the two"
        )
    if args.teacher != MODEL or args.method != "sdft":
        return None
    if isinstance(given, str):
        args.teacher_model = given
    if given is None or isinstance(given, str):
        check_named(args, args.teacher)
        other = load_teacher(args, teachers_device(args))
    else:
        model, its = given if isinstance(given, tuple) else (given, None)
        other = OtherModel(cast(PreTrainedModel, model), its)
    if not isinstance(other.model, nn.Module) or is_compiled(other.model):
        raise UsageError(f"teacher_model is {kind_of(other.model)}; it must be a model, or the name of one")
    check_apart(causal_lm(other.model), student)
    if other.tokenizer is not None:
        check_ends(other.tokenizer, tokenizer, eos_token_ids(student, tokenizer))
    return OtherModel(causal_lm(other.model), other.tokenizer)


def check_apart(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """UsageError where the teacher has weights of the student's, or a vocabulary that is not the student's, padded."""
    own = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in own for parameter in teacher.parameters()):
        raise UsageError(
            "teacher_model is the model that learns, or has weights of it; it must be another one, and teacher may be "
            "live or base instead"
        )
    tokens, students = (len(cast(torch.Tensor, find_head(model).weight)) for model in (teacher, student))
    if abs(tokens - students) > max(PADDING_TOKENS, PADDING_SHARE * min(tokens, students)):
        raise UsageError(
            f"teacher_model has a vocabulary of {tokens} tokens and the model one of {students}, which is more than "
            "padding explains; they must have the same tokenizer"
        )


def check_ends(teachers: PreTrainedTokenizerBase, students: PreTrainedTokenizerBase, eos_ids: frozenset[int]) -> None:
    """UsageError where the tokens that end an answer are others for the teacher; say where chat templates differ."""
    for token in sorted(eos_ids):
        own, its = (str(each.convert_ids_to_tokens(token)) for each in (students, teachers))
        if own != its:
            raise UsageError(
                f"teacher_model has {its!r} for token {token}, which ends an answer, and the model {own!r}; they must "
                "have the same tokenizer"
            )
    if teachers.chat_template != students.chat_template:
        logger.warning("teacher_model has another chat template than the model, whose own both of them read")


def teacher_of(
    args: SDFTConfig,
    learner: nn.Module,
    other: OtherModel | None,
    tokens: Sequence[int] = (),
    autocast: torch.dtype | None = None,
) -> Teacher:
    """The teacher that `args` ask for: made of the learner, or the `other` model, put where the learner computes.

    The head of another model is checked on a few tokens, in the type of mixed-precision products, `autocast`.
    """
    if other is None:
        return make_teacher(str(args.teacher), learner, args.ema_rate, offload=args.teacher_offload)
    teacher = ModelTeacher(learner, other.model, offload=args.teacher_offload)
    if tokens:
        check_head(other.model, tokens, autocast)
    heads = [len(find_head(model).weight) for model in (other.model, causal_lm(learner))]
    if heads[0] != heads[1]:
        logger.warning(
            "teacher_model has a vocabulary of %d tokens and the model one of %d: the %d that both have are compared",
            *heads,
            min(heads),
        )
    return teacher
