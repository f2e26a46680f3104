"""Export a model: a Hugging Face folder, a GGUF file for llama.cpp, or a LoRA adapter in PEFT's layout.

    python -m stages.export --model runs/demo-shakespeare --out exported --check
    python -m stages.export --model smollm2-135m-instruct --out smollm2.gguf --dtype q8_0
    python -m stages.export --model runs/smollm2-135m-instruct-voice --out voice-adapter --adapter --check

A LoRA model is written with its adapters merged in, unless --adapter says otherwise. What could not be loaded again is not
written.
"""

from collections.abc import Sequence

from engine.device import start_jax
from stages.cli import signals
from stages.cli.command import run_command
from stages.cli.process import leave
from stages.export.flags import ExportFlags


def export(flags: ExportFlags) -> int:
    signals.set_phase("before the model was written.")
    device = start_jax(flags.device)
    from stages.export.run import run  # imports JAX: only once the device is chosen

    return run(flags, device)


def main(args: Sequence[str] | None = None) -> int:
    return run_command("export", __doc__, ExportFlags, export, args)


if __name__ == "__main__":
    leave(main())
