import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomona.bench.events import EventSplitter, decode_event


def token_event(text: str | None = " tok", finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
    return json.dumps({"id": "cmpl-1", "object": "text_completion", "choices": [choice]}).encode()


@given(
    st.lists(st.text(st.characters(blacklist_categories=["Cs"])), max_size=8),
    st.sampled_from(["\n", "\r\n"]),
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
)
def test_payloads_survive_any_fragmentation(texts, line_end, chunk_lengths):
    payloads = [json.dumps({"text": text}).encode() for text in texts]
    comment = f": keep-alive{line_end}{line_end}".encode()
    stream = b"".join(b"data: " + payload + 2 * line_end.encode() + comment for payload in payloads)
    splitter, seen = EventSplitter(), []
    position, turn = 0, 0
    while position < len(stream):
        length = chunk_lengths[turn % len(chunk_lengths)]
        seen += splitter.feed(stream[position : position + length])
        position, turn = position + length, turn + 1
    assert seen == payloads


def test_the_space_after_data_is_optional():
    assert EventSplitter().feed(b"data:[DONE]\n\n") == [b"[DONE]"]


@pytest.mark.parametrize(
    "event, is_token",
    [
        (token_event(" tok"), True),
        (token_event(" tok", finish_reason="length"), True),
        (token_event(""), True),
        (token_event(None), True),
        (token_event("", finish_reason="stop"), False),
        (b'{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}', False),
    ],
)
def test_an_event_brings_a_token_unless_it_only_ends_the_answer_or_counts(event, is_token):
    assert decode_event(event).is_token == is_token


def test_cached_tokens_are_read_when_the_server_tells_them():
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}
    with_details, without = (
        decode_event(json.dumps({"choices": [], "usage": value}).encode()).usage
        for value in (usage, {**usage, "prompt_tokens_details": None})
    )
    assert with_details is not None and with_details.num_cached_tokens == 1
    assert without is not None and without.num_cached_tokens is None


@pytest.mark.parametrize("payload", [b"{not json}", b'{"choices": 3}', b'{"usage": {"prompt_tokens": "many"}}'])
def test_what_is_no_completion_event_is_refused(payload):
    with pytest.raises(msgspec.DecodeError):
        decode_event(payload)
