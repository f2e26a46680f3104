"""Runs mistral.rs, the second peer of serving, through its own Python package, on the same GGUF file.

One stream at a time: its Python package takes no second request before the first is answered.
"""

import time
from pathlib import Path
from typing import Any

from protocol import Run, serve_jobs


def make(spec: dict[str, Any]) -> Run:
    """Returns a run of one `text`, of which `new` tokens are generated.

    The run returns the seconds of `prefill`, up to the first token, and of `decode`, by which `new`
    tokens take longer than one. `spec`: file, text, the tokens of it in `prompts`, new.
    """
    import mistralrs

    file = Path(spec["file"])
    which = mistralrs.Which.GGUF(quantized_model_id=str(file.parent), quantized_filename=file.name)
    # prefix_cache_n: each round is to read its prompt, though an earlier one did
    runner = mistralrs.Runner(which=which, max_seqs=1, prefix_cache_n=0)

    def seconds(tokens: int) -> float:
        request = mistralrs.CompletionRequest(
            prompt=spec["text"], model="default", max_tokens=tokens, temperature=0.0, top_k=1, ignore_eos=True
        )
        begin = time.perf_counter()
        usage = runner.send_completion_request(request).usage
        expected = (len(spec["prompts"][0]), tokens)
        if (usage.prompt_tokens, usage.completion_tokens) != expected:
            raise ValueError(
                f"mistral.rs read {usage.prompt_tokens} tokens and generated {usage.completion_tokens}, "
                f"and not {expected[0]} and {expected[1]}"
            )
        return time.perf_counter() - begin

    def run() -> dict[str, Any]:
        prefill = seconds(1)
        return {"prefill": prefill, "decode": seconds(spec["new"]) - prefill}

    return run


def describe_build() -> str:
    """Returns which wheel it is."""
    from importlib.metadata import version

    return f"the wheel of mistralrs {version('mistralrs')}"


if __name__ == "__main__":
    serve_jobs(["mistralrs"], make, describe_build)
