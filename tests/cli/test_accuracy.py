"""``pomona bench accuracy --update``: which files it takes, and what it leaves of them."""

import pytest

from pomona.cli import accuracy
from pomona.cli.accuracy import Accuracy, run_accuracy
from pomona.core.errors import ConfigError

FOUND = [Accuracy("reverse", 2, 1.0, 0.5, "Writes the word backwards.")]


@pytest.fixture(autouse=True)
def nothing_is_measured(monkeypatch):
    monkeypatch.setattr(accuracy, "LLM", lambda **settings: None)
    monkeypatch.setattr(accuracy, "measure", lambda llm, tasks: FOUND)


def test_the_table_between_the_marks_is_replaced_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- accuracy -->\nold\n<!-- /accuracy -->\nbelow\n")
    run_accuracy("auto", update=page)
    text = page.read_text()
    assert text.startswith("above\n<!-- accuracy -->\n| adapter |")
    assert "| `reverse` | Writes the word backwards. |" in text
    assert text.endswith("| 100% | 50% |\n<!-- /accuracy -->\nbelow\n")


@pytest.mark.parametrize(
    "text", [None, "no marks\n", "<!-- accuracy -->\nno end\nbelow\n", "<!-- /accuracy -->\n<!-- accuracy -->\n"]
)
def test_a_file_without_a_place_for_the_table_is_refused_before_anything_is_measured(tmp_path, monkeypatch, text):
    page = tmp_path / "page.md"
    if text is not None:
        page.write_text(text)
    monkeypatch.setattr(accuracy, "measure", lambda llm, tasks: pytest.fail("measured"))
    with pytest.raises(ConfigError, match=r"--update .*page\.md: "):
        run_accuracy("auto", update=page)
    assert text is None or page.read_text() == text
