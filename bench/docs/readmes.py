"""Writes what READMEs take from elsewhere: the tree of each room, tables of results, pictures. `python -m bench.docs.readmes`.

A block stands between `<!-- NAME of SOURCE -->` and `<!-- end -->`. NAME is one of BLOCKS; SOURCE
is a document, such as `bench.json`, or what the block is computed from. A document is that of the
machine that `shown_machine` chooses, or of a folder that the command names: `python
-m bench.docs.readmes FOLDER`. A SOURCE with a folder, such as `tries/promises.json`, lies in RESULTS.
"""

import ast
import contextlib
import csv
import functools
import io
import itertools
import json
import math
import operator
import re
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

from bench.cli import ROOT
from bench.plan import plans, validate
from bench.plan.__main__ import PlanFlags, answer
from bench.serving.__main__ import latencies, speeds
from bench.sitting import Document, read_documents
from bench.stages.report import write_pictures
from bench.timing import Ratio
from engine.format import money, percent, quantity, si, times
from tests.law_table import LAWS, marked_tests
from tests.promises.figures import Figure

RESULTS = ROOT / "bench" / "results"
TRIES = RESULTS / "tries"  # of no machine
PICTURES = ROOT / "bench" / "pictures"
PICTURED = "bench.json"
ROOMS = ("engine", "stages", "stages/serve", "bench", "bench/plan", "tests", "tests/promises")
READMES = [ROOT / "README.md", *(ROOT / room / "README.md" for room in ROOMS), RESULTS / "README.md"]
TREE = re.compile(r"```tree\n.*?```\n", re.DOTALL)
BLOCK = re.compile(r"(<!-- (\S+) of (\S+) -->\n).*?(<!-- end -->\n)", re.DOTALL)
COLUMN = 26
# Rows of the stage table, by name, and as the first table of the README calls them: their passes,
# and the weights that change.
SUMMARY = {
    "pre-training step": ("training", "forward and backward", "all"),
    "LoRA rank 8 on q and v": (
        "fine-tuning with LoRA",
        "forward, and backward to the adapters",
        "the adapters",
    ),
    "evaluation forward": ("inference", "forward", "none"),
}
EXCERPT = (
    "pre-training step",
    "bottom half frozen",
    "LoRA rank 8 on q and v",
    "evaluation forward",
    "prefix-cache hit",
    "decode alone",
    "decode with 8 slots",
    "decode with 32 slots",
)
CHAT = "ordinary_speculative"  # the row that the README shows
SIZE_ROWS = ("prefill_512", "decode_1", "decode_8")
PRINTED, SAMPLED = (
    ("predicted", "validation", "trained"),
    3,
)  # lines of a training run and of its sample that the README shows
TUNED = {  # and of the commands after it
    "stages.finetune": ("held out", "forgotten", "kept", "trained"),
    "stages.evaluate": ("nats per token",),
    "stages.export": ("loss",),
    "stages.serve": ("ready after",),
}
PROMISES = {  # what is tried at length
    "S1": "The same request gives the same bits, whoever else is there.",
    "S2": "No request sees another's text.",
    "S3": "Serving changes no weight, and no route could.",
    "S4": "A disconnect frees its slot.",
    "S5": "Overload is refused at once, and costs hardly any throughput.",
    "S6": "No request compiles, breaks or blocks anything.",
    "S7": "Tokenizing is linear: a megabyte in a second.",
    "S8": "SIGTERM lets running requests finish.",
    "S9": "/health replies 503 once the engine hangs, and not while it takes long; "
    "the first run of a program may take 60 s.",
    "S10": "OpenAI's own client works, and so does every request that our OpenAPI allows.",
    "S11": "A short prompt beside long ones has its first token soon.",
    "S12": "A large request is not starved by small ones.",
    "S16": "Who waits as Retry-After says is served before who does not.",
    "S17": "A request gets what it gets alone, under any schedule on a simulated device.",
    "S18": "Any replica answers with the same bits, so that a router's retry loses nothing.",
    "F2": "A request is billed what its own tokens cost, and all bills are what the programs computed.",
    "X3": "Every route but the page, liveness and health needs the key.",
    "X4": "A page of another site cannot use a local server.",
    "X5": "A start unpickles nothing, runs nothing foreign and opens no connection.",
    "T1": "A kill at any instant leaves whole checkpoints only.",
    "T2": "A damaged newest checkpoint is named, and the one before it is used.",
    "T3": "A resumed run is the uninterrupted one to the bit.",
    "T5": "Ctrl-C, SIGTERM and a closed terminal save, in any phase.",
    "T7": "The same configuration gives the same bits.",
    "T8": "A full, broken or read-only disk is reported, and harms no older checkpoint.",
    "T9": "One of several processes dies: all end, and the same command resumes.",
    "T11": "Saving runs beside training.",
    "T14": "Memory stays within the plan.",
}


def written(readme: Path, folder: Path | None = None) -> str:
    """Returns a README with its trees and blocks as they should be, by the documents of a machine's
    folder; by default of the one that READMEs show.
    """
    machine = folder or shown()
    text = TREE.sub(lambda _: tree(readme.parent), readme.read_text())
    return BLOCK.sub(lambda match: match[1] + block(match[2], match[3], machine) + match[4], text)


@functools.cache
def shown() -> Path:
    """Returns the folder of the machine that READMEs show."""
    sources: set[str] = set()
    for readme in READMES:
        sources.update(source for _, _, source, _ in BLOCK.findall(readme.read_text()))
    return shown_machine({source for source in sources if source.endswith(".json") and "/" not in source})


def machines(results: Path = RESULTS) -> list[Path]:
    """Returns the folder of each machine, by name."""
    folders = {path.parent for path in results.glob("*/*.json")}
    return sorted(folders - {TRIES})


def shown_machine(names: Collection[str], results: Path = RESULTS) -> Path:
    """Returns the newest folder that has every document of `names`; where none has, the newest of
    those that lack the fewest. A folder is as old as its oldest document.
    """

    def rank(folder: Path) -> tuple[int, str]:
        documents = read_documents(folder)
        there = sum(name in documents for name in names)
        return there, min(document["date"] for document in documents.values())

    return max(machines(results), key=rank)


def sh_commands(readme: Path) -> list[list[str]]:
    """Lists what follows `python` in each line of a README's sh blocks."""
    lines = [
        line
        for block in re.findall(r"```sh\n(.*?)```", readme.read_text(), re.S)
        for line in block.splitlines()
    ]
    words = [shlex.split(line, comments=True) for line in lines if " python " in line]
    return [line[line.index("python") + 1 :] for line in words]


def tree(room: Path) -> str:
    """Returns a line for each file in Python or C of a room: its name and what it opens with. A
    room in it has its own.
    """
    return "```tree\n" + "".join(f"{line}\n" for line in _lines(room, room, 0)) + "```\n"


def _lines(folder: Path, room: Path, depth: int) -> Iterator[str]:
    inner = [path for path in folder.iterdir() if path.is_dir() and any(path.rglob("*.py"))]
    for path in sorted(
        [*folder.glob("*.py"), *folder.glob("*.[ch]"), *inner], key=lambda path: (path.is_dir(), path.name)
    ):
        if path.name in ("__init__.py", "__pycache__", "conftest.py"):
            continue
        start = f"{'  ' * depth}{path.name}{'/' * path.is_dir()}"
        module = path / "__init__.py" if path.is_dir() else path
        opening: str | None = None
        if path.suffix in (".c", ".h"):
            (sentence,) = re.findall(r"\A// (.*?)[.:]\s", path.read_text())
            opening = f"{sentence}."
        elif module.exists():
            opening = ast.get_docstring(ast.parse(module.read_text()))
        yield f"{start:<{COLUMN}} {(opening or '').partition(chr(10))[0]}".rstrip()
        if path.is_dir() and str(path.relative_to(ROOT)) not in ROOMS:
            yield from _lines(path, room, depth + 1)


def block(name: str, source: str, machine: Path) -> str:
    """Returns the text of a block, or a sentence when the machine has no such document yet."""
    path = RESULTS / source if "/" in source else machine / source
    document: Document = {}
    if path.suffix == ".json":
        if not path.exists():
            return f"`{source}` is still to be measured.\n"
        document = json.loads(path.read_text())
    return "".join(f"{line}\n" for line in BLOCKS[name](document))


def table(header: str, rows: Iterable[Iterable[str]], words: Collection[int] = (0,)) -> list[str]:
    """Returns a table of Markdown; `header` names its columns, of which `words` are not of numbers."""
    columns = header.split("|")
    rule = "|".join("---" if place in words else "---:" for place in range(len(columns)))
    return ["| " + " | ".join(columns) + " |", f"|{rule}|", *("| " + " | ".join(row) + " |" for row in rows)]


def conditions(document: Document, rounds: int | None = None) -> list[str]:
    """Returns a sentence on the machine, the day and the state in which a document was measured, in
    so many rounds at least.
    """
    machine, load = document["machine"], document["load"]
    kind = next(
        (words for flag, words in INSTRUCTIONS.items() if flag in machine["instructions"].split()), ""
    )
    medians = ""
    if rounds:
        medians = f", medians of {rounds} interleaved rounds or more"
    processes = document.get("processes", 1)
    if processes > 1:
        medians += f", of {processes} processes"
    if document["flags"].get("quick", False):
        medians += ", with `--quick`"
    model = ""
    numbers = machine.get("model_numbers")
    if numbers:
        model = f" (family {numbers['cpu family']}, model {numbers['model']})"
    name = f"{machine['cores']} cores of an {machine['processor']}{model}{kind}"
    lines = [f"{name}, {document['date'][:10]}{medians}."]
    moments = [machine.get("reached_before"), machine.get("reached_after")]
    lines += describe_ceilings([moment for moment in moments if moment])
    others = machine.get("taken_by_others")
    if others is not None:
        lines.append(f"Others took {percent(others)} of the cores' time.")
    if load > machine["cores"] / 4:
        lines.append(f"Others used {min(load, machine['cores']):.1f} of them: trust the ratios alone.")
    return ["", *lines]


def describe_ceilings(moments: Sequence[Document]) -> list[str]:
    """Returns what a machine reached at several moments, in sentences; none for no moment."""
    if not moments:
        return []
    rates = {
        rate: " and ".join(f"{moment[rate]:,.0f}" for moment in moments)
        for rate in ("bf16_gflops", "f32_gflops", "int8_gflops", "read_gbs")
    }
    return [
        f"Before and after, its products reached {rates['bf16_gflops']} GFLOP/s in bfloat16, "
        f"{rates['f32_gflops']} in float32, {rates['int8_gflops']} in int8.",
        f"It read {rates['read_gbs']} GB/s.",
    ]


INSTRUCTIONS = {
    "amx_bf16": " with AMX",
    "avx512_bf16": " with AVX-512 and bfloat16",
    "avx512f": " with AVX-512",
    "avx2": " with AVX2",
}


def ratio(row: Document) -> str:
    """Returns a ratio with its interval."""
    return str(Ratio.of(row))


def held(met: bool | None, bar: str) -> str:
    return bar + {True: "", False: ": **not met**", None: ": undecided"}[met]


def summary(document: Document) -> list[str]:
    rows = {row["name"]: row for row in document["rows"]}
    cells = [(*words, *_ratios(rows[name])) for name, words in SUMMARY.items()]
    alone, full = (
        f"{rows[name]['time_ratio_to_forward']:.0f}" for name in ("decode alone", "decode with 32 slots")
    )
    return [
        *table("|passes|weights that change|operations|time", cells, (0, 1, 2)),
        "",
        "× is a token's cost in a forward pass over 2,048 known ones. A token that is generated takes "
        f"{full} to {alone} times as long.",
    ]


def stages(document: Document) -> list[str]:
    """Returns the stage table."""
    cells = []
    for row in document["rows"]:
        cost = (
            si(row["seconds_per_token"], "s"),
            si(row["peak_bytes"], "B"),
            money(row["usd_per_million_tokens"]),
        )
        cells.append([row["name"], row["weights"], *_ratios(row), *cost])
    model = document["model"]
    about = (
        f"`{model['name']}` with {si(model['params'], '')} random weights, products in {model['dtype']}, "
        f"{model['batch']} x {model['context']} tokens"
    )
    lines = table("|weights|operations|time|time a token|peak|$ a million tokens", cells, (0, 1))
    return [
        *lines,
        *conditions(document, document["rounds"]),
        f"{about}, {money(document['price_per_hour'])} an hour.",
    ]


def counters(document: Document) -> list[str]:
    """Returns in which rows the three counters differ, and why."""
    names: dict[str, list[str]] = {}
    for row in document["rows"]:
        if row["counters_differ"]:
            names.setdefault(row["counters_differ"], []).append(row["name"])
    return [f"- {', '.join(rows)}: {why}" for why, rows in names.items()]


def excerpt(document: Document) -> list[str]:
    return stages(document | {"rows": [row for row in document["rows"] if row["name"] in EXCERPT]})


def _ratios(row: Document) -> tuple[str, str]:
    return times(row["flop_ratio_to_forward"]), times(row["time_ratio_to_forward"])


def claims(document: Document) -> list[str]:
    """Returns every claim, with its verdict before it and behind it the figures that decide."""
    sentence = lambda words: words[0].upper() + words[1:]
    cells = []
    for each in document["claims"]:
        cells.append((f"**{sentence(each['verdict'])}**", each["claim"], sentence(each["value"])))
    return table("verdict|claim|measured", cells, range(3)) + conditions(document)


def verdicts(document: Document) -> list[str]:
    """Returns six claims, each whole, with its verdict and the figure that decides it."""
    by_claim = {each["claim"]: each for each in document["claims"]}
    half = by_claim["Inference is only half the computation of training."]
    layers = by_claim["Fine-tuning is cheaper because only some layers are updated."]
    learns = by_claim["The model improves as you use it."]
    cache = by_claim["The KV cache decides what serving costs."]
    batch = by_claim["Batching decides what serving costs."]
    bits = by_claim["Quantisation decides what serving costs."]
    saved = {part: percent(1 - share["flops"]) for part, share in layers["numbers"].items()}
    without_cache = times(cache["numbers"]["off_over_on"]["ratio"])
    alone = times(batch["numbers"]["off_over_on"]["ratio"])
    int8 = times(bits["numbers"]["off_over_on"]["8"]["ratio"])
    figures = [
        (half, f"it is {percent(half['numbers']['flops'])} of it"),
        (layers, f"a frozen bottom half saves {saved['bottom']} of operations, a top half {saved['top']}"),
        (learns, f"{learns['value'].partition(' ')[0]} generated tokens changed no bit"),
        (cache, f"without it a token takes {without_cache} as long"),
        (batch, f"alone a token takes {alone} as long"),
        (bits, f"int8 tokens come {int8} as fast"),
    ]
    lines = []
    for claim, figure in figures:
        verdict = claim["verdict"].partition(":")[0].removesuffix(" on this machine")
        lines.append(f"- “{claim['claim'].removesuffix('.')}”: {verdict}; {figure}.")
    return lines


def printed(document: Document) -> list[str]:
    """Returns what the default training run printed of its prediction, its sample and its result."""
    lines = [line.strip() for line in document["printed"]]
    shown = [next(line for line in reversed(lines) if line.split()[:1] == [word]) for word in PRINTED]
    sample = [
        line for line in lines[lines.index("what it writes") + 1 :] if line.startswith("| ") and line != "|"
    ][:SAMPLED]
    return ["```", "$ stages.train", "...", shown[0], *sample, *shown[1:], "```", *conditions(document)]


def tuned(document: Document) -> list[str]:
    """Returns what fine-tuning, evaluating, exporting and serving printed of their results."""
    shown = []
    for command, words in TUNED.items():
        lines = document["printed"][command]
        shown.append(f"$ {command}")
        shown += (
            next(re.split(r" of what| \(", line)[0] for line in lines if line.startswith(word))
            for word in words
        )
    return ["```", *shown, "```", *conditions(document)]


def answered(document: Document) -> list[str]:
    """Returns the message of the server's answer."""
    said = document["answer"]["choices"][0]["message"]
    message = {name: said[name] for name in said if name in ("role", "content")}
    return ["```", '{... "message": ' + json.dumps(message, ensure_ascii=False) + " ...}", "```"]


def commands(document: Document) -> list[str]:
    cells = [
        (
            row["name"],
            f"{row['value']:.3g} {row['unit']}".strip(),
            held(row["met"], f"at most {row['bar']:g}"),
        )
        for row in document["rows"]
    ]
    return [*table("|measured|held to", cells), *conditions(document)]


def step(document: Document) -> list[str]:
    """Returns the ways of a step: its speed, over the first way, and as a share of this machine's
    fastest product.
    """
    cells, rounds = [], 0
    for shape in document["shapes"]:
        for place, row in enumerate(shape["rows"]):
            name = f"{shape['shape']}, {row['name']}"
            over, rounds = "" if place == 0 else ratio(row["over_first"]), row["of_matmul"]["rounds"]
            cells.append(
                [
                    name,
                    f"{row['tokens_per_second']:,.0f}",
                    f"{row['gflops']:,.0f}",
                    over,
                    ratio(row["of_matmul"]),
                ]
            )
    header = (
        "layers x width x tokens x batch|tokens/s|GFLOP/s|time over the first|share of the fastest product"
    )
    return [*table(header, cells), *conditions(document, rounds)]


def peers(document: Document) -> list[str]:
    """Returns our speed beside each peer's."""
    cells = []
    names = sorted({row.get("peer", "peer") for row in document["rows"]})
    formats = {row.get("format") for row in document["rows"]}
    for row in document["rows"]:
        bar = held(Ratio.of(row).exceeds(row["bar"]), f"{row['bar']:g}") if row["bar"] else ""
        name = row["name"].replace("_", " ")
        if len(formats) > 1:
            name += f", {row['format']}"
        if len(names) > 1:
            name += f", {row['peer']}"
        if "over_plain" in row:
            plain = Ratio(**row["over_plain"])
            name += f", {plain} of plain ({held(plain.exceeds(row['over_plain_bar']), f'at least {row["over_plain_bar"]:g}')})"
        theirs = f"{row['peer_tokens_per_second']:,.0f}" if row["peer_tokens_per_second"] else "not installed"
        cells.append([name, f"{row['tokens_per_second']:,.0f}", theirs, ratio(row), bar])
    peer = names[0] if len(names) == 1 else "peer"
    return [
        *table(f"tokens a second|Thrice|{peer}|ratio, 95% interval|at least", cells),
        *conditions(document, min(row["rounds"] for row in document["rows"])),
        *compared_with(document),
    ]


MKL_ANSWER = "mkl_as_on_intel"  # the library of bench.peers.mkl, in how torch says it was loaded


def compared_with(document: Document, names_files: bool = True) -> list[str]:
    """Returns the files that both sides read, unless a table names them, and the versions of each,
    where a document says them.
    """
    lines = []
    files = {f"`{row['file']}`: {row['kinds']}": None for row in document["rows"] if "file" in row}
    if files and names_files:
        lines.append(f"Both read {'; '.join(files)}.")
    settings: dict[str, None] = {}
    for row in document["rows"]:
        settings |= dict.fromkeys(map(describe_setting, row.get("peer_settings", ())))
    if settings:
        lines.append(f"The peer ran in its fastest setting of each row: {'; '.join(settings)}.")
    for peer in document.get("peers", ()):
        theirs = ", ".join(f"{name} {version}" for name, version in peer["versions"].items())
        lines.append(f"The peer is {theirs}; Thrice runs on jax {document['versions']['jax']}.")
        if peer["build"] and "\n" not in peer["build"]:  # torch's has forty lines
            lines.append(f"It is built with `{' '.join(peer['build'].split())}`.")
        if MKL_ANSWER in peer["build"]:
            lines.append("MKL was told that the processor is Intel's.")
    return lines


def describe_setting(setting: Document) -> str:
    """Returns a setting of llama.cpp in words."""
    flash = "with" if setting["flash_attention"] else "without"
    return f"{flash} flash attention on {setting['threads']} threads"


def sizes(_: Document) -> list[str]:
    """Returns, for each machine that has them, ratios to llama.cpp's speed by size and format."""
    lines: list[str] = []
    for folder in machines():
        document = read_documents(folder).get("peers-sizes.json")
        if not document:
            continue
        by_file: dict[tuple[str, str], Document] = {}
        for row in document["rows"]:
            name = f"{row['model']}{', random weights' * row['random']}"
            by_file.setdefault((name, row["format"]), {})[row["name"]] = row
        cells = []
        for (name, kind), rows in by_file.items():
            ratios = [ratio(rows[each]) for each in SIZE_ROWS]
            tokens = [f"{rows[each]['tokens_per_second']:,.0f}" for each in SIZE_ROWS]
            cells.append([name, f"{kind}: {rows[SIZE_ROWS[0]]['kinds']}", *ratios, " / ".join(tokens)])
        if lines:
            lines.append("")
        lines += table(
            f"{folder.name}|format|prefill 512|1 stream|8 streams|our tokens a second", cells, (0, 1)
        )
        lines += [
            *conditions(document, min(row["rounds"] for row in document["rows"])),
            *compared_with(document, names_files=False),
        ]
    return lines or ["No machine has this yet."]


def compared(_: Document) -> list[str]:
    """Returns five ratios of each machine's speed to its peers': of training, to the faster torch."""
    cells = []
    for folder in machines():
        documents = read_documents(folder)
        training = documents.get("peers.json", {"rows": []})["rows"]
        streams = documents.get("peers-serving.json", {"rows": []})["rows"]
        groups = [
            [row for row in training if row["name"].endswith(dtype)] for dtype in ("bfloat16", "float32")
        ]
        for name in ("prefill_512", "decode_1", "decode_8"):
            groups.append([row for row in streams if row["name"] == name])
        ratios = []
        for rows in groups:
            measured = [row for row in rows if row["ratio"] is not None]
            if measured:
                slowest = min(measured, key=_over_peer)
                formats = [slowest["format"]] if "format" in slowest else []
                ratios.append(", ".join([ratio(slowest), *formats]))
            else:
                ratios.append("")
        cells.append((f"[{folder.name}]({folder.name})", *ratios))
    return table("|training, bfloat16|training, float32|prefill 512|1 stream|8 streams", cells)


def _over_peer(row: Document) -> float:
    return row["tokens_per_second"] / row["peer_tokens_per_second"]


def serving(document: Document) -> list[str]:
    """Returns latencies of the server under load, and how much of its engine's throughput it keeps."""
    header = "load|tokens/s|time to first token, p50|inter-token latency, p50|time per output token, p50"
    scored = document["scored"]
    rate = Ratio.of(scored).format("{:.0f}".format)
    compared = [(*speeds(row), held(row["met"], f"{row['bar']:g}")) for row in document["rows"]]
    return [
        *table(header, map(latencies, document["under_load"])),
        "",
        *table("tokens a second|with|without|ratio, 95% interval|at least", compared),
        "",
        f"The server is ready after {document['ready_seconds']:.1f} s "
        f"({held(document['ready_met'], f'at most {document["ready_bar"]:g} s')}).",
        f"`/v1/score` scores {rate} candidates of four tokens a second, after 256 that are cached "
        f"({held(scored['met'], f'at least {scored["bar"]:g}')}).",
        *conditions(document)[1:],
    ]


def chat(document: Document) -> list[str]:
    """Returns the speed of a single stream of chat beside llama.cpp's, in a sentence."""
    (row,) = (row for row in document["rows"] if row["name"] == CHAT)
    kind = row.get("format", "Q4_1")  # of documents that do not say it
    return [
        f"A chat with SmolLM2-135M, from the same {kind} file, has {ratio(row)} times llama.cpp's "
        "tokens a second: ours with speculation, llama.cpp's without."
    ]


def one_stream(document: Document) -> list[str]:
    """Returns the least and the most of the ratios of one stream over models and formats."""
    rows = [row for row in document["rows"] if row["name"] == "decode_1"]
    models = {row["model"] for row in rows}
    random = {row["model"] for row in rows if row["random"]}
    formats = {row["format"] for row in rows}
    ratios = [row["ratio"] for row in rows]
    return [
        f"One stream without speculation has {min(ratios):.2f} to {max(ratios):.2f} times, over "
        f"{quantity(len(models), 'model')}, {len(random)} of them with random weights, in "
        f"{quantity(len(formats), 'format')}."
    ]


def plan(_: Document) -> list[str]:
    """Returns what the planner says of the first question of its README."""
    flags = PlanFlags(model="llama-3.2-1b", tokens="100B", hardware="h100", devices=8)
    with contextlib.redirect_stdout(io.StringIO()):
        asked = answer(flags)
    return table("|||", plans.cells(asked), (0, 3))


def tries(_: Document) -> list[str]:
    """Returns what each way to fine-tune the default preset came to, at the best of the learning
    rates that were tried.
    """
    best: dict[tuple[str, str], dict[tuple[str, str], float]] = {}
    with (TRIES / "finetuning.csv").open(encoding="utf-8") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if row["model"].startswith("the default") and row["tokens"] == "122880"
        ]
    for row in sorted(rows, key=lambda row: int(row["batch"])):
        way = best.setdefault(
            (row["trained"] + f", rank {row['rank']}" * bool(row["rank"]), row["batch"]), {}
        )
        data = row["data"], row["seed"]
        way[data] = min(way.get(data, math.inf), float(row["bits_per_byte"]))
    columns = [(data, seed) for data in ("voice", "python") for seed in "01"]
    cells = [
        (*way, *(f"{bits[data]:.3f}" if data in bits else "" for data in columns))
        for way, bits in best.items()
    ]
    return table("trained|batch|`voice`, seed 0|seed 1|Python's source, seed 0|seed 1", cells)


def rewarded(_: Document) -> list[str]:
    """Returns the held-out reward that each variant of GRPO came to, by seed, and what it says."""
    with (TRIES / "reinforcement.csv").open(encoding="utf-8") as file:
        tries = [*csv.DictReader(file)]
    by_variant = itertools.groupby(tries, operator.itemgetter("variant"))
    cells = []
    for variant, rows in by_variant:
        first, second = sorted(rows, key=operator.itemgetter("seed"))
        cells.append(
            (variant or "as it is", first["held_out_reward"], second["held_out_reward"], first["note"])
        )
    return table("|seed 0|seed 1|", cells, (0, 3))


def validated(_: Document) -> list[str]:
    """Returns how far the planner is off what was published."""
    return table("predicted|rows|median error|inside the interval", validate.cells(validate.validation()))


def laws(_: Document) -> list[str]:
    """Returns the laws, and for each the tests that hold it by day, and those at night."""
    cells = []
    for law, sentence in LAWS.items():
        by_time: dict[bool, list[str]] = {False: [], True: []}
        for test in marked_tests():
            if test.law == law:
                by_time[test.runs_at_night].append(f"[{test.name}]({test.path.as_posix()})")
        cells.append((f"**{law}**", sentence, "<br>".join(by_time[False]), "<br>".join(by_time[True])))
    return table("|the law|by day|at night", cells, range(4))


def serves(document: Document) -> list[str]:
    """Returns the promises of serving."""
    return _promises(document, "FSX")


def trains(document: Document) -> list[str]:
    """Returns the promises of training."""
    return _promises(document, "T")


def _promises(document: Document, kinds: str) -> list[str]:
    """Returns a row for each trial of a promise that has figures, and one for all the others of a
    promise.
    """
    rows = [row for row in document["rows"] if row["promise"][0] in kinds]
    trials: dict[tuple[str, ...], int] = {}  # how often the same came of the same
    for row in rows:
        figures = "; ".join(str(Figure(**figure)) for figure in row["figures"])
        over = row["over"] + ", with --quick" * row["quick"]
        if figures:
            on = row["date"] + "*" * (row["commit"] is None)
            trial = (row["promise"], figures + ": **not kept**" * (not row["kept"]), over, on)
            trials[trial] = trials.get(trial, 0) + 1
    cells: list[tuple[str, ...]] = []
    for (name, figures, over, on), count in trials.items():
        if count > 1:
            over = f"{count} times {over}"
        cells.append((name, figures, over, on))
    for name, others in itertools.groupby(
        (row for row in rows if not row["figures"]), operator.itemgetter("promise")
    ):
        kept = [row["kept"] for row in others]
        cells.append((name, f"{sum(kept)} of {len(kept)} cases", "", rows[-1]["date"]))
    order = [*PROMISES]
    cells = [
        (name, PROMISES[name], *rest) for name, *rest in sorted(cells, key=lambda cell: order.index(cell[0]))
    ]
    return table("|promise|measured|tried with|on", cells, range(5))


BLOCKS: dict[str, Callable[[Document], list[str]]] = {
    each.__name__: each
    for each in (
        summary,
        excerpt,
        stages,
        counters,
        claims,
        verdicts,
        printed,
        tuned,
        answered,
        commands,
        step,
        peers,
        compared,
        sizes,
        serving,
        chat,
        one_stream,
        plan,
        tries,
        rewarded,
        validated,
        laws,
        serves,
        trains,
    )
}


if __name__ == "__main__":
    machine = Path(sys.argv[1]) if sys.argv[1:] else shown()
    for readme in READMES:
        readme.write_text(written(readme, machine))
    write_pictures(PICTURES, json.loads((machine / PICTURED).read_text()))
