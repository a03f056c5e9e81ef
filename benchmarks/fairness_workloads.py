"""Workloads that tell policies apart: those of the VTC paper (Sheng et al., OSDI 2024, section 5), and its Arena trace.

The trace is benchmarks/data/vtc-arena.csv: arrivals, clients and lengths of 1,500 requests of 27 clients of Chatbot
Arena, from Ying1123/VTC-artifact at 192c2e2 (fair_bench), Apache-2.0; reduced to four columns.
"""

import csv
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.results import ROOT
from pomona.core.ids import TenantId
from pomona.workload.spec import WorkloadRequest

ARENA_S = 600.0
ARENA = ROOT / "benchmarks" / "data" / "vtc-arena.csv"


@dataclass(frozen=True, slots=True)
class Client:
    """One tenant's requests."""

    name: str
    rate_per_s: float
    num_prompt: int = 256
    num_output: int = 256
    weight: float = 1.0
    is_poisson: bool = False
    on_off_s: float | None = None
    """So long on, so long off, from the start."""
    ramp_to: float | None = None
    """Rate at the end, if it changes evenly."""

    def arrivals(self, duration_s: float) -> Iterator[float]:
        """Ascending times."""
        rng = random.Random(self.name)
        time_s = 0.5 / self.rate_per_s
        while time_s < duration_s:
            if self.on_off_s is None or int(time_s / self.on_off_s) % 2 == 0:
                yield time_s
            share = time_s / duration_s
            rate = self.rate_per_s + (0.0 if self.ramp_to is None else share * (self.ramp_to - self.rate_per_s))
            time_s += rng.expovariate(rate) if self.is_poisson else 1.0 / rate


@dataclass(frozen=True, slots=True)
class FairnessWorkload:
    """Requests of several tenants."""

    name: str
    clients: tuple[Client, ...]
    duration_s: float = 600.0

    @property
    def weights(self) -> dict[TenantId, float]:
        """By tenant."""
        return {TenantId(client.name): client.weight for client in self.clients}

    def requests(self) -> list[WorkloadRequest]:
        """All of them, by arrival."""
        found = [
            WorkloadRequest(time_s, client.num_prompt, client.num_output, tenant_id=TenantId(client.name))
            for client in self.clients
            for time_s in client.arrivals(self.duration_s)
        ]
        return sorted(found, key=lambda request: request.arrival_s)


SYNTHETIC = (
    FairnessWorkload("overload", (Client("a", 1.5), Client("b", 3.0)), 360.0),
    FairnessWorkload(
        "overload-multi",
        (*(Client(f"slow{i}", 0.4) for i in range(3)), *(Client(f"fast{i}", 0.6) for i in range(5))),
    ),
    FairnessWorkload(
        "weighted",
        tuple(
            Client(name, rate, weight=weight)
            for name, rate, weight in (("w1", 0.8, 1.0), ("w2", 0.8, 2.0), ("w3", 1.2, 3.0), ("w4", 1.6, 4.0))
        ),
    ),
    FairnessWorkload("proportional", (Client("light", 0.25), Client("medium", 0.5), Client("heavy", 1.5))),
    FairnessWorkload("on-off", (Client("on-off", 0.5, on_off_s=60.0), Client("steady", 2.0))),
    FairnessWorkload("on-off-overload", (Client("on-off", 2.0, on_off_s=60.0), Client("steady", 3.0))),
    FairnessWorkload("ramp", (Client("steady", 0.5), Client("ramp", 0.2, ramp_to=2.0))),
    FairnessWorkload(
        "poisson-short-long",
        (Client("short", 8.0, 64, 64, is_poisson=True), Client("long", 1.5, is_poisson=True)),
    ),
    FairnessWorkload(
        "input-output",
        (Client("writer", 1.5, 32, 512, is_poisson=True), Client("reader", 3.0, 512, 32, is_poisson=True)),
    ),
)
"""All on a replica that serves about REPLICA_RPS requests of 256 + 256 tokens a second."""

REPLICA_RPS = 1.6
LIVE_SHORTER = 4
"""Live, prompts and outputs are so many times shorter."""
LIVE_S = 360.0
"""Live, so much of a workload's time is played at most: the length of the overload."""


def hastened(workload: FairnessWorkload, rate_per_s: float) -> FairnessWorkload:
    """A workload for an engine that serves so many requests of 64 + 64 tokens a second: all times are cut alike."""
    factor = rate_per_s / REPLICA_RPS
    clients = tuple(
        replace(
            client,
            rate_per_s=client.rate_per_s * factor,
            num_prompt=client.num_prompt // LIVE_SHORTER,
            num_output=client.num_output // LIVE_SHORTER,
            on_off_s=None if client.on_off_s is None else client.on_off_s / factor,
            ramp_to=None if client.ramp_to is None else client.ramp_to * factor,
        )
        for client in workload.clients
    )
    return FairnessWorkload(f"live {workload.name}", clients, min(LIVE_S, workload.duration_s) / factor)


def arena() -> list[WorkloadRequest]:
    """The Arena trace."""
    with ARENA.open(newline="") as file:
        return [
            WorkloadRequest(
                float(row["arrival_s"]),
                int(row["num_prompt_tokens"]),
                int(row["num_output_tokens"]),
                tenant_id=TenantId(f"client{row['client']}"),
            )
            for row in csv.DictReader(file)
        ]


def hastened_arena(rate_per_s: float) -> list[WorkloadRequest]:
    """The trace's beginning for an engine that serves so many requests of 64 + 64 tokens a second."""
    factor = rate_per_s / REPLICA_RPS
    return [
        replace(
            request,
            arrival_s=request.arrival_s / factor,
            num_prompt_tokens=-(-request.num_prompt_tokens // LIVE_SHORTER),
            num_output_tokens=-(-request.num_output_tokens // LIVE_SHORTER),
        )
        for request in arena()
        if request.arrival_s < LIVE_S
    ]
