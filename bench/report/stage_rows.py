"""The stage table in HTML: one row a stage, one prefix a column, and below it why a time is not what its FLOPs say."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from engine.format import ABSENT, Column, column, money, number, percent, times

DEVIATION = 0.15  # beyond which a measured time is explained in words

Row = Mapping[str, Any]


def again(command: Any) -> str:
    """The command that makes the numbers beside it once more; nothing for no command."""
    # A line may break between the words alone.
    words = " ".join(f"<span>{escape(word)}</span>" for word in str(command or "").split())
    return f'<span class="again">Regenerate: <code>{words}</code></span>' if words else ""


def stages_section(rows: Sequence[Row], command: str, price: Any) -> str:
    """The section with the table, its caption, and the notes."""
    counted = [row.get("flops_per_token") or {} for row in rows]
    columns = {
        "flops": column(each.get(counter) for each in counted for counter in ("formula", "walker", "xla")),
        "time": column(row.get(name) for row in rows for name in ("seconds_per_token", "predicted_seconds_per_token")),
        "peak": column((row.get("peak_bytes") for row in rows), digits=2),
        "moved": column((row.get("bytes_per_token") for row in rows), digits=2),
        # What multiplies nothing costs next to nothing, and would stretch the column with its zeros.
        "price": column(
            (row.get("usd_per_million_tokens") for row, each in zip(rows, counted) if each.get("formula") != 0),
            digits=2,
            prefixed=False,
        ),
    }
    notes: list[str] = []
    bodies: list[list[str]] = []
    for index, row in enumerate(rows):
        if not index or row.get("stage") != rows[index - 1].get("stage"):
            bodies.append([])
        bodies[-1].append(_row(row, columns, notes, command))
    body = "".join(f"<tbody>{''.join(lines)}</tbody>" for lines in bodies)
    said = "".join(f'<li id="note-{index}">{note}</li>' for index, note in enumerate(notes, 1))
    return (
        '<section aria-labelledby="stages"><h2 id="stages">The stages</h2>'
        '<div class="scroll" role="region" aria-labelledby="stages" tabindex="0">'
        f'<table class="stages"><caption>{_caption(counted, price)}</caption>{_head(columns)}{body}</table></div>'
        f"{f'<ol class="notes">{said}</ol>' if said else ''}{again(command)}</section>"
    )


def _caption(counted: Sequence[Row], price: Any) -> str:
    both = [(number(each.get("formula")), number(each.get("walker"))) for each in counted]
    both = [pair for pair in both if None not in pair]
    same = sum(formula == walker for formula, walker in both)
    agree = f"The formula and the walk over the traced program agree to the last operation in {same} of {len(both)} rows. "
    return (
        f"{agree if both else ''}Times are medians of interleaved repeats, ± their middle half. <i>Predicted</i> is what the "
        "operations alone would take at the speed of the forward pass; <i>off</i> is the measured time against it, explained "
        f"below beyond {DEVIATION:.0%}. <i>Per token</i> is what one token makes the memory move. Prices are for a million "
        f"tokens{f' at {money(price)} an hour' if number(price) else ''}."
    )


def _head(columns: Mapping[str, Column]) -> str:
    groups = [
        ("", ["Stage", "Weights"]),
        (f"Operations per token, {columns['flops'].unit('FLOP')}", ["formula", "walker", "elementwise", "XLA", "× forward"]),
        (f"Time per token, {columns['time'].unit('s')}", ["measured", "predicted", "off", "× forward"]),
        ("Memory", [f"peak<br>{columns['peak'].unit('B')}", f"per token<br>{columns['moved'].unit('B')}"]),
        ("", ["of its<br>ceiling", "$ per<br>million"]),
    ]
    over = "".join(
        f'<th colspan="{len(names)}" scope="colgroup"><span>{group}</span></th>'
        if group
        else f'<td colspan="{len(names)}"></td>'
        for group, names in groups
    )
    under = "".join(
        f'<th scope="col"{"" if place else ' class="edge"'}>{name}</th>'
        for _, names in groups
        for place, name in enumerate(names)
    )
    return f"<thead><tr>{over}</tr><tr>{under}</tr></thead>"


def _row(row: Row, columns: Mapping[str, Column], notes: list[str], command: str) -> str:
    """One line of the table; what there is to explain is added to the notes."""
    counted = row.get("flops_per_token") or {}
    took, predicted = number(row.get("seconds_per_token")), number(row.get("predicted_seconds_per_token"))
    off = took / predicted - 1 if took and predicted else None
    mark = _note(row, off, notes, command)
    peak_mark = _remark(row, "peak", row.get("why_peak"), notes)
    flops, time = columns["flops"], columns["time"]
    share = percent(row.get("utilisation"))
    used = share if share == ABSENT else f"{share} <small>{escape(str(row.get('utilisation_of') or ''))}</small>"
    cells = [
        ("edge", _exact(flops, counted.get("formula"), "FLOP")),
        ("", _exact(flops, counted.get("walker"), "FLOP")),
        ("quiet", _exact(flops, counted.get("walker_elementwise"), "FLOP")),
        ("quiet", _exact(flops, counted.get("xla"), "FLOP")),
        ("key", times(row.get("flop_ratio_to_forward"))),
        ("edge", time.text(took) + _spread(time.text(row.get("spread")))),
        ("quiet", time.text(predicted)),
        ("loud" if off is not None and abs(off) > DEVIATION else "quiet", _deviation(off) + mark),
        ("key", times(row.get("time_ratio_to_forward")) + _spread(times(row.get("time_ratio_spread")).rstrip("×"))),
        ("edge", _exact(columns["peak"], row.get("peak_bytes"), "B") + peak_mark),
        ("", _exact(columns["moved"], row.get("bytes_per_token"), "B")),
        ("edge", used),
        ("key", columns["price"].text(row.get("usd_per_million_tokens"))),
    ]
    inside = "".join(f'<td class="{kind}">{said}</td>' if kind else f"<td>{said}</td>" for kind, said in cells)
    weights = escape(str(row.get("weights") or ""))
    state = f'<span class="weights {weights}">{weights}</span>' if weights else ABSENT
    return f'<tr><th scope="row">{escape(str(row["name"]))}</th><td class="words">{state}</td>{inside}</tr>'


def _note(row: Row, off: float | None, notes: list[str], command: str) -> str:
    """The mark of this row's note, which is added to the notes; nothing without something to say."""
    own = again(row["command"]) if row.get("command") not in (None, "", command) else ""
    if not row.get("why") and not own:
        return ""
    deviation = f", {_deviation(off)}" if off is not None else ""
    notes.append(f"<b>{escape(str(row['name']))}</b>{deviation}: {escape(str(row.get('why') or ''))} {own}")
    return _mark(len(notes))


def _remark(row: Row, what: str, said: Any, notes: list[str]) -> str:
    """The mark of a note on one more of this row's numbers; nothing without words."""
    if not said:
        return ""
    notes.append(f"<b>{escape(str(row['name']))}</b>, {what}: {escape(str(said))}")
    return _mark(len(notes))


def _mark(index: int) -> str:
    return f'<sup><a href="#note-{index}" aria-label="note {index}">{index}</a></sup>'


def _deviation(off: float | None) -> str:
    """`+12%`, or how many times as long from three times up."""
    return percent(off, signed=True) if off is None or off < 2 else times(off + 1, 1)


def _spread(said: str) -> str:
    """What stands behind ±, in a place of one width, so that the numbers before it stay below each other."""
    return f' <small class="spread">{"" if said == ABSENT else f"±{said}"}</small>'


def _exact(where: Column, value: Any, unit: str) -> str:
    """The rounded number, which carries the whole one for whoever points at it or reads the page with a program."""
    found = number(value)
    return ABSENT if found is None else f'<data value="{found:.12g}" title="{found:,.12g} {unit}">{where.text(found)}</data>'
