"""Driving systems under comparison: who runs when, what counts, and a real runner in a process of its own."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
from rich.console import Console

from benchmarks import results, workload
from benchmarks.peers import run as peers_run
from benchmarks.peers import setup
from benchmarks.peers.plan import Task, by_cell, done_runs, expected_s, expected_text, is_repeated, plan
from benchmarks.peers.process import SystemFailedError, SystemProcess, key_of
from benchmarks.peers.run import Comparison, agreement, execute, main, summarize
from benchmarks.peers.session import Request, by_adapter
from benchmarks.peers.systems import SYSTEMS, Environment, System
from benchmarks.shapes import TINY, ModelShape
from benchmarks.workload import Cell, Popularity, cells

CELL = Cell(batch=2, num_prompt_tokens=8, num_output_tokens=4, popularity="identical")
BASE = dataclasses.replace(CELL, popularity="base")
QUIET = Console(quiet=True)


@pytest.fixture
def small_work(tiny_cache, monkeypatch):
    """The workload file of the tiny shape with two small cells and the two adapters that there are."""
    monkeypatch.setattr(workload, "NUM_ADAPTERS", 2)
    workload.write(TINY, [BASE, CELL])
    return tiny_cache


def pomona(**changes: object) -> System:
    return dataclasses.replace(SYSTEMS["pomona"], settings={"num_threads": 1, "kv_cache_bytes": 1 << 22}, **changes)  # type: ignore[arg-type]


def echo(**changes: object) -> System:
    path = f"{results.ROOT}:{results.ROOT / 'tests'}"
    system = System("echo", "Echo", "support.echo_runner", None, environment_variables={"PYTHONPATH": path})
    return dataclasses.replace(system, **changes)  # type: ignore[arg-type]


def test_systems_take_turns_within_every_cell_of_every_repetition():
    tasks = plan([TINY], cells()[:2], list(SYSTEMS.values()), repeats=2)
    names = [task.system.name for task in tasks]
    assert names == list(SYSTEMS) * 4
    idle = plan([TINY], [dataclasses.replace(CELL, popularity="idle")], list(SYSTEMS.values()), repeats=1)
    assert [task.system.name for task in idle] == ["pomona", "transformers", "vllm"], "llama.cpp would repeat base"
    groups = list(by_cell(tasks))
    assert [len(group) for group in groups] == [len(SYSTEMS)] * 4
    assert [group[0].repetition for group in groups] == [0, 0, 1, 1]


def done_row(task: Task, **changes: object) -> dict[str, object]:
    where = {"repetition": task.repetition, "shape": "tiny", "cell": task.cell.name, "system": task.system.name}
    settings = task.system.settings_for(task.cell.popularity)
    return {"kind": "peer", **where, "is_clean": True, "program": "old", "settings": settings, "wall_s": 7.0, **changes}


def test_only_clean_runs_of_the_same_settings_are_done_and_our_own_only_of_this_program():
    theirs, ours = Task(0, TINY, CELL, SYSTEMS["vllm"]), Task(0, TINY, CELL, SYSTEMS["pomona"])
    assert done_runs([done_row(theirs)], "new") == {theirs.key: 7.0}
    assert done_runs([done_row(theirs, is_clean=False)], "new") == {}
    assert theirs.key not in done_runs([done_row(theirs, settings={"max_num_seqs": 1})], "new")
    assert done_runs([done_row(ours)], "new") == {}
    assert done_runs([done_row(ours, commit="another")], "old") == {ours.key: 7.0}


def test_a_program_is_its_sources_its_build_and_its_dependencies(monkeypatch, tmp_path):
    asked = []

    def git(*words: str) -> str:
        asked.append(words)
        return "" if words[0] == "status" else "trees"

    monkeypatch.setattr(results, "_git", git)
    before = results.program()
    assert asked == [
        ("rev-parse", "HEAD:src/pomona", "HEAD:setup.py"),
        ("status", "--porcelain", "--untracked-files=no", "--", "src/pomona", "setup.py"),
    ]
    assert results.program() == before
    monkeypatch.setattr(results, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["torch==0"]\n')
    assert results.program() != before
    monkeypatch.setattr(results, "_git", lambda *words: "M")
    assert results.program().endswith("-dirty")


def test_long_runs_come_once():
    first, second = (Task(repetition, TINY, CELL, SYSTEMS["vllm"]) for repetition in (0, 1))
    assert is_repeated(first, {}, 60.0)
    assert is_repeated(second, {first.key: 59.0}, 60.0)
    assert not is_repeated(second, {first.key: 61.0}, 60.0)


def test_expected_time_is_that_of_earlier_runs_or_the_systems_usual_pace():
    task = Task(1, TINY, CELL, SYSTEMS["transformers"])
    assert 0 < expected_s(dataclasses.replace(task, cell=BASE), {}) < expected_s(task, {})
    assert expected_s(task, {dataclasses.replace(task, repetition=0).key: 1234.0}) == 1234.0
    tasks = plan([TINY], [BASE, CELL], list(SYSTEMS.values()), repeats=2)
    text = expected_text(tasks, {task.key: 3600.0}, repeat_below_s=60.0)
    assert text.startswith("expected, on two quiet server cores: 1 h ")
    assert "tiny, repetition 1: 1 h " in text
    assert "tiny, repetition 2: 1 min" in text, "what took an hour comes once"


def test_a_process_computes_whole_prompts_once_per_batch_before_it_counts(small_work):
    process = SystemProcess(echo(), TINY, "identical")
    asked = []
    run = process.run
    process.run = lambda *words: asked.append(words) or run(*words)  # type: ignore[method-assign,func-returns-value]
    for cell in (CELL, BASE, CELL):
        process.warm_up(cell)
    process.close()
    assert asked == [(CELL.name, 3, None), (BASE.name, 3, 8)]


def test_a_run_is_summarized_in_the_projects_definitions():
    run = {
        "wall_s": 2.0,
        "first_token_s": [0.5, 1.0],
        "finish_s": [2.0, 1.75],
        "token_ids": [[1, 2, 3, 4], [5, 6, 7, 8]],
    }
    found = summarize(run, CELL)
    assert found["output_tokens_per_s"] == 4.0
    assert found["ttft_mean_s"] == 0.75
    assert found["tpot_mean_ms"] == pytest.approx(1e3 * (1.5 / 3 + 0.75 / 3) / 2)


def test_agreement_counts_first_tokens_and_common_beginnings():
    assert agreement([[1, 2, 3], [4, 5, 6]], [[1, 2, 9], [0, 5, 6]]) == (0.5, 1.0)


def test_systems_with_one_adapter_per_batch_serve_the_largest_group_first():
    requests = [Request([1], adapter) for adapter in (0, 1, 1, None, 1, 0)]
    assert by_adapter(requests) == [(1, [1, 2, 4]), (0, [0, 5]), (None, [3])]


def test_a_repetition_needs_two_processes_of_each_system():
    for system in SYSTEMS.values():
        keys = {key_of(system, TINY, popularity) for popularity in workload.POPULARITIES}
        assert [num_loaded for _, num_loaded, _ in sorted(keys)] == [0, workload.NUM_ADAPTERS]
    assert "max_num_batched_tokens" in SYSTEMS["vllm"].settings_for("identical")
    assert "max_num_batched_tokens" not in SYSTEMS["vllm"].settings_for("base")


def test_a_comparison_runs_the_real_engine_writes_rows_and_goes_on_where_it_was(small_work, tmp_path):
    output = tmp_path / "rows.jsonl"
    tasks = plan([TINY], [CELL], [pomona()], repeats=1)
    comparison = Comparison(output, {"utc": "now", "program": "p"}, QUIET, accept_noise=True)
    execute(tasks, comparison, QUIET)
    (row,) = results.read(output)
    assert (row["kind"], row["system"], row["cell"], row["num_loaded"]) == ("peer", "pomona", CELL.name, 2)
    assert row["output_tokens_per_s"] == pytest.approx(8 / row["wall_s"])
    assert row["memory_mib"] > 10
    assert {"own_pct", "other_pct", "steal_pct", "is_clean", "token_digest", "versions", "settings"} <= set(row)
    assert done_runs([{**row, "is_clean": True}], "p") == {tasks[0].key: row["wall_s"]} == comparison.done


def test_a_system_that_cannot_start_is_recorded_and_the_others_go_on(small_work, tmp_path):
    output = tmp_path / "rows.jsonl"
    broken = echo(name="broken", module="no_such_module")
    tasks = [Task(0, TINY, BASE, broken), Task(0, TINY, BASE, echo())]
    execute(tasks, Comparison(output, {"utc": "now"}, QUIET, accept_noise=True), QUIET)
    kinds = [(row["kind"], row["system"]) for row in results.read(output)]
    assert kinds == [("peer_failure", "broken"), ("peer", "echo")]
    assert "no_such_module" in results.read(output)[0]["message"]


def test_every_repetition_is_a_new_process_and_systems_agreement_is_written(small_work, tmp_path, monkeypatch):
    output = tmp_path / "rows.jsonl"
    started = []

    def start(system: System, shape: ModelShape, popularity: Popularity) -> SystemProcess:
        started.append((system.name, popularity))
        return SystemProcess(system, shape, popularity)

    monkeypatch.setattr(peers_run, "SystemProcess", start)
    systems = [echo(name="transformers"), echo()]
    execute(
        plan([TINY], [BASE, CELL], systems, repeats=2),
        Comparison(output, {"utc": "now", "commit": "abc"}, QUIET, accept_noise=True),
        QUIET,
    )
    rows = results.read(output)
    peers = list(results.of_kind(rows, "peer"))
    assert [(row["repetition"], row["cell"], row["system"]) for row in peers] == [
        (repetition, cell, system)
        for repetition in (0, 1)
        for cell in (BASE.name, CELL.name)
        for system in ("transformers", "echo")
    ]
    one_repetition = [(system, cell.popularity) for cell in (BASE, CELL) for system in ("transformers", "echo")]
    assert started == one_repetition * 2, "base and adapters are different processes too"
    assert {row["mean_common_prefix"] for row in results.of_kind(rows, "agreement")} == {4.0}
    assert {row["commit"] for row in rows} == {"abc"}


def test_a_paused_process_is_stopped_and_goes_on_when_resumed(small_work):
    process = SystemProcess(echo(), TINY, "base")
    process.pause()
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    process.resume()
    assert len(process.run(BASE.name, 3)["token_ids"][0]) == 3
    process.close()


def test_an_unknown_cell_ends_the_runner_with_the_reason(small_work):
    process = SystemProcess(echo(), TINY, "base")
    with pytest.raises(SystemFailedError, match="no such cell"):
        process.run("no such cell")
    process.close()


def test_a_process_that_died_between_runs_can_be_closed(small_work):
    process = SystemProcess(echo(), TINY, "base")
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(SystemFailedError):
        process.run(BASE.name)
    process.close()


def test_systems_that_are_not_installed_are_named_before_anything_runs(tiny_cache, tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    with pytest.raises(SystemExit, match="not installed: vllm; run "):
        main(["--system", "pomona", "--system", "vllm", "--shape", "tiny", "--output", str(output)])
    capsys.readouterr()
    assert not output.exists()


def test_what_cannot_be_installed_does_not_keep_the_others_from_it(tiny_cache, monkeypatch, capsys):
    asked = []

    def install(environment: Environment) -> None:
        asked.append(environment.name)
        if environment.name == "llama":
            raise RuntimeError("pip failed with exit code 1")

    monkeypatch.setattr(setup, "install", install)
    monkeypatch.setattr(setup.assets, "make_with_progress", lambda shapes: asked.append("models"))
    monkeypatch.setattr(sys, "argv", ["setup"])
    with pytest.raises(SystemExit, match="all others are ready; llama: pip failed with exit code 1"):
        setup.main()
    assert asked == ["transformers", "llama", "vllm", "models"]
    assert "2/3 llama: pip failed" in capsys.readouterr().out


def test_systems_take_the_cores_that_they_may_run_on():
    code = "import os; os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})\n"
    code += "from benchmarks.peers.systems import SYSTEMS\n"
    code += "print(SYSTEMS['llama.cpp'].settings['num_threads'], SYSTEMS['vllm'].environment_variables)"
    done = subprocess.run([sys.executable, "-c", code], cwd=results.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1 {'OMP_NUM_THREADS': '1'}"


def test_an_environment_is_a_folder_of_the_cache(tiny_cache):
    environment = Environment("x", ("package==1",))
    assert environment.python == tiny_cache / "env" / "x" / "bin" / "python"
    assert SYSTEMS["pomona"].interpreter() == sys.executable


def test_the_workload_file_names_adapters_and_their_requests(small_work):
    content = json.loads((small_work / "tiny" / "workload.json").read_text())
    assert [adapter["name"] for adapter in content["adapters"]] == ["r16-00", "r16-01"]
    assert content["cells"][CELL.name]["assignment"] == [0, 0]
    assert content["cells"][BASE.name]["assignment"] == [None, None]


def test_a_dry_run_says_how_much_there_is_to_do_and_does_nothing(tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    main(["--dry-run", "--shape", "smollm2-135m", "--repeats", "1", "--output", str(output)])
    said = capsys.readouterr().out
    assert "71 of 71 runs to do" in said
    assert "expected, on two quiet server cores:" in said
    assert not output.exists()
