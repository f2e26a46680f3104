"""Writes `llama_cpp.txt` beside it: what llama.cpp writes after a set of prompts, taking the most probable token each time.

    peers/bin/pip install llama-cpp-python
    peers/bin/python tests/storage/golden/ask_llama_cpp.py SmolLM2-135M-Instruct.Q4_1.gguf

A line a prompt, as JSON: the prompt, its tokens, those that follow, and by how much each was ahead
of the next best. llama.cpp rounds activations to 8 bits before it multiplies, so where two tokens
are nearly as probable another program may rightly take the other one; the gaps say where that is.
"""

import json
import sys
from pathlib import Path

import numpy as np
from llama_cpp import Llama

STEPS = 32
USER = "<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "1, 2, 3, 4, 5, 6, 7,",
    "In 1969, 12345 people\tsaw   three  spaces,\n\n\nand naïve café — 日本語 🙂.",
    "Water boils at a temperature of",
    USER.format("What is the capital of Italy?"),
    USER.format("Name three primary colours."),
    USER.format("Write one sentence about the moon."),
]


def main(path: str) -> None:
    model = Llama(path, n_ctx=512, n_threads=2, logits_all=True, verbose=False)
    lines = []
    for prompt in PROMPTS:
        tokens = model.tokenize(prompt.encode(), add_bos=False, special=True)
        model.reset()
        model.eval(tokens)
        output, gaps = [], []
        while len(output) < STEPS:
            logits = np.asarray(model.scores[model.n_tokens - 1])
            best, second = np.argsort(logits)[::-1][:2]
            output.append(int(best))
            gaps.append(round(float(logits[best] - logits[second]), 3))
            if best == model.token_eos():
                break
            model.eval([int(best)])
        lines.append(
            json.dumps(
                {"prompt": prompt, "tokens": tokens, "written": output, "gaps": gaps}, ensure_ascii=False
            )
        )
    Path(__file__).with_name("llama_cpp.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
