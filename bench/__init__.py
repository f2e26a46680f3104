"""Benchmarks: how fast and how much, against what this machine could do. Each prints tables, or with --json a line of JSON."""

import sys

# A command's old name, and what it is now. Python imports this package before it looks for a module that is named with -m.
MOVED = {
    "bench.accelerator": "bench --checks",
    "bench.anatomy": "bench --out FOLDER",
    "bench.compare": "bench compare",
    "bench.finetuning": "bench.step --of finetuning",
    "bench.inference": "bench.peers --of serving",
    "bench.life": "bench.lives",
    "bench.quantisation": "stages.evaluate --weights int8",
    "bench.recipes": "bench.step --of recipes",
    "bench.saving": "bench.step --of saving",
    "bench.sharding": "stages.train --mesh fsdp=2 --dry-run",
    "bench.table": "bench",
    "bench.training": "bench.step",
}
if sys.argv[:1] == ["-m"] and (moved := MOVED.get(sys.orig_argv[sys.orig_argv.index("-m") + 1])):
    print(f"error: this command is now: python -m {moved}", file=sys.stderr)
    sys.exit(2)
