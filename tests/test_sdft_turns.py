"""Demonstrations of several turns: the teacher is shown them all, and cross-entropy counts the assistant's tokens."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from sdft.batch import Sample, demonstrations_of, lay_out
from sdft.cli import main
from sdft.data import Limits, encode_rows, load_rows, teacher_text
from sdft.errors import UsageError
from sdft.loss import demonstration_loss
from sdft.repeats import load_samples, save_samples
from sdft.settings.config import SDFTConfig
from sdft.teacher import Teacher
from sdft.templates import TEMPLATES
from tests import tiny
from tests.test_sdft_loss import assert_same_gradients, full_logits_loss, gradients, logprobs
from tests.test_sdft_trainer import Gradients, trained

USER = {"role": "user", "content": "Weather in Lima?"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
ASKS = {"role": "assistant", "content": "I ask.", "tool_calls": [CALL]}
RESULT, WARM = {"role": "tool", "content": "21 degrees"}, {"role": "assistant", "content": "It is warm."}
TRAJECTORY = [ASKS, RESULT, RESULT, ASKS, RESULT, WARM]
CHAT = [{"role": "assistant", "content": "Warm."}, {"role": "user", "content": "Sure?"}, WARM]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def encode(row, tokenizer, method="sft", context=None, eos=frozenset({1}), **options):
    rows = load_rows([{"prompt": [USER], **row}])
    given = {"template": TEMPLATES["turn"], "max_completion_length": 8, "limits": Limits(context)}
    (encoded,) = encode_rows(rows, tokenizer, method=method, eos_ids=eos, **given, **options)
    return encoded


@pytest.fixture(scope="module")
def smollm2(smollm2_folder):
    file = next(smollm2_folder.glob("*.gguf")).name
    return AutoTokenizer.from_pretrained(smollm2_folder, gguf_file=file)


@pytest.fixture
def templated(smollm2, monkeypatch):
    """SmolLM2's tokenizer, whose special tokens are Qwen's too, with a chat template that TRL has a copy of."""
    trl = pytest.importorskip("trl")

    def with_template(name):
        text = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text("utf-8")
        monkeypatch.setattr(smollm2, "chat_template", text)
        return smollm2

    return with_template


@pytest.mark.parametrize("demonstration", [TRAJECTORY, CHAT, [ASKS, WARM], [{**ASKS, "content": ""}, RESULT, WARM]])
@pytest.mark.parametrize("template", ["qwen2_5", "qwen3_instruct_2507"])
def test_the_assistants_tokens_are_those_that_the_whole_chat_has(template, demonstration, templated):
    """TRL's templates for training mark what the assistant writes, up to the end of its message."""
    tokenizer = templated(template)
    eos = frozenset({tokenizer.eos_token_id})
    ids = encode({"demonstration": demonstration, "tools": TOOLS}, tokenizer, eos=eos)
    tokenizer = templated(f"{template}_training")
    marked = tokenizer.apply_chat_template(
        [USER, *demonstration], tools=TOOLS, return_dict=True, return_assistant_tokens_mask=True
    )
    whole, mask = marked["input_ids"], marked["assistant_masks"]
    start = len(ids["prompt_ids"])
    assert [*ids["prompt_ids"], *ids["completion_ids"]] == whole[: start + len(ids["completion_ids"])]
    newline = tokenizer("\n")["input_ids"][0]  # Qwen 2.5's marks those around a turn, too, which no model writes
    expected = [
        place - start
        for place, wrote in enumerate(mask)
        if wrote and not (whole[place] == newline and (whole[place - 1] in eos or not mask[place - 1]))
    ]
    assert ids["learned"] == expected
    text = tokenizer.decode([ids["completion_ids"][place] for place in ids["learned"]])
    assert text.count("<|im_end|>") == sum(message["role"] == "assistant" for message in demonstration)
    assert "21 degrees" not in text and "Sure?" not in text


THOUGHT = "<think>\nIt may be warm.\n</think>\n\n"


def test_thinking_that_the_template_keeps_is_learned_and_what_it_rewrites_is_refused(templated):
    tokenizer = templated("qwen3")
    eos = frozenset({tokenizer.eos_token_id})
    thinks = [{**message, "content": THOUGHT + message["content"]} for message in (ASKS, WARM)]
    ids = encode({"demonstration": [thinks[0], RESULT, thinks[1]]}, tokenizer, eos=eos)
    text = tokenizer.decode([ids["completion_ids"][place] for place in ids["learned"]])
    assert text.count("It may be warm.") == 2
    message = (
        r"dataset, row 1: .* writes a turn of the demonstration otherwise once others follow it .* rows of one turn"
    )
    for first in (thinks[0] | {"tool_calls": []}, ASKS):
        with pytest.raises(UsageError, match=message):
            encode({"demonstration": [first, USER, thinks[1]]}, tokenizer, eos=eos)
    encode({"demonstration": [first, USER, thinks[1]]}, tokenizer, method="sdft", eos=eos)  # who only shows it


#: A turn's end token begins what follows, as GLM's; and a chat ends with one more, as Phi's.
GLM = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}" + (
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PHI = tiny.CHAT_TEMPLATE.replace("{% endif %}", "{% else %}<eos>{% endif %}")


def test_a_turn_may_end_with_the_token_that_begins_the_next_or_the_chat_with_one_more():
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = GLM
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    ids = encode({"demonstration": CHAT}, tokenizer, eos=frozenset({1, user}))
    learned = tokenizer.decode([ids["completion_ids"][place] for place in ids["learned"]])
    assert learned == "Warm.<|user|>It is warm.<eos>"
    with pytest.raises(UsageError, match=r"ends a turn of the demonstration without an end-of-turn token \('<eos>'\)"):
        encode({"demonstration": CHAT}, tokenizer)
    tokenizer.chat_template = PHI
    ids = encode({"demonstration": CHAT}, tokenizer)
    learned = tokenizer.decode([ids["completion_ids"][place] for place in ids["learned"]])
    assert learned == "Warm.<eos>It is warm.<eos><eos>"


def test_without_a_chat_template_several_turns_are_shown_and_not_learned():
    with pytest.raises(
        UsageError, match="has 3 messages, and the tokenizer has no chat template that could write them"
    ):
        encode({"demonstration": CHAT}, tiny.tiny_tokenizer(chat=False))
    encode({"demonstration": CHAT}, tiny.tiny_tokenizer(chat=False), method="sdft")


def test_all_tokens_count_where_a_row_must_fit():
    tokenizer = tiny.tiny_tokenizer()
    ids = encode({"demonstration": CHAT}, tokenizer)
    long = len(ids["prompt_ids"]) + len(ids["completion_ids"])
    assert len(ids["learned"]) < len(ids["completion_ids"])
    encode({"demonstration": CHAT}, tokenizer, context=long)
    with pytest.raises(UsageError, match="longer than the model's context"):
        encode({"demonstration": CHAT}, tokenizer, context=long - 1)


def test_the_teacher_is_shown_every_turn():
    tokenizer = tiny.tiny_tokenizer()
    (row,) = load_rows([{"prompt": [USER], "demonstration": CHAT}])
    asked = "<|user|>Weather in Lima?<eos>"
    assert teacher_text(row, TEMPLATES["turn"], tokenizer) == (
        f"{asked}<|assistant|>Warm.<eos><|user|>Sure?<eos><|assistant|>It is warm.<eos>{asked}<|assistant|>"
    )
    result = {**RESULT, "tool_call_id": "1", "name": "weather"}
    (row,) = load_rows([{"prompt": [USER], "demonstration": [ASKS, result, WARM]}])
    assert (
        'to the question:\n[assistant]\nI ask.\n{"name": "weather", "arguments": {"city": "Lima"}}\n\n'
        "[tool]\n21 degrees\n\n[assistant]\nIt is warm.\n\nNow answer"
    ) in teacher_text(row, TEMPLATES["paper"], tokenizer)
    with pytest.raises(UsageError, match="a message has thinking, which the teacher's prompt cannot show"):
        encode({"demonstration": [ASKS, RESULT, {**WARM, "thinking": "hm"}]}, tokenizer, method="sdft")


def test_a_turn_of_which_the_template_writes_nothing_is_refused():
    silent = [{"role": "assistant", "tool_calls": [CALL]}, RESULT, WARM]
    with pytest.raises(
        UsageError, match="row 1: the tokenizer's chat template writes nothing of a turn of the demonst"
    ):
        encode({"demonstration": silent}, tiny.tiny_tokenizer())


def test_a_result_that_the_template_has_as_json_is_not_left_out(templated, caplog):
    found = {**RESULT, "content": 'He said "warm",\nin Perú.'}
    row = {"demonstration": [{**ASKS, "content": ""}, found, WARM], "tools": TOOLS}
    encode(row, templated("llama3_1"), method="sdft")
    assert "leaves out" not in caplog.text
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}"
    encode({"demonstration": [{**ASKS, "tool_calls": []}, found, WARM]}, tokenizer, method="sdft")
    assert "leaves out a part of the demonstration in 1 of 1 rows" in caplog.text


def test_a_rollouts_draft_is_the_first_turn():
    tokenizer = tiny.tiny_tokenizer()
    ids = encode({"demonstration": CHAT}, tokenizer, method="sdft", with_draft=True)
    assert tokenizer.decode(ids["draft_ids"]) == "Warm." and "learned" not in ids


@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_messages_are_a_prompt_up_to_the_last_by_the_user_and_a_demonstration_after_it(name):
    earlier = [{"role": "system", "content": "Be brief."}, USER, WARM, USER]
    turns = [*earlier, ASKS, RESULT, WARM]
    (row,) = load_rows([{name: turns}])
    assert row["prompt"] == earlier and row["demonstration"] == turns[4:]
    (row,) = load_rows([{name: turns}], need=("prompt", "answer"))  # the scorer reads the last turn alone
    assert row["prompt"] == turns[:-1] and row["demonstration"] == [WARM] and row["answer"] == "It is warm."


CALLS = {"name": "weather", "arguments": {"city": "Lima"}}


@pytest.mark.parametrize(("value", "calls"), [(CALLS, [CALLS]), ([CALLS, {"name": "time"}], [CALLS, {"name": "time"}])])
@pytest.mark.parametrize("as_text", [True, False])
def test_share_gpt_with_calls_of_tools(value, calls, as_text):
    """LLaMA-Factory's turns: what calls tools is by `function_call`, and what they gave by `observation`."""
    turns = [("human", "Lima?"), ("function_call", json.dumps(value) if as_text else value)]
    turns += [("observation", "21 degrees"), ("gpt", "It is warm.")]
    (row,) = load_rows([{"conversations": [{"from": by, "value": text} for by, text in turns], "tools": "[]"}])
    assert row["prompt"] == [{"role": "user", "content": "Lima?"}] and row["tools"] is None
    functions = [{"type": "function", "function": {"arguments": {}, **each}} for each in calls]
    asks = {"role": "assistant", "content": "", "tool_calls": functions}
    assert row["demonstration"] == [asks, {"role": "tool", "content": "21 degrees"}, WARM]


NO_CALLS = [
    "weather of Lima",
    "[]",
    '{"arguments": {}}',
    '["weather"]',
    None,
    "[" * 200_000,
    '{"name": "a", "name": "b"}',
]


@pytest.mark.parametrize("value", NO_CALLS, ids=range(len(NO_CALLS)))
def test_a_call_that_is_none_is_refused(value):
    turns = [{"from": "human", "value": "a"}, {"from": "function_call", "value": value}, {"from": "gpt", "value": "b"}]
    with pytest.raises(UsageError, match=r"row 1: conversations has a turn by 'function_call' of .*; it must be JSON"):
        load_rows([{"conversations": turns}])


def test_a_call_is_the_answer_where_it_comes_last():
    turns = [{"from": "human", "value": "Lima?"}, {"from": "function_call", "value": json.dumps(CALLS)}]
    (row,) = load_rows([{"conversations": turns}], need=("prompt", "answer"))
    assert json.loads(row["answer"]) == CALLS


SAMPLES = [
    Sample([5, 6, 7], [8, 9, 1, 30, 31, 32, 12, 13, 1], learned=[0, 1, 2, 6, 7, 8]),
    Sample([11], [12, 1]),
    Sample([13, 14, 15, 16, 17], [18, 1, 20, 21, 22, 23, 1], learned=[0, 1, 5, 6]),
]
KEPT = [sample.learned or range(len(sample.completion)) for sample in SAMPLES]


def masked_cross_entropy(model, by_sequence=False):
    """Of full logits, summed over the tokens that are kept, or over the means of sequences."""
    total = 0.0
    for sample, kept in zip(SAMPLES, KEPT, strict=True):
        own = logprobs(model, sample.prompt, sample.completion).gather(-1, torch.tensor(sample.completion)[:, None])
        mask = torch.tensor([float(place in kept) for place in range(len(sample.completion))], dtype=own.dtype)
        total = total - (own[:, 0] * mask).sum() / (mask.sum() if by_sequence else 1)
    return total


@pytest.mark.parametrize("normalisation", ["token", "sequence"])
def test_sft_is_cross_entropy_on_the_assistants_tokens(normalisation, tmp_path):
    model = tiny.tiny_model()
    expected = masked_cross_entropy(model, normalisation == "sequence")
    expected.backward()
    expected_gradients = gradients(model)
    model.zero_grad()
    settings = SDFTConfig(output_dir=str(tmp_path), use_cpu=True, method="sft", loss_normalisation=normalisation)
    loss = demonstration_loss(model, lay_out(SAMPLES, 0, normalisation), settings, None).total
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients(model), expected_gradients)


def test_beside_self_distillation_the_demonstration_alone_has_such_places(tmp_path):
    model = tiny.tiny_model()
    samples = [Sample(s.prompt, [40, 41], s.prompt, s.completion, learned=s.learned) for s in SAMPLES]
    batch = lay_out(samples, skip_tokens=1)
    assert batch["labels"].tolist() == [41] * 3 and len(batch["teacher_positions"]) == 3
    settings = SDFTConfig(output_dir=str(tmp_path), use_cpu=True, demonstration_weight=0.5)
    loss = demonstration_loss(model, demonstrations_of(batch), settings, None).total
    torch.testing.assert_close(loss.detach(), masked_cross_entropy(model).detach(), rtol=1e-5, atol=1e-6)
    save_samples(str(tmp_path), 0, samples)
    assert load_samples(str(tmp_path), 0) == samples


def test_the_penalty_near_the_base_is_on_the_same_tokens(tmp_path):
    model, start = tiny.tiny_model(0).double(), tiny.tiny_model(1).double()
    expected = masked_cross_entropy(model)
    for sample, kept in zip(SAMPLES, KEPT, strict=True):
        for place in kept:  # each as a completion of one token
            prompt = [*sample.prompt, *sample.completion[:place]]
            one = Sample(prompt, [sample.completion[place]], prompt)
            expected = expected + 3.0 * full_logits_loss(model, start, [one], "reverse_kl")
    settings = SDFTConfig(output_dir=str(tmp_path), use_cpu=True, method="sft", base_kl_weight=3.0)
    out = demonstration_loss(model.float(), lay_out(SAMPLES, 0), settings, None, Teacher(start.float()))
    torch.testing.assert_close(out.total.detach().double(), expected.detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", ["sft", "sdft"])
def test_training_learns_such_demonstrations(method, tmp_path):
    rows = [
        {"prompt": f"say {letter}", "demonstration": [{**CHAT[0], "content": letter * 3}, *CHAT[1:]]}
        for letter in "abcdefgh"
    ]
    kept = Gradients()
    share = {"demonstration_weight": 0.5} if method == "sdft" else {"max_grad_norm": 1e9}
    run = trained(
        tmp_path, rows=rows, callbacks=[kept], method=method, per_device_train_batch_size=8, max_steps=1, **share
    )
    assert all(torch.isfinite(gradient).all() for gradient in kept.kept.values())
    if method == "sdft":
        return
    model, tokenizer, total, count = tiny.tiny_model(), tiny.tiny_tokenizer(), 0.0, 0
    for letter in "abcdefgh":
        texts = [f"<|user|>say {letter}<eos><|assistant|>", f"{letter * 3}<eos>"]
        texts += ["<|user|>Sure?<eos><|assistant|>", "It is warm.<eos>"]
        parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        ids = torch.tensor([token for part in parts for token in part])
        own = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        mask = torch.tensor([n % 2 for n, part in enumerate(parts) for _ in part])[1:]
        total, count = total - (own * mask).sum(), count + mask.sum()
    (total / count).backward()
    assert_same_gradients(kept.kept, gradients(model))
    assert run.state.log_history[0]["loss"] == pytest.approx((total / count).item(), rel=1e-5)


def test_sdft_data_shows_every_turn(tmp_path, capsys):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"messages": [USER, ASKS, RESULT, WARM]}) + "\n")
    assert main(["data", str(path), "--teacher_template", "turn"]) == 0
    shown = capsys.readouterr().out
    assert "1 demonstration of several turns: the teacher sees them all" in shown
    assert '[assistant]\nI ask.\n{"name": "weather", "arguments": {"city": "Lima"}}\n\n[tool]\n21 degrees' in shown
    assert '[assistant] I ask.\n{"name": "weather"' in shown
