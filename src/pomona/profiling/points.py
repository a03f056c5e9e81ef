"""Points: the batches a profile may measure, as numbers; which of them are worth it is ``profiling.design``'s question.

A point is what an engine can be brought to do in one step: sequences that decode at some context, prompts that are
computed beside them, and the adapters of both.
"""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from pomona.core.adapter import AdapterInfo
from pomona.core.errors import ConfigError
from pomona.core.ids import PageId, RequestId
from pomona.core.plan import AdapterLoad, ScheduledSeq, SeqStart, StepPlan
from pomona.core.request import SamplingParams
from pomona.sched.config import SchedulerConfig
from pomona.sim.step_work import StepWork, WorkMeter

NUM_FIRST_STEPS = 3
"""Decode steps after prompts that may take longer than those that follow."""
NUM_DECODE_STEPS = 10
"""Decode steps timed at a point after those; the context grows by one in each."""
NUM_PROMPT_STEPS = 3
"""Steps with prompts timed at a point: shorter ones, then the point's own."""
_SAMPLING = SamplingParams()


@dataclass(frozen=True, slots=True)
class Point:
    """One batch."""

    num_decodes: int
    num_context_tokens: int
    """Of each decoding sequence when the point is reached."""
    num_prompts: int
    num_prompt_tokens: int
    """Of each prompt."""
    adapters: tuple[AdapterInfo, ...] = ()
    """Sequences take these in turn, decodes and prompts apart; none: the base model."""
    is_cold: bool = False
    """The prompts' adapters are copied to the device in the step."""

    def adapter_of(self, index: int) -> AdapterInfo | None:
        """Adapter of the index-th decode, or prompt."""
        return self.adapters[index % len(self.adapters)] if self.adapters else None

    def num_output_tokens(self, max_num_batched_tokens: int) -> int:
        """Tokens a decoding sequence may have yielded by the end: while the others get to their context, and in the
        steps that are timed."""
        num_reach_steps = 2 * -(-self.num_decodes * self.num_context_tokens // max_num_batched_tokens)
        num_decode_steps = NUM_FIRST_STEPS + NUM_DECODE_STEPS
        return num_reach_steps + num_decode_steps + (1 + NUM_FIRST_STEPS) * NUM_PROMPT_STEPS + 5

    def work(self) -> StepWork:
        """What the step with decodes and prompts has to do."""
        decodes = [
            _scheduled(f"d{index}", self.num_context_tokens, 1, self.adapter_of(index))
            for index in range(self.num_decodes)
        ]
        prompts = [
            _scheduled(f"p{index}", 0, self.num_prompt_tokens, self.adapter_of(index))
            for index in range(self.num_prompts)
        ]
        cold = self.adapters[: self.num_prompts] if self.is_cold else ()
        loads = tuple(AdapterLoad(info.adapter_id, (PageId(0),) * info.num_pages) for info in cold)
        with_extras = {info.adapter_id for info in self.adapters if info.has_extras}
        meter = WorkMeter({info.adapter_id: info.lora_rank for info in self.adapters}, with_extras)
        return meter.measure(StepPlan(1, (*decodes, *prompts), adapter_loads=loads))

    def works(self) -> list[StepWork]:
        """Of every step it takes: reaching the context, decoding, and decoding beside the prompts."""
        decode = Point(self.num_decodes, self.num_context_tokens, 0, 0, self.adapters).work()
        reach = Point(0, 0, self.num_decodes, self.num_context_tokens, self.adapters).work()
        if not self.num_decodes:
            return [self.work()] * NUM_PROMPT_STEPS
        steps = [reach, *[decode] * (NUM_FIRST_STEPS + NUM_DECODE_STEPS)]
        return steps + [*[decode] * NUM_FIRST_STEPS, self.work()] * (NUM_PROMPT_STEPS if self.num_prompts else 0)


def _scheduled(name: str, num_computed: int, num_new: int, adapter: AdapterInfo | None) -> ScheduledSeq:
    start = SeqStart((), 0, _SAMPLING, None if adapter is None else adapter.adapter_id)
    return ScheduledSeq(RequestId(name), num_computed, num_new, is_sampled=True, start=start)


def candidates(
    config: SchedulerConfig, adapters: Sequence[AdapterInfo], num_points: int = 400, seed: int = 0
) -> list[Point]:
    """Points that the engine can reach, drawn evenly over the orders of magnitude of every size.

    Drawn and not from a grid, because kernels like powers of two better than what requests are made of.

    Args:
        config: limits of the engine.
        adapters: those registered.
        num_points: how many to draw.
        seed: of the drawing.
    """
    chance = random.Random(seed)
    groups = adapter_groups(adapters, config.num_adapter_pages)
    points: dict[Point, None] = {}
    for _ in range(20 * num_points):
        if len(points) == num_points:
            break
        point = _draw(config, adapters, groups, chance)
        if _fits(point, config):
            points[point] = None
    return list(points)


def _draw(
    config: SchedulerConfig,
    registered: Sequence[AdapterInfo],
    groups: Sequence[tuple[AdapterInfo, ...]],
    chance: random.Random,
) -> Point:
    kind = chance.choice(("decodes", "prompts", "both"))
    num_decodes = _log_uniform(chance, 1, config.max_num_seqs) if kind != "prompts" else 0
    context = _log_uniform(chance, 16, config.max_model_len) if num_decodes else 0
    num_prompts = _log_uniform(chance, 1, 32) if kind != "decodes" else 0
    num_prompt_tokens = _log_uniform(chance, 16, config.max_num_batched_tokens) // num_prompts + 2 if num_prompts else 0
    adapters = chance.choice(groups)
    if registered and chance.random() < 0.5:  # any, as requests bring them
        num_adapters = _log_uniform(chance, 1, min(len(registered), max(num_decodes, num_prompts)))
        adapters = _first_that_fit(chance.sample(registered, num_adapters), config.num_adapter_pages)
    is_cold = bool(adapters) and kind == "prompts" and chance.random() < 0.3
    return Point(num_decodes, context, num_prompts, num_prompt_tokens, adapters, is_cold)


def _log_uniform(chance: random.Random, low: int, high: int) -> int:
    return round(math.exp(chance.uniform(math.log(low), math.log(high))))


def adapter_groups(adapters: Sequence[AdapterInfo], num_pages: int) -> list[tuple[AdapterInfo, ...]]:
    """Choices of adapters for a batch: none; one, some or all of equal rank, for the smallest and the largest rank; a
    mixture; one with extras (more than low-rank parts), and all. Only what fits ``num_pages`` together."""
    plain = sorted((info for info in adapters if not info.has_extras), key=lambda info: info.lora_rank)
    extra = [info for info in adapters if info.has_extras]
    ranks = sorted({info.lora_rank for info in plain})
    groups: dict[tuple[AdapterInfo, ...], None] = {(): None}
    for lora_rank in ranks[:1] + ranks[-1:]:
        alike = tuple(info for info in plain if info.lora_rank == lora_rank)
        for count in (1, 4, 16, len(alike)):
            groups[alike[:count]] = None
    for count in (4, 16, len(plain)):
        step = max(1, len(plain) // count) if count else 1
        groups[tuple(plain[::step][:count])] = None
    for some in (extra[:1], extra, [*plain[:2], *extra[:1]], [*plain, *extra]) if extra else ():
        groups[tuple(some)] = None
    return list(dict.fromkeys(_first_that_fit(group, num_pages) for group in groups))


def _first_that_fit(group: Sequence[AdapterInfo], num_pages: int) -> tuple[AdapterInfo, ...]:
    ends = itertools.accumulate(info.num_pages for info in group)
    return tuple(group)[: sum(end <= num_pages for end in ends)]


def _fits(point: Point, config: SchedulerConfig) -> bool:
    num_new = point.num_decodes + point.num_prompts * point.num_prompt_tokens
    decode_end = point.num_context_tokens + point.num_output_tokens(config.max_num_batched_tokens)
    seqs = [decode_end] * point.num_decodes + [point.num_prompt_tokens + 1] * point.num_prompts
    num_blocks = sum(-(-tokens // config.block_size) for tokens in seqs)
    return (
        0 < num_new <= config.max_num_batched_tokens
        and len(seqs) <= config.max_num_seqs
        and max(seqs) < config.max_model_len
        and num_blocks + config.reserve_steps * len(seqs) // config.block_size + 1 < config.num_kv_blocks
        and (not point.adapters or len(point.adapters) <= max(point.num_decodes, point.num_prompts))
    )


def seeds(config: SchedulerConfig) -> list[Point]:
    """Points to begin with, so that there is something to predict the others by: the least decode, the largest batch
    of decodes, and as many prompt tokens as a step takes; all of the base model.

    Raises:
        ConfigError: not even one sequence has room to decode for as many steps as are timed.
    """
    context = min(32, config.max_model_len // 2)
    num_decodes = config.max_num_seqs
    while num_decodes and not _fits(Point(num_decodes, context, 0, 0), config):
        num_decodes -= 1
    if not num_decodes:
        num_needed = context + Point(1, context, 0, 0).num_output_tokens(config.max_num_batched_tokens)
        raise ConfigError(
            f"max_model_len is {config.max_model_len}, the KV cache has {config.num_kv_blocks} blocks of "
            f"{config.block_size} tokens: too small to profile, which takes a sequence of more than {num_needed} tokens"
        )
    num_tokens = min(config.max_num_batched_tokens, config.max_model_len - 2)
    while not _fits(Point(0, 0, 1, num_tokens), config):
        num_tokens //= 2
    return [Point(1, context, 0, 0), Point(num_decodes, context, 0, 0), Point(0, 0, 1, num_tokens)]
