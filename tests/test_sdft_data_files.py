"""Files as users have them: formats, usual columns, several files; and `sdft data`, which shows what comes of them."""

import bz2
import csv
import gzip
import json
import logging
import lzma

import datasets
import pytest

from sdft.cli import main
from sdft.data import WHERE, load_rows
from sdft.data.files import is_hub_name
from sdft.errors import UsageError
from sdft.settings.inputs import ColumnArguments, DataArguments
from tests import tiny

ROWS = [{"prompt": f"question {n}", "demonstration": f'answer {n}, "quoted"\nin two lines'} for n in range(5)]


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_csv(path, rows, **options):
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys(), **options)
        table.writeheader()
        table.writerows(rows)
    return path


def write_jsonl(folder):
    (folder / "rows.jsonl").write_text(jsonl(ROWS))
    return folder / "rows.jsonl"


def write_one_line(folder):
    (folder / "rows.json").write_text(json.dumps(ROWS))
    return folder / "rows.json"


def write_pretty(folder):
    (folder / "rows.json").write_text(json.dumps(ROWS, indent=2))
    return folder / "rows.json"


def write_csv(folder):
    return as_csv(folder / "rows.CSV", ROWS)


def write_tsv(folder):
    return as_csv(folder / "rows.tsv", ROWS, delimiter="\t")


def write_gzip(folder):
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(jsonl(ROWS).encode()))
    return folder / "rows.jsonl.gz"


def write_bzip2(folder):
    (folder / "rows.csv.bz2").write_bytes(bz2.compress(as_csv(folder / "rows.csv", ROWS).read_bytes()))
    return folder / "rows.csv.bz2"


def write_xz(folder):
    (folder / "rows.json.xz").write_bytes(lzma.compress(json.dumps(ROWS).encode("utf-8-sig")))
    return folder / "rows.json.xz"


def write_parquet(folder):
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def write_saved(folder):
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return folder / "saved"


def write_splits(folder):
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(splits).save_to_disk(folder / "splits")
    return f"{folder / 'splits'}:train"


FORMATS = [
    *(write_jsonl, write_one_line, write_pretty, write_csv, write_tsv),
    *(write_gzip, write_bzip2, write_xz, write_parquet, write_saved, write_splits),
]


@pytest.mark.parametrize("write", FORMATS)
def test_the_same_rows_from_every_format(write, tmp_path):
    source = write(tmp_path)
    assert [{name: row[name] for name in ROWS[0]} for row in load_rows(str(source))] == ROWS
    assert load_rows(source)[1][WHERE] == f"{source}, row 2"


TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
USUAL = [
    ({"messages": TURNS}, TURNS[:1], TURNS[1:], "a"),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, TURNS[:1], TURNS[1:], "a"),
    ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, "Add.\n\n1 and 2", "3", "3"),
    ({"instruction": "Say hi.", "input": "", "output": "hi"}, "Say hi.", "hi", "hi"),
    ({"question": "q", "answer": "a", "id": 7}, "q", "a", "a"),
    ({"prompt": "q", "privileged_context": "a"}, "q", "a", "a"),
    ({"prompt": TURNS[:1], "completion": TURNS[1:]}, TURNS[:1], TURNS[1:], "a"),
    ({"problem": "q", "solution": "a"}, "q", "a", "a"),
    ({"Question": "q", "Response": "a"}, "q", "a", "a"),
]


@pytest.mark.parametrize(("row", "prompt", "demonstration", "answer"), USUAL)
def test_usual_names_are_found_and_said(row, prompt, demonstration, answer, caplog):
    (read,) = load_rows([row], name="mine")
    assert (read["prompt"], read["demonstration"]) == (prompt, demonstration)
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said.startswith("mine: prompt is ") and said.endswith("(columns can say otherwise)")
    (held_out,) = load_rows([row], need=("prompt", "answer"))
    assert (held_out["prompt"], held_out["answer"]) == (prompt, answer)
    (general,) = load_rows([row], need=("prompt",))
    assert general["prompt"] == prompt and general.get("answer") == row.get("answer")


def test_other_columns_stay_and_names_that_differ_by_case_alone_are_two():
    (read,) = load_rows([{"question": "q", "answer": "a", "input": "beside it"}])
    assert read["input"] == "beside it" and read["prompt"] == "q"
    with pytest.raises(UsageError, match="row 1 has no prompt; it has Question, question, Response"):
        load_rows([{"Question": "one", "question": "two", "Response": "a"}])


def test_our_own_names_need_no_others(caplog):
    row = {**ROWS[0], "answer": "x", "question": "another", "messages": TURNS}
    (read,) = load_rows([row])
    assert read["prompt"] == row["prompt"] and not caplog.records
    (read,) = load_rows([{"messages": TURNS, "answer": "B"}], need=("prompt", "answer"))
    assert read["answer"] == "B"


def test_columns_name_what_is_read(tmp_path, caplog):
    path = as_csv(tmp_path / "rows.csv", [{"q": "a question", "good": "an answer", "prompt": "not this"}])
    (row,) = load_rows(path, columns={"prompt": "q", "demonstration": "good"})
    assert (row["prompt"], row["demonstration"]) == ("a question", "an answer") and "q" not in row
    with pytest.raises(UsageError, match=r"columns has demonstration: better, and .* no such column; it has good, "):
        load_rows(path, columns={"prompt": "q", "demonstration": "better"})
    (row,) = load_rows(path, columns={"prompt": "query", "demonstration": "good"})
    assert row["prompt"] == "not this" and "no such column: its own prompt is read" in caplog.text
    (row,) = load_rows(path, need=("prompt",), columns={"prompt": "q", "demonstration": "better"})  # is not needed
    assert row["prompt"] == "a question"


def test_what_columns_has_renamed_is_no_longer_there():
    """A convention is looked for among the names that the rows have then."""
    row = {"Prompt": "q", "Completion": "c", "Response": "r"}
    (read,) = load_rows([row], columns={"answer": "Completion"})
    assert (read["prompt"], read["demonstration"], read["answer"]) == ("q", "r", "c")
    row = {"Messages": [{"role": "user", "content": "u"}], "Question": "q", "Answer": "a"}
    (read,) = load_rows([row], columns={"tools": "Messages"})
    assert (read["prompt"], read["demonstration"]) == ("q", "a")
    for capital in (str.title, str.lower):
        row = {capital("question"): "q", capital("answer"): "a"}
        with pytest.raises(UsageError, match="row 1 has no demonstration; it has "):
            load_rows([row], columns={"prompt": capital("question")})


def test_a_column_that_comes_twice_is_refused_in_parquet_too(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    columns = [pyarrow.array([text]) for text in "abc"]
    parquet.write_table(pyarrow.table(columns, names=["prompt", "demonstration", "prompt"]), tmp_path / "mine.parquet")
    with pytest.raises(UsageError, match=r"mine\.parquet has the column 'prompt' twice; it must have it once"):
        load_rows(str(tmp_path / "mine.parquet"))


def test_several_files_and_weights(tmp_path):
    first, second = write_jsonl(tmp_path), write_csv(tmp_path)
    assert len(load_rows([first, second])) == 10
    rows = load_rows({str(first): 2, str(second): 0.4}, seed=3)
    assert [row[WHERE].startswith(str(first)) for row in rows] == [True] * 10 + [False] * 2
    assert rows == load_rows({str(first): 2, str(second): 0.4}, seed=3)
    chosen = {tuple(row["prompt"] for row in load_rows({str(second): 0.4}, seed=seed)) for seed in range(20)}
    assert len(chosen) > 3
    with pytest.raises(UsageError, match=r"have no rows by their weights, \[0.01\]"):
        load_rows({str(first): 0.01})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", "prompt,demonstration\na\n", r"row 1 has 1 cells; it must have 2, as line 1"),
        ("rows.csv", "prompt,prompt\na,b\n", "has the column 'prompt' twice"),
        ("rows.csv", 'prompt,demonstration\n"a,b\n', "cannot be read as a table"),
        ("rows.csv", "prompt,demonstration\n", "is empty"),
        ("rows.csv", "q,a\n1,2\n", r"row 1 has no prompt; it has q, a \(columns names what a file calls it\)"),
        ("rows.json", '{\n"data": []\n}', "begins with an object over several lines; it must be a list of rows"),
        ("rows.json", "[{]", "is not JSON"),
        ("rows.json", '["a"]', "row 1 is a text"),
        ("rows.jsonl", "[1]\n[2]\n", "row 1 is a list"),
        ("rows.jsonl.gz", "not packed", "cannot be unpacked"),
        ("rows.jsonl.zst", "x", "is compressed by zstd; it must be unpacked first"),
        ("rows.parquet.gz", "x", "is Parquet in a gz file"),
        (
            "rows.jsonl",
            jsonl([{"messages": TURNS}, {"messages": TURNS[:1]}]),
            "row 2: messages must end with a message",
        ),
        ("rows.jsonl", jsonl([{"question": "q", "answer": "a"}, {"question": "q"}]), "row 2 has no answer, which"),
    ],
)
def test_what_cannot_be_read_is_refused(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        load_rows(tmp_path / name)


def test_folders_and_hub_names_that_are_not_there_are_refused(tmp_path):
    splits = write_splits(tmp_path).removesuffix(":train")
    for name in (splits, f"{splits}:dev"):
        with pytest.raises(UsageError, match=r"names no split of the folder; it may be .*splits:train or .*:test"):
            load_rows(name)
    with pytest.raises(UsageError, match=r"names a split, and .* has one dataset without splits"):
        load_rows(f"{write_saved(tmp_path)}:train")
    with pytest.raises(UsageError, match="is a folder; it must be a file of rows, or a folder that datasets has saved"):
        load_rows(tmp_path)
    with pytest.raises(UsageError, match="owner/name:train cannot be loaded as a dataset of the hub"):
        load_rows("owner/name:train")


def test_names_of_the_hub():
    assert all(map(is_hub_name, ("owner/name:train", "owner/name/main:train", "owner/name:train[:10%]")))
    assert not any(map(is_hub_name, ("owner/name", "folder/rows.jsonl", "rows.jsonl", "folder/rows.csv.gz", "a:b")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_file": {"a.jsonl": 0}}, "train_file's weight of a.jsonl is 0; it must be a number above 0"),
        ({"train_file": ["a.jsonl", 3]}, "train_file has 3; each of its names must be a text"),
        ({"train_file": []}, "train_file is not set"),
    ],
)
def test_wrong_sources_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        DataArguments(**settings)


def test_wrong_columns_are_refused():
    with pytest.raises(
        UsageError, match="columns has 'promt'; it may have prompt, demonstration, answer, teacher_prompt and tools"
    ):
        ColumnArguments({"promt": "q"})
    with pytest.raises(UsageError, match="columns has prompt: 3; it must be the name of a column"):
        ColumnArguments({"prompt": 3})
    with pytest.raises(UsageError, match="columns has 'q' for prompt and demonstration; each must be of its own"):
        ColumnArguments({"prompt": "q", "demonstration": "q"})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.tiny_model().save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return str(folder)


SHORT = ["--teacher_template", "turn", "--max_completion_length", "32"]


def test_sdft_data_shows_rows_as_student_and_teacher_read_them(model, tmp_path, capsys):
    as_csv(
        tmp_path / "mine.csv", [{"question": row["prompt"], "answer": row["demonstration"], "id": 1} for row in ROWS]
    )
    assert main(["data", str(tmp_path / "mine.csv"), "--rows", "1"]) == 0
    bare = capsys.readouterr().out
    assert "5 rows; columns that are not used: id" in bare and "length in characters" in bare
    assert main(["data", str(tmp_path / "mine.csv"), "--model", model, *SHORT]) == 0
    shown = capsys.readouterr().out
    for number in (1, 2, 3):
        for what in ("as the student reads it", "as the teacher reads it", "its demonstration"):
            assert f"mine.csv, row {number}, {what}" in shown
    assert "row 4" not in shown and "length in tokens" in shown and "all rows fit the model's context" in shown
    assert shown.count("answer 0") == 2  # to the teacher, and by itself


def test_sdft_data_says_what_does_not_fit(model, tmp_path, capsys):
    (tmp_path / "mine.jsonl").write_text(jsonl([ROWS[0], {**ROWS[0], "prompt": "long " * 4000}]))
    argv = ["data", str(tmp_path / "mine.jsonl"), "--model", model, "--rows", "0", *SHORT]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert main(["data", str(tmp_path / "mine.jsonl"), "--model", model, *SHORT, "--overlong", "skip"]) == 0
    skipped = capsys.readouterr().out
    assert "1 row would be left out:" in skipped and "characters ...]" in skipped and len(skipped) < 20_000
    assert "1 row would be refused:" in shown and "mine.jsonl, row 2: the prompt has" in shown


def test_sdft_data_says_what_the_template_does_not_show(model, tmp_path, capsys, caplog):
    row = {**ROWS[0], "tools": [{"name": "weather"}]}
    (tmp_path / "mine.jsonl").write_text(jsonl([row]))
    assert main(["data", str(tmp_path / "mine.jsonl"), "--model", model, *SHORT]) == 0
    assert "the tokenizer's chat template leaves out tools, or calls of them, in 1 of 1 rows" in caplog.text


def test_sdft_data_says_what_counts_with_a_model_alone(tmp_path, caplog):
    (tmp_path / "mine.jsonl").write_text(jsonl(ROWS))
    assert main(["data", str(tmp_path / "mine.jsonl"), "--rows", "0", "--overlong", "skip"]) == 0
    assert "overlong is 'skip' and does nothing: model is not set" in caplog.text


def test_sdft_data_takes_a_recipe(model, tmp_path, capsys):
    (tmp_path / "mine.jsonl").write_text(jsonl(ROWS))
    recipe = {"model": model, "train_file": {str(tmp_path / "mine.jsonl"): 3}, "learning_rate": 1e-4}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["data", str(tmp_path / "recipe.yaml"), "--rows", "0"]) == 0
    assert "15 rows" in capsys.readouterr().out


def test_a_run_on_a_csv_with_other_names(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    as_csv(tmp_path / "mine.csv", [{"q": row["prompt"], "a": "yes"} for row in tiny.rows(4)])
    columns = "{prompt: q, demonstration: a}"
    argv = ["train", "--model", model, "--train_file", "mine.csv", "--columns", columns, "--output_dir", "out"]
    assert main([*argv, "--max_steps", "1", "--max_completion_length", "4", "--use_cpu", "--save_strategy", "no"]) == 0
    assert "prompt: q" in (tmp_path / "out" / "resolved_recipe.yaml").read_text()


def test_sdft_data_of_supervised_fine_tuning(model, tmp_path, capsys, caplog):
    """No teacher, and a demonstration that is too long with its prompt is refused, as `sdft train` does."""
    (tmp_path / "mine.jsonl").write_text(jsonl([ROWS[0], {**ROWS[0], "demonstration": "long " * 9000}]))
    argv = ["data", str(tmp_path / "mine.jsonl"), "--model", model, "--method", "sft", "--feedback", "sdpo"]
    assert main([*argv, "--max_completion_length", "32"]) == 0
    shown = capsys.readouterr().out
    assert "teacher" not in shown and "1 row would be refused:\n" in shown
    assert "row 2: the prompt has" in shown and "longer than max_completion_length" not in shown
    assert "feedback is 'sdpo' and does nothing: method is 'sft'" in caplog.text
    assert "max_completion_length is 32 and does nothing: method is 'sft'" in caplog.text
    (tmp_path / "mine.jsonl").write_text(jsonl([{"prompt": "a"}]))
    said = []
    for method in ("sft", "sdft"):
        weights = ["--demonstration_weight", "0.5"] if method == "sdft" else []
        assert main([*argv[:4], "--method", method, "--feedback", "judge", *weights]) == 2
        said.append(capsys.readouterr().err)
    assert all("row 1 has no demonstration" in each for each in said)


def test_sdft_data_of_demonstrations_that_count_beside_the_divergence(model, tmp_path, capsys):
    (tmp_path / "mine.jsonl").write_text(jsonl([{**ROWS[0], "demonstration": "long " * 9000}]))
    argv = ["data", str(tmp_path / "mine.jsonl"), "--model", model, "--feedback", "judge", *SHORT[2:]]
    for weight, refused in (("0", False), ("0.5", True)):
        assert main([*argv, "--demonstration_weight", weight]) == 0
        assert ("would be refused" in capsys.readouterr().out) == refused


def test_sdft_data_refuses_of_cross_entropy_what_training_does(tmp_path, capsys):
    """Tokens as the chat template writes them, whatever it puts around turns, and whatever it cannot write."""
    turns = [{"role": by, "content": "a"} for _ in range(15) for by in ("assistant", "user")][:-1]
    thought = "{% if m.role == 'assistant' %}" + 3 * "(think)(/think)" + "{% endif %}"
    thinks = tiny.CHAT_TEMPLATE.replace("{{ m.content }}", thought + "{{ m.content }}")
    assert thinks != tiny.CHAT_TEMPLATE
    cases = [  # the chat template, the row's demonstration, whether it can be learned
        (tiny.CHAT_TEMPLATE, turns, True),
        (tiny.CHAT_TEMPLATE, "a" * 120, True),
        (thinks, "a" * 120, False),
        (None, turns, False),
        (tiny.CHAT_TEMPLATE, "a" * 160, False),
    ]
    for number, (template, demonstration, fits) in enumerate(cases):
        tokenizer = tiny.tiny_tokenizer()
        tokenizer.chat_template = template
        model = tiny.saved(tmp_path / f"model-{number}", tiny.tiny_model(), tokenizer)
        (tmp_path / "mine.jsonl").write_text(jsonl([{"prompt": "b", "demonstration": demonstration}]))
        given = ["--model", model, "--train_file", str(tmp_path / "mine.jsonl"), "--method", "sft"]
        trains = main(
            ["train", *given, "--output_dir", str(tmp_path / f"run-{number}"), "--max_steps", "1", "--use_cpu"]
        )
        said = capsys.readouterr()
        assert main(["data", *given]) == 0
        shown = capsys.readouterr().out
        assert (trains == 0, "all rows fit" in shown) == (fits, fits), (number, said.err, shown)
        if not fits:
            assert said.err.strip().removeprefix("sdft: ") in shown


def test_sdft_data_wants_the_columns_that_feedback_reads(tmp_path, capsys):
    (tmp_path / "mine.jsonl").write_text(jsonl([{"prompt": "a"}]))
    assert main(["data", str(tmp_path / "mine.jsonl"), "--feedback", "sdpo"]) == 2
    assert "row 1 has no answer" in capsys.readouterr().err
