"""Engine: completes the prompts of many requests at once, by continuous batching.

    engine = Engine(cfg, params, EngineConfig(slots=8))
    engine.warm()
    engine.submit(Request(prompt, SamplingParams(max_tokens=100)))
    while engine.busy:
        for event in engine.step(): ...

The scheduler decides what a step does; `runner.ModelRunner` does it on the device. A completion
depends on its request alone, to the bit: chunks of prompts begin at fixed positions, rows that
decode do not see one another and have the same bits in a program of few rows and of all, and keys
come from the request's own seed and positions.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
import numpy as np

from engine.counting.request_flops import RequestFlops
from engine.errors import InvalidField, UserError
from engine.inference.config import EngineConfig
from engine.inference.meter import Meter
from engine.inference.prefix_cache import PrefixCache, chunk_key, root_key
from engine.inference.request import (
    Completion,
    Event,
    FinishReason,
    LogProb,
    Request,
    SamplingParams,
    check_request,
)
from engine.inference.runner import ModelRunner, SampledTokens, make_rows
from engine.inference.sampling import BITS, TokenMasks, make_token_masks
from engine.inference.scheduler import STEPS, Decode, Prefill, Scheduler, Sequence
from engine.inference.step_times import StepTimes
from engine.model.config import ModelConfig
from engine.model.paths import unflatten
from engine.model.transformer import Params
from engine.model.weights.blocks import has_only_blocks
from engine.model.weights.lora import LoRA

# A step copies at most this many chunks from the prefix cache.
HITS_AT_ONCE = 16
# A chunk, or what a cached prefix leaves of it, is computed in at most this many tails. More tails would take
# longer than the whole chunk.
MAX_TAILS = 2
# Rows that are not in use decode greedily, because that costs no sampling.
IDLE_SAMPLING = SamplingParams(temperature=0.0)


class Engine:
    """Completes the prompts of many requests at once: `submit` them, then `step` while `busy`.

    `params` are those of `prepare_params`, on the mesh of this thread if it has one. `waiting` and
    `running` count the requests without and with a slot. Raises UserError for a capacity that the
    model has no room for.
    """

    def __init__(self, cfg: ModelConfig, params: Params, config: EngineConfig) -> None:
        capacity = config.capacity
        if capacity is None:
            capacity = cfg.context
        if not 2 <= capacity <= cfg.context:
            raise UserError(
                f"capacity must be between 2 and the model's context of {cfg.context}, not {capacity}."
            )
        self.cfg = cfg
        self.capacity = capacity
        self.config = dataclasses.replace(config, capacity=capacity)
        self.rows = config.rows
        self.prefix_cache = PrefixCache(config.prefix_cache_bytes or 0)
        # Whether a chunk that is computed in tails has the bits of one computed at once. `warm` finds out.
        self.tails_are_exact = False
        # The number of rows of the smaller decoding program. It stays 0 unless `warm` finds that a row has
        # the same bits there.
        self.few_rows = 0
        # The decoding steps so far. A step decodes one token in every row.
        self.steps_decoded = 0
        self.step_times = StepTimes()
        # The kernels in C skip what pads a chunk in products with blocks.
        computes_padding = not (config.backend.in_c and has_only_blocks(params))
        self.meter = Meter(RequestFlops(cfg, config.adapter_rank), computes_padding)
        # The slots that may still hold an earlier text.
        self.used_slots: set[int] = set()
        self.runner = ModelRunner(cfg, params, self.config)
        self.scheduler = Scheduler(
            config.slots, config.speculate, self.rows, self.config.backend.shares_slots
        )

    @property
    def params(self) -> Params:
        return self.runner.params

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.prefilling or self.scheduler.decoding)

    @property
    def waiting(self) -> int:
        return len(self.scheduler.waiting)

    @property
    def running(self) -> int:
        return len(self.scheduler.prefilling) + len(self.scheduler.decoding)

    @property
    def devices(self) -> int:
        return self.runner.mesh.size if self.runner.mesh else 1

    @property
    def used_positions(self) -> int:
        prefilled = sum(sequence.prefilled_tokens for sequence in self.scheduler.prefilling)
        return prefilled + sum(sequence.position for sequence in self.scheduler.decoding)

    def submit(self, request: Request, priority: int = 0) -> int:
        """Queues a request and returns its id. Slots go to the lowest priority, among equal ones to
        the first that came.

        Raises InvalidField when the request cannot be served to its end.
        """
        check_request(request, self.cfg.vocab, self.capacity)
        if not 0 <= request.adapter_index <= self.config.adapters:
            raise InvalidField(
                "adapter", f"There are {self.config.adapters} adapters, and none at {request.adapter_index}."
            )
        return self.scheduler.submit(request, priority).id

    def queue_position(self, priority: int) -> int:
        """Returns the queue position of the requests with this priority: 1 is served next, 0 when
        none waits for a slot.
        """
        waiting = {sequence.priority for sequence in tuple(self.scheduler.waiting)}
        if priority not in waiting:
            return 0
        return sum(other <= priority for other in waiting)

    def prefill_progress(self, priority: int) -> tuple[int, int]:
        """Returns how many tokens of a prompt with this priority are prefilled, and of how many;
        zeros if none is under way.
        """
        for sequence in tuple(self.scheduler.prefilling):
            if sequence.priority == priority:
                return sequence.prefilled_tokens, len(sequence.request.prompt)
        return 0, 0

    def free_adapter_index(self, in_use: Collection[int]) -> int | None:
        """Returns an index of the stacks that is neither `in_use` nor a request's, waiting or
        running, or None.
        """
        unavailable = set(in_use)
        for sequence in (*self.scheduler.waiting, *self.scheduler.running):
            unavailable.add(sequence.request.adapter_index)
        for index in range(1, self.config.adapters + 1):
            if index not in unavailable:
                return index
        return None

    def cancel(self, id: int) -> bool:
        return self.scheduler.cancel(id)

    def step(self) -> list[Event]:
        """Admits waiting requests, then prefills or decodes a few tokens for all, alternately.
        Returns the events: new tokens, and requests that finished.
        """
        self.meter.begin_step()
        with jax.set_mesh(self.runner.mesh):
            events = self._step()
        self.step_times.end()
        self.meter.end_step()
        return events

    def _step(self) -> list[Event]:
        self.step_times.begin("schedule")
        for sequence in self.scheduler.admit():
            request = sequence.request
            adapter_digest = ""
            if request.adapter:
                adapter_digest = request.adapter.digest
            sequence.prefix_key = root_key(request.namespace, adapter_digest)
            if sequence.slot in self.used_slots and self.config.backend.clears_slots:
                self.step_times.begin("clear_slot")
                self.runner.clear(sequence.slot, sequence.max_positions)
            self.used_slots.add(sequence.slot)
            if request.sampling.adjusts_logits:
                self.runner.set_counts(sequence.slot, request.prompt, request.sampling.logit_bias)
        match self.scheduler.schedule():
            case Prefill(sequence) if sequence.request.embed:
                return self._embed(sequence)
            case Prefill(sequence):
                prefilled = self._prefill(sequence)
                jax.block_until_ready(self.runner.segments)
                self.meter.share(prefilled, "prompt")
            case Decode() as batch:
                return self._decode(batch)
        return []

    def warm(
        self, report: Callable[[int, int], None] | None = None, ahead: Iterable[tuple[str, int]] = ()
    ) -> None:
        """Compiles every program and runs each; nothing is compiled after that. Compares bits to
        set `tails_are_exact` and `few_rows`.

        `ahead`, `report`: see `ModelRunner.warm`. Raises ValueError while there are requests.
        """
        if self.busy:
            raise ValueError("warm is for an engine without requests")
        has_tails = self.prefix_cache.limit > 0 and self.config.chunk % self.config.tail == 0
        to_run_later: tuple[str, ...] = ()
        if has_tails:
            # `_compare_tails` runs these.
            to_run_later = ("prefill_chunk", "prefill_tail", "read_chunk")
        self.runner.warm(report, ahead, to_run_later)
        with jax.set_mesh(self.runner.mesh):
            self.tails_are_exact = has_tails and self._compare_tails()
            few_rows = self.config.backend.few_rows(self.rows, self.params)
            if few_rows and self._rows_are_exact(few_rows):
                self.few_rows = few_rows

    def _compare_tails(self) -> bool:
        """Returns whether a chunk computed at once and in tails has the same bits, under an adapter
        where there may be one.
        """
        chunk = self.config.chunk
        tail = self.config.tail
        tokens = np.random.default_rng(0).integers(self.cfg.vocab, size=(1, chunk), dtype=np.int32)
        results = []
        stacks = self.runner.stacks
        adapter = 0
        if self.config.adapters > 0:
            adapter = 1
            self.runner.put_adapter(adapter, self.random_adapter())
        self.used_slots.add(0)
        for size in (chunk, tail):
            for start in range(0, chunk, size):
                self.runner.prefill(tokens[:, start : start + size], 0, start, adapter)
            computed = jax.device_get(self.runner.read(0, 0, chunk))
            results.append([leaf.tobytes() for leaf in jax.tree.leaves(computed)])
        self.runner.stacks = stacks
        return results[0] == results[1]

    def _rows_are_exact(self, few_rows: int) -> bool:
        """Returns whether a row has the same bits in the decoding programs of few rows and of all."""
        results = []
        for R in (few_rows, self.rows):
            position: Any = np.full(R, -1, np.int32)
            position[0] = 0
            rows = make_rows(position, np.zeros_like(position), self.config.slots)
            masks = make_token_masks(R, self.cfg.vocab)
            sampling = [SamplingParams(seed=1)] * R
            sampled = self.runner.decode(
                np.zeros_like(position), rows, sampling, masks, STEPS, True, np.zeros_like(position)
            )
            results.append([(sampled.token[step, 0], sampled.logprob[step, 0]) for step in range(STEPS)])
        return results[0] == results[1]

    def random_adapter(self) -> Params:
        rng = np.random.default_rng(0)
        rank = self.config.adapter_rank
        leaves: dict[str, Any] = {}
        for layer in range(self.cfg.layers):
            for name, (rows, columns) in self.cfg.matrices.items():
                a: Any = rng.standard_normal((rows, rank), np.float32)
                b: Any = rng.standard_normal((rank, columns), np.float32)
                leaves[f"blocks/{layer}/{name}"] = LoRA(None, a, b, 1 / rows)
        return unflatten(leaves)

    def _prefill(self, sequence: Sequence) -> dict[Sequence, int]:
        """Copies a prompt's chunks from the prefix cache until one is missing, and computes that one,
        or a tail of it: at most HITS_AT_ONCE in all. Returns how many tokens it prefilled of each
        prompt.

        If the cache holds all of the prompt, chunks of other prompts are copied too, and none is
        computed.
        """
        first = sequence
        prefilled: dict[Sequence, int] = {}
        for _ in range(HITS_AT_ONCE):
            tokens, done = sequence.chunk(self.config.chunk)
            # Only a chunk of which nothing is prefilled yet is looked up, so a hit is its first tokens.
            cached = 0
            if done == 0:
                cached = self._copy_cached(sequence, tokens)
            if not cached and sequence is not first:
                break
            prefilled.setdefault(sequence, 0)
            if not cached:
                prefilled[sequence] += self._compute(sequence, tokens, done)
                break
            prefilled[sequence] += cached
            if cached == len(tokens):
                sequence.prefix_key = chunk_key(sequence.prefix_key, tokens)
            self.scheduler.record_prefill(sequence, cached)
            if not self.scheduler.prefilling:
                break
            if not sequence.to_prefill:
                sequence = self.scheduler.shortest_prompt
                if sequence.request.embed:
                    break
        return prefilled

    def _embed(self, sequence: Sequence) -> list[Event]:
        """Computes one chunk of a text whose embedding is asked for, without the prefix cache:
        every token's state counts.
        """
        tokens = sequence.chunk(self.config.chunk)[0]
        summed = self._prefill_part(sequence, tokens, self.config.chunk)
        sequence.hidden_sum = sequence.hidden_sum + jax.device_get(summed)[0]
        self.meter.share({sequence: len(tokens)}, "prompt")
        self.scheduler.record_prefill(sequence, len(tokens))
        if sequence.to_prefill:
            return []
        self.scheduler.finish(sequence)
        embedding = sequence.hidden_sum / len(sequence.request.prompt)
        reason: FinishReason = "error"
        if np.isfinite(embedding).all():
            reason = "length"
        seconds = sequence.prompt_seconds
        return [Event(sequence.id, [], reason, embedding=embedding, prompt_seconds=seconds)]

    def _copy_cached(self, sequence: Sequence, tokens: tuple[int, ...]) -> int:
        """Copies the next chunk of a prompt, or the chunk's beginning, from the prefix cache. Returns
        how many tokens it copied: 0 for a miss.
        """
        for count in (len(tokens), *self._prefix_lengths(tokens)[:MAX_TAILS]):
            chunk = self.prefix_cache.get(chunk_key(sequence.prefix_key, tokens[:count]))
            if chunk is not None:
                self.step_times.begin("write_chunk")
                self.runner.write(chunk, sequence.slot, sequence.prefilled_tokens, count)
                sequence.cached_tokens += count
                return count
        return 0

    def _compute(self, sequence: Sequence, tokens: tuple[int, ...], done: int) -> int:
        """Computes a prompt's next chunk, which has these tokens, at once. If `done` of them are
        prefilled already, or if they fit into MAX_TAILS tails, computes a tail instead. Returns how
        many tokens it computed.

        The prefix cache gets the chunk when the last of its tokens is computed.
        """
        tail = self.config.tail
        tails = min(MAX_TAILS, self.config.chunk // tail)
        size = self.config.chunk
        if done > 0 or len(tokens) <= tails * tail:
            size = tail
        part = tokens[done : done + size]
        self._prefill_part(sequence, part, size)
        if done + len(part) == len(tokens):
            if self.prefix_cache.limit:
                start = sequence.prefilled_tokens - done
                self._cache(sequence, tokens, start)
            sequence.prefix_key = chunk_key(sequence.prefix_key, tokens)
        self.scheduler.record_prefill(sequence, len(part))
        return len(part)

    def _prefill_part(self, sequence: Sequence, tokens: tuple[int, ...], size: int) -> Any:
        """Prefills a prompt's next tokens by the program for `size` of them. Returns as
        `ModelRunner.prefill`.
        """
        padded: Any = np.full((1, size), -1, np.int32)
        padded[0, : len(tokens)] = tokens
        self.meter.count_prefill(sequence, len(tokens), size)
        program = "prefill_chunk"
        if size < self.config.chunk:
            program = "prefill_tail"
        self.step_times.begin(program)
        return self.runner.prefill(
            padded, sequence.slot, sequence.prefilled_tokens, sequence.request.adapter_index
        )

    def _cache(self, sequence: Sequence, tokens: tuple[int, ...], start: int) -> None:
        """Puts a prompt's chunk of these tokens, which begins at position `start`, into the prefix
        cache, to be found by its beginnings too.
        """
        size = self.config.chunk
        if len(tokens) <= self.config.tail:
            size = self.config.tail
        chunk = self.runner.read(sequence.slot, start, size)
        key = chunk_key(sequence.prefix_key, tokens)
        parent = None
        if start > 0:
            parent = sequence.prefix_key
        # A NaN spoils the tokens before it in its chunk too, because 0 times NaN is NaN. A prompt that has
        # only the chunk's beginning must not find them.
        prefix_keys: list[bytes] = []
        lengths = self._prefix_lengths(tokens)
        if lengths and self._is_finite(chunk, len(tokens)):
            prefix_keys = [chunk_key(sequence.prefix_key, tokens[:length]) for length in lengths]
        self.prefix_cache.put(key, chunk, parent, prefix_keys)

    def _is_finite(self, chunk: Any, count: int) -> bool:
        """Returns whether keys and values of a chunk's first `count` tokens are finite in the last
        layer, which a NaN of any layer reaches.
        """
        L = self.cfg.layers
        for leaf in jax.tree.leaves(chunk):
            # (2 L, K, length, ...): the keys of L layers, then the values of L layers
            layers = np.asarray(leaf)
            keys = layers[L - 1]
            values = layers[2 * L - 1]
            for last_layer in (keys, values):
                if not np.isfinite(last_layer[:, :count]).all():
                    return False
        return True

    def _prefix_lengths(self, tokens: tuple[int, ...]) -> range:
        """Returns the counts of a chunk's first tokens after which tails may follow, the most first."""
        if not self.tails_are_exact:
            return range(0)
        tail = self.config.tail
        return range((len(tokens) - 1) // tail * tail, 0, -tail)

    def _decode(self, batch: Decode) -> list[Event]:
        sequences = batch.sequences
        if batch.copies_are_new:
            self.used_slots.update(batch.copies)
            self.step_times.begin("copy_slot")
            self.runner.copy(sequences[0].slot, batch.copies, sequences[0].max_positions)
        R = self.rows
        program = "decode"
        if len(batch.rows) <= self.few_rows:
            R = self.few_rows
            batch = batch.renumbered()
            program = "decode_few"
        token: Any = np.zeros(R, np.int32)
        position: Any = np.full(R, -1, np.int32)
        slot: Any = np.minimum(np.arange(R, dtype=np.int32), self.config.slots - 1)
        sampling = [IDLE_SAMPLING] * R
        adapters = np.zeros(R, np.int32)
        for row in batch.rows:
            token[row.row] = row.token
            position[row.row] = row.position
            slot[row.row] = row.slot
            sampling[row.row] = row.sequence.request.sampling
            adapters[row.row] = row.sequence.request.adapter_index
        rows = make_rows(position, slot, self.config.slots, batch.draft_writes)
        logprobs = any(sequence.request.sampling.logprobs is not None for sequence in sequences)
        masks = self._masks(batch, R)
        self.step_times.begin(program, batch.steps)
        sampled = self.runner.decode(token, rows, sampling, masks, batch.steps, logprobs, adapters)
        self.steps_decoded += batch.steps
        self.meter.share(Counter(row.sequence for row in batch.rows), "completion")
        self.meter.count_idle_rows((R - len(batch.rows)) * batch.steps)
        events = []
        for sequence in sequences:
            event = self._event(sequence, batch, sampled)
            if event.tokens or event.finish_reason:
                events.append(event)
        return events

    def _masks(self, batch: Decode, R: int) -> TokenMasks:
        """Returns the tokens that each of R rows may sample: by its grammar, and no stop token
        before its `min_tokens`.
        """
        masks = make_token_masks(R, self.cfg.vocab)
        for sequence in batch.sequences:
            rows = batch.rows_of(sequence)
            if sequence.constraint:
                sequence.constraint.fill(masks.allowed, rows, batch.drafts_of(sequence))
                masks.steps[rows] = 1
            for row in rows[: sequence.stopless_tokens]:
                if sequence.constraint:
                    # The grammar's mask, which is for one token, as filled above.
                    allowed = masks.allowed[row].copy()
                    steps = 1
                else:
                    # Nothing has filled this row: it is all zeros, and inverted it allows every token.
                    allowed = ~masks.allowed[row]
                    steps = STEPS
                for token in sequence.request.sampling.stop_token_ids:
                    allowed[token // BITS] &= ~np.uint32(1 << token % BITS)
                # Where the grammar allows nothing but stop tokens, the text ends before `min_tokens`.
                if allowed.any():
                    masks.allowed[row] = allowed
                    masks.steps[row] = steps
        return masks

    def _event(self, sequence: Sequence, batch: Decode, sampled: SampledTokens) -> Event:
        """Returns the event of a sequence after a dispatch, and takes it out if it has ended."""
        samples = []  # (step, row) of each token, in order
        values: list[int | None] = []
        for row in batch.rows_of(sequence):
            for step in range(batch.steps):
                samples.append((step, row))
                value = None
                if sampled.finite[step, row]:
                    value = int(sampled.token[step, row])
                values.append(value)
        start = sequence.position
        tokens, reason = sequence.accept(values, batch.drafts_of(sequence))
        kept = len(tokens)
        if sequence.stop_token is not None:
            kept += 1  # it ended the text, and so it was wanted
        self.meter.count_decode(sequence, start, kept, len(values))
        logprobs: list[LogProb] = []
        count = sequence.request.sampling.logprobs
        if count is not None:
            logprobs = [_log_prob(sampled, sample, count) for sample in samples[: len(tokens)]]
        if reason:
            self.scheduler.finish(sequence)
        return Event(
            id=sequence.id,
            tokens=tokens,
            finish_reason=reason,
            logprobs=logprobs,
            cached_tokens=sequence.cached_tokens,
            stop_token=sequence.stop_token,
            prompt_seconds=sequence.prompt_seconds,
            completion_seconds=sequence.completion_seconds,
        )


def _log_prob(sampled: SampledTokens, sample: tuple[int, int], count: int) -> LogProb:
    """Returns the log-probability of a sample, (step, row), and of the `count` most probable tokens."""
    top_tokens = sampled.top_tokens[sample][:count].tolist()
    top_logprobs = sampled.top_logprobs[sample][:count].tolist()
    return LogProb(
        token=int(sampled.token[sample]),
        logprob=float(sampled.logprob[sample]),
        top=tuple(zip(top_tokens, top_logprobs)),
    )


def complete(
    cfg: ModelConfig,
    params: Params,
    prompts: Iterable[Collection[int]],
    sampling: Iterable[SamplingParams],
    capacity: int | None = None,
    report: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """Completes each prompt, in at most `capacity` tokens together with it, by an engine of its
    own.

    `report`: completions that have ended, and all.
    """
    prompt_tokens = [tuple(prompt) for prompt in prompts]
    engine = Engine(cfg, params, EngineConfig.for_prompts(cfg, prompt_tokens, capacity))
    tokens: dict[int, list[int]] = {}
    last_events: dict[int, Event] = {}
    for prompt, options in zip(prompt_tokens, sampling, strict=True):
        request = Request(prompt, options.within(engine.capacity - len(prompt)))
        id = engine.submit(request)
        tokens[id] = []
    while engine.busy:
        if report:
            ended = sum(event.finish_reason is not None for event in last_events.values())
            report(ended, len(prompt_tokens))
        for event in engine.step():
            tokens[event.id] += event.tokens
            last_events[event.id] = event
    completions = []
    for id, completion_tokens in tokens.items():
        last = last_events[id]
        completions.append(Completion(completion_tokens, last.finish_reason, last.stop_token))
    return completions
