"""The process in which a chat template runs: sandboxed, limited in time and memory, and locked once it is compiled.

A template comes with a model and is somebody else's program. The sandbox keeps it away from Python's insides, but a
single expression can still keep a library busy for hours or fill the memory, where no exception reaches it. A process
of its own can be ended whatever it does. It is started by `template.py`, by path, and knows nothing else of the project:
it reads a JSON document a line from descriptor 0 and answers each on descriptor 1.
"""

import datetime
import functools
import json
import signal
import sys
from collections.abc import Callable
from typing import Any

MEMORY = 512 * 2**20  # bytes of address space, Python's own included
SECONDS = 0.7  # of processor time an answer may take; the kernel ends the process after that
OUTPUT = 1_000_000  # bytes of UTF-8 a conversation may become

# What the audit hook refuses once the template is compiled. Rendering needs none of it.
FORBIDDEN = (
    "open", "import", "exec", "compile", "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "mmap.", "signal.",
    "time.sleep", "marshal.", "pickle.", "code.__new__", "function.__new__", "cpython.", "sys.set", "sys._getframe", "gc.",
)  # fmt: skip


class Refused(Exception):
    """The template called `raise_exception`: it does not want this conversation."""


class TooLong(Exception):
    """More than OUTPUT bytes were written."""


def limit() -> None:
    """Has the kernel bound memory, files and core dumps; the time of each answer is bounded in `answer`."""
    import resource

    for name, value in (("RLIMIT_AS", MEMORY), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0)):
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (ValueError, OSError, AttributeError):  # a system without this limit has the others
            continue


def lock() -> None:
    """Forbids this process to open, import, compile or start anything from here on."""

    def watch(event: str, _: Any) -> None:
        if event.startswith(FORBIDDEN):
            raise PermissionError(f"it tried to use {event}")

    sys.addaudithook(watch)


def compile_template(source: str, variables: dict[str, Any], now: str) -> Callable[[list, bool], str]:
    """Compiles the template to a function of messages and of whether an answer is to be begun."""
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}`, by which some templates mark what the model says: here it is its contents."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message: object) -> None:
        raise Refused(str(message))

    def as_json(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False} | options)

    moment = datetime.datetime.fromisoformat(now)
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = as_json
    environment.globals.pop("lipsum")
    environment.globals.update(raise_exception=refuse, strftime_now=moment.strftime)
    template = environment.from_string(source)
    variables = {"tools": None, "documents": None, **variables}

    def render(messages: list, prompt: bool) -> str:
        context = template.new_context({**variables, "messages": messages, "add_generation_prompt": prompt})
        parts, size = [], 0
        for part in template.root_render_func(context):
            size += len(part.encode("utf-8", "surrogatepass"))
            if size > OUTPUT:
                raise TooLong
            parts.append(part)
        return "".join(parts)

    return render


def answer(work: Callable[[], dict[str, Any]]) -> bytes:
    """Returns what `work` gives, or what went wrong in it, as one line; ended by the kernel after SECONDS of computing."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        reply = work()
    except Refused as error:
        reply = {"refused": str(error)[:300]}
    except TooLong:
        reply = {"failed": f"wrote more than {OUTPUT:,} bytes"}
    except MemoryError:
        reply = {"failed": "needed too much memory"}
    except RecursionError:
        reply = {"failed": "calls itself without end"}
    except Exception as error:
        line = getattr(error, "lineno", None)
        at = f" (line {line} of the template)" if line else ""
        reply = {"failed": f"failed with {type(error).__name__}: {str(error)[:300]}{at}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return json.dumps(reply).encode() + b"\n"


def render_jobs(render: Callable[[list, bool], str], jobs: list) -> dict[str, Any]:
    """Renders several (messages, whether an answer is to be begun)."""
    return {"texts": [render(messages, prompt) for messages, prompt in jobs]}


def main() -> None:
    with open(0, "rb") as requests, open(1, "wb") as replies:

        def reply(line: bytes) -> None:
            replies.write(line)
            replies.flush()

        start = json.loads(requests.readline())
        sys.path[:] = start["path"]
        import jinja2.sandbox  # noqa: F401  before the limits: imports open files and take time

        reply(b"{}\n")
        limit()
        renders: list[Callable[[list, bool], str]] = []

        def make() -> dict[str, Any]:
            renders.append(compile_template(start["source"], start["variables"], start["now"]))
            return {}

        reply(answer(make))
        lock()
        for line in requests:
            reply(answer(functools.partial(render_jobs, renders[0], json.loads(line))))


if __name__ == "__main__":
    main()
