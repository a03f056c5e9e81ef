"""What the server does per streamed token, counted for a fixed workload: a guard that no clock can blur."""

import asyncio
import sys
from collections import Counter
from types import FrameType

import pytest

from pomona.core.errors import EngineUnavailableError
from pomona.core.output import RequestOutput
from support.tokenizers import make_tokenizer_files
from support.turns import TurnClient, Wire, open_streams, turn_app

NUM_STREAMS, NUM_TURNS = 32, 10
MAX_CALLS = 32
"""Of the server and the libraries it stands on; the event loop's own do not count."""
TOKEN = 100
BODY = {"prompt": [TOKEN], "max_tokens": 100, "ignore_eos": True}


async def _turn(client: TurnClient, num_new: int = 1) -> None:
    """A report with news of every stream, and what the server makes of it."""
    client.turn(RequestOutput(request_id, (TOKEN,) * num_new) for request_id in client.request_ids)
    for _ in range(3):
        await asyncio.sleep(0)


def _num_writes(wires: list[Wire]) -> int:
    return sum(len(wire.writes) for wire in wires)


@pytest.fixture
async def streams(tmp_path):
    """(client, wires) of streams whose first token is out; ended when the test ends."""
    client = TurnClient()
    wires = await open_streams(turn_app(client, make_tokenizer_files(tmp_path / "t")), client, [BODY] * NUM_STREAMS)
    await _turn(client)
    assert all(b"data: " in wire.writes[-1] for wire in wires)
    yield client, wires
    client.session.end(EngineUnavailableError("the test is over"))
    for _ in range(10):
        await asyncio.sleep(0)


async def test_every_stream_is_woken_once_and_written_once_per_step(streams, monkeypatch):
    client, wires = streams
    before = _num_writes(wires)
    num_wakes = 0
    loop = asyncio.get_running_loop()
    call_soon = loop.call_soon

    def counting(*args, **kwargs):
        nonlocal num_wakes
        num_wakes += 1
        return call_soon(*args, **kwargs)

    monkeypatch.setattr(loop, "call_soon", counting)
    for _ in range(NUM_TURNS):
        await _turn(client)
    assert _num_writes(wires) - before == NUM_STREAMS * NUM_TURNS
    own_wakes = NUM_TURNS * 3  # sleeps of the test itself
    assert num_wakes <= NUM_STREAMS * NUM_TURNS + own_wakes


async def test_tokens_that_come_together_are_one_write_with_all_of_their_text(streams):
    client, wires = streams
    before = _num_writes(wires)
    await _turn(client, num_new=7)
    assert _num_writes(wires) - before == NUM_STREAMS
    single = wires[0].writes[-2].count(b"\n\n")
    assert wires[0].writes[-1].count(b"\n\n") == single


async def test_a_streamed_token_costs_few_python_calls(streams):
    client, _ = streams
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: object) -> None:
        del argument
        path = frame.f_code.co_filename
        if event == "call" and ("site-packages" in path or "/pomona/" in path):
            calls[frame.f_code.co_qualname] += 1

    sys.setprofile(count)
    try:
        for _ in range(NUM_TURNS):
            await _turn(client)
    finally:
        sys.setprofile(None)
    per_token = calls.total() / (NUM_STREAMS * NUM_TURNS)
    assert per_token <= MAX_CALLS, calls.most_common(40)
