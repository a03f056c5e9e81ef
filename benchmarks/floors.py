"""The floors of docs/performance.md: formulas evaluated for the shapes of the comparison, under measured ceilings."""

from benchmarks import ceilings, tables, workload
from benchmarks.results import Row
from benchmarks.roofline import Ceilings, Job, SequenceWork, job_floor_s, op_by_op_floor_s, step_cost, step_costs
from benchmarks.shapes import QWEN25_05B, SMOLLM2_135M, ModelShape

_CONTEXT = 160
_RANKS = (workload.LORA_RANK,) * workload.NUM_ADAPTERS


def _sequences(batch: int, num_distinct: int) -> list[SequenceWork]:
    adapters = [index % num_distinct if num_distinct else None for index in range(batch)]
    return [SequenceWork(1, _CONTEXT, adapter) for adapter in adapters]


def decode_floors(shape: ModelShape, limits: Ceilings) -> str:
    """Decode steps by batch and distinct adapters."""
    lines = []
    for batch in (1, 8, 32):
        for num_distinct in (0, 1, batch) if batch > 1 else (0, 1):
            sequences = _sequences(batch, num_distinct)
            cost = step_cost(shape, sequences, _RANKS)
            lines.append(
                [
                    str(batch),
                    str(num_distinct),
                    f"{cost.bytes / 1e6:.0f}",
                    f"{cost.flops / 1e9:.2f}",
                    f"{1e3 * cost.bytes / limits.bytes_per_s:.2f}",
                    f"{1e3 * cost.flops / limits.flops_per_s:.2f}",
                    f"{1e3 * limits.floor_s(cost):.2f}",
                    f"{1e3 * op_by_op_floor_s(step_costs(shape, sequences, _RANKS), limits):.2f}",
                ]
            )
    header = ["batch", "adapters", "MB", "GFLOP", "moving, ms", "computing, ms", "floor, ms", "floor, op by op, ms"]
    return tables.table(header, lines)


def op_shares(shape: ModelShape, limits: Ceilings) -> str:
    """A decode step of 32 sequences with 32 adapters, op by op."""
    costs = step_costs(shape, _sequences(32, 32), _RANKS)
    lines = [
        [
            op,
            f"{cost.bytes / 1e6:.1f}",
            f"{cost.flops / 1e9:.3f}",
            f"{1e3 * limits.floor_s(cost):.2f}",
            limits.bound(cost),
        ]
        for op, cost in costs.items()
    ]
    return tables.table(["op", "MB", "GFLOP", "floor, ms", "bound by"], lines)


def job_floors(shape: ModelShape, limits: Ceilings) -> str:
    """The jobs of the comparison."""
    lines = []
    for cell in workload.cells():
        if cell.popularity == "idle":
            continue
        adapters = tuple(workload.assign(cell.popularity, cell.batch))
        seconds = job_floor_s(shape, Job(cell.num_prompt_tokens, cell.num_output_tokens, adapters, _RANKS), limits)
        tokens = cell.batch * cell.num_output_tokens
        lines.append([cell.name, f"{seconds:.2f}", f"{tokens / seconds:.0f}"])
    return tables.table(["job", "floor, s", "at most tok/s"], sorted(lines))


def floors_text(row: Row | None) -> str:
    """All floors under the ceilings of a row."""
    if row is None:
        return "No results yet.\n"
    limits = ceilings.from_row(row)
    parts = [
        f"With {limits.flops_per_s / 1e9:.0f} GFLOP/s and {limits.bytes_per_s / 1e9:.0f} GB/s; a context of {_CONTEXT} "
        f"tokens, adapters of rank {workload.LORA_RANK} on all seven projections.\n"
    ]
    for shape in (SMOLLM2_135M, QWEN25_05B):
        parts.append(
            f"{shape.name}, {shape.num_parameters / 1e6:.0f} million parameters; one decode step:\n\n"
            f"{decode_floors(shape, limits)}\nThe same step with 32 sequences and 32 adapters, op by op:\n\n"
            f"{op_shares(shape, limits)}\nWhole jobs:\n\n{job_floors(shape, limits)}"
        )
    return "\n".join(parts)
