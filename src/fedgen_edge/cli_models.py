"""The commands on a run's models: parse, call, print, as `cli` does."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from fedgen_edge import files
from fedgen_edge.config import Evaluation
from fedgen_edge.errors import ConfigError
from fedgen_edge.imports import importing

if TYPE_CHECKING:
    from fedgen_edge.tasks.task import Learnt, Worded
    from fedgen_edge.types import Leaves

LEAST, MOST = 1e-3, 1e3
"""Of what logits are divided or multiplied by: beyond, they leave the finite numbers."""


@dataclass(frozen=True)
class Generate:
    """Have the backbone, the global model or one client's own go on with a text, or draw."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""
    prompt: str | None = None
    """Text to continue, or to answer in a chat."""
    client: str | None = None
    """Whose model; default: the global one."""
    backbone: bool = False
    """Use the backbone as it came."""
    chat: tyro.conf.FlagCreatePairsOff[bool] = False
    """Ask as a user does, by the backbone's chat template; default where the run's texts are
    written by it."""
    no_chat: tyro.conf.FlagCreatePairsOff[bool] = False
    """Continue the text; default for all other runs."""
    max_new_tokens: Annotated[int, tyro.conf.arg(aliases=["--tokens"])] = 60
    """Most tokens to add."""
    temperature: float = 0.7
    """Divides the logits before a token is drawn; 0 is greedy."""
    greedy: bool = False
    """Take the most probable token each time."""
    top_p: float = 0.9
    """Draw from the smallest set of tokens whose probability reaches this; 1 is all."""
    top_k: int = 0
    """Draw from this many of the most probable tokens; 0 is all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that are there already become less probable."""
    seed: int = 0
    """Seeds the sampling."""
    kind: Annotated[str | None, tyro.conf.arg(name="class")] = None
    """Class of pictures to draw; default: all."""
    n: int = 8
    """Pictures of a class."""
    steps: int = 25
    """Denoising steps of a picture (diffusion)."""
    sampler: Literal["ddim", "dpm-solver"] = "ddim"
    """Takes those steps; dpm-solver does with fewer."""
    out: Path | None = None
    """Where the pictures go, as one PNG; default: RUN/generated.png."""


@dataclass(frozen=True)
class Export:
    """Copy out a run's adapters as PEFT folders, or merge one into the backbone."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""
    out: Path | None = None
    """Folder to make; none is RUN/export."""
    client: str | None = None
    """Whose adapter; none is the global one, and all clients' where they are not merged."""
    merge: bool = False
    """Write a whole Hugging Face model instead."""


def generate(told: Generate) -> None:
    """`fedgen generate RUN --client ID --prompt TEXT`, or `--class NAME --out FILE`."""
    from fedgen_edge.experiments.folders import began, folder_of

    _check_ranges(told)
    settings, facts = began(told.run)
    _check_material(told, pictures=settings.task != "language")
    folder = None if told.backbone else folder_of(told.run, told.client)
    with importing():
        from fedgen_edge.experiments.models import serve
        from fedgen_edge.tasks.task import Worded

    task = serve(told.run)
    adapter = task.model.load(folder) if folder else task.model.backbone()
    if isinstance(task, Worded):
        chat = told.chat or (bool(facts.get("chat")) and not told.no_chat)
        _print_text(told, task, adapter, chat=chat)
    else:
        _draw(told, task, adapter)


def _check_ranges(told: Generate) -> None:
    for name in ("max_new_tokens", "n", "steps"):
        if getattr(told, name) < 1:
            raise ConfigError(f"{_flag(told, name)} must be at least 1")
    bounds = {
        "temperature": (
            told.temperature == 0 or LEAST <= told.temperature <= MOST,
            f"0 (the most probable token), or from {LEAST} to {MOST}",
        ),
        "top_p": (0 < told.top_p <= 1, "above 0, and at most 1"),
        "top_k": (told.top_k >= 0, "at least 0"),
        "repetition_penalty": (
            LEAST <= told.repetition_penalty <= MOST,
            f"from {LEAST} to {MOST}",
        ),
    }
    for name, (fits, wanted) in bounds.items():
        if not fits:
            raise ConfigError(f"{_flag(told, name)} must be {wanted}")
    for one, other in (("chat", "no_chat"), ("client", "backbone")):
        if getattr(told, one) and getattr(told, other):
            raise ConfigError(f"--{one} and --{other.replace('_', '-')}: leave one of them out")


def _flag(told: Generate, name: str) -> str:
    return f"--{name.replace('_', '-')}={getattr(told, name)}"


def _check_material(told: Generate, *, pictures: bool) -> None:
    """Refuse what is of pictures where a model writes text, and the other way round."""
    if not pictures and told.kind is not None:
        raise ConfigError(
            f"--class={told.kind!r} is for pictures, and this run learns text: say --prompt"
        )
    if pictures and told.prompt is not None:
        raise ConfigError(
            f"--prompt={told.prompt!r} is for text, and this run learns pictures: say --class"
        )
    if not pictures and told.prompt is None:
        raise ConfigError("--prompt is missing: give the text to continue")
    if pictures and told.out is not None and told.out.is_dir():
        raise ConfigError(f"--out={told.out} is a folder: name a file")


def _print_text(told: Generate, task: "Worded", adapter: "Leaves", *, chat: bool) -> None:
    from fedgen_edge.tasks.generation import Decoding

    decoding = Decoding(
        told.max_new_tokens,
        0.0 if told.greedy else told.temperature,
        told.top_p,
        told.top_k,
        told.repetition_penalty,
    )
    print(task.generate(adapter, told.prompt or "", decoding, told.seed, chat=chat))


def _draw(told: Generate, task: "Learnt", adapter: "Leaves") -> None:
    from fedgen_edge.tasks.pictures import png

    plan = Evaluation(
        prompts=() if told.kind is None else (told.kind,),
        sample_pictures=told.n,
        sample_steps=told.steps,
        sampler=told.sampler,
    )
    for sample in task.samples(adapter, plan, told.seed):
        assert sample.picture is not None
        out = told.out or told.run / "generated.png"
        files.write(out, png(sample.picture))
        print(out)


def export(told: Export) -> None:
    """`fedgen export RUN --out FOLDER`."""
    from fedgen_edge.experiments.folders import folders

    out = told.out or told.run / "export"
    folders(told.run, [told.client] if told.client or told.merge else ())
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "a run" if (out / "settings.toml").exists() else "files"
        raise ConfigError(f"{out} already holds {what}: name another folder by --out")
    with importing():
        from fedgen_edge.experiments.models import export as copy_out

    for path in copy_out(told.run, out, told.client, merge=told.merge):
        print(path)
