"""Admission as plain logic, on a simulated clock: who waits as Retry-After says is not passed over (S12, S16)."""

import bisect
import heapq
import itertools
import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.serve.admission import MAX_REFUSALS, Admission, Place, Sender
from stages.serve.errors import ApiError


class Simulation:
    """A server with clients that ask for `size` completions, get them, and ask for the next.

    An obedient one comes again when Retry-After has passed, and up to `late` seconds later; another after 20 ms. `ports`: each
    client its own connection (own), each request a new one (new), or all in one program that takes any of its idle ones (pool),
    and says how often it has sent a request (counted).
    """

    def __init__(self, slots: int, queue: int, seconds: float, ports: str, late: float, seed: int) -> None:
        self.admission, self.slots, self.seconds, self.late = Admission(slots, queue), slots, seconds, late
        self.ports, self.rng = ports, random.Random(seed)
        self.running, self.next_port, self.idle = 0, itertools.count(1000), [*range(1, 1000)]
        self.waiting: list[tuple[int, float, int]] = []  # priority, arrival, size
        self.events: list[tuple[float, int, Any]] = []
        self.order = itertools.count()
        # when, first asked, size, obedient
        self.admitted: list[tuple[float, float, int, bool]] = []
        self.passed_over: dict[int, int] = {}  # by the most that one request of a size was

    def at(self, now: float, call: Any) -> None:
        heapq.heappush(self.events, (now, next(self.order), call))

    def client(
        self,
        size: int,
        obedient: bool,
        port: int = 0,
        first: float = 0.0,
        last: float = 0.0,
        passed: int = 0,
        tries: int = 0,
    ) -> Any:
        """Returns an ask of one request, first made at `first` and last at `last`, `tries` times;
        all 0 for a new one.
        """

        def ask(now: float) -> None:
            nonlocal port
            if self.ports != "own" or not port:
                port = (
                    self.idle[self.rng.randrange(4)]
                    if self.ports in ("pool", "counted")
                    else next(self.next_port)
                )
            begun = first or now
            since = bisect.bisect_right(self.admitted, (last, math.inf))
            overtaken = last > 0 and any(asked > begun for _, asked, *_ in self.admitted[since:])
            again: dict[str, Any] = {"size": size, "obedient": obedient, "port": port}
            try:
                counted = tries if self.ports == "counted" else None
                place = self.admission.reserve(Sender(port, ("127.0.0.1", "", size)), now, counted)
            except ApiError as error:
                assert self.admission.reserved >= self.slots  # no slot is empty for who is in line
                count = passed + overtaken
                if obedient:
                    self.passed_over[size] = max(count, self.passed_over.get(size, 0))
                wait = int(error.headers["Retry-After"]) + self.rng.random() * self.late if obedient else 0.02
                self.at(
                    now + wait,
                    self.client(first=begun, last=now, passed=count, tries=tries + obedient, **again),
                )
                return
            self.admitted.append((now, begun, size, obedient))
            heapq.heappush(self.waiting, (place, now, size))
            self.at(now, self.serve)
            self.at(now + self.seconds * 3, self.client(**again))

        return ask

    def serve(self, now: float) -> None:
        while self.waiting and self.running < self.slots:
            place, arrived, size = heapq.heappop(self.waiting)
            self.running += 1

            def end(later: float, place: Place = place, arrived: float = arrived) -> None:
                self.running -= 1
                self.admission.record(place, later - arrived)
                self.admission.release()
                self.serve(later)

            self.at(now + self.seconds * size * self.rng.uniform(0.5, 1.5), end)

    def run(self, seconds: float) -> None:
        while self.events and self.events[0][0] < seconds:
            now, _, call = heapq.heappop(self.events)
            call(now)
            assert 0 <= self.admission.reserved <= self.admission.limit


@pytest.mark.law("fairness")
@settings(max_examples=20)
@given(
    slots=st.integers(1, 4),
    queue=st.integers(1, 8),
    seconds=st.sampled_from([0.02, 0.1, 0.5]),
    impatient=st.integers(1, 12),
    sizes=st.sets(st.sampled_from([2, 3, 4, 8]), min_size=1),
    ports=st.sampled_from(["own", "new", "pool", "counted"]),
    late=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 99),
)
def test_who_waits_as_told_is_not_passed_over_twice(
    slots, queue, seconds, impatient, sizes, ports, late, seed
):
    simulation = Simulation(slots, queue, seconds, ports, late, seed)
    for _ in range(impatient):
        simulation.at(simulation.rng.random() * seconds, simulation.client(1, False))
    # even beside impatient ones of its own size
    sizes = sizes | ({1} if ports == "counted" else set())
    for size in sizes:
        simulation.at(0.5 + simulation.rng.random(), simulation.client(size, True))
    simulation.run(30)
    own = simulation.passed_over.pop(1, 0) if ports == "counted" else 0
    assert own <= 4
    assert max(simulation.passed_over.values(), default=0) <= 1 + (
        ports == "new"
    )  # where clients are not told apart
    assert {size for *_, size, obedient in simulation.admitted if obedient} == sizes


def refusal(admission: Admission, sender: Sender, now: float) -> int:
    """The seconds of Retry-After."""
    with pytest.raises(ApiError) as caught:
        admission.check(sender, now)
    return int(caught.value.headers["Retry-After"])


def sender(port: int, size: int = 1) -> Sender:
    return Sender(port, ("127.0.0.1", "", size))


def test_each_in_the_line_is_told_when_a_place_will_be_free_for_it():
    """In time for the requests ahead of it, and no more than `held` in a second."""
    admission = Admission(2, 4)
    places = [admission.reserve(sender(port), 0) for port in range(6)]
    assert [refusal(admission, sender(port, port), 0) for port in (10, 11, 12, 13, 14)] == [1, 1, 2, 2, 3]
    for _ in range(60):
        admission.record(places[-1], 18.0)  # seconds: one of six ends every three
    assert [refusal(admission, sender(port, port), 0) for port in (20, 21)] == [18, 21]


def test_after_a_burst_the_wait_is_that_of_the_queue():
    """40 requests come at once, and one ends each half second. Each of the last was alone at its end,
    which says nothing of how long the next will take."""
    admission = Admission(8, 32)
    for number, place in enumerate([admission.reserve(sender(port), 0) for port in range(40)], 1):
        admission.record(place, 0.5 * number)
        admission.release()
    for port in range(40):
        admission.reserve(sender(port), 20)
    assert [refusal(admission, sender(port, port), 20) for port in (50, 51, 52, 53)] == [1, 1, 1, 2]


def test_refusals_are_forgotten_and_bounded():
    admission = Admission(1, 1)
    for port in range(2):
        admission.reserve(sender(port), 0)
    for port in range(2 * MAX_REFUSALS):
        assert refusal(admission, sender(port, port), 0) <= 60
    assert len(admission.refusals) == MAX_REFUSALS
    refusal(admission, sender(1), 70)
    assert [*admission.refusals] == [sender(1)]


def test_who_comes_too_soon_takes_nobodys_place():
    admission, patient, hasty = Admission(2, 4), sender(10), sender(11)
    for port in range(6):
        admission.reserve(sender(port), 0)
    for each, now in ((patient, 0), (hasty, 0), (hasty, 0.1)):
        refusal(admission, each, now)
    admission.release()
    refusal(admission, hasty, 1.05)
    assert admission.reserve(patient, 1.1)
