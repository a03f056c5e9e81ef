import inspect
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pomona.core import errors
from pomona.core.adapter import AdapterInfo
from pomona.core.engine_info import EngineInfo
from pomona.core.ids import AdapterId, RequestId, TenantId
from pomona.core.output import EngineStats, RequestOutput
from pomona.core.plan import TokenLogprobs
from pomona.core.request import FinishReason, Request, SamplingParams
from pomona.driver import messages
from pomona.driver.messages import decode_command, decode_report, encode, pack_error, unpack_error

_ERRORS: list[errors.PomonaError] = [
    errors.PomonaError("something"),
    errors.InvalidRequestError("temperature", "temperature is -1: must be between 0 and 2"),
    errors.PromptTooLongError("prompt", "prompt has 10 tokens"),
    errors.ModelNotFoundError("pirate"),
    errors.QueueFullError("full"),
    errors.EngineUnavailableError("restarting"),
    errors.EngineDiedError("killed"),
    errors.AdapterError("bad"),
    errors.AdapterNotFoundError("nothing there"),
    errors.AdapterForbiddenError("outside"),
    errors.AdapterUnavailableError("the source does not answer", 4.0),
    errors.AdapterFailedError("wrong base"),
    errors.AdapterConfigError("r", "r is -1"),
    errors.CheckpointError("no config.json"),
    errors.ConfigError("max_waiting is 0"),
    errors.RateLimitError("too fast", 1.5),
    errors.QuotaExceededError("spent", None),
    errors.DeadlineError("too late", 2.0),
    errors.DatabaseUnavailableError("no database"),
    errors.AccountNotFoundError("no tenant"),
    errors.AccountConflictError("exists"),
]
_INFO = AdapterInfo(AdapterId("ab"), 8, 2, 1000, ("q_proj",), ("dora",))
_WIRE = pack_error(_ERRORS[1])
_LOGPROBS = TokenLogprobs(3, -0.5, 2, ((1, -0.1), (3, -0.5)))
_REQUEST = Request(
    RequestId("r"),
    (1, 2, 2**31 - 1),
    SamplingParams(logit_bias=((1, -100.0),), seed=2**63 - 1, stop_token_ids=(0,), logprobs=3),
    1.25,
    TenantId("t"),
    AdapterId("ab"),
    b"\x00salt",
)
_COMMANDS = [
    messages.Begin(),
    messages.Submit(_REQUEST),
    messages.Abort(RequestId("r")),
    messages.LoadAdapter(1, "/a/b"),
    messages.UnloadAdapter(2, AdapterId("ab")),
    messages.AskResident(3),
    messages.Ping(),
    messages.Shutdown(),
]
_REPLIES = [
    messages.Rejection(RequestId("r"), _WIRE),
    messages.AdapterLoaded(1, _INFO),
    messages.AdapterUnloaded(2),
    messages.ResidentAdapters(3, [AdapterId("ab")]),
    messages.CallFailed(3, _WIRE),
]
_REPORTS = [
    messages.Hello(),
    messages.Starting("loading weights 35%"),
    messages.Ready(EngineInfo(100, 200, 16, 300, 4, "float32", "cpu")),
    messages.TurnReport(
        7,
        EngineStats(num_running=3),
        [
            RequestOutput(
                RequestId("r"), (1, 2), (_LOGPROBS, _LOGPROBS), (_LOGPROBS,), FinishReason.STOP, 2, None, 4, 1.5
            )
        ],
        _REPLIES,
    ),
    messages.Ended(None),
    messages.Ended(_WIRE),
]


@pytest.mark.parametrize("command", _COMMANDS, ids=lambda command: type(command).__name__)
def test_a_command_survives_the_wire(command):
    assert decode_command(encode(command)) == command


@pytest.mark.parametrize("report", _REPORTS, ids=lambda report: type(report).__name__)
def test_a_report_survives_the_wire(report):
    assert decode_report(encode(report)) == report


def test_every_message_is_among_those_tested():
    tested = {type(message).__name__ for message in (*_COMMANDS, *_REPLIES, *_REPORTS)}
    defined = {
        name
        for name, value in vars(messages).items()
        if inspect.isclass(value) and issubclass(value, messages.Message) and value is not messages.Message
    }
    assert tested == defined


@settings(max_examples=40)
@given(
    st.lists(
        st.builds(
            RequestOutput,
            request_id=st.text().map(RequestId),
            new_token_ids=st.lists(st.integers(0, 2**31 - 1)).map(tuple),
            logprobs=st.lists(
                st.builds(TokenLogprobs, st.integers(0, 9), st.floats(max_value=0.0), st.integers(1, 9))
            ).map(tuple),
            finish_reason=st.none() | st.sampled_from(FinishReason),
            error=st.none() | st.text(),
            first_scheduled_s=st.none() | st.floats(0, 1e9),
        )
    )
)
def test_any_outputs_survive_the_wire(outputs):
    report = messages.TurnReport(1, EngineStats(), outputs, [])
    assert decode_report(encode(report)) == report


def test_infinite_logprobs_survive_the_wire():
    output = RequestOutput(RequestId("r"), (1,), (TokenLogprobs(1, -math.inf, 1),))
    assert decode_report(encode(messages.TurnReport(1, EngineStats(), [output], []))).outputs == [output]


@pytest.mark.parametrize("error", _ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_arrives_as_the_same_class_with_the_same_text_and_attributes(error):
    arrived = unpack_error(pack_error(error))
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert vars(arrived) == vars(error)


def test_every_error_class_is_among_those_tested():
    defined = {value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, Exception)}
    assert {type(error) for error in _ERRORS} == defined


def test_a_foreign_error_arrives_as_the_base_class_and_names_its_type():
    arrived = unpack_error(pack_error(ZeroDivisionError("division by zero")))
    assert type(arrived) is errors.PomonaError
    assert str(arrived) == "ZeroDivisionError: division by zero"
