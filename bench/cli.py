"""What every measurement does around its work: flags in, JSON as the last line out, a person's mistakes in a sentence."""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from engine.errors import UserError

MISTAKE = 2


def run[Flags](
    name: str, about: str | None, flags: type[Flags], measured: Callable[[Flags], dict[str, Any]], args: Sequence[str] | None
) -> int:
    """Parses `args` (the command line's when None), measures, prints what `measured` returns as the last line of stdout.

    Returns 0, or 2 for what a person can mend: said in a sentence on stderr. `name` is what follows `python -m`.
    """
    import tyro

    try:
        given = tyro.cli(
            flags, prog=f"python -m {name}", description=about, args=args,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )  # fmt: skip
        document = measured(given)
    except SystemExit as leaving:  # tyro has shown the help, or what is wrong with a flag
        return int(leaving.code or 0)
    except KeyboardInterrupt:
        print("\nstopped: nothing was kept", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return MISTAKE
    print(json.dumps(document), flush=True)
    return 0
