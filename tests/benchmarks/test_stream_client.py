"""The client of the server benchmark against a socket that answers as told."""

import socket
import threading

import pytest

from benchmarks import stream_client


def test_a_load_with_a_stream_that_failed_is_no_measurement_and_says_why():
    answer = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 4\r\n\r\nfull"

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(RuntimeError, match=r"1 of 1 streams failed; the first:\nHTTP/1\.1 429"):
            stream_client.load(f"http://127.0.0.1:{listener.getsockname()[1]}", [b"{}"], lambda: None)
        thread.join()
