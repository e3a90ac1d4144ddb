from __future__ import annotations

import time

import pytest

from signlattice.errors import InputError
from signlattice.evaluation.timing import WARM_UP, Times, side_by_side


def test_side_by_side_takes_turns_in_varying_order():
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = side_by_side(calls, rounds=40, flush=64)
    timed = order[3 * WARM_UP :]
    rounds = [timed[i : i + 3] for i in range(0, len(timed), 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) == 6
    assert {name: len(taken.seconds) for name, taken in times.items()} == dict.fromkeys("abc", 40)


def test_side_by_side_times_longer_what_takes_longer():
    times = side_by_side({"short": lambda: None, "long": lambda: time.sleep(0.01)}, rounds=3)
    assert times["long"].median >= 0.01
    assert times["short"].speed_up_over(times["long"]).value > 1


def test_speed_up_over_is_taken_round_by_round():
    # a disturbance that doubles one round of both leaves the ratio of that round as it is
    ours, theirs = Times((1.0, 2.0, 1.0)), Times((3.0, 6.0, 3.0))
    ratio = ours.speed_up_over(theirs)
    assert (ratio.low, ratio.value, ratio.high, ratio.n) == (3.0, 3.0, 3.0, 3)


def test_quartiles_are_those_of_the_rounds():
    spread = Times((1.0, 2.0, 3.0, 4.0, 5.0)).quartiles
    assert spread.columns("s") == {"s": 3.0, "s_low": 2.0, "s_high": 4.0}


def test_side_by_side_calls_progress_after_every_round():
    ticks = []
    side_by_side({"a": lambda: None}, rounds=4, progress=lambda: ticks.append(1))
    assert len(ticks) == 4


@pytest.mark.parametrize(("contenders", "rounds"), [({}, 1), ({"a": lambda: None}, 0)])
def test_side_by_side_refuses_to_time_nothing(contenders, rounds):
    with pytest.raises(InputError, match="contenders"):
        side_by_side(contenders, rounds=rounds)
