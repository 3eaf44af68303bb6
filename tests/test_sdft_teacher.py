import pytest
import torch

from sdft import teacher as teacher_module
from sdft.errors import UsageError
from sdft.teacher import AverageTeacher, BaseTeacher, make_teacher
from tests import tiny


def move(model, seed, size=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def test_the_base_teacher_stays_and_has_no_gradient():
    student = tiny.tiny_model()
    before = {name: p.clone() for name, p in student.named_parameters()}
    teacher = make_teacher("base", student, 0.5)
    assert type(teacher) is BaseTeacher
    move(student, 1)
    teacher.update(student)
    for name, parameter in teacher.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert not parameter.requires_grad
    assert not teacher.model.training


def test_the_average_follows_its_formula():
    student = tiny.tiny_model()
    teacher = make_teacher("ema", student, 0.1)
    expected = {name: p.detach().double() for name, p in student.named_parameters()}
    for step in range(5):
        move(student, step)
        teacher.update(student)
        for name, parameter in student.named_parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * parameter.detach().double()
    for name, parameter in teacher.model.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-6, atol=1e-6)


def test_a_bfloat16_student_has_a_float32_average():
    student = tiny.tiny_model().to(torch.bfloat16)
    teacher = AverageTeacher(student, 0.01)
    target = student.lm_head.weight.detach().float() + 0.05
    start = student.lm_head.weight.detach().float()
    with torch.no_grad():
        student.lm_head.weight.copy_(target)
    moved_to = student.lm_head.weight.detach().float()
    for _ in range(100):
        teacher.update(student)
    expected = moved_to + (start - moved_to) * 0.99**100
    assert teacher.average["lm_head.weight"].dtype == torch.float32
    torch.testing.assert_close(teacher.average["lm_head.weight"], expected, rtol=1e-4, atol=1e-5)
    assert teacher.model.lm_head.weight.dtype == torch.bfloat16
    torch.testing.assert_close(teacher.model.lm_head.weight, expected.to(torch.bfloat16))


@pytest.mark.parametrize("kind", ["base", "ema"])
def test_frozen_parameters_are_shared_and_trained_ones_are_not(kind):
    student = tiny.tiny_model(tied=True)
    student.get_input_embeddings().requires_grad_(False)
    teacher = make_teacher(kind, student, 0.5)
    own = dict(teacher.model.named_parameters())
    for name, parameter in student.named_parameters():
        assert (own[name].data_ptr() == parameter.data_ptr()) == (not parameter.requires_grad), name
    assert teacher.model.lm_head.weight.data_ptr() == student.model.embed_tokens.weight.data_ptr()


def test_the_average_survives_a_checkpoint(tmp_path):
    student = tiny.tiny_model().to(torch.bfloat16)
    teacher = AverageTeacher(student, 0.3)
    move(student, 0)
    teacher.update(student)
    teacher.save(str(tmp_path))
    again = AverageTeacher(tiny.tiny_model().to(torch.bfloat16), 0.3)
    again.load(str(tmp_path))
    for name, tensor in teacher.average.items():
        assert torch.equal(again.average[name], tensor)
    for a, b in zip(again.model.parameters(), teacher.model.parameters(), strict=True):
        assert torch.equal(a, b)
    (tmp_path / "teacher_average.safetensors").unlink()
    with pytest.raises(UsageError, match="teacher 'ema'"):
        again.load(str(tmp_path))


def test_a_streamed_teacher_scores_as_one_that_is_whole(monkeypatch):
    moves = []
    move_data = teacher_module._move
    monkeypatch.setattr(teacher_module, "_move", lambda *given: moves.append(given[2:]) or move_data(*given))
    student = tiny.tiny_model()
    shared = student.model.layers[0].input_layernorm.weight.requires_grad_(False)
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = student(ids).logits
    with make_teacher("base", student, 0.5, offload=True).scoring() as model:
        assert moves == [()] * len(model.model.layers)  # away from the device
        moves.clear()
        assert model.model.layers[0].input_layernorm.weight is shared
        assert torch.equal(model(ids).logits, expected)
        assert moves == [(student.device,), ()] * len(model.model.layers)  # there and back, a layer at a time
        moves.clear()
        model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids)
        assert moves[-1] == ()
    assert torch.equal(student(ids).logits, expected)


def test_the_live_teacher_is_the_student():
    student = tiny.tiny_model()
    with make_teacher("live", student, 0.5).scoring() as model:
        assert model is student
