"""The state machines: only what the tables say may happen, and every state says who moves it on."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import states
from storage.errors import IllegalTransition
from storage.states import AttemptState, BatchState, FireState, JobState, RequestState, RevisionState, ShardState

TABLES: dict[type[StrEnum], Mapping[Any, frozenset[Any]]] = {
    JobState: states.JOB,
    ShardState: states.SHARD,
    AttemptState: states.ATTEMPT,
    RequestState: states.REQUEST,
    FireState: states.FIRE,
    RevisionState: states.REVISION,
    BatchState: states.BATCH,
}
ENTITIES = {
    JobState: "job",
    ShardState: "shard",
    AttemptState: "attempt",
    RequestState: "request",
    FireState: "fire",
    RevisionState: "revision",
    BatchState: "batch",
}
START: dict[type[StrEnum], Any] = {
    JobState: JobState.VALIDATING,
    ShardState: ShardState.READY,
    AttemptState: AttemptState.RUNNING,
    RequestState: RequestState.PENDING,
    FireState: FireState.PENDING,
    RevisionState: RevisionState.DRAFT,
    BatchState: BatchState.VALIDATING,
}
every_machine = pytest.mark.parametrize("kind", list(TABLES), ids=lambda kind: ENTITIES[kind])
pairs = [(kind, a, b) for kind in TABLES for a in kind for b in kind]


@every_machine
def test_the_table_knows_every_state_and_no_other(kind: type[StrEnum]) -> None:
    assert set(TABLES[kind]) == set(kind)
    assert all(target in set(kind) for targets in TABLES[kind].values() for target in targets)


@pytest.mark.parametrize(("kind", "source", "target"), pairs, ids=str)
def test_a_move_is_in_the_table_or_raises(kind: type[StrEnum], source: Any, target: Any) -> None:
    if target in TABLES[kind][source]:
        states.check(source, target)
        return
    with pytest.raises(
        IllegalTransition, match=f"a {ENTITIES[kind]} that is {source} cannot become {target}"
    ) as caught:
        states.check(source, target)
    assert (caught.value.entity, caught.value.source, caught.value.target) == (ENTITIES[kind], source, target)


@given(st.sampled_from(pairs))
def test_sources_is_the_table_read_backwards(pair: tuple[type[StrEnum], Any, Any]) -> None:
    kind, source, target = pair
    assert (source in states.sources(target)) is (target in TABLES[kind][source])
    assert all(type(state) is str or isinstance(state, kind) for state in states.sources(target))


@every_machine
def test_no_state_stands_for_two_moves_to_itself(kind: type[StrEnum]) -> None:
    assert not [state for state, targets in TABLES[kind].items() if state in targets]


@every_machine
def test_every_state_can_be_reached(kind: type[StrEnum]) -> None:
    reached, pending = {START[kind]}, [START[kind]]
    while pending:
        fresh = TABLES[kind][pending.pop()] - reached
        reached |= fresh
        pending += fresh
    assert reached == set(kind)


def test_a_job_can_be_stopped_until_its_shards_have_ended() -> None:
    for state in set(JobState) - states.TERMINAL_JOB - {JobState.CANCELLING, JobState.FINALIZING}:
        states.check(state, JobState.CANCELLING)
    for ended in (JobState.CANCELLED, JobState.EXPIRED):
        assert states.sources(ended) == [JobState.CANCELLING]


def test_a_job_that_rests_goes_back_to_work_only() -> None:
    for state in states.TERMINAL_JOB:
        assert states.JOB[state] <= {JobState.QUEUED, JobState.VALIDATING}


def test_what_is_committed_stays() -> None:
    assert not states.SHARD[ShardState.COMMITTED]
    assert not states.ATTEMPT[AttemptState.SUCCEEDED]
    assert not states.REQUEST[RequestState.SUCCEEDED]
    assert states.sources(ShardState.COMMITTED) == [ShardState.RUNNING]


def test_open_shards_are_those_with_work_to_come() -> None:
    for state in ShardState:
        leads_on = ShardState.RUNNING in states.SHARD[state] or ShardState.COMMITTED in states.SHARD[state]
        assert (state in states.OPEN_SHARD) is leads_on


def test_every_state_is_documented() -> None:
    tree = ast.parse(Path(states.__file__).read_text())
    documented = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            for member, doc in zip(node.body, node.body[1:], strict=False):
                if isinstance(member, ast.Assign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
                    assert isinstance(member.targets[0], ast.Name)
                    documented.add(f"{node.name}.{member.targets[0].id}")
    expected = {f"{kind.__name__}.{state.name}" for kind in TABLES for state in kind}
    assert documented == expected
