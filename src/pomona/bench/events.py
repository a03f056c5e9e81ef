"""What a streaming completion sends: server-sent events, split and decoded at the least cost per token.

Decoding is typed and skips every field the load generator does not need; one event costs about a microsecond.
"""

from typing import Any

import msgspec

DONE = b"[DONE]"
"""Payload that ends a stream in OpenAI's protocol."""


class _Choice(msgspec.Struct):
    text: str | None = None
    finish_reason: str | None = None


class _PromptTokensDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """The server's own token counts, sent with the last event when ``stream_options.include_usage`` is set."""

    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _PromptTokensDetails | None = None

    @property
    def num_cached_tokens(self) -> int | None:
        """Prompt tokens that came from a prefix cache, if the server says."""
        return self.prompt_tokens_details.cached_tokens if self.prompt_tokens_details else None


class CompletionEvent(msgspec.Struct):
    """One chunk of /v1/completions, as far as it matters here."""

    choices: list[_Choice] = []
    usage: Usage | None = None
    error: Any = None

    @property
    def finish_reason(self) -> str | None:
        """Why the answer ended, on the event that ends it."""
        return self.choices[0].finish_reason if self.choices else None

    @property
    def is_token(self) -> bool:
        """True if the event brings an output token.

        A token whose text is held back (half a character) or is empty (a special token) arrives as an event without
        text; an event without text that only ends the answer brings none.
        """
        return bool(self.choices) and (bool(self.choices[0].text) or self.choices[0].finish_reason is None)


decode_event = msgspec.json.Decoder(CompletionEvent).decode
"""Payload bytes -> CompletionEvent. Raises msgspec.DecodeError (ValidationError included)."""


class EventSplitter:
    """Cuts a byte stream, however fragmented, into the payloads of its ``data:`` lines.

    Every line is a payload of its own: OpenAI-style events carry one line of JSON. Comments and other fields are
    skipped; lines may end in LF or CRLF.
    """

    def __init__(self) -> None:
        """Start at a line's beginning."""
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the payloads that ``chunk`` completes, in order."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]
