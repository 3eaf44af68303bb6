"""Layout and loss, against full logits computed here: one unpadded sequence at a time, the formulas written out."""

import copy
import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPT2Config, GPTJConfig, GraniteConfig

from sdft.batch import Sample, count_items, group, lay_out, parts_within
from sdft.errors import TrainingError
from sdft.head import check_head, find_head
from sdft.loss import completion_logprobs, demonstration_loss, distillation_loss
from sdft.settings.config import SDFTConfig
from sdft.teacher import Teacher, frozen_copy
from tests import tiny

SAMPLES = [
    Sample([5, 6, 7], [8, 9, 10, 1], [20, 21, 22, 23, 24, 25]),
    Sample([11], [12, 1], [30, 31, 32]),
    Sample([13, 14, 15, 16, 17], [18, 19, 20, 21, 22, 23], [40]),
]


def config(tmp_path, **options):
    return SDFTConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def logprobs(model, prompt, completion, temperature=1.0):
    """log-probabilities (completion length, V) of the distributions that predict each completion token."""
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0]
    return (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)


def full_logits_loss(student, teacher, samples, divergence, skip=0, temperature=1.0, beta=0.5):
    total = torch.zeros(())
    for s in samples:
        p = logprobs(student, s.prompt, s.completion, temperature)[skip:]
        with torch.no_grad():
            q = logprobs(teacher, s.teacher_prompt, s.completion, temperature)[skip:]
        if divergence == "reverse_kl":
            total = total + (p.exp() * (p - q)).sum()
        elif divergence == "forward_kl":
            total = total + (q.exp() * (q - p)).sum()
        else:
            m = ((1 - beta) * p.exp() + beta * q.exp()).log()
            of_student, of_teacher = (p.exp() * (p - m)).sum(), (q.exp() * (q - m)).sum()
            shares = {"jsd": (1 - beta, beta), "skew_reverse_kl": (1, 0), "skew_forward_kl": (0, 1)}[divergence]
            total = total + shares[0] * of_student + shares[1] * of_teacher
    return total


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        error = (got[name] - expected[name]).norm() / expected[name].norm().clamp_min(1e-12)
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd", "skew_reverse_kl", "skew_forward_kl"])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_are_those_of_full_logits(divergence, tied, tmp_path):
    student, teacher = tiny.tiny_model(0, tied), tiny.tiny_model(1, tied)
    settings = config(tmp_path, divergence=divergence, beta=0.3, skip_tokens=1, loss_temperature=1.7)
    expected = full_logits_loss(student, teacher, SAMPLES, divergence, skip=1, temperature=1.7, beta=0.3)
    expected.backward()
    expected_gradients = gradients(student)
    student.zero_grad()
    total = torch.zeros(())
    for batch in [lay_out(members, skip_tokens=1) for members in group(SAMPLES, 2)]:
        loss = distillation_loss(student, Teacher(teacher), batch, settings, None).total
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, expected.detach(), rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients(student), expected_gradients)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("chunk", [None, 101 * 4 * 3], ids=["one chunk", "three tokens a chunk"])
def test_sft_is_cross_entropy_on_the_demonstration(chunk, tmp_path):
    model = tiny.tiny_model()
    expected = -sum(
        logprobs(model, s.prompt, s.completion).gather(-1, torch.tensor(s.completion)[:, None]).sum() for s in SAMPLES
    )
    expected.backward()
    expected_gradients = gradients(model)
    model.zero_grad()
    batch = lay_out(SAMPLES, skip_tokens=0)
    loss = demonstration_loss(model, batch, config(tmp_path, max_chunk_bytes=chunk), None).total
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients(model), expected_gradients)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("weight", [0.3, 20.0])
def test_sft_near_the_base_is_cross_entropy_and_the_weighted_divergence_from_it(divergence, weight, tmp_path):
    """Of full logits in float64; both models read the prompt alone."""
    model, start = tiny.tiny_model(0), tiny.tiny_model(1)
    settings = config(
        tmp_path, method="sft", base_kl_weight=weight, divergence=divergence, loss_temperature=1.7, max_chunk_bytes=1212
    )
    exact, exact_start = (copy.deepcopy(each).double() for each in (model, start))
    alike = [Sample(s.prompt, s.completion, s.prompt) for s in SAMPLES]
    divergences = full_logits_loss(exact, exact_start, alike, divergence, skip=0, temperature=1.7, beta=0.5)
    cross_entropy = -sum(
        logprobs(exact, s.prompt, s.completion).gather(-1, torch.tensor(s.completion)[:, None]).sum() for s in SAMPLES
    )
    expected = cross_entropy + weight * divergences
    expected.backward()
    batch = lay_out([Sample(s.prompt, s.completion) for s in SAMPLES], skip_tokens=0)
    out = demonstration_loss(model, batch, settings, None, Teacher(start))
    out.total.backward()
    torch.testing.assert_close(out.total.detach().double(), expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(out.sums["base_kl"].double(), divergences.detach(), rtol=1e-5, atol=0)
    assert_same_gradients(gradients(model), gradients(exact))
    assert all(p.grad is None for p in start.parameters())


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_the_same_prompt_for_student_and_frozen_teacher_gives_nothing_to_learn(divergence, tmp_path):
    student = tiny.tiny_model()
    teacher = frozen_copy(student)
    samples = [Sample(s.prompt, s.completion, s.prompt) for s in SAMPLES]
    loss = distillation_loss(
        student, Teacher(teacher), lay_out(samples, 0), config(tmp_path, divergence=divergence), None
    ).total
    loss.backward()
    assert abs(loss.item()) / 12 < 1e-6
    assert max(g.abs().max().item() for g in gradients(student).values()) < 1e-5


def test_layout_reads_only_positions_that_predict_completion_tokens():
    batch = lay_out(SAMPLES, skip_tokens=1)
    rows, length = batch["input_ids"].shape
    assert (rows, length) == (3, 11)
    assert batch["input_ids"][1].tolist() == [11, 12, 1] + [0] * 8
    assert batch["labels"].tolist() == [9, 10, 1, 1, 19, 20, 21, 22, 23]
    flat, teacher_flat = batch["input_ids"].flatten(), batch["teacher_input_ids"].flatten()
    assert flat[batch["positions"] + 1].tolist() == batch["labels"].tolist()
    assert teacher_flat[batch["teacher_positions"] + 1].tolist() == batch["labels"].tolist()
    assert flat[batch["positions"]].tolist() == [8, 9, 10, 12, 18, 19, 20, 21, 22]


def test_micro_batches_hold_every_sample_once_longest_first():
    batches = [lay_out(members, skip_tokens=0) for members in group(SAMPLES, 2)]
    assert [len(b["input_ids"]) for b in batches] == [1, 2]
    assert batches[0]["labels"].tolist() == SAMPLES[2].completion
    assert sorted(torch.cat([b["labels"] for b in batches]).tolist()) == sorted(
        t for s in SAMPLES for t in s.completion
    )
    for count in range(1, 9):
        for parts in range(1, count + 1):
            sizes = list(map(len, group([SAMPLES[0]] * count, parts)))
            assert sum(sizes) == count
            assert min(sizes) >= 1


def test_pieces_are_as_few_as_keep_to_so_many_tokens():
    """Padded lengths of the student's rows are 11, 7 and 3, and with the demonstrations' 10, 6 and 2 more."""
    assert [parts_within(SAMPLES, tokens) for tokens in (33, 32, 14, 13, 1)] == [1, 2, 2, 3, 3]
    shown = [dataclasses.replace(s, demonstration=[1] * (len(s.completion) - 1)) for s in SAMPLES]
    assert [parts_within(shown, tokens) for tokens in (63, 62, 26, 25)] == [1, 2, 2, 3]


def test_completions_shorter_than_what_is_skipped_leave_nothing_and_still_backpropagate(tmp_path):
    student, teacher = tiny.tiny_model(0), tiny.tiny_model(1)
    batch = lay_out(SAMPLES[1:2], skip_tokens=2)
    loss = distillation_loss(student, Teacher(teacher), batch, config(tmp_path, skip_tokens=2), None).total
    loss.backward()
    assert loss.item() == 0
    assert all(g.abs().max() == 0 for g in gradients(student).values())


SMALL = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
FAMILIES = {
    "cohere": CohereConfig(**SMALL, logit_scale=0.25),
    "gemma2": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0),
    "granite": GraniteConfig(**SMALL, logits_scaling=4.0),
    "gpt2": GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3),
    "gptj": GPTJConfig(vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4),
}


def family(name, seed):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[name]).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name == "lm_head.bias":
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_scales_soft_caps_and_biases_of_heads_are_found(name, tmp_path):
    student, teacher = family(name, 0), family(name, 1)
    check_head(student, [5, 6, 7, 8])
    expected = full_logits_loss(student, teacher, SAMPLES, "reverse_kl")
    expected.backward()
    expected_gradients = gradients(student)
    student.zero_grad()
    loss = distillation_loss(student, Teacher(teacher), lay_out(SAMPLES, 0), config(tmp_path), None).total
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients(student), expected_gradients)


def test_heads_are_described_as_their_configuration_says():
    assert find_head(family("cohere", 0)).scale == 0.25
    assert find_head(family("granite", 0)).scale == 0.25
    assert find_head(family("gemma2", 0)).softcap == 2.0
    assert find_head(family("gptj", 0)).bias is not None


def test_a_head_that_is_not_reproduced_is_refused_with_the_difference():
    model = family("cohere", 0)
    model.config.logit_scale = 0.5  # the model keeps its own copy: 0.25
    with pytest.raises(TrainingError, match=r"scale 0.5.*differ by 1 of the largest"):
        check_head(model, [5, 6, 7, 8])


def test_the_self_check_allows_for_bfloat16_and_leaves_the_mode_alone():
    model = tiny.tiny_model().to(torch.bfloat16).train()
    check_head(model, [5, 6, 7, 8])
    assert model.training
    model.lm_head.weight.data[3, 3] = float("nan")
    with pytest.raises(TrainingError, match="differ by nan"):
        check_head(model, [5, 6, 7, 8])


def test_mixed_precision_is_close_to_float32(tmp_path):
    student, teacher = tiny.tiny_model(0), tiny.tiny_model(1)
    settings = config(tmp_path)
    exact = distillation_loss(student, Teacher(teacher), lay_out(SAMPLES, 0), settings, None).total
    mixed = distillation_loss(student, Teacher(teacher), lay_out(SAMPLES, 0), settings, torch.bfloat16).total
    assert mixed.item() != exact.item()
    assert mixed.item() == pytest.approx(exact.item(), rel=0.05)
    mixed.backward()
    assert student.lm_head.weight.grad.dtype == torch.float32


def test_log_probabilities_of_completions_are_those_of_full_logits(tmp_path):
    model = tiny.tiny_model()
    got = completion_logprobs(model, lay_out(SAMPLES, 1), config(tmp_path, loss_temperature=1.5), None)
    expected = [
        logprobs(model, s.prompt, s.completion, 1.5)[1:].gather(1, torch.tensor(s.completion[1:])[:, None])[:, 0]
        for s in SAMPLES
    ]
    torch.testing.assert_close(got, torch.cat(expected).detach(), rtol=1e-5, atol=1e-6)


def test_tokens_or_sequences_count_alike(tmp_path):
    """Sequence normalisation: each completion is the mean over its own tokens, in distillation and cross-entropy."""
    student, teacher = tiny.tiny_model(), tiny.tiny_model(seed=1)
    settings, batch = config(tmp_path), lay_out(SAMPLES, 0, "sequence")
    assert count_items(batch) == pytest.approx(len(SAMPLES), rel=1e-6)
    assert count_items(lay_out(SAMPLES, 0)) == sum(len(s.completion) for s in SAMPLES)
    loss = distillation_loss(student, Teacher(teacher), batch, settings, None).total
    loss.backward()
    got = gradients(student)
    student.zero_grad()
    expected = sum(full_logits_loss(student, teacher, [s], "reverse_kl") / len(s.completion) for s in SAMPLES)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(got, gradients(student))
    entropy = -sum(
        logprobs(student, s.prompt, s.completion).gather(1, torch.tensor(s.completion)[:, None]).mean() for s in SAMPLES
    )
    assert demonstration_loss(student, batch, settings, None).total.item() == pytest.approx(entropy.item(), rel=1e-5)


def test_importance_weights_are_clipped_ratios_and_carry_no_gradient(tmp_path):
    student, teacher = tiny.tiny_model(), tiny.tiny_model(seed=1)
    old = [[-5.0, -0.5, -7.0, -2.0], [-1.0, -9.0], [-3.0, -3.0, -0.1, -8.0, -4.0, -2.0]]
    samples = [dataclasses.replace(s, old_logprobs=values) for s, values in zip(SAMPLES, old, strict=True)]
    settings = config(tmp_path, importance_clip=1.7)
    loss = distillation_loss(student, Teacher(teacher), lay_out(samples, 0), settings, None).total
    loss.backward()
    got = gradients(student)
    student.zero_grad()
    expected = torch.zeros(())
    for s in samples:
        p = logprobs(student, s.prompt, s.completion)
        q = logprobs(teacher, s.teacher_prompt, s.completion).detach()
        now = p.detach().gather(1, torch.tensor(s.completion)[:, None])[:, 0]
        weight = (now - torch.tensor(s.old_logprobs)).exp().clamp(max=1.7)
        expected = expected + (weight * (p.exp() * (p - q)).sum(-1)).sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(got, gradients(student))
