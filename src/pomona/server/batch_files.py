"""A batch's files: lines of requests in, a line per answer out."""

import errno
import json
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pomona.accounts.batches import Batch
from pomona.server.body import MAX_CONTAINERS, has_too_many_containers

_MAX_LINES: Final = 50_000
_MAX_ERRORS: Final = 20
_BUSY: Final = frozenset({429, 503})
"""Answers after which a line waits and tries again."""
Problems = list[dict[str, Any]]
"""What is wrong with a batch, as its ``errors`` say."""


@dataclass(frozen=True, slots=True)
class Line:
    """A request, and where it is: files of many batches together are too large to be kept in memory."""

    custom_id: str
    start: int
    num_bytes: int

    def read(self, path: Path) -> bytes:
        """Return the request's body."""
        with path.open("rb") as file:
            file.seek(self.start)
            return json.dumps(json.loads(file.read(self.num_bytes))["body"]).encode()


@dataclass(frozen=True, slots=True)
class Answer:
    """What the application answered to a line."""

    status: int
    request_id: str
    body: Any
    retry_after_s: float
    """Negative if nothing was said of it."""

    @property
    def is_of_a_death(self) -> bool:
        """True if the engine died while it carried the line out."""
        return self.status != 200 and self.body["error"]["code"] == "engine_died"

    @property
    def is_final(self) -> bool:
        """False if the same request can be answered otherwise in a while."""
        # Refusals that can never succeed say so by having no time to try again; a budget is spent until the month ends.
        is_busy = self.status in _BUSY and self.retry_after_s >= 0
        return not is_busy or self.body["error"]["code"] == "insufficient_quota"


class OutputFiles:
    """A batch's answers and errors, one JSON object per line."""

    def __init__(self, output: tuple[str, Path], error: tuple[str, Path]) -> None:
        self.output_id, self.error_id = output[0], error[0]
        self.done: set[str] = set()
        """Custom ids of lines that have their answer."""
        self.num_completed = _recover(output[1], self.done)
        self.num_failed = _recover(error[1], self.done)
        self._output = output[1].open("ab", buffering=0)
        self._error = error[1].open("ab", buffering=0)

    @classmethod
    def open(cls, path_of: Callable[[str], Path], batch: Batch) -> "OutputFiles":
        """Begin, or go on where somebody else ended."""
        output_id, error_id = batch.output_file_id, batch.error_file_id
        assert output_id is not None, "whoever claims a batch names its files"
        assert error_id is not None, "whoever claims a batch names its files"
        return cls((output_id, path_of(output_id)), (error_id, path_of(error_id)))

    def write(self, line: Line, answer: Answer) -> None:
        """Append an answer."""
        is_ok = answer.status == 200
        record = {
            "id": f"batch_req_{secrets.token_hex(16)}",
            "custom_id": line.custom_id,
            "response": {"status_code": answer.status, "request_id": answer.request_id, "body": answer.body},
            "error": None,
        }
        content = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        if (self._output if is_ok else self._error).write(content) != len(content):
            raise OSError(errno.ENOSPC, "short write")  # whoever goes on cuts it off
        if is_ok:
            self.num_completed += 1
        else:
            self.num_failed += 1

    def close(self) -> None:
        """Close both."""
        self._output.close()
        self._error.close()


def _recover(path: Path, done: set[str]) -> int:
    """Cut off what is torn at the end; return how many whole lines there are."""
    if not path.exists():
        path.touch(mode=0o600)
        return 0
    count = end = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                done.add(json.loads(line)["custom_id"])
            except (ValueError, KeyError, TypeError):
                break  # what a power cut has left
            count, end = count + 1, end + len(line)
    os.truncate(path, end)
    return count


def read_lines(path: Path, endpoint: str, max_line_bytes: int) -> tuple[list[Line], Problems]:
    """Check a batch's input file; returns its lines, or what is wrong with the first few bad ones."""
    lines: list[Line] = []
    errors: Problems = []
    seen: set[str] = set()
    end = 0
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            start, end = end, end + len(text)
            if not text.strip():
                continue
            problem, custom_id = _check_size(text, max_line_bytes), None
            if problem is None:
                problem, custom_id = _check_line(text, endpoint, seen)
            if custom_id is not None:
                seen.add(custom_id)
                lines.append(Line(custom_id, start, len(text)))
            if len(lines) > _MAX_LINES:
                problem = ("too_many_requests", f"The file has more than {_MAX_LINES} requests.")
            if problem is not None:
                errors.append({"code": problem[0], "message": problem[1], "line": number})
                if len(errors) >= _MAX_ERRORS or len(lines) > _MAX_LINES:
                    break
    if not lines and not errors:
        errors.append({"code": "empty_file", "message": "The file has no requests.", "line": None})
    return lines, errors


def _check_size(text: bytes, max_bytes: int) -> tuple[str, str] | None:
    """Refuse what no request could be, before it is parsed: all requests of the server would wait for it."""
    if len(text) > max_bytes:
        return "line_too_large", f"This line is larger than the limit of {max_bytes} bytes."
    if has_too_many_containers(text):
        return "line_too_large", f"This line has more than {MAX_CONTAINERS} lists and objects."
    return None


def _check_line(text: bytes, endpoint: str, seen: set[str]) -> tuple[tuple[str, str] | None, str | None]:
    """Return what is wrong with a line, or its custom id."""
    try:
        content = json.loads(text)
        json.dumps(content)  # has bounds of its own on how deep it may be
    except (ValueError, RecursionError):
        return ("invalid_json_line", "This line is not valid JSON."), None
    if not isinstance(content, dict):
        return ("invalid_json_line", "This line is not a JSON object."), None
    custom_id, body = content.get("custom_id"), content.get("body")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= 512:
        return ("missing_required_parameter", "custom_id must be a text of 1 to 512 characters."), None
    if custom_id in seen:
        return ("duplicate_custom_id", "This custom_id was used on an earlier line."), None
    if content.get("method") != "POST":
        return ("invalid_method", "method must be POST."), None
    if content.get("url") != endpoint:
        return ("mismatched_endpoint", f"url must be {endpoint}, the endpoint of the batch."), None
    if not isinstance(body, dict):
        return ("missing_required_parameter", "body must be a JSON object."), None
    if body.get("stream"):
        return ("invalid_request", "Answers of a batch cannot be streamed."), None
    return None, custom_id
