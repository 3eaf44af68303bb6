"""The likeliest tokens beside each token that was written, and every token's own text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from sdft.evaluation.token_texts import TokenTexts
from sdft.head import Head
from sdft.likeliest import likeliest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_those_of_full_logits_whatever_the_chunk(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, labels = torch.randn(7, 8, dtype=dtype), torch.randint(0, 50, (7,))
    weight, bias = torch.randn(50, 8, dtype=dtype), torch.randn(50, dtype=dtype)
    head, exact_head = (Head(w, b, scale=0.5, softcap=4.0) for w, b in ((weight, bias), (weight.float(), bias.float())))
    exact = (exact_head.logits(hidden.float()) / 1.3).log_softmax(-1)
    options: dict[str, Any] = {"temperature": 1.3, "max_chunk_bytes": 8 * 50 * 3}  # three tokens at once
    found = likeliest(hidden, head, labels, exact.gather(1, labels[:, None])[:, 0], **options)
    assert found.tokens.shape == found.logprobs.shape == (7, 3)
    torch.testing.assert_close(found.logprobs, exact.gather(1, found.tokens))
    if dtype == torch.float32:
        assert found.tokens.equal(exact.topk(3).indices)
    assert likeliest(hidden[:0], head, labels[:0], exact[:0, 0]).tokens.shape == (0, 3)


def test_the_texts_of_tokens_join_to_the_text_with_characters_of_several_tokens() -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    text = "né 語\n"
    ids = fast(text)["input_ids"]
    assert TokenTexts(fast).of(ids) == ["n", "", "é", " ", "", "", "語", "\n"]
    cut = TokenTexts(fast).of(ids[:6])
    assert cut[:4] == ["n", "", "é", " "] and set("".join(cut[4:])) == {"\N{REPLACEMENT CHARACTER}"}
