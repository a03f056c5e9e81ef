"""Builders and fakes for the scheduler and the engine: requests, configs, and an executor that checks every plan.

``FakeExecutor`` simulates the contents of KV blocks and of adapter pages, in one memory. What it writes for a token
depends on salt, adapter and everything before the token, and the next token is a hash of all it reads back through the
block table. So a block shared wrongly, overwritten too early or not recomputed shows as a token that differs from
``expected_output``. What an adapter's copy wrote is read back before each use, wherever KV may be written too.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from pomona.core.adapter import AdapterInfo
from pomona.core.ids import AdapterId, BlockId, PageId, RequestId, TenantId
from pomona.core.output import RequestOutput
from pomona.core.plan import AdapterLoad, ScheduledSeq, SeqStart, StepPlan, StepResult, TokenLogprobs
from pomona.core.request import FinishReason, Request, SamplingParams, ServiceLevel
from pomona.engine.engine import Engine
from pomona.sched.config import SchedulerConfig
from pomona.sched.scheduler import Scheduler
from pomona.sched.sequence import SequenceState

VOCAB_SIZE = 1000


def make_config(**changes: object) -> SchedulerConfig:
    """A small replica: 32 blocks of 4 tokens, 4 adapter pages, 16 tokens and 4 sequences per step."""
    values: dict[str, object] = {
        "num_kv_blocks": 32,
        "max_model_len": 64,
        "num_adapter_pages": 4,
        "block_size": 4,
        "max_num_batched_tokens": 16,
        "max_num_seqs": 4,
        "max_waiting": 16,
        "min_prefix_wait_tokens": 0,
        "reserve_steps": 0,
    }
    return SchedulerConfig(**(values | changes))  # type: ignore[arg-type]


def make_scheduler(**changes: object) -> Scheduler:
    return Scheduler(make_config(**changes))


def make_adapter(name: str = "a", num_pages: int = 1, features: tuple[str, ...] = ()) -> AdapterInfo:
    return AdapterInfo(
        AdapterId(name), lora_rank=8 * num_pages, num_pages=num_pages, num_host_bytes=1, features=features
    )


def make_request(
    name: str = "r",
    prompt: int | Sequence[int] = 3,
    max_tokens: int = 4,
    *,
    adapter: str | None = None,
    salt: bytes = b"",
    arrival_s: float = 0.0,
    sampling: SamplingParams | None = None,
    tenant: str = "default",
    level: ServiceLevel | None = None,
) -> Request:
    """A request; ``prompt`` may be just a length (then all such prompts begin alike)."""
    token_ids = tuple(range(prompt)) if isinstance(prompt, int) else tuple(prompt)
    return Request(
        request_id=RequestId(name),
        prompt_token_ids=token_ids,
        sampling=sampling or SamplingParams(max_tokens=max_tokens, temperature=0.0),
        arrival_s=arrival_s,
        tenant_id=TenantId(tenant),
        adapter_id=None if adapter is None else AdapterId(adapter),
        cache_salt=salt,
        service_level=level or ServiceLevel(),
    )


@dataclass
class ManualClock:
    """A clock that moves when told."""

    now_s: float = 0.0

    def advance(self, seconds: float) -> float:
        self.now_s += seconds
        return self.now_s

    def __call__(self) -> float:
        return self.now_s


def _digest(*parts: object) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()


def _content(before: bytes, salt: bytes, adapter_id: AdapterId | None, token_id: int) -> bytes:
    """What a KV slot holds: like real KV, a function of all tokens up to its own, and of the adapter."""
    return _digest(before, salt, adapter_id, token_id)


def _next_token(contents: Iterable[bytes]) -> int:
    return int.from_bytes(_digest(*contents)) % VOCAB_SIZE


def expected_output(request: Request, max_model_len: int = 64) -> list[int]:
    """The tokens of a request that runs to its end, whatever shares its batch."""
    sampling = request.sampling
    tokens = list(request.prompt_token_ids)
    contents: list[bytes] = []
    limit = min(len(tokens) + sampling.max_tokens, max_model_len)
    while True:
        for token_id in tokens[len(contents) :]:
            before = contents[-1] if contents else b""
            contents.append(_content(before, request.cache_salt, request.adapter_id, token_id))
        tokens.append(_next_token(contents))
        num_output = len(tokens) - len(request.prompt_token_ids)
        is_stop = tokens[-1] in sampling.stop_token_ids and num_output > sampling.min_tokens
        if is_stop or len(tokens) >= limit:
            return tokens[len(request.prompt_token_ids) :]


@dataclass
class _Held:
    """A sequence as the executor knows it."""

    start: SeqStart
    token_ids: list[int]
    block_ids: list[BlockId]
    num_computed: int


@dataclass
class _Launched:
    """A step whose result is only shown when asked for."""

    executor: "FakeExecutor"
    done: StepResult

    def result(self) -> StepResult:
        assert self.executor.under_way.pop(0) == self.done.step_id, "results are asked for in order"
        if self.executor.raises_in_result is not None:
            error, self.executor.raises_in_result = self.executor.raises_in_result, None
            self.executor.abandon()
            raise error
        return self.done


@dataclass
class FakeExecutor:
    """An executor that believes nothing: every plan is checked against what was sent before, and against the config."""

    config: SchedulerConfig
    plans: list[StepPlan] = field(default_factory=list)
    """Every plan executed."""
    adapters: dict[AdapterId, AdapterInfo] = field(default_factory=dict)
    """Staged adapters; tests fill it where they register."""
    salts: dict[RequestId, bytes] = field(default_factory=dict)
    """Real KV does not depend on the salt; here it does, so that sharing across salts is noticed."""
    failing: dict[RequestId, str] = field(default_factory=dict)
    """Sequences to report as failed in the next step that computes them."""
    failing_copies: set[AdapterId] = field(default_factory=set)
    """Adapters whose loads fail."""
    raises: BaseException | None = None
    """Raised by the next step, half way through it."""
    raises_in_result: Exception | None = None
    """Raised when the next result of a launched step is asked for."""
    under_way: list[int] = field(default_factory=list)
    """Steps launched whose results have not been asked for."""
    num_overlapped: int = 0
    """Steps launched while another was under way."""
    copy_steps: int = 0
    """Steps after which a copy that no step waits for has been made."""
    num_early_rows: int = 0
    """Prompt tokens computed before their adapter's copy had been made."""
    during_step: Callable[[], None] | None = None
    """Called once in the middle of the next step: what happens between ``schedule`` and ``update``."""

    def __post_init__(self) -> None:
        # Sequences held when a step was abandoned or the executor restarted: they may or may not be released.
        self._doubtful: set[RequestId] = set()
        # Adapters evicted by the next plan may never have been loaded, likewise.
        self._is_doubtful = False
        self._forget()

    def _forget(self) -> None:
        self.under_way.clear()
        self._held: dict[RequestId, _Held] = {}
        self._pages: dict[AdapterId, tuple[PageId, ...]] = {}
        self._copying: dict[AdapterId, tuple[int, int]] = {}  # load, steps that it still takes
        config = self.config
        self._num_blocks = config.num_kv_blocks + config.num_adapter_pages * config.blocks_per_page
        self._slots = [b"garbage"] * (self._num_blocks * config.block_size)

    @property
    def num_held(self) -> int:
        """Sequences it has been told of and not told to forget."""
        return len(self._held)

    @property
    def resident_ids(self) -> set[AdapterId]:
        return set(self._pages)

    def reset(self) -> None:
        """Become a new executor, as after a restart."""
        self._doubt()
        self._is_doubtful = True
        self._forget()

    def launch(self, plan: StepPlan) -> _Launched:
        """Carry the step out at once, like a device that keeps order, and keep the result back."""
        self.num_overlapped += len(self.under_way)
        self.under_way.append(plan.step_id)
        assert len(self.under_way) <= 2
        return _Launched(self, self.execute(plan))

    def abandon(self) -> None:
        """Be in the middle of a step that raised."""
        self._doubt()
        self._is_doubtful = True
        self.under_way.clear()

    def _doubt(self) -> None:
        self._doubtful.update(self._held)
        for plan in self.plans[-2:]:
            self._doubtful.update(plan.released, (entry.request_id for entry in plan.seqs))

    def execute(self, plan: StepPlan) -> StepResult:
        assert plan.step_id > (self.plans[-1].step_id if self.plans else 0), "steps come in order"
        does_something = plan.seqs or plan.released or plan.adapter_evictions or plan.adapter_loads or self._copying
        assert does_something, "a step does something, or waits for a copy"
        self.plans.append(plan)
        for request_id in plan.released:
            assert request_id in self._held or request_id in self._doubtful, "only what is held is released"
            self._held.pop(request_id, None)
        for adapter_id in plan.adapter_evictions:
            assert adapter_id in self._pages or self._is_doubtful, "only what is resident is evicted"
            self._pages.pop(adapter_id, None)
            self._copying.pop(adapter_id, None)
        self._is_doubtful = False
        self._copying = {name: (load_id, left - 1) for name, (load_id, left) in self._copying.items() if left > 1}
        for load in plan.adapter_loads:
            self._load(load)
        for adapter_id in self._copying:
            self._copy(adapter_id)
        self._check(plan)
        loading = frozenset(load_id for load_id, _ in self._copying.values())
        failed = frozenset(load.load_id for load in plan.adapter_loads if load.adapter_id in self.failing_copies)
        result = StepResult(step_id=plan.step_id, loading=loading, failed_loads=failed)
        if self.during_step is not None:
            during_step, self.during_step = self.during_step, None
            during_step()
        for entry in plan.seqs:
            self._compute(entry, result)
            if self.raises is not None:
                error, self.raises = self.raises, None
                self.abandon()
                raise error
        return result

    def _load(self, load: AdapterLoad) -> None:
        assert load.adapter_id not in self._pages, "a resident adapter is not loaded again"
        assert len(load.page_ids) == self.adapters[load.adapter_id].num_pages
        taken = {page_id for page_ids in self._pages.values() for page_id in page_ids}
        assert taken.isdisjoint(load.page_ids) and len(set(load.page_ids)) == len(load.page_ids)
        assert all(0 <= page_id < self.config.num_adapter_pages for page_id in load.page_ids)
        self._pages[load.adapter_id] = load.page_ids
        self._copy(load.adapter_id)
        assert load.is_awaited == (self.config.adapter_loading == "on_demand")
        if not load.is_awaited and self.copy_steps and load.adapter_id not in self.failing_copies:
            self._copying[load.adapter_id] = (load.load_id, self.copy_steps)

    def _copy(self, adapter_id: AdapterId) -> None:
        """Write what an adapter's weights are, over all of its pages."""
        for slot in self._slots_of(adapter_id):
            self._slots[slot] = _digest(adapter_id, slot)

    def _slots_of(self, adapter_id: AdapterId) -> list[int]:
        """Where its pages are, if KV may have them too."""
        config = self.config
        num_slots = config.blocks_per_page * config.block_size
        first = config.num_kv_blocks * config.block_size
        starts = [first + page_id * num_slots for page_id in self._pages[adapter_id]]
        return [slot for start in starts for slot in range(start, start + num_slots)]

    def _check(self, plan: StepPlan) -> None:
        config = self.config
        assert plan.num_scheduled_tokens <= config.max_num_batched_tokens
        assert len({entry.request_id for entry in plan.seqs}) == len(plan.seqs)
        for entry in plan.seqs:
            self._take_up(entry)
        assert len(self._held) <= config.max_num_seqs
        owners: dict[BlockId, int] = {}
        for held in self._held.values():
            assert len(set(held.block_ids)) == len(held.block_ids)
            for block_id in held.block_ids:
                owners[block_id] = owners.get(block_id, 0) + 1
        adapter_ids: list[AdapterId | None] = []
        for entry in plan.seqs:
            held = self._held[entry.request_id]
            first, end = entry.num_computed_tokens, entry.num_computed_tokens + entry.num_scheduled_tokens
            assert first == held.num_computed
            assert first < end <= len(held.token_ids)
            assert entry.is_sampled == (end == len(held.token_ids))
            assert end <= len(held.block_ids) * config.block_size, "the block table covers the tokens"
            for index in range(first // config.block_size, -(-end // config.block_size)):
                assert owners[held.block_ids[index]] == 1, "a block that is written has one owner"
            if held.start.adapter_id is not None:
                assert held.start.adapter_id in self._pages, "an adapter is resident before it is used"
                for slot in self._slots_of(held.start.adapter_id):
                    assert self._slots[slot] == _digest(held.start.adapter_id, slot), "KV was written over an adapter"
                self._check_copied(held, first, end)
            if not adapter_ids or adapter_ids[-1] != held.start.adapter_id:
                adapter_ids.append(held.start.adapter_id)
        assert len(set(adapter_ids)) == len(adapter_ids), "each adapter is one run of rows"
        assert None not in adapter_ids[1:], "base rows come first"

    def _check_copied(self, held: _Held, first: int, end: int) -> None:
        assert held.start.adapter_id is not None
        if held.start.adapter_id in self._copying:
            assert self.config.adapter_loading == "assist", "an adapter is there before it is used"
            assert not self.adapters[held.start.adapter_id].has_extras
            assert entry_is_prompt(held.start, first), "only prompts are computed from the host copy"
            self.num_early_rows += end - first

    def _take_up(self, entry: ScheduledSeq) -> None:
        if entry.start is not None:
            assert entry.request_id not in self._held, "a sequence starts once"
            self._held[entry.request_id] = _Held(
                entry.start, list(entry.start.token_ids), [], entry.num_computed_tokens
            )
        held = self._held[entry.request_id]
        held.block_ids.extend(entry.new_block_ids)
        assert all(0 <= block_id < self._num_blocks for block_id in entry.new_block_ids)

    def _compute(self, entry: ScheduledSeq, result: StepResult) -> None:
        request_id = entry.request_id
        held = self._held[request_id]
        sampling = held.start.sampling
        first, end = entry.num_computed_tokens, entry.num_computed_tokens + entry.num_scheduled_tokens
        salt = self.salts.get(request_id, b"")
        for position in range(first, end):
            before = self._slots[self._slot(held, position - 1)] if position else b""
            content = _content(before, salt, held.start.adapter_id, held.token_ids[position])
            self._slots[self._slot(held, position)] = content
        held.num_computed = end
        if request_id in self.failing:
            result.failed[request_id] = self.failing.pop(request_id)
            if entry.is_sampled:
                held.token_ids.append(-1)  # a step planned ahead goes on with whatever was sampled
            return
        if sampling.prompt_logprobs is not None:
            told = held.token_ids[first + 1 : min(end + 1, held.start.num_prompt_tokens)]
            result.prompt_logprobs[request_id] = tuple(TokenLogprobs(token_id, -1.0, 1) for token_id in told)
        if entry.is_sampled:
            token_id = _next_token(self._slots[self._slot(held, position)] for position in range(end))
            held.token_ids.append(token_id)
            result.sampled[request_id] = token_id
            if sampling.logprobs is not None:
                result.logprobs[request_id] = TokenLogprobs(token_id, -2.0, 1)

    def _slot(self, held: _Held, position: int) -> int:
        block_id = held.block_ids[position // self.config.block_size]
        return block_id * self.config.block_size + position % self.config.block_size


def entry_is_prompt(start: SeqStart, first: int) -> bool:
    """True if the token at ``first`` was known when the sequence started."""
    return first < len(start.token_ids)


def check_integrity(scheduler: Scheduler) -> None:
    """Compare the books of pool, slots and queue with what the running sequences hold. Reads private fields, because
    what must never differ is what only they know."""
    pool, adapters, running = scheduler._pool, scheduler.adapters, scheduler._running
    held = [block_id for seq in running for block_id in seq.block_ids]
    num_in_all = pool.num_own_blocks + adapters.num_pages * pool.blocks_per_page
    num_refs = {block_id: pool.num_refs(block_id) for block_id in map(BlockId, range(num_in_all))}
    assert {block_id: held.count(block_id) for block_id in num_refs} == num_refs
    assert pool.num_used == len(set(held))
    assert pool.is_confined == scheduler._turn.has_claimant
    assert pool.is_confined or pool.num_used == pool.num_blocks - pool.num_free
    assert pool.num_blocks == pool.num_own_blocks + adapters.num_lent_pages * pool.blocks_per_page
    queue = scheduler._queue
    waiting = [seq for seq in scheduler._seqs.values() if seq.state is SequenceState.WAITING]
    assert len(queue) == len(waiting)
    assert not any(scheduler._arrivals.is_joining(seq) for seq in running)
    assert all(not seq.block_ids and seq.num_computed_tokens == 0 for seq in waiting)
    assert {seq.request_id for seq in running + waiting} == set(scheduler._seqs)
    assert len(running) + len(waiting) == len(scheduler._seqs)
    for account in {seq.account for seq in running + waiting}:
        mine = [seq for seq in running if seq.account is account]
        assert account.num_running == len(mine)
        assert account.num_waiting == len([seq for seq in waiting if seq.account is account])
        adapter_ids = {seq.request.adapter_id for seq in mine}
        num_pages = [adapters.num_pages_of(adapter_id) for adapter_id in adapter_ids if adapter_id is not None]
        assert account.num_held_pages == sum(num_pages)
    assert set(queue.running) == {seq.account for seq in running}
    pages: list[PageId] = []
    for status in adapters.statuses():
        alive = [seq for seq in running + waiting if seq.request.adapter_id == status.adapter_id]
        pinning = [seq for seq in alive if seq in running or scheduler._arrivals.is_joining(seq)]
        assert (status.num_users, status.num_pins) == (len(alive), len(pinning))
        assert status.is_resident or not pinning, "a pinned adapter is resident"
        pages.extend(status.page_ids or ())
    pages.extend(pool.lent_page_ids)
    assert len(set(pages)) == len(pages) == adapters.num_pages - adapters.num_free_pages
    assert adapters.num_lent_pages == len(pool.lent_page_ids)


@dataclass
class Ending:
    """Everything an engine said about one request."""

    token_ids: list[int] = field(default_factory=list)
    outputs: list[RequestOutput] = field(default_factory=list)

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.outputs[-1].finish_reason if self.outputs else None


class EngineHarness:
    """An engine over a ``FakeExecutor``, with what it answered collected by request, and a clock that it advances."""

    def __init__(self, *, overlap_steps: bool = False, copy_steps: int = 0, **changes: object) -> None:
        self.config = make_config(**changes)
        self.executor = FakeExecutor(self.config, copy_steps=copy_steps)
        self.engine = Engine(self.config, self.executor, overlap_steps=overlap_steps)
        self.clock = ManualClock()
        self.requests: dict[RequestId, Request] = {}
        self.endings: dict[RequestId, Ending] = {}

    @property
    def alive(self) -> list[str]:
        """Names of the requests that have not ended."""
        return [str(name) for name, ending in self.endings.items() if ending.finish_reason is None]

    def add(self, request: Request) -> None:
        self.engine.add(request)
        self.requests[request.request_id] = request
        self.endings[request.request_id] = Ending()
        self.executor.salts[request.request_id] = request.cache_salt

    def register(self, name: str, num_pages: int = 1, features: tuple[str, ...] = ()) -> None:
        adapter = make_adapter(name, num_pages, features)
        self.engine.register_adapter(adapter)
        self.executor.adapters[adapter.adapter_id] = adapter

    def step(self, seconds: float = 0.0) -> list[RequestOutput]:
        outputs = self.engine.step(self.clock.advance(seconds))
        self.note(outputs)
        return outputs

    def abort(self, name: str) -> RequestOutput | None:
        output = self.engine.abort(RequestId(name))
        if output is not None:
            self.note([output])
        return output

    def note(self, outputs: list[RequestOutput]) -> None:
        """Collect outputs; an output after the terminal one is an error."""
        for output in outputs:
            ending = self.endings[output.request_id]
            assert ending.finish_reason is None, "nothing follows the terminal output"
            ending.outputs.append(output)
            ending.token_ids.extend(output.new_token_ids)

    def run(self, max_steps: int = 1000) -> None:
        """Step until there is no work, and check that every request ended as it must and nothing is held."""
        for _ in range(max_steps):
            if not self.engine.has_work:
                break
            self.step()
        assert not self.engine.has_work, f"work left after {max_steps} steps"
        for request_id, request in self.requests.items():
            self.check_ended(request_id, request)
        assert self.executor.num_held == 0
        stats = self.engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_kv_blocks_used, stats.num_pinned_adapters) == (0,) * 4

    def check_ended(self, request_id: RequestId, request: Request) -> None:
        ending = self.endings[request_id]
        expected = expected_output(request, self.config.max_model_len)
        assert ending.finish_reason is not None
        sampling = request.sampling
        if ending.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert ending.token_ids == expected
            if sampling.prompt_logprobs is not None:
                told = [entry.token_id for output in ending.outputs for entry in output.prompt_logprobs]
                assert told == list(request.prompt_token_ids[1:])
            if sampling.logprobs is not None:
                assert [entry.token_id for output in ending.outputs for entry in output.logprobs] == expected
        else:
            assert ending.token_ids == expected[: len(ending.token_ids)]

    def tokens(self, name: str) -> list[int]:
        return self.endings[RequestId(name)].token_ids

    def plan(self, index: int = -1) -> StepPlan:
        return self.executor.plans[index]

    def scheduled(self, index: int = -1) -> dict[str, int]:
        """Tokens of each sequence in one of the plans so far, the latest by default, in plan order."""
        return {str(entry.request_id): entry.num_scheduled_tokens for entry in self.executor.plans[index].seqs}
