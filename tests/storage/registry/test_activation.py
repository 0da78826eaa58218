"""Who may be active, and what the history says of it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy.exc import IntegrityError

from storage.errors import ActivationRefused, Conflict, IllegalTransition, NotFound
from storage.registry import activation, history, reports, revisions
from storage.registry.records import Artifact, Owned, Report, Revision
from storage.sql import tables
from storage.sql.database import Database
from storage.states import RevisionState

MODEL = Owned(None, "encoder")


def add(database: Database, digest: str = "d1", model: Owned = MODEL, place: str = "/models/encoder") -> Revision:
    artifacts = [Artifact("config.json", "config.json", 10, "a" * 64)]
    revision, _ = revisions.add(
        database, model, digest=digest, place=place, task="embed", artifacts=artifacts, actor="ann"
    )
    return revision


def judge(database: Database, revision: Revision, verdict: str, name: str = "r1") -> Revision:
    return activation.judged(database, revision, Report(name, verdict, 0.0, "ann", {"rows": 300}))


def states(database: Database, model: Owned = MODEL) -> dict[int, str]:
    return {item.number: str(item.state) for item in revisions.listed(database, model=model)}


def test_the_same_content_is_the_same_revision(database: Database) -> None:
    first, again = add(database), add(database, place="/elsewhere")
    assert (first.number, again.number, again.id) == (1, 1, first.id)
    assert again.place == "/elsewhere"
    assert add(database, "d2").number == 2
    assert [(e.type, e.number) for e in history.events(database, MODEL)] == [("added", 1), ("moved", 1), ("added", 2)]
    assert [item.name for item in revisions.artifacts(database, first.id)] == ["config.json"]


def test_only_a_pass_activates(database: Database) -> None:
    revision = add(database)
    with pytest.raises(ActivationRefused, match="was not validated"):
        activation.activate(database, revision, replacing=None, actor="ann")
    for name, verdict in (("r1", reports.FAIL), ("r2", reports.INSUFFICIENT)):
        assert judge(database, revision, verdict, name).state is RevisionState.DRAFT
        with pytest.raises(ActivationRefused, match=verdict):
            activation.activate(database, revision, replacing=None, actor="ann")
    assert judge(database, revision, reports.PASS, "r3").state is RevisionState.VALIDATED
    assert judge(database, revision, reports.FAIL, "r4").state is RevisionState.DRAFT
    with pytest.raises(ActivationRefused, match="FAIL"):
        activation.activate(database, revision, replacing=None, actor="ann")
    judge(database, revision, reports.PASS, "r5")
    assert activation.activate(database, revision, replacing=None, actor="ann").state is RevisionState.ACTIVE
    with pytest.raises(ActivationRefused, match="is active already"):
        activation.activate(database, revision, replacing=revision, actor="ann")
    # A validation of what is active is stored, and withdraws nothing by itself.
    assert judge(database, revision, reports.FAIL, "r6").state is RevisionState.ACTIVE
    assert [report.id for report in reports.of_revision(database, revision)] == ["r6", "r5", "r4", "r3", "r2", "r1"]


def test_a_forced_activation_says_so_in_the_history(database: Database) -> None:
    revision = add(database)
    activation.activate(database, revision, replacing=None, actor="ann", reason="an outage", forced=True)
    event = history.events(database, MODEL)[-1]
    assert (event.type, event.from_state, event.to_state) == ("activated", "draft", "active")
    assert (event.forced, event.reason, event.actor, event.number) == (True, "an outage", "ann", 1)


def test_a_rollback_goes_back_one_activation_at_a_time(database: Database) -> None:
    made = [add(database, f"d{n}") for n in range(3)]
    active = None
    for revision in made:
        active = activation.activate(database, revision, replacing=active, actor="ann", forced=True)
    assert states(database) == {1: "retired", 2: "retired", 3: "active"}
    for number in (2, 1):
        target = activation.previous(database, MODEL)
        assert target.number == number
        active = activation.roll_back(database, target, replacing=active, actor="ben")
    assert states(database) == {1: "active", 2: "retired", 3: "retired"}
    with pytest.raises(ActivationRefused, match="nothing to go back to"):
        activation.previous(database, MODEL)
    activation.retire(database, made[0], actor="ann")
    assert activation.previous(database, MODEL).number == 1
    with pytest.raises(IllegalTransition):
        activation.retire(database, made[0], actor="ann")


def test_what_was_active_at_any_time(database: Database) -> None:
    one, two = add(database, "d1"), add(database, "d2")
    active = activation.activate(database, one, replacing=None, actor="ann", forced=True)
    active = activation.activate(database, two, replacing=active, actor="ann", forced=True)
    activation.retire(database, active, actor="ann")
    found = []
    for event in history.events(database, MODEL):
        at = history.active_at(database, MODEL, event.at)
        found.append(at.number if at else None)
    # Events of one transaction may share their time; the later one counts.
    assert found[:2] == [None, None] and found[2] == 1 and found[-2:] == [2, None]
    assert history.active_at(database, MODEL, 0.0) is None


def test_one_of_fifty_racing_activations_wins(database: Database) -> None:
    made = [add(database, f"d{n}") for n in range(50)]
    barrier = threading.Barrier(50)

    def race(revision: Revision) -> str:
        barrier.wait(60)
        try:
            activation.activate(database, revision, replacing=None, actor="ann", forced=True)
        except ActivationRefused as error:
            assert "active now" in str(error) or "became active" in str(error)
            return "refused"
        return "active"

    with ThreadPoolExecutor(50) as pool:
        outcomes = list(pool.map(race, made))
    assert outcomes.count("active") == 1 and outcomes.count("refused") == 49
    assert list(states(database).values()).count("active") == 1
    assert [event.type for event in history.events(database, MODEL)].count("activated") == 1


def test_the_index_itself_lets_one_be_active(database: Database) -> None:
    for digest in ("d1", "d2"):
        add(database, digest)
    other = add(database, "d1", Owned("blue", "encoder"))
    table = tables.model_revision
    with pytest.raises(IntegrityError), database.write() as connection:
        connection.execute(table.update().values(state="active").where(table.c.id != other.id))
    with database.write() as connection:  # another tenant's of the same name is another model
        connection.execute(table.update().values(state="active").where(table.c.number == 1))
    assert states(database, Owned("blue", "encoder")) == {1: "active"}


def test_a_private_model_goes_before_an_operators(database: Database) -> None:
    add(database)
    assert revisions.visible(database, "blue", "encoder") == MODEL
    private = Owned("blue", "encoder")
    add(database, model=private)
    assert revisions.visible(database, "blue", "encoder") == private
    assert revisions.visible(database, "red", "encoder") == MODEL
    assert revisions.visible(database, None, "encoder") == MODEL
    assert revisions.visible(database, "blue", "nothing") is None


def test_an_alias_moves_and_the_history_says_from_where(database: Database) -> None:
    one, two = add(database, "d1"), add(database, "d2")
    for revision in (one, two, two):
        revisions.set_alias(database, revision, "prod", actor="ann")
    assert revisions.by_alias(database, MODEL, "prod").number == 2
    assert revisions.aliases(database, MODEL) == {"prod": 2}
    moved = [event for event in history.events(database, MODEL) if event.type == "alias"]
    assert [(e.alias, e.from_state, e.to_state) for e in moved] == [("prod", None, "1"), ("prod", "1", "2")]
    with pytest.raises(NotFound, match="no alias 'test'; it has revisions 1, 2, and aliases prod"):
        revisions.by_alias(database, MODEL, "test")
    with pytest.raises(NotFound, match="no revision 7"):
        revisions.get(database, MODEL, 7)


def test_a_removed_number_is_not_given_again(database: Database) -> None:
    one = add(database)
    revisions.set_alias(database, one, "prod", actor="ann")
    judge(database, one, reports.PASS)
    active = activation.activate(database, one, replacing=None, actor="ann")
    with pytest.raises(Conflict, match="is active"):
        revisions.remove(database, active, actor="ann")
    activation.retire(database, active, actor="ann")
    revisions.remove(database, one, actor="ann")
    assert revisions.visible(database, None, "encoder") is None
    assert add(database).number == 2
    assert [e.type for e in history.events(database, MODEL)][-2:] == ["removed", "added"]
    assert revisions.aliases(database, MODEL) == {}
