"""Wrong recipes, rows and folders at random: each ends with exit code 2 and one line that names what is wrong."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdft.cli import main
from sdft.settings.fields import Field, training_fields
from tests import tiny

#: A command line, and the names of which the error has to have one.
Case = tuple[list[str], list[str]]
CASES = 200
WORDS = ["fast", "", " ", "1e", "0x", "none!", "ö", "-", "--", "1,5", "1.5.2", "twelve", "[", "tru", "1" * 5000]
ODD: list[Any] = [None, 0, -1, 1.5, True, [], {}, "", " ", [[]], [None], {"role": "user"}, [{"role": "user"}], [1, "a"]]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.tiny_model().save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def settings(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A recipe that works, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", tiny.rows())
    return {"model": str(model_folder), "train_file": "rows.jsonl", "output_dir": "out", "use_cpu": True}


def write_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))


def wrong_text(random: random.Random, field: Field) -> str | None:
    """A text that the field cannot have; None where it can have any."""
    if field.choices:
        return random.choice([word for word in WORDS if word.strip()])
    if "str" in field.kinds or not field.kinds & {"int", "float", "bool", "list", "dict"}:
        return None
    return random.choice([word for word in WORDS if "dict" not in field.kinds or not word.startswith("{")][:14])


def recipes(random: random.Random, settings: dict[str, Any], folder: Path) -> Iterator[Case]:
    """Wrong values, unknown and repeated fields, cut and garbled files."""
    fields = training_fields()
    path = folder / "recipe.yaml"
    while True:
        kind = random.choice(["value", "structure", "unknown", "twice", "cut", "garbled", "flag"])
        lines = yaml.safe_dump(settings, sort_keys=False).splitlines()
        place = random.randrange(len(lines) + 1)
        name = random.choice(list(fields))
        text = wrong_text(random, fields[name])
        argv = ["train", "recipe.yaml"]
        if kind == "value":
            if text is None or name in settings:
                continue
            lines.insert(place, f"{name}: {json.dumps(text)}")
        elif kind == "structure":
            value = random.choice([value for value in ODD if isinstance(value, list | dict)])
            if type(value).__name__ in fields[name].kinds or name in settings:
                continue
            lines.insert(place, f"{name}: {json.dumps(value)}")
        elif kind == "unknown":
            name += random.choice(string.ascii_lowercase) + "q"
            lines.insert(place, f"{name}: 1")
        elif kind == "twice":
            lines.insert(place, lines[random.randrange(len(lines))])
            name = "set twice"
        elif kind == "cut":
            path.write_bytes("\n".join(lines).encode()[: random.randrange(20)])
            yield argv, ["recipe.yaml", "train_file", "model"]
            continue
        elif kind == "garbled":
            start = random.choice(
                [b"\xff\xfe\x00", b"\x00\x01", b"{[", b"a: b: c\n", b"\tx: 1\n", b"- a\n", b"'", b"%!\n"]
            )
            path.write_bytes(start + "\n".join(lines).encode())
            yield argv, ["recipe.yaml"]
            continue
        elif text is not None and text and not text.startswith("--") and not fields[name].is_list:
            argv += [f"--{name.replace('_', random.choice('_-'))}={text}"]
            name = argv[-1].split("=")[0]
        else:
            continue
        path.write_text("\n".join(lines) + "\n")
        yield argv, [name]


def rows(random: random.Random, settings: dict[str, Any], folder: Path) -> Iterator[Case]:
    """One row of a file that cannot be used, wherever it stands and whichever command reads it."""
    command = random.choice(["train", "eval", "generate"])
    recipe = yaml.safe_dump(settings)
    while True:
        (folder / "recipe.yaml").write_text(recipe)
        argv, need = {
            "train": (["train", "recipe.yaml", "--train_file", "wrong.jsonl"], "demonstration"),
            "eval": (["eval", "recipe.yaml", "--eval_file", "wrong.jsonl"], "answer"),
            "generate": (["generate", "recipe.yaml", "--prompt_file", "wrong.jsonl", "--output_file", "o"], "prompt"),
        }[command]
        good, row = tiny.rows(random.randrange(1, 5)), dict(tiny.rows(1)[0])
        place = random.randrange(len(good) + 1)
        text = json.dumps(row)
        bad: Any = random.choice(
            [
                {key: value for key, value in row.items() if key != need},
                {**row, "prompt": random.choice([value for value in ODD if not isinstance(value, str)])},
                {**row, "prompt": [{"role": "assistant", "content": "x"}], "__where__": "elsewhere, row 1"},
                {**row, need: random.choice(["", " ", "\ud800", "a\udfff"])},
                {**row, "note": {"deep": "\udc00"}},
                text[: random.randrange(1, len(text))] + "\n",
                random.choice(["[", '{"a":']) * random.randrange(1, 100_000) + "\n",
                '{"prompt": "a", "n": ' + "7" * random.randrange(4301, 9000) + "}\n",
                random.choice(["nul", "0", '"text"', "[]", "{}", "{'prompt': 'a'}", "\x00", "}{"]) + "\n",
            ]
        )
        write_rows(folder / "wrong.jsonl", [*good[:place], bad, *good[place:]])
        command = random.choice(["train", "eval", "generate"])
        whole = ["wrong.jsonl is not", "wrong.jsonl cannot be read"] if str(bad).startswith("[") else []
        yield argv, [f"wrong.jsonl, row {place + 1}", *whole]


def folders(random: random.Random, settings: dict[str, Any], folder: Path) -> Iterator[Case]:
    """Models that are cut off, garbled or lack a file; files and folders that are missing, or are the other."""
    source = Path(settings["model"])
    names = ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]
    paths = ["/proc/nowhere", "rows.jsonl/x", "rows.jsonl", "a" * 300, "/dev/null/x"]
    while True:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
        kind = random.choice(["model", "absent", "output_dir", "file", "gguf"])
        if kind == "model":
            model, name = folder / "broken", random.choice(names)
            model.mkdir(exist_ok=True)
            for path in source.iterdir():
                (model / path.name).write_bytes(path.read_bytes())
            whole = (source / name).read_bytes()
            size = random.randrange(len(whole) - 2)
            (model / name).write_bytes(
                random.choice([whole[:size], random.randbytes(20), b"[" * 100_000, b"null", b""])
            )
            yield ["generate", "--model", "broken", "--prompt", "a"], [name, "'broken'"]
        elif kind == "absent":
            name = random.choice(
                ["./absent", "/absent/x", "absent.gguf", "rows.jsonl.gguf", "~/absent", "~nosuchuser/x"]
            )
            yield ["generate", "--model", name, "--prompt", "a"], [name]
        elif kind == "gguf":
            (folder / "weights.gguf").write_bytes(random.choice([b"", b"GGUF", random.randbytes(200), b"GGUF\3" * 9]))
            yield ["eval", "--model", "weights.gguf", "--eval_file", "rows.jsonl"], ["weights.gguf"]
        elif kind == "output_dir":
            name = random.choice(paths)
            yield ["train", "recipe.yaml", "--output_dir", name], ["--output_dir is "]
        else:
            command, field = random.choice([("train", "train_file"), ("eval", "general_file"), ("train", "eval_file")])
            name = random.choice([".", "absent", "/proc/nowhere", "a" * 300, "/dev/null"])
            yield [command, "recipe.yaml", f"--{field}", name], [f"--{field} is "]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [recipes, rows, folders], ids=lambda kind: kind.__name__)
def test_whatever_is_wrong_is_one_line_and_exit_code_2(
    kind: Callable[..., Iterator[Case]], settings: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    cases = kind(random.Random(kind.__name__), settings, tmp_path)
    for number in range(CASES if kind is not folders else CASES // 4):
        argv, names = next(cases)
        capsys.readouterr()
        code = main(argv)
        out, err = capsys.readouterr()
        said = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("sdft:")]
        context = f"case {number}: {argv}\n{(tmp_path / 'recipe.yaml').read_bytes()[:400]!r}\n{err}"
        assert code == 2 and len(said) == 1 and not out and "Traceback" not in err, context
        assert any(name in said[0] for name in names), context
        assert len(said[0]) < 2000, context
    assert not (tmp_path / "out").exists() and not (tmp_path / "o").exists()
