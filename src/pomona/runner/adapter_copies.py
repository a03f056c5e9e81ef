"""AdapterCopies: adapters' pages on their way from host memory to the device, beside the steps.

One thread makes copies in order, each layer by layer: a layer of an adapter can be used as soon as it has arrived. On
CUDA it has a stream of its own, which waits for what the device had been asked to do when the copy began: steps that
may still read those pages. A *link* may be held to a speed, so that what slow copies do can be seen where copies are
fast.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from pomona.model.adapter_weights import AdapterWeights
from pomona.model.lora import AdapterExtras

_LINGER_S = 1.0
"""The thread waits this long for another copy before it ends: to start one takes as long as a small copy."""


@dataclass(eq=False)
class AdapterCopy:
    """One adapter's copy: asked for, under way, made or given up."""

    weights: AdapterWeights
    page_ids: tuple[int, ...]
    """Where the pages of ``weights`` go, in order."""
    after: torch.cuda.Event | None = None
    """What the device must have done before; None on a CPU."""
    num_layers: int = 0
    """So many layers have arrived, the first ones: steps made from now on may read them on the device."""
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
        num_layers: into so many equal parts a page falls.
        bytes_per_s: speed of the link; None for as fast as it goes.
    """

    def __init__(self, pages: Tensor, num_layers: int, bytes_per_s: float | None) -> None:
        self._pages = pages
        self._num_layers = num_layers
        self.bytes_per_s = bytes_per_s
        self.piece_bytes = 2**20
        """Layers are copied together until they have this many bytes: every piece costs a turn of the thread, on CUDA a
        wait for the stream too."""
        self._is_cuda = pages.device.type == "cuda"
        self._stream: torch.cuda.Stream | None = None
        self._changed = threading.Condition()
        self._writing = threading.Lock()
        """Held while something is written, and to cancel: a copy given up has stopped writing."""
        self._queue: deque[AdapterCopy] = deque()
        self._num_begun = 0
        """Copies that have been begun and not ended."""
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
        """Have the copy made beside the caller, after those begun before. It fails if there is no thread for it."""
        with self._changed:
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="pomona-adapter-copies", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # of this adapter alone, as in _make
                    copy.error = error
                    copy.is_done = True
                    return
                self._thread = thread
            self._queue.append(copy)
            self._num_begun += 1
            self._changed.notify_all()

    def make(self, copy: AdapterCopy) -> None:
        """Have the copy made, or fail, before this returns."""
        with self._changed:
            is_idle = self._num_begun == 0
        if is_idle:
            self._make(copy)
        else:
            self.begin(copy)
            self.finish(copy)

    def finish(self, copy: AdapterCopy) -> None:
        """Wait until a copy that has begun has been made, or has failed."""
        with self._changed:
            self._changed.wait_for(lambda: copy.is_done)

    def cancel(self, copy: AdapterCopy) -> None:
        """Give the copy up. When this returns, it writes nothing any more: a piece that is being copied is waited for,
        the link never."""
        copy.is_cancelled = True  # before the lock, which the thread may take again and again
        with self._writing:
            pass

    def wait(self, timeout_s: float) -> None:
        """Wait until some copy has been made, at most so long; not at all if none is under way."""
        with self._changed:
            if self._num_begun:
                self._changed.wait(timeout_s)

    def _work(self) -> None:
        """The thread."""
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: self._queue, _LINGER_S):
                    self._thread = None
                    return
                copy = self._queue.popleft()
            self._make(copy)
            with self._changed:
                self._num_begun -= 1
                self._changed.notify_all()

    def _make(self, copy: AdapterCopy) -> None:
        try:
            self._carry_out(copy)
        except Exception as error:  # noqa: BLE001 - of this adapter alone: memory for its extras, say
            copy.error = error
            copy.is_done = True

    def _carry_out(self, copy: AdapterCopy) -> None:
        if self._is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(self._pages.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            if self._stream is not None and copy.after is not None:
                self._stream.wait_event(copy.after)
                self._stream.synchronize()  # who cancels waits for a write, never for a step
            source = copy.weights.pages
            layer_bytes = source.nbytes // self._num_layers
            step = max(1, -(-self.piece_bytes // max(1, layer_bytes)))
            runs = _neighbours(copy.page_ids)
            for first in range(0, self._num_layers, step):
                end = min(first + step, self._num_layers)
                with self._writing:
                    if copy.is_cancelled:
                        return
                    self._write(source, runs, first, end)
                copy.num_layers = end
                self._pace(layer_bytes * (end - first))
            if copy.weights.extras is not None:
                copy.extras = copy.weights.extras
                if self._stream is not None:
                    copy.extras = copy.extras.to(self._pages.device)
                    for tensor in copy.extras.tensors():
                        # Given up in the middle of a step, memory waits for it: the next copy's extras get it then.
                        tensor.record_stream(torch.cuda.default_stream(tensor.device))
                    self._stream.synchronize()
        copy.is_done = True

    def _write(self, source: Tensor, runs: Sequence[tuple[int, int, int]], first: int, end: int) -> None:
        """Copy layers [first, end) of all pages.

        Args:
            source: [n, page_elems] on the host.
            runs: see ``_neighbours``.
            first: layer.
            end: one past the last layer.
        """
        layer_elems = source.shape[1] // self._num_layers
        columns = slice(first * layer_elems, end * layer_elems)
        for index, page_id, count in runs:
            assert 0 <= page_id <= page_id + count <= self._pages.shape[0]
            to, found = self._pages[page_id : page_id + count, columns], source[index : index + count, columns]
            if self._stream is not None:
                to.copy_(found, non_blocking=True)
            else:
                # numpy's copy runs without the interpreter's lock, and on this thread alone.
                np.copyto(to.view(torch.uint8).numpy(), found.view(torch.uint8).numpy())
        if self._stream is not None:
            self._stream.synchronize()

    def _pace(self, num_bytes: int) -> None:
        """Sleep until the link would have carried these bytes too."""
        if self.bytes_per_s is None:
            return
        now_s = time.perf_counter()
        self._link_free_s = max(self._link_free_s, now_s) + num_bytes / self.bytes_per_s
        time.sleep(max(0.0, self._link_free_s - now_s))


def _neighbours(page_ids: Sequence[int]) -> list[tuple[int, int, int]]:
    """(index, page id, count) of runs of pages that stand side by side in order."""
    breaks = [index for index in range(1, len(page_ids)) if page_ids[index] != page_ids[index - 1] + 1]
    bounds = (0, *breaks, len(page_ids)) if page_ids else ()
    return [(start, page_ids[start], end - start) for start, end in pairwise(bounds)]
