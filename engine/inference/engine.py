"""Engine: generates completions for many requests at once, by continuous batching.

    engine = Engine(cfg, params, slots=8)
    engine.warm()
    engine.submit(Request(prompt, SamplingParams(max_tokens=100)))
    while engine.busy:
        for event in engine.step(): ...

The scheduler decides what a step does; this file does it on the device. A request is preempted only while it is held, see
`Engine.warm`. A completion depends on its request alone, to the bit: chunks of prompts begin at fixed positions, all rows
decode in one program and do not see one another, and keys come from the request's own seed and positions.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, get_args

import jax
import numpy as np

from engine.errors import UserError
from engine.inference.prefix_cache import PrefixCache, chunk_key, root_key
from engine.inference.request import Event, LogProb, Request, SamplingParams, check_request
from engine.inference.runner import ModelRunner, SampledTokens, SlotShapes, copy_slot, decode_slots, make_rows
from engine.inference.sampling import count_prompt, penalty_arrays, sampling_arrays, set_token_counts
from engine.inference.scheduler import DRAFT_ROWS, Decode, Prefill, Scheduler
from engine.inference.sequence import Sequence
from engine.model.cache.segmented import KVDtype
from engine.model.config import ModelConfig
from engine.model.transformer import Params

CHUNK, TAIL = 128, 32  # prompt tokens a call: of a whole chunk, and of a short rest
SHORT = 512  # positions of a text for which there are programs of their own
HITS_AT_ONCE = 16  # chunks that a step copies from the prefix cache at most
MAX_TAILS = 2  # computed after a cached beginning to complete its chunk: more take longer than the whole chunk
IDLE = SamplingParams(temperature=0.0)  # of rows not in use: greedy decoding costs no sampling


def compile_ahead(
    cfg: ModelConfig, params: Any, *, slots: int, capacity: int, kv_dtype: KVDtype, prefix_cache_bytes: int,
    chunk: int = CHUNK, tail: int = TAIL, short: int = SHORT,
) -> Iterator[tuple[str, int]]:  # fmt: skip
    """Compiles the programs of `Engine` with these options for short texts, as it is iterated.

    Of `params` only the shapes are read. To be iterated while weights load; programs left out are compiled when needed.
    """
    return SlotShapes(slots, capacity, kv_dtype, chunk, tail, short, prefix_cache_bytes > 0).compile_ahead(cfg, params)


class Engine:
    """Generates completions for many requests at once: `submit` them, then `step` while `busy`.

    `params` are those of `decode.prepare_params`, placed on the mesh of this thread if it has one, which then holds the KV
    cache too. `slots`: requests at once. `capacity`: tokens of prompt and completion
    together, by default the model's context. `kv_dtype`: of the KV cache. `prefix_cache_bytes`: 0 for none. `speculate`:
    whether a lone sequence checks draft tokens in idle rows. `short`: positions of a text
    for which there are programs of their own, see `ModelRunner`. Completions depend on the model, `kv_dtype` and the shapes of
    programs (`slots`, `capacity`, `chunk`, `tail`) alone.
    """

    def __init__(
        self, cfg: ModelConfig, params: Params, *, slots: int = 8, capacity: int | None = None, kv_dtype: KVDtype = "bfloat16",
        prefix_cache_bytes: int = 0, speculate: bool = True, chunk: int = CHUNK, tail: int = TAIL,
        short: int = SHORT,
    ) -> None:  # fmt: skip
        capacity = cfg.context if capacity is None else capacity
        if slots < 1:
            raise UserError(f"There must be at least one slot, not {slots}.")
        if not 2 <= capacity <= cfg.context:
            raise UserError(f"capacity must be between 2 and the model's context of {cfg.context}, not {capacity}.")
        if not 0 < tail <= chunk:
            raise UserError(f"The tail must lie between 1 and the chunk of {chunk}, not {tail}.")
        if prefix_cache_bytes < 0:
            raise UserError(f"prefix_cache_bytes must be 0 (no prefix cache) or more, not {prefix_cache_bytes}.")
        if kv_dtype not in get_args(KVDtype):
            raise UserError(f"kv_dtype must be one of {', '.join(get_args(KVDtype))}, not {kv_dtype!r}.")
        self.cfg, self.slots, self.capacity, self.kv_dtype, self.chunk, self.tail = cfg, slots, capacity, kv_dtype, chunk, tail
        self.scheduler = Scheduler(slots, speculate)
        self.prefix_cache = PrefixCache(prefix_cache_bytes)
        self.tails_agree = False  # whether a chunk computed in tails has the bits of one computed at once; `warm` finds out
        self.decode_steps = 0  # so far, each of all rows at once
        shapes = SlotShapes(slots, capacity, kv_dtype, chunk, tail, short, prefix_cache_bytes > 0)
        self.runner = ModelRunner(cfg, params, shapes)

    @property
    def params(self) -> Params:
        """The weights on the device."""
        return self.runner.params

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.waiting or self.running)

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self.scheduler.waiting)

    @property
    def running(self) -> int:
        """Requests with a slot."""
        return len(self.scheduler.running)

    @property
    def devices(self) -> int:
        """Devices that the weights and the KV cache are spread over."""
        return self.runner.mesh.size if self.runner.mesh else 1

    @property
    def used_positions(self) -> int:
        """Positions of the KV cache in use, of `slots` times `capacity`."""
        return sum(s.prefilled_tokens if s.to_prefill else s.position for s in self.scheduler.running)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache, in use or not."""
        return self.runner.cache_bytes

    def submit(self, request: Request, ticket: int = 0) -> int:
        """Queues a request and returns its id. Slots go to the lowest ticket, among equal ones to the first that came.

        Raises InvalidField when the request cannot be served to its end.
        """
        check_request(request, self.cfg.vocab, self.capacity)
        return self.scheduler.submit(request, ticket).id

    def place(self, ticket: int) -> int:
        """Returns the place in the queue of the requests with this ticket: 1 is served next, 0 when none waits for a slot.

        Those in `held_tickets` wait for something else.
        """
        waiting = {sequence.ticket for sequence in tuple(self.scheduler.waiting)} - self.held_tickets
        return sum(other <= ticket for other in waiting) if ticket in waiting else 0

    @property
    def held_tickets(self) -> set[int]:
        """Tickets of requests that wait for the programs for longer texts, see `warm`."""
        scheduler = self.scheduler
        return {sequence.ticket for sequence in (*scheduler.waiting, *scheduler.running) if scheduler.is_held(sequence)}

    def cancel(self, id: int) -> bool:
        """Drops a request, without an event. False when there is none of that id."""
        return self.scheduler.cancel(id)

    def step(self) -> list[Event]:
        """Admits waiting requests, then prefills a chunk of one prompt or decodes a few tokens for all, in turns.

        Returns when the device is done, and at once while all are held, see `warm`.
        """
        with jax.set_mesh(self.runner.mesh):
            return self._step()

    def _step(self) -> list[Event]:
        for sequence in self.scheduler.admit():
            request = sequence.request
            sequence.prefix_key = root_key(request.namespace)
            if request.sampling.adjusts_logits:
                counts = count_prompt(request.prompt, request.sampling.logit_bias, self.cfg.vocab)
                self.runner.counts = set_token_counts(self.runner.counts, np.int32(sequence.slot), *counts)
        match self.scheduler.schedule():
            case Prefill(sequence):
                self._prefill(sequence)
                jax.block_until_ready(self.runner.segments)
            case Decode() as batch:
                return self._decode(batch)
        return []

    def warm(
        self,
        report: Callable[[int, int], None] | None = None,
        ahead: Iterable[tuple[str, int]] = (),
        *,
        long_programs: bool = True,
    ) -> None:
        """Compiles every program and runs each once with no row in use; then nothing is compiled any more. Sets `tails_agree`.

        `ahead` and `report`, of the programs for short texts, as `ModelRunner.warm` has them. Those for longer ones can be left
        to `load_long_programs`: texts that get so long are held until then, without a slot if others want it. Raises
        ValueError while there are requests.
        """
        if self.busy:
            raise ValueError("warm is for slots without requests")
        has_tails = self.prefix_cache.limit > 0 and self.chunk % self.tail == 0
        compared = [f"prefill_chunk {self.chunk}", f"prefill_chunk {self.tail}", f"read_chunk {self.chunk}"]
        self.runner.warm(report, ahead, compared if has_tails else [])
        with jax.set_mesh(self.runner.mesh):
            self.tails_agree = has_tails and self._compare_tails()
        if long_programs:
            self.load_long_programs()
        else:
            self.scheduler.limit = self.runner.limit

    def load_long_programs(self) -> None:
        """Loads the programs for longer texts, compiled by `runner.compile_long_programs` or now: no text is held then."""
        self.runner.load_long_programs()
        self.scheduler.limit = sys.maxsize

    def _compare_tails(self) -> bool:
        """Computes a chunk at once and in tails, in a free slot, and returns whether the bits are the same."""
        tokens = np.random.default_rng(0).integers(self.cfg.vocab, size=(1, self.chunk), dtype=np.int32)
        results = []
        for size in (self.chunk, self.tail):
            for at in range(0, self.chunk, size):
                part = tokens[:, at : at + size]
                self.runner.prefill(part, 0, at, self.chunk)
            chunk = jax.device_get(self.runner.read(0, 0, self.chunk, self.chunk))
            results.append([leaf.tobytes() for leaf in jax.tree.leaves(chunk)])
        return results[0] == results[1]

    def _clean(self, sequence: Sequence, stop: int) -> bool:
        """Clears what other texts left in a sequence's slot, as far as a call on positions below `stop` sees it.

        Returns whether there was anything to clear.
        """
        if min(stop, self.runner.positions) <= sequence.clean_positions:
            return False
        sequence.clean_positions = self.runner.clear(sequence.slot, sequence.clean_positions, stop, sequence.reach)
        return True

    def _prefill(self, sequence: Sequence) -> None:
        """Computes one chunk of a prompt, or a tail, after copying up to HITS_AT_ONCE from the prefix cache."""
        for _ in range(HITS_AT_ONCE):
            tokens, done = sequence.chunk(self.chunk)
            stop = sequence.prefilled_tokens - done + self.chunk
            self._clean(sequence, stop)
            cached = 0 if done else self._copy_cached(sequence, tokens, stop)
            count = cached or self._compute(sequence, tokens, done, stop)
            if done + count == len(tokens):
                if not cached and self.prefix_cache.limit:
                    self._cache(sequence, tokens, stop)
                sequence.prefix_key = chunk_key(sequence.prefix_key, tokens)
            self.scheduler.record_prefill(sequence, count)
            if not cached or not sequence.to_prefill:
                return

    def _copy_cached(self, sequence: Sequence, tokens: tuple[int, ...], stop: int) -> int:
        """Copies the next chunk of a prompt, or its beginning, from the prefix cache; returns how many tokens that are.

        `stop`: where the chunk ends, here and below.
        """
        for count in (len(tokens), *self._beginnings(tokens)[:MAX_TAILS]):
            chunk = self.prefix_cache.get(chunk_key(sequence.prefix_key, tokens[:count]))
            if chunk is not None:
                self.runner.write(chunk, sequence.slot, sequence.prefilled_tokens, count, stop)
                sequence.cached_tokens += count
                return count
        return 0

    def _compute(self, sequence: Sequence, tokens: tuple[int, ...], done: int, stop: int) -> int:
        """Computes the next chunk of a prompt, or a tail of one that is begun; returns how many tokens that are."""
        size = self.tail if done or len(tokens) <= self.tail else self.chunk
        part = tokens[done : done + size]
        padded: Any = np.zeros((1, size), np.int32)
        padded[0, : len(part)] = part
        self.runner.prefill(padded, sequence.slot, sequence.prefilled_tokens, stop)
        return len(part)

    def _cache(self, sequence: Sequence, tokens: tuple[int, ...], stop: int) -> None:
        """Puts the chunk that has just been computed into the prefix cache."""
        start = stop - self.chunk
        size = self.tail if len(tokens) <= self.tail else self.chunk
        chunk = self.runner.read(sequence.slot, start, size, stop)
        counts: Iterable[int] = self._beginnings(tokens)
        # A NaN spoils the tokens before it in its chunk too, for 0 times NaN is NaN; and from any layer it reaches the last.
        last = [np.asarray(leaf)[[self.cfg.layers - 1, -1]] for leaf in jax.tree.leaves(chunk)] if counts else []
        if not all(np.isfinite(part).all() for part in last):
            counts = ()
        keys = [chunk_key(sequence.prefix_key, tokens[:count]) for count in (len(tokens), *counts)]
        self.prefix_cache.put(keys[0], chunk, sequence.prefix_key if start else None, keys[1:])

    def _beginnings(self, tokens: tuple[int, ...]) -> range:
        """Returns the counts of a chunk's first tokens after which tails may follow, the most first."""
        return range((len(tokens) - 1) // self.tail * self.tail if self.tails_agree else 0, 0, -self.tail)

    def _decode(self, batch: Decode) -> list[Event]:
        """Decodes a batch in one dispatch, in which row r stands for slot r."""
        R, lone = self.runner.segments.slots, batch.sequences[0]
        were_cleared = [self._clean(row.sequence, row.position + batch.steps) for row in batch.rows]
        is_to_copy = batch.copies and (batch.copies_are_new or any(were_cleared))
        stop = max(row.position for row in batch.rows) + batch.steps
        segments = self.runner.segments_below(max(stop, lone.clean_positions) if is_to_copy else stop)
        if is_to_copy:
            targets = np.array([*batch.copies, *[R] * (DRAFT_ROWS - len(batch.copies))], np.int32)
            segments = copy_slot(segments, np.int32(lone.slot), targets, np.int32(lone.reach))
        token: Any = np.zeros(R, np.int32)
        position: Any = np.full(R, -1, np.int32)
        sampling = [IDLE] * R
        for row in batch.rows:
            token[row.slot], position[row.slot], sampling[row.slot] = row.token, row.position, row.sequence.request.sampling
        rows = make_rows(position, batch.draft_writes)
        wants_logprobs = any(sequence.request.sampling.logprobs is not None for sequence in batch.sequences)
        sampled, segments, self.runner.counts = decode_slots(
            self.cfg, self.params, segments, self.runner.counts, token, rows,
            sampling_arrays(sampling), penalty_arrays(sampling), np.int32(batch.steps), np.bool_(wants_logprobs),
        )  # fmt: skip
        self.runner.store(segments)
        self.decode_steps += batch.steps
        # As NumPy arrays: indexing a JAX array would compile a program.
        fetched = jax.device_get(sampled if wants_logprobs else sampled[:2])
        sampled = sampled._replace(**dict(zip(sampled._fields, fetched)))
        events = (self._event(sequence, batch, sampled) for sequence in batch.sequences)
        return [event for event in events if event.tokens or event.finish_reason]

    def _event(self, sequence: Sequence, batch: Decode, sampled: SampledTokens) -> Event:
        """Appends to a sequence the tokens sampled for it, as far as they count."""
        rows = [row.slot for row in batch.rows if row.sequence is sequence]
        places = [(step, row) for row in rows for step in range(batch.steps)]
        values = (int(sampled.token[place]) if sampled.finite[place] else None for place in places)
        tokens, reason = sequence.accept(values, batch.drafts)
        repeated = min(len(tokens), sequence.to_repeat)
        sequence.to_repeat -= repeated
        count = sequence.request.sampling.logprobs
        logprobs = []
        for place in places[repeated : len(tokens)] if count is not None else ():
            top = (array[place][:count].tolist() for array in (sampled.top_tokens, sampled.top_logprobs))
            logprobs.append(LogProb(int(sampled.token[place]), float(sampled.logprob[place]), tuple(zip(*top))))
        if reason:
            self.scheduler.finish(sequence)
        return Event(sequence.id, tokens[repeated:], reason, logprobs, sequence.cached_tokens)
