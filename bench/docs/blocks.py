"""What READMEs take from documents: each block's lines of Markdown, by the name of a function in BLOCKS."""

import contextlib
import csv
import io
import itertools
import json
import math
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from operator import methodcaller

from bench.docs.machines import TRIES, Document, machines, read_documents
from bench.plan import plans, validate
from bench.plan.__main__ import PlanFlags, answer
from bench.serving.__main__ import latencies, speeds
from bench.sources import describe_origin
from bench.timing import Ratio
from engine.format import money, percent, quantity, si, times
from tests.law_table import LAWS, marked_tests
from tests.promises.figures import Figure

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
# Lines of a training run that the README shows, and how many of its sample.
PRINTED = ("predicted", "validation", "trained")
SAMPLED = 3
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


def table(header: str, rows: Iterable[Iterable[str]], words: Collection[int] = (0,)) -> list[str]:
    """Returns a table of Markdown; `header` names its columns, of which `words` are not of numbers."""
    columns = header.split("|")
    rules = ["---:"] * len(columns)
    for place in words:
        rules[place] = "---"
    lines = [f"| {' | '.join(columns)} |", f"|{'|'.join(rules)}|"]
    for row in rows:
        lines.append(f"| {' | '.join(row)} |")
    return lines


def conditions(document: Document, rounds: int | None = None) -> list[str]:
    """Returns sentences on the machine, the day, the commit and the state in which a document was
    measured, in so many rounds at least.
    """
    machine = document["machine"]
    load = document["load"]
    medians = ""
    if rounds:
        medians = f", medians of {rounds} interleaved rounds or more"
    processes = document.get("processes", 1)
    if processes > 1:
        medians += f", of {processes} processes"
    if document["flags"].get("quick", False):
        medians += ", with `--quick`"
    lines = [f"{describe_processor(machine)}, {describe_origin(document)}{medians}."]
    moments = [machine.get("reached_before"), machine.get("reached_after")]
    lines += describe_ceilings([moment for moment in moments if moment])
    others = machine.get("taken_by_others")
    if others is not None:
        lines.append(f"Others took {percent(others)} of the cores' time.")
    if load > machine["cores"] / 4:
        lines.append(f"Others used {min(load, machine['cores']):.1f} of them: trust the ratios alone.")
    return ["", *lines]


def describe_processor(machine: Document) -> str:
    """Returns the cores, name, model and best instructions of a machine."""
    kind = describe_instructions(machine["instructions"].split())
    model = ""
    numbers = machine.get("model_numbers")
    if numbers:
        model = f" (family {numbers['cpu family']}, model {numbers['model']})"
    return f"{machine['cores']} cores of an {machine['processor']}{model}{kind}"


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


def describe_instructions(flags: Collection[str]) -> str:
    """Returns the best instructions of a processor that INSTRUCTIONS knows; empty without any."""
    for flag, words in INSTRUCTIONS.items():
        if flag in flags:
            return words
    return ""


def ratio(row: Document) -> str:
    """Returns a ratio with its interval."""
    return str(Ratio.of(row))


VERDICTS = {True: "", False: ": **not met**", None: ": undecided"}


def held(met: bool | None, bar: str) -> str:
    """Returns a bar, and whether it is met."""
    return bar + VERDICTS[met]


def summary(document: Document) -> list[str]:
    """Returns a row for each of the three stages, and what a token that is generated takes."""
    rows = {row["name"]: row for row in document["rows"]}
    cells = [(*words, *_ratios(rows[name])) for name, words in SUMMARY.items()]
    alone = f"{rows['decode alone']['time_ratio_to_forward']:.0f}"
    full = f"{rows['decode with 32 slots']['time_ratio_to_forward']:.0f}"
    return [
        *table("|passes|weights that change|operations|time", cells, (0, 1, 2)),
        "",
        "× is a token's cost in a forward pass over 2,048 known ones. A token that is generated takes "
        f"{alone} times as long alone, and {full} times among 32 requests.",
        *conditions(document, document["rounds"])[1:],
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
    """Returns the EXCERPT of the stage table."""
    rows = [row for row in document["rows"] if row["name"] in EXCERPT]
    return stages(document | {"rows": rows})


def _ratios(row: Document) -> tuple[str, str]:
    return times(row["flop_ratio_to_forward"]), times(row["time_ratio_to_forward"])


def claims(document: Document) -> list[str]:
    """Returns every claim, with its verdict before it and behind it the figures that decide."""
    cells = []
    for each in document["claims"]:
        cells.append((f"**{_sentence(each['verdict'])}**", each["claim"], _sentence(each["value"])))
    return table("verdict|claim|measured", cells, range(3)) + conditions(document)


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:]


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
    shown = []
    for word in PRINTED:
        shown.append([line for line in lines if line.split()[:1] == [word]][-1])
    written_text = lines[lines.index("what it writes") + 1 :]
    sample = [line for line in written_text if line.startswith("| ")]
    first, *others = shown
    return ["```", "$ stages.train", "...", first, *sample[:SAMPLED], *others, "```", *conditions(document)]


def tuned(document: Document) -> list[str]:
    """Returns what fine-tuning, evaluating, exporting and serving printed of their results."""
    shown = []
    for command, words in TUNED.items():
        lines = document["printed"][command]
        shown.append(f"$ {command}")
        for word in words:
            line = next(filter(methodcaller("startswith", word), lines))
            shown.append(re.split(r" of what| \(", line)[0])
    return ["```", *shown, "```", *conditions(document)]


def answered(document: Document) -> list[str]:
    """Returns the message of the server's answer."""
    said = document["answer"]["choices"][0]["message"]
    message = {name: value for name, value in said.items() if name in ("role", "content")}
    return ["```", '{... "message": ' + json.dumps(message, ensure_ascii=False) + " ...}", "```"]


def commands(document: Document) -> list[str]:
    """Returns whole commands, as they were measured, and what each is held to."""
    cells = []
    for row in document["rows"]:
        value = f"{row['value']:.3g} {row['unit']}".strip()
        cells.append((row["name"], value, held(row["met"], f"at most {row['bar']:g}")))
    return [*table("|measured|held to", cells), *conditions(document)]


def step(document: Document) -> list[str]:
    """Returns the ways of a step: its speed, over the first way, and as a share of this machine's
    fastest product.
    """
    cells = []
    rounds = 0
    for shape in document["shapes"]:
        for place, row in enumerate(shape["rows"]):
            over = ""
            if place > 0:
                over = ratio(row["over_first"])
            rounds = row["of_matmul"]["rounds"]
            name = f"{shape['shape']}, {row['name']}"
            speed = f"{row['tokens_per_second']:,.0f}"
            cells.append((name, speed, f"{row['gflops']:,.0f}", over, ratio(row["of_matmul"])))
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
        bar = ""
        if row["bar"]:
            bar = held(Ratio.of(row).exceeds(row["bar"]), f"{row['bar']:g}")
        name = row["name"].replace("_", " ")
        if len(formats) > 1:
            name += f", {row['format']}"
        if len(names) > 1:
            name += f", {row['peer']}"
        if "over_plain" in row:
            plain = Ratio.of(row["over_plain"])
            least = row["over_plain"].get("bar") or row["over_plain_bar"]  # where older documents have it
            name += f", {plain} of plain ({held(plain.exceeds(least), f'at least {least:g}')})"
        theirs = "not installed"
        if row["peer_tokens_per_second"]:
            theirs = f"{row['peer_tokens_per_second']:,.0f}"
        cells.append([name, f"{row['tokens_per_second']:,.0f}", theirs, ratio(row), bar])
    peer = "peer"
    if len(names) == 1:
        peer = names[0]
    return [
        *table(f"tokens a second|Thrice|{peer}|ratio, interval|at least", cells),
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
    flash = "without"
    if setting["flash_attention"]:
        flash = "with"
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
            cells.append([name, f"{kind}: {rows[SIZE_ROWS[0]]['kinds']}", *ratios])
        if lines:
            lines.append("")
        lines += table(f"{folder.name}|format|prefill 512|1 stream|8 streams", cells, (0, 1))
        lines += [
            *conditions(document, min(row["rounds"] for row in document["rows"])),
            *compared_with(document, names_files=False),
        ]
    return lines or ["No machine has this yet."]


def compared(_: Document) -> list[str]:
    """Returns five ratios of each machine's speed to its peers': of training, to the faster torch."""
    cells = []
    origins = []
    for folder in machines():
        documents = read_documents(folder)
        if not documents.keys() & {"peers.json", "peers-serving.json"}:
            continue
        training = documents.get("peers.json", {"rows": []})["rows"]
        streams = documents.get("peers-serving.json", {"rows": []})["rows"]
        ratios = []
        for dtype in ("bfloat16", "float32"):
            ratios.append(_least_ratio([row for row in training if row["name"].endswith(dtype)]))
        for name in SIZE_ROWS:
            ratios.append(_least_ratio([row for row in streams if row["name"] == name]))
        cells.append((f"[{folder.name}]({folder.name})", *ratios))
        for what, file in (("training", "peers.json"), ("serving", "peers-serving.json")):
            if file in documents:
                processor = describe_processor(documents[file]["machine"])
                origins.append(f"{folder.name}, {what}: {processor}, {describe_origin(documents[file])}.")
    header = "|training, bfloat16|training, float32|prefill 512|1 stream|8 streams"
    return [*table(header, cells), "", *origins]


def _least_ratio(rows: Sequence[Document]) -> str:
    """Returns the ratio to the fastest peer, with the format where rows have one; empty without rows."""
    measured = [row for row in rows if row["ratio"] is not None]
    if not measured:
        return ""
    slowest = min(measured, key=_over_peer)
    if "format" in slowest:
        return f"{ratio(slowest)}, {slowest['format']}"
    return ratio(slowest)


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
        *table("tokens a second|with|without|ratio, interval|at least", compared),
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
    with (TRIES / "finetuning.csv").open(encoding="utf-8") as file:
        tried = [*csv.DictReader(file)]
    rows = [row for row in tried if row["model"].startswith("the default") and row["tokens"] == "122880"]
    best: dict[tuple[str, str], dict[tuple[str, str], float]] = {}  # by way and batch, then data and seed
    for row in sorted(rows, key=_batch):
        way = row["trained"]
        if row["rank"]:
            way += f", rank {row['rank']}"
        bits = best.setdefault((way, row["batch"]), {})
        data = (row["data"], row["seed"])
        bits[data] = min(bits.get(data, math.inf), float(row["bits_per_byte"]))
    cells = []
    for way_and_batch, bits in best.items():
        numbers = [""] * len(TRIED)
        for place, data in enumerate(TRIED):
            if data in bits:
                numbers[place] = f"{bits[data]:.3f}"
        cells.append((*way_and_batch, *numbers))
    return table("trained|batch|`voice`, seed 0|seed 1|Python's source, seed 0|seed 1", cells)


# the data and seeds of the tries that README shows
TRIED = (("voice", "0"), ("voice", "1"), ("python", "0"), ("python", "1"))


def _batch(row: Mapping[str, str]) -> int:
    return int(row["batch"])


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
    """Returns the laws, and for each the tests that hold it, by the run that has them."""
    cells = []
    for law, sentence in LAWS.items():
        by_run: dict[str, list[str]] = {"default": [], "whole": [], "night": []}
        for test in marked_tests():
            if test.law == law:
                by_run[test.run].append(f"[{test.name}]({test.path.as_posix()})")
        cells.append((f"**{law}**", sentence, *map("<br>".join, by_run.values())))
    return table("|the law|by default|whole|at night", cells, range(5))


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
    cells: list[tuple[str, ...]] = []
    for name in PROMISES:
        if name[0] in kinds:
            rows = [row for row in document["rows"] if row["promise"] == name]
            for row in _trials(rows):
                cells.append((name, PROMISES[name], *row))
    return table("|promise|measured|tried with|on", cells, range(5))


def _trials(rows: Sequence[Document]) -> list[tuple[str, ...]]:
    """Returns what was measured of a promise, with what, and when: trials with the same are one row, and
    so are all that have no figures.
    """
    counts: dict[tuple[str, str, str], int] = {}  # how often the same came of the same
    kept = []  # of trials without figures
    for row in rows:
        if not row["figures"]:
            kept.append(row["kept"])
            continue
        figures = "; ".join(str(Figure(**figure)) for figure in row["figures"])
        if not row["kept"]:
            figures += ": **not kept**"
        over = row["over"]
        if row["quick"]:
            over += ", with --quick"
        on = row["date"]
        if row["commit"] is None:
            on += "*"
        counts[figures, over, on] = counts.get((figures, over, on), 0) + 1
    trials: list[tuple[str, ...]] = []
    for (figures, over, on), count in counts.items():
        if count > 1:
            over = f"{count} times {over}"
        trials.append((figures, over, on))
    if kept:
        trials.append((f"{sum(kept)} of {len(kept)} cases", "", rows[-1]["date"]))
    return trials


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
