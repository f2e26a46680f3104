"""Runs the real engine on a device made of lists, under a schedule that a seed draws: arrivals, cancellations, programs that
come late, adapters that come and go. What a request gets must be what it gets alone.

A key/value of the fake device is a number made of its token, its adapter, its position and all
keys/values before it in the slot, so that one that is missing, stale or in another's place changes
every token that follows; a token of `POISON` makes it NaN, which spoils all texts that see it. An
adapter is a number.
"""

import collections
import dataclasses
import itertools
import random
from typing import Any

import numpy as np
import pytest

from engine.counting.request_flops import RequestFlops
from engine.inference import engine as engine_module
from engine.inference.backend import ByXla, InC
from engine.inference.config import EngineConfig
from engine.inference.engine import Engine
from engine.inference.request import MAX_LOGPROBS, Adapter, Event, Request, SamplingParams
from engine.inference.runner import SampledTokens
from engine.inference.scheduler import DRAFT_ROWS, STEPS
from engine.model.config import ModelConfig

VOCAB, CAPACITY, CHUNK, TAIL = 7, 64, 8, 4
POISON = VOCAB - 1
CFG = ModelConfig(VOCAB, 8, 1, 1, 8, CAPACITY)
EMPTY, NAN = 0, -1
FLOPS = RequestFlops(CFG, EngineConfig(backend=ByXla()).adapter_rank)
MOST_STEPS = 600  # of a schedule after its last arrival
TOP: Any = np.zeros(
    (STEPS, 8 + DRAFT_ROWS, min(MAX_LOGPROBS, VOCAB)), np.float32
)  # nobody looks at the most probable tokens

WARMED: dict[Any, Any] = {}


def key_value(token: int, position: int, before: list[int], adapter: int) -> int:
    """Returns the number in the KV cache of a token; 24 bits, which a float32 holds."""
    seen = before[:position]
    return NAN if token == POISON or NAN in seen else 1 + hash((token, position, adapter, *seen)) % 2**24


def next_token(
    token: int, position: int, seen: list[int], request: SamplingParams, counts: list[int], allowed: int = -1
) -> int:
    """Returns what is sampled after a token, a bit of `allowed`: most often by it alone, so that
    texts repeat and drafts are right.
    """
    drawn = hash((*seen[: position + 1], request.seed, position)) % 40
    if request.adjusts_logits:
        drawn = hash((drawn, tuple(counts))) % 40
    first = drawn % VOCAB if drawn < 9 else (3 * token + 1) % POISON
    if allowed >> first & 1:
        return first
    return next((other for n in range(VOCAB) if allowed >> (other := (first + n) % VOCAB) & 1), 0)


def logprob_of(token: int, seen: list[int]) -> float:
    return -float(hash((token, *seen)) % 97)


class FakeConstraint:
    """What `Constraint` is to an engine: by the tokens so far it allows one token, two or all, and has an end."""

    failed, can_run_ahead = False, True

    def __init__(self, seed: int, tokens: tuple[int, ...] = ()) -> None:
        self.seed, self.tokens = seed, tokens

    def begin(self) -> "FakeConstraint":
        return FakeConstraint(self.seed)

    def allowed(self, drafts: Any = ()) -> set[int]:
        drawn = hash((self.seed, *self.tokens, *drafts)) % 1000
        return [{drawn % POISON}, {drawn % POISON, (drawn + 2) % POISON}, {*range(POISON)}][drawn // 10 % 3]

    def fill(self, masks: Any, rows: Any, drafts: Any) -> None:
        for n, row in enumerate(rows):
            masks[row] = sum(1 << token for token in self.allowed(drafts[:n]))

    def allowed_drafts(self, drafts: Any, count: int) -> list[int]:
        forced = list[int]()
        while len(forced) < count and len(allowed := self.allowed(forced)) == 1:
            forced += allowed
        good = itertools.takewhile(lambda n: drafts[n] in self.allowed(drafts[:n]), range(len(drafts or ())))
        return forced or [drafts[n] for n in good]

    def allows(self, token: int) -> bool:
        return token in self.allowed()

    def accept(self, token: int) -> str | None:
        assert token in self.allowed(), "a token that the grammar forbids"
        self.tokens = (*self.tokens, token)
        return "stop" if len(self.tokens) > 3 and hash(self.tokens) % 9 == 0 else None


class FakeRunner:
    """What `ModelRunner` is to an engine, in Python: its KV cache is a list for each slot."""

    mesh, cache_bytes = None, 0

    def __init__(self, cfg: ModelConfig, params: Any, config: EngineConfig) -> None:
        self.params, self.config, self.in_c = params, config, config.backend.in_c
        self.segments, self.edges = None, config.edges
        self.positions = self.edges[-1]
        self.cache = [[EMPTY] * self.positions for _ in range(config.slots)]
        self.counts = [[0] * VOCAB for _ in range(config.rows)]
        self.stacks = [0] * (1 + config.adapters)
        # What the programs have computed: FLOPs of tokens, and rows of prompts that hold none.
        self.flops, self.padding = 0, 0

    def put_adapter(self, index: int, adapter: Any) -> None:
        self.stacks = [*self.stacks[:index], adapter, *self.stacks[index + 1 :]]

    def warm(self, *_: Any) -> None:
        pass

    def prefill(self, tokens: Any, slot: int, start: int, adapter: int) -> None:
        assert start + tokens.shape[1] <= self.positions
        for position, token in enumerate(tokens[0].tolist(), start):
            if token >= 0:
                self.flops += FLOPS.prefilled(position, position + 1, adapter > 0)
            else:
                self.padding += 1
            self.cache[slot][position] = key_value(token, position, self.cache[slot], self.stacks[adapter])

    def write(self, chunk: Any, slot: int, start: int, count: int) -> None:
        assert start + count <= self.positions
        self.cache[slot][start : start + count] = [
            NAN if np.isnan(x) else int(x) for x in chunk[0, 0, :count]
        ]

    def read(self, slot: int, start: int, size: int) -> Any:
        assert start + size <= self.positions
        part = np.array(self.cache[slot][start : start + size], np.float32)
        return np.where(part == NAN, np.nan, part)[None, None].repeat(2 * CFG.layers, 0)

    def clear(self, slot: int, max_positions: int) -> None:
        assert not self.in_c, "a text that nothing reads is cleared"
        end = self._end(max_positions)
        self.cache[slot][:end] = [EMPTY] * end

    def _end(self, max_positions: int) -> int:
        """Returns where the last segment ends that begins below `max_positions`."""
        return min(edge for edge in self.edges if edge >= min(self.positions, max_positions))

    def copy(self, slot: int, targets: Any, max_positions: int) -> None:
        end = self._end(max_positions)
        for target in targets:
            self.cache[target][:end] = self.cache[slot][:end]

    def set_counts(self, slot: int, prompt: Any, logit_bias: Any) -> None:
        self.counts[slot] = counts_of(prompt, logit_bias)

    def decode(
        self, token: Any, rows: Any, sampling: Any, masks: Any, steps: int, logprobs: bool, adapters: Any
    ) -> SampledTokens:
        sampled = SampledTokens(
            {}, {}, {}, TOP, TOP
        )  # dictionaries by step and row, which are faster than arrays
        current, own, positions = token.tolist(), rows.slot.tolist(), rows.position.tolist()
        R, slots, allowed, masked = (
            len(current),
            self.config.slots,
            masks.allowed[:, 0].tolist(),
            masks.steps.tolist(),
        )
        assert self.in_c or own == [min(row, slots - 1) for row in range(R)]
        targets: list[list[int]] = [[] for _ in range(R)]
        for source, target in zip(rows.source.tolist(), rows.target.tolist()):
            if target < slots:
                targets[source].append(target)
        active = sorted((position, row) for row, position in enumerate(positions) if position >= 0)
        self.flops += FLOPS.idle_decoded((R - len(active)) * steps)
        for step in range(steps):
            for first, row in active:
                position = first + step
                self.flops += FLOPS.decoded(position, position + 1, bool(adapters[row]))
                if (position := first + step) < self.positions:
                    value = key_value(
                        current[row], position, self.cache[own[row]], self.stacks[adapters[row]]
                    )
                    for target in targets[row]:
                        self.cache[target][position] = value
            for first, row in active:
                position, text, counts = first + step, self.cache[own[row]], self.counts[own[row]]
                # Without the kernel what lies behind in a segment is multiplied by 0, and NaN stays
                # NaN.
                reached = position + 1 if self.in_c else self._end(position + 1)
                mask = allowed[row] % 2**VOCAB if masked[row] > step else -1
                current[row] = next_token(current[row], position, text, sampling[row], counts, mask)
                sampled.token[step, row], sampled.finite[step, row] = current[row], NAN not in text[:reached]
                if logprobs:
                    sampled.logprob[step, row] = logprob_of(current[row], text[: position + 1])
                counts[current[row]] += 1
        return sampled


class FakeEngine(Engine):
    """The real engine, warmed once for all with such options, and without a mesh: both take longer than steps."""

    step = vars(Engine)["_step"]

    def warm(self, *_: Any) -> None:
        key = (
            self.config.tail,
            self.config.adapters > 0,
            self.prefix_cache.limit > 0,
            self.runner.in_c,
            self.rows,
        )
        if key not in WARMED:
            super().warm()
            WARMED[key] = self.used_slots, self.runner.cache[0], self.tails_are_exact, self.few_rows
        used, text, self.tails_are_exact, self.few_rows = WARMED[key]
        self.used_slots, self.runner.cache[0] = {*used}, [*text]

    def random_adapter(self) -> Any:
        return 9


def counts_of(prompt: Any, logit_bias: Any) -> list[int]:
    return [prompt.count(token) * 100 + int(logit_bias.get(token, 0)) for token in range(VOCAB)]


def alone(request: Request) -> tuple[list[int], str | None]:
    """Returns the tokens of a request and its finish reason, from the formulas, without an engine."""
    sampling, text, output = request.sampling, list[int](), list[int]()
    counts = counts_of(request.prompt, sampling.logit_bias)
    constraint: Any = request.constraint and request.constraint.begin()
    adapter = int(request.adapter.digest) if request.adapter else 0
    for position, token in enumerate(request.prompt):
        text.append(key_value(token, position, text, adapter))
    while True:
        if NAN in text:
            return output, "error"
        allowed = sum(1 << token for token in constraint.allowed()) if constraint else -1
        if len(output) < sampling.min_tokens:
            allowed = allowed & ~sum(1 << token for token in sampling.stop_token_ids) or allowed
        token = next_token(token, len(text) - 1, text, sampling, counts, allowed)
        counts[token] += 1
        if token in sampling.stop_token_ids:
            return output, "stop"
        output.append(token)
        if constraint and constraint.accept(token):
            return output, "stop"
        if len(output) == sampling.max_tokens:
            return output, "length"
        text.append(key_value(token, len(text), text, adapter))


def draw_request(rng: random.Random) -> Request:
    """Draws a request: few beginnings, so that prompts share them, and few namespaces."""
    beginning = random.Random(rng.randrange(3)).choices(range(POISON), k=40)
    prompt = [*beginning[: rng.randrange(1, 40)], *rng.choices(range(POISON), k=rng.randrange(3))]
    if rng.random() < 0.1:
        prompt[rng.randrange(len(prompt))] = POISON
    most = rng.randint(1, min(20, CAPACITY - len(prompt)))
    sampling = SamplingParams(
        max_tokens=most,
        temperature=rng.choice([0.0, 1.0]),
        seed=rng.randrange(3),
        presence_penalty=float(rng.random() < 0.2),
        logit_bias={2: 5.0} if rng.random() < 0.1 else {},
        stop_token_ids=(rng.randrange(POISON),) if rng.random() < 0.3 else (),
        min_tokens=rng.choice([0, 0, most // 2, most]),
        logprobs=1 if rng.random() < 0.1 else None,
    )
    constraint: Any = FakeConstraint(rng.randrange(5)) if rng.random() < 0.3 else None
    return Request(tuple(prompt), sampling, rng.choice(["", "", "a", "b"]), constraint)


def make_engine(rng: random.Random) -> Engine:
    """Makes an engine on a fake device, its options drawn; its programs for longer texts may come
    later.
    """
    slots, chunk_bytes = rng.randint(1, 5), 2 * CFG.layers * CHUNK * 4
    config = EngineConfig(
        slots,
        CAPACITY,
        prefix_cache_bytes=rng.choice([0, 2, 40]) * chunk_bytes,
        speculate=rng.random() < 0.7,
        chunk=CHUNK,
        tail=rng.choice([TAIL, CHUNK]),
        adapters=rng.choice([0, 0, 1, 2]),
        backend=InC() if rng.random() < 0.5 else ByXla(),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "ModelRunner", FakeRunner)
        engine = FakeEngine(CFG, {}, config)
    engine.warm()
    engine.runner.flops = engine.runner.padding = 0
    return engine


def bill_of(request: Request, output: int, event: Event) -> int:
    """Returns the FLOPs of a request by its tokens alone, at its last event."""
    last, is_adapted = len(request.prompt) - 1, request.adapter is not None
    decoded = output + (event.stop_token is not None)
    prefilled = FLOPS.prefilled(event.cached_tokens, last, is_adapted)
    return prefilled + FLOPS.decoded(last, last + decoded, is_adapted)


def check_meter(engine: Engine, bills: list[int], seconds: float, nobody_left: bool) -> None:
    """What the programs have computed is what the meter says, and what requests are billed, no more
    where all were answered; and so are the seconds.
    """
    meter, runner = engine.meter, engine.runner
    idle = FLOPS.idle_prefilled(runner.padding, False) if not runner.in_c else 0
    assert meter.request_flops + meter.dropped_flops + meter.idle_flops == runner.flops + idle
    assert sum(bills) == meter.request_flops if nobody_left else sum(bills) <= meter.request_flops
    if nobody_left:
        assert seconds == pytest.approx(meter.seconds), "the seconds of requests are not the engine's"


def simulate(seed: int) -> None:
    """Runs the schedule of a seed to its end. Raises AssertionError where a promise is broken."""
    rng = random.Random(seed)
    engine = make_engine(rng)
    config = engine.config
    requests = [draw_request(rng) for _ in range(rng.randint(1, 9))]
    due = sorted(rng.randrange(60) for _ in requests)
    ids, cancelled, output, reasons = {}, set[int](), {}, {}
    bills, seconds = list[int](), 0.0
    namespaces, adapters = collections.Counter[Any](), list[Adapter]()
    space = lambda request: (request.namespace, request.adapter and request.adapter.digest)
    clock = 0
    while due or engine.busy:
        assert clock < 60 + MOST_STEPS, "a request is never finished"
        while due and due[0] <= clock:
            due.pop(0)
            request = dataclasses.replace(requests[len(ids)], adapter=rng.choice([None, *adapters]))
            namespaces[space(request)] += 1
            ids[engine.submit(request, rng.randrange(3))] = request
        if ids and rng.random() < 0.03:
            id = rng.choice([*ids])
            if engine.cancel(id):
                cancelled.add(id)
        if (
            config.adapters and rng.random() < 0.2
        ):  # one goes, and one of few numbers comes, which has been there before
            if adapters and rng.random() < 0.7:
                adapters.pop(rng.randrange(len(adapters)))
            if index := engine.free_adapter_index([adapter.index for adapter in adapters]):
                adapters.append(Adapter(str(number := rng.randint(1, 3)), index))
                engine.runner.put_adapter(index, number)
        for event in engine.step():
            assert event.id not in {*cancelled, *reasons}, "an event after the end"
            output[event.id] = output.get(event.id, []) + event.tokens
            if event.finish_reason:
                reasons[event.id] = event.finish_reason
                bills.append(bill_of(ids[event.id], len(output[event.id]), event))
                seconds += event.prompt_seconds + event.completion_seconds
                assert namespaces[space(ids[event.id])] > 1 or not event.cached_tokens, (
                    "the prefix cache gave a prompt of another namespace or adapter"
                )
        check_slots(engine)
        clock += 1
    check_meter(engine, bills, seconds, nobody_left=not cancelled)
    for id, request in ids.items():
        if id not in cancelled:
            assert (output.get(id, []), reasons.get(id)) == alone(request), (
                f"request {id} is not what it is alone"
            )


def check_slots(engine: Engine) -> None:
    scheduler = engine.scheduler
    owned = [sequence.slot for sequence in scheduler.running]
    assert sorted([*owned, *scheduler.free, *scheduler.copies]) == list(range(scheduler.slots)), (
        "a slot has two owners, or none"
    )
    assert not scheduler.copies or len(owned) == 1
    if scheduler.waiting:
        waiting = [sequence.order for sequence in scheduler.waiting]
        assert waiting == sorted(waiting)
    assert engine.prefix_cache.bytes <= engine.prefix_cache.limit
