"""Tables from an item's records alone; each number links to the lines that it is of."""

from collections.abc import Sequence

from cells import (
    NONE,
    Lines,
    View,
    between,
    each_division,
    format_choice,
    gains,
    group_by_division,
    link,
    make_table,
    name_measure,
    range_of,
    select_variant,
    spread,
    values,
)
from comparing import convergence, drift, methods
from fedgen_edge.report.gains import Gain
from fedgen_edge.report.summary import paired_interval
from items import LISTS, Row, format_overrides, get_overrides, list_tried, merge
from recipe_views import samples, seeds, validation
from varying import curve, grid


def table(item: Row, rows: Sequence[Row]) -> str:
    """An item's table in Markdown, with what it was measured on."""
    return "\n".join([caption(item, rows), *VIEWS[item["table"]](item, rows)])


def caption(item: Row, rows: Sequence[Row]) -> str:
    """On what, at which scale, by whose records."""
    where = f"paper/items/{item['name']}.toml"
    machines = {
        ", ".join(row[key] for key in ("hardware", "precision") if key in row): 0 for row in rows
    }
    versions = {
        ", ".join(f"{k} {v}" for k, v in row.get("versions", {}).items()): 0 for row in rows
    }
    places = "; ".join(filter(None, [*machines, *versions]))
    out = (
        f"{item['scale'].capitalize()} scale: `{item['recipe']}` as in [`{where}`](../../{where}); "
        f"{range_of(rows, 'clients')} clients, {range_of(rows, 'cohort')} a round, "
        f"{range_of(rows, 'rounds')} rounds; "
        f"seed{'s' * (len(item['seeds']) > 1)} {', '.join(map(str, item['seeds']))}."
    )
    if places:
        out += f" {places}."
    if tuning := item.get("tuning"):
        trial_count, tuning_count = (
            max(len(list_tried(item, v, what)) for v in item["variants"]) for what in LISTS
        )
        out += (
            f" Each variant has the best of {trial_count} trials by validation, on seed "
            f"{tuning['seed']}{f', {told}' if (told := tuning.get('division')) else ''}."
        )
        if tuning_count:
            out += (
                f" Then how clients tune has the best of {tuning_count}, by the mean validation "
                "loss of what they keep."
            )
    out += _describe_samples(rows)
    if at_end := [variant for variant in item["variants"] if _chose_end(item, rows, variant)]:
        out += f" The choice is the end of what was tried: {', '.join(at_end)}."
    return out


def _describe_samples(rows: Sequence[Row]) -> str:
    """By how many samples models are judged, where any are, and what that number alone does."""
    tests = [t for row in rows for t in row.get("test", {}).values() if "seen_by" in t]
    if not tests:
        return ""
    made, real, floor = (range_of(tests, key) for key in ("made", "real", "floor"))
    return (
        f" {tests[0]['seen_by']}: {made} samples of a model against {real} test pictures, two "
        f"halves of which lie {floor} apart."
    )


def _chose_end(item: Row, rows: Sequence[Row], variant: str) -> bool:
    """Whether more trials might do better: rates are tried in their order."""
    choice, lists = (
        select_variant(rows, variant)[0]["chosen"],
        (list_tried(item, variant, w) for w in LISTS),
    )
    ends = (end for told in lists if len(told) > 1 for end in (told[0], told[-1]))
    return bool(choice) and any(merge(choice, end) == choice for end in ends)


def clients(item: Row, rows: Sequence[Row]) -> Lines:
    """A row a division and value: what each client has of the item's last model over its first.

    The first model is that of the first division, whatever the others did before their last one.
    """
    first, last = item["models"][0], item["models"][-1]
    name = name_measure("pooled", rows[0])
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
    body, verdicts, base = [], [""], next(iter(group_by_division(rows).values()))
    for division, held in by_client(item, rows).items():
        for variant, client_gains in held.items():
            start, records = (
                select_variant(base, variant),
                select_variant(group_by_division(rows)[division], variant),
            )
            shares = (
                [gain.share_gained for gain in client_gains],
                [gain.share_lost for gain in client_gains],
            )
            cells = [
                link(spread(values(start, first, "pooled")), item, start),
                link(spread(values(records, last, "pooled")), item, records),
                link(between([gain.mean for gain in client_gains]), item, records),
                *(link(spread([100 * s for s in share]), item, records) for share in shares),
            ]
            body.append([division, variant, format_choice(records), *cells])
        verdicts.append(f"- {division}: {describe_gains(held)}.")
    return ["", *make_table(heads, body, (0, 1, 5, 6, 7)), *verdicts]


def by_client(item: Row, rows: Sequence[Row]) -> dict[str, dict[str, list[Gain]]]:
    """By division and variant, a seed each, what clients have over the first division's model."""
    held, (first, *_, last) = group_by_division(rows), item["models"]
    base = next(iter(held.values()))

    def gain(ours: Row, theirs: Row) -> Gain:
        found = enumerate(gains(ours["test"][last]["each"], theirs["test"][first]["each"]))
        least = sorted(found, key=lambda client: client[1])
        return Gain(
            last, first, newcomers=False, gain_by_client={str(c): gain for c, gain in least}
        )

    return {
        division: {
            variant: list(map(gain, select_variant(own, variant), select_variant(base, variant)))
            for variant in dict.fromkeys(row["variant"] for row in own)
        }
        for division, own in held.items()
    }


def describe_gains(held: dict[str, list[Gain]]) -> str:
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
        provoked = select_variant(rows, failure["variant"])
        others = [row for row in rows if row["variant"] != failure["variant"]]
        for title in failure["findings"]:
            named = [row for row in provoked if title in row["findings"]]
            cells = [count_findings(title, own, item) for own in (provoked, others)]
            by = format_overrides(get_overrides(item, failure["variant"]))
            evidence = named[0]["findings"][title] if named else NONE
            body.append([failure["name"], f"`{by}`", title, *cells, evidence])
    sound = [v for v in item["variants"] if v not in {f["variant"] for f in item["failures"]}]
    healthy = [row for variant in sound for row in select_variant(rows, variant)]
    found = dict.fromkeys(title for row in healthy for title in row["findings"])
    alarms = "; ".join(f"{title} ({count_findings(title, healthy, item)})" for title in found)
    about = f"Where nothing was provoked, the diagnosis says: {alarms or 'nothing'}."
    return ["", *make_table(heads, body), "", about]


def count_findings(title: str, rows: Sequence[Row], item: Row) -> str:
    """In how many of the runs a finding is named."""
    return link(f"{sum(title in row['findings'] for row in rows)} of {len(rows)}", item, rows)


VIEWS: dict[str, View] = {
    "methods": each_division(methods),
    "clients": clients,
    "convergence": each_division(convergence),
    "curve": each_division(curve),
    "grid": grid,
    "drift": each_division(drift),
    "signatures": signatures,
    "seeds": seeds,
    "validation": validation,
    "samples": samples,
}
"""Ways to show an item's records as a table."""
