"""Tables from an item's records alone; each number links to the lines that it is of."""

from collections.abc import Sequence

from cells import (
    NONE,
    Lines,
    View,
    between,
    called,
    chosen,
    divided,
    each_division,
    gains,
    linked,
    of,
    range_of,
    spread,
    tabled,
    values,
)
from comparing import convergence, drift, methods
from fedgen_edge.report.gains import Gain
from fedgen_edge.report.summary import paired_interval
from items import LISTS, Row, merged, settled, tried, worded
from varying import curve, grid


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
        f"{range_of(rows, 'clients')} clients, {range_of(rows, 'cohort')} a round, "
        f"{range_of(rows, 'rounds')} rounds; seeds {', '.join(map(str, item['seeds']))}. "
        f"{'; '.join(machines)}; {'; '.join(versions)}."
    )
    if tuning := item.get("tuning"):
        each, then = (max(len(tried(item, v, what)) for v in item["variants"]) for what in LISTS)
        out += (
            f" Each variant has the best of {each} trials by validation, on seed "
            f"{tuning['seed']}{f', {told}' if (told := tuning.get('division')) else ''}."
        )
        if then:
            out += (
                f" Then how clients tune has the best of {then}, by the mean validation loss "
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
    made, real, floor = (range_of(found, key) for key in ("made", "real", "floor"))
    return (
        f" {found[0]['seen_by']}: {made} samples of a model against {real} test pictures, two "
        f"halves of which lie {floor} apart."
    )


def _chose_end(item: Row, rows: Sequence[Row], variant: str) -> bool:
    """Whether more trials might do better: rates are tried in their order."""
    own, lists = of(rows, variant)[0]["chosen"], (tried(item, variant, w) for w in LISTS)
    ends = (end for told in lists if len(told) > 1 for end in (told[0], told[-1]))
    return bool(own) and any(merged(own, end) == own for end in ends)


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
                  for shares in ([g.share_gained for g in found], [g.share_lost for g in found])),
            ]  # fmt: skip
            body.append([division, variant, chosen(own), *cells])
        told.append(f"- {division}: {paying(held)}.")
    return ["", *tabled(heads, body), *told]


def by_client(item: Row, rows: Sequence[Row]) -> dict[str, dict[str, list[Gain]]]:
    """By division and variant, a seed each, what clients have over the first division's model."""
    held, (first, *_, last) = divided(rows), item["models"]
    base = next(iter(held.values()))

    def gain(ours: Row, theirs: Row) -> Gain:
        found = enumerate(gains(ours["test"][last]["each"], theirs["test"][first]["each"]))
        least = sorted(found, key=lambda client: client[1])
        return Gain(
            last, first, newcomers=False, gain_by_client={str(c): gain for c, gain in least}
        )

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
    return ["", *tabled(heads, body), "", about]


def counted(title: str, rows: Sequence[Row], item: Row) -> str:
    """In how many of the runs a finding is named."""
    return linked(f"{sum(title in row['findings'] for row in rows)} of {len(rows)}", item, rows)


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
