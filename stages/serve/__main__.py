"""Serve a model to OpenAI's clients and to a page in the browser.

    python -m stages.serve --model smollm2-135m-instruct
    THRICE_API_KEY=... python -m stages.serve --model smollm2-135m-instruct --host 0.0.0.0

Then open http://127.0.0.1:8000, or point a client at http://127.0.0.1:8000/v1. Answers are the same to the bit whatever
else is asked meanwhile; weights are only read, and GET /v1/attestation shows it. Ctrl-C or SIGTERM lets what is under way
end; a second one ends at once.
"""

import sys
from collections.abc import Sequence

from stages.cli.command import run_command
from stages.serve.flags import Serve


def serve(given: Serve) -> int:
    """Serves until it is told to stop."""
    from stages.serve.run import run

    return run(given)


def main(args: Sequence[str] | None = None) -> int:
    return run_command("serve", __doc__, Serve, serve, args)


if __name__ == "__main__":
    sys.exit(main())
