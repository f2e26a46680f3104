"""Runs llama.cpp, the peer of serving, through `llama-cpp-python`, on the same GGUF file.

One context decodes all rows together, each a sequence of its own, greedily; or one prompt after
another, each to its end. It runs in the setting in which it is fastest here, of those of `settings`.
It also writes the Q4_K_M file of a float16 one, by its own quantizer.
"""

import ctypes
import math
import time
from typing import Any, NamedTuple

from protocol import Run, serve_jobs

UBATCH = 512  # tokens a call, its own default
TRIED_TOKENS = 17  # decoded in each setting that is tried
TRIED_ANSWERS = 2  # of prompts that are answered one after another
TRIES = 3  # of each setting, in turns
TRY_SECONDS = 10.0  # after which no setting is tried again
# Tokens of all prompts together. Of longer ones each setting is tried on all threads only: reading
# them is bound by products, and decoding after them by attention, which half the threads compute
# half as fast.
SHORT = {"prefill": 128, "decode": 1024}


class Setting(NamedTuple):
    """How llama.cpp computes."""

    flash_attention: bool
    threads: int


class Streams:
    """A context of a model for some prompts, in one setting."""

    def __init__(self, model: Any, spec: dict[str, Any], setting: Setting):
        """`spec`: as in `make_streams`. Raises ValueError when llama.cpp cannot make it."""
        import llama_cpp as llama

        self.setting = setting
        self.ends = spec.get("ends", ())
        if self.ends:
            self.groups = [[prompt] for prompt in spec["prompts"]]
        else:
            self.groups = [spec["prompts"]]
        self.keeps_prompts = spec["phase"] == "decode" and not self.ends
        self.first_tokens: list[int] = []
        rows = len(self.groups[0])
        longest = max(map(len, spec["prompts"]))
        options = llama.llama_context_default_params()
        options.n_ctx = rows * (longest + spec["new"] + 8)
        options.n_seq_max = rows
        options.n_batch = max(UBATCH, rows)
        options.n_ubatch = UBATCH
        options.n_threads = setting.threads  # of a call of one token
        options.n_threads_batch = setting.threads  # of a call of several
        if setting.flash_attention:
            options.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        else:
            options.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama.llama_init_from_model(model, options)
        if not self.context:
            raise ValueError(f"llama.cpp makes no context of {options.n_ctx} tokens")
        self.batch = llama.llama_batch_init(max(UBATCH, rows), 0, 1)
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self.memory = llama.llama_get_memory(self.context)

    def close(self) -> None:
        """Frees the context, which cannot run afterwards."""
        import llama_cpp as llama

        llama.llama_batch_free(self.batch)
        llama.llama_free(self.context)

    def touch_weights(self) -> None:
        """Computes a token, so that no try is the first to read the weights."""
        self._feed([(self.groups[0][0][0], 0, 0, True)])

    def run(self, new: int, most_groups: int | None = None) -> dict[str, Any]:
        """Prefills the prompts of each group one by one, then decodes `new` tokens of its rows
        together, or up to one of the `ends`. Takes the first `most_groups`, by default all.

        Where only decoding is timed, a second run finds the prompts in the KV cache and prefills
        nothing. Returns the seconds of `prefill` and of `decode`, and the `tokens` of each prompt.
        """
        prefill = 0.0
        decode = 0.0
        tokens: list[list[int]] = []
        for prompts in self.groups[:most_groups]:
            prefill_seconds, decode_seconds, output = self._run_group(prompts, new)
            prefill += prefill_seconds
            decode += decode_seconds
            tokens += output
        return {"prefill": prefill, "decode": decode, "tokens": tokens}

    def _run_group(self, prompts: list[list[int]], new: int) -> tuple[float, float, list[list[int]]]:
        begin = time.perf_counter()
        length = len(prompts[0])
        if self.keeps_prompts and self.first_tokens:
            self._forget_from(length)
        else:
            self._prefill(prompts)
        prefilled = time.perf_counter()
        output = [[token] for token in self.first_tokens]
        rows = range(len(prompts))
        for step in range(new - 1):
            if output[0][-1] in self.ends:
                break
            self._feed([(output[row][-1], length + step, row, True) for row in rows])
            for row in rows:
                output[row].append(self._best(row))
        return prefilled - begin, time.perf_counter() - prefilled, output

    def _prefill(self, prompts: list[list[int]]) -> None:
        """Computes the prompts one by one, and the first token after each."""
        import llama_cpp as llama

        llama.llama_memory_clear(self.memory, False)
        self.first_tokens = []
        for row, prompt in enumerate(prompts):
            last = len(prompt) - 1
            for start in range(0, len(prompt), UBATCH):
                piece = prompt[start : start + UBATCH]
                self._feed([(token, start + i, row, start + i == last) for i, token in enumerate(piece)])
            self.first_tokens.append(self._best(self.batch.n_tokens - 1))

    def _forget_from(self, position: int) -> None:
        """Takes what was decoded, from a position on, out of the KV cache."""
        import llama_cpp as llama

        for row in range(len(self.first_tokens)):
            llama.llama_memory_seq_rm(self.memory, row, position, -1)

    def _feed(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """Computes (token, position, row, whether its logits are wanted) of a call."""
        import llama_cpp as llama

        batch = self.batch
        batch.n_tokens = len(tokens)
        for place, (token, position, row, wanted) in enumerate(tokens):
            batch.token[place] = token
            batch.pos[place] = position
            batch.logits[place] = wanted
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = row
        if llama.llama_decode(self.context, batch):
            raise ValueError("llama.cpp could not decode a batch")

    def _best(self, place: int) -> int:
        import llama_cpp as llama
        import numpy as np

        logits = llama.llama_get_logits_ith(self.context, place)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax())


class Jobs:
    """Makes one job after another: what the one before held in memory goes."""

    def __init__(self) -> None:
        self.file = ""
        self.model: Any = None
        self.streams: Streams | None = None

    def make(self, spec: dict[str, Any]) -> Run:
        """Returns a run that writes a file, where `spec` says one `to` write, else one of streams."""
        import llama_cpp as llama

        llama.llama_log_set(QUIET, None)
        llama.llama_backend_init()
        if self.streams:
            self.streams.close()
            self.streams = None
        if "to" in spec:
            return make_quantizer(spec)
        return self.make_streams(spec)

    def make_streams(self, spec: dict[str, Any]) -> Run:
        """Returns a run of the prompts in the setting whose `phase`, prefill or decode, is fastest.

        The run returns what `Streams.run` does, and its `setting`. `spec`: file, threads, phase,
        prompts (lists of ids, of one length), new; with `ends`, tokens that end an answer, each
        prompt is a run of its own, and lengths may differ.
        """
        self.load(spec["file"])
        streams = self.find_fastest(spec)
        self.streams = streams

        def run() -> dict[str, Any]:
            return streams.run(spec["new"]) | {"setting": streams.setting._asdict()}

        return run

    def find_fastest(self, spec: dict[str, Any]) -> Streams:
        """Returns streams in the setting of the shortest try. `spec`: as in `make_streams`."""
        tried = [Streams(self.model, spec, setting) for setting in settings(spec)]
        tried[0].touch_weights()
        shortest = [math.inf for _ in tried]
        begin = time.perf_counter()
        for _ in range(TRIES):
            for place, streams in enumerate(tried):
                result = streams.run(min(spec["new"], TRIED_TOKENS), TRIED_ANSWERS)
                shortest[place] = min(shortest[place], result[spec["phase"]])
            if time.perf_counter() - begin > TRY_SECONDS:
                break
        fastest = tried.pop(shortest.index(min(shortest)))
        for streams in tried:
            streams.close()
        return fastest

    def load(self, file: str) -> None:
        """Loads a model, unless it is that of the job before. Raises ValueError for no model."""
        import llama_cpp as llama

        if file == self.file:
            return
        if self.model:
            llama.llama_model_free(self.model)
            self.file = ""
        options = llama.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = llama.llama_model_load_from_file(file.encode(), options)
        if not self.model:
            raise ValueError(f"llama.cpp cannot read {file}")
        self.file = file


def make_quantizer(spec: dict[str, Any]) -> Run:
    """Returns a run that writes the float16 file `file` as Q4_K_M to the path `to`."""
    import llama_cpp as llama

    def run() -> dict[str, Any]:
        options = llama.llama_model_quantize_default_params()
        options.ftype = llama.LLAMA_FTYPE_MOSTLY_Q4_K_M
        options.nthread = spec["threads"]
        if llama.llama_model_quantize(spec["file"].encode(), spec["to"].encode(), ctypes.byref(options)):
            raise ValueError(f"llama.cpp cannot quantize {spec['file']}")
        return {}

    return run


def settings(spec: dict[str, Any]) -> list[Setting]:
    """Returns the settings to try: with flash attention and without, on all `threads`; and on half
    of them, as some machines read memory no faster with all, where the prompts are short in this
    `phase`.
    """
    threads = {spec["threads"]}
    if is_short(spec):
        threads.add(max(1, spec["threads"] // 2))
    tried = []
    for count in sorted(threads, reverse=True):
        tried += [Setting(True, count), Setting(False, count)]
    return tried


def is_short(spec: dict[str, Any]) -> bool:
    return sum(map(len, spec["prompts"])) <= SHORT[spec["phase"]]


def describe_build() -> str:
    """Returns the instructions and libraries that llama.cpp was built with."""
    import llama_cpp as llama

    return llama.llama_print_system_info().decode().strip()


QUIET = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


if __name__ == "__main__":
    serve_jobs(["llama_cpp", "numpy"], Jobs().make, describe_build)
