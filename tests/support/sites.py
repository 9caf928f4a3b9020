"""Kits, sites and a server in a loop, that tests of a deployment share."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from conftest import sentences
from fedgen_edge.compression.serialize import encode
from fedgen_edge.config import Settings, from_table, to_toml
from fedgen_edge.deploy import settings as deployed
from fedgen_edge.deploy.site.site import Site
from fedgen_edge.leaves import select
from fedgen_edge.network.messages import (
    Answer,
    Terms,
    WorkKind,
    WorkRequest,
    decode_message,
    digest,
    encode_line,
)
from fedgen_edge.types import Leaves

RUN = "0123456789abcdef" * 2
NAMES = ("east", "north", "west")
"""In the order of their numbers."""


def recipe(path: Path | None, **more: dict[str, Any]) -> Settings:
    """A quick run of three sites; FedPer, so that they keep something."""
    table: dict[str, Any] = {
        "backbone": {"path": "tiny", "precision": "float32"},
        "adapter": {"dropout": 0.1},
        "data": {"source": "jsonl", "client_field": "who", "length": 32},
        "federation": {"rounds": 3, "cohort": 2},
        "method": {"name": "fedper"},
        "training": {"batch": 2, "schedule": "cosine"},
        "personal": {"epochs": 2},
        "engine": {"name": "serial", "threads": 1, "device": "cpu"},
    }
    if path:
        table["data"]["path"] = str(path)
    return from_table({k: {**table.get(k, {}), **more.get(k, {})} for k in {*table, *more}})


def rows(names: Sequence[str] = NAMES) -> list[dict[str, str]]:
    """Texts of some sites, of unequal number."""
    return [
        {"text": text, "who": name}
        for c, name in enumerate(NAMES)
        if name in names
        for text in sentences(10 + 3 * c, c)
    ]


def write_rows(path: Path, lines: Sequence[Mapping[str, str]]) -> Path:
    """The same as a file."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def kit(folder: Path, name: str, **more: dict[str, Any]) -> Path:
    """A site's kit, and its data beside it."""
    folder.mkdir(parents=True)
    path = write_rows(folder / "texts.jsonl", rows([name]))
    (folder / "recipe.toml").write_text(to_toml(recipe(None, **more)))
    site = deployed.SiteSettings(name, "localhost:19443", own={"data.path": str(path)})
    (folder / "site.toml").write_bytes(deployed.encode_toml(site))
    for file in ("ca.crt", "key", "key.pub", "secret"):
        (folder / file).write_bytes(b"0123456789abcdef" * 4)
        (folder / file).chmod(0o600)
    return folder


def terms(site: Site, run: str = RUN) -> Terms:
    """What this site and its server agree on."""
    return Terms(run, site.recipe, site.experiment.task.model.sha256, drawn=site.drawn_digest)


def work(site: Site, kind: WorkKind, adapter: Leaves | None = None, **more: Any) -> WorkRequest:
    """Some work for the first site, in the first round."""
    payload = encode(select(adapter, site.shared_shapes.__contains__)) if adapter else b""
    plain = WorkRequest(kind, terms(site), 0, 0, 0, None, payload)
    return replace(plain, **more)


def ask(site: Site, asked: WorkRequest) -> Answer:
    """What the site answers, over lines and bytes."""
    return decode_message(Answer, *site.handle(encode_line(asked), asked.payload))


@dataclass
class Server:
    """What a server remembers of its sites."""

    sites: Sequence[Site]
    accepted: dict[int, str | None] = field(default_factory=dict)
    attempt: int = 0

    def ask(
        self, number: int, kind: WorkKind, round_: int, adapter: Leaves | None = None
    ) -> Answer:
        """Ask one site; no refusal is expected."""
        site, counts = self.sites[number], self.accepted.get(number)
        more = {"client": number, "round": round_, "accepted": counts, "attempt": self.attempt}
        answer = ask(site, work(site, kind, adapter, **more))
        assert answer.refused is None, answer.said
        return answer

    def count(self, number: int, answer: Answer) -> None:
        """The site's update counts."""
        self.accepted[number] = digest(answer.payload)
