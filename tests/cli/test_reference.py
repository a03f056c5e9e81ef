"""docs/reference is what the code says."""

import pytest

from pomona.cli.reference import FOLDER, render_all


@pytest.fixture(scope="module")
def pages():
    return render_all()


def test_the_generated_reference_is_fresh(pages):
    for name, text in pages.items():
        assert (FOLDER / name).read_text() == text, f"docs/reference/{name} is stale: run `make docs`"


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("config.md", "deficit round robin. One of `fcfs`, `rpm`, `lcf`, `vtc`, `wvtc`, `drr`. |"),
        ("config.md", "One of `auto`, `float32`, `bfloat16`, `float16`."),
        ("config.md", "POMONA_ADAPTERS_DIR='["),
        ("config.md", '{"adapters": [{"name": "legal", "path": "legal/v7"'),
        ("cli.md", "| Least severe log to print. One of `debug`, `info`, `warning`, `error`. [default: info] |"),
        ("cli.md", "| `--role` | What the key may do. One of `admin`, `operator`, `auditor`. |"),
        ("cli.md", "Bearer token, if the server asks for one. Environment: `POMONA_API_KEY`."),
        ("metrics.md", "Only the first 64 adapters"),
        ("metrics.md", "counted together as `(other)`"),
    ],
)
def test_what_people_look_for_is_there(pages, page, said):
    assert said in pages[page]
