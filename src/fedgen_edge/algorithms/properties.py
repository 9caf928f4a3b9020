"""What holds of a method's merging, as its line in the catalogue declares it.

The contract suite tests what is declared, and shows by an example that what is not does not hold.
Of every method it asks two laws more, which none can be without: the order of clients does not
matter, and float32 and float64 agree.
"""

from typing import NamedTuple


class MergeProperties(NamedTuple):
    """The ones that methods differ in; FedAvg's by default."""

    alone: bool = True
    """Of one client, or of clients that agree, the server has what they have."""
    halves: bool = True
    """A client may be cut into two that each have half of its examples."""
    weighed: bool = True
    """Clients count by something of theirs, and to have nothing is an error: else all alike."""
    splits: bool = False
    """However a client splits its product, as A / c and c B, the server has the same one."""
    sums: bool = True
    """The server needs no more than weighted sums of what clients send, which others may form."""
    exact: bool = False
    """The server's product is the mean of the clients', by examples."""
