import pytest

from local_elasticity.base.errors import InputError
from local_elasticity.training import at, budget, every, log_spaced
from local_elasticity.training.schedule import Moment


def moment(call=0, in_epoch=None, elapsed=0.0, measuring=0.0, cost=1.0):
    return Moment(call, call if in_epoch is None else in_epoch, elapsed, measuring, lambda: cost)


def updates(schedule, total):
    """Updates made at each look: call 0 comes after update 1."""
    return [call + 1 for call in range(total) if schedule.due(moment(call))]


def test_every_nine_looks_after_updates_1_10_19():
    assert updates(every(9), 25) == [1, 10, 19]
    assert updates(every(1), 4) == [1, 2, 3, 4]


def test_every_per_epoch_counts_within_the_epoch():
    schedule = every(9, per="epoch")
    looks = [call for call in range(22) if schedule.due(moment(call, in_epoch=call % 11))]
    assert looks == [0, 9, 11, 20]


@pytest.mark.parametrize(("n", "total"), [(1, 1), (1, 50), (2, 2), (7, 7), (5, 6), (10, 1000), (40, 60), (3, 10**6)])
def test_log_spaced_gives_exactly_n_looks_with_the_first_and_the_last(n, total):
    calls = sorted(log_spaced(n, total).calls)
    assert len(calls) == n
    assert all(0 <= call < total for call in calls)
    assert calls[0] == 0
    if n > 1:
        assert calls[-1] == total - 1
    if (n, total) == (10, 1000):
        assert calls == [update - 1 for update in (1, 2, 5, 10, 22, 46, 100, 215, 464, 1000)]


def test_at_looks_at_these_calls_only():
    assert updates(at([0, 3, 3, 7]), 10) == [1, 4, 8]
    assert updates(at([]), 10) == []


def test_a_union_looks_when_either_does_and_asks_both():
    asked = []

    class Counting(type(every(1)).__mro__[1]):
        def due(self, moment):
            asked.append(moment.call)
            return False

    assert updates(every(9) | at([4]), 12) == [1, 5, 10]
    assert updates(every(1) | Counting(), 3) == [1, 2, 3]
    assert asked == [0, 1, 2]


def test_budget_allows_a_look_as_soon_as_it_keeps_the_fraction():
    quarter = budget(0.25)
    assert not quarter.due(moment(elapsed=2.9, cost=1.0))  # 1 / 3.9 > 1/4
    assert quarter.due(moment(elapsed=3.0, cost=1.0))  # 1 / 4 = 1/4
    assert not quarter.due(moment(elapsed=6.9, measuring=1.0, cost=1.0))
    assert quarter.due(moment(elapsed=7.0, measuring=1.0, cost=1.0))


def test_budget_does_not_pay_for_an_estimate_when_it_is_already_over():
    def never():
        raise AssertionError("no estimate is needed")

    assert not budget(0.1).due(Moment(5, 5, 10.0, 1.1, never))


def test_a_simulated_run_keeps_within_its_budget():
    schedule, clock, measuring, looks = budget(0.2), 0.0, 0.0, 0
    for call in range(1000):
        clock += 0.05  # training
        if schedule.due(Moment(call, call, clock, measuring, lambda: 0.4)):
            clock, measuring, looks = clock + 0.4, measuring + 0.4, looks + 1
        assert measuring <= 0.2 * clock + 1e-9
    assert looks == pytest.approx(0.25 * 50 / 0.4, abs=1)  # a fifth of all time = a quarter of training's time


@pytest.mark.parametrize(
    "make",
    [
        lambda: every(0),
        lambda: every(-3),
        lambda: every(2.5),
        lambda: every(9, per="batch"),
        lambda: log_spaced(0, 10),
        lambda: log_spaced(11, 10),
        lambda: at([3, -1]),
        lambda: budget(0),
        lambda: budget(1),
        lambda: budget(float("nan")),
    ],
)
def test_impossible_schedules_are_refused(make):
    with pytest.raises(InputError, match=r"^expected .*; got .*; .+"):
        make()
