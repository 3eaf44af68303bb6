"""A tokenizer with one token a character and models small enough to train in a test."""

import string

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer(chat=True):
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *string.printable[:95], "\n"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="?",
        additional_special_tokens=SPECIAL[2:],
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


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
