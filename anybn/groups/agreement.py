"""What the members of a group must agree on, and the errors that all of them raise if they do not."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from anybn._settings import FLOATING
from anybn.errors import MemberError


class Settings(NamedTuple):
    """One member's settings, as numbers that travel with its statistics."""

    channels: float
    dtype: float
    eps: float
    momentum: float
    ddof: float
    axis: float
    training: float
    affine: float
    scale: float
    bias: float
    relu: float
    nonfinite: float


#: The settings that are no numbers: each travels as the index of its value.
_CHOICES: dict[str, tuple[Any, ...]] = {
    "dtype": FLOATING,
    **dict.fromkeys(("training", "affine", "scale", "bias", "relu"), (False, True)),
    "nonfinite": ("skip", "raise", "propagate"),
}


def settings(**values: Any) -> Settings:
    """The fields of `Settings` by name, as the user knows them: ``dtype="float32"``, ``momentum=None``."""
    numbers = {name: _CHOICES[name].index(value) if name in _CHOICES else value for name, value in values.items()}
    return Settings(**{name: -1.0 if value is None else float(value) for name, value in numbers.items()})


def _in_words(name: str, number: float) -> str:
    """A setting as the user knows it."""
    if name in _CHOICES:
        return repr(_CHOICES[name][int(number)])
    if name == "momentum" and number < 0:
        return "None"
    return f"{number:g}"


def member_names(ranks: np.ndarray) -> str:
    """``"member 3"``, ``"members 0, 1"``."""
    shown = ", ".join(map(str, ranks[:10])) + (", ..." if len(ranks) > 10 else "")
    return f"member {shown}" if len(ranks) == 1 else f"members {shown}"


def require_presence(counts: np.ndarray) -> None:
    """Raises MemberError if a member has failed. ``counts``: of every member, or their sum; NaN where one failed."""
    failed = np.flatnonzero(np.isnan(counts))
    if failed.size:
        who = member_names(failed) if counts.size > 1 else "a member"
        raise MemberError(
            f"{who} of the group raised an error before the collective: see what was raised there; nothing has "
            "changed here",
            tuple(map(int, failed)) if counts.size > 1 else (),
        )


def require_agreement(heads: np.ndarray) -> None:
    """Raises ValueError that names members and settings. ``heads``: of every member, a row of count and settings."""
    require_presence(heads[:, 0])
    differing = []
    for name, column in zip(Settings._fields, heads[:, 1:].T, strict=True):
        if (column != column[0]).any():
            sides = (
                f"{_in_words(name, v)} on {member_names(np.flatnonzero(column == v))}" for v in dict.fromkeys(column)
            )
            differing.append(f"{name} is {' and '.join(sides)}")
    if differing:
        raise ValueError(f"the members of the group disagree: {'; '.join(differing)}: give all of them the same layer")


#: How many hexadecimal digits of the hash of its settings a member sends. So small, the sums of their squares are exact
#: in float32, for 2**16 members.
_DIGITS = 4
SUMMANDS = 1 + 2 * _DIGITS


def summands(settings: Settings) -> tuple[float, ...]:
    """`SUMMANDS` numbers whose sums over all members show whether their settings are equal: see `require_equal_sums`.

    They are 1, the digits of a hash, and their squares.
    """
    digits = [float(hash(settings) >> 4 * i & 15) for i in range(_DIGITS)]
    return 1.0, *digits, *(digit * digit for digit in digits)


def require_equal_sums(sums: np.ndarray) -> None:
    """Raises ValueError unless all digits are equal: only then is ``members * sum(digit**2) == sum(digit)**2``."""
    members, digits, squares = sums[0], sums[1 : 1 + _DIGITS], sums[1 + _DIGITS :]
    if (members * squares != digits * digits).any():
        raise ValueError(
            "the members of the group disagree in channels, dtype or settings; a group with rank and size would "
            "say which: give all members the same layer"
        )


def require_values(count: int, members: int) -> None:
    """Raises ValueError if there is 1 value per channel in all; 0 is an empty batch, which is allowed."""
    if count == 1:
        raise ValueError(
            f"training needs more than 1 value per channel, got 1 over the {members} members of the group: "
            "use larger batches, eval mode, or a layer or group norm"
        )
