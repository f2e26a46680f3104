"""Runs `generate` of Hugging Face transformers, the peer in inference: greedy, with its default cache.

The model is a folder that we exported and the prompts are ours, so both sides should make the same tokens.
"""

from typing import Any

from protocol import Run, serve_jobs


def make(spec: dict[str, Any]) -> Run:
    """Returns a call of generate. `spec`: folder, dtype, threads, prompts (lists of ids of one length), new (tokens)."""
    import torch
    import transformers

    torch.set_num_threads(spec["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(spec["folder"]).to(getattr(torch, spec["dtype"])).eval()
    model.generation_config.eos_token_id = None
    prompts = torch.tensor(spec["prompts"])

    def run() -> dict[str, Any]:
        with torch.inference_mode():
            tokens = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=spec["new"], do_sample=False, pad_token_id=0
            )
        return {"tokens": tokens[:, prompts.shape[1] :].tolist()}

    return run


if __name__ == "__main__":
    serve_jobs(["torch", "transformers"], make)
