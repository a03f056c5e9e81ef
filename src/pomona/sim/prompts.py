"""Token ids of simulated prompts. What they say does not matter, only which prompts begin alike."""

import itertools
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Protocol

from pomona.workload.spec import WorkloadRequest


class PromptSource(Protocol):
    """Makes prompts."""

    def token_ids(self, number: int, request: WorkloadRequest, num_delivered: int) -> tuple[int, ...]:
        """The prompt of a request, followed by the output tokens that were delivered before it began again."""
        ...

    def prefix_keys(self, number: int, request: WorkloadRequest) -> tuple[bytes, ...]:
        """What a router may know of its beginning: see ``RouteRequest.prefix_keys``."""
        ...


_LONG_TOKENS = 4096
"""Prompts longer than this are large, and seldom of one length: few are kept to be shared."""


# Equal lengths share one tuple: most of a simulation's memory would be prompts otherwise.
@cache
def _short_filler(num_tokens: int) -> tuple[int, ...]:
    return (0,) * num_tokens


@lru_cache(maxsize=64)
def _long_filler(num_tokens: int) -> tuple[int, ...]:
    return (0,) * num_tokens


def _filler(num_tokens: int) -> tuple[int, ...]:
    return _short_filler(num_tokens) if num_tokens <= _LONG_TOKENS else _long_filler(num_tokens)


class UniquePrompts:
    """No two prompts begin alike.

    Args:
        is_distinct: False makes all prompts of a length one object, for replicas without a prefix cache.
    """

    def __init__(self, *, is_distinct: bool = True) -> None:
        self._is_distinct = is_distinct

    def token_ids(self, number: int, request: WorkloadRequest, num_delivered: int) -> tuple[int, ...]:
        """See ``PromptSource``."""
        num_tokens = request.num_prompt_tokens + num_delivered
        return (number, *_filler(num_tokens - 1)) if self._is_distinct else _filler(num_tokens)

    def prefix_keys(self, number: int, request: WorkloadRequest) -> tuple[bytes, ...]:
        """See ``PromptSource``."""
        del number, request
        return ()


class RecordedPrompts:
    """Prompts begin alike as far as a trace says so.

    Args:
        hashes: of every request in order of arrival, one per block; equal hashes mean equal prompts up to its end.
        block_tokens: tokens that a hash stands for; Mooncake's traces have 512.
    """

    def __init__(self, hashes: Sequence[tuple[int, ...]], block_tokens: int = 512) -> None:
        self.block_tokens = block_tokens
        self._hashes = hashes

    def part(self, first: int) -> "RecordedPrompts":
        """Of a workload that leaves out the requests before this one."""
        return RecordedPrompts(self._hashes[first:], self.block_tokens)

    def token_ids(self, number: int, request: WorkloadRequest, num_delivered: int) -> tuple[int, ...]:
        """See ``PromptSource``. Tokens beyond the recorded blocks are the request's own."""
        size = self.block_tokens
        shared = tuple(itertools.chain.from_iterable((value + 1,) * size for value in self._shared(number, request)))
        own = request.num_prompt_tokens + num_delivered - len(shared)
        return shared + (2**30 + number,) * own

    def prefix_keys(self, number: int, request: WorkloadRequest) -> tuple[bytes, ...]:
        """See ``PromptSource``."""
        owner = f"{request.tenant_id}/{request.adapter_index}/"
        return tuple(f"{owner}{value}".encode() for value in self._shared(number, request))

    def _shared(self, number: int, request: WorkloadRequest) -> tuple[int, ...]:
        """Hashes of the blocks that the prompt fills; a selection may have cut it, and its last block may be short."""
        return self._hashes[number][: request.num_prompt_tokens // self.block_tokens]
