"""`python -m bench`: what can be measured, one line each, and the same as JSON."""

import ast
import json
import sys
from pathlib import Path


def main() -> int:
    """Names every measurement with the first line of its docstring, read without importing it."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if "\nif __name__ ==" in source and path.name != "__main__.py":
            found[path.stem] = (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]
    width = max(map(len, found))
    for name, line in found.items():
        print(f"  python -m bench.{name:<{width}}  {line}")
    print(json.dumps({"measurements": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
