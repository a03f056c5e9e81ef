"""Whether the compiled kernels are there, and what is said when they are not."""

import runpy
import shutil
from pathlib import Path

import pytest

from pomona.kernels.cpu import binding


def test_the_kernels_are_built_where_there_is_a_compiler() -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler here: installation goes on without the kernels")
    assert binding.is_available(), f"{binding.REASON} (python setup.py build_ext --inplace builds them)"


def test_asking_on_the_command_line_says_what_will_run_or_why_nothing_will(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(binding.__file__, run_name="__main__")
    said = capsys.readouterr().out
    assert said.startswith("CPU kernels: ")
    assert (binding.available_isas() or ["not available"])[-1] in said


def test_a_missing_library_is_a_reason_and_no_error() -> None:
    library, reason = binding._load(None)
    assert library is None
    assert "no C++ compiler" in reason


def test_a_library_that_does_not_load_is_a_reason_and_no_error(tmp_path: Path) -> None:
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"not a library")
    library, reason = binding._load(broken)
    assert library is None
    assert "_native.so does not load" in reason
    with pytest.raises(OSError, match=r"_native\.so does not load"):
        binding.load(broken)


@pytest.mark.skipif(not binding.is_available(), reason=binding.REASON)
def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "_ABI", -1)
    library, reason = binding._load(binding._find_library())
    assert library is None
    assert "another version" in reason


@pytest.mark.skipif(not binding.is_available(), reason=binding.REASON)
def test_the_best_instruction_set_is_used_unless_another_is_asked_for() -> None:
    best = binding.available_isas()[-1]
    assert f"CPU kernels: {best}," in binding.describe()
    with binding.use_isa("plain"):
        assert "CPU kernels: plain," in binding.describe()
    assert f"CPU kernels: {best}," in binding.describe()


@pytest.mark.skipif(not binding.is_available(), reason=binding.REASON)
def test_another_build_is_used_while_it_is_asked_for(tmp_path: Path) -> None:
    path = binding._find_library()
    assert path is not None
    other = binding.load(Path(shutil.copy(path, tmp_path)))
    here = binding.library()
    with binding.use_library(other):
        assert binding.library() is other
    assert binding.library() is here


@pytest.mark.skipif(not binding.is_available(), reason=binding.REASON)
def test_the_kernels_run_on_the_threads_that_torch_keeps() -> None:
    assert binding.HAS_THREADS, "torch's OpenMP runtime was not found: kernels would run on one thread"
