"""The commands, one package each. Importing it turns bytecode on, in the user's cache, where Python was told to write none.

`python -m stages` lists them. A command parses flags, wires the engine, loops and prints.
"""

import contextlib
import gc
import sys

# While `python -m` looks for a module, argv[0] is "-m": a program that merely imports this package is left alone.
if sys.argv[:1] == ["-m"]:
    gc.disable()  # imports leave no garbage to look for; `run_command` enables it

    # Where Python was told not to leave bytecode beside its sources (PYTHONDONTWRITEBYTECODE, common in containers), JAX
    # and what it imports are compiled anew at every start, which takes longer than all else before a first token. So a
    # command keeps that bytecode in the user's cache folder.
    if sys.dont_write_bytecode:
        from engine.files import cache_folder

        with contextlib.suppress(OSError, RuntimeError):
            sys.pycache_prefix = str(cache_folder("bytecode"))
            sys.dont_write_bytecode = False
