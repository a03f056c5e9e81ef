"""What only a process can do: die, hang, fail to start, and be started again."""

import asyncio
import contextlib
import errno
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import uvloop

from pomona.core.errors import CheckpointError, ConfigError, EngineUnavailableError, InvalidRequestError, PomonaError
from pomona.core.output import EngineStats
from pomona.core.request import FinishReason
from pomona.driver.client import ProcessClient
from pomona.driver.config import DriverConfig
from pomona.driver.life import EngineLife
from support.driver import (
    HANG_TOKEN,
    KILL_TOKEN,
    RAISE_TOKEN,
    TinyBuilder,
    expected_tokens,
    is_idle,
    make_adapter,
    make_request,
    read,
    until,
)

_QUICK = DriverConfig(restart_delay_s=0.01, max_restart_delay_s=0.05)


async def _serves(client: ProcessClient, name: str, adapter_id=None) -> None:
    request = make_request(name, adapter_id=adapter_id)
    assert (await read(client.submit(request))) == (expected_tokens(request), FinishReason.LENGTH)


async def test_signals_that_come_while_the_engines_process_begins_are_ignored_as_later_ones_are(monkeypatch):
    class Signalled(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.send_signal(signal.SIGINT)
            self.send_signal(signal.SIGTERM)

    monkeypatch.setattr(subprocess, "Popen", Signalled)
    async with ProcessClient(TinyBuilder(), _QUICK) as client:
        status = Path(f"/proc/{client.pid}/status").read_text()
        assert int(re.search(r"SigBlk:\s*(\w+)", status)[1], 16) == 0, "nothing is blocked for its own children"
        await _serves(client, "a")


async def test_a_killed_engine_fails_its_requests_and_comes_back_without_adapters(tmp_path: Path):
    states: list[str] = []
    async with ProcessClient(TinyBuilder(step_s=0.001), _QUICK, on_state=states.append) as client:
        info = await client.load_adapter(make_adapter(tmp_path / "a"))
        streams = [client.submit(make_request(str(index), max_tokens=4000)) for index in range(8)]
        for stream in streams:
            await anext(stream)
        first_pid = client.pid
        os.kill(first_pid, signal.SIGKILL)
        outputs = [[output async for output in stream][-1] for stream in streams]

        assert {output.finish_reason for output in outputs} == {FinishReason.FAIL}
        assert {output.error for output in outputs} == {"the engine's process was killed by SIGKILL (out of memory?)"}
        assert not client.is_ready
        assert client.state.startswith("restarting: the engine's process was killed by SIGKILL")
        assert client.stats() == EngineStats()
        with pytest.raises(EngineUnavailableError, match="restarting"):
            client.submit(make_request("too early"))
        with pytest.raises(EngineUnavailableError):
            await client.load_adapter(str(tmp_path / "a"))

        await until(lambda: client.is_ready, "restart")
        assert client.pid != first_pid
        await _serves(client, "base")
        assert client.num_restarts == 1
        with pytest.raises(InvalidRequestError, match="not registered"):
            await read(client.submit(make_request("too early", adapter_id=info.adapter_id)))
        assert (await client.load_adapter(str(tmp_path / "a"))).adapter_id == info.adapter_id
        await _serves(client, "adapter", info.adapter_id)
    assert [state.split(":")[0] for state in states] == ["starting", "ready", "restarting", "ready", "closed"]


@pytest.mark.parametrize(
    ("token", "reason"), [(KILL_TOKEN, "killed by SIGKILL"), (RAISE_TOKEN, "the engine failed: RuntimeError")]
)
async def test_an_engine_that_a_request_brings_down_fails_that_request_and_comes_back(token, reason):
    async with ProcessClient(TinyBuilder(), _QUICK) as client:
        outputs = [output async for output in client.submit(make_request("bad", (token,)))]
        assert outputs[-1].finish_reason is FinishReason.FAIL
        assert reason in (outputs[-1].error or "")
        await until(lambda: client.is_ready, "restart")
        await _serves(client, "next")


@pytest.mark.parametrize(("level", "num_lines"), [(logging.INFO, 1), (logging.CRITICAL, 0)])
async def test_what_the_engine_logs_has_a_date_and_a_level_too_and_is_as_severe_as_asked(
    level, num_lines, tmp_path, capfd, caplog
):
    caplog.set_level(level)
    async with ProcessClient(TinyBuilder(), _QUICK) as client:
        with pytest.raises(PomonaError, match="a bug in the host"):
            await client.load_adapter(make_adapter(tmp_path / "a", "bug"))
    lines = [line for line in capfd.readouterr().err.splitlines() if "Staging" in line]
    assert len(lines) == num_lines
    assert all(re.match(r"\d{4}-\d\d-\d\d \S+ ERROR Staging .* failed", line) for line in lines)


@pytest.mark.skipif(not hasattr(signal, "SIGRTMIN"), reason="the system has no real-time signals")
async def test_an_engine_killed_by_a_signal_without_a_name_fails_its_requests_and_comes_back():
    async with ProcessClient(TinyBuilder(step_s=0.001), _QUICK) as client:
        stream = client.submit(make_request("long", max_tokens=4000))
        await anext(stream)
        os.kill(client.pid, signal.SIGRTMIN + 2)
        async with asyncio.timeout(10.0):
            outputs = [output async for output in stream]
        assert outputs[-1].finish_reason is FinishReason.FAIL
        assert outputs[-1].error == f"the engine's process was killed by signal {signal.SIGRTMIN + 2}"
        await until(lambda: client.is_ready, "restart")
        await _serves(client, "next")


async def test_a_failure_of_whoever_watches_the_engine_ends_its_requests(monkeypatch: pytest.MonkeyPatch):
    async with ProcessClient(TinyBuilder(step_s=0.001), _QUICK) as client:
        stream = client.submit(make_request("long", max_tokens=4000))
        await anext(stream)
        monkeypatch.setattr(EngineLife, "end", _fail)
        os.kill(client.pid, signal.SIGKILL)
        async with asyncio.timeout(10.0):
            outputs = [output async for output in stream]
        monkeypatch.undo()
        assert (outputs[-1].finish_reason, outputs[-1].error) == (FinishReason.FAIL, "OSError: no more descriptors")
        assert client.state == "failed: OSError: no more descriptors"


async def _fail(_life: EngineLife, _reason: str) -> None:
    raise OSError("no more descriptors")


async def test_a_hung_engine_is_killed_and_an_idle_one_is_not():
    config = DriverConfig(ping_interval_s=0.1, hang_limit_s=1.5, restart_delay_s=0.01)
    async with ProcessClient(TinyBuilder(), config) as client:
        first_pid = client.pid
        await asyncio.sleep(2.0)
        assert (client.is_ready, client.pid) == (True, first_pid)
        outputs = [output async for output in client.submit(make_request("hang", (HANG_TOKEN,)))]
        assert outputs[-1].finish_reason is FinishReason.FAIL
        assert outputs[-1].error == "the engine has not answered for 1.5 s"
        await until(lambda: client.is_ready, "restart")
        await _serves(client, "next")


async def test_what_is_resident_is_told(tmp_path: Path):
    async with ProcessClient(TinyBuilder(), _QUICK) as client:
        ids = [(await client.load_adapter(make_adapter(tmp_path / name, name))).adapter_id for name in ("a", "b")]
        assert await client.resident_adapters() == frozenset()
        await _serves(client, "one", ids[0])
        assert await client.resident_adapters() == {ids[0]}
        os.kill(client.pid, signal.SIGKILL)
        await until(lambda: not client.is_ready, "death")
        with pytest.raises(EngineUnavailableError):
            await client.resident_adapters()


async def test_a_listener_that_fails_does_not_keep_the_engine_from_coming_back():
    def fail(*_: object) -> None:
        raise KeyError("a task that is gone")

    async with ProcessClient(TinyBuilder(), _QUICK, on_state=fail) as client:
        os.kill(client.pid, signal.SIGKILL)
        await until(lambda: not client.is_ready, "death")
        await until(lambda: client.is_ready, "restart")
        await _serves(client, "next")


@pytest.mark.parametrize("refused", ["pathlib.Path.write_bytes", "os.pipe", "tempfile.mkdtemp"])
async def test_a_restart_that_the_system_refuses_for_a_moment_is_tried_again(refused: str, monkeypatch):
    states: list[str] = []
    async with ProcessClient(TinyBuilder(), replace(_QUICK, max_deaths=1000), on_state=states.append) as client:
        with monkeypatch.context() as patch:
            patch.setattr(refused, _refuse)
            os.kill(client.pid, signal.SIGKILL)
            await until(lambda: any("No space left" in state for state in states), "refusal")
        await until(lambda: client.is_ready, "restart")
        await _serves(client, "next")


def _refuse(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


async def test_adapter_calls_in_flight_when_the_engine_dies_are_answered(tmp_path: Path):
    async with ProcessClient(TinyBuilder(step_s=0.001), _QUICK) as client:
        info = await client.load_adapter(make_adapter(tmp_path / "a", "a"))
        stream = client.submit(make_request("busy", max_tokens=4000, adapter_id=info.adapter_id))
        await anext(stream)
        load = asyncio.create_task(client.load_adapter(make_adapter(tmp_path / "b", "b", seconds=600.0)))
        unload = asyncio.create_task(client.unload_adapter(info.adapter_id))
        await anext(stream)
        os.kill(client.pid, signal.SIGKILL)
        for call in (load, unload):
            with pytest.raises(EngineUnavailableError, match="SIGKILL"):
                await call
        assert (await read(stream))[1] is FinishReason.FAIL
        await until(lambda: client.is_ready, "restart")
        await _serves(client, "next")


async def test_after_too_many_deaths_it_stays_failed(tmp_path: Path):
    builder = TinyBuilder(marker=str(tmp_path / "started"), later=TinyBuilder(error=CheckpointError("disk gone")))
    async with ProcessClient(builder, DriverConfig(max_deaths=3, restart_delay_s=0.01)) as client:
        os.kill(client.pid, signal.SIGKILL)
        await until(lambda: client.state.startswith("failed"), "giving up")
        assert client.state == "failed: disk gone"
        assert not client.is_ready
        assert client.pid == 0
        with pytest.raises(EngineUnavailableError, match=r"not ready: failed$"):
            client.submit(make_request("r"))


@pytest.mark.parametrize(
    ("builder", "error", "text"),
    [
        (TinyBuilder(error=CheckpointError("no config.json in /nowhere")), CheckpointError, "no config.json"),
        (TinyBuilder(error=ConfigError("max_waiting is 0")), ConfigError, "max_waiting is 0"),
        (TinyBuilder(kill=True), EngineUnavailableError, "killed by SIGKILL"),
        (TinyBuilder(max_waiting=-1), ConfigError, "max_waiting"),
        (lambda report_progress: None, ConfigError, "build: cannot be sent"),
    ],
    ids=["checkpoint", "config", "killed", "scheduler", "unpicklable"],
)
async def test_an_engine_that_cannot_start_raises_the_reason(builder, error, text):
    client = ProcessClient(builder)
    with pytest.raises(error, match=text) as caught:
        await client.start()
    assert type(caught.value) is error
    assert not client.is_ready
    assert client.state.startswith("failed: ")
    await client.close()


async def test_a_builder_that_hangs_is_given_up():
    client = ProcessClient(TinyBuilder(start_s=3600.0), DriverConfig(start_silence_limit_s=1.0))
    with pytest.raises(EngineUnavailableError, match="has not answered for 1 s"):
        await client.start()


async def test_start_up_progress_is_told():
    states: list[str] = []
    async with ProcessClient(TinyBuilder(progress=("loading weights 35%", "warming up")), on_state=states.append):
        assert states == ["starting", "starting: loading weights 35%", "starting: warming up", "ready"]


async def test_a_start_can_be_cancelled():
    states: list[str] = []
    client = ProcessClient(TinyBuilder(progress=("hanging",), start_s=3600.0), on_state=states.append)
    start = asyncio.create_task(client.start())
    await until(lambda: len(states) == 2, "the builder")
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start


async def test_close_during_a_restart_leaves_nothing(tmp_path: Path):
    builder = TinyBuilder(marker=str(tmp_path / "started"), later=TinyBuilder(progress=("hanging",), start_s=3600.0))
    async with ProcessClient(builder, _QUICK) as client:
        os.kill(client.pid, signal.SIGKILL)
        await until(lambda: client.state == "restarting: hanging", "restart")


async def test_an_engine_that_does_not_stop_is_killed(tmp_path: Path):
    async with ProcessClient(TinyBuilder(), DriverConfig(stop_limit_s=0.2)) as client:
        reader = asyncio.create_task(read(client.submit(make_request("hang", (HANG_TOKEN,)))))
        await asyncio.sleep(0.1)
        await client.close()
        assert (await reader)[1] is FinishReason.FAIL


async def test_the_terminals_signals_do_not_reach_the_engine():
    async with ProcessClient(TinyBuilder()) as client:
        pid = client.pid
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
        await _serves(client, "r")
        assert client.pid == pid


async def test_what_the_child_reads_is_private_and_gone_once_the_engine_runs():
    seen: list[tuple[int, int]] = []

    def look(state: str) -> None:
        if state == "starting":
            return
        directories = list(Path(tempfile.gettempdir()).iterdir())
        seen.append((len(directories), os.stat(directories[0]).st_mode & 0o777 if directories else 0))

    client = ProcessClient(TinyBuilder(progress=("building",)), on_state=look)
    start = asyncio.create_task(client.start())
    await until(lambda: os.listdir(tempfile.gettempdir()) != [], "the directory")
    (directory,) = Path(tempfile.gettempdir()).iterdir()
    assert directory.stat().st_mode & 0o777 == 0o700
    await start
    assert seen == [(0, 0), (0, 0)]
    await client.close()


async def test_starting_and_closing_leaves_no_file_descriptor_open():
    async with ProcessClient(TinyBuilder()) as client:
        await _serves(client, "warm")
    before = os.listdir("/proc/self/fd")
    for index in range(3):
        async with ProcessClient(TinyBuilder()) as client:
            await _serves(client, str(index))
    assert os.listdir("/proc/self/fd") == before


_PARENT = """
import asyncio, sys
from support.driver import TinyBuilder
from pomona.driver.client import ProcessClient

async def main():
    client = ProcessClient(TinyBuilder(), on_state=lambda state: print(state, flush=True))
    await client.start()
    print(client.pid, flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


def test_an_engine_whose_parent_is_killed_dies_and_leaves_no_files():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": tempfile.gettempdir()}
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT], env=environment, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        assert [parent.stdout.readline().strip() for _ in range(2)] == ["starting", "ready"]
        child_pid = int(parent.stdout.readline())
        assert Path(f"/proc/{child_pid}").exists()
        parent.kill()

    async def wait() -> None:
        await until(lambda: not _is_alive(child_pid), "the child's death")

    asyncio.run(wait())


def _is_alive(pid: int) -> bool:
    """Neither gone nor a zombie that some init process has yet to reap."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_it_runs_on_uvloop_as_well():
    async def main() -> None:
        async with ProcessClient(TinyBuilder()) as client:
            requests = [make_request(str(index), (index + 1,), max_tokens=50) for index in range(64)]
            answers = await asyncio.gather(*(read(client.submit(request)) for request in requests))
            assert [tokens for tokens, _ in answers] == [expected_tokens(request) for request in requests]
            await until(lambda: is_idle(client), "idle")

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
