"""Tables from an item's records alone; each number links to the lines that it is of."""

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

from fedgen_edge.experiments.gains import Gain
from fedgen_edge.experiments.summary import BACKBONE, number, paired_interval, size
from fedgen_edge.measure import Measure, Number
from items import LISTS, Row, merged, settled, tried, worded

Form = Callable[[Number], str]
Lines = list[str]
View = Callable[[Row, Sequence[Row]], Lines]
NONE = "-"


class Shown(NamedTuple):
    """One line of a comparison: a model of a variant, under a name of its own."""

    name: str
    variant: str
    model: str
    paper: float | None = None
    """What the paper reports, by its own measure."""
    costs: bool = True
    """Whether it is federated, so that its bytes and rounds say something."""


def of_item(item: Row) -> list[Shown]:
    """The lines that the item's file names."""
    return [Shown(**row) for row in item["rows"]]


def table(item: Row, rows: Sequence[Row]) -> str:
    """An item's table in Markdown, with what it was measured on."""
    return "\n".join([caption(item, rows), *VIEWS[item["table"]](item, rows)])


def caption(item: Row, rows: Sequence[Row]) -> str:
    """On what, at which scale, by whose records."""
    where = f"paper/items/{item['name']}.toml"
    machines = {f"{row['hardware']}, {row['precision']}": 0 for row in rows}
    versions = {", ".join(f"{k} {v}" for k, v in row["versions"].items()): 0 for row in rows}
    out = (
        f"{item['scale'].capitalize()} scale: `{item['recipe']}` as in [`{where}`](../{where}); "
        f"{_range(rows, 'clients')} clients, {_range(rows, 'cohort')} a round, "
        f"{_range(rows, 'rounds')} rounds; seeds {', '.join(map(str, item['seeds']))}. "
        f"{'; '.join(machines)}; {'; '.join(versions)}."
    )
    if tuning := item.get("tuning"):
        out += (
            f" Each variant has the best of {len(tuning['trials'])} trials by validation, on seed "
            f"{tuning['seed']}."
        )
        if then := {len(told) for v in item["variants"] if (told := tried(item, v, "tunings"))}:
            out += (
                f" Then how clients tune has the best of {max(then)}, by the mean validation loss "
                "of what they keep."
            )
    out += _judged(rows)
    if at_end := [variant for variant in item["variants"] if _chose_end(item, rows, variant)]:
        out += f" The choice is the end of what was tried: {', '.join(at_end)}."
    return out


def _judged(rows: Sequence[Row]) -> str:
    """By how many samples models are judged, where any are, and what that number alone does."""
    found = [test for row in rows for test in row["test"].values() if "seen_by" in test]
    if not found:
        return ""
    made, real, floor = (_range(found, key) for key in ("made", "real", "floor"))
    return (
        f" {found[0]['seen_by']}: {made} samples of a model against {real} test pictures, two "
        f"halves of which lie {floor} apart."
    )


def _chose_end(item: Row, rows: Sequence[Row], variant: str) -> bool:
    """Whether more trials might do better: rates are tried in their order."""
    own, lists = of(rows, variant)[0]["chosen"], (tried(item, variant, w) for w in LISTS)
    ends = (end for told in lists if len(told) > 1 for end in (told[0], told[-1]))
    return bool(own) and any(merged(own, end) == own for end in ends)


def _range(rows: Sequence[Row], key: str) -> str:
    found = {row[key] for row in rows}
    ends = dict.fromkeys(number(v) if isinstance(v, float) else v for v in (min(found), max(found)))
    return " to ".join(map(str, ends))


SAMPLED = {"distance": "", "distance_of_clients": ", mean of clients"}
"""Measures of samples, and what is said beside the distance's name."""


def called(measure: str, row: Row) -> str:
    """What a measure's number is."""
    told = Measure(*row["measure"])
    if measure in SAMPLED:
        return next(test["seen_by"] for test in row["test"].values()) + SAMPLED[measure]
    per = f"{told.name} per {told.items.removesuffix('s')}" if told.exponential else told.name
    return {
        "word": f"{told.name} per word",
        "pooled": per,
        "mean": f"{per}, mean of clients",
        "worst_decile": f"{per}, worst tenth of clients",
    }[measure]


def of(rows: Iterable[Row], variant: str) -> list[Row]:
    """A variant's records, a seed each."""
    return sorted((row for row in rows if row["variant"] == variant), key=lambda row: row["seed"])


def values(rows: Iterable[Row], model: str, measure: str) -> list[float]:
    """A model's number in each of these records."""
    return [row["test"][model][measure] for row in rows]


def apart(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Each of ours less theirs."""
    return [a - b for a, b in zip(ours, theirs, strict=True)]


def gains(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Per cent by which each of ours lies below theirs."""
    return [100 * (1 - a / b) for a, b in zip(ours, theirs, strict=True)]


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Logarithms of each of ours over theirs: as far from 0 for half as for twice as much."""
    return [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]


def over(found: Sequence[float]) -> str:
    """The geometric mean of ratios, and its 95 % interval, from their logarithms."""
    mean, low, high = (number(math.exp(end)) for end in paired_interval(found))
    return f"{mean} ({low} to {high})"


def linked(text: str, item: Row, rows: Sequence[Row]) -> str:
    """The text as a link to the records' lines."""
    ends = sorted({row["line"] for row in rows})
    lines = f"#L{ends[0]}"
    if len(ends) > 1 and ends[-1] - ends[0] == len(ends) - 1:
        lines += f"-L{ends[-1]}"
    return f"[{text}](../paper/results/{item['records']}-{item['scale']}.jsonl{lines})"


def spread(found: Sequence[Number], form: Form = number) -> str:
    """The mean, and half its 95 % interval."""
    mean, low, _ = paired_interval(found)
    return f"{form(mean)} ± {form(mean - low)}" if mean > low else form(mean)


def between(found: Sequence[Number]) -> str:
    """The mean, and its 95 % interval, with signs."""
    mean, low, high = (f"{end:+.2f}" for end in paired_interval(found))
    return f"{mean} ({low} to {high})"


def tabled(heads: Sequence[str], body: Iterable[Sequence[str]]) -> Lines:
    """A table in Markdown."""
    out = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return out + [f"| {' | '.join(cells)} |" for cells in body]


def reached(row: Row, loss: float) -> Row | None:
    """The first judged round at which a run's loss is that low: its number, and what it cost."""
    for at, up, down, *seconds, found in row["way"]:
        if found <= loss:
            return {"round": at, "up": up, "down": down, "seconds": sum(seconds)}
    return None


def divided(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Records by their divisions."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["division"], []).append(row)
    return found


def each_division(view: View) -> View:
    """The view of one division, for each under its name."""

    def views(item: Row, rows: Sequence[Row]) -> Lines:
        out = []
        for division, own in divided(rows).items():
            out += ["", *([f"**{division}**", ""] if division else []), *view(item, own)]
        return out

    return views


def methods(item: Row, rows: Sequence[Row]) -> Lines:
    """Methods beside each other, what each costs to the same quality, and the paper's claims."""
    shown, first = of_item(item), rows[0]
    base = next(one for one in shown if one.variant == item["reference"] and one.costs)
    theirs = values(of(rows, base.variant), base.model, item["measures"][0])
    goal = common(shown, rows)
    heads = [
        "method",
        "the paper",
        "chosen",
        *(called(measure, first) for measure in item["measures"]),
        f"over {base.name}",
        "uplink saved, %",
        *(f"{what} to the quality" for what in ("uplink", "downlink", "rounds", "seconds")),
    ]
    body = []
    for one in shown:
        own = of(rows, one.variant)
        found = [values(own, one.model, measure) for measure in item["measures"]]
        cells = [
            *(spread(each) for each in found),
            "" if one == base else over(ratios(found[0], theirs)),
            *(_costs(own, goal) if one.costs else [NONE] * 5),
        ]
        body.append([
            one.name,
            "" if one.paper is None else f"{one.paper:g}",
            f"`{worded(own[0]['chosen'])}`" if own[0]["chosen"] and one.model != BACKBONE else "",
            *(linked(cell, item, own) if cell not in {"", NONE} else cell for cell in cells),
        ])  # fmt: skip
    quality = (
        "The quality that costs are counted to is, seed by seed, the lowest validation loss that "
        "every federated method reaches."
    )
    return [*tabled(heads, body), "", quality, *_claims(item, rows)]


def common(shown: Sequence[Shown], rows: Sequence[Row]) -> dict[int, float]:
    """By seed, the lowest validation loss that all of those reach that are federated."""
    federated = {one.variant for one in shown if one.costs}
    found: dict[int, float] = {}
    for row in (row for row in rows if row["variant"] in federated):
        lowest = min(loss for *_, loss in row["way"])
        found[row["seed"]] = max(lowest, found.get(row["seed"], -math.inf))
    return found


def _costs(own: Sequence[Row], goal: dict[int, float]) -> Lines:
    when = [reached(row, goal[row["seed"]]) for row in own]
    there = [found for found in when if found]
    assert len(there) == len(own), "the goal is what all of them reach"
    forms: dict[str, Form] = {"up": size, "down": size, "round": number, "seconds": number}
    return [_saved(own), *(spread([f[key] for f in there], form) for key, form in forms.items())]


def _saved(own: Sequence[Row]) -> str:
    found = [100 * (1 - row["bytes_up"] / row["bytes_full"]) for row in own]
    return f"{fmean(found):.2f}"


def _claims(item: Row, rows: Sequence[Row]) -> Lines:
    """Whether what the paper says of two methods holds of these records."""
    shown, out = {one.name: one for one in of_item(item)}, [""]
    for claim in item.get("claims", ()):
        if "saved" in claim:
            out.append(_saving(claim, item, of(rows, shown[claim["saved"]].variant)))
            continue
        ours, theirs = pair = shown[claim["better"]], shown[claim["worse"]]
        reported = claim.get("paper", (ours.paper, theirs.paper))
        own, other = [values(of(rows, one.variant), one.model, item["measures"][0]) for one in pair]
        (told,), measured = ratios(*([value] for value in reported)), ratios(own, other)
        out.append(
            f"- **{ours.name} over {theirs.name}.** The paper: {number(math.exp(told))} "
            f"({reported[0]:g} against {reported[1]:g}). Here: "
            f"{linked(over(measured), item, of(rows, ours.variant))}. {verdict(told, measured)}"
        )
    return out


def _saving(claim: Row, item: Row, own: Sequence[Row]) -> str:
    told, found = claim["paper"], float(_saved(own))
    return (
        f"- **Uplink saved by {claim['saved']}.** The paper: more than {told:g} %. Here: "
        f"{linked(f'{found:.2f} %', item, own)}. It {'holds' if found > told else 'does not hold'}."
    )


def verdict(told: float, measured: Sequence[float]) -> str:
    """Whether an order holds, and a gain is as large as told, by the 95 % interval.

    Args:
        told: logarithm of a ratio below 1.
        measured: the same, a seed each.
    """
    _, low, high = paired_interval(measured)
    if low > 0:
        return "The order is the reverse."
    if high >= 0:
        return "The order is not settled."
    return "The order holds, and the gain is " + (
        "smaller." if low > told else "larger." if high < told else "as large, to the interval."
    )


def curve(item: Row, rows: Sequence[Row]) -> Lines:
    """A row a value of what is varied, its models beside each other."""
    (measure, *others), models = item["measures"], item["models"]
    name = called(measure, rows[0])
    beside = [(model, other) for other in others for model in models]
    heads = [
        item["axis"],
        "chosen",
        *(f"{model}: {name}" for model in models),
        f"{models[0]} less that of {item['reference']}",
        *(f"{model} less {models[0]}" for model in models[1:]),
        *(f"{model}: {called(other, rows[0])}" for model, other in beside),
        "sent by clients",
        "uplink saved, %",
        "seconds of the rounds",
    ]
    theirs = values(of(rows, item["reference"]), models[0], measure)
    body = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = of(rows, variant)
        found = [values(own, model, measure) for model in models]
        cells = [
            *map(spread, found),
            "" if variant == item["reference"] else between(apart(found[0], theirs)),
            *(between(apart(each, found[0])) for each in found[1:]),
            *(spread(values(own, *pair)) for pair in beside),
            spread([row["bytes_up"] for row in own], size),
            _saved(own),
            spread([row["seconds"]["federation"] for row in own]),
        ]
        chosen = f"`{worded(own[0]['chosen'])}`" if own[0]["chosen"] else ""
        body.append([variant, chosen, *(linked(c, item, own) if c else "" for c in cells)])
    knees = (knee(item, rows, model, each) for each in item["measures"] for model in models)
    return [*tabled(heads, body), "", *knees]


class Best(NamedTuple):
    """Of what is varied."""

    least: str
    """The value with the lowest mean."""
    near: list[str]
    """Those that are not settled above it."""


def best(item: Row, rows: Sequence[Row], model: str, measure: str) -> Best:
    """Which value a model does best with."""
    variants = dict.fromkeys(row["variant"] for row in rows)
    on_it = [variant for variant in variants if variant not in item.get("beside", ())]
    found = {v: values(of(rows, v), model, measure) for v in on_it}
    least = min(found, key=lambda variant: fmean(found[variant]))
    lows = {v: paired_interval(apart(each, found[least]))[1] for v, each in found.items()}
    return Best(least, [v for v, low in lows.items() if v != least and low <= 0])


def knee(item: Row, rows: Sequence[Row], model: str, measure: str) -> str:
    """Where the lowest mean is, and what cannot be told from it."""
    least, near = best(item, rows, model, measure)
    name = f", {called(measure, rows[0])}" if len(item["measures"]) > 1 else ""
    also = f"not settled from it: {', '.join(near)}" if near else "all others are settled above it"
    out = f"- {model}{name}: the mean is lowest with {item['axis']} {least}; {also}."
    if paper := item.get("paper"):
        holds = "is" if paper == least else "may be" if paper in near else "is not"
        out += f" The paper's {paper} {holds} the best here."
    return out


def bests(measured: Sequence[tuple[Row, Sequence[Row]]]) -> str:
    """The best values of items that vary the same, beside each other.

    Args:
        measured: items that vary the same, with their records; no divisions.
    """
    axis = measured[0][0]["axis"]
    heads = ["item", "model", "measure", f"best {axis}", "not settled from it", "the paper"]
    body = []
    for item, rows in measured:
        pairs = [(model, measure) for measure in item["measures"] for model in item["models"]]
        for model, measure in pairs:
            least, near = best(item, rows, model, measure)
            told = [item["name"], model, called(measure, rows[0]), least, ", ".join(near)]
            body.append([*told, item.get("paper", "")])
    return "\n".join(tabled(heads, body))


def repeated(item: Row, rows: Sequence[Row], there: Row, others: Sequence[Row]) -> str:
    """Whether an item's best value is best in another one too, and what its models gain in both.

    Args:
        item: that repeats the other.
        rows: its records.
        there: the item that is repeated.
        others: its records.
    """
    out, (first, *models) = [], item["models"]
    for model in item["models"]:
        first_best = best(there, others, model, there["measures"][0]).least
        least, near = best(item, rows, model, item["measures"][0])
        holds = "is" if first_best == least else "may be" if first_best in near else "is not"
        told = f"{item['axis']} {first_best}, the best of `{there['name']}`, {holds} the best here."
        out.append(f"- {model}: {told}")
    for model in models:
        both = []
        for own, found in ((there, others), (item, rows)):
            held = of(found, item["reference"])
            ours, theirs = (values(held, name, own["measures"][0]) for name in (model, first))
            both.append(linked(between(gains(ours, theirs)), own, held))
        out.append(
            f"- {model} below {first}, with {item['axis']} {item['reference']}, %: {both[0]} in "
            f"`{there['name']}`, {both[1]} here."
        )
    return "\n".join(out)


def grid(item: Row, rows: Sequence[Row]) -> Lines:
    """A row a division, a column a variant or a row of the item; each line's lowest mean is bold.

    With the frozen backbone among them: how much of what divisions but the first cost it each other
    one makes good.
    """
    measure, shown = item["measures"][0], columns(item, rows)
    body = []
    for division, held in divided(rows).items():
        own = [of(held, one.variant) for one in shown]
        found = [values(each, one.model, measure) for one, each in zip(shown, own, strict=True)]
        least = min(map(fmean, found))
        cells = [linked(spread(each), item, of_it) for each, of_it in zip(found, own, strict=True)]
        bold = [f"**{c}**" if fmean(f) == least else c for c, f in zip(cells, found, strict=True)]
        body.append([division, *bold])
    about = f"{called(measure, rows[0])}, by {item['axis']}."
    out = ["", about, "", *tabled(["", *(one.name for one in shown)], body)]
    frozen = next((one for one in shown if one.model == BACKBONE), None)
    return [*out, *closed(item, rows, frozen)] if frozen else out


def columns(item: Row, rows: Sequence[Row]) -> list[Shown]:
    """The item's rows, or every variant's first model."""
    if "rows" in item:
        return of_item(item)
    return [Shown(v, v, item["models"][0]) for v in dict.fromkeys(r["variant"] for r in rows)]


def closed(item: Row, rows: Sequence[Row], frozen: Shown) -> Lines:
    """Of the nats that each division but the first costs the frozen backbone, the share made good.

    100 % is a model that is as good there as it is on the first, 0 % one that loses as much.
    """
    measure, (first, *others) = item["measures"][0], divided(rows).items()
    shown = [one for one in columns(item, rows) if one != frozen]

    def lost(one: Shown, held: Sequence[Row]) -> list[float]:
        near, far = (values(of(part, one.variant), one.model, measure) for part in (first[1], held))
        return ratios(far, near)

    body = []
    for division, held in others:
        whole, cells = lost(frozen, held), []
        for one in shown:
            found = gains(lost(one, held), whole)
            cells.append(linked(spread(found), item, of(held, one.variant)))
        body.append([division, *cells])
    about = (
        f"Of the nats that the frozen backbone loses against `{first[0]}`, made good, %: 100 is as "
        "good as there."
    )
    return ["", about, "", *tabled(["", *(one.name for one in shown)], body)]


def convergence(item: Row, rows: Sequence[Row]) -> Lines:
    """Validation after each third of the rounds, and how much the last third still changed."""
    name = f"validation {called('pooled', rows[0])}"
    heads = ["method", *(f"{name}, {part}" for part in THIRDS), "lower by the last third, %"]
    body = []
    for one in of_item(item):
        own = of(rows, one.variant)
        found = [thirds(row) for row in own]
        cells = [spread(each) for each in zip(*found, strict=True)]
        cells.append(between(gains([f[2] for f in found], [f[1] for f in found])))
        body.append([one.name, *(linked(cell, item, own) for cell in cells)])
    return tabled(heads, body)


def drift(item: Row, rows: Sequence[Row]) -> Lines:
    """How clients pull apart on the way to the same loss, in the rounds just before it."""
    shown = of_item(item)
    goal = common(shown, rows)
    heads = ["method", "rounds to the loss", "drift over mean change", "cosine between clients"]
    body = []
    for one in shown:
        own = of(rows, one.variant)
        found = [pulled(row, goal[row["seed"]]) for row in own]
        cells = [spread(each) for each in zip(*found, strict=True)]
        body.append([one.name, *(linked(cell, item, own) for cell in cells)])
    about = (
        "The loss is, seed by seed, the lowest that all of these reach. Drift is how far a client "
        "moves in a round, over how far their mean change goes: 1 where all agree. Changes are of "
        "effective weights: of an adapter's layer, that of B A, and of a full model's, that of the "
        f"weight. Both are means over the {BEFORE} rounds up to there."
    )
    return [*tabled(heads, body), "", about]


def clients(item: Row, rows: Sequence[Row]) -> Lines:
    """A row a division and value: what each client has of the item's last model over its first.

    The first model is that of the first division, whatever the others did before their last one.
    """
    first, last = item["models"][0], item["models"][-1]
    name = called("pooled", rows[0])
    heads = [
        "",
        item["axis"],
        "chosen",
        f"{first}: {name}",
        f"{last}: {name}",
        f"below {first}, mean of clients, %",
        "clients that gain, %",
        "that are hurt, %",
    ]
    body, told, base = [], [""], next(iter(divided(rows).values()))
    for division, held in by_client(item, rows).items():
        for variant, found in held.items():
            start, own = of(base, variant), of(divided(rows)[division], variant)
            cells = [
                linked(spread(values(start, first, "pooled")), item, start),
                linked(spread(values(own, last, "pooled")), item, own),
                linked(between([gain.mean for gain in found]), item, own),
                *(linked(spread([100 * share for share in shares]), item, own)
                  for shares in ([g.gained for g in found], [g.lost for g in found])),
            ]  # fmt: skip
            chosen = f"`{worded(own[0]['chosen'])}`" if own[0]["chosen"] else ""
            body.append([division, variant, chosen, *cells])
        told.append(f"- {division}: {paying(held)}.")
    return ["", *tabled(heads, body), *told]


def by_client(item: Row, rows: Sequence[Row]) -> dict[str, dict[str, list[Gain]]]:
    """By division and variant, a seed each, what clients have over the first division's model."""
    held, (first, *_, last) = divided(rows), item["models"]
    base = next(iter(held.values()))

    def gain(ours: Row, theirs: Row) -> Gain:
        found = enumerate(gains(ours["test"][last]["each"], theirs["test"][first]["each"]))
        least = sorted(found, key=lambda client: client[1])
        return Gain(last, first, newcomers=False, each={str(c): gain for c, gain in least})

    return {
        division: {
            variant: list(map(gain, of(own, variant), of(base, variant)))
            for variant in dict.fromkeys(row["variant"] for row in own)
        }
        for division, own in held.items()
    }


def paying(held: dict[str, list[Gain]]) -> str:
    """Where the mean of the clients' gains is settled above zero, and where below."""
    ends = {v: paired_interval([gain.mean for gain in found])[1:] for v, found in held.items()}
    ways = {
        "pays": [v for v, (low, _) in ends.items() if low > 0],
        "costs": [v for v, (_, high) in ends.items() if high < 0],
        "is not settled": [v for v, (low, high) in ends.items() if low <= 0 <= high],
    }
    return "; ".join(f"{way} with {', '.join(own)}" for way, own in ways.items() if own)


BEFORE = 5
"""Rounds whose drift is told: one round's clients are few."""


def pulled(row: Row, loss: float) -> list[float]:
    """The round that reaches a loss, drift over the mean change, and cosine between clients."""
    at = reached(row, loss)
    assert at, "the goal is what all of them reach"
    told = [d for d in moves(row) if at["round"] - BEFORE < d[0] <= at["round"]]
    cosines = [cosine for *_, cosine in told if cosine is not None]
    return [at["round"], fmean(own / mean for _, own, mean, _ in told), fmean(cosines)]


def moves(row: Row) -> list[list]:
    """What a record says of each round's drift.

    Raises:
        FileNotFoundError: it is older than the measurement.
    """
    if "moves" not in row:
        raise FileNotFoundError(f"{row['item']}: line {row['line']} does not tell drift")
    return row["moves"]


def signatures(item: Row, rows: Sequence[Row]) -> Lines:
    """How often the diagnosis names each failure where it is provoked, and where it is not."""
    heads = ["provoked", "by", "finding", "named", "where it was not provoked", "for example"]
    body = []
    for failure in item["failures"]:
        ours = of(rows, failure["variant"])
        others = [row for row in rows if row["variant"] != failure["variant"]]
        for title in failure["findings"]:
            told = [row for row in ours if title in row["findings"]]
            cells = [counted(title, own, item) for own in (ours, others)]
            by = worded(settled(item, failure["variant"]))
            evidence = told[0]["findings"][title] if told else NONE
            body.append([failure["name"], f"`{by}`", title, *cells, evidence])
    sound = [v for v in item["variants"] if v not in {f["variant"] for f in item["failures"]}]
    healthy = [row for variant in sound for row in of(rows, variant)]
    found = dict.fromkeys(title for row in healthy for title in row["findings"])
    alarms = "; ".join(f"{title} ({counted(title, healthy, item)})" for title in found)
    about = f"Where nothing was provoked, the diagnosis says: {alarms or 'nothing'}."
    return [*tabled(heads, body), "", about]


def counted(title: str, rows: Sequence[Row], item: Row) -> str:
    """In how many of the runs a finding is named."""
    return linked(f"{sum(title in row['findings'] for row in rows)} of {len(rows)}", item, rows)


THIRDS = ("a third of the rounds", "two thirds", "all")


def thirds(row: Row) -> list[float]:
    """The validation number at the last judged round of each third."""
    measure = Measure(*row["measure"])
    ends = [[way for way in row["way"] if 3 * way[0] <= part * row["rounds"]] for part in (1, 2, 3)]
    return [measure.shown(before[-1][-1], 1) for before in ends]


VIEWS: dict[str, View] = {
    "methods": each_division(methods),
    "clients": clients,
    "convergence": each_division(convergence),
    "curve": each_division(curve),
    "grid": grid,
    "drift": each_division(drift),
    "signatures": signatures,
}
"""Ways to show an item's records as a table."""
