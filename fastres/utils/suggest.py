"""Parts of messages: suggestions of the nearest valid name, shortened lists, names of files in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice that is spelled most like `word`, or None if none is similar."""
    return next(iter(difflib.get_close_matches(word, list(choices), n=1)), None)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return " (did you mean NAME?)", or nothing if no choice is similar."""
    close = nearest(word, choices)
    return question([close] if close else [])


def question(names: Sequence[str]) -> str:
    """Return " (did you mean A, B or C?)", or nothing without names."""
    listed = " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return f" (did you mean {listed}?)" if names else ""


def near_flags(name: str, flags: Iterable[str]) -> list[str]:
    """Return the flags that `name` may mean: one that is spelled much like it, or those of its last part.

    Args:
        name: a flag or a field, with or without dashes and a section.
        flags: flags or fields, such as --optim.lr or optim.lr.
    """

    def plain(flag: str) -> str:
        return flag.lstrip("-").lower().replace("-", "_")

    whole = {plain(flag): flag for flag in flags}
    if "." in name and (close := difflib.get_close_matches(plain(name), whole, n=1, cutoff=0.8)):
        return [whole[close[0]]]
    by_last_part: dict[str, list[str]] = {}
    for key, flag in whole.items():
        by_last_part.setdefault(key.rpartition(".")[2], []).append(flag)
    last = plain(name).rpartition(".")[2]
    if last not in by_last_part:
        last = nearest(last, by_last_part) or ""
    near = nearest(plain(name), whole)
    return by_last_part.get(last) or ([whole[near]] if near else [])


def few(names: Iterable[str], shown: int = 3) -> str:
    """Return the first `shown` names, and the number of the others."""
    listed = list(names)
    more = f" and {len(listed) - shown:,} more" if len(listed) > shown else ""
    return ", ".join(listed[:shown]) + more


def unknown(what: str, value: object, choices: Iterable[str], near: str | None = None) -> ValueError:
    """Return the error for an unknown value, in one line with the nearest choice and all choices."""
    choices = list(choices)
    near = near or nearest(str(value).lower(), choices)
    hint = f"did you mean {near!r}? " if near else ""
    return ValueError(f"unknown {what} {value!r}; {hint}choose from {', '.join(choices)}")


def printable(text: str) -> str:
    """Return the text with escapes for the characters that move a terminal's cursor or cannot be encoded."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """Return the text in one line that can be encoded, although it may quote the name of a file."""
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())
