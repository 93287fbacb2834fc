"""Every error and warning that Elision raises. Each message names the value, the limit and the fix.

ElisionError
├── UnknownName (LookupError)          a method, option or model that does not exist; the nearest one is named
├── OptionError (ValueError)           an option out of its range
├── UnsupportedTarget (TypeError)      a target that the method cannot work on
├── Conflict                           two methods that cannot act together, or a target that is taken
├── ProfileError
│   └── ProfileMismatch                a profile that was made for something else
├── ClockError                         the step or the branch of a call cannot be known
├── TapDisplaced                       something replaced a tap, so the method no longer sees the calls
├── Closed                             an `Applied` used after `remove()`
├── StoreUnavailable                   a document store that cannot be reached, read or written
└── MissingDependency (ImportError)    an optional package or data set that is not installed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ElisionError(Exception):
    """Root of all errors that Elision raises on purpose."""


class UnknownName(ElisionError, LookupError):
    """A method, option or model that does not exist."""

    @classmethod
    def of(cls, kind: str, name: object, known: Iterable[str]) -> UnknownName:
        """The error for `name`, with the nearest of the `known` names."""
        known = sorted(known)
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return cls(f"unknown {kind} {name!r}: {hint}known: {', '.join(known) or 'none'}")


class OptionError(ElisionError, ValueError):
    """An option out of its range, or one that does not fit the others."""


class UnsupportedTarget(ElisionError, TypeError):
    """A target that the method cannot work on."""


class Conflict(ElisionError):
    """Two methods that cannot act together, or a target that another session holds."""


class ProfileError(ElisionError):
    """A profile that is missing or cannot be read."""


class ProfileMismatch(ProfileError):
    """A profile that was made for another model, scheduler or number of steps."""


class ClockError(ElisionError):
    """The step or the branch of a call cannot be known."""


class TapDisplaced(ElisionError):
    """Something replaced a tap, so the method no longer sees the calls."""


class Closed(ElisionError):
    """An `Applied` was used after `remove()`."""


class StoreUnavailable(ElisionError):
    """A document store that cannot be reached, read or written (Redis down, disk full, file locked)."""


class MissingDependency(ElisionError, ImportError):
    """An optional package or data set is not installed."""


class ElisionWarning(UserWarning):
    """Something is legal but surely not meant: above all, a run in which nothing was elided."""
