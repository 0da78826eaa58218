"""What may be inside one vLLM engine at a time, over all the calls that feed it."""

from __future__ import annotations

import threading


class AdmissionLimit:
    """At most ``requests`` requests with ``tokens`` prompt tokens in all are inside the engine: the last to enter may
    go beyond these, and one may always be inside.

    Each call has a :class:`Ticket`. Of calls that do the same work (shards of one job), the one that came first is fed
    first, and the next one only once the first has nothing more to give: so the batch stays full from shard to shard,
    while prompts of one shard, which may share prefixes, stay together. Calls of different work get equal shares.

    ``changed`` guards all of it, the places' numbers too, and is notified whenever one changes.
    """

    def __init__(self, requests: int, tokens: int) -> None:
        self.changed = threading.Condition()
        self.requests, self.tokens = requests, tokens
        self._places: list[Ticket] = []

    def join(self, work: str) -> Ticket:
        """A place for one call. ``work`` is the same for calls that take turns."""
        with self.changed:
            place = Ticket(self, work)
            self._places.append(place)
            return place

    def leave(self, place: Ticket) -> None:
        """The call has ended, and nothing of it is inside any more."""
        with self.changed:
            if place in self._places:
                self._places.remove(place)
                self.changed.notify_all()

    def room(self, place: Ticket) -> int:
        """How many requests this call may put in now (hold ``changed``)."""
        ready = [other for other in self._places if other.ready]
        first = next((other for other in ready if other.work == place.work), None)
        if first is not place:
            return 0
        mine = self._inside_of(place.work)
        if any(self._inside_of(other.work) < mine for other in ready):
            return 0
        if self.tokens_left() <= 0:
            return 0
        return self.requests - sum(other.inside for other in self._places)

    def tokens_left(self) -> int:
        """Prompt tokens that may still enter (hold ``changed``); none, or less, where they are reached."""
        return self.tokens - sum(place.tokens for place in self._places)

    def _inside_of(self, work: str) -> int:
        return sum(place.inside for place in self._places if place.work == work)


class Ticket:
    """One call's part of a :class:`AdmissionLimit`: what it has inside, and whether it has more to give (``ready``)."""

    def __init__(self, window: AdmissionLimit, work: str) -> None:
        self.window, self.work = window, work
        self.inside = self.tokens = 0
        self.ready = False
