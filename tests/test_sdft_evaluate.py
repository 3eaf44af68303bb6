import math

import pytest
import torch

from sdft.data import load_rows
from sdft.errors import UsageError
from sdft.evaluate import Answers, answer, complete, forgetting, prompts_for
from sdft.templates import TEMPLATES
from tests import tiny


def ask(model, rows, **options):
    return answer(model, tiny.tiny_tokenizer(), load_rows(rows), max_new_tokens=5, **{"batch_size": 3, **options})


def test_answers_keep_the_rows_order_whatever_the_batches():
    model, rows = tiny.tiny_model(), tiny.rows(7)
    rows[2]["prompt"] = "a prompt that is longer than the others"
    alone = [ask(model, [row]).texts[0] for row in rows]
    for size in (1, 3, 7):
        assert ask(model, rows, batch_size=size).texts == alone


def test_accuracy_counts_the_rows_with_an_answer():
    model, rows = tiny.tiny_model(), tiny.rows(4)
    texts = ask(model, rows).texts
    for row, text in zip(rows, texts, strict=True):
        row["answer"] = text + " "
    rows[0]["answer"] = "something else"
    del rows[1]["answer"]
    answers = ask(model, rows)
    assert answers.right == [False, True, True]
    assert answers.accuracy == pytest.approx(2 / 3)
    assert Answers([], [], [], []).accuracy is None


def test_the_teacher_is_asked_with_the_demonstration():
    model, tokenizer, rows = tiny.tiny_model(), tiny.tiny_tokenizer(), load_rows(tiny.rows(2))
    asked = ask(model, rows, template=TEMPLATES["turn"]).prompts
    assert tokenizer.decode(asked[1]) == "<|user|>say b<eos><|assistant|>bbb<eos><|user|>say b<eos><|assistant|>"


def test_forgetting_is_the_mean_kl_from_the_base_model_on_its_own_answers():
    base, model, tokenizer = tiny.tiny_model(0), tiny.tiny_model(1), tiny.tiny_tokenizer()
    answers = ask(base, tiny.rows(5))
    total, tokens = 0.0, 0
    with torch.no_grad():
        for prompt, completion in zip(answers.prompts, answers.completions, strict=True):
            ids = torch.tensor([[*prompt, *completion]])
            q, p = (m(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (base, model))
            total += (q.exp() * (q - p)).sum().item()
            tokens += len(completion)
    assert forgetting(model, base, answers, batch_size=2) == pytest.approx(total / tokens, rel=1e-5)
    assert forgetting(base, base, answers, batch_size=2) == pytest.approx(0, abs=1e-7)
    assert math.isfinite(total)
    assert tokenizer.pad_token_id == 0


def test_evaluation_leaves_training_mode_and_gradients_alone():
    model = tiny.tiny_model().train()
    answers = ask(model, tiny.rows(2))
    forgetting(model, tiny.tiny_model(1), answers, batch_size=2)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_held_out_prompt_longer_than_the_context_is_refused():
    model, tokenizer = tiny.tiny_model(max_position_embeddings=20), tiny.tiny_tokenizer()
    rows = load_rows(tiny.rows(1))
    assert prompts_for(model, tokenizer, rows, 12)
    with pytest.raises(UsageError, match=r"row 1: the prompt has 8 tokens.*context of 20"):
        prompts_for(model, tokenizer, rows, 13)
    with pytest.raises(UsageError, match="teacher prompt"):
        prompts_for(model, tokenizer, rows, 12, TEMPLATES["turn"])


def test_of_no_prompts_there_are_no_completions():
    assert complete(tiny.tiny_model(), tiny.tiny_tokenizer(), [], max_new_tokens=3, batch_size=2) == []
