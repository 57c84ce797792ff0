"""Who has to go when there is no room at the door, and what is written of those who caused it."""

from __future__ import annotations

import logging

from mooncache.discovery import complaints
from mooncache.discovery.complaints import PERIOD_S, SOURCES, Complaints
from mooncache.discovery.visitors import CROWD, GRACE_S, VISITORS, Visitors

log = logging.getLogger("mooncache.tests")


def filled(*sources: str) -> Visitors:
    """One visitor a source and second."""
    visitors = Visitors()
    for second, source in enumerate(sources):
        visitors.enter(second, source, float(second))
    return visitors


def test_the_oldest_of_the_source_with_most_has_to_go():
    visitors = filled("a", "b", "b", "c", "b", "a")
    assert visitors.next_to_go() == (1, 1 + GRACE_S)
    for gone in (1, 1, 2):  # which may have left meanwhile
        visitors.leave(gone)
    assert visitors.next_to_go() == (0, GRACE_S)


def test_a_source_that_fills_the_house_turns_only_itself_out():
    visitors = filled("quiet", *["many"] * VISITORS)
    for number in range(3 * VISITORS):
        assert visitors.too_many
        gone, _ = visitors.next_to_go()
        assert gone != 0
        visitors.leave(gone)
        visitors.enter(VISITORS + 1 + number, "many", 1000.0)


def test_some_are_no_crowd():
    assert not filled(*["a"] * (CROWD - 1)).crowded
    assert filled(*["a"] * CROWD).crowded
    assert not filled(*["a"] * VISITORS).too_many


def test_of_a_kind_and_source_one_line_is_written_and_the_rest_counted(caplog, monkeypatch):
    now = 0.0
    monkeypatch.setattr(complaints, "monotonic", lambda: now)
    told = Complaints(log)
    for number in range(5):
        told.tell("a", "did %s", number)
    told.tell("a", "did not %s", 1)
    told.tell("b", "did %s", 2)
    assert caplog.messages == ["did 0", "did not 1", "did 2"]
    now = PERIOD_S
    told.tell("a", "did %s", 9)
    assert caplog.messages[3:] == ["4 more lines of the kind 'did %s' because of a were not written", "did 9"]
    told.close()
    told.close()
    assert len(caplog.messages) == 5


def test_sources_without_number_are_one_source(caplog):
    told = Complaints(log)
    for number in range(10 * SOURCES):
        told.tell(str(number), "did %s", number)
    assert len(caplog.messages) == SOURCES + 1
    assert len(told._told) == SOURCES + 1
    told.close()
    assert caplog.messages[-1] == f"{9 * SOURCES - 1} more lines because of others were not written"
