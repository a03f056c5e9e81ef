"""Points: the batches a profile may measure, as numbers; which of them are worth it is ``profiling.design``'s question.

A point is what an engine can be brought to do in one step: sequences that decode at some context, prompts that are
computed beside them, and the adapters of both.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pomona.core.adapter import AdapterInfo
from pomona.core.ids import PageId, RequestId
from pomona.core.plan import AdapterLoad, ScheduledSeq, SeqStart, StepPlan
from pomona.core.request import SamplingParams
from pomona.sched.config import SchedulerConfig
from pomona.sim.step_work import StepWork, WorkMeter

NUM_DECODE_STEPS = 5
"""Decode steps timed at a point; the context grows by one in each."""
NUM_PROMPT_STEPS = 3
"""Steps with the point's prompts timed at a point, each with new prompts."""
_SPARE_TOKENS = 4 + NUM_DECODE_STEPS + NUM_PROMPT_STEPS
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
        meter = WorkMeter({info.adapter_id: info.lora_rank for info in self.adapters})
        return meter.measure(StepPlan(1, (*decodes, *prompts), adapter_loads=loads))

    def works(self) -> list[StepWork]:
        """Of every step it takes: reaching the context, decoding, and decoding beside the prompts."""
        decode = Point(self.num_decodes, self.num_context_tokens, 0, 0, self.adapters).work()
        reach = Point(0, 0, self.num_decodes, self.num_context_tokens, self.adapters).work()
        steps = [reach, *[decode] * NUM_DECODE_STEPS] if self.num_decodes else []
        return steps + [self.work()] * (NUM_PROMPT_STEPS if self.num_prompts else 0)


def _scheduled(name: str, num_computed: int, num_new: int, adapter: AdapterInfo | None) -> ScheduledSeq:
    start = SeqStart((), 0, _SAMPLING, adapter and adapter.adapter_id)
    return ScheduledSeq(RequestId(name), num_computed, num_new, is_sampled=True, start=start)


def candidates(config: SchedulerConfig, adapters: Sequence[AdapterInfo]) -> list[Point]:
    """Every point that the engine can reach, on a grid of powers of two.

    Args:
        config: limits of the engine.
        adapters: those registered.
    """
    most = config.max_num_seqs
    contexts = [tokens for tokens in (32, 128, 512, 1024, 2048, 4096) if tokens + _SPARE_TOKENS < config.max_model_len]
    decodes = [0, *(2**exponent for exponent in range(9) if 2**exponent <= most)]
    prompt_shapes = [(0, 0), (1, 16), (1, 64), (4, 16), (1, 256), (4, 64), (16, 16), (1, 1024), (4, 256), (16, 64)]
    groups = adapter_groups(adapters, config.num_adapter_pages)
    points = []
    for num_decodes, context, (num_prompts, num_tokens), group in itertools.product(
        decodes, contexts, prompt_shapes, groups
    ):
        point = Point(num_decodes, context if num_decodes else 0, num_prompts, num_tokens, group)
        if _fits(point, config) and not (num_decodes == 0 and context != contexts[0]):
            points.append(point)
            if group and num_prompts and num_decodes == 0:
                points.append(Point(0, 0, num_prompts, num_tokens, group, is_cold=True))
    return points


def adapter_groups(adapters: Sequence[AdapterInfo], num_pages: int) -> list[tuple[AdapterInfo, ...]]:
    """Choices of adapters for a batch: none; one, some or all of equal rank, for the smallest and the largest rank; and
    all. Only what fits ``num_pages`` together."""
    by_rank = sorted(adapters, key=lambda info: info.lora_rank)
    ranks = sorted({info.lora_rank for info in by_rank})
    groups: dict[tuple[AdapterInfo, ...], None] = {(): None}
    for lora_rank in ranks[:1] + ranks[-1:]:
        alike = tuple(info for info in by_rank if info.lora_rank == lora_rank)
        for count in (1, 4, 16, len(alike)):
            groups[alike[:count]] = None
    for count in (4, 16, len(by_rank)):
        step = max(1, len(by_rank) // count)
        groups[tuple(by_rank[::step][:count])] = None
    return [group for group in groups if sum(info.num_pages for info in group) <= num_pages]


def _fits(point: Point, config: SchedulerConfig) -> bool:
    num_new = point.num_decodes + point.num_prompts * point.num_prompt_tokens
    seqs = [point.num_context_tokens] * point.num_decodes + [point.num_prompt_tokens] * point.num_prompts
    num_blocks = sum(-(-(tokens + _SPARE_TOKENS) // config.block_size) for tokens in seqs)
    return (
        0 < num_new <= config.max_num_batched_tokens
        and len(seqs) <= config.max_num_seqs
        and point.num_prompt_tokens + 1 < config.max_model_len
        and num_blocks + config.reserve_steps * len(seqs) // config.block_size + 1 < config.num_kv_blocks
        and (not point.adapters or len(point.adapters) <= max(point.num_decodes, point.num_prompts))
    )


def seeds(points: Sequence[Point]) -> Iterator[Point]:
    """Points to begin with, so that there is something to predict the others by: the least decode, the largest batch
    of decodes, and the longest prompts, all of the base model."""
    base = [point for point in points if not point.adapters]
    decode_only = [point for point in base if point.num_prompts == 0]
    prompt_only = [point for point in base if point.num_decodes == 0]
    yield min(decode_only, key=lambda point: (point.num_decodes, point.num_context_tokens))
    yield max(decode_only, key=lambda point: (point.num_decodes, -point.num_context_tokens))
    yield max(prompt_only, key=lambda point: point.num_prompt_tokens)
