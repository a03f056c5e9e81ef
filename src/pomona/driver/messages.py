"""Every message between the engine's loop and its client, and how each becomes bytes.

Commands go down, reports come up. In steady state the only report is TurnReport: one per turn of the loop, carrying
all that is new. The core dataclasses travel as msgpack maps: about 0.3 us to encode and 0.5 us to decode per output.
"""

import inspect
from typing import TypeAlias

import msgspec

from pomona.core import errors
from pomona.core.adapter import AdapterInfo
from pomona.core.engine_info import EngineInfo
from pomona.core.errors import PomonaError
from pomona.core.ids import AdapterId, RequestId
from pomona.core.output import EngineStats, RequestOutput
from pomona.core.request import Request

FieldValue: TypeAlias = str | int | float | bool | None


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all messages: an array whose first element is the class name."""


class WireError(msgspec.Struct, frozen=True, array_like=True):
    """An error as bytes: its class name, its text, and its further attributes."""

    kind: str
    text: str
    fields: dict[str, FieldValue]


# Commands: client to engine.


class Begin(Message, frozen=True):
    """The client has heard Hello; the engine may be built."""


class Submit(Message, frozen=True):
    """Answered by outputs, or by one Rejection."""

    request: Request


class Abort(Message, frozen=True):
    """Answered by the request's terminal output; unknown ids are ignored."""

    request_id: RequestId


class LoadAdapter(Message, frozen=True):
    """Answered by AdapterLoaded or CallFailed."""

    call_id: int
    path: str


class UnloadAdapter(Message, frozen=True):
    """Answered by AdapterUnloaded once the adapter is drained and freed."""

    call_id: int
    adapter_id: AdapterId


class AskResident(Message, frozen=True):
    """Answered by ResidentAdapters."""

    call_id: int


class Ping(Message, frozen=True):
    """Answered by the next TurnReport, like every command: it counts the commands handled."""


class Shutdown(Message, frozen=True):
    """Answered by Ended."""


Command: TypeAlias = Begin | Submit | Abort | LoadAdapter | UnloadAdapter | AskResident | Ping | Shutdown

# Replies travel inside a TurnReport.


class Rejection(Message, frozen=True):
    """The request was never admitted."""

    request_id: RequestId
    error: WireError


class AdapterLoaded(Message, frozen=True):
    """The adapter is staged and the engine takes requests for it."""

    call_id: int
    info: AdapterInfo


class AdapterUnloaded(Message, frozen=True):
    """No copy of the adapter is left."""

    call_id: int


class ResidentAdapters(Message, frozen=True):
    """What is on the device after this turn."""

    call_id: int
    adapter_ids: list[AdapterId]


class CallFailed(Message, frozen=True):
    """A LoadAdapter could not be carried out; nothing changed."""

    call_id: int
    error: WireError


Reply: TypeAlias = Rejection | AdapterLoaded | AdapterUnloaded | ResidentAdapters | CallFailed

# Reports: engine to client.


class Hello(Message, frozen=True):
    """The engine's process runs and its channel is connected."""


class Starting(Message, frozen=True):
    """Progress of the start, for people: "loading weights 35%"."""

    progress: str


class Ready(Message, frozen=True):
    """The engine is built and takes requests."""

    info: EngineInfo


class TurnReport(Message, frozen=True):
    """All that is new after one turn of the loop, or after several if the client was slow."""

    num_commands: int
    """Commands handled since the loop started."""
    stats: EngineStats
    outputs: list[RequestOutput]
    replies: list[Reply]


class Ended(Message, frozen=True):
    """The last report: the engine could not be built, failed, or (no error) was told to shut down."""

    error: WireError | None


Report: TypeAlias = Hello | Starting | Ready | TurnReport | Ended

_encoder = msgspec.msgpack.Encoder()
_command_decoder = msgspec.msgpack.Decoder(Command)
_report_decoder = msgspec.msgpack.Decoder(Report)
_error_classes = {
    name: value for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, PomonaError)
}


def encode(message: Message) -> bytes:
    """Message to msgpack bytes."""
    return _encoder.encode(message)


def decode_command(frame: bytes) -> Command:
    """Bytes of ``encode`` back to a command."""
    command: Command = _command_decoder.decode(frame)
    return command


def decode_report(frame: bytes) -> Report:
    """Bytes of ``encode`` back to a report."""
    report: Report = _report_decoder.decode(frame)
    return report


def pack_error(error: BaseException) -> WireError:
    """Any exception as a WireError. Those that are not ours show their type in the text."""
    if not isinstance(error, PomonaError):
        return WireError(type(error).__name__, f"{type(error).__name__}: {error}", {})
    simple = {
        name: value if isinstance(value, str | int | float | bool | None) else repr(value)
        for name, value in vars(error).items()
        if not name.startswith("_")
    }
    return WireError(type(error).__name__, str(error), simple)


def unpack_error(wire: WireError) -> PomonaError:
    """The error of ``pack_error``: same class, text and attributes; PomonaError if the class is not of core.errors."""
    error_class = _error_classes.get(wire.kind, PomonaError)
    # Constructors differ from class to class, and the text is already complete: fill the object, do not call them.
    error: PomonaError = error_class.__new__(error_class, wire.text)
    error.args = (wire.text,)
    vars(error).update(wire.fields)
    return error
