"""Slots: many requests at once through programs of one shape, each as if it were alone.

    slots = Slots(cfg, params, slots=8)
    slots.warm()
    slots.submit(Request(prompt, SamplingParams(max_tokens=100)))
    while slots.busy:
        for event in slots.step(): ...

A request waits until a slot is free; from then on it has all the memory it can come to need. Its prompt is read chunk by
chunk, one chunk of one prompt a step, so that a long prompt holds up neither those who are being answered nor short
prompts behind it. All who have been read draw their next tokens together. What a request is answered depends on itself
alone, to the bit: chunks begin at fixed positions, everybody draws in one program whose rows do not see one another, and
keys come from a request's own seed and positions.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, get_args

import jax
import numpy as np

from engine.errors import UserError
from engine.inference import programs
from engine.inference.prefix_cache import Key, Prefixes, first_key, next_key
from engine.inference.programs import STEPS
from engine.inference.request import Event, Finish, LogProb, Request, check
from engine.inference.sampling import sampling_arrays
from engine.inference.sampling_params import SamplingParams
from engine.inference.speculation import Guesser
from engine.model.cache.segmented import Kind, Rows, make_spans
from engine.model.config import ModelConfig
from engine.model.transformer import Params

CHUNK, TAIL = 128, 32  # prompt tokens a call: whole chunks, and a shorter program for a last part that fits it
AT_ONCE = 16  # chunks that are found computed and put back in one step
AT_A_TIME, LEAST = 32, 4  # slots times tokens of a dispatch, about, and its tokens at least: who leaves waits for its end
FEW = 2  # tokens a dispatch while somebody's prompt is being read
PATIENCE = 4  # every so many chunks, one goes to who has waited longest and not to who needs least
GROUP = 4  # rows that a lone stream may use, its own and three for guesses
IDLE = SamplingParams(temperature=0.0)  # of rows that nobody uses: greedy, so that they ask for no draw
MIN_SLOTS = 2  # a product with a single row takes a different and slower path on a CPU


@dataclasses.dataclass
class _Stream:
    """A request under way: its slot, what of its prompt has been read, and what has been drawn."""

    id: int
    request: Request
    slot: int
    key: Key
    guesser: Guesser | None = None
    read: int = 0
    cached: int = 0
    said: list[int] = dataclasses.field(default_factory=list)

    @property
    def unread(self) -> int:
        """Tokens of the prompt to read. The last one is not read but drawn from, with everybody's."""
        return len(self.request.prompt) - 1 - self.read

    @property
    def token(self) -> int:
        """The last token, which has not been through the model yet."""
        return self.said[-1] if self.said else self.request.prompt[-1]

    @property
    def position(self) -> int:
        """Where that token stands."""
        return len(self.request.prompt) - 1 + len(self.said)

    @property
    def left(self) -> int:
        return self.request.sampling.max_tokens - len(self.said)

    @property
    def reach(self) -> int:
        """How many positions it may come to hold, the surplus of a last dispatch among them."""
        return len(self.request.prompt) + self.request.sampling.max_tokens + STEPS


def compile_ahead(
    cfg: ModelConfig, params: Any, *, slots: int, capacity: int, kind: Kind, prefixes: int, chunk: int = CHUNK, tail: int = TAIL
) -> Iterator[tuple[str, int]]:
    """Compiles what `Slots.warm` of the same options will ask for, from the shapes of `params` alone, as it is iterated.

    For while weights are read. A program that turns out to be another one is compiled when it is wanted, as without this.
    """
    room = lambda: (make_spans(cfg, slots, capacity, chunk, kind), programs.make_tally(cfg, slots))
    held = programs.described((params, *jax.eval_shape(room)))
    return programs.compiled(cfg, *held, chunks={chunk, tail}, kept=chunk if prefixes else None, group=GROUP)


class Slots:
    """The state of all requests to one model. `params` as `decode.for_inference` lays them out; they are only read.

    `slots`: requests answered at once, which is fixed because a program's shape may touch its bits. `capacity`: tokens
    of prompt and completion together, by default the model's context. `kind`: what keys and values are kept as.
    `prefixes`: bytes of computed chunks to keep for prompts that begin alike; 0 keeps none. `guesses`: whether a lone
    stream uses idle rows to be faster. What is answered depends on the model, on `kind` and on the shapes of programs
    (`slots`, `capacity`, `chunk`, `tail`); not on `prefixes`, not on `guesses`, and on no other request.
    """

    def __init__(
        self, cfg: ModelConfig, params: Params, *, slots: int = 8, capacity: int | None = None, kind: Kind = "bfloat16",
        prefixes: int = 0, guesses: bool = True, chunk: int = CHUNK, tail: int = TAIL,
    ) -> None:  # fmt: skip
        capacity = cfg.context if capacity is None else capacity
        if slots < MIN_SLOTS:
            raise UserError(f"There must be at least {MIN_SLOTS} slots, not {slots}: with one row a program is slower.")
        if not 2 <= capacity <= cfg.context:
            raise UserError(f"The capacity must lie between 2 and the model's context of {cfg.context}, not {capacity}.")
        if not 0 < tail <= chunk:
            raise UserError(f"The tail must lie between 1 and the chunk of {chunk}, not {tail}.")
        if prefixes < 0:
            raise UserError(f"The bytes for prefixes must be 0 (none are kept) or more, not {prefixes}.")
        if kind not in get_args(Kind):
            raise UserError(f"kind must be one of {', '.join(get_args(Kind))}, not {kind!r}.")
        self.cfg, self.capacity = cfg, capacity
        self.slots, self.chunk, self.tail, self.guesses = slots, chunk, tail, guesses
        self.prefixes = Prefixes(prefixes)
        self.waiting: deque[tuple[int, Request]] = deque()
        # All on a device that is said: a program is compiled once more for what comes from one that is not.
        held = params, make_spans(cfg, slots, capacity, chunk, kind), programs.make_tally(cfg, slots)
        self.params, self._spans, self._tally = jax.device_put(held, jax.devices()[0])
        self._free = list(range(slots))
        self._reading: list[_Stream] = []
        self._drawing: list[_Stream] = []
        self._mirrors: list[int] = []  # slots that hold the lone stream's text once more
        self._count = self._turns = 0
        self._has_read = False  # whether the last step read, so that the next one draws

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self._reading or self._drawing)

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return len(self._reading) + len(self._drawing)

    @property
    def held(self) -> int:
        """Positions that requests have been given and filled, of all slots' capacity."""
        return sum(stream.read for stream in self._reading) + sum(stream.position for stream in self._drawing)

    @property
    def bytes(self) -> int:
        """Of keys and values, whether filled or not."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._spans))

    def submit(self, request: Request) -> int:
        """Takes a request in and returns its id. Raises UserError when it cannot be served to its end."""
        check(request, self.cfg.vocab, self.capacity)
        self._count += 1
        self.waiting.append((self._count, request))
        return self._count

    def cancel(self, id: int) -> bool:
        """Ends a request wherever it is; no event of it follows. False when there is none of that id."""
        for place, (waiting, _) in enumerate(self.waiting):
            if waiting == id:
                del self.waiting[place]
                return True
        for stream in (*self._reading, *self._drawing):
            if stream.id == id:
                self._release(stream)
                return True
        return False

    def step(self) -> list[Event]:
        """Lets who waits in, and reads a chunk of a prompt or draws a few tokens for everyone whose prompt is read, in turns.

        One of the two, and it has been done when this returns: who leaves in between waits for no more than that.
        """
        while self.waiting and (self._free or self._mirrors):
            self._admit(*self.waiting.popleft())
        self._has_read = bool(self._reading) and not (self._drawing and self._has_read)
        if not self._has_read:
            return self._draw() if self._drawing else []
        self._read(self._next_to_read())
        jax.block_until_ready(self._spans)
        return []

    def warm(self, report: Callable[[int, int], None] | None = None, ahead: Iterable[tuple[str, int]] = ()) -> None:
        """Compiles every program, and runs each once on nobody's behalf. Nothing is compiled after it.

        `ahead` is what `compile_ahead` tells: a program that it has compiled is run while the next one is compiled.
        `report` is told how many programs are ready, of how many. Raises ValueError while requests are under way.
        """
        if self.busy:
            raise ValueError("warm is for slots that nobody uses yet")
        chunks, kept = {self.chunk, self.tail}, self.chunk if self.prefixes.limit else None
        nowhere, start = np.int32(self._spans.slots), np.int32(0)  # a slot that is none: nothing is written
        runs: dict[str, Callable[[], Any]] = {
            "clear": lambda: self._set(programs.clear_slot(self._spans, nowhere, np.int32(1))),
            **{f"read {n}": functools.partial(self._read_tokens, (0,) * n, nowhere, 0) for n in chunks},
            "draw": lambda: self._dispatch({}, 1, False, []),
            "mirror": lambda: self._mirror(nowhere, [], 1),
            "tell": lambda: self._tell(int(nowhere), {}, np.zeros(self.cfg.vocab, np.int32)),
        }
        if kept:
            shapes = programs.chunk_of(self._spans, kept)
            nothing = lambda: jax.device_put(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes), jax.devices()[0])
            runs["take"] = lambda: programs.take_chunk(self._spans, start, start, kept)
            runs["give"] = lambda: self._set(programs.give_chunk(self._spans, nothing(), nowhere, start))
        # By their shapes, for a program that is run gives away arrays while others are still being compiled.
        held = programs.described((self.params, self._spans, self._tally))
        with contextlib.closing(programs.compiled(self.cfg, *held, chunks=chunks, kept=kept, group=GROUP)) as here:
            for name, count in itertools.chain(ahead, here):
                if run := runs.pop(name, None):
                    jax.block_until_ready((run(), self._spans))
                    if report:
                        report(count - len(runs), count)
                if not runs:
                    break

    # Who gets a slot, and who leaves one.

    def _admit(self, id: int, request: Request) -> None:
        self._dissolve()
        stream = _Stream(id, request, self._free.pop(0), first_key(request.namespace))
        self._set(programs.clear_slot(self._spans, np.int32(stream.slot), np.int32(stream.reach)))
        if request.sampling.adjusts_logits:
            said = np.bincount(request.prompt, minlength=self.cfg.vocab).astype(np.int32)
            self._tell(stream.slot, request.sampling.logit_bias, np.where(said > 0, programs.IN_PROMPT, 0).astype(np.int32))
        (self._reading if stream.unread else self._drawing).append(stream)

    def _release(self, stream: _Stream) -> None:
        """Its slot and mirrors are free again; what lies in them is cleared when somebody comes."""
        (self._reading if stream in self._reading else self._drawing).remove(stream)
        self._free.append(stream.slot)
        self._dissolve()

    def _dissolve(self) -> None:
        self._free += self._mirrors
        self._mirrors = []

    # Reading prompts.

    def _next_to_read(self) -> _Stream:
        """Who needs least goes first, but every so often who came first does."""
        self._turns += 1
        return self._reading[0] if self._turns % PATIENCE == 0 else min(self._reading, key=lambda stream: stream.unread)

    def _read(self, stream: _Stream) -> None:
        """Reads one chunk of a prompt, behind up to AT_ONCE that are found computed."""
        for _ in range(AT_ONCE):
            tokens = stream.request.prompt[stream.read : stream.read + min(self.chunk, stream.unread)]
            whole = len(tokens) == self.chunk and self.prefixes.limit > 0
            key = next_key(stream.key, tokens) if whole else b""
            found = self.prefixes.find(key) if whole else None
            at = np.int32(stream.slot), np.int32(stream.read)
            if found is None:
                self._read_tokens(tokens, *at)
                if whole:
                    chunk = programs.take_chunk(self._spans, *at, self.chunk)
                    self.prefixes.keep(key, chunk, stream.key if stream.read else None)
            else:
                self._set(programs.give_chunk(self._spans, found, *at))
                stream.cached += self.chunk
            stream.key = key
            stream.read += len(tokens)
            if not stream.unread:
                self._reading.remove(stream)
                self._drawing.append(stream)
            if found is None or not stream.unread:
                return

    def _read_tokens(self, tokens: tuple[int, ...], slot: Any, start: Any) -> None:
        size = self.tail if len(tokens) <= self.tail else self.chunk
        padded = np.zeros((1, size), np.int32)
        padded[0, : len(tokens)] = tokens
        self._set(programs.read_chunk(self.cfg, self.params, self._spans, padded, np.int32(slot), np.int32(start)))

    # Drawing tokens.

    def _draw(self) -> list[Event]:
        lone = self._drawing[0] if len(self._drawing) == 1 and not self._reading and not self.waiting else None
        guessed = self._guess(lone) if lone else []
        steps = 1 if guessed else self._steps()
        streams = {stream.slot: stream for stream in self._drawing}
        logprobs = any(stream.request.sampling.logprobs is not None for stream in self._drawing)
        drawn = self._dispatch(streams, steps, logprobs, guessed)
        return [self._take(stream, drawn, steps, guessed) for stream in list(self._drawing)]

    def _steps(self) -> int:
        """Few where somebody would wait for them: for a first token, or for a prompt to be read."""
        if any(not stream.said for stream in self._drawing):
            return 1
        most = FEW if self._reading else min(STEPS, max(LEAST, AT_A_TIME // self.slots))
        return min(most, max(stream.left for stream in self._drawing))

    def _guess(self, stream: _Stream) -> list[int]:
        """What may follow the lone stream's last token, where checking that pays; its mirrors are made when first needed."""
        most = min(GROUP - 1, len(self._free) + len(self._mirrors), stream.left - 1)
        if not self.guesses or stream.request.sampling.adjusts_logits or not stream.said or most < 1:
            return []
        stream.guesser = stream.guesser or Guesser((*stream.request.prompt, *stream.said))
        if not stream.guesser.pays:
            return []
        guessed = stream.guesser.guess(most)
        if guessed and not self._mirrors:
            mirrors = self._free[: GROUP - 1]
            self._mirror(np.int32(stream.slot), mirrors, stream.reach)
            self._mirrors, self._free = mirrors, self._free[len(mirrors) :]
        return guessed

    def _dispatch(self, streams: dict[int, _Stream], steps: int, logprobs: bool, guessed: list[int]) -> programs.Drawn:
        """Draws for the streams by slot. Row r is slot r; a guessed token gets a mirror's row, one position further on."""
        R = self._spans.slots
        rows = {slot: (stream, stream.token, stream.position) for slot, stream in streams.items()}
        for place, (slot, token) in enumerate(zip(self._mirrors, guessed)):
            (stream,) = streams.values()
            rows[slot] = (stream, token, stream.position + 1 + place)
        tokens: Any = np.zeros(R, np.int32)
        position: Any = np.full(R, -1, np.int32)
        sampling = [IDLE] * R
        for row, (stream, last, at) in rows.items():
            tokens[row], position[row], sampling[row] = last, at, stream.request.sampling
        source: Any = np.arange(R + GROUP * (GROUP - 1), dtype=np.int32) % R
        target: Any = np.full_like(source, R)
        target[:R] = np.arange(R)
        if self._mirrors:  # everything the lone stream says is written wherever its text is held
            (home,) = streams
            group = [home, *self._mirrors]
            extra = [(row, slot) for row in group if row in rows for slot in group if slot != row]
            source[R : R + len(extra)] = [row for row, _ in extra]
            target[R : R + len(extra)] = [slot for _, slot in extra]
        drawn, self._spans, self._tally = programs.draw(
            self.cfg, self.params, self._spans, self._tally, tokens, Rows(position, source, target),
            sampling_arrays(sampling), programs.penalty_arrays(sampling), np.int32(steps), np.bool_(logprobs),
        )  # fmt: skip
        # Read as NumPy's, for to take a number out of an array of JAX's is a program of its own.
        wanted = drawn if logprobs else drawn[:2]
        return drawn._replace(**dict(zip(drawn._fields, jax.device_get(wanted))))

    def _take(self, stream: _Stream, drawn: programs.Drawn, steps: int, guessed: list[int]) -> Event:
        """What was drawn for a stream becomes its own, as far as it counts; who is finished leaves."""
        slots = [stream.slot, *self._mirrors[: len(guessed)]] if guessed else [stream.slot]
        places = [(0, slot) for slot in slots] if guessed else [(step, stream.slot) for step in range(steps)]
        expected = guessed or (stream.guesser.guess(steps) if stream.guesser else [])
        new: list[int] = []
        finished: Finish | None = None
        logprobs: list[LogProb] = []
        for place in places:
            token = int(drawn.token[place])
            if not drawn.sound[place]:
                finished = "error"
            elif token in stream.request.sampling.stop_token_ids:
                finished = "stop"
            if finished:
                break
            new.append(token)
            if stream.request.sampling.logprobs is not None:
                logprobs.append(self._logprob(drawn, place, stream.request.sampling.logprobs))
            if len(new) == stream.left:
                finished = "length"
                break
            if guessed and (len(new) > len(guessed) or token != guessed[len(new) - 1]):
                break
        if stream.guesser:
            if expected and new:
                right = next((n for n, (a, b) in enumerate(zip(expected, new)) if a != b), min(len(expected), len(new)))
                stream.guesser.note(min(len(expected), len(new)), right)
            stream.guesser.extend(new)
        stream.said += new
        if finished:
            self._release(stream)
        return Event(stream.id, new, logprobs, finished, stream.cached)

    @staticmethod
    def _logprob(drawn: programs.Drawn, place: tuple[int, int], count: int) -> LogProb:
        tokens, values = (array[place][:count].tolist() for array in (drawn.top_tokens, drawn.top))
        return LogProb(int(drawn.token[place]), float(drawn.logprob[place]), tuple(zip(tokens, values)))

    # What lies on the device.

    def _set(self, spans: Any) -> None:
        self._spans = spans

    def _mirror(self, slot: Any, targets: list[int], reach: int) -> None:
        nowhere = self._spans.slots
        padded = np.array([*targets, *[nowhere] * (GROUP - 1 - len(targets))], np.int32)
        self._set(programs.mirror_slot(self._spans, np.int32(slot), padded, np.int32(reach)))

    def _tell(self, slot: int, bias: Any, said: np.ndarray) -> None:
        row = np.zeros(self.cfg.vocab, np.float32)
        for token, value in bias.items():
            row[token] = value
        self._tally = programs.set_tally(self._tally, np.int32(slot), row, said)
