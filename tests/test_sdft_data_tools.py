"""Tools, calls of them and system messages in the ways that files have them, as chat templates want them."""

import json

import pytest

from sdft.cli import main
from sdft.data import Limits, encode_rows, load_rows, teacher_text
from sdft.data.storage import on_disk
from sdft.errors import UsageError
from sdft.feedback.interface import Feedback
from sdft.feedback.stage import FeedbackStage
from sdft.rows import read_by_feedback
from sdft.settings.config import MethodSettings
from sdft.templates import parse_template
from tests import tiny

CITY = {"city": "Lima"}
SCHEMA = {"name": "weather", "description": "how warm it is", "parameters": {"type": "object"}}
WRITES = "{% for t in tools or () %}[{{ t.function.name }}]{% endfor %}"
TURN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or () %}CALL{% endfor %}<eos>"
TURN += "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"


def call(arguments, **more):
    return {"type": "function", "function": {"name": "weather", **({"arguments": arguments} | more)}}


def asks(arguments):
    return [{"role": "assistant", "content": "", "tool_calls": [call(arguments)]}]


def tokenizer(written):
    """With a chat template that writes a call so."""
    found = tiny.tiny_tokenizer()
    found.chat_template = WRITES + TURN.replace("CALL", written)
    return found


@pytest.mark.parametrize("arguments", [CITY, json.dumps(CITY)])
@pytest.mark.parametrize(
    "written",
    [
        "{{ c.function.arguments | tojson }}",
        "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}",
    ],
)
def test_arguments_that_are_text_become_objects_for_the_template(arguments, written):
    """OpenAI has them as text, which a template would write as a text in a text, or not at all."""
    (row,) = load_rows([{"prompt": "Lima?", "demonstration": asks(arguments)}])
    assert row["demonstration"] == asks(CITY)
    seen = teacher_text(row, parse_template("turn"), tokenizer(written))
    assert ('{"city": "Lima"}' if "tojson" in written else "city=Lima") in seen


@pytest.mark.parametrize("arguments", [{"city": "Lima", "now": True}, '{"city":"Lima", "now":true}'])
@pytest.mark.parametrize("written", ["{{ '>' + ARGUMENTS + '<' }}", "{{ '>' ~ ARGUMENTS }}<", ">{{ ARGUMENTS }}<"])
def test_a_template_that_puts_them_into_its_text_gets_their_json(arguments, written):
    """As DeepSeek's, which puts the arguments between two other texts; never Python's own way to write them."""
    (row,) = load_rows([{"prompt": "Lima?", "demonstration": asks(arguments)}])
    seen = teacher_text(row, parse_template("turn"), tokenizer(written.replace("ARGUMENTS", "c.function.arguments")))
    assert f">{arguments if isinstance(arguments, str) else json.dumps(arguments)}<" in seen


TWICE = [CITY, json.dumps(CITY), json.dumps(json.dumps(CITY)), "Lima", "5", "", None, "[" * 5000, '{"a":1,"a":2}']


@pytest.mark.parametrize("arguments", TWICE, ids=range(len(TWICE)))
def test_what_is_read_twice_is_as_what_is_read_once(arguments, tmp_path):
    """As `sdft train` does, which reads rows before torch is there and gives them to the trainer."""
    once = load_rows([{"prompt": "Lima?", "demonstration": asks(arguments), "tools": [SCHEMA], "answer": 4.0}])
    twice = load_rows(load_rows(once, keep=on_disk(str(tmp_path))))
    for written in ("{{ c.function.arguments | tojson }}", "{{ c.function.arguments }}"):
        seen = [teacher_text(row, parse_template("turn"), tokenizer(written)) for (row,) in (once, twice)]
        assert seen[0] == seen[1]
    assert once == twice


def test_arguments_that_are_no_object_or_not_there():
    for text in ("Lima", "5", '"{}"', "[" * 5000, '{"a": 1, "a": 2}'):
        (row,) = load_rows([{"prompt": "Lima?", "demonstration": asks(text)}])
        assert row["demonstration"] == asks(text)
    for nothing in ("", None):
        (row,) = load_rows([{"prompt": "Lima?", "demonstration": asks(nothing)}])
        assert row["demonstration"] == asks({})
    bare = [{"role": "assistant", "tool_calls": [{"name": "weather"}]}]
    (row,) = load_rows([{"prompt": "Lima?", "demonstration": bare}])
    assert row["demonstration"] == asks({})
    (row,) = load_rows([{"prompt": "p", "demonstration": [{"role": "assistant", "content": "a", "tool_calls": []}]}])
    assert row["demonstration"] == [{"role": "assistant", "content": "a"}]


def test_feedbacks_messages_have_the_calls_of_tools_that_rows_have():
    given = {"options": None, "template": [], "limits": Limits(), "overlong": "error"}
    chat = [{"role": "user", "content": "Lima?"}, *asks(json.dumps(CITY)), {"role": "user", "content": "And now?"}]
    for written in ("{{ c.function.arguments | tojson }}", "{{ '' + c.function.arguments }}"):
        stage = FeedbackStage("mine", lambda _: [], tokenizer(written), **given)
        ids = stage._taught("rollout 1", Feedback(chat), 1).prompt
        assert '<|assistant|>{"city": "Lima"}<eos>' in tiny.tiny_tokenizer().decode(ids)


NO_CALLS = ["weather", ["weather"], [{"function": "weather"}], [{"arguments": {}}], {"name": "a"}]


@pytest.mark.parametrize("calls", NO_CALLS)
def test_calls_that_are_none_are_refused(calls):
    turn = {"role": "assistant", "content": "", "tool_calls": calls}
    for row in ({"prompt": "p", "demonstration": [turn]}, {"messages": [{"role": "user", "content": "p"}, turn]}):
        for need in (("prompt", "demonstration"), ("prompt", "answer")):
            given = row if "messages" in row else {**row, "answer": "a"}
            with pytest.raises(UsageError, match=r"row 1(: demonstration has a message whose| has an empty answer)"):
                load_rows([given], need=need)


@pytest.mark.parametrize("tools", [[SCHEMA], json.dumps([SCHEMA]), [{"type": "function", "function": SCHEMA}]])
def test_tools_are_functions_whether_a_file_says_so_or_not(tools):
    (row,) = load_rows([{"prompt": "p", "demonstration": "d", "tools": tools}])
    assert row["tools"] == [{"type": "function", "function": SCHEMA}]


NO_TOOLS = [{"a": 1}, [1], [{"type": "function", "function": "x"}], "[" * 100_000]


@pytest.mark.parametrize("tools", NO_TOOLS, ids=range(len(NO_TOOLS)))
def test_tools_that_are_none_are_refused(tools):
    with pytest.raises(UsageError, match=r"row 1: tools (is|cannot be read: it is nested)"):
        load_rows([{"prompt": "p", "demonstration": "d", "tools": tools}])


def test_a_tool_that_is_a_function_already_stays():
    tools = [{"type": "function", "name": None, "function": SCHEMA}, {"type": "web_search"}]
    (row,) = load_rows([{"prompt": "p", "demonstration": "d", "tools": tools}])
    assert row["tools"] == tools


@pytest.mark.parametrize("tools", ["", "  ", None, [], "[]"])
def test_an_empty_cell_is_no_tools(tools):
    (row,) = load_rows([{"prompt": "p", "demonstration": "d", "tools": tools}])
    assert row["tools"] is None


def test_a_table_fills_no_schema_and_no_call_with_nulls(tmp_path):
    """Parquet gives each object all the names that one of the column's objects has."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [
        {
            "prompt": "p",
            "demonstration": asks({name: "x"}),
            "tools": [call({"a": "b"}, parameters={name: {"type": "string"}})],
        }
        for name in ("city", "ticker")
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "mine.parquet")
    read = load_rows(str(tmp_path / "mine.parquet"))
    for row, name in zip(read, ("city", "ticker"), strict=True):
        assert row["demonstration"] == asks({name: "x"})
        assert row["tools"][0]["function"]["parameters"] == {name: {"type": "string"}}


@pytest.mark.parametrize("method", ["sft", "sdft"])
def test_a_turn_of_which_the_template_writes_nothing_is_not_learned(method):
    """A template that knows no calls would have the model learn to end its turn at once."""
    chat = [*asks(CITY), {"role": "tool", "content": "21"}, {"role": "assistant", "content": "Warm."}]
    rows = load_rows([{"prompt": "Lima?", "demonstration": chat}])
    given = {"template": parse_template("turn"), "eos_ids": frozenset({1}), "max_completion_length": 8}

    def encode():
        return encode_rows(rows, tokenizer(""), method=method, limits=Limits(), **given)

    if method == "sdft":
        assert encode()
        return
    with pytest.raises(UsageError, match="the tokenizer's chat template writes nothing of a turn of the demonstration"):
        encode()


@pytest.mark.parametrize("by", ["observation", "tool", "tool_response", "function_response"])
@pytest.mark.parametrize("calls", ["function_call", "tool_call"])
@pytest.mark.parametrize("answers", ["gpt", "chatgpt"])
def test_the_names_of_share_gpts_turns(by, calls, answers):
    turns = [("human", "Lima?"), (calls, json.dumps({"name": "weather"})), (by, {"degrees": 21}), (answers, "Warm.")]
    (row,) = load_rows([{"conversations": [{"from": by, "value": value} for by, value in turns]}])
    assert row["demonstration"] == [*asks({}), {"role": "tool", "content": '{"degrees": 21}'}, row["demonstration"][-1]]
    with pytest.raises(UsageError, match=r"must end with a message by 'assistant', .* but ends with one by 'narrator'"):
        load_rows([{"conversations": [{"from": "human", "value": "a"}, {"from": "narrator", "value": "b"}]}])


SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "How?"}


def test_system_messages_and_earlier_turns_of_other_columns_are_read():
    """LLaMA-Factory's two formats, and OpenOrca's."""
    turns = [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "So."}]
    alpaca, earlier = {"instruction": "How?", "output": "So."}, [["Why?", "Thus."]]
    before = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Thus."}]
    empties = ({"system": "", "history": []}, {"system": None}, {"history": "[]"})
    for row, prompt in (
        ({"conversations": turns, "system": "Be brief."}, [SYSTEM, USER]),
        ({**alpaca, "system": "Be brief.", "history": earlier}, [SYSTEM, *before, USER]),
        ({**alpaca, "System": "Be brief."}, [SYSTEM, USER]),
        ({**alpaca, "history": json.dumps(earlier)}, [*before, USER]),
        ({"question": "How?", "response": "So.", "system_prompt": "Be brief."}, [SYSTEM, USER]),
        *(({**alpaca, **empty}, "How?") for empty in empties),
    ):
        (read,) = load_rows([row])
        assert read["prompt"] == prompt and {"system", "System", "history", "system_prompt"}.isdisjoint(read)
    for history in ("Why", ["Why"]):
        with pytest.raises(UsageError, match="row 1: history is "):
            load_rows([{**alpaca, "history": history}])
    with pytest.raises(UsageError, match="row 1: it begins with a message by 'system', and there is a column with one"):
        load_rows([{"messages": [SYSTEM, USER, {"role": "assistant", "content": "a"}], "system": "Be long."}])
    for empty in ({"messages": [], "system": "Be long."}, {"conversations": [], "system": "Be long."}):
        with pytest.raises(UsageError, match=r"must end with a message by 'assistant', .* but is empty"):
            load_rows([empty])


def test_what_would_go_before_a_prompt_is_refused_beside_our_own_names_unless_feedback_reads_it():
    row = {"prompt": "p", "demonstration": "d", "System": "Be brief."}
    with pytest.raises(UsageError, match="row 1 has System, which this loop does not read"):
        load_rows([row])
    settings = MethodSettings(feedback="judge", feedback_args={"command": "true"})
    own = {"prompt": "p", "System": "s", "history": ["h"]}
    (read,) = load_rows([own], need=("prompt",), read=read_by_feedback(settings))
    assert read["history"] == ["h"]
    assert not read_by_feedback(MethodSettings())


def test_a_weight_is_openais():
    """Of a prompt it says nothing, for no prompt is learned."""
    turns = [{**USER, "weight": 0}, {"role": "assistant", "content": "So.", "weight": 1}]
    (row,) = load_rows([{"messages": turns}])
    assert (row["prompt"], row["demonstration"]) == ([USER], [{"role": "assistant", "content": "So."}])
    with pytest.raises(UsageError, match="row 1: demonstration has a message of weight 0; "):
        load_rows([{"messages": [USER, {"role": "assistant", "content": "So.", "weight": 0}]}])
    calls = {"from": "function_call", "value": '{"name": "weather"}', "weight": 0}
    for last in ({"from": "gpt", "value": "b", "weight": 0}, calls):
        with pytest.raises(UsageError, match="row 1: demonstration has a message of weight 0; "):
            load_rows([{"conversations": [{"from": "human", "value": "a"}, last]}])


@pytest.mark.parametrize(("number", "text"), [(2, "2"), (-0.5, "-0.5"), (4.0, "4")])
def test_a_number_is_an_answer(number, text):
    """As of mathematics, where the answer of a training row is not even read; tables have whole numbers as floats."""
    for row in ({"problem": "p", "solution": "s", "answer": number}, {"question": "q", "answer": number}):
        (read,) = load_rows([row], need=("prompt", "answer"))
        assert read["answer"] == text
    for other in (float("nan"), float("inf"), True):
        with pytest.raises(UsageError, match=r"row 1: answer is .*; it must be text"):
            load_rows([{"prompt": "p", "answer": other}], need=("prompt", "answer"))


def test_a_table_of_semicolons(tmp_path):
    (tmp_path / "mine.csv").write_text("question;answer\nWhat, how?;So\n")
    (row,) = load_rows(str(tmp_path / "mine.csv"))
    assert (row["prompt"], row["demonstration"]) == ("What, how?", "So")


def test_sdft_data_shows_every_file_the_tools_and_what_is_learned(tmp_path, capsys):
    files = {}
    for name, count in (("first", 9), ("second", 2)):
        rows = [{"prompt": f"{name} {n}", "demonstration": "d", "tools": [SCHEMA]} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        files[str(tmp_path / f"{name}.jsonl")] = 1
    assert main(["data", "--train_file", json.dumps([*files]), "--rows", "2"]) == 0
    shown = capsys.readouterr().out
    assert "9 rows of " in shown and "2 rows of " in shown and "[tools] weather" in shown
    assert "first 0" in shown and "second 0" in shown and "first 1" not in shown
    for count in (1, 3):
        assert main(["data", "--train_file", json.dumps([*files]), "--rows", str(count)]) == 0
        assert capsys.readouterr().out.count("as the student reads it") == count
    model = tiny.saved(tmp_path / "model", tiny.tiny_model(), tokenizer(""))
    given = ["--model", model, "--max_completion_length", "8", "--demonstration_weight", "0.5"]
    assert main(["data", "--train_file", json.dumps([*files]), *given]) == 0
    shown = capsys.readouterr().out
    assert "what is learned of its demonstration\nd<eos>" in shown
    assert "with 8 for the completion or the demonstration" in shown
