"""When a new request would have its first token, estimated from what waits before it and from the pace of late.

An estimate, not a promise: it decides whether a request with a target is refused at once, while trying elsewhere or
later still helps, instead of being served when it is of no use any more. If nobody else is there, later does not help,
and after one slow step (the first, say) nothing would ever correct the pace: such a request is taken.
"""

from pomona.core.errors import DeadlineError
from pomona.sched.account import Account
from pomona.sched.fair_queue import FairQueue
from pomona.sched.pace import Pace
from pomona.sched.sequence import Sequence


class Deadlines:
    """Refuses requests that would miss their tenant's target for the time to first token.

    Args:
        queue: who waits and runs.
        pace: how long steps take.
        max_rows: token budget of a step.
    """

    def __init__(self, queue: FairQueue, pace: Pace, max_rows: int) -> None:
        self._queue = queue
        self._pace = pace
        self._max_rows = max_rows

    def check(self, seq: Sequence, account: Account, *, has_room: bool) -> None:
        """Make sure that the target can be met, if there is one.

        Args:
            seq: the request; not in the queue yet.
            account: whose it is.
            has_room: it could start in the next step.

        Raises:
            DeadlineError: it cannot.
        """
        target_s = seq.request.service_level.ttft_s
        if target_s is None or not (self._queue or self._queue.running):
            return
        expected_s = self.prefill_s(seq) + (0.0 if has_room else self.wait_s(seq, account))
        if expected_s > target_s:
            raise DeadlineError(
                f"the first token is expected in {expected_s:.2f} s: the target is {target_s:g} s",
                expected_s - target_s,
            )

    def prefill_s(self, seq: Sequence) -> float:
        """Seconds for the step under way, and for those that compute the prompt beside all that runs."""
        num_running = self._num_running
        num_steps = -(-seq.num_prompt_tokens // max(1, self._max_rows - num_running))
        residual_s = self._pace.seconds(num_running, num_running) if num_running else 0.0
        num_beside = num_steps * num_running
        return residual_s + self._pace.seconds(num_steps + num_beside, seq.num_prompt_tokens + num_beside, num_steps)

    def wait_s(self, seq: Sequence, account: Account) -> float:
        """Seconds until a place is free for it, all places being taken.

        A place is freed whenever a running sequence ends, which happens ``num_running`` times in as many steps as an
        output has tokens. Of the places, the tenant gets its share by weight; its requests before this one need some.
        """
        ahead = self._queue.ahead_of(account)
        num_running = max(1, self._num_running)
        num_output = self._queue.mean_output_tokens or (seq.max_tokens_total - seq.num_prompt_tokens) / 2
        place_s = num_output * self._pace.seconds(num_running, num_running) / num_running
        prompts_s = self._pace.seconds(ahead.num_requests, ahead.num_prompt_tokens, 0)
        return ((ahead.num_requests + 1) * place_s + prompts_s) / ahead.share

    @property
    def _num_running(self) -> int:
        return sum(account.num_running for account in self._queue.running)
