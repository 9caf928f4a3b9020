"""Who may take part, by the keys in a server's folder: a site can be sent away while it works."""

from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from fedgen_edge.network.messages import Carrier, Reply, WorkRequest


def read_member_keys(folder: Path) -> dict[str, bytes]:
    """Who may take part: public keys in OpenSSH's form by name, sorted; a revoked name never."""
    revoked_names = {name.casefold() for name in list_revoked(folder)}
    return {
        name: (folder / "sites" / f"{name}.pub").read_bytes()
        for name in list_key_names(folder / "sites")
        if name.casefold() not in revoked_names
    }


def list_revoked(folder: Path) -> list[str]:
    """Who took part once, sorted."""
    return list_key_names(folder / "revoked")


def list_key_names(folder: Path) -> list[str]:
    """Of the public keys in a folder, sorted."""
    return sorted(path.stem for path in folder.glob("*.pub"))


@dataclass(frozen=True)
class MemberCarrier:
    """A carrier that reaches only the sites that may take part now."""

    carrier: Carrier
    members: Callable[[], Collection[str]]
    """Names of the sites that may take part now."""

    def present(self) -> list[str]:
        """Names of members that can be asked now, sorted."""
        members = self.members()
        return [name for name in self.carrier.present() if name in members]

    def exchange(self, work: Mapping[str, WorkRequest], seconds: float) -> Generator[Reply]:
        """Ask each site; a reply of one that was sent away meanwhile is replaced by a failure."""
        with closing(self.carrier.exchange(work, seconds)) as replies:
            for reply in replies:
                if reply.site in self.members():
                    yield reply
                else:
                    yield Reply(reply.site, "", b"", failed="it may take part no longer")
