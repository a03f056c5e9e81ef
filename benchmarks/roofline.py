"""What a step must compute and move, as formulas, and the time below which no implementation can stay on a machine.

FLOPs count a multiply-add as two. Bytes are those that must come from or go to memory once per step: base weights,
adapter weights, keys and values. Activations pass between ops through caches and are counted apart. Elementwise work
(norms, rotary embedding, SiLU, softmax) is left out: it is below one percent of the FLOPs. Standard library only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.shapes import ModelShape


@dataclass(frozen=True, slots=True)
class Cost:
    """Work of an op or a step."""

    flops: float = 0.0
    bytes: float = 0.0
    """To and from memory, each once."""
    activation_bytes: float = 0.0
    """Inputs read and outputs written that a cache may hold; no part of the floor of a step."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.activation_bytes + other.activation_bytes)

    def __sub__(self, other: "Cost") -> "Cost":
        return self + -1 * other

    def __rmul__(self, factor: float) -> "Cost":
        return Cost(factor * self.flops, factor * self.bytes, factor * self.activation_bytes)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a machine can do at most, as measured."""

    flops_per_s: float
    bytes_per_s: float

    def floor_s(self, cost: Cost) -> float:
        """Seconds that ``cost`` takes at least, computing and moving at the same time without loss."""
        return max(cost.flops / self.flops_per_s, cost.bytes / self.bytes_per_s)

    def bound(self, cost: Cost) -> str:
        """Which of the two sets the floor."""
        return "compute" if cost.flops / self.flops_per_s > cost.bytes / self.bytes_per_s else "memory"


@dataclass(frozen=True, slots=True)
class ElementBytes:
    """Bytes per number."""

    matrix: float = 2.0
    """Weights of projections, of lm_head, and of an embedding tied to it."""
    scale: float = 0.0
    """Per output of a matrix, if it is quantized."""
    weight: float = 2.0
    """Norms, biases, an embedding of its own."""
    adapter: float = 2.0
    kv: float = 2.0
    activation: float = 2.0
    logit: float = 4.0


BF16 = ElementBytes()
INT8 = ElementBytes(matrix=1.0, scale=4.0)
"""Matrices in int8 with a float32 scale per output, everything else in bfloat16."""


@dataclass(frozen=True, slots=True)
class SequenceWork:
    """One sequence's part of a step."""

    num_new_tokens: int
    num_context_tokens: int
    """Tokens with keys and values after the step, the new ones included."""
    adapter: int | None = None
    is_sampled: bool = True


def dense_cost(num_rows: int, in_features: int, out_features: int, size: ElementBytes = BF16) -> Cost:
    """y = x W^T: ``2 rows in out`` FLOPs; the weight moves once whatever the rows."""
    return Cost(
        flops=2.0 * num_rows * in_features * out_features,
        bytes=in_features * out_features * size.matrix + out_features * size.scale,
        activation_bytes=num_rows * (in_features + out_features) * size.activation,
    )


def lora_cost(
    segments: Sequence[tuple[int, int]], in_features: int, out_features: int, size: ElementBytes = BF16
) -> Cost:
    """y += s (x A^T) B^T for segments (rows, rank), one per distinct adapter.

    ``2 rows rank (in + out)`` FLOPs each; each adapter's ``rank (in + out)`` weights move once. Rows without an adapter
    are in no segment and cost nothing. y is read and written.
    """
    fan = in_features + out_features
    return Cost(
        flops=sum(2.0 * num_rows * rank * fan for num_rows, rank in segments),
        bytes=sum(rank * fan * size.adapter for _, rank in segments),
        activation_bytes=sum(num_rows * (in_features + 2 * out_features) for num_rows, _ in segments) * size.activation,
    )


def attended_pairs(num_new_tokens: int, num_context_tokens: int) -> int:
    """(query, key) pairs of causal attention: the last token sees the whole context, each earlier one a key less."""
    return num_new_tokens * num_context_tokens - num_new_tokens * (num_new_tokens - 1) // 2


def attention_cost(shape: ModelShape, sequences: Sequence[SequenceWork], size: ElementBytes = BF16) -> Cost:
    """One layer's attention: ``4 heads head_dim`` FLOPs per pair; keys and values of earlier tokens are read once and
    those of new tokens written once, ``2 kv_heads head_dim`` numbers per token."""
    pairs = sum(attended_pairs(work.num_new_tokens, work.num_context_tokens) for work in sequences)
    num_new = sum(work.num_new_tokens for work in sequences)
    return Cost(
        flops=4.0 * shape.q_size * pairs,
        bytes=2.0 * shape.kv_size * size.kv * sum(work.num_context_tokens for work in sequences),
        activation_bytes=2.0 * num_new * shape.q_size * size.activation,
    )


def segments_of(sequences: Sequence[SequenceWork], ranks: Sequence[int]) -> list[tuple[int, int]]:
    """(rows, rank) of each distinct adapter among ``sequences``; ``ranks[k]`` is adapter k's."""
    rows: dict[int, int] = {}
    for work in sequences:
        if work.adapter is not None:
            rows[work.adapter] = rows.get(work.adapter, 0) + work.num_new_tokens
    return [(num_rows, ranks[adapter]) for adapter, num_rows in rows.items()]


def step_costs(
    shape: ModelShape, sequences: Sequence[SequenceWork], ranks: Sequence[int] = (), size: ElementBytes = BF16
) -> dict[str, Cost]:
    """A step's work by op, over all layers.

    Args:
        shape: the model.
        sequences: who is in the batch.
        ranks: lora rank of each adapter that a sequence may name; all seven projections are adapted.
        size: bytes per number.

    Returns:
        embedding, norms, linear, attention, lora, lm_head.
    """
    num_rows = sum(work.num_new_tokens for work in sequences)
    num_sampled = sum(work.is_sampled for work in sequences)
    num_norms = 2 * shape.num_layers + 1
    targets = list(shape.targets.values())
    segments = segments_of(sequences, ranks)
    num_biases = shape.q_size + 2 * shape.kv_size if shape.has_qkv_bias else 0
    linear = sum((dense_cost(num_rows, *fans, size) for fans in targets), Cost(bytes=num_biases * size.weight))
    lora = sum((lora_cost(segments, *fans, size) for fans in targets), Cost())
    head = dense_cost(num_sampled, shape.hidden_size, shape.vocab_size, size)
    row_bytes = num_rows * shape.hidden_size
    return {
        "embedding": Cost(
            bytes=row_bytes * (size.matrix if shape.is_tied else size.weight),
            activation_bytes=row_bytes * size.activation,
        ),
        "norms": Cost(
            bytes=num_norms * shape.hidden_size * size.weight,
            activation_bytes=4.0 * num_norms * row_bytes * size.activation,
        ),
        "linear": shape.num_layers * linear,
        "attention": shape.num_layers * attention_cost(shape, sequences, size),
        "lora": shape.num_layers * lora,
        "lm_head": replace(head, activation_bytes=num_sampled * shape.vocab_size * size.logit)
        if num_sampled
        else Cost(),
    }


def step_cost(
    shape: ModelShape, sequences: Sequence[SequenceWork], ranks: Sequence[int] = (), size: ElementBytes = BF16
) -> Cost:
    """The sum of ``step_costs``."""
    return sum(step_costs(shape, sequences, ranks, size).values(), Cost())


def op_by_op_floor_s(costs: dict[str, Cost], ceilings: Ceilings) -> float:
    """Floor when ops run one after the other: one that computes cannot hide one that moves."""
    return sum(ceilings.floor_s(cost) for cost in costs.values())


@dataclass(frozen=True, slots=True)
class Job:
    """Requests that all arrive at once, with prompts and outputs of one length."""

    num_prompt_tokens: int
    num_output_tokens: int
    adapters: tuple[int | None, ...]
    """One per request."""
    ranks: tuple[int, ...] = ()
    max_num_batched_tokens: int = 2048


def job_steps(job: Job) -> list[list[SequenceWork]]:
    """The job's steps: prompts in chunks under the token budget, then decodes of all requests together.

    A simple schedule that no engine must follow; it reads the base's weights as rarely as the budget allows.
    """
    steps: list[list[SequenceWork]] = [[]]
    room = job.max_num_batched_tokens
    for adapter in job.adapters:
        num_done = 0
        while num_done < job.num_prompt_tokens:
            if room == 0:
                steps.append([])
                room = job.max_num_batched_tokens
            take = min(room, job.num_prompt_tokens - num_done)
            num_done += take
            room -= take
            is_last = num_done == job.num_prompt_tokens
            steps[-1].append(SequenceWork(take, num_done, adapter, is_sampled=is_last))
    for num_output in range(1, job.num_output_tokens):
        context = job.num_prompt_tokens + num_output
        steps.append([SequenceWork(1, context, adapter) for adapter in job.adapters])
    return steps


def job_floor_s(shape: ModelShape, job: Job, ceilings: Ceilings, size: ElementBytes = BF16) -> float:
    """Seconds that the whole job takes at least."""
    return sum(ceilings.floor_s(step_cost(shape, step, job.ranks, size)) for step in job_steps(job))


def job_cost(shape: ModelShape, job: Job, size: ElementBytes = BF16) -> Cost:
    """Work of the whole job."""
    return sum((step_cost(shape, step, job.ranks, size) for step in job_steps(job)), Cost())
