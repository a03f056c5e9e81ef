import io
import shutil

import pytest
from rich.console import Console

from pomona.cli import profile as command
from pomona.cli.config import load_config
from pomona.cli.hub import bundled_dir
from pomona.cli.profile import build_metered, run_profile_command
from pomona.core.errors import ConfigError
from pomona.profiling.measure import PointMeter
from pomona.profiling.points import Point
from pomona.profiling.profile import ProfileLimits
from pomona.sim.profile_file import CostProfile
from pomona.sim.step_work import StepWork
from support.sim import make_profile


def test_the_bundled_model_is_profiled_and_written_down(tmp_path, capsys):
    output = tmp_path / "pippin.json"
    config = load_config({"kv_cache_bytes": "4MiB", "num_threads": 1})
    run_profile_command(config, ProfileLimits(max_points=6, max_seconds=300.0), output)
    profile = CostProfile.from_json(output.read_bytes(), output.name)
    assert profile.model == "pippin"
    assert profile.num_points == 6
    assert {size.lora_rank for size in profile.adapters} == {4, 8, 16, 32, 64}
    cost = profile.cost_model
    assert 0 < cost.seconds(StepWork(1, 1, 1, 1, 100)) < cost.seconds(StepWork(1, 1000, 0, 1, 0, 1000, 500_000))
    assert "held-out error" in capsys.readouterr().err


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"adapter_loading": "join"},
        {"max_waiting": 1},
        {"max_step_s": 1e-6},
        {"fairness": "rpm", "fairness_requests_per_minute": 1},
    ],
    ids=str,
)
def test_settings_of_a_server_keep_no_batch_from_being_what_is_measured(setting):
    sizes = {"kv_cache_bytes": "4MiB", "num_threads": 1, "max_num_seqs": 4}
    parts, executor, adapters = build_metered(load_config({**sizes, **setting}))
    meter = PointMeter(parts.engine, executor, adapters, parts.info.vocab_size)
    assert parts.engine.config.adapter_loading == "on_demand"  # what simulated steps do
    cold = tuple(info for info in adapters if not info.has_extras)[:2]
    for point in (Point(4, 16, 0, 0), Point(0, 0, 2, 8, cold, is_cold=True)):
        work = meter.measure(point, 0)[-1].work
        assert (work.num_seqs, work.num_loads) == (point.num_decodes + point.num_prompts, 2 * point.is_cold)


def test_what_was_profiled_is_called_by_its_name():
    console = Console(file=io.StringIO(), width=200)
    console.print(command.render(make_profile(model="llama[int4]")))
    assert "llama[int4] on a test: " in console.file.getvalue()


def test_a_broken_folder_is_left_out_with_a_warning_and_a_broken_adapter_is_named(tmp_path, caplog):
    shutil.copytree(bundled_dir() / "adapters" / "reverse", tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / "broken")
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    sizes = {"kv_cache_bytes": "4MiB", "num_threads": 1}
    _, _, adapters = build_metered(load_config({"adapters_dir": str(tmp_path), **sizes}))
    assert [info.lora_rank for info in adapters] == [16]
    assert str(tmp_path / "broken") in caplog.text
    with pytest.raises(ConfigError, match="adapter 'mine' from"):
        build_metered(load_config({"adapter": f"mine={tmp_path / 'broken'}", **sizes}))


def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(ConfigError, match="--output"):
        run_profile_command(load_config({}), ProfileLimits(), tmp_path / "nowhere" / "p.json")


def test_a_folder_is_refused_as_output_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "build_metered", lambda config: pytest.fail("measured"))
    (tmp_path / "p.json").mkdir()
    with pytest.raises(ConfigError, match=r"--output .*p\.json: cannot be written"):
        run_profile_command(load_config({}), ProfileLimits(), tmp_path / "p.json")


def test_limits_leave_something_to_measure():
    with pytest.raises(ConfigError, match="max_seconds is 0"):
        ProfileLimits(max_seconds=0)
    with pytest.raises(ConfigError, match="max_points is 1: must be at least 2"):
        ProfileLimits(max_points=1)
