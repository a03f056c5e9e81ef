"""A small client of a running Pomona server, for the command line: errors become one line that says what to do."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx

from pomona.core.errors import PomonaError

_TIMEOUT = httpx.Timeout(10.0, read=None)  # loading an adapter may take long


class ServerError(PomonaError):
    """The server could not be reached, or refused."""


class Api:
    """Calls one server."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._url = url.rstrip("/")
        self._client = httpx.Client(base_url=self._url, headers=headers, timeout=_TIMEOUT)

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """One request with a JSON answer.

        Raises:
            ServerError: no answer, or an error status; the text is the server's own message.
        """
        with self._reachable():
            response = self._client.request(method, path, json=body)
        if response.is_error:
            raise ServerError(_message(response))
        return response.json() if response.content else None

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[str]:
        """The data of each server-sent event, without the final [DONE].

        Raises:
            ServerError: no answer, or an error status.
        """
        with self._reachable(), self._client.stream("POST", path, json=body) as response:
            if response.is_error:
                response.read()
                raise ServerError(_message(response))
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield line.removeprefix("data: ")

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except httpx.UnsupportedProtocol as error:
            raise ServerError(f"--url {self._url!r}: must begin with http:// or https://") from error
        except httpx.ConnectError as error:
            raise ServerError(
                f"nothing answers at {self._url}: start one with `pomona serve`, or pass --url"
            ) from error
        except httpx.HTTPError as error:
            raise ServerError(f"{self._url}: {error or type(error).__name__}") from error


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {response.status_code}"
