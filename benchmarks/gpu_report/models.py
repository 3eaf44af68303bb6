"""Models of real sizes with random weights, made on the device, and a tokenizer: nothing is loaded."""

from __future__ import annotations

import string
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

#: From the models' own config.json.
SIZES: dict[str, dict[str, Any]] = {
    "Qwen2.5-1.5B": {
        "vocab_size": 151_936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-7B": {
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": False,
    },
    "toy": {
        "vocab_size": 503,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
}

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def random_model(name: str, device: str, dtype: torch.dtype = torch.bfloat16) -> Qwen2ForCausalLM:
    """In evaluation mode, its end of sequence a token that no sampling meets."""
    attention: dict[str, Any] = {"attn_implementation": "sdpa"}  # which transformers takes, and does not declare
    config = Qwen2Config(**SIZES[name], **attention, eos_token_id=None, pad_token_id=0, bos_token_id=None)
    with _without_initialisation(), torch.device(device), _default_dtype(dtype):
        model = Qwen2ForCausalLM(config)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.fill_(0.0)
        for module in model.modules():
            if "RMSNorm" in type(module).__name__:
                module.weight.fill_(1.0)  # type: ignore[operator]  # known by its name alone
    model.tie_weights()
    return model.eval()


@contextmanager
def _without_initialisation() -> Iterator[None]:
    """torch's own initialisation of each layer would be drawn for nothing."""
    names = ("uniform_", "normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "trunc_normal_")
    kept = {name: getattr(nn.init, name) for name in names}
    for name in names:
        setattr(nn.init, name, lambda tensor, *_, **__: tensor)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(nn.init, name, function)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, so that a prompt has as many tokens as it is to have."""
    special = ["<pad>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>"]
    vocabulary = {token: number for number, token in enumerate([*special, *string.printable[:95], "\n"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="?",
        additional_special_tokens=special[2:],
    )
    fast.chat_template = CHAT
    return fast
