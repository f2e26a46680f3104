"""Flags of the server: the model and its adapters, the address, who may use it, and its slots."""

import dataclasses
import re
from pathlib import Path
from typing import Annotated

from tyro.conf import UseAppendAction

from stages.cli.flags import (
    DeviceFlag,
    DocumentsFlag,
    MeshFlag,
    ModelFlag,
    SamplingFlags,
    TemplateFlag,
    VerboseFlag,
    default,
    integer,
    model_names,
    number,
    one_of,
    parser,
    path,
    plain_name,
)

DTYPES = ("bfloat16", "float32", "int8")


def _origin(text: str) -> str:
    match = re.fullmatch(r"(https?://(?:[\w.-]+|\[[\da-f:.]+\]))(:\d+)?/?", text.strip().lower(), re.A)
    if not match:
        raise ValueError(
            f"wanted the origin of a page, such as https://app.example or http://localhost:3000, got {text!r}"
        )
    site, port = match.groups()
    own = ":443" if site.startswith("https") else ":80"
    if port in (None, own):  # a browser leaves its own out
        return site
    return site + port


def _root_path(text: str) -> str:
    root = text.strip().rstrip("/")
    if not re.fullmatch(r"(/[\w.~-]+)+", root, re.A):
        raise ValueError(f"wanted the path below which a proxy shows the server, such as /llm, got {text!r}")
    return root


def _header_name(text: str) -> str:
    name = text.strip().lower()
    if not re.fullmatch(r"[\w-]+", name, re.A):
        raise ValueError(f"wanted the name of a header, such as X-Forwarded-For, got {text!r}")
    return name


def _adapter(text: str) -> tuple[str, Path]:
    """Returns the name, empty without one, and the folder."""
    if not re.match(r"[\w.:-]+=", text, re.A):
        return "", path(text)
    name, _, folder = text.partition("=")
    return plain_name(name), path(folder)


@dataclasses.dataclass(frozen=True)
class ServeFlags:
    """The model, the address, the clients that are allowed, and how many requests at once."""

    model: ModelFlag = None
    adapter: Annotated[
        tuple[Annotated[tuple[str, Path], parser(_adapter, "[NAME=]FOLDER")], ...],
        UseAppendAction,
        default("none"),
    ] = ()
    """An adapter that a fine-tuning with --lora trained for this model. Requests name it as their model.
    Without a NAME it is part of the model. May be given more than once."""
    adapter_folder: Annotated[Path | None, parser(path, "FOLDER"), default("none")] = None
    """Clients with an API key may add and remove adapters that lie below this folder."""
    max_adapters: Annotated[
        int | None, parser(integer(1, 1024), "N"), default("those named, 8 with --adapter-folder")
    ] = None
    """Adapters with a NAME at once."""
    max_rank: Annotated[int, parser(integer(1, 1024), "N")] = 16
    """The largest rank of an adapter with a NAME."""
    template: TemplateFlag = None
    documents: DocumentsFlag = None
    sampling: SamplingFlags = dataclasses.field(default_factory=SamplingFlags)
    name: Annotated[str | None, parser(model_names, "NAME,..."), default("the model's")] = None
    """Names by which clients ask for the model; `default` always works too."""
    host: Annotated[str, parser(str, "ADDRESS")] = "127.0.0.1"
    """The address to listen on. One that others can reach needs an API key."""
    port: Annotated[int, parser(integer(0, 65535), "N")] = 8000
    """The port to listen on; 0 takes a free one."""
    api_key: Annotated[str | None, parser(str, "KEY,..."), default("THRICE_API_KEY, else none")] = None
    """Only clients that send one of these keys are answered. Others on this machine can read flags: the variable is better."""
    allow_host: Annotated[str | None, parser(str, "NAME,..."), default("this machine's own")] = None
    """More names under which clients may call the server."""
    allow_origin: Annotated[
        tuple[Annotated[str, parser(_origin, "URL")], ...], UseAppendAction, default("its own page")
    ] = ()
    """An origin whose pages may use the server: another site's, or a proxy's in front of it. May be given more than once."""
    root_path: Annotated[str, parser(_root_path, "PATH"), default("none")] = ""
    """The path below which a proxy shows the server, such as /llm, whether or not the proxy takes it off."""
    client_header: Annotated[str, parser(_header_name, "NAME"), default("none")] = ""
    """The header by which a proxy says whose request it passes on, such as X-Forwarded-For or X-Session-Id.
    It is believed, so name one that the proxy itself sets. Clients behind one address are then told apart."""
    open_metrics: Annotated[bool, default("off")] = False
    """/metrics needs no key: the endpoint picker of Kubernetes' gateway sends none."""
    slots: Annotated[int, parser(integer(1, 1024), "N")] = 8
    """Requests answered at the same time."""
    queue: Annotated[int, parser(integer(0, 100_000), "N")] = 32
    """Requests that may wait; more get a 429 with the time to try again. Half the places are kept for clients that heed it."""
    capacity: Annotated[
        int | None, parser(integer(2), "N"), default("the context, if half the free memory holds it")
    ] = None
    """Tokens of prompt and completion together."""
    weights: Annotated[
        str | None,
        one_of("file", "q4", *DTYPES),
        default("file on a CPU, else bfloat16"),
    ] = None
    """The type of the weights' matrices. `file`: a GGUF file's blocks as they are, all else int8.
    `int8`: 8 bits, where the kernels in C multiply them in blocks (Q8_0), else with a scale a column.
    `q4`: all else in blocks of 4 bits (Q4_0), embedding and head of 8."""
    keys_values: Annotated[str, one_of(*DTYPES)] = "bfloat16"
    """The type of the KV cache."""
    prefix_cache: Annotated[
        int | None, parser(integer(0), "MB"), default("as a slot takes, and at least 64")
    ] = None
    """Memory for the prefix cache: beginnings of prompts that come again. 0 turns it off."""
    no_speculative_decoding: Annotated[bool, default("off")] = False
    """No speculative decoding for a single request. Draft tokens change how fast a completion comes, never its tokens."""
    mesh: MeshFlag = None
    price: Annotated[float | None, parser(number(0), "X"), default("unknown")] = None
    """The price of this machine, in dollars an hour; the page shows what a conversation costs."""
    log: Annotated[str, one_of("off", "short", "json")] = "off"
    """A line on stdout for each request: its id, status, counts of tokens and times; never text or keys."""
    device: DeviceFlag = "auto"
    verbose: VerboseFlag = False
