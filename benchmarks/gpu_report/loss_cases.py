"""What the loss is measured at, and which methods are compared there in turns."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, replace

from benchmarks.gpu_report import peers
from benchmarks.gpu_report.cases import models
from benchmarks.gpu_report.stage import Settings
from benchmarks.ledger import EVERY_OPTION, OURS
from benchmarks.methods import (
    LIGER_HALF_HARD,
    LIGER_HALF_HARD_COMPILED,
    OURS_HALF_HARD,
    OURS_TOP,
    PEER_BETA,
    WITH_HARD,
)
from benchmarks.roofline import Model
from sdft_kernels.divergences import CROSS_ENTROPY, DIVERGENCES

TOKENS, FEW, MANY = 8192, 1024, 16_384
TOY_TOKENS, TOY_FEW, TOY_MANY = 24, 16, 32

#: Rounds of a method of which one call takes longer are fewer.
LONG_SECONDS, ROUNDS, FEW_ROUNDS = 0.3, 5, 3

FLOOR_WHOLE, FLOOR_CHUNKS = "bare products", "bare products, chunks"
SOFTCAP = "ours, softcap"

PLAIN = "plain torch"

FLOORS = (FLOOR_WHOLE, FLOOR_CHUNKS)

CUTE = "Liger CuTe"

PEERS = ("TRL", "Liger Triton", CUTE, "Liger eager")

COMPILED = ("Liger compiled", LIGER_HALF_HARD_COMPILED)

#: Seconds that compiling Liger's loss takes on a card, which long cases leave for it.
COMPILE_SECONDS = 15.0

#: A rate that products surely reach here, for guesses of a case's time.
SLOW_FLOPS = 4e14


@dataclass(frozen=True)
class Case:
    """One comparison: the methods of each block take turns; the next block begins with memory given back."""

    model: Model
    tokens: int
    trainable_head: bool
    divergence: str
    blocks: tuple[tuple[str, ...], ...]
    rounds: int = ROUNDS
    reserve: float = 0.0  # seconds that are to be left afterwards

    @property
    def head(self) -> str:
        return "trainable" if self.trainable_head else "frozen"

    @property
    def name(self) -> str:
        return f"{self.model.name}, {self.tokens} tokens, {self.head} head, {self.divergence}"

    @property
    def flops(self) -> int:
        """Of the products that any exact method needs."""
        products = 2 + (self.divergence != CROSS_ENTROPY) + self.trainable_head
        return products * 2 * self.tokens * self.model.hidden * self.model.vocab

    def without(self, absent: Container[str]) -> Case | None:
        """The case with the peers that are there; None where those that it is about are not."""
        blocks = [tuple(name for name in block if peers.of(name) not in absent) for block in self.blocks]
        offered, left = ({name for block in of for name in block} for of in (self.blocks, blocks))
        if not offered.isdisjoint(COMPILED) and left <= {OURS, OURS_HALF_HARD}:
            return None
        return replace(self, blocks=tuple(block for block in blocks if block))

    def guess(self, methods: tuple[str, ...]) -> float:
        """Seconds that a block takes, at about twice the floor's time for each call."""
        calls = len(methods) * (self.rounds + 2)
        compiling = COMPILE_SECONDS if any(name in COMPILED for name in methods) else 0
        return max(compiling, self.reserve + 1 + calls * 2 * self.flops / SLOW_FLOPS)


def few_tokens(settings: Settings) -> int:
    return TOY_FEW if settings.toy else FEW


def cases(settings: Settings) -> Iterator[Case]:
    """The most important first, of the first model also that with many tokens. What is compiled comes last."""
    few = few_tokens(settings)
    tokens, many = (TOY_TOKENS, TOY_MANY) if settings.toy else (TOKENS, MANY)
    heads = [(model, trainable) for model in models(settings) for trainable in (True, False)]
    first = models(settings)[0]

    def own(model: Model) -> tuple[str, ...]:
        return (OURS, SOFTCAP) if model.softcap else (OURS,)

    def usual(size: int, of: list[tuple[Model, bool]]) -> Iterator[Case]:
        for model, trainable in of:
            yield Case(model, size, trainable, "reverse_kl", (FLOORS, (*own(model), *PEERS), (PLAIN,)))

    def long(of: list[tuple[Model, bool]], reserve: float) -> Iterator[Case]:
        for model, trainable in of:
            blocks = ((FLOOR_CHUNKS,), (*own(model), *PEERS))
            yield Case(model, many, trainable, "reverse_kl", blocks, FEW_ROUNDS, reserve)

    yield from usual(tokens, heads[:2])
    yield from long(heads[: 1 if settings.toy else 2], 0)
    yield from usual(tokens, heads[2:])
    for _, trainable in heads[:2]:
        yield Case(first, tokens, trainable, CROSS_ENTROPY, (FLOORS, (OURS, "Liger Triton"), (PLAIN,)))
    yield from usual(few, heads[: 1 if settings.toy else None])
    for divergence in ("jsd", *(name for name in DIVERGENCES if name not in ("reverse_kl", "jsd"))):
        half_hard = (OURS_HALF_HARD, LIGER_HALF_HARD) if divergence == "jsd" else ()
        offered = PEERS if divergence in PEER_BETA else ()
        yield Case(first, tokens, True, divergence, ((OURS, *half_hard, *offered),))
    yield Case(first, tokens, True, "reverse_kl", ((OURS, EVERY_OPTION, OURS_HALF_HARD, OURS_TOP),))
    yield Case(first, tokens, True, WITH_HARD, ((OURS,),))
    if not settings.toy:
        yield from long(heads[2:], COMPILE_SECONDS)
        for trainable in (True, False):
            yield Case(first, tokens, trainable, "reverse_kl", ((OURS, "Liger compiled"),))
        yield Case(first, tokens, True, "jsd", ((OURS, OURS_HALF_HARD, LIGER_HALF_HARD_COMPILED),))
