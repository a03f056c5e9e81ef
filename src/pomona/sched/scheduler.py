"""The scheduler of one replica: which sequences compute how many tokens next, with which blocks and adapters.

Continuous batching without phases (vLLM): a sequence has tokens known and tokens computed, and a step computes some of
the difference. Under a token budget (Sarathi-Serve), running sequences come first, in order of admission, then waiting
ones, then running ones that had to let those pass (``Claims``). Pure: decisions depend on calls and arguments alone.

Longer than other files: what has a question of its own (queue, claims, cache, slots, turns, arrivals, pace, deadlines)
stands beside it; what is left moves one sequence through its states, and each move touches all of these at once.
"""

import itertools
import operator
from collections import deque
from collections.abc import Iterator

from pomona.core.errors import InvalidRequestError, QueueFullError
from pomona.core.ids import AdapterId, BlockId, RequestId
from pomona.core.output import EngineStats, RequestOutput
from pomona.core.plan import ScheduledSeq, StepPlan, StepResult, TokenLogprobs
from pomona.core.request import FinishReason, Request
from pomona.sched.account import Account
from pomona.sched.adapter_arrivals import AdapterArrivals
from pomona.sched.adapter_slots import AdapterSlots
from pomona.sched.adapter_turn import AdapterTurn
from pomona.sched.block_pool import BlockPool
from pomona.sched.claims import Claims
from pomona.sched.config import SchedulerConfig
from pomona.sched.deadline import Deadlines
from pomona.sched.fair_queue import FairQueue
from pomona.sched.limits import check_request
from pomona.sched.memory import Memory
from pomona.sched.outputs import NO_LOGPROBS, logprobs_of, output_of
from pomona.sched.pace import Allowance, Pace
from pomona.sched.prefix_cache import PrefixCache
from pomona.sched.sequence import Sequence, SequenceState

_MAX_TRIES = 8
"""Of making pages for those that lack them, in one step: whoever comes later has no better claim than those."""
_adapter_order = operator.attrgetter("adapter_order")


class Scheduler:
    """Call ``schedule`` and ``update`` in turn; ``add`` and ``abort`` at any time. Between the two, ``schedule_ahead``
    may plan one step more.

    Invariants: a running sequence is held by the executor, holds its blocks and pins its adapter; a waiting or ended
    one holds nothing. A sequence alone always fits KV's own blocks (checked by ``add``), and the oldest running one is
    preempted only for somebody with a claim to be served before it, so every step makes progress. Tokens count as
    computed once scheduled, and blocks become findable when the step's result arrives, so that a later step can be
    planned in between. What ends while a later plan names it is given up at once: plans are carried out in order, so
    whatever gets its blocks writes to them afterwards.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        clock = itertools.count()
        self.adapters = AdapterSlots(config.num_adapter_pages, clock)
        self._pool = BlockPool(config.num_kv_blocks, config.num_adapter_pages, config.blocks_per_page, clock)
        self._memory = Memory(self._pool, self.adapters)
        self._cache = PrefixCache(
            self._pool,
            config.block_size,
            is_enabled=config.enable_prefix_cache,
            min_wait_tokens=config.min_prefix_wait_tokens,
        )
        self._queue = FairQueue(config.fairness, config.max_lead)
        self._claims = Claims(config, self._queue, self._memory)
        self._pace = Pace(config.max_num_batched_tokens)
        self._deadlines = Deadlines(self._queue, self._pace, config.max_num_batched_tokens)
        self._seqs: dict[RequestId, Sequence] = {}
        self._running: list[Sequence] = []
        self._released: list[RequestId] = []
        self._preempted: list[Sequence] = []
        self._arrivals = AdapterArrivals(self._memory, config.adapter_loading)
        self._turn = AdapterTurn(
            self._memory, self._arrivals, self._queue, config.adapter_wait_limit_s, lambda: self._running
        )
        # The plans whose results are outstanding, oldest first, and their sequences, in plan order.
        self._in_flight: deque[tuple[StepPlan, list[Sequence]]] = deque()
        self._now_s = 0.0
        self._max_chunk = config.max_prefill_chunk or config.max_num_batched_tokens
        self._rows_per_seq = 0
        self._is_limited = False
        # Somebody waits who has a claim, but nothing is preempted while a result is outstanding.
        self._has_open_claim = False
        self._num_admissions = 0
        self._num_steps = 0
        self._num_preemptions = 0
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0

    @property
    def has_work(self) -> bool:
        """True while ``schedule`` has something to plan, if only to tell the executor what to forget."""
        return bool(self._seqs or self._released or self.adapters.has_evictions)

    def add(self, request: Request) -> None:
        """Accept a request; from now on it ends in exactly one terminal output.

        Raises:
            InvalidRequestError: it can never be served; names the field.
            PromptTooLongError: it does not fit the context or the KV cache.
            QueueFullError: ``max_waiting`` requests wait already.
            RateLimitError: the policy limits the tenant's requests per minute.
            DeadlineError: its tenant's target for the time to first token would be missed.
        """
        check_request(request, self.config)
        if request.request_id in self._seqs:
            raise InvalidRequestError("request_id", f"request_id {request.request_id!r} is in use")
        adapter_id = request.adapter_id
        if adapter_id is not None and not self.adapters.can_use(adapter_id):
            raise InvalidRequestError("model", f"adapter {adapter_id!r} is not registered, or is being unloaded")
        if len(self._queue) >= self.config.max_waiting:
            raise QueueFullError(f"{len(self._queue)} requests are waiting already: the limit is max_waiting")
        seq = Sequence(request, self.config.max_model_len)
        self._cache.prepare(seq)
        self._check_deadline(seq)
        self._queue.check_rate(request)  # counts it
        if adapter_id is not None:
            self.adapters.use(adapter_id)
        self._seqs[request.request_id] = seq
        self._queue.push(seq)

    def abort(self, request_id: RequestId) -> RequestOutput | None:
        """End a request now, even between ``schedule`` and ``update``; that step's result for it is then ignored.

        Returns:
            Its terminal output, or None if no such request is known (it may have ended already).
        """
        seq = self._seqs.get(request_id)
        if seq is None:
            return None
        if seq.state is SequenceState.RUNNING:
            self._running.remove(seq)
        return self._end(seq, FinishReason.ABORT)

    def schedule(self, now_s: float) -> StepPlan:
        """Plan the next step.

        Args:
            now_s: the engine's clock; must not run backwards.
        """
        assert not self._in_flight, "update comes before the next schedule"
        return self._plan(now_s, self._choose(now_s))

    def schedule_ahead(self, now_s: float) -> StepPlan | None:
        """Plan the step after the one whose result is outstanding: its sampled tokens count as known, whatever they
        are. Sequences that will end with LENGTH are left out.

        Args:
            now_s: the engine's clock; must not run backwards.

        Returns:
            None if there is nothing to compute yet, or the result has to be known first: a sequence would have to be
            preempted, although some may have ended, or samples from all of its own tokens (penalties).
        """
        assert len(self._in_flight) == 1, "one step is planned ahead"
        self._settle(now_s)  # charges make claims
        if self._has_open_claim or (len(self._queue) > 0 and self._claims.has_any()):
            self._has_open_claim = False
            return None
        _, seqs = self._in_flight[0]
        if any(seq.num_pending_tokens and seq.request.sampling.has_penalties for seq in seqs):
            return None
        if self._lacks_blocks(self._running):
            return None
        chosen = self._choose(now_s)
        return self._plan(now_s, chosen) if chosen else None

    def _choose(self, now_s: float) -> list[Sequence]:
        """Decide who computes what next, and which adapters that needs."""
        self._settle(now_s)
        chosen: list[Sequence] = []
        num_preemptions = self._num_preemptions
        allowance = self._allowance()
        budget, self._rows_per_seq = allowance.num_rows, allowance.rows_per_seq
        self._is_limited = budget < self.config.max_num_batched_tokens
        is_waited_for = len(self._queue) > 0
        running, held = self._claims.split(self._running) if is_waited_for else (self._running.copy(), [])
        is_crowded = len(running) * (1 + self._rows_per_seq) > budget or self._lacks_blocks(running)
        budget = self._schedule_running(self._claims.by_turn(running) if is_crowded else running, budget, chosen)
        if is_waited_for and (held or self._num_preemptions == num_preemptions):
            budget = self._admit(now_s, budget, chosen)
        if held:
            held = self._claims.may_go_on(held) if chosen else held
            held = self._claims.by_turn(held) if self._lacks_blocks(held) else held
            budget = self._schedule_running(held, budget, chosen)
        if budget <= 0 and self._is_limited:
            taken = set(chosen)
            self._running.sort(key=taken.__contains__)
        if self._preempted:
            self._requeue_preempted()
        return chosen

    def _requeue_preempted(self) -> None:
        while self._preempted:
            self._queue.requeue(self._preempted.pop(0))

    def _settle(self, now_s: float) -> None:
        """Charge for what is held, up to now."""
        self._now_s = now_s
        self._queue.settle(now_s)

    def _lacks_blocks(self, running: list[Sequence]) -> bool:
        """True if there are not blocks for all of these that need another one."""
        num_free = self._memory.num_free_blocks
        return num_free < len(running) and num_free < sum(seq.will_grow for seq in running)

    def _allowance(self) -> Allowance:
        """The token budget, held to the time that a step may take."""
        if self.config.max_step_s is None and not self._queue.has_targets:
            return Allowance(self.config.max_num_batched_tokens)
        limits_s = (self.config.max_step_s, self._queue.tightest_tpot_s())
        return self._pace.within(min((limit_s for limit_s in limits_s if limit_s is not None), default=None))

    def _plan(self, now_s: float, chosen: list[Sequence]) -> StepPlan:
        """Write down what was decided."""
        if self._queue.has_targets or self.config.max_step_s is not None:
            self._pace.observe(now_s, len(chosen), sum(seq.scheduled.num_scheduled_tokens for seq in chosen))
        if self._queue.config.prices.per_page_second:
            self._queue.note_sampled(chosen)
        # A stable sort: rows of one adapter stand together, base rows first, and in order of admission otherwise.
        chosen.sort(key=_adapter_order)
        self._num_steps += 1
        plan = StepPlan(
            step_id=self._num_steps,
            seqs=tuple([seq.scheduled for seq in chosen]),
            released=tuple(self._released),
            adapter_evictions=self.adapters.take_evictions(),
            adapter_loads=self.adapters.take_loads() if self.adapters.untold_loads else (),
        )
        self._in_flight.append((plan, chosen))
        self._released.clear()
        return plan

    def update(self, plan: StepPlan, result: StepResult, now_s: float) -> list[RequestOutput]:
        """Take in a plan's result.

        Args:
            plan: the oldest one whose result is outstanding.
            result: what the executor made of it.
            now_s: the engine's clock, as it was when the step began or later.

        Returns:
            News of every sequence that has some: first of those whose adapter did not arrive, then in plan order.
        """
        oldest, seqs = self._in_flight.popleft()
        assert plan.step_id == result.step_id == oldest.step_id, "plans and results come in order"
        if self.adapters.num_loading:
            self.adapters.settle_loads(plan.adapter_loads, result.loading)
        num_alive = len(self._seqs)
        outputs = self._fail_adapters(result.failed_loads) if result.failed_loads else []
        failed, sampled = result.failed, result.sampled
        has_logprobs = bool(result.logprobs or result.prompt_logprobs)
        for entry, seq in zip(plan.seqs, seqs, strict=True):
            if seq.state is not SequenceState.RUNNING:
                continue  # aborted while the step ran, or ended in the step before it
            if failed and seq.request_id in failed:
                outputs.append(self._fail(seq, failed[seq.request_id]))
                continue
            num_computed = entry.num_computed_tokens + entry.num_scheduled_tokens
            if num_computed >= seq.next_publish_tokens:
                self._cache.publish(seq, num_computed)
            logprobs, prompt_logprobs = logprobs_of(seq, entry, result) if has_logprobs else NO_LOGPROBS
            if entry.is_sampled:
                seq.num_pending_tokens -= 1
                outputs.append(self._append(seq, sampled[seq.request_id], logprobs, prompt_logprobs))
            elif prompt_logprobs:
                outputs.append(output_of(seq, prompt_logprobs=prompt_logprobs))
        if len(self._seqs) < num_alive:
            self._running = [seq for seq in self._running if seq.state is SequenceState.RUNNING]
        return outputs

    def fail_all(self, reason: str) -> list[RequestOutput]:
        """End every request with FAIL, because the executor died or failed in the middle of a step.

        Nothing the executor held is relied on afterwards: no prefix is cached, no adapter is resident (registered ones
        stay registered and are loaded again when needed), and the next plan releases every sequence it may still hold.
        """
        self._requeue_preempted()  # planning may have been interrupted
        outputs = [self._end(seq, FinishReason.FAIL, reason) for seq in list(self._seqs.values())]
        self._running.clear()
        for plan, _ in self._in_flight:  # the executor may not have come to what it was to forget
            self._released.extend(plan.released)
            self.adapters.evict_again(plan.adapter_evictions)
        self._in_flight.clear()
        self._memory.forget_all()
        return outputs

    def stats(self) -> EngineStats:
        """Gauges as they are now, counters since the start."""
        adapters = self.adapters
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._queue),
            num_kv_blocks=self._pool.num_blocks,
            num_kv_blocks_used=self._pool.num_used,
            num_adapter_pages=adapters.num_pages,
            num_adapter_pages_used=adapters.num_used_pages,
            num_adapter_pages_lent=adapters.num_lent_pages,
            num_resident_adapters=adapters.num_resident,
            num_pinned_adapters=adapters.num_pinned,
            num_steps=self._num_steps,
            num_preemptions=self._num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
            num_prefix_queries=self._cache.num_queried_tokens,
            num_prefix_hits=self._cache.num_hit_tokens,
            num_adapter_loads=adapters.num_loads,
            num_adapter_evictions=adapters.num_evictions,
        )

    def _schedule_running(self, running: list[Sequence], budget: int, chosen: list[Sequence]) -> int:
        """Give running sequences their tokens, preempting others when blocks run out; returns the budget left."""
        max_chunk, rows_per_seq = self._max_chunk, self._rows_per_seq
        num_loading = self.adapters.num_loading
        for seq in running:
            if budget <= 0:
                break
            if seq.state is not SequenceState.RUNNING:
                continue  # preempted for one before it
            if num_loading and self._arrivals.is_held(seq):
                continue
            start = seq.num_computed_tokens
            num_known = len(seq.token_ids) + seq.num_pending_tokens
            if num_known >= seq.max_tokens_total:
                continue  # its last token is on the way
            num_tokens = num_known - start
            if num_tokens > 1:
                num_tokens = min(num_tokens, max_chunk, max(1, budget - rows_per_seq))
            end = start + num_tokens
            new_block_ids: tuple[BlockId, ...] = ()
            if end > seq.num_slots:
                assert num_tokens == 1, "blocks for all known tokens were taken at the start"
                if not self._make_room(seq, chosen):
                    continue
                new_block_ids = tuple(self._memory.allocate(1))
                seq.block_ids.extend(new_block_ids)
                seq.num_slots += self.config.block_size
            if start < seq.num_prompt_tokens:
                self._num_prompt_tokens += min(end, seq.num_prompt_tokens) - start
            seq.num_computed_tokens = end
            seq.num_pending_tokens += end == num_known
            seq.scheduled = ScheduledSeq(seq.request_id, start, num_tokens, end == num_known, new_block_ids)
            chosen.append(seq)
            budget -= num_tokens + rows_per_seq
        return budget

    def _make_room(self, seq: Sequence, chosen: list[Sequence]) -> bool:
        """Preempt running sequences until a block is free; False if ``seq`` itself had to go."""
        while self._memory.num_free_blocks == 0:
            if self._turn.yield_room(seq, self._now_s):
                continue
            victim = self._claims.to_grow(self._running, chosen)
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Take a running sequence off the device. It is in the queue again when the step has been planned."""
        assert not self._in_flight, "nothing is preempted while results are outstanding"
        self._num_preemptions += 1
        self._running.remove(seq)
        self._leave_device(seq)
        seq.state = SequenceState.WAITING
        self._preempted.append(seq)

    def _admit(self, now_s: float, budget: int, chosen: list[Sequence]) -> int:
        """Start waiting sequences; returns the budget left. One that only lacks adapter pages, or waits to share a
        prefix, is passed over; one that lacks blocks holds up those behind it, or long prompts would starve."""
        candidates = self._queue.candidates()
        lacking: set[tuple[Account, AdapterId | None]] = set()
        """Adapters, of these tenants, that there are no pages for as things stand."""
        for seq in candidates:
            adapter_id = seq.request.adapter_id
            if budget > 0 and (seq.account, adapter_id) in lacking and self._turn.pass_over(seq, now_s):
                continue
            is_full = len(self._running) == self.config.max_num_seqs
            if budget <= 0 or (is_full and not self._queue.has_claim(seq.account)):
                self._look_ahead(seq, candidates)
                break
            has_tries = len(lacking) < _MAX_TRIES
            if not self._turn.may_start(seq, now_s) and not (has_tries and self._make_pages(seq, chosen)):
                if adapter_id is not None and not self.adapters.is_resident(adapter_id):
                    lacking.add((seq.account, adapter_id))
                continue
            found = self._find(seq)
            if self._cache.should_wait(seq, len(found)):
                continue
            lacking.clear()
            fits = self._fits(seq, found) or (self._turn.yield_room(seq, now_s) and self._fits(seq, found))
            # Nobody makes way before the adapter is there: they would be admitted again while it is copied.
            is_joining = (fits or self._queue.has_claim(seq.account)) and not self._arrivals.may_start(seq)
            if is_joining:
                self._turn.leave(seq)
                continue
            if not fits and not self._make_way(seq, found, chosen):
                self._look_ahead(seq, candidates)
                break
            self._start(seq, found, now_s)
            room = budget
            if self._is_limited and seq.account.num_running == 1:
                # A step's time is limited for the sake of who comes next; whoever has just come is spared the limit.
                num_rows = sum(one.scheduled.num_scheduled_tokens for one in chosen)
                room = max(budget, self.config.max_num_batched_tokens - num_rows)
            budget -= self._schedule_first(seq, room) + self._rows_per_seq
            chosen.append(seq)
        return budget

    def _look_ahead(self, seq: Sequence, others: Iterator[Sequence]) -> None:
        """Send for the adapters of sequences that wait for something else."""
        if self.adapters.num_free_pages and not self._turn.has_claimant:
            self._arrivals.look_ahead(itertools.chain((seq,), others))

    def _make_way(self, seq: Sequence, found: list[BlockId], chosen: list[Sequence]) -> bool:
        """Preempt running sequences that owe it to a waiting one, until it fits; False if it does not."""
        if not self._queue.has_claim(seq.account):
            return False
        if self._in_flight:
            self._has_open_claim = True
            return False
        for victim in self._claims.for_room(seq, found, self._running, chosen):
            self._preempt(victim)
            if self._fits(seq, found):
                return True
        return False

    def _make_pages(self, seq: Sequence, chosen: list[Sequence]) -> bool:
        """Preempt running sequences that owe it to a waiting one, until its adapter can be loaded; False if not."""
        if self._turn.is_barred(seq) or not self._queue.has_claim(seq.account):
            return False
        if self._in_flight:
            self._has_open_claim = True
            return False
        victims = self._claims.for_pages(seq, self._find(seq), self._running, chosen)
        for victim in victims:
            self._preempt(victim)
        return bool(victims)

    def _find(self, seq: Sequence) -> list[BlockId]:
        """Cached blocks that a waiting sequence may begin with."""
        found, adapter_id = self._cache.find(seq), seq.request.adapter_id
        if adapter_id is None or self.adapters.is_resident(adapter_id):
            return found
        return self._memory.keep_loadable(adapter_id, found)

    def _check_deadline(self, seq: Sequence) -> None:
        """Refuse a request whose first token would come too late."""
        if seq.request.service_level.ttft_s is not None:
            account = self._queue.account_of(seq.request)
            has_room = not self._queue.is_waited_for(account.priority) and (
                self._fits(seq, []) or self._queue.has_claim(account)
            )
            self._deadlines.check(seq, account, has_room=has_room)

    def _fits(self, seq: Sequence, found: list[BlockId]) -> bool:
        """True if there is a place in the batch, all known tokens of the sequence find room, and the running ones keep
        room to grow."""
        config = self.config
        if len(self._running) == config.max_num_seqs:
            return False
        num_new = -(-len(seq.token_ids) // config.block_size) - len(found)
        num_reserved = config.num_reserved_blocks(len(self._running))
        num_free = self._memory.num_free_blocks_beside(self._memory.num_pages_to_pin(seq.request.adapter_id))
        return num_new + num_reserved <= num_free - self._pool.num_idle(found)

    def _start(self, seq: Sequence, found: list[BlockId], now_s: float) -> None:
        """Make a waiting sequence a running one: blocks for all its known tokens, adapter resident and pinned."""
        config = self.config
        # What is found must not make way for the adapter, nor the adapter for new blocks.
        self._pool.share(found)
        num_loaded_pages = 0
        adapter_id = seq.request.adapter_id
        if adapter_id is not None:
            num_loaded_pages = self._arrivals.take(seq)
            self._queue.pin(seq, self.adapters.num_pages_of(adapter_id), now_s)
        num_blocks = -(-len(seq.token_ids) // config.block_size)
        seq.block_ids = found + self._memory.allocate(num_blocks - len(found))
        seq.num_slots = num_blocks * config.block_size
        seq.num_computed_tokens = len(found) * config.block_size
        self._cache.admit(seq, len(found))
        self._queue.admit(seq, seq.num_computed_tokens, num_loaded_pages)
        self._num_admissions += 1
        seq.admission_order = self._num_admissions
        if seq.first_scheduled_s is None:
            seq.first_scheduled_s = now_s
            seq.num_cached_tokens = seq.num_computed_tokens
        self._turn.leave(seq)
        seq.state = SequenceState.RUNNING
        self._running.append(seq)

    def _schedule_first(self, seq: Sequence, budget: int) -> int:
        """Plan the first tokens of a sequence just started; returns how many."""
        start, num_known = seq.num_computed_tokens, len(seq.token_ids)
        num_tokens = min(num_known - start, self._max_chunk, max(1, budget - self._rows_per_seq))
        end = start + num_tokens
        self._num_prompt_tokens += max(0, min(end, seq.num_prompt_tokens) - start)
        seq.num_computed_tokens = end
        seq.num_pending_tokens += end == num_known
        seq.scheduled = ScheduledSeq(
            seq.request_id, start, num_tokens, end == num_known, tuple(seq.block_ids), seq.start()
        )
        return num_tokens

    def _append(
        self,
        seq: Sequence,
        token_id: int,
        logprobs: tuple[TokenLogprobs, ...],
        prompt_logprobs: tuple[TokenLogprobs, ...],
    ) -> RequestOutput:
        """Take in a sequence's next token, and end it if that was the last."""
        seq.token_ids.append(token_id)
        self._num_output_tokens += 1
        num_known = len(seq.token_ids)
        if num_known > seq.num_charged_tokens:
            seq.account.counter += seq.output_charge
            seq.output_charge += seq.output_charge_step
        reason: FinishReason | None = None
        stop_token_id: int | None = None
        if token_id in seq.stop_token_ids and num_known > seq.min_tokens_total:
            reason, stop_token_id = FinishReason.STOP, token_id
        elif num_known >= seq.max_tokens_total:
            reason = FinishReason.LENGTH
        if reason is not None:
            self._conclude(seq)
        return RequestOutput(
            seq.request_id,
            (token_id,),
            logprobs,
            prompt_logprobs,
            reason,
            stop_token_id,
            None,
            seq.num_cached_tokens,
            seq.first_scheduled_s,
        )

    def _fail(self, seq: Sequence, error: str) -> RequestOutput:
        """End a sequence that the executor could not go on with; its KV may be bad, so nobody shall share it."""
        self._pool.withdraw(seq.block_ids)
        return self._end(seq, FinishReason.FAIL, error)

    def _fail_adapters(self, load_ids: frozenset[int]) -> list[RequestOutput]:
        """End all who need an adapter whose load failed; the next who names it has it loaded anew."""
        outputs: list[RequestOutput] = []
        for adapter_id in self.adapters.loaded_by(load_ids):
            users = [seq for seq in self._seqs.values() if seq.request.adapter_id == adapter_id]
            outputs += [self._fail(seq, "the adapter could not be copied to the device") for seq in users]
            self.adapters.evict(adapter_id)
        return outputs

    def _end(self, seq: Sequence, reason: FinishReason, error: str | None = None) -> RequestOutput:
        self._conclude(seq)
        return output_of(seq, finish_reason=reason, error=error)

    def _conclude(self, seq: Sequence) -> None:
        """Make a sequence an ended one that holds nothing. The caller takes it off the list of running ones."""
        if seq.state is SequenceState.RUNNING:
            self._leave_device(seq)
        else:
            self._arrivals.leave(seq)
            self._queue.remove(seq)
        self._queue.end(seq)
        if seq.request.adapter_id is not None:
            self.adapters.end_use(seq.request.adapter_id)
        self._turn.leave(seq)
        seq.state = SequenceState.ENDED
        del self._seqs[seq.request_id]

    def _leave_device(self, seq: Sequence) -> None:
        """Give back what a running sequence holds."""
        self._cache.leave(seq)
        self._memory.release(seq.block_ids)
        seq.block_ids = []
        seq.num_slots = 0
        seq.num_computed_tokens = 0
        adapter_id = seq.request.adapter_id
        if adapter_id is not None:
            self.adapters.unpin(adapter_id)
            self._queue.unpin(seq, self.adapters.num_pages_of(adapter_id), self._now_s)
        self._queue.leave(seq)
        self._released.append(seq.request_id)
