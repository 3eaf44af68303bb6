"""Each token's own text, such that the texts of a completion's tokens join to the completion."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what a part of a character decodes to


class TokenTexts:
    """Texts of tokens by a tokenizer, as they are within a text: at its beginning some tokenizers drop a space."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.before = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self.start = self._decoded(self.before)
        self.known: dict[int, str] = {}

    def alone(self, token: int) -> str:
        """The text of one token; of a part of a character, the sign for what cannot be shown."""
        if token not in self.known:
            self.known[token] = self._within([token])
        return self.known[token]

    def of(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token; a character of several tokens stands at the last of them."""
        texts, parts = list[str](), list[int]()
        for token in tokens:
            text = self.alone(token)
            parts = [*parts, token] if BROKEN in text else []
            if len(parts) > 1 and BROKEN not in (whole := self._within(parts)):
                texts[len(texts) - len(parts) + 1 :] = [""] * (len(parts) - 1)
                text, parts = whole, []
            texts.append(text)
        return texts

    def _within(self, tokens: list[int]) -> str:
        return self._decoded([*self.before, *tokens]).removeprefix(self.start)

    def _decoded(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))
