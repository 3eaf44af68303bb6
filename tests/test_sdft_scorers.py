"""What counts as right, with the answers that models really give and the words that look like one."""

import pytest

from sdft.data import load_rows
from sdft.errors import UsageError
from sdft.evaluation.scorers import SCORERS, check_answers, find_choice, scorer_of
from sdft.settings.config import EvalSettings


def test_exact_and_contains():
    exact, contains = SCORERS["exact"], SCORERS["contains"]
    assert exact(' {"a": 1}\n', '{"a": 1}')
    assert not exact('{"a": 1}.', '{"a": 1}')
    assert contains("The capital is PARIS.", "Paris")
    assert not contains("The capital is Lyon.", "Paris")


@pytest.mark.parametrize(
    "text",
    [
        "B",
        "b",
        " B\n",
        "B.",
        "b.",
        "(B)",
        "(b)",
        "[B]",
        "B)",
        "b)",
        "**B**",
        "__B__",
        "`B`",
        '"B"',
        "'B'",
        "**B.** Paris",
        "B) Paris",
        "B. Paris",
        "B: Paris",
        "B - Paris",
        "B, because it is the capital.",
        "B because it is the capital.",
        "b) a dog",
        "Option B",
        "- B) Paris",
        "The answer is B.",
        "The answer is B",
        "The answer is b.",
        "the answer is (b)",
        "The answer is: B",
        "The answer is B because A is a dog.",
        "The answer is **B**.",
        'The answer is "B".',
        "The correct answer is B) Paris, not A) London.",
        "The correct answer is option B.",
        "The right choice would be B, since it is the capital.",
        "Answer: B",
        "Answer: (B) Paris",
        "**Answer:** B",
        "**Answer**: B",
        "### Answer\n\nB",
        "<answer>B</answer>",
        "<answer>\n(B) Paris\n</answer>",
        "Answer: B\n\nOption A is wrong, because a dog barks.",
        "Answer:\nB",
        "Q: Which one? A: B",
        "A: B",
        "The answer to the second question is B.",
        "The answer is probably B.",
        "The best option here would be (b).",
        "I choose B.",
        "I'd go with option B.",
        "A dog is an animal, so the answer is B.",
        "A is wrong. B is correct.",
        "(A) London is wrong; (B) is the right answer.",
        "Let us see. A) is London, B) is Paris.\nThe answer is B.",
        "First I thought the answer is A. But no: the answer is B.",
        "It must be (B).",
        "Paris (B)",
        "A dog (B) barks.",
        "Paris is the capital of France.\n\nB",
        "B\n\nA dog is an animal that barks.",
        r"Therefore $\boxed{B}$.",
        r"\boxed{\text{B}}",
        "<think>The answer is A? (A) or (C)...</think>\n\nB",
    ],
)
def test_the_choice_is_b(text):
    assert find_choice(text) == "B"
    assert SCORERS["choice"](text, "B") and SCORERS["choice"](text, "(b)")
    assert not SCORERS["choice"](text, "A")


@pytest.mark.parametrize("text", ["A", "a", "a.", "(a)", "A.", "A) a dog", "A: dogs", "The answer is A", "answer: a."])
def test_the_letter_that_is_a_word_can_be_chosen_too(text):
    assert find_choice(text) == "A"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A dog barks at the moon.",
        "A dog is the answer.",
        "The answer is a dog.",
        "The answer is A dog",
        "The answer is a",
        "The correct answer is I think Paris",
        "Answer: a large city",
        "I think so.",
        "I am not sure.",
        "I'd say Paris.",
        "Paris",
        "The answer is Paris.",
        "The answer is Berlin, I believe.",
        "The answer is not B.",
        "B is not correct.",
        "A or B",
        "A, B",
        "The answer is A or B.",
        "The answer is either (A) or (B).",
        "The answer is A and C.",
        "Both (A) and (B) are right.",
        "A) London\nB) Paris\nC) Rome",
        "A) London B) Paris C) Rome",
        "(A) London (B) Paris",
        "C is a programming language.",
        "Vitamin C is the best vitamin.",
        "The answer is C++.",
        "The answer is C#.",
        "C++",
        "The answer is X = 5",
        "The answer is X < 5",
        "<answer>A dog</answer>",
        "The answer is the U.S. army.",
        "U.S. army",
        "A-frame houses",
        "B-trees",
        "Vitamin C is healthy.",
        "f(x) grows",
        '{"a": 1}',
        "(a dog barks)",
        "apple(s)",
        "The options are many.",
        "e.g. a dog",
        "Every option has its price.",
    ],
)
def test_no_choice_is_made(text):
    assert find_choice(text) is None
    assert not any(SCORERS["choice"](text, letter) for letter in "ABCDIX")


CALL = '{"name": "weather", "arguments": {"city": "Budapest", "days": 1, "metric": true, "tags": ["a", "b"]}}'


@pytest.mark.parametrize(
    "text",
    [
        CALL,
        CALL.replace(" ", ""),
        CALL.replace(" ", "\n  "),
        '{"arguments": {"metric": true, "tags": ["a", "b"], "days": 1.0, "city": "\\u0042udapest"}, "name": "weather"}',
        CALL.replace("1", "1e0"),
        f"```json\n{CALL}\n```",
        f"```\n{CALL}\n```\n",
        f"<tool_call>\n{CALL}\n</tool_call>",
        f"<think>Perhaps {{}}?</think>\n{CALL}",
    ],
)
def test_the_same_call_is_right_however_it_is_written(text):
    assert SCORERS["json"](text, CALL)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "weather Budapest",
        CALL[:-1],
        CALL + "}",
        CALL + CALL,
        "Here you are: " + CALL,
        CALL + " Enjoy!",
        f"```json\n{CALL}\n```\nEnjoy!",
        CALL.replace("1", "2"),
        CALL.replace("1", '"1"'),
        CALL.replace("1", "true"),
        CALL.replace("true", "1"),
        CALL.replace("true", "null"),
        CALL.replace("1", "NaN"),
        CALL.replace('"a", "b"', '"b", "a"'),
        CALL.replace('["a", "b"]', '["a", "b", "b"]'),
        CALL.replace('["a", "b"]', '{"a": "b"}'),
        CALL.replace("Budapest", "budapest"),
        CALL.replace('"days"', '"day"'),
        CALL.replace('"days": 1', '"days": 1, "more": null'),
        CALL.replace('"days": 1', '"days": 2, "days": 1'),
        CALL.replace("'", '"').replace('"', "'"),
        f"[{CALL}]",
        "[" * 100_000,
        "1" * 10_000,
        "1e99999999999999999999",
    ],
)
def test_another_call_is_wrong(text):
    assert not SCORERS["json"](text, CALL)


def test_numbers_are_equal_by_value_and_to_the_last_digit():
    same = SCORERS["json"]
    assert same("0.1", "0.10") and same("100", "1E+2") and same("-0", "0")
    assert not same("0.1000000000000000000001", "0.1")
    assert not same("9007199254740993", "9007199254740992.0")


@pytest.mark.parametrize(
    ("scorer", "answer", "expected"),
    [("choice", "Paris", "the letter of a choice"), ("json", "{weather}", "JSON"), ("json", '{"a":1,"a":2}', "JSON")],
)
def test_an_answer_that_can_never_be_given_is_refused(scorer, answer, expected):
    rows = load_rows(
        [{"prompt": "a", "answer": "B" if scorer == "choice" else "{}"}, {"prompt": "b", "answer": answer}],
        need=("prompt",),
    )
    check_answers(rows[:1], scorer)
    with pytest.raises(UsageError, match=rf"dataset, row 2: answer is .*scorer '{scorer}' it must be {expected}"):
        check_answers(rows, scorer)
    check_answers(load_rows([{"prompt": "open-ended"}], need=("prompt",)), scorer)


def test_a_function_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_scorers.py").write_text(
        "def starts(completion, answer):\n    return completion.startswith(answer)\n"
        "def counts(completion, answer):\n    return completion.count(answer)\n"
        "def breaks(completion, answer):\n    return 1 / 0\n"
        "class Many:\n    @staticmethod\n    def ends(text, answer):\n        return text.endswith(answer)\n"
    )
    starts = scorer_of("own_scorers:starts")
    assert starts("yes, it is", "yes") and not starts("it is, yes", "yes")
    assert scorer_of("own_scorers:Many.ends")("it is, yes", "yes") and scorer_of("exact") is SCORERS["exact"]
    settings = EvalSettings(scorer="own_scorers:starts", general_scorer="Contains")
    assert (settings.scorer, settings.general_scorer) == ("own_scorers:starts", "contains")
    rows = load_rows([{"prompt": "a", "answer": "b"}], need=("prompt",))
    check_answers(rows, "own_scorers:starts")
    for place, said in (
        ("own_scorers:counts", "scorer is 'own_scorers:counts', which returned 1; it must be True or False"),
        ("own_scorers:breaks", "scorer is 'own_scorers:breaks', which raised ZeroDivisionError: division by zero"),
    ):
        with pytest.raises(UsageError, match=said):
            scorer_of(place)("a", "a")
    for place, said in (
        ("own_scorers:absent", "general_scorer is 'own_scorers:absent', which cannot be imported"),
        ("no_such_module:one", "general_scorer is 'no_such_module:one', which cannot be imported"),
    ):
        with pytest.raises(UsageError, match=said):
            check_answers(rows, place, "general_scorer")
    for wrong in ("starts", "own scorers:x", 3, "", ["exact"]):
        with pytest.raises(
            UsageError, match=r"scorer is .*; it may be exact, contains, choice, json or module:function"
        ):
            EvalSettings(scorer=wrong)
