"""What rounds say of merging: how clients' changes agree, and what became of each layer."""

from fedgen_edge.experiments.summary import Number, Row


def agreement(row: Row) -> Number | None:
    """Mean cosine between two clients' updates, from norms alone; none where nothing is merged.

    |sum w d|^2 is sum w^2 |d|^2 plus the products of pairs, so the rest is the pairs' share.
    """
    total = sum(c["weight"] for c in row["clients"]) or 1.0
    pulls = [c["weight"] / total * c["drift"] for c in row["clients"]]
    alone = sum(pull * pull for pull in pulls)
    pairs = sum(pulls) ** 2 - alone
    if not row["bytes_up"] or not pairs > 1e-9 * alone:
        return None
    return (row.get("mean_norm", row["update_norm"]) ** 2 - alone) / pairs
