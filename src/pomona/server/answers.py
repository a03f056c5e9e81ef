"""The bytes of answers: whole bodies through ``responses``, stream chunks put together from ready-made parts.

Per streamed token only the text (and what was asked for beside it) is serialised; everything around it is made once
per choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec

from pomona.core.plan import TokenLogprobs
from pomona.core.request import FinishReason
from pomona.server.choice import Piece, PositionedLogprobs
from pomona.server.responses import (
    ChatAnswer,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from pomona.text.tokenizer import Tokenizer

FINISH_REASONS: Final = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}
"""OpenAI's words; every other end of a request is an error, not an answer."""
_LOWEST_LOGPROB: Final = -9999.0
"""Stands for minus infinity, which JSON does not have (OpenAI's own choice)."""
_encode: Final = msgspec.json.Encoder().encode


class AnswerFormat(Protocol):
    """How one endpoint words its answers."""

    def opening(self, index: int) -> bytes:
        """Events that begin the choice ``index`` of a stream."""
        ...

    def chunk(self, index: int, piece: Piece) -> bytes:
        """Events for a piece that is not empty."""
        ...

    def usage(self, usage: Usage) -> bytes:
        """The event that ends a stream with its usage."""
        ...

    def body(self, choices: Sequence[Piece], usage: Usage) -> bytes:
        """The whole answer; the pieces hold whole choices."""
        ...


@dataclass(frozen=True, slots=True)
class AnswerFacts:
    """What every part of one answer repeats."""

    tokenizer: Tokenizer
    response_id: str
    created_s: int
    """Unix time."""
    model: str
    """As the client wrote it."""
    has_logprobs: bool
    has_usage_event: bool
    """The stream ends with its usage (``stream_options.include_usage``)."""

    def stream_head(self, object_name: str) -> bytes:
        """Beginning of every event, up to the choices."""
        head = {
            "id": self.response_id,
            "object": object_name,
            "created": self.created_s,
            "model": self.model,
            "system_fingerprint": None,
        }
        return b"data: " + _encode(head)[:-1] + b',"choices":['

    @property
    def stream_tail(self) -> bytes:
        """End of every event with a choice."""
        return b'}],"usage":null}\n\n' if self.has_usage_event else b"}]}\n\n"


def _finish_part(piece: Piece) -> bytes:
    if piece.finish_reason is None:
        return b'"finish_reason":null'
    reason = FINISH_REASONS[piece.finish_reason]
    return b'"finish_reason":' + _encode(reason) + b',"stop_reason":' + _encode(piece.stop_reason)


def _usage_event(head: bytes, usage: Usage) -> bytes:
    return head + b'],"usage":' + _encode(usage) + b"}\n\n"


class ChatFormat:
    """chat.completion and chat.completion.chunk."""

    def __init__(self, facts: AnswerFacts) -> None:
        self._facts = facts
        self._head = facts.stream_head("chat.completion.chunk")
        self._tail = facts.stream_tail
        self._text_heads: dict[int, bytes] = {}

    def opening(self, index: int) -> bytes:
        """The event that names the role."""
        delta = b',"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
        return self._head + b'{"index":%d' % index + delta + self._tail

    def chunk(self, index: int, piece: Piece) -> bytes:
        """An event with content, and one that finishes, as far as there is either."""
        events = b""
        if piece.text or piece.logprobs:
            head = self._text_heads.get(index)
            if head is None:
                head = self._text_heads[index] = self._head + b'{"index":%d,"delta":{"content":' % index
            logprobs = _encode(self._logprobs(piece))
            events = head + _encode(piece.text) + b'},"logprobs":' + logprobs + b',"finish_reason":null' + self._tail
        if piece.finish_reason is not None:
            delta = b'{"index":%d,"delta":{},"logprobs":null,' % index
            events += self._head + delta + _finish_part(piece) + self._tail
        return events

    def usage(self, usage: Usage) -> bytes:
        """The event without choices."""
        return _usage_event(self._head, usage)

    def body(self, choices: Sequence[Piece], usage: Usage) -> bytes:
        """A chat.completion object."""
        answers = [
            ChatChoice(
                index=index,
                message=ChatAnswer(piece.text),
                logprobs=self._logprobs(piece),
                finish_reason=_finish_reason(piece),
                stop_reason=piece.stop_reason,
            )
            for index, piece in enumerate(choices)
        ]
        facts = self._facts
        return _encode(ChatCompletion(facts.response_id, facts.created_s, facts.model, answers, usage))

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        if not self._facts.has_logprobs:
            return None
        return ChatLogprobs([self._token(entry.values) for entry in piece.logprobs if entry.values is not None])

    def _token(self, values: TokenLogprobs) -> TokenLogprob:
        tokenizer = self._facts.tokenizer
        top = [
            TopLogprob(tokenizer.token_text(token_id), _number(logprob), list(tokenizer.token_bytes(token_id)))
            for token_id, logprob in values.top
        ]
        token_bytes = list(tokenizer.token_bytes(values.token_id))
        return TokenLogprob(tokenizer.token_text(values.token_id), _number(values.logprob), token_bytes, top)


class CompletionFormat:
    """text_completion, whole and as chunks."""

    def __init__(self, facts: AnswerFacts) -> None:
        self._facts = facts
        self._head = facts.stream_head("text_completion")
        self._tail = facts.stream_tail
        self._text_heads: dict[int, bytes] = {}

    def opening(self, index: int) -> bytes:
        """Nothing: completions have no role."""
        return b""

    def chunk(self, index: int, piece: Piece) -> bytes:
        """One event."""
        head = self._text_heads.get(index)
        if head is None:
            head = self._text_heads[index] = self._head + b'{"index":%d,"text":' % index
        logprobs = _encode(self._logprobs(piece)) if piece.logprobs else b"null"
        return head + _encode(piece.text) + b',"logprobs":' + logprobs + b"," + _finish_part(piece) + self._tail

    def usage(self, usage: Usage) -> bytes:
        """The event without choices."""
        return _usage_event(self._head, usage)

    def body(self, choices: Sequence[Piece], usage: Usage) -> bytes:
        """A text_completion object."""
        texts = [
            CompletionChoice(
                index=index,
                text=piece.text,
                logprobs=self._logprobs(piece),
                finish_reason=_finish_reason(piece),
                stop_reason=piece.stop_reason,
            )
            for index, piece in enumerate(choices)
        ]
        facts = self._facts
        return _encode(Completion(facts.response_id, facts.created_s, facts.model, texts, usage))

    def _logprobs(self, piece: Piece) -> CompletionLogprobs | None:
        if not self._facts.has_logprobs:
            return None
        entries = piece.logprobs
        return CompletionLogprobs(
            tokens=[self._name(entry.token_id) for entry in entries],
            token_logprobs=[None if entry.values is None else _number(entry.values.logprob) for entry in entries],
            top_logprobs=[self._top(entry) for entry in entries],
            text_offset=[entry.text_offset for entry in entries],
        )

    def _top(self, entry: PositionedLogprobs) -> dict[str, float] | None:
        if entry.values is None:
            return None
        top: dict[str, float] = {}
        for token_id, logprob in (*entry.values.top, (entry.values.token_id, entry.values.logprob)):
            # Tokens of the same text share a key; the likelier one keeps it.
            top.setdefault(self._name(token_id), _number(logprob))
        return top

    def _name(self, token_id: int) -> str:
        token_bytes = self._facts.tokenizer.token_bytes(token_id)
        try:
            return token_bytes.decode("utf-8")
        except UnicodeDecodeError:  # a part of a character; OpenAI's spelling
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)


def _finish_reason(piece: Piece) -> str:
    assert piece.finish_reason is not None, "an answer is whole when it has finished"
    return FINISH_REASONS[piece.finish_reason]


def _number(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)
