import asyncio
from collections.abc import Iterator

import pytest
import zmq

from pomona.core.ids import RequestId
from pomona.core.output import EngineStats, RequestOutput
from pomona.driver.channel import Address, ClientChannel, EngineChannel
from pomona.driver.messages import Abort, AdapterUnloaded, Ping, Report, TurnReport

_ADDRESS = Address("inproc://commands", "inproc://reports")


@pytest.fixture
def context() -> Iterator["zmq.Context[zmq.Socket[bytes]]"]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.term()


async def _read_all(client: ClientChannel, received: list[Report], num_tokens: int) -> None:
    while sum(len(output.new_token_ids) for report in received for output in report.outputs) < num_tokens:
        await asyncio.sleep(0.001)
        client.read()


async def test_a_client_that_does_not_read_neither_blocks_the_engine_nor_loses_outputs(context):
    received: list[Report] = []
    client = ClientChannel(context, _ADDRESS, 2, received.append)
    engine = EngineChannel(context, _ADDRESS, 2)
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
    assert len(received) < 20, "what could not be sent was joined"
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


async def test_a_turn_without_news_sends_nothing(context):
    received: list[Report] = []
    client = ClientChannel(context, _ADDRESS, 2, received.append)
    engine = EngineChannel(context, _ADDRESS, 2)
    engine.tell_turn([], [], EngineStats())
    client.read()
    assert received == []
    engine.close()
    client.close()


async def test_commands_arrive_in_order_and_every_one_is_counted_in_the_next_report(context):
    received: list[Report] = []
    client = ClientChannel(context, _ADDRESS, 2, received.append)
    engine = EngineChannel(context, _ADDRESS, 2)
    sent = [Abort(RequestId(str(index))) for index in range(1000)]
    assert all(client.send(command) for command in sent)
    arrived = []
    while len(arrived) < len(sent):
        arrived += engine.receive(1.0)
    assert arrived == sent
    engine.tell_turn([], [], EngineStats())
    client.read()
    assert [report.num_commands for report in received] == [client.num_sent] == [1000]
    assert engine.receive(0.0) == []
    assert engine.receive(0.001) == []
    engine.close()
    client.close()


async def test_a_command_to_nobody_is_refused_at_once(context):
    client = ClientChannel(context, _ADDRESS, 2, lambda report: None)
    assert not client.send(Ping())
    client.close()
    client.close()
    assert not client.send(Ping())
    assert client.num_sent == 0
