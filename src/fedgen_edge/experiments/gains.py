"""What each client has of a run, and its gains as a distribution over clients."""

from dataclasses import dataclass

from fedgen_edge.experiments.summary import RunFiles, by_client, by_model


@dataclass(frozen=True)
class ClientRow:
    """One client: what it has, and each model's number on its test data."""

    client: str
    train: int
    items: int
    newcomer: bool
    tested: dict[str, float]


def per_client(run: RunFiles) -> list[ClientRow]:
    """A row a client, in the run's order."""
    models = {model: by_client(run.measure, rows) for model, rows in by_model(run).items()}
    return [
        ClientRow(name, row["train"], row["items"], row.get("newcomer", False), found)
        for row in run.clients
        for name in [row["client"]]
        for found in [{m: each[name] for m, each in models.items() if name in each}]
    ]
