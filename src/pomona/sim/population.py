"""AdapterPopulation: adapters by index, described when first asked for, so that a million of them cost nothing until a
request names one.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from pomona.core.adapter import AdapterInfo
from pomona.core.errors import ConfigError
from pomona.core.ids import AdapterId


@dataclass(frozen=True, slots=True)
class AdapterPages:
    """How adapters occupy device memory.

    Raises:
        ConfigError: a size is not positive.
    """

    rows_per_page: int = 8
    """Rank rows of one adapter page."""
    page_bytes: int = 1
    """Bytes of one adapter page in host memory."""

    def __post_init__(self) -> None:
        """Check every range once."""
        for name in ("rows_per_page", "page_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: must be at least 1")

    def num_pages(self, lora_rank: int) -> int:
        """Pages of an adapter of this rank."""
        return -(-lora_rank // self.rows_per_page)


class AdapterPopulation:
    """Adapter k has rank ``lora_ranks[k % len(lora_ranks)]``.

    Args:
        lora_ranks: ranks, dealt out in turn.
        pages: how much memory a rank takes.
        extras_share: share of the adapters, in [0, 1], that have more than low-rank parts.
        seed: of the choice of those; adapter k is among them or not whatever else is asked for, and stays among them
            when the share grows.
    """

    def __init__(
        self, lora_ranks: Sequence[int], pages: AdapterPages, *, extras_share: float = 0.0, seed: int = 0
    ) -> None:
        if not lora_ranks or min(lora_ranks) < 1:
            raise ConfigError(f"lora_ranks is {list(lora_ranks)}: must be at least one rank, each at least 1")
        if not 0.0 <= extras_share <= 1.0:
            raise ConfigError(f"extras_share is {extras_share}: must be between 0 and 1")
        self.pages = pages
        self.lora_rank_of: dict[AdapterId, int] = {}
        """Rank of every adapter that was asked for; shared with the executors, which need no others."""
        self.with_extras: set[AdapterId] = set()
        """Those of them that have more than low-rank parts; shared likewise."""
        self._lora_ranks = tuple(lora_ranks)
        self._extras_share = extras_share
        self._seed = seed
        self._infos: dict[int, AdapterInfo] = {}

    def info(self, index: int) -> AdapterInfo:
        """The adapter of this index."""
        info = self._infos.get(index)
        if info is None:
            lora_rank = self._lora_ranks[index % len(self._lora_ranks)]
            num_pages = self.pages.num_pages(lora_rank)
            adapter_id = AdapterId(f"adapter-{index}")
            info = AdapterInfo(adapter_id, lora_rank, num_pages, num_pages * self.pages.page_bytes)
            self._infos[index] = info
            self.lora_rank_of[adapter_id] = lora_rank
            if self._extras_share and random.Random(f"{self._seed}/extras/{index}").random() < self._extras_share:
                self.with_extras.add(adapter_id)
        return info
