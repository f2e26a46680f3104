"""Trains a transformer of our shape in plain PyTorch, the peer in training, as one would without us.

Weights, tokens and optimizer settings are ours: both sides report the same losses, step after step.
"""

import os
from typing import Any

from protocol import Run, serve_jobs


def make(spec: dict[str, Any]) -> Run:
    """Returns a training step on one batch. `spec`: config, file (.npz), dtype, device, compile,
    threads, AdamW's settings.
    """
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch import nn

    torch.set_num_threads(spec["threads"])
    c = spec["config"]
    device = spec["device"]
    N = c["heads"]
    K = c["kv_heads"]
    H = c["head_dim"]
    eps = c["eps"]

    def rope(x, cos, sin):
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn_norm = nn.RMSNorm(c["width"], eps)
            self.qkv = nn.Linear(c["width"], (N + 2 * K) * H, bias=c["qkv_bias"])
            if c["qk_norm"]:
                self.q_norm = nn.RMSNorm(H, eps)
            else:
                self.q_norm = nn.Identity()
            if c["qk_norm"]:
                self.k_norm = nn.RMSNorm(H, eps)
            else:
                self.k_norm = nn.Identity()
            self.out = nn.Linear(N * H, c["width"], bias=False)
            self.mlp_norm = nn.RMSNorm(c["width"], eps)
            self.gate_up = nn.Linear(c["width"], 2 * c["ff"], bias=False)
            self.down = nn.Linear(c["ff"], c["width"], bias=False)

        def forward(self, x, cos, sin):
            B, T, _ = x.shape
            heads = self.qkv(self.attn_norm(x)).view(B, T, N + 2 * K, H).transpose(1, 2)
            q, k, v = heads.split([N, K, K], 1)
            q = rope(self.q_norm(q), cos, sin).to(v.dtype)
            k = rope(self.k_norm(k), cos, sin).to(v.dtype)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=K < N)
            x = x + self.out(mixed.transpose(1, 2).reshape(B, T, N * H))
            gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
            return x + self.down(F.silu(gate) * up)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(c["vocab"], c["width"])
            self.blocks = nn.ModuleList(Block() for _ in range(c["layers"]))
            self.norm = nn.RMSNorm(c["width"], eps)
            self.head = nn.Linear(c["width"], c["vocab"], bias=False)
            if c["tied"]:
                self.head.weight = self.embed.weight

        def forward(self, tokens, targets):
            x = self.embed(tokens)
            frequencies = c["rope_theta"] ** (-torch.arange(H // 2, device=device) / (H // 2))
            angles = torch.outer(torch.arange(tokens.shape[1], device=device), frequencies)
            cos = angles.cos()
            sin = angles.sin()
            for block in self.blocks:
                x = block(x, cos, sin)
            return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())

    file = np.load(spec["file"])
    model = Model()
    model.load_state_dict(_state(file, c["tied"]))
    model.to(device)
    tokens, targets = (torch.from_numpy(file[name]).long().to(device) for name in ("tokens", "targets"))
    undecayed = [weight for name, weight in model.named_parameters() if "norm" in name or "bias" in name]
    decayed = [weight for name, weight in model.named_parameters() if not ("norm" in name or "bias" in name)]
    groups = [
        {"params": decayed, "weight_decay": spec["weight_decay"]},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=spec["learning_rate"], betas=(spec["beta1"], spec["beta2"]), fused=True
    )
    loss_of = torch.compile(model) if spec["compile"] else model

    def step() -> dict[str, Any]:
        with torch.autocast(device, torch.bfloat16, enabled=spec["dtype"] == "bfloat16"):
            loss = loss_of(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), spec["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.item()}

    return step


def _state(file: Any, tied: bool) -> dict[str, Any]:
    """Returns our leaves under torch's names; the weight of a Linear is (out, in), those of one
    input one below another.
    """
    import torch

    joined = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
    parts: dict[str, list[Any]] = {}
    # q before k before v
    for path in sorted(file.files, key=lambda path: "qkv".find(path.rpartition("/")[2][0])):
        root, _, name = path.replace("/", ".").partition(".")
        if root != "params":
            continue
        leaf = torch.from_numpy(file[path])
        folder, dot, last = name.rpartition(".")
        matrix = last.removesuffix("_bias")
        kind = "bias" if last.endswith("_bias") else "weight"
        target = f"{folder}{dot}{joined.get(matrix, matrix)}.{kind}"
        parts.setdefault(target, []).append(leaf.T if leaf.ndim == 2 and name != "embed" else leaf)
    state = {name: torch.cat(leaves) for name, leaves in parts.items()}
    if tied:
        state["head.weight"] = state["embed.weight"]
    return state


def describe_build() -> str:
    """Returns how torch was built, with how many threads it runs, and what was loaded before it."""
    import torch

    preloaded = os.path.basename(os.environ.get("LD_PRELOAD", "nothing"))
    return f"{torch.__config__.show()}\n{torch.__config__.parallel_info()}\nloaded before it: {preloaded}"


if __name__ == "__main__":
    serve_jobs(["torch", "numpy"], make, describe_build)
