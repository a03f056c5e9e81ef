"""Sharing of KV between sequences that begin alike: block keys, lookup, and the moment blocks become findable.

A key is a cryptographic hash over the tenant's salt, the adapter, the parent block's key and the block's tokens, so
equal keys mean equal KV, and nobody can construct a request that reaches the blocks of another adapter or tenant. The
chain of parents is vLLM's idea (automatic prefix caching, 2024); salt and adapter in every block are ours.
"""

from array import array
from hashlib import blake2b

from pomona.core.ids import AdapterId, BlockId
from pomona.sched.block_pool import BlockPool
from pomona.sched.sequence import Sequence

KEY_BYTES = 32
ROOT_KEY = bytes(KEY_BYTES)
"""Parent of every first block."""

_NEVER = 2**62


def key_namespace(cache_salt: bytes, adapter_id: AdapterId | None) -> bytes:
    """Encode what must be equal before any block is shared. Every part is preceded by its length, and the base model
    differs from every adapter id, so no two pairs have one encoding."""
    adapter = b"" if adapter_id is None else b"a" + adapter_id.encode()
    return b"".join((len(cache_salt).to_bytes(8), cache_salt, len(adapter).to_bytes(8), adapter))


def block_key(namespace: bytes, parent: bytes, token_ids: list[int]) -> bytes:
    """Key of a full block.

    Args:
        namespace: of ``key_namespace``.
        parent: key of the block before it, or ``ROOT_KEY``; always ``KEY_BYTES`` long.
        token_ids: the block's tokens, 8 bytes each, preceded by their number.
    """
    tokens = array("q", token_ids).tobytes()
    return blake2b(b"".join((namespace, parent, len(token_ids).to_bytes(8), tokens)), digest_size=KEY_BYTES).digest()


class PrefixCache:
    """Finds and publishes blocks of sequences in a ``BlockPool``.

    Args:
        pool: where blocks are held.
        block_size: tokens per block.
        is_enabled: False finds and publishes nothing.
        min_wait_tokens: see ``SchedulerConfig.min_prefix_wait_tokens``.
    """

    def __init__(self, pool: BlockPool, block_size: int, *, is_enabled: bool, min_wait_tokens: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self._is_enabled = is_enabled
        self.num_queried_tokens = 0
        """Prompt tokens of admitted requests that could have been found."""
        self.num_hit_tokens = 0
        """Those of them that were."""
        self._num_wait_blocks = -(-min_wait_tokens // block_size) if is_enabled else 0
        # Keys of prompt blocks that running sequences are about to compute, and the first sequence to do so.
        self._leader_of: dict[bytes, Sequence] = {}

    def prepare(self, seq: Sequence) -> None:
        """Set up a new sequence's fields."""
        seq.next_publish_tokens = self._block_size if self._is_enabled else _NEVER
        seq.key_namespace = key_namespace(seq.request.cache_salt, seq.request.adapter_id)

    def find(self, seq: Sequence) -> list[BlockId]:
        """The longest run of cached blocks the sequence begins with, its last known token left out: that one is always
        computed, because its logits are wanted. Takes no reference."""
        block_ids: list[BlockId] = []
        num_findable = self._num_findable_blocks(seq)
        if num_findable == 0:
            return block_ids
        self._extend_keys(seq, num_findable)
        for key in seq.block_keys[:num_findable]:
            block_id = self._pool.find(key)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def should_wait(self, seq: Sequence, num_found: int) -> bool:
        """True when a running sequence is computing blocks that this one would share, enough of them to be worth
        waiting for.

        A sequence waits for one leader only, and leaders are running and ahead of it, so the wait ends.

        Args:
            seq: a waiting sequence, after ``find``.
            num_found: blocks that ``find`` returned.
        """
        last = num_found + self._num_wait_blocks - 1
        if self._num_wait_blocks == 0 or last >= self._num_findable_blocks(seq):
            return False
        leader = self._leader_of.get(seq.block_keys[last])
        if leader is None or seq.prefix_leader not in (None, leader):
            return False
        seq.prefix_leader = leader
        return True

    def admit(self, seq: Sequence, num_found: int) -> None:
        """Note that the sequence starts to run with ``num_found`` shared blocks and computes the others."""
        seq.num_published_blocks = num_found
        # Leaders once waited for others: kept, each would keep all before it alive.
        seq.prefix_leader = None
        if not self._is_enabled:
            return
        seq.next_publish_tokens = (num_found + 1) * self._block_size
        if not seq.was_admitted and self._may_hit(seq):
            self.num_queried_tokens += seq.num_prompt_tokens
            self.num_hit_tokens += num_found * self._block_size
        if self._num_wait_blocks > 0:
            num_prompt_blocks = seq.num_prompt_tokens // self._block_size
            self._extend_keys(seq, num_prompt_blocks)
            for key in seq.block_keys[num_found:num_prompt_blocks]:
                self._leader_of.setdefault(key, seq)

    def publish(self, seq: Sequence, num_computed_tokens: int) -> None:
        """Make the sequence's full blocks findable, now that this many of its tokens have been computed."""
        num_full = num_computed_tokens // self._block_size
        self._extend_keys(seq, num_full)
        for index in range(seq.num_published_blocks, num_full):
            key = seq.block_keys[index]
            self._pool.publish(seq.block_ids[index], key)
            if self._leader_of.get(key) is seq:
                del self._leader_of[key]
        seq.num_published_blocks = num_full
        seq.next_publish_tokens = (num_full + 1) * self._block_size

    def leave(self, seq: Sequence) -> None:
        """Note that the sequence stops running: what it has not published nobody shall wait for."""
        if self._leader_of:
            for key in seq.block_keys[seq.num_published_blocks :]:
                if self._leader_of.get(key) is seq:
                    del self._leader_of[key]

    def _may_hit(self, seq: Sequence) -> bool:
        """Log-probabilities of prompt tokens come from computing them; once all were sent, hits do no harm."""
        return self._is_enabled and (
            seq.request.sampling.prompt_logprobs is None or seq.num_prompt_logprobs_sent == seq.num_prompt_tokens - 1
        )

    def _num_findable_blocks(self, seq: Sequence) -> int:
        return (len(seq.token_ids) - 1) // self._block_size if self._may_hit(seq) else 0

    def _extend_keys(self, seq: Sequence, num_blocks: int) -> None:
        keys, size = seq.block_keys, self._block_size
        for index in range(len(keys), num_blocks):
            parent = keys[-1] if keys else ROOT_KEY
            keys.append(block_key(seq.key_namespace, parent, seq.token_ids[index * size : (index + 1) * size]))
