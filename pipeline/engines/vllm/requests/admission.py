"""What may be inside one vLLM engine at a time, over all the calls that feed it."""

from __future__ import annotations

import threading


class AdmissionLimit:
    """At most ``requests`` requests with ``tokens`` prompt tokens in all are inside the engine: the last to enter may
    go beyond these, and one may always be inside.

    Each call has a :class:`Ticket`. Of calls that do the same work (shards of one job), the one that came first is fed
    first, and the next one only once the first has nothing more to give: so the batch stays full from shard to shard,
    while prompts of one shard, which may share prefixes, stay together. Calls of different work get equal shares.

    ``changed`` guards all of it, the tickets' numbers too, and is notified whenever one changes.
    """

    def __init__(self, requests: int, tokens: int) -> None:
        self.changed = threading.Condition()
        self.requests, self.tokens = requests, tokens
        self._tickets: list[Ticket] = []

    def join(self, work: str) -> Ticket:
        """The ticket of one call. ``work`` is the same for calls that take turns."""
        with self.changed:
            ticket = Ticket(self, work)
            self._tickets.append(ticket)
            return ticket

    def leave(self, ticket: Ticket) -> None:
        """The call has ended, and nothing of it is inside any more."""
        with self.changed:
            if ticket in self._tickets:
                self._tickets.remove(ticket)
                self.changed.notify_all()

    def room(self, ticket: Ticket) -> int:
        """How many requests this call may put in now (hold ``changed``)."""
        ready = [other for other in self._tickets if other.ready]
        first = next((other for other in ready if other.work == ticket.work), None)
        if first is not ticket:
            return 0
        mine = self._inside_of(ticket.work)
        if any(self._inside_of(other.work) < mine for other in ready):
            return 0
        if self.tokens_left() <= 0:
            return 0
        return self.requests - sum(other.inside for other in self._tickets)

    def tokens_left(self) -> int:
        """Prompt tokens that may still enter (hold ``changed``); none, or less, where they are reached."""
        return self.tokens - sum(ticket.tokens for ticket in self._tickets)

    def _inside_of(self, work: str) -> int:
        return sum(ticket.inside for ticket in self._tickets if ticket.work == work)


class Ticket:
    """One call's part of a :class:`AdmissionLimit`: what it has inside, and whether it has more to give (``ready``)."""

    def __init__(self, window: AdmissionLimit, work: str) -> None:
        self.window, self.work = window, work
        self.inside = self.tokens = 0
        self.ready = False
