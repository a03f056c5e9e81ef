"""Every test here gets a temporary folder of its own, and must leave neither files, processes nor threads behind."""

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest


def _children() -> set[int]:
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


@pytest.fixture(autouse=True)
def leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    # Not under tmp_path (which is asked for so that it is made before): the path of a Unix socket must be short.
    directory = tempfile.mkdtemp(prefix="t-")
    monkeypatch.setattr(tempfile, "tempdir", directory)
    threads, children = set(threading.enumerate()), _children()
    yield
    assert _children() <= children
    assert {thread.name for thread in set(threading.enumerate()) - threads} == set()
    assert os.listdir(directory) == []
    shutil.rmtree(directory)
