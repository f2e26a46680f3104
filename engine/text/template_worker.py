"""Runs a chat template in a process: sandboxed, limited in time and memory, and locked once it is compiled.

The sandbox keeps the template away from Python's insides, but a single expression can keep a
library busy for hours or fill the memory, where no exception reaches it; a process can be ended
whatever it does. `template.py` starts this file by path; it imports nothing of the project, and
replies to each line of JSON with one.
"""

import datetime
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

MAX_MEMORY_BYTES = 512 * 2**20  # address space, Python's own included
MAX_SECONDS = 0.7  # of processor time an answer, a limit that the kernel keeps
MAX_OUTPUT_BYTES = 1_000_000  # of UTF-8 a conversation may become

# What the audit hook refuses once the template is compiled. Rendering needs none of it.
FORBIDDEN = (
    "open",
    "import",
    "exec",
    "compile",
    "os.",
    "subprocess.",
    "socket.",
    "shutil.",
    "ctypes.",
    "pty.",
    "mmap.",
    "signal.",
    "time.sleep",
    "marshal.",
    "pickle.",
    "code.__new__",
    "function.__new__",
    "cpython.",
    "sys.set",
    "sys._getframe",
    "gc.",
)


class TemplateRaised(Exception):
    """The template called `raise_exception`: it does not take this conversation."""


class OutputTooLong(Exception):
    """More than MAX_OUTPUT_BYTES were written."""


def limit_resources() -> None:
    import resource

    for name, value in (("RLIMIT_AS", MAX_MEMORY_BYTES), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0)):
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (ValueError, OSError, AttributeError):  # a system without this limit
            continue


def forbid_system_access() -> None:
    def watch(event: str, _: Any) -> None:
        if event.startswith(FORBIDDEN):
            raise PermissionError(f"it tried to use {event}")

    sys.addaudithook(watch)


RenderTemplate = Callable[[list, bool, dict], str]  # of (messages, add_prompt, further variables)


def compile_template(source: str, variables: dict[str, Any], now: str) -> RenderTemplate:
    """Compiles the template to a function that renders a conversation."""
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class GenerationTag(jinja2.ext.Extension):
        """`{% generation %}`, by which some templates mark what the model says: renders its contents."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(
                parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
            )

    def refuse(message: object) -> None:
        raise TemplateRaised(str(message))

    def to_json(value: object, **options: Any) -> str:
        """Returns a value as JSON. As in transformers, `<` and letters beyond ASCII are not escaped."""
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag]
    )
    environment.filters["tojson"] = to_json
    environment.globals.pop("lipsum")
    environment.globals.update(
        raise_exception=refuse, strftime_now=datetime.datetime.fromisoformat(now).strftime
    )
    template = environment.from_string(source)

    def render(messages: list, add_prompt: bool, more: dict) -> str:
        inputs = {"messages": messages, "add_generation_prompt": add_prompt}
        context = template.new_context({"tools": None, "documents": None, **variables, **more, **inputs})
        parts = []
        size = 0
        for part in template.root_render_func(context):
            size += len(part.encode("utf-8", "surrogatepass"))
            if size > MAX_OUTPUT_BYTES:
                raise OutputTooLong
            parts.append(part)
        return "".join(parts)

    return render


class Renderer:
    """Replies to the lines of the parent: the first to compile the template, all others to render by it."""

    _render: RenderTemplate

    def compile(self, template: dict[str, Any]) -> dict[str, Any]:
        self._render = compile_template(**template)
        return {}

    def render(self, jobs: list, more: dict) -> dict[str, Any]:
        """Renders each job, which is [messages, add_prompt]."""
        return {"texts": [self._render(messages, add_prompt, more) for messages, add_prompt in jobs]}


def reply(work: Callable[..., dict[str, Any]], *args: Any) -> None:
    """Writes what `work` returns, or its failure, as one line. The kernel ends the process after
    MAX_SECONDS of computing.
    """
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    try:
        outcome = work(*args)
    except TemplateRaised as error:
        outcome = {"refused": str(error)[:300]}
    except OutputTooLong:
        outcome = {"failed": f"wrote more than {MAX_OUTPUT_BYTES:,} bytes"}
    except MemoryError:
        outcome = {"failed": "needed too much memory"}
    except RecursionError:
        outcome = {"failed": "calls itself without end"}
    except Exception as error:
        line = getattr(error, "lineno", None)
        at = f" (line {line} of the template)" if line else ""
        outcome = {"failed": f"failed with {type(error).__name__}: {str(error)[:300]}{at}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    line = json.dumps(outcome).encode() + b"\n"
    while line:
        line = line[os.write(1, line) :]


def main() -> None:
    start = json.loads(sys.stdin.readline())
    sys.path[:] = start.pop("path")
    importlib.import_module("jinja2.sandbox")  # before the limits: imports open files and take time

    renderer = Renderer()
    limit_resources()
    reply(renderer.compile, start)
    forbid_system_access()
    for line in sys.stdin:
        jobs, more = json.loads(line)
        reply(renderer.render, jobs, more)


if __name__ == "__main__":
    main()
