"""`python -m stages`: the stages of a model's life, one line each."""

import ast
import sys
from pathlib import Path


def stages() -> dict[str, str]:
    """Name of each stage -> the first line of its docstring, read without importing anything."""
    found = {}
    for path in [*Path(__file__).parent.glob("*.py"), *Path(__file__).parent.glob("*/__main__.py")]:
        source = path.read_text(encoding="utf-8")
        if path.parent == Path(__file__).parent and (path.name == "__main__.py" or "\nif __name__ ==" not in source):
            continue
        name = path.stem if path.name != "__main__.py" else path.parent.name
        found[name] = (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]
    order = ("train", "finetune", "evaluate", "generate", "chat", "serve", "export")
    return dict(sorted(found.items(), key=lambda pair: (order.index(pair[0]) if pair[0] in order else 99, pair[0])))


def main() -> int:
    found = stages()
    width = max(map(len, found))
    print("The stages of a model's life; each explains itself with --help:\n")
    for name, line in found.items():
        print(f"  python -m stages.{name:<{width}}  {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
