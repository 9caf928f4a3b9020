"""Properties of a method's merging, as declared in the table of methods.

The contract suite tests each declared property, and shows by example that the others do not hold.
It also tests two properties of every method: the order of clients does not matter, and float32 and
float64 agree.
"""

from typing import NamedTuple


class MergeProperties(NamedTuple):
    """The properties in which methods differ; the defaults are FedAvg's."""

    alone: bool = True
    """With one client, or clients that agree, the server gets exactly what they have."""
    halves: bool = True
    """Splitting a client into two with half of its examples each changes nothing."""
    weighed: bool = True
    """Clients have weights, and a total of zero is an error; if False, all count equally."""
    splits: bool = False
    """The server's product is the same however a client scales its factors, as A / c and c B."""
    sums: bool = True
    """The server needs only weighted sums of client updates, which others may compute."""
    exact: bool = False
    """The server's product is the mean of the clients' products, weighted by examples."""
