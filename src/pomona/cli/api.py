"""A small client of a running Pomona server, for the command line: errors become one line that says what to do."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from pomona.bench.events import DONE, EventSplitter
from pomona.core.errors import ConfigError, PomonaError

_TIMEOUT = httpx.Timeout(10.0, read=None)  # loading an adapter may take long


class ServerError(PomonaError):
    """The server could not be reached, or refused."""


class Api:
    """Calls one server.

    Raises:
        ServerError: the address or the key can be none.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._url = url.rstrip("/")
        limits = httpx.Limits(max_keepalive_connections=0)  # a command asks seldom, and nobody closes the client
        try:
            self._client = httpx.Client(base_url=self._url, headers=headers, timeout=_TIMEOUT, limits=limits)
        except httpx.InvalidURL as error:
            raise ServerError(f"--url {url!r}: {error}") from error
        except UnicodeEncodeError as error:
            raise ServerError("--api-key: holds characters that are not ASCII, which no key does") from error

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

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[bytes]:
        """The data of each server-sent event, without the final [DONE].

        Raises:
            ServerError: no answer, or an error status.
        """
        with self._reachable(), self._client.stream("POST", path, json=body) as response:
            if response.is_error:
                response.read()
                raise ServerError(_message(response))
            splitter = EventSplitter()  # not ``iter_lines``, which also ends lines at U+2028 and others in the text
            for chunk in response.iter_bytes():
                for payload in splitter.feed(chunk):
                    if payload != DONE:
                        yield payload

    def download(self, path: str, output: Path) -> None:
        """Write an answer's bytes to a file, as they come.

        Raises:
            ServerError: no answer, or one that breaks off, or an error status; after that there is no file.
            ConfigError: the file cannot be written.
        """
        with self._reachable(), self._client.stream("GET", path) as response:
            if response.is_error:
                response.read()
                raise ServerError(_message(response))
            try:
                with output.open("wb") as file:
                    for piece in response.iter_bytes():
                        file.write(piece)
            except httpx.HTTPError:
                output.unlink()  # half of it must not pass for the whole
                raise
            except OSError as error:
                raise ConfigError(f"{output} cannot be written: {error.strerror}; name another file") from error

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
        except ValueError as error:  # a number that is not finite
            raise ServerError(f"this cannot be asked of a server: {error}") from error


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {response.status_code}"
