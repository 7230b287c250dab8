"""Glob patterns over the names in a model: matching, the choice among several, and hints for those without a match."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Sequence

Match = Callable[[str, str], bool]


def parts_of(name: str) -> list[str]:
    """Returns the name itself and the names of all modules that it is a part of, outermost first.

    >>> parts_of("features.2.drop")
    ['features', 'features.2', 'features.2.drop']
    """
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches a name, or the name of a module that it is a part of. ``*`` matches dots too.

    >>> matches("features.*", "features.2"), matches("features", "features.2"), matches("feat", "features.2")
    (True, True, False)
    """
    return any(fits(pattern, part) for part in parts_of(name))


def fits(pattern: str, name: str) -> bool:
    """Whether a pattern matches a name as a whole.

    >>> fits("*.weight", "fc.weight"), fits("fc", "fc.weight")
    (True, False)
    """
    return name == pattern or fnmatch.fnmatchcase(name, pattern)  # a name itself may have a glob's characters


def matches_itself(pattern: str, name: str) -> bool:
    """Whether a pattern matches a name part by part: ``*`` matches one part or some of one.

    >>> matches_itself("blocks.*", "blocks.0"), matches_itself("blocks.*", "blocks.0.norm")
    (True, False)
    """
    parts, wanted = name.split("."), pattern.split(".")
    return name == pattern or (len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted)))


def specificity(pattern: str, name: str) -> tuple[bool, int]:
    """Returns the rank of a pattern among those that match one name: the name itself, then more literal characters.

    >>> specificity("fc1", "fc1") > specificity("fc*", "fc1") > specificity("*", "fc1")
    True
    """
    return pattern == name, len(re.sub(r"\[[^]]*\]|[*?]", "", pattern))


def near(name: str, names: Iterable[str]) -> str:
    """Returns a hint: the names that look like this one, or else the first ones that exist.

    >>> near("features.*.drp", ["features.0.drop", "head"])
    'near misses: features.0.drop'
    """
    names = list(names)
    found = difflib.get_close_matches(name, names, 3, 0.4)
    if found:
        return f"near misses: {', '.join(found)}"
    return f"there are {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else "there are none"


def check_patterns(
    patterns: Iterable[str], names: Collection[str], others: Collection[str], what: str, match: Match = matches
) -> None:
    """Refuses patterns that match none of the names.

    Args:
        patterns: the patterns that the caller gave.
        names: the names that may be matched.
        others: names that exist too, but may not be matched.
        what: the kind of things that have the names, in the plural: "layers with a rate".
        match: whether a pattern matches a name.

    Raises:
        TypeError: a pattern is no string.
        ValueError: no patterns, or one that matches none of `names`; the message says whether it matches `others`.
    """
    patterns = list(patterns)
    if not patterns:
        raise ValueError(f"give at least one pattern for the names of {what}, got none")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"a pattern must be a string, got {type(pattern).__name__}")
        if any(match(pattern, name) for name in names):
            continue
        wrong = [other for other in others if fnmatch.fnmatchcase(other, pattern)]
        if wrong:
            shown = f"{', '.join(wrong[:4])}{', ...' if len(wrong) > 4 else ''}"
            raise ValueError(
                f"the pattern {pattern!r} matches only {shown}, and none of the {what}: {near(pattern, names)}"
            )
        raise ValueError(f"the pattern {pattern!r} matches none of the {what}: {near(pattern, names)}")


def winner(patterns: Iterable[str], names: Sequence[str], match: Match = matches) -> str | None:
    """Returns the most specific of the patterns that match one thing under any of its names; None if none does.

    Raises:
        ValueError: two are equally specific.

    Example:
        >>> winner(["*", "fc*", "head"], ["fc1"])
        'fc*'
    """
    ranked = []
    for pattern in patterns:
        matched = [specificity(pattern, name) for name in names if match(pattern, name)]
        if matched:
            ranked.append((max(matched), pattern))
    ranked.sort()
    if len(ranked) > 1 and ranked[-1][0] == ranked[-2][0]:
        raise ValueError(
            f"the patterns {ranked[-2][1]!r} and {ranked[-1][1]!r} both match {names[0]!r} and neither is "
            "more specific: "
            "name it in full, or make one of them longer"
        )
    return ranked[-1][1] if ranked else None
