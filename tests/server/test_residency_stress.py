"""Loads, replacements, unloads, evictions, requests, disconnects and deaths of the engine, all at once and all real.

Two minutes of it, with a count of events: pytest tests/server/test_residency_stress.py -m slow -n 0 -s
"""

import tempfile
from pathlib import Path

import pytest

from support.residency_stress import ResidencyStress
from support.storm import Scale


async def check(tmp_path: Path, monkeypatch, scale: Scale) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    stress = ResidencyStress(tmp_path)
    storm = await stress.run(scale)
    print(*(f"{count:7,} {event}" for event, count in sorted(storm.events.items())), sep="\n")
    assert not stress.wrong, "\n".join(stress.wrong[:20])
    assert not list((tmp_path / "temporary").iterdir())
    assert storm.events["engine killed"] == scale.num_kills
    assert {"whole", "gone", "absent", "unavailable", "load", "unload", "refused load", "pin"} <= storm.events.keys()


async def test_every_answer_is_of_a_version_that_was_current_and_nothing_is_left(tmp_path: Path, monkeypatch):
    await check(tmp_path, monkeypatch, Scale(num_answers=150, num_kills=1, seed=1))


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_every_answer_is_of_a_version_that_was_current_in_a_long_storm(tmp_path: Path, monkeypatch):
    await check(tmp_path, monkeypatch, Scale(num_answers=6000, num_kills=12, seed=2))
