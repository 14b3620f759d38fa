"""Who calls: the owner of a key, which tasks and limits belong to."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from harness.service.queue import digest

LOCAL = "local"  # the owner of everything where no keys are set


class KeyRing:
    """The keys that callers may use. Owners are fingerprints of them: no record holds a key."""

    def __init__(self, keys: Sequence[str]):
        self._owners = [(key.encode(), digest(key)) for key in keys]

    @property
    def required(self) -> bool:
        return bool(self._owners)

    def owner_of(self, authorization: str) -> str | None:
        """The owner by an Authorization header (``Bearer KEY``); None where it holds no known key."""
        if not self._owners:
            return LOCAL
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() != "bearer":
            return None
        sent, found = given.strip().encode(), None
        for key, owner in self._owners:  # all of them, so that the time tells nothing
            if hmac.compare_digest(key, sent):
                found = owner
        return found
