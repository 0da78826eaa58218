"""The pool of loaded engines: one load per key, leases, eviction, and what happens to a dead engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.engines import pool as pool_module
from pipeline.engines import registry
from pipeline.engines.base import Cancellation, EngineContext
from pipeline.engines.fake.engine import FakeEngine
from pipeline.engines.pool import EnginePool, LeaseCancelled
from pipeline.models.model import Model
from pipeline.models.resolve import resolve
from pipeline.spec.job_spec import Task
from storage.errors import InvalidJob, InvalidModel

MODEL = Model(name="fake", path=None, digest="d")
OTHER = replace(MODEL, digest="e")
THIRD = replace(MODEL, digest="f")


class Watched(FakeEngine):
    """A fake engine that writes down its life, and whose load a test can hold up or break."""

    log: list[tuple[str, str]] = []
    on_load: Callable[[Watched], None]

    def __init__(self, model: Model, *args: Any) -> None:
        super().__init__(model, *args)
        self.digest = model.digest

    def load(self) -> None:
        self.log.append(("load", self.digest))
        type(self).on_load(self)

    def close(self) -> None:
        self.log.append(("close", self.digest))


class Measured(Watched):
    """One whose size a test decides, by the model's digest."""

    sizes: dict[str, int] = {}

    def memory_bytes(self) -> int | None:
        return self.sizes.get(self.digest, 40)


class Sharing(Watched):
    """One instance generates and chats."""

    @classmethod
    def shared_tasks(cls) -> frozenset[Task]:
        return frozenset({Task.GENERATE, Task.CHAT})


class Restarting(Watched):
    """It has to be made anew when a test says so."""

    due = False

    def needs_restart(self) -> bool:
        return self.due


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    use(monkeypatch, Watched)
    Watched.log = []
    Watched.on_load = lambda self: None
    yield Watched.log


def use(monkeypatch: pytest.MonkeyPatch, kind: type[Watched]) -> None:
    monkeypatch.setattr(registry, "BUILT_IN", {"fake": f"{__name__}:{kind.__name__}"})


def pool(max_engines: int = 1) -> EnginePool:
    return EnginePool(EngineContext(Path("unused")), max_engines)


def lease(engines: EnginePool, model: Model = MODEL, **options: Any) -> Any:
    return engines.lease("fake", model, Task.GENERATE, options)


def test_an_engine_stays_warm(log: list[tuple[str, str]]) -> None:
    engines = pool()
    with lease(engines) as first:
        pass
    with lease(engines) as second:
        pass
    assert first is second
    assert log == [("load", "d")]


def test_a_model_that_changes_while_it_is_loaded(log: list[tuple[str, str]], tmp_path: Path) -> None:
    file = tmp_path / "model" / "config.json"
    file.parent.mkdir()
    file.write_text('{"architectures": ["LlamaForCausalLM"]}')
    planned = resolve(str(file.parent), tmp_path)
    Watched.on_load = lambda self: file.write_text('{"architectures": ["LlamaForCausalLM"], "hidden_size": 8}') and None
    engines = EnginePool(EngineContext(tmp_path), 1)
    with pytest.raises(InvalidModel, match="changed while it was loaded"), lease(engines, planned):
        raise AssertionError("its answers would be kept as those of the old one")
    assert log == [("load", planned.digest), ("close", planned.digest)]
    Watched.on_load = lambda self: None
    now = resolve(str(file.parent), tmp_path)
    assert now.digest != planned.digest
    with lease(engines, now):
        pass


def test_the_warm_keys_are_those_that_jobs_carry(log: list[tuple[str, str]]) -> None:
    engines = pool()
    assert engines.warm_keys() == ()
    with lease(engines, shuffle=True) as engine:
        assert engines.warm_keys() == (registry.engine_key("fake", MODEL, Task.GENERATE, {"shuffle": True}),)
        engines.discard(engine)
        assert engines.warm_keys() == ()


def test_a_load_is_amortised_after_ten_times_as_long(log: list[tuple[str, str]]) -> None:
    clock = [100.0]
    engines = EnginePool(EngineContext(Path("unused")), now=lambda: clock[0])

    def slow(_: Watched) -> None:
        assert len(engines.sticky_keys()) == 1
        clock[0] += 3.0

    Watched.on_load = slow
    with lease(engines):
        pass
    clock[0] += 29.0
    assert engines.sticky_keys() == engines.warm_keys()
    clock[0] += 2.0
    assert engines.sticky_keys() == ()
    assert len(engines.warm_keys()) == 1


def test_an_engine_that_asks_for_it_is_made_anew_once_nobody_uses_it(
    log: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Restarting)
    engines = pool()
    with lease(engines) as first, lease(engines) as again:
        assert again is first
    monkeypatch.setattr(Restarting, "due", True)
    with lease(engines) as user:
        with lease(engines) as other:
            assert user is other is first
        assert log == [("load", "d")], "it is in use"
    assert log == [("load", "d"), ("close", "d")]
    monkeypatch.setattr(Restarting, "due", False)
    with lease(engines) as new:
        assert new is not first


def test_two_shards_share_one_engine(log: list[tuple[str, str]]) -> None:
    engines = pool()
    with lease(engines) as first, lease(engines) as second:
        assert first is second
    assert log == [("load", "d")]


def test_two_threads_that_ask_at_once_share_one_load(log: list[tuple[str, str]]) -> None:
    engines, loading, go_on, entered = pool(), threading.Event(), threading.Event(), threading.Semaphore(0)

    def hold(self: Watched) -> None:
        loading.set()
        go_on.wait()

    Watched.on_load = hold

    def work() -> Any:
        entered.release()
        with lease(engines) as engine:
            return engine

    with ThreadPoolExecutor(4) as threads:
        found = [threads.submit(work) for _ in range(4)]
        loading.wait()
        for _ in range(4):
            entered.acquire()
        go_on.set()
        assert len({id(each.result()) for each in found}) == 1
    assert log == [("load", "d")]


def test_a_lease_that_is_cancelled_leaves_the_load_to_whoever_comes_next(log: list[tuple[str, str]]) -> None:
    engines, loading, go_on, stop = pool(), threading.Event(), threading.Event(), Cancellation()

    def hold(self: Watched) -> None:
        loading.set()
        go_on.wait()

    Watched.on_load = hold

    def work() -> None:
        with engines.lease("fake", MODEL, Task.GENERATE, {}, stop):
            pass

    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(work)
        loading.wait()
        stop.cancel("the worker is draining")
        with pytest.raises(LeaseCancelled, match="draining"):
            waiting.result(60)
        go_on.set()
    with lease(engines):
        pass
    assert log == [("load", "d")]


def test_another_key_waits_for_no_load(log: list[tuple[str, str]]) -> None:
    """One engine is loading in a thread; another one is leased meanwhile."""
    engines, loading, go_on = pool(2), threading.Event(), threading.Event()

    def hold(self: Watched) -> None:
        if self.digest == "d":
            loading.set()
            go_on.wait()

    Watched.on_load = hold

    def slow() -> None:
        with lease(engines):
            pass

    thread = threading.Thread(target=slow)
    thread.start()
    loading.wait()
    with lease(engines, OTHER):
        pass
    go_on.set()
    thread.join()


def test_the_one_used_longest_ago_goes_first_and_before_the_next_load(log: list[tuple[str, str]]) -> None:
    engines = pool(2)
    for model in (MODEL, OTHER, MODEL, THIRD):
        with lease(engines, model):
            pass
    assert log == [("load", "d"), ("load", "e"), ("close", "e"), ("load", "f")]
    assert [engine.digest for engine in engines.loaded()] == ["d", "f"]  # type: ignore[attr-defined]


def test_an_engine_in_use_is_never_closed(log: list[tuple[str, str]]) -> None:
    engines = pool(1)
    with lease(engines, MODEL):
        with lease(engines, OTHER):
            assert log == [("load", "d"), ("load", "e")]
        assert log[2:] == [("close", "e")], "back at its limit as soon as one is idle"
    with lease(engines, MODEL):
        pass
    assert len(log) == 3


def test_other_options_make_another_engine(log: list[tuple[str, str]]) -> None:
    engines = pool(2)
    with lease(engines) as first, lease(engines, delay_ms_per_batch=1) as second:
        assert first is not second


def test_a_dead_engine_is_closed_after_its_last_lease_and_rebuilt(log: list[tuple[str, str]]) -> None:
    engines = pool()
    with lease(engines) as dead:
        with lease(engines) as same:
            engines.discard(same)
        assert log == [("load", "d")], "still leased"
    assert log == [("load", "d"), ("close", "d")]
    with lease(engines) as fresh:
        assert fresh is not dead
    assert log[2:] == [("load", "d")]


def test_the_successor_waits_until_the_dead_one_is_gone(log: list[tuple[str, str]]) -> None:
    engines, asked = pool(), threading.Event()

    def next_lease() -> None:
        asked.set()
        with lease(engines):
            pass

    with lease(engines) as dead:
        engines.discard(dead)
        thread = threading.Thread(target=next_lease)
        thread.start()
        asked.wait()
    thread.join()
    assert log == [("load", "d"), ("close", "d"), ("load", "d")]


def test_an_engine_that_is_being_closed_is_not_closed_again(
    log: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, closing, go_on = pool(2), threading.Event(), threading.Event()

    def hold(self: Watched) -> None:
        log.append(("close", self.digest))
        if self.digest == "d":
            closing.set()
            go_on.wait()

    monkeypatch.setattr(Watched, "close", hold)

    def die() -> None:
        with lease(engines) as engine:
            engines.discard(engine)

    thread = threading.Thread(target=die)
    thread.start()
    closing.wait()
    with lease(engines, OTHER):
        pass
    engines.close()
    go_on.set()
    thread.join()
    assert log == [("load", "d"), ("close", "d"), ("load", "e"), ("close", "e")]


def test_discarding_a_stranger_does_nothing(log: list[tuple[str, str]]) -> None:
    engines = pool()
    with lease(engines):
        engines.discard(FakeEngine(MODEL, Task.GENERATE, {}, EngineContext(Path("x"))))
    assert log == [("load", "d")]


def test_a_failed_load_reaches_everybody_who_waited_and_the_next_one_tries_again(log: list[tuple[str, str]]) -> None:
    engines, loading, go_on, entered = pool(), threading.Event(), threading.Event(), threading.Semaphore(0)

    def fail(self: Watched) -> None:
        loading.set()
        go_on.wait()
        raise InvalidModel("broken")

    Watched.on_load = fail

    def work() -> None:
        entered.release()
        with lease(engines):
            pytest.fail("there is nothing to lease")

    with ThreadPoolExecutor(2) as threads:
        found = [threads.submit(work) for _ in range(2)]
        loading.wait()
        entered.acquire()
        entered.acquire()
        go_on.set()
        for each in found:
            with pytest.raises(InvalidModel, match="broken"):
                each.result()
    assert set(log) == {("load", "d"), ("close", "d")}
    assert log.count(("load", "d")) == log.count(("close", "d")), "what did not load is closed, too"
    Watched.on_load = lambda self: None
    with lease(engines):
        assert log[-1] == ("load", "d")


def test_errors_of_the_block_end_the_lease(log: list[tuple[str, str]]) -> None:
    engines = pool(1)
    with pytest.raises(ZeroDivisionError), lease(engines):
        raise ZeroDivisionError
    with lease(engines, OTHER):
        assert log == [("load", "d"), ("close", "d"), ("load", "e")]


def test_an_unknown_engine_is_refused(log: list[tuple[str, str]]) -> None:
    engines = pool()
    with pytest.raises(InvalidJob, match="no engine"), engines.lease("nope", MODEL, Task.GENERATE, {}):
        pass
    with pytest.raises(InvalidJob, match="unknown option"), lease(engines, nope=1):
        pass
    with lease(engines):
        pass
    assert log == [("load", "d")]


def test_close_closes_all_and_gives_no_more_leases(log: list[tuple[str, str]]) -> None:
    engines = pool(2)
    with lease(engines, MODEL), lease(engines, OTHER):
        engines.close()
        assert sorted(log[2:]) == [("close", "d"), ("close", "e")]
    engines.close()
    assert len(log) == 4, "each is closed once"
    with pytest.raises(RuntimeError, match="closed"), lease(engines):
        pass


def test_close_while_loading(log: list[tuple[str, str]]) -> None:
    engines, loading, go_on = pool(), threading.Event(), threading.Event()

    def hold(self: Watched) -> None:
        loading.set()
        go_on.wait()

    Watched.on_load = hold

    def work() -> None:
        with lease(engines):
            pytest.fail("the pool is closed")

    with ThreadPoolExecutor(1) as threads:
        found = threads.submit(work)
        loading.wait()
        engines.close()
        assert log == [("load", "d")]
        go_on.set()
        with pytest.raises(RuntimeError, match="closed"):
            found.result()
    assert log == [("load", "d"), ("close", "d")]


def test_an_engine_that_does_not_close_cleanly_is_gone_all_the_same(
    log: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: Watched) -> None:
        raise OSError("stuck")

    monkeypatch.setattr(Watched, "close", broken)
    engines = pool(1)
    for model in (MODEL, OTHER):
        with lease(engines, model):
            pass
    assert len(engines.loaded()) == 1
    assert "did not close cleanly" in caplog.text


def test_a_pool_of_none_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        pool(0)


def test_a_memory_budget_closes_idle_engines_longest_ago_first(
    log: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Measured)
    monkeypatch.setattr(Measured, "sizes", {"f": 100})
    monkeypatch.setattr(pool_module, "_resident", lambda: 0)
    engines = EnginePool(EngineContext(Path("unused")), 9, memory_bytes=90)
    for model in (MODEL, OTHER, MODEL):
        with lease(engines, model):
            pass
    assert log == [("load", "d"), ("load", "e")], "both fit"
    with lease(engines, OTHER), lease(engines, replace(MODEL, digest="g")):
        assert log[2:] == [("load", "g"), ("close", "d")], "only what is idle goes, after the size is known"
    assert log[4:] == []
    with lease(engines, THIRD):
        pass
    assert sorted(log[4:]) == [("close", "e"), ("close", "g"), ("load", "f")], "larger than the budget, and alone"
    assert [(item["key"], item["bytes"]) for item in engines.warm()] == [
        (registry.engine_key("fake", THIRD, Task.GENERATE, {}), 100)
    ]


def test_weights_on_disk_are_expected_in_memory_before_they_are_loaded(
    log: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(monkeypatch, Measured)
    monkeypatch.setattr(pool_module, "_resident", lambda: 0)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"0" * 60)
    engines = EnginePool(EngineContext(Path("unused")), 9, memory_bytes=90)
    with lease(engines):
        pass
    with lease(engines, replace(OTHER, weights=(weights,))):
        assert log == [("load", "d"), ("close", "d"), ("load", "e")], "room is made first"


def test_growth_of_the_process_counts_where_an_engine_cannot_tell(
    log: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = iter((100, 170))
    monkeypatch.setattr(pool_module, "_resident", lambda: next(resident))
    engines = pool()
    with lease(engines):
        assert [item["bytes"] for item in engines.warm()] == [70]


def test_tasks_that_share_an_instance_load_one(log: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    engines = pool(2)
    with engines.lease("fake", MODEL, Task.GENERATE, {}), engines.lease("fake", MODEL, Task.CHAT, {}):
        assert len(log) == 2, "the fake engine does not say that they share"
    use(monkeypatch, Sharing)
    engines = pool(2)
    with engines.lease("fake", MODEL, Task.GENERATE, {}) as one, engines.lease("fake", MODEL, Task.CHAT, {}) as other:
        assert one is other
    with engines.lease("fake", MODEL, Task.EMBED, {}) as third:
        assert third is not one
