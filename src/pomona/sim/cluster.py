"""ClusterSim: many replicas, a router, an autoscaler, losses and a workload on one event heap.

Every replica is the real engine with the real scheduler (``SimReplica``); router and autoscaler are the very objects
that a live cluster steps. The router knows what it sent and what has ended, and nothing else.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial

from pomona.core.errors import PomonaError
from pomona.core.ids import ReplicaId, RequestId, TenantId
from pomona.core.output import RequestOutput
from pomona.core.request import FinishReason, Request, SamplingParams
from pomona.router.fleet import Fleet
from pomona.router.punica import consolidation
from pomona.router.snapshot import RouteRequest
from pomona.sim.clock import EventHeap
from pomona.sim.cluster_config import ClusterConfig
from pomona.sim.executor import SimExecutor, hashed_token
from pomona.sim.fleet_size import FleetSize
from pomona.sim.ledger import Ending, FleetSample, Ledger, ReplicaRecord
from pomona.sim.population import AdapterPopulation
from pomona.sim.prompts import PromptSource, UniquePrompts
from pomona.sim.replica import SimReplica
from pomona.sim.step_work import StepWork
from pomona.workload.spec import WorkloadRequest


class _Live:
    """A request that has not ended."""

    __slots__ = ("num_delivered", "num_restarts", "number", "replica_id", "request_id", "route", "workload")

    def __init__(self, number: int, workload: WorkloadRequest, route: RouteRequest) -> None:
        self.number = number
        self.workload = workload
        self.route = route
        self.num_delivered = 0
        self.num_restarts = 0
        self.replica_id: ReplicaId | None = None
        self.request_id = RequestId("")


class _Member:
    """A replica of the cluster."""

    __slots__ = ("record", "replica")

    def __init__(self, record: ReplicaRecord, replica: SimReplica) -> None:
        self.record = record
        self.replica = replica


class ClusterSim:
    """One simulation; ``run`` it once.

    Args:
        config: the cluster.
        adapters: the adapters that the workload's indices mean.
        prompts: the token ids of prompts; by default no two prompts begin alike.
    """

    def __init__(self, config: ClusterConfig, adapters: AdapterPopulation, prompts: PromptSource | None = None) -> None:
        self.config = config
        self.heap = EventHeap()
        self.ledger = Ledger()
        self.samples: list[FleetSample] = []
        self.service: dict[TenantId, float] = {}
        """Service delivered so far (prompt tokens + 2 * output tokens), by tenant."""
        self.observe: Callable[[ReplicaId, float, StepWork], None] | None = None
        """Told of every step that begins, if set before the run: replica, seconds, work."""
        self.num_moves = 0
        """Requests moved to consolidate."""
        self._adapters = adapters
        self._prompts = prompts or UniquePrompts(is_distinct=config.scheduler.enable_prefix_cache)
        self._fleet = Fleet(config.router)
        self._members: dict[ReplicaId, _Member] = {}
        self._size = FleetSize(config, self.heap, self._fleet, self)
        self._live: dict[RequestId, _Live] = {}
        self._waiting: deque[_Live] = deque()
        self._arrivals: Iterator[WorkloadRequest] = iter(())
        self._next: WorkloadRequest | None = None
        self._last_end_s = 0.0
        self.end_s = 0.0
        """After the run: when its last request ended, or when it stopped before that."""

    @property
    def replicas(self) -> dict[ReplicaId, ReplicaRecord]:
        """Every replica that was ever asked for."""
        return self._size.records

    @property
    def is_over(self) -> bool:
        """True when no request is left or to come."""
        return self._next is None and not self._live and not self._waiting

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a replica."""
        return len(self._waiting)

    def run(self, workload: Iterable[WorkloadRequest], until_s: float = math.inf) -> None:
        """Simulate until every request has ended, or to a moment.

        Args:
            workload: requests by ascending arrival.
            until_s: when to stop; requests that have not ended by then stay open in the ledger.
        """
        self._arrivals = iter(workload)
        self._next = next(self._arrivals, None)
        self._await_next()
        self._size.begin()
        if self.config.sample_interval_s is not None:
            self.heap.at(0.0, partial(self._sample_every, self.config.sample_interval_s))
        if self.config.consolidation_interval_s is not None:
            self.heap.at(0.0, partial(self._consolidate_every, self.config.consolidation_interval_s))
        self.heap.run(until_s)
        # Once nothing is left or to come, nobody looks at the fleet any more: its time is no part of the simulation.
        self.end_s = self._last_end_s if self.is_over else until_s
        for live in (*self._live.values(), *self._waiting):
            self.ledger.num_output_tokens[live.number] = live.num_delivered
        for member in self._members.values():
            self._note(member)

    @property
    def duration_s(self) -> float:
        """After the run: what rates are divided by, positive even if everything was refused at once."""
        return max(self.end_s, 1e-9)

    def busy_share(self) -> float:
        """Of the replica-seconds paid for, what steps took."""
        replica_s = self.replica_s()
        return min(1.0, math.fsum(r.busy_s for r in self.replicas.values()) / replica_s) if replica_s else 0.0

    def replica_s(self) -> float:
        """Replica-seconds paid for: from being asked for to the end of the replica, or of the simulation."""
        end_s = self.end_s
        ends = ((r.asked_s, end_s if math.isnan(r.end_s) else min(r.end_s, end_s)) for r in self.replicas.values())
        return math.fsum(max(0.0, gone_s - asked_s) for asked_s, gone_s in ends)

    # Requests.

    def _await_next(self) -> None:
        if self._next is not None:
            self.heap.at(self._next.arrival_s, self._arrive)

    def _arrive(self) -> None:
        """Route all that arrives now, before a replica that it wakes takes its turn."""
        while self._next is not None and self._next.arrival_s == self.heap.now_s:
            self._route(self._open(self._next))
            self._next = next(self._arrivals, None)
        self._await_next()

    def _open(self, workload: WorkloadRequest) -> _Live:
        index = workload.adapter_index
        info = None if index is None else self._adapters.info(index)
        number = self.ledger.arrive(workload)
        route = RouteRequest(
            num_prompt_tokens=workload.num_prompt_tokens,
            num_kv_tokens=self.config.num_kv_tokens(workload),
            adapter_id=None if info is None else info.adapter_id,
            lora_rank=0 if info is None else info.lora_rank,
            prefix_keys=self._prompts.prefix_keys(number, workload),
            num_adapter_rows=0 if info is None else info.num_pages * self._adapters.pages.rows_per_page,
            num_page_kv_tokens=0 if info is None else self.config.num_page_kv_tokens(info.num_pages),
        )
        return _Live(number, workload, route)

    def _route(self, live: _Live) -> None:
        # First come, first served: nobody overtakes those who wait.
        chosen = None if self._waiting else self._fleet.choose(live.route)
        if chosen is None:
            self._waiting.append(live)
        else:
            self._send(live, chosen)

    def serve_waiting(self) -> None:
        """See ``ReplicaHost``."""
        while self._waiting:
            chosen = self._fleet.choose(self._waiting[0].route)
            if chosen is None:
                return
            self._send(self._waiting.popleft(), chosen)

    def _send(self, live: _Live, replica_id: ReplicaId) -> None:
        workload, num_delivered = live.workload, live.num_delivered
        live.replica_id = replica_id
        live.request_id = RequestId(f"{live.number}.{live.num_restarts}" if live.num_restarts else str(live.number))
        self._live[live.request_id] = live
        self._fleet.sent(replica_id, live.route)
        index = workload.adapter_index
        info = None if index is None else self._adapters.info(index)
        request = Request(
            request_id=live.request_id,
            prompt_token_ids=self._prompts.token_ids(live.number, workload, num_delivered),
            sampling=_sampling(workload.num_output_tokens - num_delivered),
            arrival_s=self.heap.now_s,
            tenant_id=workload.tenant_id,
            adapter_id=None if info is None else info.adapter_id,
            cache_salt=workload.tenant_id.encode(),
        )
        self._members[replica_id].replica.submit(request, info)

    def _deliver(self, member: _Member, outputs: list[RequestOutput]) -> None:
        now_s, ledger, service = self.heap.now_s, self.ledger, self.service
        has_ended = False
        for output in outputs:
            live = self._live.get(output.request_id)
            if live is None:
                continue  # it was moved while the step ran
            num_new = len(output.new_token_ids)
            if num_new:
                tenant_id = live.workload.tenant_id
                if live.num_delivered == 0:
                    ledger.first_token_s[live.number] = now_s
                    service[tenant_id] = service.get(tenant_id, 0.0) + live.workload.num_prompt_tokens
                service[tenant_id] += 2.0 * num_new
                live.num_delivered += num_new
            if output.finish_reason is not None:
                has_ended = True
                self._end(member, live, output.finish_reason)
        if has_ended:
            self.serve_waiting()
            self._size.release_if_drained(member.record.replica_id)

    def _end(self, member: _Member, live: _Live, reason: FinishReason) -> None:
        is_finished = reason in (FinishReason.STOP, FinishReason.LENGTH)
        replica_id = member.record.replica_id
        self._close(live, Ending.FINISHED if is_finished else Ending.FAILED, replica_id)
        del self._live[live.request_id]
        self._fleet.ended(replica_id, live.route)

    def _reject(self, replica_id: ReplicaId, request: Request, error: PomonaError) -> None:
        del error
        live = self._live.pop(request.request_id, None)
        if live is not None:
            # What was admitted before it began again here is no longer refused, but broken off.
            self._close(live, Ending.FAILED if live.num_delivered else Ending.REJECTED, replica_id)
            self._fleet.ended(replica_id, live.route)
            self.serve_waiting()
            self._size.release_if_drained(replica_id)

    def _close(self, live: _Live, ending: Ending, replica_id: ReplicaId) -> None:
        number = live.number
        self.ledger.num_output_tokens[number] = live.num_delivered
        self.ledger.last_token_s[number] = self._last_end_s = self.heap.now_s
        self.ledger.close(number, ending, replica_id)
        self._size.note_ended(is_missed=not self.ledger.meets(number, self.config.slo))

    def _restart(self, live: _Live) -> None:
        """Let a request go on elsewhere: what was delivered becomes part of the prompt and is computed again."""
        live.num_restarts += 1
        live.replica_id = None
        self.ledger.num_restarts[live.number] = min(live.num_restarts, 255)

    # Replicas.

    def join(self, record: ReplicaRecord) -> None:
        """See ``ReplicaHost``."""
        config, replica_id = self.config, record.replica_id
        next_token = hashed_token if config.scheduler.enable_prefix_cache else _any_token
        adapters = self._adapters
        executor = SimExecutor(config.cost_model, adapters.lora_rank_of, next_token, adapters.with_extras)
        # The callbacks need the member, and the member the replica.
        replica = SimReplica(
            config.scheduler,
            executor,
            self.heap,
            lambda outputs: self._deliver(member, outputs),
            partial(self._reject, replica_id),
            overlap_steps=config.overlap_steps,
        )
        if self.observe is not None:
            replica.observe = partial(self.observe, replica_id)
        member = self._members[replica_id] = _Member(record, replica)
        self._fleet.report(config.empty_replica(replica_id, adapters.pages.rows_per_page))
        self.serve_waiting()

    def remove(self, replica_id: ReplicaId) -> None:
        """See ``ReplicaHost``: what the replica still had goes on elsewhere or fails."""
        member = self._members.pop(replica_id)
        self._note(member)
        lost = [self._live.pop(request.request_id, None) for request in member.replica.kill()]
        for live in (live for live in lost if live is not None):
            if self.config.losses.on_loss == "restart":
                self._restart(live)
                self._route(live)
            else:
                self._close(live, Ending.FAILED, replica_id)

    def busy_s(self, replica_id: ReplicaId) -> float:
        """See ``ReplicaHost``."""
        return self._members[replica_id].replica.busy_s

    def move_away(self, replica_id: ReplicaId) -> None:
        """See ``ReplicaHost``."""
        for request_id in list(self._members[replica_id].replica.in_flight):
            live = self._live.get(request_id)
            if live is not None:
                self._withdraw(live)
                self._route(live)

    def _withdraw(self, live: _Live) -> None:
        """Cancel a request where it is; the token under way is dropped."""
        assert live.replica_id is not None
        del self._live[live.request_id]
        self._fleet.ended(live.replica_id, live.route)
        self._members[live.replica_id].replica.abort(live.request_id)
        self._restart(live)

    def _consolidate_every(self, interval_s: float) -> None:
        config = self.config
        states = [state for state in self._fleet.states if not self._fleet.is_draining(state.replica_id)]
        running = {
            state.replica_id: [
                (live, live.route)
                for request_id in self._members[state.replica_id].replica.in_flight
                if (live := self._live.get(request_id)) is not None
            ]
            for state in states
        }
        for move in consolidation(states, running, config.router.max_requests, config.max_moves):
            self._withdraw(move.key)
            self._send(move.key, move.target)
            self.num_moves += 1
        self.serve_waiting()
        if not self.is_over:
            self.heap.after(interval_s, partial(self._consolidate_every, interval_s))

    # Reports.

    def _note(self, member: _Member) -> None:
        record, stats = member.record, member.replica.stats
        record.busy_s = member.replica.busy_s
        record.num_steps = stats.num_steps
        record.num_prompt_tokens = stats.num_prompt_tokens
        record.num_output_tokens = stats.num_output_tokens
        record.num_preemptions = stats.num_preemptions
        record.num_adapter_loads = stats.num_adapter_loads

    def _sample_every(self, interval_s: float) -> None:
        stats = [member.replica.stats for member in self._members.values()]
        num_blocks, num_pages = sum(s.num_kv_blocks for s in stats), sum(s.num_adapter_pages for s in stats)
        self.samples.append(
            FleetSample(
                now_s=self.heap.now_s,
                loads=tuple((state.replica_id, state.num_requests) for state in self._fleet.states),
                num_starting=self._size.num_starting,
                num_waiting=len(self._waiting),
                kv_used_share=sum(s.num_kv_blocks_used for s in stats) / num_blocks if num_blocks else 0.0,
                adapter_pages_used_share=sum(s.num_adapter_pages_used for s in stats) / num_pages if num_pages else 0.0,
                service=dict(self.service),
            )
        )
        if len(self.samples) == self.config.max_samples:
            del self.samples[1::2]
            interval_s *= 2.0
        if not self.is_over:
            self.heap.after(interval_s, partial(self._sample_every, interval_s))


def _any_token(request_id: RequestId, position: int) -> int:
    """Without a prefix cache nobody looks at tokens."""
    del request_id, position
    return 0


@lru_cache(maxsize=8192)
def _sampling(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0)
