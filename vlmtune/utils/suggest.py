"""The nearest valid name, for error messages."""

import difflib
from collections.abc import Iterable


def nearest(name: str, valid: Iterable[str], *, count: int = 1, cutoff: float = 0.6) -> list[str]:
    """The ``count`` names of ``valid`` most like ``name``, best first; case does not matter."""
    by_lower = {candidate.lower(): candidate for candidate in sorted(valid) if candidate != name}
    return [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, count, cutoff)]


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """``", did you mean 'lora_r'?"``, or nothing where no name is near."""
    found = nearest(name, valid)
    return f', did you mean {found[0]!r}?' if found else ''
