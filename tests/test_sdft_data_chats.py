"""Chats as people have them: tools and their calls, parts of text, a teacher's own prompts, options of a template."""

import json
import logging

import pytest
import yaml
from transformers import AutoTokenizer

from sdft.cli import main
from sdft.data import Limits, check_options, encode_rows, load_rows, student_text, teacher_text, written
from sdft.errors import UsageError
from sdft.settings.chats import BothChatSettings
from sdft.templates import TEMPLATES, parse_template, teacher_messages
from tests import tiny

EOS = frozenset({1})
USER, CALL = {"role": "user", "content": "Weather in Lima?"}, {"type": "function", "function": {"name": "weather"}}
RESULT = {"role": "tool", "content": "21 degrees"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
#: Tools first, calls as JSON, and an empty thought where thinking is off, as Qwen3's template has it.
TEMPLATE = (
    "{% if tools %}[tools] {{ tools | map(attribute='function') | map(attribute='name') | join(',') }}\n{% endif %}"
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}</call>{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] "
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)


def tokenizer():
    made = tiny.tiny_tokenizer()
    made.chat_template = TEMPLATE
    return made


def encode(rows, method="sdft", context=None, **options):
    given = {"template": TEMPLATES["turn"], "eos_ids": EOS, "max_completion_length": 8, "limits": Limits(context)}
    return encode_rows(rows, options.pop("tokenizer", None) or tiny.tiny_tokenizer(), method=method, **given, **options)


def test_tools_are_shown_to_student_and_teacher():
    (row,) = load_rows([{"prompt": [USER], "demonstration": "Warm.", "tools": json.dumps(TOOLS)}])
    assert student_text(row, tokenizer()) == "[tools] weather\n[user] Weather in Lima?\n[assistant] "
    assert teacher_text(row, TEMPLATES["turn"], tokenizer()).startswith(
        "[tools] weather\n[user] Weather in Lima?\n[ass"
    )
    assert written(row, tokenizer())[0].startswith("[tools] weather\n")


def test_a_prompt_may_end_with_what_a_tool_gave():
    asked = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    (row,) = load_rows([{"prompt": [USER, asked, RESULT], "demonstration": "It is warm.", "tools": TOOLS}])
    rest = "[assistant] <call>weather</call>\n[tool] 21 degrees\n[assistant] "
    assert student_text(row, tokenizer()) == f"[tools] weather\n[user] Weather in Lima?\n{rest}"
    assert teacher_text(row, TEMPLATES["turn"], tokenizer()) == (
        f"[tools] weather\n[user] Weather in Lima?\n[assistant] It is warm.\n[user] Weather in Lima?\n{rest}"
    )


def test_a_demonstration_may_be_a_call_of_a_tool(caplog):
    call = {"role": "assistant", "tool_calls": [CALL]}
    (row,) = load_rows([{"prompt": [USER], "demonstration": [call], "tools": TOOLS}])
    assert "[assistant] <call>weather</call>\n[user]" in teacher_text(row, TEMPLATES["turn"], tokenizer())
    assert '{"name": "weather", "arguments": {}}' in teacher_text(row, TEMPLATES["paper"], tokenizer())
    assert written(row, tokenizer())[1][0].startswith("<call>weather</call>")
    caplog.set_level(logging.WARNING)
    encode([row], method="sft", tokenizer=tokenizer())
    assert not caplog.records


def test_content_in_parts_is_text():
    parts = [{"type": "text", "text": "Weather "}, {"type": "text", "text": "in Lima?"}]
    (row,) = load_rows([{"prompt": [{"role": "user", "content": parts}], "demonstration": "Warm."}])
    assert row["prompt"] == [USER]
    parts = [{"type": "image_url", "image_url": "x"}, *parts]
    with pytest.raises(UsageError, match="row 1: prompt has a message with image_url; it must be of text alone"):
        load_rows([{"prompt": [{"role": "user", "content": parts}], "demonstration": "Warm."}])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tools": "{not"}, "row 1: tools is not JSON"),
        ({"tools": {"name": "f"}}, "row 1: tools is .*; it must be a list of objects"),
        ({"prompt": 0}, "row 1: prompt is a number; it must be text or"),
        ({"demonstration": False}, "row 1: demonstration is false; it must be text or"),
        ({"prompt": [USER, {"role": "system", "content": "x"}]}, "must be by 'user' or 'tool'"),
        ({"prompt": [{"role": "user", "content": [{"text": 3}]}]}, "row 1: prompt is a list; it must be text or"),
        ({"teacher_prompt": [{"role": "assistant", "content": "x"}]}, "the last message of the teacher_prompt is by"),
    ],
)
def test_what_is_no_chat_is_refused(row, message):
    with pytest.raises(UsageError, match=message):
        load_rows([{"prompt": "p", "demonstration": "d", **row}])


def test_a_teacher_may_have_a_prompt_of_its_own():
    rows = load_rows([{"prompt": "q", "teacher_prompt": "Notes: n.\n\nq"}])
    assert teacher_text(rows[0], TEMPLATES["turn"], tokenizer()) == "[user] Notes: n.\n\nq\n[assistant] "
    assert "teacher_prompt_ids" in encode(rows, with_draft=True)[0]
    with pytest.raises(UsageError, match="dataset, row 1 has no demonstration, which is what is to be learned"):
        encode(rows, method="sft")


def test_a_template_may_have_a_system_message_of_its_own():
    told = {"role": "system", "content": "You know: {demonstration}"}
    template = parse_template([told, {"role": "user", "content": "{prompt}"}])
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, USER]
    prompt = [{"role": "system", "content": "Be brief."}, *turns]
    shown = teacher_messages(prompt, "warm", template)
    assert shown == [{"role": "system", "content": "You know: warm"}, *turns]
    assert teacher_messages("q", "warm", template)[0]["role"] == "system"


def test_a_template_is_told_what_each_side_wants():
    rows = load_rows([{"prompt": "q", "demonstration": "d"}])
    made = tokenizer()
    sides = {"options": {"enable_thinking": False}, "teacher_options": {"enable_thinking": True}}
    (ids,) = encode(rows, tokenizer=made, **sides)
    assert made.decode(ids["prompt_ids"]).endswith("<think></think>")
    assert not made.decode(ids["teacher_prompt_ids"]).endswith("<think></think>")
    messages = [{"role": "user", "content": "q"}]
    expected = made.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, enable_thinking=False)
    assert made.decode(ids["prompt_ids"]) == expected


def test_options_of_a_template_are_checked():
    assert BothChatSettings({"a": 1}).teacher_options == {"a": 1}
    assert BothChatSettings({"a": 1}, {}).teacher_options == {}
    with pytest.raises(UsageError, match="chat_template_kwargs is 'x'; it must be a mapping of names to values"):
        BothChatSettings("x")
    with pytest.raises(UsageError, match="teacher_chat_template_kwargs has tools; it must not"):
        BothChatSettings(None, {"tools": []})


def test_an_option_that_the_template_does_not_read_is_refused():
    made = tokenizer()
    check_options(made, chat_template_kwargs={"enable_thinking": False, "documents": []}, other=None)
    message = "^kwargs has 'enable_thinkin', which the tokenizer's chat template does not read; did you mean 'enable_th"
    with pytest.raises(UsageError, match=message):
        check_options(made, kwargs={"enable_thinkin": False})
    made.chat_template = {"default": TEMPLATE, "tool_use": "{{ reasoning }}"}
    check_options(made, kwargs={"enable_thinking": False, "reasoning": "low"})
    with pytest.raises(UsageError, match=r"has 'xyz', which the tokenizer's chat template does not read$"):
        check_options(made, kwargs={"xyz": 1})
    made.chat_template = None
    with pytest.raises(UsageError, match="has 'xyz', and the tokenizer has no chat template that could read it"):
        check_options(made, kwargs={"xyz": 1})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.tiny_model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("command", ["train", "data", "generate", "eval"])
def test_every_command_refuses_such_an_option(command, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "q", "demonstration": "d", "answer": "d"}) + "\n")
    told = {
        "train": ["--train_file", "rows.jsonl", "--output_dir", "out", "--use_cpu", "--max_steps", "1"],
        "data": ["rows.jsonl"],
        "generate": ["--prompt", "q"],
        "eval": ["--eval_file", "rows.jsonl"],
    }
    words = [command, *told[command], "--model", model, "--chat_template_kwargs", "{enable_thinkin: false}"]
    assert main(words) == 2
    assert "--chat_template_kwargs has 'enable_thinkin', which the tokenizer's chat" in capsys.readouterr().err


def test_a_run_tells_its_template_and_those_who_use_its_model_after_it(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "q", "demonstration": "d", "answer": "d"}) + "\n")
    recipe = {"model": model, "train_file": "rows.jsonl", "output_dir": "out", "use_cpu": True, "max_steps": 1}
    recipe |= {"max_completion_length": 4, "save_strategy": "no", "log_completions": 1, "teacher_template": "turn"}
    recipe |= {"chat_template_kwargs": {"enable_thinking": False}, "teacher_chat_template_kwargs": {}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", "recipe.yaml"]) == 0
    line = json.loads((tmp_path / "out" / "completions.jsonl").read_text().splitlines()[0])
    assert line["prompt"].endswith("<think></think>") and not line["teacher_prompt"].endswith("<think></think>")
    asked = []
    of_tokenizer = AutoTokenizer.from_pretrained("out").__class__
    apply = of_tokenizer.apply_chat_template
    monkeypatch.setattr(
        of_tokenizer, "apply_chat_template", lambda *given, **options: asked.append(options) or apply(*given, **options)
    )
    assert main(["generate", "--model", "out", "--prompt", "q", "--max_completion_length", "2"]) == 0
    assert main(["eval", "--model", "out", "--eval_file", "rows.jsonl", "--eval_completion_length", "2"]) == 0
    assert len(asked) >= 2 and all(options["enable_thinking"] is False for options in asked)


def test_rows_that_are_too_long_are_refused_or_left_out_or_shortened(caplog):
    rows = load_rows(
        [{"prompt": "a b c", "demonstration": "d"}, {"prompt": "first " + "x " * 60 + "last", "demonstration": "d"}]
    )
    made = tiny.tiny_tokenizer()
    short = encode(rows)[0]
    context = len(short["teacher_prompt_ids"]) + 8 + 20
    with pytest.raises(UsageError, match="dataset, row 2: the prompt has"):
        encode(rows, context=context)
    assert encode(rows, context=context, overlong="skip") == [short]
    assert "1 of 2 rows are too long for the model and are left out, the first dataset, row 2" in caplog.text
    (same, shorter) = encode(rows, context=context, overlong="truncate_prompt_left")
    assert same == short and "1 of 2 rows are too long for the model and lose the beginning" in caplog.text
    for name in ("prompt_ids", "teacher_prompt_ids"):
        assert len(shorter[name]) + 8 <= context
        text = made.decode(shorter[name])
        assert "last" in text and "first" not in text
    assert len(shorter["teacher_prompt_ids"]) + 8 > context - 8  # no more is lost than must be
    with pytest.raises(UsageError, match="overlong is 'skip', and none of 1 row is short enough for the model"):
        encode(rows[1:], context=context, overlong="skip")
    with pytest.raises(UsageError, match="the teacher prompt has"):  # a demonstration is not shortened
        encode(load_rows([{"prompt": "a", "demonstration": "x " * 90}]), context=60, overlong="truncate_prompt_left")


def test_what_a_template_does_not_know_of_is_said(caplog):
    bare = tiny.tiny_tokenizer()
    call = {"role": "assistant", "content": "I ask.", "tool_calls": [CALL]}
    rows = load_rows([{"prompt": [USER], "demonstration": [call], "tools": TOOLS}])
    encode(rows, tokenizer=bare)
    text = caplog.text
    assert "leaves out tools, or calls of them, in 1 of 1 rows, the first in dataset, row 1" in text
    assert "leaves out a part of the demonstration in 1 of 1 rows" in text
    silent = load_rows([{"prompt": [USER], "demonstration": [{"role": "assistant", "tool_calls": [CALL]}]}])
    with pytest.raises(UsageError, match="row 1: the tokenizer's chat template writes nothing of the demonstration"):
        encode(silent, method="sft", tokenizer=bare)


def test_arguments_that_are_text_are_shown_as_what_they_say():
    told = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Lima"}'}}
    (row,) = load_rows([{"prompt": [USER], "demonstration": [{"role": "assistant", "tool_calls": [told]}]}])
    assert '{"name": "weather", "arguments": {"city": "Lima"}}' in teacher_text(row, TEMPLATES["paper"], tokenizer())
