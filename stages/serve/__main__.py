"""Serve a model to the clients of OpenAI, Anthropic and Ollama, and to a page in the browser.

    python -m stages.serve --model smollm2-135m-instruct
    THRICE_API_KEY=... python -m stages.serve --model smollm2-135m-instruct --host 0.0.0.0

Then open http://127.0.0.1:8000, or point a client at http://127.0.0.1:8000/v1 (Anthropic's and
Ollama's without the /v1). Answers are the same to the bit whatever else is asked meanwhile; weights
are only read, and GET /v1/attestation shows it. Ctrl-C or SIGTERM lets what is under way end; a
second one ends at once.
"""

from stages.cli.start import start_command

if __name__ == "__main__":
    start_command()

from collections.abc import Sequence

from engine.errors import require_serve_packages
from stages.cli.command import leave, run_command, typed_arguments
from stages.serve.flags import ServeFlags


def serve(flags: ServeFlags) -> int:
    require_serve_packages(f"stages.serve {' '.join(typed_arguments())}")
    from stages.serve.run import run  # after the flags are parsed: --help needs none of it

    return run(flags)


def main(args: Sequence[str] | None = None) -> int:
    return run_command("serve", __doc__, ServeFlags, serve, args, one_arena=False)


if __name__ == "__main__":
    leave(main())
