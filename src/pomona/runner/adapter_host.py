"""StagedAdapters: the host side of adapters. Reads, verifies and converts a PEFT folder; keeps the result in memory
until the plan asks for it. Called beside the step, from any thread.
"""

import threading

from pomona.adapters.digest import adapter_digest
from pomona.adapters.peft_config import parse_config
from pomona.adapters.sources import read_files
from pomona.adapters.targets import resolve
from pomona.core.adapter import AdapterInfo
from pomona.core.errors import AdapterError
from pomona.core.ids import AdapterId
from pomona.model.adapter_state import parse_tensors
from pomona.model.adapter_weights import AdapterLoader, AdapterWeights


class StagedAdapters:
    """An AdapterHost: digest -> converted weights in host memory."""

    def __init__(self, loader: AdapterLoader, num_device_pages: int) -> None:
        """Create an empty store.

        Args:
            loader: converts files for one base model.
            num_device_pages: adapters that need more could never become resident and are refused.
        """
        self._loader = loader
        self._num_device_pages = num_device_pages
        self._lock = threading.Lock()
        self._staged: dict[AdapterId, AdapterWeights] = {}

    @property
    def staged(self) -> dict[AdapterId, AdapterWeights]:
        """Everything staged now; the runner looks adapters up here when it loads them."""
        return self._staged

    def stage(self, path: str) -> AdapterInfo:
        """Read the folder once, verify, convert, keep. The same content again costs only the reading.

        Raises:
            AdapterError: it cannot be used; nothing changed.
        """
        adapter_id, weights = self._read(path)
        num_pages = self._loader.num_pages(weights)
        if num_pages > self._num_device_pages:
            raise AdapterError(
                f"the adapter needs {num_pages} device pages but adapter memory has {self._num_device_pages}: "
                f"raise adapter_bytes"
            )
        with self._lock:
            weights = self._staged.setdefault(adapter_id, weights)
        return AdapterInfo(
            adapter_id=adapter_id,
            lora_rank=weights.lora_rank,
            num_pages=num_pages,
            num_host_bytes=weights.num_bytes,
            modules=weights.modules,
            features=weights.features,
        )

    def _read(self, path: str) -> tuple[AdapterId, AdapterWeights]:
        files = read_files(path)
        adapter_id = adapter_digest(files)
        with self._lock:
            weights = self._staged.get(adapter_id)
        if weights is None:
            resolved = resolve(parse_config(files.config_bytes), self._loader.modules)
            tensors = parse_tensors(files)
            del files  # the tensors are copies: no more than two are there at any time
            weights = self._loader.load(resolved, tensors)
        return adapter_id, weights

    def unstage(self, adapter_id: AdapterId) -> None:
        """Drop the host copy; unknown ids are ignored."""
        with self._lock:
            self._staged.pop(adapter_id, None)
