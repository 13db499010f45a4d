"""Who may send without a credit: nobody waits for ever, and nobody fills a slow link."""

from __future__ import annotations

from mpiddl.collectives.channel import _Room
from mpiddl.comm.messages import Credits


class Send:
    """A message on its way until ``arrived``."""

    def __init__(self, arrived=False):
        self.arrived = arrived

    def done(self):
        return self.arrived


def test_without_a_credit_only_the_most_urgent_goes_on():
    room, here, away = Credits(1), [Send(arrived=True)], [Send()]
    for urgency in (2, 0, 1):
        room.enter(urgency)
    assert _Room(room, 0, away).done()  # there is a credit

    send = Send()
    room.take(send)
    assert [_Room(room, urgency, here).done() for urgency in (0, 1, 2)] == [False, False, True]
    assert not _Room(room, 2, away).done()  # one message at a time
    room.leave(2)
    assert [_Room(room, urgency, here).done() for urgency in (0, 1)] == [False, True]
    room.leave(1)
    assert _Room(room, 0, here).done()

    room.enter(3)
    assert not _Room(room, 0, here).done()
    send.arrived = True  # and gives its credit back
    assert _Room(room, 0, away).done()
