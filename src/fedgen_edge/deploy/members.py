"""Who may take part, by the keys in a server's folder."""

from pathlib import Path


def members(folder: Path) -> dict[str, bytes]:
    """Who may take part: public keys in OpenSSH's form by name, sorted; a revoked name never."""
    gone = {name.casefold() for name in revoked(folder)}
    return {
        name: (folder / "sites" / f"{name}.pub").read_bytes()
        for name in names(folder / "sites")
        if name.casefold() not in gone
    }


def revoked(folder: Path) -> list[str]:
    """Who took part once, sorted."""
    return names(folder / "revoked")


def names(folder: Path) -> list[str]:
    """Of the public keys in a folder, sorted."""
    return sorted(path.stem for path in folder.glob("*.pub"))
