"""One system's process during a comparison: started, asked for runs, stopped in its tracks while others run."""

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks import meter, workload
from benchmarks.peers.systems import System
from benchmarks.results import ROOT
from benchmarks.shapes import ModelShape
from benchmarks.workload import Cell, Popularity

START_LIMIT_S = 900.0
RUN_LIMIT_S = 1200.0
_WARM_UP_OUTPUT_TOKENS = 3
_WARM_UP_PROMPT_TOKENS = 8


class SystemFailedError(Exception):
    """The process ended, or did not answer in time; the message has the end of its log."""


class SystemProcess:
    """A runner of ``benchmarks.peers`` with its model loaded.

    Args:
        system: which one.
        shape: which model.
        popularity: decides how many adapters are loaded, and the settings.

    Raises:
        SystemFailedError: it did not get ready.
    """

    def __init__(self, system: System, shape: ModelShape, popularity: Popularity) -> None:
        self.key = key_of(system, shape, popularity)
        self.system = system
        self.settings = system.settings_for(popularity)
        self.num_loaded = system.num_loaded(popularity)
        self._warm_cells: set[str] = set()
        self._warm_batches: set[str] = set()
        logs = workload.cache_dir() / "log"
        logs.mkdir(parents=True, exist_ok=True)
        self._log_path = logs / f"{shape.name}-{system.name}.log"
        command = [
            *(system.interpreter(), "-m", system.module, "--serve"),
            *("--workload", str(workload.cache_dir() / shape.name / "workload.json")),
            *("--adapters", str(self.num_loaded), "--settings", json.dumps(self.settings)),
        ]
        with self._log_path.open("w") as log:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **system.environment_variables},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        try:
            ready = self._answer(START_LIMIT_S)
        except SystemFailedError:
            self.close()
            raise
        self.versions: dict[str, str] = ready["versions"]
        self.load_s: float = ready["load_s"]

    @property
    def pid(self) -> int:
        """Of the process that the runner is; it may have children."""
        return self._process.pid

    def _answer(self, limit_s: float) -> dict[str, Any]:
        """The next row it prints."""
        stdout = self._process.stdout
        assert stdout is not None
        give_up_s = time.monotonic() + limit_s
        while time.monotonic() < give_up_s:
            if select.select([stdout], [], [], 1.0)[0]:
                line = stdout.readline()
                if line:
                    row: dict[str, Any] = json.loads(line)
                    return row
                break
        raise SystemFailedError(f"{self.system.name}: {self._log_tail()}")

    def _log_tail(self) -> str:
        text = self._log_path.read_text(errors="replace")[-1500:]
        return text.replace(str(ROOT), ".").replace(str(Path.home()), "~")

    def warm_up(self, cell: Cell) -> None:
        """Run a cell so far that nothing happens for the first time when it counts.

        Its adapters are loaded; and once per batch and prompt length whole prompts are computed, so that code is
        compiled and memory touched. For further popularities of the same batch short prompts do.
        """
        batch = cell.name.partition("/")[0]
        if cell.name not in self._warm_cells:
            is_seen = batch in self._warm_batches
            self.run(cell.name, _WARM_UP_OUTPUT_TOKENS, _WARM_UP_PROMPT_TOKENS if is_seen else None)
        self._warm_cells.add(cell.name)
        self._warm_batches.add(batch)

    def run(
        self, cell: str, num_output_tokens: int | None = None, num_prompt_tokens: int | None = None
    ) -> dict[str, Any]:
        """Run a cell now.

        Args:
            cell: its name.
            num_output_tokens: fewer than the cell's own, to warm up.
            num_prompt_tokens: only the first so many of each prompt, to warm up.

        Raises:
            SystemFailedError: no answer.
        """
        stdin = self._process.stdin
        assert stdin is not None
        try:
            limits = {"num_output_tokens": num_output_tokens, "num_prompt_tokens": num_prompt_tokens}
            stdin.write(json.dumps({"cell": cell, **limits}).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError as error:
            raise SystemFailedError(f"{self.system.name}: {self._log_tail()}") from error
        return self._answer(RUN_LIMIT_S)

    def _signal(self, number: signal.Signals) -> None:
        for pid in meter.process_tree(self.pid):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def pause(self) -> None:
        """Take all CPU from it: not even a spinning thread disturbs whoever runs next."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Undo ``pause``."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End it and its children."""
        self.resume()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it has ended; what it was asked last was not sent
                self._process.stdin.close()
        try:
            self._process.wait(timeout=20.0)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def key_of(system: System, shape: ModelShape, popularity: Popularity) -> tuple[str, int, str]:
    """Cells with the same key can share a process."""
    settings = json.dumps(system.settings_for(popularity), sort_keys=True)
    return shape.name, system.num_loaded(popularity), settings
