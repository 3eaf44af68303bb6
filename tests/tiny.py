"""A tokenizer with one token a character and models small enough to train in a test."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu_report.models import CHAT, character_tokenizer

CHAT_TEMPLATE = CHAT


def tiny_tokenizer(chat=True):
    tokenizer = character_tokenizer()
    if not chat:
        tokenizer.chat_template = None
    return tokenizer


def tiny_model(seed=0, tied=False, **options):
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 101,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 160,
        "tie_word_embeddings": tied,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": None,
        "initializer_range": 0.3,  # wide, so that next-token distributions differ and sampling shows
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **options})).eval()


def rows(count=8):
    return [
        {"prompt": f"say {chr(97 + n)}", "demonstration": chr(97 + n) * (n % 3 + 2), "answer": chr(97 + n)}
        for n in range(count)
    ]


def saved(folder, model, tokenizer=None):
    """The name of a folder that has the model and its tokenizer."""
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return str(folder)
