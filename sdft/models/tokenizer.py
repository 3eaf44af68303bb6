"""A model's tokenizer, without its weights and without the classes of models, which take seconds to import."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sdft.data import Limits
from sdft.errors import UsageError
from sdft.models.files import ADAPTER, base_of, local_path, resolve
from sdft.settings.inputs import DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Reader(NamedTuple):
    """A model's tokenizer, and of the model the most that it can read and every token id that ends an answer."""

    tokenizer: PreTrainedTokenizerBase
    limits: Limits
    eos_ids: frozenset[int]


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Reader:
    """The tokenizer of the model called `name`, and what its configuration says of what it can read.

    Raises UsageError for a model that is not there.
    """
    from transformers import AutoConfig, AutoTokenizer

    folder = local_path(name)
    if (adapter := folder / ADAPTER).is_file() and not (folder / "tokenizer_config.json").is_file():
        return load_tokenizer(base_of(adapter), trust_remote_code=trust_remote_code)
    of_config = base_of(adapter) if adapter.is_file() else name
    try:
        (source, files), (of_config, config_files) = _unpacked(name), _unpacked(of_config)
        tokenizer = AutoTokenizer.from_pretrained(source, **files, trust_remote_code=trust_remote_code)
        config = AutoConfig.from_pretrained(of_config, **config_files, trust_remote_code=trust_remote_code)
        of_generation = _ends_of_generation(of_config)
    except UsageError:
        raise
    except Exception as error:  # a file may be damaged in any way, and each reader has errors of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"model is {name!r}, whose tokenizer cannot be loaded: {reason}") from error
    text = config.get_text_config()
    limits = Limits(getattr(text, "max_position_embeddings", None), getattr(text, "vocab_size", None))
    ends = end_ids(of_generation, getattr(text, "eos_token_id", None), tokenizer.eos_token_id)
    return Reader(tokenizer, limits, ends)


def end_ids(*declared: Any) -> frozenset[int]:
    """The ids that are declared to end an answer: each declaration is an id, several, or None."""
    lists = ([ids] if isinstance(ids, int) else ids for ids in declared if ids is not None)
    return frozenset(itertools.chain.from_iterable(lists))


def _ends_of_generation(source: str) -> Any:
    """What a model's generation settings declare, where it has any."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(source).eos_token_id
    except OSError:
        return None


def _unpacked(name: str) -> tuple[str, dict[str, str]]:
    """Where a model's files are, and how they are read: as they were kept, if they were a GGUF file's."""
    from sdft.models.gguf_cache import kept_model

    source, files = resolve(name)
    if files:
        kept = (kept_model(Path(source, files["gguf_file"]), dtype) for dtype in DTYPES)
        if folder := next((each for each in kept if each is not None and each.is_dir()), None):
            return str(folder), {}
    return source, files
