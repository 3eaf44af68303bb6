import json

import pytest

from sdft.errors import UsageError
from sdft.templates import TEMPLATES, fill, parse_template, teacher_messages


def test_paper_template_shows_question_demonstration_and_request_in_this_order():
    (message,) = teacher_messages("How much?", "Three.", TEMPLATES["paper"])
    assert message["role"] == "user"
    parts = [message["content"].index(part) for part in ("How much?", "example", "Three.", "response of your own")]
    assert parts == sorted(parts)


def test_turn_template_is_an_earlier_turn_of_the_chat():
    chat = teacher_messages("How much?", "Three.", TEMPLATES["turn"])
    assert [(m["role"], m["content"]) for m in chat] == [
        ("user", "How much?"),
        ("assistant", "Three."),
        ("user", "How much?"),
    ]


def test_earlier_messages_stay_before_the_template():
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "How much?"},
    ]
    chat = teacher_messages(prompt, "Three.", TEMPLATES["turn"])
    assert chat[:3] == prompt[:3]
    assert [m["content"] for m in chat[3:]] == ["How much?", "Three.", "How much?"]


def test_what_is_filled_in_is_never_searched_again():
    template = [{"role": "user", "content": "{prompt}|{demonstration}|{other}"}]
    assert fill(template, "{demonstration}", "{prompt}")[0]["content"] == "{demonstration}|{prompt}|{other}"


@pytest.mark.parametrize("give", [lambda m: m, json.dumps], ids=["messages", "json"])
def test_a_template_of_ones_own_in_messages(give):
    messages = [{"role": "system", "content": "Example: {demonstration}"}, {"role": "user", "content": "{prompt}"}]
    assert parse_template(give(messages)) == messages


def test_a_template_of_ones_own_in_text_may_start_with_a_bracket():
    assert parse_template("[{demonstration}] {prompt}") == [{"role": "user", "content": "[{demonstration}] {prompt}"}]


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{prompt} only", "{demonstration}"),
        ("only {demonstration}", "{prompt}"),
        ("turns", "{prompt} and {demonstration}"),
        ([{"role": "user", "content": "{prompt}"}], "{demonstration}"),
        ([{"role": "user", "content": "{prompt}"}, {"role": "assistant", "content": "{demonstration}"}], "assistant"),
        ([], "list of messages"),
        (None, "list of messages"),
    ],
)
def test_a_template_without_both_placeholders_is_refused(template, named):
    with pytest.raises(UsageError, match="teacher_template") as refused:
        parse_template(template)
    assert named in str(refused.value)
