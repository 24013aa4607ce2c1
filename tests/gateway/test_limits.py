"""The rate limit's rule and its shared buckets."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.limits import Budget, Decision, Limits, address_subject, gcra, rate_headers

SECOND = 1_000_000_000

budgets = st.builds(Budget, st.integers(1, 1000), st.integers(1, 120).map(lambda seconds: seconds * SECOND))
gaps = st.lists(st.integers(0, 10 * SECOND), max_size=200)


def run(budget: Budget, waits: list[int]) -> list[tuple[int, Decision]]:
    tat, now, made = 0, 5 * SECOND, []
    for wait in waits:
        now += wait
        tat, decision = gcra(tat, now, budget)
        made.append((now, decision))
    return made


@given(budgets, gaps)
def test_no_window_of_a_period_grants_more_than_burst_and_refill(budget: Budget, waits: list[int]) -> None:
    granted = [now for now, decision in run(budget, waits) if decision.is_granted]
    for index, start in enumerate(granted):
        within = sum(1 for now in granted[index:] if now < start + budget.step_ns * budget.limit)
        assert within <= 2 * budget.limit


@given(budgets, gaps)
def test_remaining_is_what_would_be_granted_now(budget: Budget, waits: list[int]) -> None:
    tat, now = 0, 5 * SECOND
    for wait in waits[:20]:
        now += wait
        tat, decision = gcra(tat, now, budget)
        copy, count = tat, 0
        while (step := gcra(copy, now, budget))[1].is_granted:
            copy, count = step[0], count + 1
        assert count == decision.remaining


@given(budgets, gaps)
def test_retry_after_is_exact(budget: Budget, waits: list[int]) -> None:
    tat, now = 0, 5 * SECOND
    for wait in waits:
        now += wait
        tat, decision = gcra(tat, now, budget)
        if not decision.is_granted:
            retry_ns = tat + budget.step_ns - now - budget.step_ns * budget.limit
            assert decision.retry_after_s == pytest.approx(retry_ns / SECOND)
            assert gcra(tat, now + retry_ns, budget)[1].is_granted
            assert not gcra(tat, now + retry_ns - 1, budget)[1].is_granted


@given(budgets, st.integers(0, 2**62), st.integers(0, 2**62))
def test_any_stored_number_recovers(budget: Budget, tat: int, now: int) -> None:
    """A clock that was set back must not lock anybody out for longer than a period."""
    later = now + budget.step_ns * budget.limit
    assert gcra(gcra(tat, now, budget)[0], later, budget)[1].is_granted


@pytest.mark.parametrize("limit", [1, 2, 300])
def test_exactly_the_limit_fits_at_once(limit: int) -> None:
    decisions = [decision for _, decision in run(Budget(limit), [0] * (limit + 1))]

    assert [decision.is_granted for decision in decisions] == [True] * limit + [False]
    assert [decision.remaining for decision in decisions] == [*range(limit - 1, -1, -1), 0]


def test_workers_share_a_bucket(tmp_path: Path) -> None:
    now = [5 * SECOND]
    # One process may open an environment once; two databases of numbers would not be shared, this one is.
    limits = Limits(tmp_path / "l", clock_ns=lambda: now[0])
    budget = Budget(2)
    assert [limits.take("workspace", "a", budget).is_granted for _ in range(3)] == [True, True, False]
    assert limits.take("workspace", "b", budget).is_granted
    assert limits.take("auth", "a", budget).is_granted
    now[0] += 30 * SECOND
    assert [limits.take("workspace", "a", budget).is_granted for _ in range(2)] == [True, False]
    limits.close()


def test_sweep_removes_full_buckets_only(tmp_path: Path) -> None:
    now = [5 * SECOND]
    limits = Limits(tmp_path / "l", clock_ns=lambda: now[0])
    for number in range(1500):
        limits.take("auth", str(number), Budget(1, 10 * SECOND))
    now[0] += 5 * SECOND
    for number in range(10):
        limits.take("auth", f"late {number}", Budget(1, 10 * SECOND))
    assert limits.sweep() == 0
    now[0] += 6 * SECOND

    assert limits.sweep() == 1500
    assert not limits.take("auth", "late 3", Budget(1, 10 * SECOND)).is_granted
    limits.close()


def test_headers_say_limit_remaining_and_unix_reset() -> None:
    headers = rate_headers(Decision(True, 300, 299, 0.2, 0.0), now=1000.0)

    assert headers == [("x-ratelimit-limit", "300"), ("x-ratelimit-remaining", "299"), ("x-ratelimit-reset", "1001")]


@pytest.mark.parametrize(
    ("address", "subject"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("", ""),
        ("unknown", "unknown"),
    ],
)
def test_addresses_of_one_client_share_a_bucket(address: str, subject: str) -> None:
    assert address_subject(address) == subject
