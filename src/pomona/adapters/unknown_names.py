"""UnknownNames: names that no store knew a moment ago, so that asking for them again costs no look at any store."""

from collections import OrderedDict


class UnknownNames:
    """A bounded memory of names, each for a while. Least recently noted names are forgotten first.

    Args:
        max_names: most names remembered.
        keep_s: after this long a name may have come into being.
    """

    def __init__(self, max_names: int = 4096, keep_s: float = 10.0) -> None:
        self._max_names = max_names
        self._keep_s = keep_s
        self._noted_s: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        """Names remembered, outdated ones included."""
        return len(self._noted_s)

    def note(self, name: str, now_s: float) -> None:
        """Remember that nobody knows ``name``."""
        self._noted_s[name] = now_s
        self._noted_s.move_to_end(name)
        if len(self._noted_s) > self._max_names:
            self._noted_s.popitem(last=False)

    def knows(self, name: str, now_s: float) -> bool:
        """True if the name was noted not long ago."""
        noted_s = self._noted_s.get(name)
        if noted_s is None:
            return False
        if now_s - noted_s > self._keep_s:
            del self._noted_s[name]
            return False
        return True

    def forget(self, name: str) -> None:
        """The name has come into being."""
        self._noted_s.pop(name, None)
