"""Continues prompts greedily with vLLM, the peer in inference on a GPU.

Weights and prompts are ours; every prompt gets the same number of new tokens.
"""

import functools
import os
import sys
from typing import Any

from protocol import Run, serve_jobs

MEMORY = 0.3  # of the GPU's: ours lie beside it
CONTEXT = 1024  # tokens of a prompt and its completion


@functools.cache
def load(folder: str, dtype: str) -> Any:
    """Loads a model once: vLLM keeps a process's memory."""
    vllm: Any = sys.modules["vllm"]  # which `serve_jobs` has imported; no extra has it, for it needs a GPU
    return vllm.LLM(
        model=folder, skip_tokenizer_init=True, dtype=dtype, max_model_len=CONTEXT, gpu_memory_utilization=MEMORY,
        enable_prefix_caching=False,
    )  # fmt: skip


def make(spec: dict[str, Any]) -> Run:
    """Returns a run of all prompts at once. `spec`: folder (Hugging Face), dtype, prompts of one length, new tokens each."""
    vllm: Any = sys.modules["vllm"]
    model = load(spec["folder"], spec["dtype"])
    prompts = [vllm.TokensPrompt(prompt_token_ids=prompt) for prompt in spec["prompts"]]
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=spec["new"], ignore_eos=True, detokenize=False)

    def run() -> dict[str, Any]:
        return {"tokens": [list(output.outputs[0].token_ids) for output in model.generate(prompts, sampling, use_tqdm=False)]}

    return run


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # an engine of its own would outlive this process
    serve_jobs(["vllm"], make)
