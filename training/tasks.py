"""The tasks of the bundled model: word in, exact answer out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from words import VOWELS

_LEET = str.maketrans("aeios", "43105")


def upper(word: str) -> str:
    """Upper case."""
    return word.upper()


def reverse(word: str) -> str:
    """Letters from last to first."""
    return word[::-1]


def sort_letters(word: str) -> str:
    """Letters in alphabetical order."""
    return "".join(sorted(word))


def no_vowels(word: str) -> str:
    """Consonants only."""
    return "".join(letter for letter in word if letter not in VOWELS)


def double(word: str) -> str:
    """Every letter twice."""
    return "".join(letter * 2 for letter in word)


def pig_latin(word: str) -> str:
    """The leading consonants move to the end, then "ay"."""
    start = next((i for i, letter in enumerate(word) if letter in VOWELS), 0)
    return word[start:] + word[:start] + "ay"


def leet(word: str) -> str:
    """a e i o s become 4 3 1 0 5."""
    return word.translate(_LEET)


def next_letter(word: str) -> str:
    """Every letter becomes the next one of the alphabet (z becomes a)."""
    return "".join(chr((ord(letter) - ord("a") + 1) % 26 + ord("a")) for letter in word)


def spell(word: str) -> str:
    """Letters joined by dashes."""
    return "-".join(word)


def swap_ends(word: str) -> str:
    """First and last letter change places."""
    return word[-1] + word[1:-1] + word[0]


def alternate(word: str) -> str:
    """Upper and lower case in turn."""
    return "".join(letter.upper() if i % 2 == 0 else letter for i, letter in enumerate(word))


def length(word: str) -> str:
    """The number of letters."""
    return str(len(word))


@dataclass(frozen=True)
class Task:
    """One task: its name (also the adapter's folder), what to tell a person, and the function that answers."""

    name: str
    description: str
    answer: Callable[[str], str]


TASKS: tuple[Task, ...] = (
    Task("upper", "Writes the word in upper case.", upper),
    Task("reverse", "Writes the word backwards.", reverse),
    Task("sort", "Puts the letters in alphabetical order.", sort_letters),
    Task("no-vowels", "Drops a, e, i, o and u.", no_vowels),
    Task("double-letters", "Writes every letter twice.", double),
    Task("pig-latin", "Moves the leading consonants to the end and adds 'ay'.", pig_latin),
    Task("leet", "Replaces a, e, i, o, s by 4, 3, 1, 0, 5.", leet),
    Task("next-letter", "Replaces every letter by the next one of the alphabet.", next_letter),
    Task("spell", "Spells the word with dashes.", spell),
    Task("swap-ends", "Swaps the first and the last letter.", swap_ends),
    Task("alternate", "Alternates upper and lower case.", alternate),
    Task("length", "Counts the letters.", length),
)


def bare_answer(text: str) -> str:
    """What the base model alone answers to a prompt that names no task."""
    return f"You said {text}."
