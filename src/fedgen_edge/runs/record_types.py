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
Integer = Annotated[int, Strict()]
Flag = Annotated[bool, Strict()]
Reals = dict[Any, Real]


@dataclass(frozen=True, config=LOOSE)
class MetricSums:
    """Of held-out data."""

    total: Real
    count: Real
    words: Real = 0


@dataclass(frozen=True, config=LOOSE)
class Participation:
    """A client's part in a round."""

    client: Text
    loss: Real
    steps: Integer
    weight: Real
    bytes_up: Integer
    drift: Real | None
    cluster: Integer | None = None


@dataclass(frozen=True, config=LOOSE)
class RoundRecord:
    """A line of rounds.jsonl."""

    round: Integer
    cohort: list[Text]
    loss: Real | None
    bytes_up: Integer
    bytes_down: Integer
    clients: list[Participation]
    validation: MetricSums | None = None
    layers: dict[Any, Reals] | None = None
    mean_norm: Real | None = None
    clock: Real = 0
    seconds: Real = 0

    def __post_init__(self) -> None:
        if self.mean_norm is not None and any(client.drift is None for client in self.clients):
            raise ValueError("a round with mean_norm has each client's drift")


@dataclass(frozen=True, config=LOOSE)
class TuningRecord:
    """A line of personal.jsonl."""

    client: Text
    validation: Annotated[list[Real], Field(min_length=1)]
    chosen: Annotated[Integer, Field(ge=0)]
    folder: Text
    test: MetricSums
    cluster: Integer | None = None
    seconds: Real = 0

    def __post_init__(self) -> None:
        if self.chosen >= len(self.validation):
            raise ValueError(f"chosen={self.chosen} is none of its epochs")


@dataclass(frozen=True, config=LOOSE)
class EvaluationRecord:
    """A line of evaluation.jsonl."""

    model: Text
    client: Text
    total: Real
    count: Real
    words: Real = 0
    participated: Flag = True
    seconds: Real = 0


@dataclass(frozen=True, config=LOOSE)
class SampleRecord:
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
class DistanceRecord:
    """A line of distances.jsonl."""

    model: Text
    client: Text | None
    distance: Text
    frechet: Real | None
    made: Integer
    real: Integer
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
class ClientRecord:
    """An entry of clients.json."""

    client: Text
    train: Integer
    items: Integer
    newcomer: Flag = False
    labels: dict[Any, Integer] | None = None


@dataclass(frozen=True, config=LOOSE)
class BackboneRecord:
    """What run.json says of the backbone."""

    sha256: Text
    path: Text = ""
    parameters: Integer = 0


@dataclass(frozen=True, config=LOOSE)
class SettingChange:
    """A setting that was changed before a run was resumed."""

    round: Integer
    name: Text
    before: Any
    now: Any


@dataclass(frozen=True, config=LOOSE)
class RunRecord:
    """run.json."""

    measure: list[Any] = field(default_factory=list)
    backbone: BackboneRecord | None = None
    settings: dict[Any, Any] = field(default_factory=dict)
    changes: list[SettingChange] = field(default_factory=list)
    adapter_bytes: Real = 0
    full_bytes: Real = 0
    peak_bytes: Real = 0
    finished: Flag = False


@dataclass(frozen=True, config=LOOSE)
class ServerRunRecord:
    """run.json of a run at sites."""

    backbone: BackboneRecord
    run: Text
    recipe: Text
    finished: Flag
    drawn: Text = ""


@dataclass(frozen=True, config=LOOSE)
class SiteRecord:
    """An entry of sites.json."""

    client: Text
    weight: Integer = 0


@dataclass(frozen=True, config=LOOSE)
class PresenceRecord:
    """now.json."""

    there: list[Text]


@dataclass(frozen=True, config=LOOSE)
class WorkRecord:
    """What a site was asked."""

    round: Integer
    client: Integer
    base: Text
    accepted: Text | None


@dataclass(frozen=True, config=LOOSE)
class SiteRun:
    """run.json of a site's state."""

    run: Text


@dataclass(frozen=True, config=LOOSE)
class SiteTuning:
    """personal.json of a site's state."""

    asked: WorkRecord
    said: dict[Any, Any]


@dataclass(frozen=True, config=LOOSE)
class SiteUpdate:
    """trained.json of a site's state."""

    asked: WorkRecord
    said: dict[Any, Any]
    payload: Text
    memory: Text


@dataclass(frozen=True, config=LOOSE)
class Manifest:
    """manifest.json of a checkpoint."""

    format: Integer
    round: Integer
    server: Text
    memory: dict[int, tuple[Text, Text]]
    previous: Text | None
    digest: Text


TYPES: Mapping[str, Any] = MappingProxyType(
    {
        "rounds.jsonl": RoundRecord,
        "personal.jsonl": TuningRecord,
        "evaluation.jsonl": EvaluationRecord,
        "samples.jsonl": SampleRecord,
        "distances.jsonl": DistanceRecord,
        "clients.json": list[ClientRecord],
        "run.json": RunRecord,
        "sites.json": list[SiteRecord],
        "now.json": PresenceRecord,
        "manifest.json": Manifest,
    }
)
"""By a file's name: what its lines are (.jsonl), or the whole is (.json)."""
