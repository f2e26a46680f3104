"""The peer in inference: Hugging Face `transformers`, its own `generate`, greedy, with its default cache.

`bench.peers` starts this file in whichever interpreter has transformers and torch; it imports nothing of the engine.
Weights and prompts come from ours by file, so both sides should say the same tokens.
"""

from typing import Any

from protocol import Run, serve


def make(spec: dict[str, Any]) -> Run:
    """One call of generate. `spec`: config, file (.npz), dtype, threads, rows, prompt and new (tokens)."""
    import numpy as np
    import torch

    torch.set_num_threads(spec["threads"])
    file = np.load(spec["file"])
    model = _model(spec["config"])
    model.load_state_dict(_state(file, spec["config"]))
    model = model.to(getattr(torch, spec["dtype"])).eval()
    model.generation_config.eos_token_id = None
    prompts = torch.from_numpy(file["tokens"]).long()[: spec["rows"], : spec["prompt"]]
    new = spec["new"]

    def run() -> dict[str, Any]:
        with torch.inference_mode():
            said = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, do_sample=False, pad_token_id=0
            )
        return {"tokens": said[:, prompts.shape[1] :].tolist()}

    return run


def _model(c: dict[str, Any]) -> Any:
    import transformers

    if c["qk_norm"] and c["qkv_bias"]:
        raise ValueError("transformers has no class with both q/k norm and qkv bias")
    family = "Qwen3" if c["qk_norm"] else "Qwen2" if c["qkv_bias"] else "Llama"
    scaling = None
    if c["rope_scaling"]:
        s = c["rope_scaling"]
        scaling = {
            "rope_type": "llama3", "factor": s["factor"], "low_freq_factor": s["low_freq_factor"],
            "high_freq_factor": s["high_freq_factor"], "original_max_position_embeddings": s["original_context"],
        }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(
        vocab_size=c["vocab"], hidden_size=c["width"], num_hidden_layers=c["layers"], num_attention_heads=c["heads"],
        num_key_value_heads=c["kv_heads"], head_dim=c["head_dim"], intermediate_size=c["ff"], rms_norm_eps=c["eps"],
        max_position_embeddings=c["context"], rope_theta=c["rope_theta"], rope_scaling=scaling,
        tie_word_embeddings=c["tied"], use_cache=True,
    )  # fmt: skip
    return getattr(transformers, f"{family}ForCausalLM")(config)


def _state(file: Any, c: dict[str, Any]) -> dict[str, Any]:
    """Our leaves under Hugging Face's names: fused matrices are cut, and a Linear keeps its weight as (out, in)."""
    import torch

    q, k = c["heads"] * c["head_dim"], c["kv_heads"] * c["head_dim"]
    state = {"model.embed_tokens.weight": torch.from_numpy(file["params/embed"])}
    state["model.norm.weight"] = torch.from_numpy(file["params/norm"])
    state["lm_head.weight"] = state["model.embed_tokens.weight"] if c["tied"] else torch.from_numpy(file["params/head"]).T
    for layer in range(c["layers"]):
        leaf = lambda name: torch.from_numpy(file[f"params/blocks/{layer}/{name}"])  # noqa: B023
        at = f"model.layers.{layer}."
        for name, part in zip("qkv", leaf("qkv").T.split([q, k, k])):
            state[f"{at}self_attn.{name}_proj.weight"] = part
        if c["qkv_bias"]:
            for name, part in zip("qkv", leaf("qkv_bias").split([q, k, k])):
                state[f"{at}self_attn.{name}_proj.bias"] = part
        for name, part in zip(("gate", "up"), leaf("gate_up").T.chunk(2)):
            state[f"{at}mlp.{name}_proj.weight"] = part
        state[f"{at}self_attn.o_proj.weight"] = leaf("out").T
        state[f"{at}mlp.down_proj.weight"] = leaf("down").T
        state[f"{at}input_layernorm.weight"] = leaf("attn_norm")
        state[f"{at}post_attention_layernorm.weight"] = leaf("mlp_norm")
        if c["qk_norm"]:
            state[f"{at}self_attn.q_norm.weight"] = leaf("q_norm")
            state[f"{at}self_attn.k_norm.weight"] = leaf("k_norm")
    return state


if __name__ == "__main__":
    serve(["torch", "transformers", "numpy"], make)
