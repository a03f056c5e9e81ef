"""Machines and models that are not at hand: rows of data sheets and dimensions, and the roofline that follows.

A step is its ops one after the other, each max(bytes / bandwidth, FLOPs / peak) at the shares of the data sheet's
numbers that are stated, plus an overhead per step. ``docs/performance.md`` has the formulas; ranks enter as Punica's
SGMV pays for them. Nothing is fitted: for a machine at hand, ``pomona profile`` is better.
"""

from dataclasses import dataclass

from pomona.core.errors import ConfigError
from pomona.sim.step_work import StepWork

GB = 1e9


@dataclass(frozen=True, slots=True)
class Machine:
    """One device as its data sheet has it, and what share of that is reached.

    Raises:
        ConfigError: a value is not positive, or a share not in (0, 1].
    """

    name: str
    flops_per_s: float
    """Dense bf16, without sparsity."""
    bytes_per_s: float
    """Of its memory."""
    memory_bytes: float
    link_bytes_per_s: float
    """From host memory, one direction."""
    compute_share: float = 0.7
    """What large matrix products reach of the peak."""
    memory_share: float = 0.8
    """What reading weights and KV reaches of the bandwidth."""
    step_s: float = 1e-3
    """Scheduling, input preparation, launches, sampling."""
    load_s: float = 1e-3
    """Of every adapter copied, besides its bytes."""

    def __post_init__(self) -> None:
        """Check every range once."""
        for name in ("flops_per_s", "bytes_per_s", "memory_bytes", "link_bytes_per_s"):
            if not getattr(self, name) > 0.0:
                raise ConfigError(f"{name} is {getattr(self, name)}: must be positive")
        for name in ("compute_share", "memory_share"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} is {getattr(self, name)}: must be in (0, 1]")
        for name in ("step_s", "load_s"):
            if not getattr(self, name) >= 0.0:
                raise ConfigError(f"{name} is {getattr(self, name)}: must be at least 0")


MACHINES = {
    machine.name: machine
    for machine in (
        Machine("A100", 312e12, 2039 * GB, 80 * GB, 25 * GB),  # A100 80 GB SXM
        Machine("H100", 989e12, 3350 * GB, 80 * GB, 50 * GB),  # H100 SXM
        Machine("H200", 989e12, 4800 * GB, 141 * GB, 50 * GB),  # H200 SXM
        Machine("L40S", 362e12, 864 * GB, 48 * GB, 25 * GB),
        # Two cores of an EPYC with AVX-512 bf16, as `pomona bench ceilings` found them: no data sheet, so no shares.
        Machine("cpu-2-cores", 0.9e12, 50 * GB, 24 * GB, 10 * GB, compute_share=1.0, memory_share=1.0, step_s=2e-4),
    )
}
"""NVIDIA's data sheets; links are PCIe 4 and 5, 16 lanes, at some 80 % of nominal."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Dimensions of a Llama-like decoder."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    q_size: int
    """Width of all query heads together."""
    kv_size: int
    """Width of all key (or value) heads together."""
    vocab_size: int
    is_tied: bool = False
    weight_bytes: float = 2.0
    """Per number, of weights, adapters, keys and values."""

    @property
    def fans(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of a layer's seven projections."""
        hidden, wide = self.hidden_size, self.intermediate_size
        attention = ((hidden, self.q_size), (hidden, self.kv_size), (hidden, self.kv_size), (self.q_size, hidden))
        return (*attention, (hidden, wide), (hidden, wide), (wide, hidden))

    @property
    def num_layer_weights(self) -> int:
        """Numbers in all layers' projections."""
        return self.num_layers * sum(fan_in * fan_out for fan_in, fan_out in self.fans)

    @property
    def num_head_weights(self) -> int:
        """Numbers in the output layer."""
        return self.hidden_size * self.vocab_size

    @property
    def num_rank_row_weights(self) -> int:
        """Numbers in one rank of an adapter of all projections of all layers."""
        return self.num_layers * sum(fan_in + fan_out for fan_in, fan_out in self.fans)

    @property
    def model_bytes(self) -> float:
        """All weights."""
        num_embeddings = 1 if self.is_tied else 2
        return self.weight_bytes * (self.num_layer_weights + num_embeddings * self.num_head_weights)

    @property
    def kv_token_bytes(self) -> float:
        """Keys and values of one token."""
        return 2 * self.num_layers * self.kv_size * self.weight_bytes

    def page_bytes(self, rows_per_page: int) -> float:
        """One adapter page."""
        return rows_per_page * self.num_rank_row_weights * self.weight_bytes


MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("llama-3.1-8b", 4096, 14336, 32, 4096, 1024, 128256),
        ModelShape("llama-3.1-70b", 8192, 28672, 80, 8192, 1024, 128256),
        ModelShape("llama-2-7b", 4096, 11008, 32, 4096, 4096, 32000),
        ModelShape("qwen2.5-0.5b", 896, 4864, 24, 896, 128, 151936, is_tied=True),
        ModelShape("smollm2-135m", 576, 1536, 30, 576, 192, 49152, is_tied=True),
    )
}


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How a device's memory is divided."""

    num_kv_blocks: int
    num_adapter_pages: int


def plan_memory(
    machine: Machine,
    model: ModelShape,
    *,
    num_devices: int = 1,
    block_size: int = 16,
    rows_per_page: int = 4,
    adapter_share: float = 0.2,
    memory_fraction: float = 0.9,
) -> MemoryPlan:
    """Divide what the weights leave: ``adapter_share`` of it for adapter pages, the rest for KV blocks.

    Raises:
        ConfigError: the model does not fit, or nothing is left.
    """
    left = memory_fraction * num_devices * machine.memory_bytes - model.model_bytes
    num_pages = int(max(left, 0.0) * adapter_share / model.page_bytes(rows_per_page))
    num_blocks = int(max(left, 0.0) * (1.0 - adapter_share) / (block_size * model.kv_token_bytes))
    if num_blocks < 1:
        raise ConfigError(
            f"{model.name} needs {model.model_bytes / GB:.0f} GB of weights: {num_devices} x {machine.name} has "
            f"{num_devices * machine.memory_bytes / GB:.0f} GB"
        )
    return MemoryPlan(num_blocks, num_pages)


@dataclass(frozen=True, slots=True)
class RooflineCost:
    """A CostModel: ops one after the other, each bound by computing or by memory.

    With several devices (tensor parallelism) work and bytes divide evenly, and each layer's two sums over devices cost
    ``all_reduce_s``.
    """

    machine: Machine
    model: ModelShape
    rows_per_page: int = 4
    num_devices: int = 1
    all_reduce_s: float = 2e-5

    def seconds(self, work: StepWork) -> float:
        """See ``CostModel``; nothing for a plan that only says what to forget."""
        if not work.num_rows:
            return 0.0
        machine, model = self.machine, self.model
        size = model.weight_bytes
        total = (
            self._op(2.0 * work.num_rows * model.num_layer_weights, size * model.num_layer_weights)
            + self._attention(work)
            + self.adapters_s(work)
            + machine.step_s
        )
        if work.num_sampled:
            total += self._op(2.0 * work.num_sampled * model.num_head_weights, size * model.num_head_weights)
        if self.num_devices > 1:
            total += 2 * model.num_layers * self.all_reduce_s
        return total

    def adapters_s(self, work: StepWork) -> float:
        """Their part of the step: products of their own ranks, and copies."""
        machine, model = self.machine, self.model
        loaded_bytes = work.num_loaded_pages * model.page_bytes(self.rows_per_page)
        products_s = self._op(
            2.0 * work.sum_row_ranks * model.num_rank_row_weights,
            model.weight_bytes * work.sum_adapter_ranks * model.num_rank_row_weights,
        )
        copies_s = work.num_loads * machine.load_s + loaded_bytes / machine.link_bytes_per_s / self.num_devices
        return products_s + copies_s

    def _attention(self, work: StepWork) -> float:
        model = self.model
        flops = 4.0 * model.num_layers * model.q_size
        return self._op(flops * work.num_decode_kv_tokens, model.kv_token_bytes * work.num_decode_kv_tokens) + self._op(
            flops * work.num_prefill_pairs, model.kv_token_bytes * work.num_prefill_kv_tokens
        )

    def _op(self, flops: float, num_bytes: float) -> float:
        machine = self.machine
        compute_s = flops / (machine.flops_per_s * machine.compute_share)
        memory_s = num_bytes / (machine.bytes_per_s * machine.memory_share)
        return max(compute_s, memory_s) / self.num_devices
