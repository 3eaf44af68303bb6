"""Tools, calls of them and system messages in the ways that files have them, as chat templates want them."""

import json

import pytest

from sdft.cli import main
from sdft.data import Limits, encode_rows, load_rows, teacher_text
from sdft.data.tools import with_text_arguments
from sdft.errors import UsageError
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


def test_a_template_that_wants_text_gets_text():
    """As DeepSeek's, which puts the arguments between two other texts."""
    (row,) = load_rows([{"prompt": "Lima?", "demonstration": asks(CITY)}])
    seen = teacher_text(row, parse_template("turn"), tokenizer("{{ '>' + c.function.arguments + '<' }}"))
    assert '>{"city": "Lima"}<' in seen
    with pytest.raises(UsageError, match="the tokenizer's chat template refuses the messages"):
        teacher_text(row, parse_template("turn"), tokenizer("{{ '>' + 3 }}"))


def test_arguments_that_are_no_json_or_not_there():
    (row,) = load_rows([{"prompt": "Lima?", "demonstration": asks("Lima")}])
    assert row["demonstration"] == asks("Lima")
    bare = [{"role": "assistant", "tool_calls": [{"name": "weather"}]}]
    (row,) = load_rows([{"prompt": "Lima?", "demonstration": bare}])
    assert row["demonstration"][0]["tool_calls"] == [{"name": "weather", "arguments": {}}]
    assert with_text_arguments(row["demonstration"])[0]["tool_calls"] == [{"name": "weather", "arguments": "{}"}]


@pytest.mark.parametrize(
    "calls", ["weather", ["weather"], [{"function": "weather"}], [{"arguments": {}}], {"name": "a"}]
)
def test_calls_that_are_none_are_refused(calls):
    row = {"prompt": "p", "demonstration": [{"role": "assistant", "content": "", "tool_calls": calls}]}
    with pytest.raises(UsageError, match="row 1: demonstration has a message whose tool_calls is "):
        load_rows([row])


@pytest.mark.parametrize("tools", [[SCHEMA], json.dumps([SCHEMA]), [{"type": "function", "function": SCHEMA}]])
def test_tools_are_functions_whether_a_file_says_so_or_not(tools):
    (row,) = load_rows([{"prompt": "p", "demonstration": "d", "tools": tools}])
    assert row["tools"] == [{"type": "function", "function": SCHEMA}]


@pytest.mark.parametrize("tools", ["", "  ", None])
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
    with pytest.raises(UsageError, match=r"must end with a message by 'assistant', .* and ends with one by 'narrator'"):
        load_rows([{"conversations": [{"from": "human", "value": "a"}, {"from": "narrator", "value": "b"}]}])


SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "How?"}


def test_system_messages_and_earlier_turns_of_other_columns_are_read():
    """LLaMA-Factory's two formats."""
    (row,) = load_rows(
        [
            {
                "conversations": [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "So."}],
                "system": "Be brief.",
            }
        ]
    )
    assert row["prompt"] == [SYSTEM, USER]
    alpaca = {"instruction": "How?", "output": "So."}
    (row,) = load_rows([{**alpaca, "system": "Be brief.", "history": [["Why?", "Thus."]]}])
    assert row["prompt"] == [
        SYSTEM,
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Thus."},
        USER,
    ]
    for empty in ({}, {"system": "", "history": []}, {"system": None, "history": None}):
        (row,) = load_rows([{**alpaca, **empty}])
        assert row["prompt"] == "How?"
    with pytest.raises(UsageError, match="row 1: history is 'Why'; it must be a list of pairs"):
        load_rows([{**alpaca, "history": "Why"}])
    with pytest.raises(UsageError, match="row 1: messages begins with a message by 'system', and there is a system"):
        load_rows([{"messages": [SYSTEM, USER, {"role": "assistant", "content": "a"}], "system": "Be long."}])


def test_a_weight_is_openais():
    """Of a prompt it says nothing, for no prompt is learned."""
    turns = [{**USER, "weight": 0}, {"role": "assistant", "content": "So.", "weight": 1}]
    (row,) = load_rows([{"messages": turns}])
    assert (row["prompt"], row["demonstration"]) == ([USER], [{"role": "assistant", "content": "So."}])
    with pytest.raises(UsageError, match="row 1: demonstration has a message of weight 0; "):
        load_rows([{"messages": [USER, {"role": "assistant", "content": "So.", "weight": 0}]}])


def test_a_number_is_an_answer():
    """As of mathematics, where the answer of a training row is not even read."""
    for number, text in ((2, "2"), (-0.5, "-0.5")):
        (row,) = load_rows([{"problem": "p", "solution": "s", "answer": number}], need=("prompt", "answer"))
        assert row["answer"] == text


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
    model = tiny.saved(tmp_path / "model", tiny.tiny_model(), tokenizer(""))
    given = ["--model", model, "--max_completion_length", "8", "--demonstration_weight", "0.5"]
    assert main(["data", "--train_file", json.dumps([*files]), *given]) == 0
    shown = capsys.readouterr().out
    assert "what is learned of its demonstration\nd<eos>" in shown
    assert "with 8 for the completion or the demonstration" in shown
