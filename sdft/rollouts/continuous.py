"""transformers' continuous batching for a batch of rollouts: `generate_batch`, without its surprises.

Prompts are neither padded nor in step: each step of the model serves whatever prompts are still to be read and
whatever completions are still to be written, out of one cache of pages. `generate_batch` is a short loop around a
manager; the loop here differs in four things. The cache is as large as these requests need (by default it is 60 % of
a CPU's memory, whatever is asked for). All requests are there before the first step, so that which of them share a
step, and with it what is sampled, does not depend on how fast threads are. The run's own random numbers stay
undisturbed. And an error in the manager's thread ends the call instead of giving fewer results.

The cache of pages is of the weights' type, and so is the sampling, under mixed precision too: the autocast that
accelerate wraps around a model's forward pass is put aside.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList, PreTrainedModel

from sdft import _compat
from sdft.errors import TrainingError
from sdft.memory.exhausted import MemoryRanOut
from sdft.progress.counts import Watch
from sdft.rollouts.row_sampler import RowSampler

PAGE = {"cpu": 32, "cuda": 256}  # tokens in a page of the cache; flash attention takes multiples of 256
STEP_TOKENS = 512  # the most tokens in a step; without flash attention, rows of a mask as wide as the cache


def generate_continuously(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    processors: LogitsProcessorList,
    stopped: Callable[[list[int]], bool] | None = None,
    watch: Watch | None = None,
) -> list[list[int]]:
    """A completion for each prompt, up to and with its end-of-sequence token or `settings.max_new_tokens` long.

    A RowSampler among the processors draws for each prompt what it would in a batch with a row for each of them. Once
    `stopped` is true of a completion, the next token is the end of the sequence, where the settings have one. `watch`
    is told of whole completions only, and one that it leaves unwritten is empty.
    Raises TrainingError where the model or its attention cannot be served this way, or the cache finds no room.
    """
    if settings.eos_token_id is None:
        settings.eos_token_id = -1
    new_tokens = cast(int, settings.max_new_tokens)
    processors = LogitsProcessorList(processors)
    if stopped is not None and settings.eos_token_id != -1:
        processors.append(RequestStopper(stopped, cast(list[int], settings.eos_token_id)[0]))
    # A graph would repeat the draw that it was captured with; and a step prepared before the last one has been sampled
    # would tell the sampler of its own requests too early.
    in_turn = False if processors else None
    hints = _compat.WorkloadHints(max(map(len, prompts)), new_tokens, len(prompts))
    with _own_random_numbers(model.device) as seed, _own_attention(model), _own_forward(model), _no_warnings():
        try:
            manager = cast(Any, model).init_continuous_batching(
                settings, _configuration(model, prompts, new_tokens, seed, in_turn), workload_hints=hints
            )
        except (ValueError, AttributeError) as error:
            raise _refusal(model, error) from error
        names = manager.add_requests([list(prompt) for prompt in prompts])
        _process_with(manager, processors, names)
        manager.start()
        try:
            completions = _collect(model, manager, len(names), watch)
        finally:
            manager.stop(hard_stop=True)
            manager.destroy()
    return [completions.get(name, []) for name in names]


def _configuration(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], new_tokens: int, seed: int, in_turn: bool | None
) -> ContinuousBatchingConfig:
    page = PAGE["cuda" if model.device.type == "cuda" else "cpu"]
    pages = sum(-(-(len(prompt) + new_tokens) // page) + 1 for prompt in prompts)
    return _compat.batching_config(
        page_size=page,
        num_blocks=pages,
        max_batch_tokens=STEP_TOKENS,
        seed=seed,
        use_cuda_graph=in_turn,
        use_async_batching=in_turn,
        auto_switch_to_flash=model.dtype in (torch.float16, torch.bfloat16),  # flash attention takes no other
        disable_nccl_graph_mixing=False,  # the environment is not ours to change
    )


class RequestSampler(_compat.RequestProcessor):
    """A RowSampler whose rows are requests, named in the rows' order."""

    def __init__(self, sampler: RowSampler, names: Sequence[str]) -> None:
        super().__init__()
        self.sampler, self.numbers = sampler, {name: number for number, name in enumerate(names)}
        self.rows: list[int] = []

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        self.rows = [self.numbers[_compat.request_name(request)] for request in requests_with_new_token]
        return torch.tensor(self.rows, dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        drawn = self.sampler.draw(scores[: len(self.rows)], self.rows)
        # A prompt of which the step reads but a part has a row too, after those that get a token.
        return drawn if len(drawn) == len(scores) else torch.cat((drawn, scores[len(drawn) :]))


class RequestStopper(_compat.RequestProcessor):
    """Leaves nothing but the token `end` to a request whose completion has come to its end otherwise."""

    def __init__(self, stopped: Callable[[list[int]], bool], end: int) -> None:
        super().__init__()
        self.stopped, self.end = stopped, end

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        ended = [self.stopped(_compat.tokens_written(request)) for request in requests_with_new_token]
        return torch.tensor(ended, dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        others = torch.ones(scores.shape[1], dtype=torch.bool, device=scores.device)
        others[self.end] = False
        ended = tensor_arg[: len(scores), None].bool()
        return scores.masked_fill(ended & others, -torch.inf)


def _process_with(manager: Any, processors: LogitsProcessorList, names: Sequence[str]) -> None:
    """Have the manager use these processors, a RowSampler for its requests."""
    for processor in processors:
        own = RequestSampler(processor, names) if isinstance(processor, RowSampler) else processor
        _compat.add_processor(manager, own)


def _collect(model: PreTrainedModel, manager: Any, count: int, watch: Watch | None) -> dict[str, list[int]]:
    """The tokens of each request, by its name, as they come in."""
    completions: dict[str, list[int]] = {}

    def counted() -> tuple[int, int]:
        return sum(map(len, completions.values())), len(completions)

    while len(completions) < count and not (watch is not None and watch(counted)):
        result = manager.get_result(timeout=0.2)
        if result is None:
            if not manager.is_running():
                raise _refusal(model, _compat.fatal_error(manager))
        elif result.error is not None:
            raise _refusal(model, result.error)
        elif result.is_finished():
            completions[result.request_id] = list(result.generated_tokens)
    return completions


def _refusal(model: PreTrainedModel, reason: object) -> RuntimeError:
    if "probability tensor" in str(reason):
        return RuntimeError(str(reason))
    attention = _compat.attention_of(model)
    no_room = "emory" in str(reason)
    advice = "a smaller rollout_batch_size needs less" if no_room else "rollout_backend: generate may do"
    return (MemoryRanOut if no_room else TrainingError)(
        f"continuous batching of {type(model).__name__} with {attention} attention in {model.dtype} on "
        f"{model.device.type} failed: {reason} ({advice})"
    )


@contextlib.contextmanager
def _own_random_numbers(device: torch.device) -> Iterator[int]:
    """A seed drawn from the current generator, and that generator as it was: the manager seeds it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield int(torch.randint(2**31, ()))


@contextlib.contextmanager
def _own_attention(model: PreTrainedModel) -> Iterator[None]:
    """The model's attention implementation as it was, also where the manager fails between changing it and starting."""
    before = _compat.attention_of(model)
    try:
        yield
    finally:
        if _compat.attention_of(model) != before:
            model.set_attn_implementation(before)


@contextlib.contextmanager
def _own_forward(model: PreTrainedModel) -> Iterator[None]:
    """The forward pass without accelerate's autocast around it, and with it afterwards."""
    wrapped, own = vars(model).get("forward"), _compat.forward_without_autocast(model)
    if wrapped is None or own is None:
        yield
        return
    model.forward = own
    try:
        yield
    finally:
        model.forward = wrapped


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Silence for the manager's log: what it warns of each time is meant, and what it reports as errors is raised."""
    logger = logging.getLogger(_compat.BATCHING_LOGGER)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
