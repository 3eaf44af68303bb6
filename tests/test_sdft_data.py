import json
import signal

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sdft.data import UNREAD, WHERE, Limits, encode_demonstration, encode_prompt, encode_rows, load_rows, written
from sdft.errors import UsageError
from sdft.templates import TEMPLATES
from tests import tiny

EOS = frozenset({1})


def write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_the_same_rows_from_jsonl_parquet_dataset_and_list(tmp_path):
    rows = tiny.rows(3)
    jsonl = write(tmp_path / "rows.jsonl", *rows, "\n")
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_parquet(tmp_path / "ROWS.PARQUET")
    marked = tmp_path / "marked.jsonl"
    marked.write_text(jsonl.read_text(), encoding="utf-8-sig")  # with a byte order mark, as some editors save
    for source in (jsonl, str(jsonl), marked, tmp_path / "ROWS.PARQUET", dataset, rows):
        read = load_rows(source)
        assert [{k: row[k] for k in rows[0]} for row in read] == rows


def test_chat_messages_survive_parquet(tmp_path):
    row = {"prompt": [{"role": "user", "content": "a"}], "demonstration": [{"role": "assistant", "content": "b"}]}
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    (read,) = load_rows(tmp_path / "rows.parquet")
    assert read["prompt"] == row["prompt"]
    assert read["demonstration"] == row["demonstration"]


GOOD = {"prompt": "a", "demonstration": "b"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty"),
        (["\n", "\n"], "is empty"),
        ([GOOD, {"prompt": "a"}], "row 2 has no demonstration; it has prompt"),
        (["\n", GOOD, {"prompt": "a", "demonstration": ""}], "row 3 has an empty demonstration"),
        ([{"demonstration": "b", "promt": "a"}], "row 1 has no prompt; it has demonstration, promt"),
        ([{}], "row 1 has no prompt; it has nothing"),
        ([GOOD, "{not json\n"], "row 2 is not JSON"),
        ([[1, 2]], "row 1 is a number"),
        ([{"prompt": 3, "demonstration": "b"}], "row 1: prompt is a number"),
        ([{"prompt": [{"role": "user"}], "demonstration": "b"}], "row 1: prompt is a list"),
        ([{"prompt": " \n", "demonstration": "b"}], "row 1 has an empty prompt"),
        ([{**GOOD, "demonstration": ["z"]}], "row 1: demonstration is a list; it must be text or a list of mess"),
        ([GOOD, '{"prompt": "a", "prompt": "c", "demonstration": "b"}\n'], "row 2 has prompt twice"),
        ([{**GOOD, "answer": "  "}], "row 1: answer is '  '"),
        ([{**GOOD, "answer": [3]}], "row 1: answer is a list"),
        ([{"prompt": [{"role": "assistant", "content": "a"}], "demonstration": "b"}], "must be by 'user'"),
        ([GOOD, {"prompt": "a", "__where__": "elsewhere, row 7"}], "row 2 has no demonstration"),
        ([GOOD, "[" * 100_000 + "\n"], "row 2 cannot be read: it is nested too deeply"),
        ([GOOD, '{"prompt": "a", "demonstration": "b", "n": ' + "9" * 5000 + "}\n"], "row 2 cannot be read: Exceeds"),
        ([GOOD, '{"prompt": "a", "demonst'], "row 2 is not JSON"),
        ([GOOD, '{"prompt": "a", "demonstration": "\\ud800"}\n'], "row 2: demonstration has '\\ud800', half of a"),
        ([{"prompt": [{"role": "user", "content": "\ud800"}], "demonstration": "b"}], "row 1: prompt has"),
    ],
)
def test_bad_rows_are_refused_with_file_and_row(tmp_path, lines, message):
    path = write(tmp_path / "rows.jsonl", *lines)
    with pytest.raises(UsageError) as refused:
        load_rows(path)
    assert message in str(refused.value)
    assert str(path) in str(refused.value)


def test_files_that_are_not_there_or_not_data_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        load_rows(tmp_path / "absent.jsonl")
    for name in ("rows.parquet", "rows.jsonl"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00PAR")
        with pytest.raises(UsageError, match=name):
            load_rows(tmp_path / name)
    with pytest.raises(UsageError, match="train_dataset is a int"):
        load_rows(3, name="train_dataset")


def test_prompts_go_through_the_chat_template_where_there_is_one():
    chat, plain = tiny.tiny_tokenizer(), tiny.tiny_tokenizer(chat=False)
    assert chat.decode(encode_prompt("hi", chat)) == "<|user|>hi<eos><|assistant|>"
    assert plain.decode(encode_prompt("hi", plain)) == "hi"
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    assert chat.decode(encode_prompt(messages, chat)) == "<|system|>s<eos><|user|>hi<eos><|assistant|>"
    assert plain.decode(encode_prompt(messages, plain)) == "s\n\nhi"


def demonstration_ids(row, tokenizer, eos_ids):
    ids, learned = encode_demonstration(*written(row, tokenizer), tokenizer, eos_ids, "row")
    assert learned == list(range(len(ids)))
    return ids


@pytest.mark.parametrize("chat", [True, False])
def test_a_demonstration_ends_with_the_end_of_sequence_token(chat):
    tokenizer = tiny.tiny_tokenizer(chat)
    assert tokenizer.decode(demonstration_ids({**GOOD, WHERE: "here"}, tokenizer, EOS)) == "b<eos>"


def test_nothing_after_the_end_of_turn_is_learned():
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace("<eos>", "<eos>\n")
    assert tokenizer.decode(demonstration_ids({**GOOD, WHERE: "here"}, tokenizer, EOS)) == "b<eos>"


def test_a_chat_template_that_rewrites_the_prompt_cannot_be_used_for_sft():
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + tiny.CHAT_TEMPLATE
    with pytest.raises(UsageError, match="does not continue"):
        demonstration_ids({**GOOD, WHERE: "here"}, tokenizer, EOS)


def test_a_tokenizer_without_an_end_takes_the_models_or_is_refused_for_sft():
    tokenizer = tiny.tiny_tokenizer(chat=False)
    tokenizer.eos_token = None
    assert demonstration_ids({**GOOD, WHERE: "here"}, tokenizer, frozenset({7}))[1:] == [7]
    with pytest.raises(UsageError, match="no eos_token, nor has the model"):
        demonstration_ids({**GOOD, WHERE: "here"}, tokenizer, frozenset())


REFUSES = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system role.') }}{% endif %}" + (
    tiny.CHAT_TEMPLATE.removeprefix("{% for m in messages %}")
)


@pytest.mark.parametrize("method", ["sdft", "sft"])
def test_a_row_that_the_chat_template_refuses_is_named(method):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = REFUSES
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    with pytest.raises(UsageError, match=r"dataset, row 2: .* refuses the messages \(system, user\): No system role\."):
        encode([GOOD, {**GOOD, "prompt": chat}], method, tokenizer=tokenizer)
    with pytest.raises(UsageError, match="the chat that ends with 'hi'"):
        encode_prompt(chat, tokenizer)


def encode(rows, method="sdft", context=None, tokenizer=None, tokens=None, with_demonstration=False):
    encoded, *_ = encode_rows(
        load_rows(rows if isinstance(rows, list) else [rows]),
        tokenizer or tiny.tiny_tokenizer(),
        method=method,
        with_demonstration=with_demonstration,
        template=TEMPLATES["turn"],
        eos_ids=EOS,
        max_completion_length=10,
        limits=Limits(context, tokens),
    )
    return encoded


def test_each_method_gets_the_token_ids_it_needs():
    decode = tiny.tiny_tokenizer().decode
    sdft, sft = encode(GOOD), encode(GOOD, "sft")
    assert decode(sdft["prompt_ids"]) == "<|user|>a<eos><|assistant|>"
    assert decode(sdft["teacher_prompt_ids"]) == "<|user|>a<eos><|assistant|>b<eos><|user|>a<eos><|assistant|>"
    assert sft["prompt_ids"] == sdft["prompt_ids"]
    assert decode(sft["completion_ids"]) == "b<eos>"


def test_a_prompt_longer_than_the_context_is_refused():
    # 4 tokens in the student's prompt, 10 in the teacher's, 10 for the completion
    assert encode(GOOD, context=20)
    with pytest.raises(UsageError, match=r"row 1: the teacher prompt has 10 tokens.*context of 19"):
        encode(GOOD, context=19)
    with pytest.raises(UsageError, match=r"row 1: the prompt has 4 tokens.*context of 13"):
        encode(GOOD, context=13)
    assert encode(GOOD, "sft", context=6)
    with pytest.raises(UsageError, match="context of 5"):
        encode(GOOD, "sft", context=5)


def test_a_row_does_not_say_where_it_is_from(tmp_path):
    (row,) = load_rows(write(tmp_path / "rows.jsonl", {**GOOD, WHERE: "elsewhere, row 7"}))
    assert row[WHERE] == f"{tmp_path}/rows.jsonl, row 1"
    (again,) = load_rows([row], name="dataset")  # as a run does that has read them before
    assert again[WHERE] == row[WHERE]


def test_a_truncated_parquet_file_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list([GOOD] * 50).to_parquet(path)
    for size in (0, 3, path.stat().st_size // 2):
        path.write_bytes(path.read_bytes()[:size] if size else b"")
        with pytest.raises(UsageError, match=r"rows.parquet cannot be read as Parquet"):
            load_rows(path)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
            "has not ended after 0.1 seconds",
        ),
        ("{{ messages[0].content / 0 }}", "refuses the messages"),
        ("{{ range(10 ** 9) | list }}", "refuses the messages"),
    ],
)
def test_a_chat_template_that_never_ends_or_fails_is_one_sentence(template, message, monkeypatch):
    monkeypatch.setattr("sdft.data.chats.TEMPLATE_SECONDS", 0.1)
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UsageError, match=rf"^rows, row 3: the tokenizer's chat template {message}"):
        encode_prompt("a", tokenizer, "rows, row 3")
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def words(*, chat=False, **post):
    """A tokenizer of words that puts a space before a text, as SentencePiece has it, and adds `post` around one."""
    vocabulary = ["<unk>", "</s>", "<u>", "<a>", "▁hi", "hi", "▁Yes", "Yes"]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    if post:
        special = [("</s>", 1), ("<u>", 2)]
        backend.post_processor = processors.TemplateProcessing(single=post["around"], special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", extra_special_tokens=["<u>", "<a>"]
    )
    if chat:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ '<u>' if m.role == 'user' else '<a>' }}{{ m.content }}"
            "{% if m.role != 'user' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
        )
    return tokenizer


def test_a_demonstration_is_tokenised_as_the_rest_of_its_chat():
    row = {"prompt": "hi", "demonstration": "Yes", WHERE: "row"}
    tokenizer = words(chat=True)
    assert tokenizer("Yes", add_special_tokens=False)["input_ids"] == [6]
    assert encode_prompt("hi", tokenizer) == [2, 5, 3]
    assert demonstration_ids(row, tokenizer, frozenset({1})) == [7, 1]


@pytest.mark.parametrize(
    ("around", "expected"), [("$A </s>", [4]), ("<u> $A", [2, 4]), ("<u> $A </s>", [2, 4]), ("$A", [4])]
)
def test_nothing_stands_between_a_prompt_and_its_answer(around, expected):
    """A tokenizer may put tokens around a text; those after it would end the answer before it began."""
    assert encode_prompt("hi", words(around=around)) == expected


def test_a_demonstration_after_a_prompt_without_a_chat_template_is_its_rest():
    row = {"prompt": "hi", "demonstration": " Yes", WHERE: "row"}
    assert demonstration_ids(row, words(around="$A </s>"), frozenset({1})) == [6, 1]


@pytest.mark.parametrize("field", UNREAD)
def test_a_field_that_other_trainers_read_is_refused_by_name(field):
    with pytest.raises(UsageError, match=f"dataset, row 2 has {field}, which this loop does not read"):
        load_rows([GOOD, {**GOOD, field: [1]}])
    load_rows([{**GOOD, field: None}])


@pytest.mark.parametrize(
    "roles", [["user", "assistant"], ["user"], ["assistant", "tool"], ["assistant", "system", "assistant"]]
)
def test_a_demonstration_begins_and_ends_with_a_message_by_the_assistant(roles):
    row = {"prompt": "p", "demonstration": [{"role": role, "content": "a"} for role in roles]}
    with pytest.raises(UsageError, match=rf"row 1: demonstration has {len(roles)} messages? \({', '.join(roles)}\)"):
        load_rows([row])


def test_what_a_teacher_cannot_be_shown_of_a_demonstration_is_refused():
    message = {"role": "assistant", "content": "a"}
    with pytest.raises(UsageError, match="a message has thinking, which the teacher's prompt cannot show"):
        encode(load_rows([{"prompt": "p", "demonstration": [{**message, "thinking": "hm"}]}]))
    assert encode(load_rows([{"prompt": "p", "demonstration": [message]}]))


def test_a_template_that_drops_part_of_the_demonstration_is_named_once(caplog):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("m.content", "m.content.split('/')[-1]")
    assert "split" in tokenizer.chat_template
    rows = load_rows([{"prompt": "p", "demonstration": text} for text in ("a", "t/b", "u/c")])
    encode(rows, tokenizer=tokenizer)
    assert [record.getMessage() for record in caplog.records] == [
        "the tokenizer's chat template leaves out a part of the demonstration in 2 of 3 rows, the first in dataset, "
        "row 2: the teacher does not see it (templates drop the thinking of earlier turns; another teacher_template "
        "than 'turn' keeps it)"
    ]
    for options in ({"method": "sft"}, {"with_demonstration": True}):
        caplog.clear()
        encode(rows, tokenizer=tokenizer, **options)
        assert [record.getMessage().partition(": ")[2].split(" (")[0] for record in caplog.records][-1] == (
            "it is not learned"
        )


def test_thinking_that_a_template_sets_apart_is_not_missed(caplog):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("m.content", "m.content.replace('/', '\n\n/\n')")
    encode(load_rows([{"prompt": "p", "demonstration": "u/ c"}]), tokenizer=tokenizer, with_demonstration=True)
    assert not caplog.records


def test_a_tokenizer_without_a_chat_template_is_named_once(caplog):
    encode(GOOD, tokenizer=tiny.tiny_tokenizer(chat=False))
    assert [record.getMessage()[:40] for record in caplog.records] == ["the tokenizer has no chat template: the "]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"prompt": "pz", "demonstration": "a"}], "the prompt has the token 'z', number"),
        ([{"prompt": "p", "demonstration": "z"}], "the teacher prompt has the token 'z', number"),
    ],
)
def test_a_token_without_an_embedding_is_named(rows, words):
    tokenizer = tiny.tiny_tokenizer()
    known = tokenizer.convert_tokens_to_ids("z")
    with pytest.raises(UsageError, match=f"row 1: {words} {known}, and the model has embeddings for {known}; "):
        encode(load_rows(rows), tokenizer=tokenizer, tokens=known)


def test_a_field_that_is_null_is_not_said_to_be_there():
    with pytest.raises(UsageError, match=r"row 1 has no demonstration; it has prompt$"):
        load_rows([{"prompt": "a", "demonstration": None}], name="train_dataset")
