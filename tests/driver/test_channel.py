import asyncio
import socket
from collections.abc import Iterator

import pytest

from pomona.core.ids import RequestId
from pomona.core.output import EngineStats, RequestOutput
from pomona.driver.channel import ClientChannel, EngineChannel, socket_pair
from pomona.driver.messages import Abort, AdapterUnloaded, Ended, Ping, Report, Shutdown, Submit, TurnReport
from support.driver import make_request

Ends = tuple[socket.socket, socket.socket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    client, engine = socket_pair()
    yield client, engine
    client.close()
    engine.close()


async def _read_all(client: ClientChannel, received: list[Report], num_tokens: int) -> None:
    while sum(len(output.new_token_ids) for report in received for output in report.outputs) < num_tokens:
        await asyncio.sleep(0.001)
        client.read()


async def test_a_client_that_does_not_read_neither_blocks_the_engine_nor_loses_outputs(ends):
    received: list[Report] = []
    client = ClientChannel(ends[0], received.append)
    engine = EngineChannel(ends[1])
    num_steps, num_requests = 3000, 4
    for step in range(num_steps):
        # The event loop never turns meanwhile: this is a server that is stuck.
        outputs = [RequestOutput(RequestId(str(name)), (step,)) for name in range(num_requests)]
        engine.tell_turn(outputs, [AdapterUnloaded(step)], EngineStats(num_steps=step))
    assert engine.has_unsent
    while engine.has_unsent:
        await asyncio.sleep(0.001)
        engine.tell_turn([], [], EngineStats(num_steps=num_steps))
    await _read_all(client, received, num_steps * num_requests)

    assert all(isinstance(report, TurnReport) for report in received)
    assert len(received) < num_steps / 10, "what could not be sent was joined"
    assert [reply.call_id for report in received for reply in report.replies] == list(range(num_steps))
    for name in range(num_requests):
        tokens = [
            token
            for report in received
            for output in report.outputs
            if output.request_id == str(name)
            for token in output.new_token_ids
        ]
        assert tokens == list(range(num_steps))
    engine.close()
    client.close()


async def test_a_turn_without_news_sends_nothing(ends):
    received: list[Report] = []
    client = ClientChannel(ends[0], received.append)
    engine = EngineChannel(ends[1])
    engine.tell_turn([], [], EngineStats())
    client.read()
    assert received == []
    engine.close()
    client.close()


async def test_commands_arrive_in_order_and_every_one_is_counted_in_the_next_report(ends):
    received: list[Report] = []
    client = ClientChannel(ends[0], received.append)
    engine = EngineChannel(ends[1])
    sent = [Abort(RequestId(str(index))) for index in range(1000)]
    assert all(client.send(command) for command in sent)
    arrived = []
    while len(arrived) < len(sent):
        await asyncio.sleep(0)
        arrived += engine.receive(1.0)
    assert arrived == sent
    engine.tell_turn([], [], EngineStats())
    client.read()
    assert [report.num_commands for report in received] == [client.num_sent] == [1000]
    assert engine.receive(0.0) == []
    assert engine.receive(0.001) == []
    engine.close()
    client.close()


async def test_a_client_sends_more_commands_than_the_socket_takes_without_waiting(ends):
    client = ClientChannel(ends[0], lambda report: None)
    engine = EngineChannel(ends[1])
    sent = [Submit(make_request(str(index), (1,) * 1000)) for index in range(1000)]
    assert all(client.send(command) for command in sent)
    arrived = []
    while len(arrived) < len(sent):
        await asyncio.sleep(0)
        arrived += engine.receive(0.0)
    assert arrived == sent
    engine.close()
    client.close()


async def test_a_frame_may_be_larger_than_the_socket_and_arrives_whole(ends):
    received: list[Report] = []
    client = ClientChannel(ends[0], received.append)
    engine = EngineChannel(ends[1])
    output = RequestOutput(RequestId("long"), tuple(range(300_000)))
    engine.tell_turn([output], [], EngineStats())
    assert engine.has_unsent
    while engine.has_unsent:
        await asyncio.sleep(0)
        engine.tell_turn([], [], EngineStats())
    await _read_all(client, received, 300_000)
    assert [report.outputs for report in received] == [[output]]
    engine.close()
    client.close()


async def test_the_last_words_of_an_engine_that_is_gone_are_read_and_nothing_can_be_sent_to_it(ends):
    received: list[Report] = []
    client = ClientChannel(ends[0], received.append)
    engine = EngineChannel(ends[1])
    engine.tell(Ended(None))
    engine.close()
    assert not client.send(Ping())
    client.read()
    assert received == [Ended(None)]
    assert not client.send(Ping())
    assert client.num_sent == 0
    client.close()
    client.close()
    assert not client.send(Ping())


async def test_an_engine_whose_client_is_gone_is_told_to_shut_down_after_the_last_commands(ends):
    client = ClientChannel(ends[0], lambda report: None)
    engine = EngineChannel(ends[1])
    client.send(Ping())
    client.close()
    assert engine.receive(None) == [Ping()]
    assert engine.receive(None) == [Shutdown()]
    engine.tell(Ended(None))
    engine.tell_turn([RequestOutput(RequestId("x"), (1,))], [], EngineStats())
    assert not engine.has_unsent
    engine.close()
