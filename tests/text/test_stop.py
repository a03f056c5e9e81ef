from hypothesis import given
from hypothesis import strategies as st

from pomona.text.stop import StopMatcher, StopStrings

# Two letters, so that stop strings overlap themselves, each other and the text all the time.
letters = st.text("ab", max_size=12)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4, unique=True)


def _run(stops: list[str], pieces: list[str], *, include_stop: bool = False) -> tuple[list[str], str | None]:
    matcher = StopMatcher(StopStrings(stops), include_stop=include_stop)
    out = [matcher.push(piece) for piece in pieces]
    return [*out, matcher.flush()], matcher.matched


def _expected(stops: list[str], text: str, *, include_stop: bool) -> tuple[str, str | None]:
    """The definition: the text ends at the first character that completes a stop string; the longest such counts."""
    for end in range(1, len(text) + 1):
        completed = [stop for stop in stops if text[:end].endswith(stop)]
        if completed:
            stop = max(completed, key=len)
            return text[: end if include_stop else end - len(stop)], stop
    return text, None


@given(stops=stop_lists, pieces=st.lists(letters, max_size=8), include_stop=st.booleans())
def test_the_outcome_depends_on_the_text_and_not_on_its_pieces(stops, pieces, include_stop):
    out, matched = _run(stops, pieces, include_stop=include_stop)
    assert ("".join(out), matched) == _expected(stops, "".join(pieces), include_stop=include_stop)


@given(stops=stop_lists, pieces=st.lists(letters, max_size=8))
def test_only_what_may_still_become_a_stop_string_is_held_back(stops, pieces):
    matcher = StopMatcher(StopStrings(stops))
    seen = given_out = ""
    for piece in pieces:
        given_out += matcher.push(piece)
        if matcher.matched is not None:
            break
        seen += piece
        held = seen[len(given_out) :]
        longest = max(
            (
                seen[-n:]
                for n in range(1, len(seen) + 1)
                if any(s != seen[-n:] and s.startswith(seen[-n:]) for s in stops)
            ),
            key=len,
            default="",
        )
        assert held == longest


def test_a_stop_string_across_three_tokens_is_cut_whole():
    assert _run(["\n\nUser:"], ["Fine.\n", "\nUs", "er: hi"]) == (["Fine.", "", "", ""], "\n\nUser:")


def test_a_false_beginning_is_given_back():
    assert _run(["END"], ["the E", "N", "T rance"]) == (["the ", "", "ENT rance", ""], None)


def test_what_is_held_at_the_end_is_flushed():
    assert _run(["END"], ["the EN"]) == (["the ", "EN"], None)


def test_nothing_follows_a_match():
    assert _run(["x"], ["axb", "c"]) == (["a", "", ""], "x")


def test_the_stop_string_may_be_kept():
    assert _run(["stop"], ["do st", "op now"], include_stop=True) == (["do ", "stop", ""], "stop")
