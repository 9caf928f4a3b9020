"""What a file of a run holds: a class for each kind of line, entry or object.

A field that no reader needs is left out here, and may hold anything.
"""

from collections.abc import Mapping
from dataclasses import field
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import ConfigDict, Field, InstanceOf, Strict
from pydantic.dataclasses import dataclass

LOOSE = ConfigDict(extra="ignore")
Text = InstanceOf[str]
"""Clients' names may have letters that UTF-8 does not."""
Real = Annotated[float, Strict()]
"""A number, whole or not, infinite or nan, and no flag."""
Whole = Annotated[int, Strict()]
Flag = Annotated[bool, Strict()]
Reals = dict[Any, Real]


@dataclass(frozen=True, config=LOOSE)
class Sums:
    """Of held-out data."""

    total: Real
    count: Real
    words: Real = 0


@dataclass(frozen=True, config=LOOSE)
class Participation:
    """A client's part in a round."""

    client: Text
    loss: Real
    steps: Whole
    weight: Real
    bytes_up: Whole
    drift: Real | None
    cluster: Whole | None = None


@dataclass(frozen=True, config=LOOSE)
class Round:
    """A line of rounds.jsonl."""

    round: Whole
    cohort: list[Text]
    loss: Real | None
    bytes_up: Whole
    bytes_down: Whole
    clients: list[Participation]
    validation: Sums | None = None
    layers: dict[Any, Reals] | None = None
    mean_norm: Real | None = None
    clock: Real = 0
    seconds: Real = 0

    def __post_init__(self) -> None:
        if self.mean_norm is not None and any(client.drift is None for client in self.clients):
            raise ValueError("a round with mean_norm has each client's drift")


@dataclass(frozen=True, config=LOOSE)
class Tuning:
    """A line of personal.jsonl."""

    client: Text
    validation: Annotated[list[Real], Field(min_length=1)]
    chosen: Annotated[Whole, Field(ge=0)]
    folder: Text
    test: Sums
    cluster: Whole | None = None
    seconds: Real = 0

    def __post_init__(self) -> None:
        if self.chosen >= len(self.validation):
            raise ValueError(f"chosen={self.chosen} is none of its epochs")


@dataclass(frozen=True, config=LOOSE)
class Tested:
    """A line of evaluation.jsonl."""

    model: Text
    client: Text
    total: Real
    count: Real
    words: Real = 0
    participated: Flag = True
    seconds: Real = 0


@dataclass(frozen=True, config=LOOSE)
class Sampled:
    """A line of samples.jsonl."""

    model: Text
    client: Text | None
    prompt: Text
    text: Text = ""
    picture: Text = ""

    def __post_init__(self) -> None:
        if "\0" in self.picture:
            raise ValueError("picture is no file's name")


@dataclass(frozen=True, config=LOOSE)
class Distance:
    """A line of distances.jsonl."""

    model: Text
    client: Text | None
    distance: Text
    frechet: Real | None
    made: Whole
    real: Whole
    few: Text | None = None
    kernel: Annotated[list[Real], Field(min_length=3, max_length=3)] | None = None
    floor: Real = 0
    precision: Real = 0
    recall: Real = 0
    density: Real = 0
    coverage: Real = 0
    diversity: Reals = field(default_factory=dict)
    shares: Reals = field(default_factory=dict)
    real_shares: Reals = field(default_factory=dict)
    participated: Flag = True
    seconds: Real = 0

    def __post_init__(self) -> None:
        if self.shares.keys() != self.real_shares.keys():
            raise ValueError("shares and real_shares are of the same classes")


@dataclass(frozen=True, config=LOOSE)
class Client:
    """An entry of clients.json."""

    client: Text
    train: Whole
    items: Whole
    newcomer: Flag = False
    labels: dict[Any, Whole] | None = None


@dataclass(frozen=True, config=LOOSE)
class Backbone:
    """What run.json says of the backbone."""

    sha256: Text
    path: Text = ""
    parameters: Whole = 0


@dataclass(frozen=True, config=LOOSE)
class Change:
    """A setting that was changed before a run was resumed."""

    round: Whole
    name: Text
    before: Any
    now: Any


@dataclass(frozen=True, config=LOOSE)
class Facts:
    """run.json."""

    measure: list[Any] = field(default_factory=list)
    backbone: Backbone | None = None
    settings: dict[Any, Any] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    adapter_bytes: Real = 0
    full_bytes: Real = 0
    peak_bytes: Real = 0
    finished: Flag = False


@dataclass(frozen=True, config=LOOSE)
class ServerFacts:
    """run.json of a run at sites."""

    backbone: Backbone
    run: Text
    recipe: Text
    finished: Flag
    drawn: Text = ""


@dataclass(frozen=True, config=LOOSE)
class Enrolled:
    """An entry of sites.json."""

    client: Text
    weight: Whole = 0


@dataclass(frozen=True, config=LOOSE)
class Presence:
    """now.json."""

    there: list[Text]


@dataclass(frozen=True, config=LOOSE)
class Question:
    """What a site was asked."""

    round: Whole
    client: Whole
    base: Text
    accepted: Text | None


@dataclass(frozen=True, config=LOOSE)
class SiteRun:
    """run.json of a site's state."""

    run: Text


@dataclass(frozen=True, config=LOOSE)
class SiteTuning:
    """personal.json of a site's state."""

    asked: Question
    said: dict[Any, Any]


@dataclass(frozen=True, config=LOOSE)
class SiteUpdate:
    """trained.json of a site's state."""

    asked: Question
    said: dict[Any, Any]
    payload: Text
    memory: Text


@dataclass(frozen=True, config=LOOSE)
class Manifest:
    """manifest.json of a checkpoint."""

    round: Whole
    server: Text
    memory: dict[int, tuple[Text, Text]]
    previous: Text | None
    digest: Text


TYPES: Mapping[str, Any] = MappingProxyType(
    {
        "rounds.jsonl": Round,
        "personal.jsonl": Tuning,
        "evaluation.jsonl": Tested,
        "samples.jsonl": Sampled,
        "distances.jsonl": Distance,
        "clients.json": list[Client],
        "run.json": Facts,
        "sites.json": list[Enrolled],
        "now.json": Presence,
        "manifest.json": Manifest,
    }
)
"""By a file's name: what its lines are (.jsonl), or the whole is (.json)."""
