"""The loss and its gradients in bfloat16 beside every peer and the bare products: time, memory, digits, predictions.

The methods of a case take turns on the same inputs, of which there are two sets, so that no cache helps. The digits are
those of the same head with fewer tokens, against float64 on the same device. A share of the floor is the time of the
bare products over a method's: the share of the rate that the card itself reaches at these shapes.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import plots
from benchmarks.gpu import Call, free_bytes, mebibytes, milliseconds, most_memory, release, wall_seconds
from benchmarks.gpu_report import peers
from benchmarks.gpu_report.cases import DoesNotFit, described, guarded, notes, predicted_gpu, why_not
from benchmarks.gpu_report.loss_cases import (
    COMPILED,
    FEW,
    FEW_ROUNDS,
    FLOOR_WHOLE,
    FLOORS,
    LONG_SECONDS,
    PLAIN,
    ROUNDS,
    SOFTCAP,
    Case,
    cases,
    few_tokens,
)
from benchmarks.gpu_report.loss_errors import ERROR_SEED, reference, relative_error
from benchmarks.gpu_report.stage import Row, Settings, markdown, skipped
from benchmarks.ledger import COMPARED, EVERY_OPTION, OURS, Ledger, count
from benchmarks.methods import (
    DEVICE_METHODS,
    LIGER_HALF_HARD,
    OURS_HALF_HARD,
    OURS_TOP,
    Inputs,
    Method,
    OurFloor,
    every_option,
    make_inputs,
    ours,
    ours_top,
    top_teacher,
)
from benchmarks.roofline import Gpu, Model, seconds

IS_OURS = (OURS, SOFTCAP, EVERY_OPTION, OURS_HALF_HARD, OURS_TOP)
#: Whose errors are not taken: what is compiled would be compiled again, bare products have none, and the others would
#: each need another reference.
WITHOUT_ERRORS = (*FLOORS, *COMPILED, LIGER_HALF_HARD, OURS_HALF_HARD, OURS_TOP)

#: Of the free memory, what plain torch may take by its ledger, which has none of its temporary results.
PLAIN_SHARE = 0.6


@dataclass
class Known:
    """What earlier cases found: relative errors by model, divergence and method, where they broke a string under
    "broken"; and milliseconds of the bare products by model, tokens and head."""

    errors: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)
    floors: dict[tuple[str, int, str], float] = field(default_factory=dict)


def run(settings: Settings) -> Iterator[Row]:
    yield from guarded(settings, "first call", 5, partial(first_call, settings), ours=True)
    absent = peers.absent(peers.OF_THE_LOSS)
    yield from (skipped(peer, reason) for peer, reason in absent.items())
    known = Known()
    for offered in cases(settings):
        case = offered.without(absent)
        if case is not None:
            needed = case.guess(case.blocks[0])
            yield from guarded(settings, case.name, needed, partial(measure, settings, case, known))


def first_call(settings: Settings) -> Iterator[Row]:
    """What a user waits for: all of ours is compiled, or read from Triton's cache, before the first loss is there."""
    case = next(cases(settings))
    inputs = inputs_of(case, settings.device, seed=0)
    first, second = (wall_seconds(lambda: ours(inputs, case.divergence), settings.device) for _ in range(2))
    yield {"case": "first call", "method": OURS, "first_call_s": first, "second_call_s": second}


def inputs_of(case: Case, device: str, seed: int) -> Inputs:
    shape, trainable = case.model.at(case.tokens), case.trainable_head
    return make_inputs(shape, trainable_head=trainable, dtype=torch.bfloat16, seed=seed, device=device)


def measure(settings: Settings, case: Case, known: Known) -> Iterator[Row]:
    """The rows of a case, block by block."""
    device, gpu = settings.device, predicted_gpu(settings)
    find_errors(settings, case, known)
    sets = [inputs_of(case, device, seed) for seed in range(2)]
    floor = known.floors.get((case.model.name, case.tokens, case.head))
    ours_ms = None
    for block in case.blocks:
        if settings.left() < (0 if settings.toy else case.guess(block)):
            yield from ({**skipped(case.name, "no time left"), "method": name} for name in block)
            continue
        ready: dict[str, Method] = {}
        failed: dict[str, Row] = {}
        for name in block:
            try:
                ready[name] = prepare(name, sets, case, device)
            except Exception as error:  # told in the report; the others go on
                failed[name] = why_not(error, ours=name in IS_OURS)
        if failed:
            release(device, thorough=True)
        taken = in_turns(ready, sets, case, settings, failed)
        ready.clear()
        floors = [taken[name].median for name in FLOORS if name in taken]
        if floors:
            floor = known.floors[case.model.name, case.tokens, case.head] = min(floors)
        ours_ms = taken[OURS].median if OURS in taken else ours_ms
        for name in block:
            if name in failed:
                yield {"case": case.name, "method": name, **failed[name]}
            elif name not in taken:
                yield {**skipped(case.name, "no time left"), "method": name}
            else:
                errors = known.errors.get((case.model.name, case.divergence, name), {})
                yield row_of(case, name, taken[name], floor, ours_ms, errors, few_tokens(settings), gpu)
        release(device)


@dataclass
class Taken:
    """What one method's calls took. The first one compiles what compiles."""

    first_seconds: float = 0.0
    peak: int | None = None  # bytes above inputs and returned gradients
    milliseconds: list[float] = field(default_factory=list)
    rounds: int = ROUNDS

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)

    def turn(self, number: int, call: Call, inputs: Inputs, device: str) -> None:
        if number == 0:
            self.first_seconds = wall_seconds(call, device)
        elif number == 1:
            peaks: list[int | None] = []
            took = wall_seconds(lambda: peaks.append(most_memory(call, device)), device)
            self.rounds = FEW_ROUNDS if took > LONG_SECONDS else ROUNDS
            self.peak = None if peaks[0] is None else peaks[0] - returned_bytes(inputs)
        else:
            self.milliseconds.append(milliseconds(call, device))


def prepare(name: str, sets: list[Inputs], case: Case, device: str) -> Method:
    """The method, with all that it holds beside its inputs made."""
    if name in FLOORS:
        return OurFloor(sets[0], whole=name == FLOOR_WHOLE)
    if name == PLAIN or name in IS_OURS:
        needed, free = workspace_of(case, name), free_bytes(device)
        if needed > (PLAIN_SHARE if name == PLAIN else 1) * free:
            raise DoesNotFit(f"it needs about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free")
    if name in (SOFTCAP, EVERY_OPTION):
        options = {id(inputs): options_of(name, inputs, case.model) for inputs in sets}
        return lambda inputs, divergence: ours(inputs, divergence, **options[id(inputs)])
    if name == OURS_TOP:
        teachers = {id(inputs): top_teacher(inputs) for inputs in sets}
        return lambda inputs, divergence: ours_top(inputs, divergence, teachers[id(inputs)])
    return DEVICE_METHODS[name]


def options_of(name: str, inputs: Inputs, model: Model) -> dict[str, Any]:
    if name == SOFTCAP:
        return {"student_softcap": model.softcap, "teacher_softcap": model.softcap}
    return every_option(inputs) if name == EVERY_OPTION else {}


def in_turns(
    methods: dict[str, Method], sets: list[Inputs], case: Case, settings: Settings, failed: dict[str, Row]
) -> dict[str, Taken]:
    """Every method in turns, after two turns of other use: the first compiles, and memory is taken in the second.

    One that breaks is put into `failed` and has no more turns. Where time is up, the rounds until then count.
    """
    taken = {name: Taken() for name in methods}
    for turn in range(2 + case.rounds):
        if turn > 2 and settings.left() < 0:
            break
        inputs = sets[turn % len(sets)]
        for name, method in methods.items():
            if name in failed or len(taken[name].milliseconds) >= taken[name].rounds:
                continue
            for others in sets:
                others.clear()
            try:
                taken[name].turn(turn, partial(method, inputs, case.divergence), inputs, settings.device)
            except Exception as error:  # told in the report; the others go on
                failed[name] = why_not(error, ours=name in IS_OURS)
            if name in failed:
                release(settings.device, thorough=True)
    for inputs in sets:
        inputs.clear()
    return {name: times for name, times in taken.items() if name not in failed and times.milliseconds}


def returned_bytes(inputs: Inputs) -> int:
    gradients = (inputs.student_hidden.grad, inputs.student_weight.grad)
    return sum(g.numel() * g.element_size() for g in gradients if g is not None)


def row_of(
    case: Case,
    name: str,
    taken: Taken,
    floor: float | None,
    ours_ms: float | None,
    errors: dict[str, Any],
    errors_tokens: int,
    gpu: Gpu | None,
) -> Row:
    ms = taken.median
    row: Row = {
        "case": case.name,
        "model": case.model.name,
        "tokens": case.tokens,
        "head": case.head,
        "divergence": case.divergence,
        "method": name,
        "ms": ms,
        "fastest_ms": min(taken.milliseconds),
        "slowest_ms": max(taken.milliseconds),
        "rounds": len(taken.milliseconds),
        "first_call_s": taken.first_seconds,
        "tflops": case.flops / ms / 1e9,
        "floor_share": None if floor is None else floor / ms,
        "ours_over_this": None if ours_ms is None or name in FLOORS else ours_ms / ms,
        "peak_mib": None if name in FLOORS else mebibytes(taken.peak),
        "error_loss": errors.get("loss"),
        "error_hidden": errors.get("hidden"),
        "error_weight": errors.get("weight") if case.trainable_head else None,
        "errors_broken": errors.get("broken"),
        "errors_tokens": errors_tokens,
    }
    try:
        ledger = ledger_of(case, name)
    except Exception as error:  # a prediction that breaks leaves the measurement as it is
        return {**row, "prediction_error": described(error)}
    if ledger is not None:
        predicted = None if gpu is None else seconds(ledger, gpu) * 1e3
        row |= {
            "gb_per_s": sum(op.nbytes for op in ledger.ops) / ms / 1e6,
            "ledger_mib": mebibytes(ledger.workspace),
            "predicted_ms": predicted,
            "measured_over_predicted": None if predicted is None else ms / predicted,
        }
    return row


@lru_cache(maxsize=16)  # a case asks before its calls and after them
def ledger_of(case: Case, name: str) -> Ledger | None:
    """None for a method that no ledger follows."""
    followed = OURS if name == SOFTCAP else name
    if followed not in (*COMPARED, EVERY_OPTION, PLAIN):
        return None
    return count(followed, case.model.at(case.tokens), trainable_head=case.trainable_head, divergence=case.divergence)


def workspace_of(case: Case, name: str) -> int:
    """Bytes that its ledger says a method needs; 0 where no ledger follows it, or one breaks."""
    try:
        ledger = ledger_of(case, name)
    except Exception:  # its row says so
        return 0
    return 0 if ledger is None else ledger.workspace


def find_errors(settings: Settings, case: Case, known: Known) -> None:
    """Each method's relative errors, of the same head with few tokens, where they are not known yet."""
    methods = [name for block in case.blocks for name in block if name not in WITHOUT_ERRORS]
    missing = [name for name in methods if (case.model.name, case.divergence, name) not in known.errors]
    few = replace(case, tokens=few_tokens(settings), trainable_head=True)
    # Of those with options, each has a reference of its own.
    for chosen in (
        [name for name in missing if name not in (SOFTCAP, EVERY_OPTION)],
        *([name] for name in missing if name in (SOFTCAP, EVERY_OPTION)),
    ):
        if chosen:
            try:
                found = errors_of(few, chosen, settings.device)
            except Exception as error:  # told in the report; the others go on
                found = {name: {"broken": described(error)} for name in chosen}
            known.errors |= {(case.model.name, case.divergence, name): errors for name, errors in found.items()}
            release(settings.device)


def errors_of(case: Case, methods: list[str], device: str) -> dict[str, dict[str, Any]]:
    """Of methods that have a reference in common."""
    inputs = inputs_of(case, device, ERROR_SEED)
    expected = reference(inputs, case.divergence, options_of(methods[0], inputs, case.model))
    found: dict[str, dict[str, Any]] = {}
    for name in methods:
        inputs.clear()
        try:
            loss = prepare(name, [inputs], case, device)(inputs, case.divergence)
            hidden, weight = inputs.student_hidden.grad, inputs.student_weight.grad
            assert hidden is not None and weight is not None
            found[name] = dict(
                zip(("loss", "hidden", "weight"), map(relative_error, (loss, hidden, weight), expected), strict=True)
            )
            del loss, hidden, weight
        except Exception as error:  # told in the report; the others go on
            found[name] = {"broken": described(error)}
        if "broken" in found[name]:
            release(device, thorough=True)
    return found


def comparisons(rows: list[Row]) -> Iterator[tuple[int, Row]]:
    """The rows with times, each with the number of its comparison among those of the same case: a case is measured
    again beside other methods, and then has a row of ours again."""
    met: Counter[tuple[str, str]] = Counter()
    for row in rows:
        if "ms" in row:
            met[row["case"], row["method"]] += 1
            number = max(met[row["case"], method] for method in (row["method"], OURS))
            yield number, row


def table(rows: list[Row]) -> str:
    columns = [
        ("model", "model", ""),
        ("tokens", "tokens", ""),
        ("head", "head", ""),
        ("divergence", "divergence", ""),
        ("comparison", "comparison", ""),
        ("method", "method", ""),
        ("ms", "ms", ".3f"),
        ("first call s", "first_call_s", ".2f"),
        ("needed TFLOP/s", "tflops", ".0f"),
        ("share of floor", "floor_share", ".2f"),
        ("GB/s (ledger)", "gb_per_s", ".0f"),
        ("MiB", "peak_mib", ".0f"),
        ("MiB (ledger)", "ledger_mib", ".0f"),
        ("ms predicted", "predicted_ms", ".3f"),
        ("measured/predicted", "measured_over_predicted", ".2f"),
        ("ours/this", "ours_over_this", ".3f"),
        ("loss error", "error_loss", ".1e"),
        ("hidden error", "error_hidden", ".1e"),
        ("weight error", "error_weight", ".1e"),
    ]
    numbered = [{**row, "comparison": number} for number, row in comparisons(rows)]
    few = sorted({row.get("errors_tokens", FEW) for row in numbered}) or [FEW]  # older reports had no toys' number
    head = (
        "The loss and its gradients in bfloat16. Methods of one comparison ran together, on the same inputs; a case "
        "that was measured again, beside other methods, has a comparison with the next number. ms: median of a call, "
        "forward and backward; first call s: seconds of the first one, which compiles; needed TFLOP/s: operations of "
        "the products that any exact method needs (four, three with a frozen head), over the time; share of floor: "
        "the time of the faster bare products (float32 logits, the head's gradient added in float32) over this; GB/s: "
        "bytes that the ledger counts, over the time; MiB: the most memory above inputs and gradients, as measured "
        "and by the ledger; ms predicted: by the roofline, for this card; ours/this: our time in the same comparison "
        "over this one; errors: "
        f"‖actual − expected‖ / ‖expected‖ against float64, with {' or '.join(map(str, few))} tokens.\n\n"
    )
    waits = [
        f"The first call of ours took {row['first_call_s']:.1f} s, the second {row['second_call_s']:.3f} s.\n\n"
        for row in rows
        if "second_call_s" in row
    ]
    unknown = {(row["model"], row["divergence"], row["method"]): row.get("errors_broken") for row in numbered}
    lines = [f"\n\nNo errors of {', '.join(of)}: {reason}" for of, reason in unknown.items() if reason]
    return head + "".join(waits) + markdown(numbered, columns) + "".join(lines) + notes(rows)


def draw(rows: list[Row], path: Path) -> None:
    """Milliseconds by method for each model, a panel for each head; a line where the bare products are. A model that
    was measured again, beside other methods, has another group, with the comparison's number."""
    timed = [(number, row) for number, row in comparisons(rows) if row["divergence"] == "reverse_kl"]
    if not timed:
        return
    tokens = timed[0][1]["tokens"]
    labelled = [
        {**row, "label": row["model"] + (f"\n({number})" if number > 1 else "")}
        for number, row in timed
        if row["tokens"] == tokens
    ]
    models = list(dict.fromkeys(row["model"] for row in labelled))
    labelled.sort(key=lambda row: models.index(row["model"]))  # its comparisons stay in their order
    drawn = (OURS, EVERY_OPTION, "TRL", "Liger Triton", "Liger eager", "Liger compiled", PLAIN)
    methods = [name for name in drawn if any(row["method"] == name for row in labelled)]
    with plots.panels(path, 1, 2, (15, 4.5), sharey=True) as axes:
        for axis, head in zip(axes[0], ("trainable", "frozen"), strict=True):
            here = [row for row in labelled if row["head"] == head]
            labels = list(dict.fromkeys(row["label"] for row in here))
            plots.bars(axis, labels, {m: {r["label"]: r["ms"] for r in here if r["method"] == m} for m in methods})
            for place, label in enumerate(labels):
                floors = [row["ms"] for row in here if row["label"] == label and row["method"] in FLOORS]
                if floors:
                    axis.hlines(min(floors), place - 0.45, place + 0.45, color="black", linewidth=1)
            axis.set_title(f"{head} head, {tokens} tokens; (2), (3): measured again, beside other methods")
            axis.tick_params("x", rotation=15)
        axes[0][0].set_ylabel("ms (line: bare products)")
