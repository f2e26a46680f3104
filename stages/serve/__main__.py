"""Serve a model to OpenAI's clients and to a page in the browser.

    python -m stages.serve --model smollm2-135m-instruct
    THRICE_API_KEY=... python -m stages.serve --model smollm2-135m-instruct --host 0.0.0.0

Then open http://127.0.0.1:8000, or point a client at http://127.0.0.1:8000/v1. Answers are the same to the bit whatever
else is asked meanwhile; weights are only read, and GET /v1/attestation shows it. Ctrl-C or SIGTERM lets what is under way
end; a second one ends at once.
"""

import importlib.util
from collections.abc import Sequence

from engine.errors import UserError
from stages.cli.command import run_command, typed_arguments
from stages.cli.process import leave
from stages.serve.flags import ServeFlags

NEEDS = ("starlette", "uvicorn", "h11", "msgspec", "prometheus_client")


def serve(flags: ServeFlags) -> int:
    """Serves until a signal stops it. Raises UserError, before anything else, when the packages of its extra are missing."""
    missing = [name.replace("_", "-") for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"The server needs {', '.join(missing)}: start it with `uv run --extra serve python -m stages.serve "
            f"{' '.join(typed_arguments())}`, or install the extra with `pip install -e '.[serve]'`."
        )
    from stages.serve.run import run  # after the flags are parsed: --help needs none of it

    return run(flags)


def main(args: Sequence[str] | None = None) -> int:
    return run_command("serve", __doc__, ServeFlags, serve, args, one_arena=False)


if __name__ == "__main__":
    leave(main())
