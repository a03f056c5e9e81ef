"""docs/reference is what the code says."""

from pomona.cli.reference import FOLDER, render_all


def test_the_generated_reference_is_fresh():
    for name, text in render_all().items():
        assert (FOLDER / name).read_text() == text, f"docs/reference/{name} is stale: run `make docs`"
