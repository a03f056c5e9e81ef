"""Stop strings in streamed text, across token boundaries.

The outcome depends on the text alone, never on how it was cut into pieces: the output ends at the first character
that completes any stop string. Matching is Knuth, Morris and Pratt's ("Fast pattern matching in strings", 1977):
constant work per character and stop string, whatever their lengths.
"""

from collections.abc import Sequence


def _failure_table(pattern: str) -> list[int]:
    """Entry i: length of the longest proper prefix of pattern[:i+1] that is also its suffix."""
    table = [0] * len(pattern)
    matched = 0
    for position in range(1, len(pattern)):
        while matched and pattern[position] != pattern[matched]:
            matched = table[matched - 1]
        if pattern[position] == pattern[matched]:
            matched += 1
        table[position] = matched
    return table


class StopStrings:
    """The stop strings of one request; immutable, shared by its choices.

    Args:
        patterns: none of them empty.
    """

    __slots__ = ("failure_tables", "first_chars", "patterns")

    def __init__(self, patterns: Sequence[str]) -> None:
        assert all(patterns), "the edge refuses empty stop strings"
        self.patterns = tuple(patterns)
        self.failure_tables = tuple(_failure_table(pattern) for pattern in patterns)
        self.first_chars = frozenset(pattern[0] for pattern in patterns)


class StopMatcher:
    """Watches one text for stop strings and holds back what may still become one.

    Args:
        stops: what to look for.
        include_stop: keep the stop string in the text instead of cutting before it.
    """

    __slots__ = ("_held", "_include_stop", "_matched_lengths", "_stops", "matched")

    def __init__(self, stops: StopStrings, *, include_stop: bool = False) -> None:
        self._stops = stops
        self._include_stop = include_stop
        self._held = ""
        self._matched_lengths = [0] * len(stops.patterns)
        self.matched: str | None = None
        """The stop string that ended the text; of several completed by one character, the longest."""

    def push(self, text: str) -> str:
        """Take more text; return what is certain to be part of the answer. After a match nothing is."""
        if self.matched is not None:
            return ""
        if not self._held and self._stops.first_chars.isdisjoint(text):
            return text
        pending = self._held + text
        for position in range(len(self._held), len(pending)):
            completed = self._step(pending[position])
            if completed is not None:
                self.matched = completed
                self._held = ""
                end = position + 1
                return pending[: end if self._include_stop else end - len(completed)]
        num_held = max(self._matched_lengths)
        num_free = len(pending) - num_held
        self._held = pending[num_free:]
        return pending[:num_free]

    def flush(self) -> str:
        """End the text without a match; return what was held back."""
        held, self._held = self._held, ""
        return held

    def _step(self, char: str) -> str | None:
        """Advance every pattern by one character; return the longest that it completes."""
        completed: str | None = None
        lengths = self._matched_lengths
        for index, pattern in enumerate(self._stops.patterns):
            matched = lengths[index]
            table = self._stops.failure_tables[index]
            while matched and char != pattern[matched]:
                matched = table[matched - 1]
            if char == pattern[matched]:
                matched += 1
            lengths[index] = matched
            if matched == len(pattern) and (completed is None or len(pattern) > len(completed)):
                completed = pattern
        return completed
