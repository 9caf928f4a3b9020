"""A carrier of those alone who may take part now: a site can be sent away while it works."""

from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass

from fedgen_edge.engines.exchange import Carrier, Reply, Work


@dataclass(frozen=True)
class Among:
    """A carrier that knows no other site, whoever can be reached."""

    carrier: Carrier
    members: Callable[[], Collection[str]]
    """Names of the sites that may take part now."""

    def present(self) -> list[str]:
        """Those of them that could be asked now, sorted."""
        may = self.members()
        return [name for name in self.carrier.present() if name in may]

    def exchange(self, work: Mapping[str, Work], seconds: float) -> Generator[Reply]:
        """Ask each site; what comes from one that no longer may is not brought."""
        with closing(self.carrier.exchange(work, seconds)) as replies:
            for reply in replies:
                if reply.site in self.members():
                    yield reply
                else:
                    yield Reply(reply.site, "", b"", failed="it may take part no longer")
