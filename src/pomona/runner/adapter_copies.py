"""AdapterCopies: adapters' pages on their way from host memory to the device, beside the steps.

One thread copies page by page while there is something to copy, in order, and ends. On CUDA it has a stream of its own,
which waits for what the device had been asked to do when the copy began: steps that may still read those pages. A
*link* may be held to a speed, so that what slow copies do can be seen where copies are fast.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pomona.model.adapter_weights import AdapterWeights
from pomona.model.lora import AdapterExtras


@dataclass(eq=False)
class AdapterCopy:
    """One adapter's copy: asked for, under way, made or given up."""

    weights: AdapterWeights
    page_ids: tuple[int, ...]
    """Where the pages of ``weights`` go, in order."""
    after: torch.cuda.Event | None = None
    """What the device must have done before; None on a CPU."""
    extras: AdapterExtras | None = None
    """On the device, once the copy has been made."""
    error: Exception | None = None
    is_cancelled: bool = False
    is_done: bool = False
    """Made, or failed with ``error``."""


class AdapterCopies:
    """Makes copies, one after the other.

    Args:
        pages: [num_pages, page_elems] on the device.
        bytes_per_s: speed of the link; None for as fast as it goes.
    """

    def __init__(self, pages: Tensor, bytes_per_s: float | None) -> None:
        self._pages = pages
        self.bytes_per_s = bytes_per_s
        self._is_cuda = pages.device.type == "cuda"
        self._bytes = None if self._is_cuda else pages.view(torch.uint8).numpy()
        self._stream: torch.cuda.Stream | None = None
        self._changed = threading.Condition()
        self._queue: deque[AdapterCopy] = deque()
        self._thread: threading.Thread | None = None
        self._link_free_s = 0.0

    def prepare(self, weights: AdapterWeights, page_ids: Sequence[int]) -> AdapterCopy:
        """A copy that starts after all that the device has been asked for up to now."""
        after = None
        if self._is_cuda:
            after = torch.cuda.Event()  # type: ignore[no-untyped-call]
            after.record()
        return AdapterCopy(weights, tuple(page_ids), after)

    def begin(self, copy: AdapterCopy) -> None:
        """Have the copy made beside the caller, after those begun before."""
        with self._changed:
            self._queue.append(copy)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="pomona-adapter-copies", daemon=True)
                self._thread.start()

    def make(self, copy: AdapterCopy) -> None:
        """Have the copy made before this returns."""
        with self._changed:
            is_idle = self._thread is None
        if is_idle:
            self._make(copy)
        else:
            self.begin(copy)
            self.finish(copy)

    def finish(self, copy: AdapterCopy) -> None:
        """Wait until a copy that has begun has been made."""
        with self._changed:
            self._changed.wait_for(lambda: copy.is_done)
        if copy.error is not None:
            raise copy.error

    def cancel(self, copy: AdapterCopy) -> None:
        """Give the copy up. Its pages may be given to another copy at once: that one is made after what is left of
        this."""
        copy.is_cancelled = True

    def wait(self, timeout_s: float) -> None:
        """Wait until some copy has been made, at most so long; not at all if none is under way."""
        with self._changed:
            if self._thread is not None:
                self._changed.wait(timeout_s)

    def _work(self) -> None:
        """The thread."""
        while True:
            with self._changed:
                if not self._queue:
                    self._thread = None
                    return
                copy = self._queue.popleft()
            try:
                self._make(copy)
            except Exception as error:  # noqa: BLE001 - raised where the step asks for the copy
                copy.error = error
                copy.is_done = True
            with self._changed:
                self._changed.notify_all()

    def _make(self, copy: AdapterCopy) -> None:
        if self._is_cuda:
            self._make_on_cuda(copy)
        else:
            assert self._bytes is not None
            source = copy.weights.pages.view(torch.uint8).numpy()
            for index, page_id in enumerate(copy.page_ids):
                if copy.is_cancelled:
                    return
                np.copyto(self._bytes[page_id], source[index])
                self._pace(source.shape[1])
            copy.extras = copy.weights.extras
        copy.is_done = True

    def _make_on_cuda(self, copy: AdapterCopy) -> None:
        device = self._pages.device
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            if copy.after is not None:
                self._stream.wait_event(copy.after)
            pages = copy.weights.pages
            for index, page_id in enumerate(copy.page_ids):
                if copy.is_cancelled:
                    return
                self._pages[page_id].copy_(pages[index], non_blocking=True)
                self._stream.synchronize()
                self._pace(pages.shape[1] * pages.element_size())
            copy.extras = copy.weights.extras.to(device) if copy.weights.extras is not None else None
            self._stream.synchronize()

    def _pace(self, num_bytes: int) -> None:
        """Sleep until the link would have carried these bytes too."""
        if self.bytes_per_s is None:
            return
        now_s = time.perf_counter()
        self._link_free_s = max(self._link_free_s, now_s) + num_bytes / self.bytes_per_s
        time.sleep(max(0.0, self._link_free_s - now_s))
