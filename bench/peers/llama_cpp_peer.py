"""Runs llama.cpp, the peer of serving, through `llama-cpp-python`, on the same GGUF file.

One context decodes all rows together, each a sequence of its own, greedily; or one prompt after
another, each to its end.
"""

import ctypes
import time
from typing import Any

from protocol import Run, serve_jobs

UBATCH = 512  # tokens a call, its own default


def make(spec: dict[str, Any]) -> Run:
    """Returns a run that prefills the prompts one by one, then decodes `new` tokens of all rows
    together.

    The run returns the seconds of both, and the tokens of each row. `spec`: file, threads, prompts
    (lists of ids, of one length), new; with `ends`, tokens that end an answer, each prompt is a run
    of its own, and lengths may differ.
    """
    import llama_cpp as llama

    new = spec["new"]
    ends = spec.get("ends", ())
    groups = [[prompt] for prompt in spec["prompts"]] if ends else [spec["prompts"]]
    rows = len(groups[0])
    longest = max(map(len, spec["prompts"]))
    log_type = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    quiet = log_type(lambda *_: None)
    llama.llama_log_set(quiet, None)
    llama.llama_backend_init()
    settings = llama.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(spec["file"].encode(), settings)
    if not model:
        raise ValueError(f"llama.cpp cannot read {spec['file']}")
    options = llama.llama_context_default_params()
    options.n_ctx = rows * (longest + new + 8)
    options.n_seq_max = rows
    options.n_batch = max(UBATCH, rows)
    options.n_ubatch = UBATCH
    options.n_threads = options.n_threads_batch = spec["threads"]
    context = llama.llama_init_from_model(model, options)
    batch = llama.llama_batch_init(max(UBATCH, rows), 0, 1)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    memory = llama.llama_get_memory(context)

    def feed(tokens: list[tuple[int, int, int, bool]]) -> None:
        batch.n_tokens = len(tokens)
        for place, (token, position, row, wanted) in enumerate(tokens):
            batch.token[place] = token
            batch.pos[place] = position
            batch.logits[place] = wanted
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = row
        if llama.llama_decode(context, batch):
            raise ValueError("llama.cpp could not decode a batch")

    def best(place: int) -> int:
        import numpy as np

        logits = llama.llama_get_logits_ith(context, place)
        return int(np.ctypeslib.as_array(logits, shape=(vocabulary,)).argmax())

    def run_group(prompts: list[list[int]]) -> tuple[float, float, list[list[int]]]:
        llama.llama_memory_clear(memory, True)
        begin = time.perf_counter()
        length = len(prompts[0])
        output: list[list[int]] = []
        for row, prompt in enumerate(prompts):
            for start in range(0, length, UBATCH):
                piece = prompt[start : start + UBATCH]
                feed([(token, start + i, row, start + i == length - 1) for i, token in enumerate(piece)])
            output.append([best(batch.n_tokens - 1)])
        prefilled = time.perf_counter()
        for step in range(new - 1):
            if output[0][-1] in ends:
                break
            feed([(output[row][-1], length + step, row, True) for row in range(rows)])
            for row in range(rows):
                output[row].append(best(row))
        return prefilled - begin, time.perf_counter() - prefilled, output

    def run() -> dict[str, Any]:
        prefill = 0.0
        decode = 0.0
        tokens: list[list[int]] = []
        for prompts in groups:
            prefill_seconds, decode_seconds, output = run_group(prompts)
            prefill += prefill_seconds
            decode += decode_seconds
            tokens += output
        return {"prefill": prefill, "decode": decode, "tokens": tokens}

    return run


if __name__ == "__main__":
    serve_jobs(["llama_cpp", "numpy"], make)
