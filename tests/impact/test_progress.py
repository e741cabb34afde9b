"""What is left of long work."""

import pytest

from local_elasticity.base.progress import Pace, duration


def test_a_training_with_looks_says_what_is_left():
    pace, clock = Pace(), 0.0
    for update in range(100):
        looked = 3.0 if update % 10 == 0 else 0.0
        clock += 0.1 + looked
        pace.add(clock, looked)
        if update < 10:
            assert pace.left(99 - update) is None  # one look says nothing of how many there will be
        else:
            rest = range(update + 1, 100)
            true = sum(0.1 + (3.0 if u % 10 == 0 else 0.0) for u in rest)
            assert pace.left(len(rest)) == pytest.approx(true, abs=3.5)


def test_a_training_without_looks_says_so_too():
    pace = Pace()
    for update in range(60):
        pace.add(0.5 * (update + 1))
    assert pace.left(10) == pytest.approx(5.0)
    assert duration(pace.left(10)) == "5.0 s"


def test_looks_that_are_known_are_counted():
    pace, clock = Pace(), 0.0
    for update, looked in enumerate((2.0, 2.0, 0.0, 2.0)):
        clock += 0.1 + looked
        pace.add(clock, looked)
        if update:
            assert pace.left(1000, looks=3) == pytest.approx(106.0)
