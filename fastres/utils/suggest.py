"""Parts of messages: suggestions of the nearest valid name, shortened lists, names of files in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice that is spelled most like `word`, or None if none is similar."""
    return next(iter(difflib.get_close_matches(word, list(choices), n=1)), None)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return " (did you mean NAME?)", or nothing if no choice is similar."""
    close = nearest(word, choices)
    return f" (did you mean {close}?)" if close else ""


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


def one_line(text: str) -> str:
    """Return the text in one line that can be encoded, although it may quote the name of a file."""
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())
