"""LLM: the engine in this process, for scripts and notebooks. No server, no other process.

from pomona import LLM

llm = LLM("pippin")
print(llm.chat("banana", adapter="reverse").text)
"""

import itertools
import operator
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Number
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from pomona.adapters.catalogue import Catalogue
from pomona.cli.build import engine_builder, load_all, sources_of_operator
from pomona.cli.config import load_config
from pomona.cli.hub import model_name
from pomona.cli.interrupts import uninterrupted
from pomona.core.adapter import AdapterInfo
from pomona.core.errors import (
    CheckpointError,
    ConfigError,
    InvalidRequestError,
    PomonaError,
    QueueFullError,
)
from pomona.core.ids import AdapterId, RequestId
from pomona.core.output import EngineStats, RequestOutput
from pomona.core.plan import TokenLogprobs
from pomona.core.request import MAX_SEED, FinishReason, Request, SamplingParams
from pomona.text.chat_template import ChatTemplate
from pomona.text.detokenizer import Detokenizer
from pomona.text.stop import StopMatcher, StopStrings
from pomona.text.tokenizer import Tokenizer

GREEDY = SamplingParams(max_tokens=256, temperature=0.0)
"""What ``LLM`` does unless told otherwise: the most likely token each time, at most 256."""

Prompt = str | Sequence[int]
"""Text, or token ids that are taken as they are."""


@dataclass(slots=True)
class Completion:
    """One finished answer."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    """With FinishReason.FAIL: what went wrong."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One per output token, if the sampling parameters ask for them."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One per prompt token but the first, if asked for."""
    ttft_s: float = 0.0
    """Time to the first token, seconds since the call."""
    e2e_s: float = 0.0
    """Time to the end, seconds since the call."""


class LLM:
    """A base model with adapters, ready to generate. Threads may share it: their calls become one batch.

    Args:
        model: a checkpoint folder, a Hugging Face hub id, or "pippin" (the bundled model with its adapters).
        adapters: name -> folder or hub id, loaded at once.
        settings: any other field of ``AppConfig``, such as dtype="float32" or max_model_len=4096.

    Raises:
        PomonaError: the model, an adapter or a setting is wrong.
    """

    def __init__(self, model: str = "pippin", adapters: Mapping[str, str] | None = None, **settings: Any) -> None:
        named = tuple(f"{name}={source}" for name, source in (adapters or {}).items())
        if named and settings.get("adapter"):
            raise ConfigError("adapter and adapters: must not both be given; name all in adapters")
        config = load_config({"model": model, **settings, **({"adapter": named} if named else {})})
        build = engine_builder(config)
        parts = build()
        self._engine = parts.engine
        self._adapter_host = parts.adapter_host
        self.info = parts.info
        self.tokenizer = Tokenizer.load(Path(build.model_path))
        self.chat_template = ChatTemplate.load(Path(build.model_path), self.tokenizer)
        self._eos_token_ids = parts.info.eos_token_ids
        self._catalogue = Catalogue(config.served_model_name or model_name(config.model))
        self._numbers = itertools.count(1)
        # Held by whoever steps the engine, or changes what it knows.
        self._lock = threading.RLock()
        # Runs that the engine has, of every call under way. Whichever call steps the engine brings all of them forward.
        self._active: dict[RequestId, _Run] = {}
        load_all(config, self.load_adapter)

    @property
    def adapters(self) -> list[str]:
        """Names of the loaded adapters."""
        return [entry.name for entry in self._catalogue.list()]

    def stats(self) -> EngineStats:
        """Counters and gauges of the engine."""
        return self._engine.stats()

    def load_adapter(self, name: str, source: str) -> AdapterInfo:
        """Load a PEFT folder, or a hub id, under ``name``, replacing what had that name.

        Raises:
            InvalidRequestError: no adapter can have this name.
            AdapterError: it cannot be used; nothing changed.
        """
        self._catalogue.validate_name(name)
        source = os.path.expanduser(source)
        folder = sources_of_operator(source).resolve(source)
        with self._lock, uninterrupted():
            info = self._adapter_host.stage(folder)
            self._engine.register_adapter(info)
            self._retire(self._catalogue.register(name, info, source))
        return info

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter and free its memory.

        Raises:
            ModelNotFoundError: there is none of that name.
        """
        with self._lock, uninterrupted():
            self._catalogue.begin_unload(name)
            self._retire(self._catalogue.remove(name))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        adapter: str | Sequence[str | None] | None = None,
        sampling: SamplingParams = GREEDY,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        show_progress: bool = False,
    ) -> list[Completion]:
        """Complete every prompt, all in one batch.

        Args:
            prompts: one or several; text gets the tokenizer's own special tokens, and the answer goes on from it.
            adapter: one for all, or one per prompt; None, or the base model's own name, is the base model. A name that
                is loaded anew meanwhile means the new adapter to prompts that have not begun.
            sampling: how tokens are chosen; the seed of prompt i is ``sampling.seed + i``.
            stop: texts, or one, that end an answer of ``sampling.min_tokens`` tokens or more; they are not part of it.
            ignore_eos: go on past the model's end-of-sequence token.
            show_progress: draw a progress bar.

        Returns:
            One completion per prompt, in order. One that the engine failed on has ``FinishReason.FAIL``, and says why.
        """
        listed = _listed(prompts)
        names = [adapter] * len(listed) if adapter is None or isinstance(adapter, str) else list(adapter)
        if len(names) != len(listed):
            raise ConfigError(f"adapter: {len(names)} given for {len(listed)} prompts")
        runs = [
            self._run(prompt, name, sampling, stop, index=index, ignore_eos=ignore_eos)
            for index, (prompt, name) in enumerate(zip(listed, names, strict=True))
        ]
        waiting, num_open = deque(runs), len(runs)
        request_ids = {run.request.request_id for run in runs}
        try:
            with Progress(console=Console(stderr=True), disable=not show_progress) as progress:
                task = progress.add_task("generating", total=len(runs))
                while num_open:
                    self._step(waiting)
                    with self._lock:  # counting goes through the few that run, not through all prompts
                        num_open = len(waiting) + len(self._active.keys() & request_ids)
                    progress.update(task, completed=len(runs) - num_open)
        finally:
            self._abort(runs)
        return [run.completion for run in runs]

    def stream(
        self,
        prompt: Prompt,
        *,
        adapter: str | None = None,
        sampling: SamplingParams = GREEDY,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> Iterator[str]:
        """Yield the pieces of one answer as they come. Closing the iterator ends the request.

        Several streams may be read in turn, and other calls made in between: each brings all of them forward, and the
        text that came meanwhile is the next piece.

        Raises:
            PomonaError: the engine failed on this answer.
        """
        run = self._run(prompt, adapter, sampling, stop, index=0, ignore_eos=ignore_eos)
        waiting, num_sent = deque([run]), 0
        try:
            while True:
                if piece := run.completion.text[num_sent:]:
                    num_sent += len(piece)
                    yield piece
                elif run.completion.finish_reason is None:
                    self._step(waiting)
                else:
                    break
        finally:
            self._abort([run])
        if run.completion.finish_reason is FinishReason.FAIL:
            raise PomonaError(run.completion.error or "the engine failed")

    def chat(self, messages: str | Sequence[Mapping[str, Any]], **options: Any) -> Completion:
        """Answer a conversation, or a single user message. Takes the options of ``generate``.

        Raises:
            CheckpointError: the model has no chat template.
        """
        return self.generate([self.encode_chat(messages)], **options)[0]

    def encode_chat(self, messages: str | Sequence[Mapping[str, Any]]) -> list[int]:
        """Prompt token ids of a conversation, ready for ``generate`` and ``stream``."""
        if self.chat_template is None:
            raise CheckpointError("the model has no chat template; use generate() with a prompt")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self._encode(self.chat_template.render(messages), add_special_tokens=False)

    def _retire(self, adapter_id: AdapterId | None) -> None:
        if adapter_id is None:
            return
        self._engine.retire_adapter(adapter_id)
        self._step(deque())

    def _unstage_drained(self) -> None:
        """Drop host copies that nothing needs any more; a device copy is given up with a step, so ask after each."""
        for drained in self._engine.take_drained():
            self._adapter_host.unstage(drained)

    def _run(
        self,
        prompt: Prompt,
        adapter: str | None,
        sampling: SamplingParams,
        stop: Sequence[str],
        *,
        index: int,
        ignore_eos: bool,
    ) -> "_Run":
        token_ids = self._encode(prompt) if isinstance(prompt, str) else _token_ids(prompt)
        request = Request(
            request_id=RequestId(f"llm-{next(self._numbers)}"),
            prompt_token_ids=tuple(token_ids),
            sampling=_resolved(sampling, index, () if ignore_eos else self._eos_token_ids),
            arrival_s=time.monotonic(),
            adapter_id=self._adapter_id(adapter),
        )
        # Text goes on; what follows token ids, such as a conversation's, begins anew.
        detokenizer = Detokenizer(self.tokenizer, is_continuation=isinstance(prompt, str))
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(stops):
            raise InvalidRequestError("stop", "stop holds an empty string: must be at least 1 character")
        return _Run(request, adapter, detokenizer, StopMatcher(StopStrings(stops)))

    def _encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError("prompt", f"prompt: is not valid Unicode: {error}") from error
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _adapter_id(self, name: str | None) -> AdapterId | None:
        return None if name is None else self._catalogue.resolve_model(name)

    def _step(self, waiting: deque["_Run"]) -> None:
        """Put in what the engine takes of ``waiting``, step once, and hand every output to the run that it is for."""
        with self._lock, uninterrupted():
            while waiting:
                run = waiting[0]
                if (adapter_id := self._adapter_id(run.adapter)) != run.request.adapter_id:
                    run.request = replace(run.request, adapter_id=adapter_id)  # its name means another one since
                try:
                    self._engine.add(run.request)
                except QueueFullError:
                    break  # the rest goes in as the queue empties
                waiting.popleft()
                self._active[run.request.request_id] = run
            try:
                self._take(self._engine.step(time.monotonic()))
            except BaseException as error:  # outputs may be lost, and others would wait for them for ever
                self._fail_all(f"the model failed: {type(error).__name__}")
                raise
            self._unstage_drained()

    def _take(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            found = self._active.get(output.request_id)
            if found is None:
                continue  # aborted
            found.take(output)
            if found.completion.finish_reason is not None:
                del self._active[output.request_id]
                if output.finish_reason is None:  # a stop string: the engine does not know
                    self._engine.abort(output.request_id)

    def _fail_all(self, reason: str) -> None:
        self._engine.fail_all(reason)
        for request_id, run in self._active.items():
            if run.completion.finish_reason is None:
                run.take(RequestOutput(request_id, finish_reason=FinishReason.FAIL, error=reason))
        self._active.clear()

    def _abort(self, runs: Sequence["_Run"]) -> None:
        """End what the engine still has of these runs."""
        with self._lock, uninterrupted():
            for run in runs:
                if self._active.pop(run.request.request_id, None) is not None:
                    self._engine.abort(run.request.request_id)


class _Run:
    """One request on its way to a completion."""

    def __init__(self, request: Request, adapter: str | None, detokenizer: Detokenizer, stop: StopMatcher) -> None:
        self.request = request
        self.adapter = adapter
        self.completion = Completion(num_prompt_tokens=len(request.prompt_token_ids))
        self._detokenizer = detokenizer
        self._stop = stop

    def take(self, output: RequestOutput) -> None:
        """Add one output, and the text that it makes final."""
        completion = self.completion
        if output.new_token_ids and not completion.token_ids:
            completion.ttft_s = time.monotonic() - self.request.arrival_s
            completion.num_cached_tokens = output.num_cached_tokens
        completion.prompt_logprobs.extend(output.prompt_logprobs)
        text = ""
        for index, token_id in enumerate(output.new_token_ids):
            completion.token_ids.append(token_id)
            completion.logprobs.extend(output.logprobs[index : index + 1])
            if token_id != output.stop_token_id:
                text += self._pass(self._detokenizer.push(token_id))
            if self._stop.matched is not None:
                completion.finish_reason = FinishReason.STOP
                break
        else:
            if output.finish_reason is not None:
                text += self._pass(self._detokenizer.flush())
                is_stopped = self._stop.matched is not None  # by what an incomplete character has become
                completion.finish_reason = FinishReason.STOP if is_stopped else output.finish_reason
                completion.error = output.error
                text += "" if is_stopped else self._stop.flush()
        if completion.finish_reason is not None:
            completion.e2e_s = time.monotonic() - self.request.arrival_s
        completion.text += text

    def _pass(self, text: str) -> str:
        """Let text through the stop strings."""
        is_free = len(self.completion.token_ids) < self.request.sampling.min_tokens
        return text if is_free else self._stop.push(text)


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    items = list(prompts)
    if items and all(isinstance(item, Number) for item in items):
        return [items]  # type: ignore[list-item]
    return items  # type: ignore[return-value]


def _token_ids(prompt: Sequence[int]) -> list[int]:
    try:
        return [operator.index(token_id) for token_id in prompt]
    except TypeError as error:
        raise InvalidRequestError("prompt", f"prompt: must be text or whole token ids: {error}") from error


def _resolved(sampling: SamplingParams, index: int, eos_token_ids: Sequence[int]) -> SamplingParams:
    stop_token_ids = tuple(sorted({*sampling.stop_token_ids, *eos_token_ids}))
    return replace(sampling, seed=(sampling.seed + index) % (MAX_SEED + 1), stop_token_ids=stop_token_ids)
