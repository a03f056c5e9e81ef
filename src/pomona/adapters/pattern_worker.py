"""Applies regular expressions to names. Also runs as a program of its own (JSON in, JSON out), so that a pattern that
would never end can be ended from outside: Python's ``re`` cannot be interrupted and holds the interpreter meanwhile.
Imports the standard library only; called by ``adapters.patterns``.
"""

import json
import re
import sys


def apply_patterns(patterns: list[str], names: list[str], *, is_full_match: bool) -> list[list[str | None]]:
    """Match every pattern against every name.

    Returns:
        Per pattern and name: None without a match, else the group named ``idx``, or "" if there is no such group.

    Raises:
        re.error: a pattern is not a regular expression. RecursionError, OverflowError: it is too large.
    """
    table: list[list[str | None]] = []
    for pattern in patterns:
        compiled = re.compile(pattern)
        apply = compiled.fullmatch if is_full_match else compiled.match
        matches = [apply(name) for name in names]
        has_index = "idx" in compiled.groupindex
        table.append([None if match is None else (match["idx"] or "") if has_index else "" for match in matches])
    return table


def main() -> None:
    """Read one request from stdin, write one answer to stdout."""
    request = json.load(sys.stdin)
    try:
        table = apply_patterns(request["patterns"], request["names"], is_full_match=request["is_full_match"])
    except (re.error, RecursionError, OverflowError) as error:
        json.dump({"error": str(error)}, sys.stdout)
    else:
        json.dump({"table": table}, sys.stdout)


if __name__ == "__main__":
    main()
