import pytest
import torch

from sdft import SDFTConfig, SDFTTrainer
from sdft.data import load_rows
from sdft.errors import UsageError
from sdft.evaluation.exam import Answers, Exam, answer, complete, forgetting, prompts_for
from sdft.evaluation.scorers import SCORERS
from sdft.settings.commands import EvalCommand
from sdft.settings.config import MethodSettings
from sdft.settings.idle import OF_EVAL, without_effect
from sdft.teacher import Teacher
from sdft.templates import TEMPLATES
from tests import tiny


def ask(model, rows, **options):
    return answer(model, tiny.tiny_tokenizer(), load_rows(rows), **{"max_new_tokens": 5, "batch_size": 3, **options})


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
    assert Answers([], [], [], [], []).accuracy is None


def test_the_teacher_is_asked_with_the_demonstration():
    model, tokenizer, rows = tiny.tiny_model(), tiny.tiny_tokenizer(), load_rows(tiny.rows(2))
    asked = ask(model, rows, template=TEMPLATES["turn"]).prompts
    assert tokenizer.decode(asked[1]) == "<|user|>say b<eos><|assistant|>bbb<eos><|user|>say b<eos><|assistant|>"


@torch.no_grad()
def full_logits_forgetting(model, base, answers):
    total, tokens = 0.0, 0
    for prompt, completion in zip(answers.prompts, answers.completions, strict=True):
        ids = torch.tensor([[*prompt, *completion]])
        q, p = (m(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (base, model))
        total += (q.exp() * (q - p)).sum().item()
        tokens += len(completion)
    return total / tokens


def test_forgetting_is_the_mean_kl_from_the_base_model_on_its_own_answers():
    base, model = tiny.tiny_model(0), tiny.tiny_model(1)
    answers = ask(base, tiny.rows(5))
    expected = full_logits_forgetting(model, base, answers)
    assert forgetting(model, Teacher(base), answers, batch_size=2) == pytest.approx(expected, rel=1e-5)
    assert forgetting(base, Teacher(base), answers, batch_size=2) == pytest.approx(0, abs=1e-7)


def test_evaluation_leaves_training_mode_and_gradients_alone():
    model = tiny.tiny_model().train()
    answers = ask(model, tiny.rows(2))
    forgetting(model, Teacher(tiny.tiny_model(1)), answers, batch_size=2)
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


def test_sampled_answers_are_averaged_and_depend_on_the_seed_alone():
    model, rows = tiny.tiny_model(), tiny.rows(3)
    sampled = {"temperature": 1.0, "samples": 4}
    first = ask(model, rows, seed=1, **sampled)
    torch.rand(7)
    state = torch.random.get_rng_state()
    assert ask(model, rows, seed=1, **sampled).texts == first.texts
    assert torch.equal(torch.random.get_rng_state(), state)
    assert ask(model, rows, seed=2, **sampled).texts != first.texts
    assert first.prompts == [prompt for prompt in ask(model, rows).prompts for _ in range(4)]
    assert len(set(first.texts[:4])) > 1
    rows[0]["answer"] = first.texts[0]
    answers = ask(model, rows, seed=1, **sampled)
    assert answers.accuracy == pytest.approx(first.texts[:4].count(first.texts[0]) / 12)
    assert ask(model, rows, temperature=0).texts == ask(model, rows).texts


GENERAL = [{"prompt": "what is x"}, {"prompt": "why"}, {"prompt": "tell me"}]


def trainer(folder, *, adapter=False, **options):
    given = {"eval_dataset": tiny.rows(4), "general_dataset": GENERAL}
    given.update({name: options.pop(name) for name in given.keys() & options.keys()})
    settings = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "max_completion_length": 6,
        "eval_completion_length": 5,
        "general_completion_length": 7,
        "learning_rate": 1e-2,
        "teacher_template": "turn",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    lora = None
    if adapter:
        from peft import LoraConfig

        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return SDFTTrainer(
        tiny.tiny_model(),
        SDFTConfig(output_dir=str(folder), **{**settings, **options}),
        train_dataset=tiny.rows(),
        processing_class=tiny.tiny_tokenizer(),
        peft_config=lora,
        **given,
    )


def logged(run, name):
    return {entry["step"]: entry[name] for entry in run.state.log_history if name in entry}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"teacher": "ema"},
        {"teacher": "live"},
        {"method": "sft"},
        {"adapter": True},
        {"adapter": True, "teacher": "ema"},
    ],
    ids=str,
)
def test_training_logs_accuracy_and_the_divergence_from_where_it_started(options, tmp_path):
    run = trainer(tmp_path, **options)
    assert run.evaluate()["eval_forgetting"] == pytest.approx(0, abs=1e-6)
    run.train()
    moved = logged(run, "eval_forgetting")
    assert list(moved) == [2, 4]
    base = tiny.tiny_model()
    answers = answer(base, tiny.tiny_tokenizer(), load_rows(GENERAL, need=("prompt",)), max_new_tokens=7, batch_size=1)
    expected = full_logits_forgetting(run.student.eval(), base, answers)
    assert expected > 1e-3
    assert moved[4] == pytest.approx(expected, rel=1e-4)
    assert list(logged(run, "eval_accuracy")) == [2, 4]


def test_the_accuracy_logged_is_the_named_scorers(tmp_path):
    rows = tiny.rows(4)
    texts = ask(tiny.tiny_model(), rows).texts
    for row, text, kept in zip(rows, texts, (1, 3, 5, 0), strict=True):
        row["answer"] = text[:kept] or "nothing like it"
    for scorer in ("exact", "contains"):
        run = trainer(tmp_path, eval_dataset=rows, scorer=scorer, general_dataset=None)
        expected = sum(SCORERS[scorer](text, row["answer"]) for text, row in zip(texts, rows, strict=True)) / 4
        assert run.evaluate() == {"eval_accuracy": expected}
        assert run.evaluate(rows[:1], metric_key_prefix="x") == {"x_accuracy": float(scorer == "contains")}


def test_sampled_evaluation_leaves_training_as_it_is(tmp_path):
    runs = [
        trainer(tmp_path, eval_temperature=1.0, eval_samples=2),
        trainer(tmp_path, eval_strategy="no", eval_dataset=None, general_dataset=None),
    ]
    for run in runs:
        run.train()
    for (name, a), b in zip(runs[0].model.named_parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert runs[0].evaluate() == runs[0].evaluate()


def test_general_prompts_alone_can_be_evaluated_on(tmp_path):
    run = trainer(tmp_path, eval_dataset=None, max_steps=2)
    run.train()
    assert list(logged(run, "eval_forgetting")) == [2]
    assert not logged(run, "eval_accuracy")


def test_the_starting_model_is_copied_only_where_it_must_be(tmp_path):
    run = trainer(tmp_path, adapter=True)
    own = {id(parameter) for parameter in run.model.parameters()}
    with run.starting_model.scoring() as base:
        assert {id(p) for p in base.parameters()} <= own
    run = trainer(tmp_path)
    assert run.starting_model is run.teacher
    assert trainer(tmp_path, teacher="ema", general_dataset=None).starting_model is None
    assert trainer(tmp_path, teacher="ema").starting_model is not None


def test_prompts_that_cannot_be_evaluated_on_are_refused_before_training(tmp_path):
    with pytest.raises(UsageError, match="eval_dataset, row 1: answer is 'a'; under scorer 'json' it must be JSON"):
        trainer(tmp_path, scorer="json")
    with pytest.raises(UsageError, match="general_dataset, row 3: the prompt has 1"):
        trainer(tmp_path, general_dataset=[*GENERAL[:2], {"prompt": "a" * 160}])
    with pytest.raises(UsageError, match="eval_samples is 2"):
        trainer(tmp_path, eval_samples=2)
    with pytest.raises(UsageError, match="general_scorer is 'letter'"):
        trainer(tmp_path, general_scorer="letter")


@pytest.mark.parametrize("backend", ["generate", "continuous"])
def test_an_answer_ends_at_a_stop_string(backend):
    """The text stays in, the answer counts as finished, and others are as they were."""
    model, rows = tiny.tiny_model(), tiny.rows(4)
    whole = ask(model, rows, max_new_tokens=12, backend=backend)
    text = next(text for text, done in zip(whole.texts, whole.finished, strict=True) if not done and len(text) > 4)
    stop = text[2:4]
    stopped = ask(model, rows, max_new_tokens=12, stop=[stop], backend=backend)
    for before, after, ended in zip(whole.texts, stopped.texts, stopped.finished, strict=True):
        assert after == (before[: before.index(stop) + 2] if stop in before else before)
        assert ended or stop not in before
    assert stopped.texts != whole.texts
    settings = MethodSettings(eval_stop=[stop], eval_completion_length=12, general_completion_length=12)
    exam = Exam(rows, rows, settings, batch_size=3, seed=0, silent=True)
    asked = [exam.held_out(model, tiny.tiny_tokenizer()), exam.general(model, tiny.tiny_tokenizer())]
    assert [answers.texts for answers in asked] == [stopped.texts] * 2


def test_eval_stop_counts_with_something_to_evaluate():
    (said,) = without_effect(OF_EVAL, EvalCommand(eval_stop=["x"]), eval_file=None, general_file=None)
    assert said.startswith("eval_stop is ['x'] and does nothing")
    assert not without_effect(OF_EVAL, EvalCommand(eval_stop=["x"]), eval_file=None, general_file="a", base_model=None)
