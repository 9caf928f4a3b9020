"""The commands on a run's models: parse, call, print, as `cli` does."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from fedgen_edge import files
from fedgen_edge.cli.imports import speed_up_imports
from fedgen_edge.config import Evaluation
from fedgen_edge.errors import ConfigError

if TYPE_CHECKING:
    from fedgen_edge.tasks.task import TextTask, TrainableTask
    from fedgen_edge.types import Leaves

MIN_SCALE, MAX_SCALE = 1e-3, 1e3
"""Range of factors and divisors of logits: beyond it, logits become infinite."""


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


def generate(options: Generate) -> None:
    """`fedgen generate RUN --client ID --prompt TEXT`, or `--class NAME --out FILE`."""
    from fedgen_edge.runs.folders import find_model_folder, read_run

    _check_ranges(options)
    settings, facts = read_run(options.run)
    _check_material(options, images=settings.task != "language")
    folder = None if options.backbone else find_model_folder(options.run, options.client)
    with speed_up_imports():
        from fedgen_edge.runs.models import load_task
        from fedgen_edge.tasks.task import TextTask

    task = load_task(options.run)
    adapter = task.model.load(folder) if folder else task.model.get_backbone_leaves()
    if isinstance(task, TextTask):
        chat = options.chat or (bool(facts.get("chat")) and not options.no_chat)
        _print_text(options, task, adapter, chat=chat)
    else:
        _draw_images(options, task, adapter)


def _check_ranges(options: Generate) -> None:
    for name in ("max_new_tokens", "n", "steps"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{_format_option(options, name)} must be at least 1")
    bounds = {
        "temperature": (
            options.temperature == 0 or MIN_SCALE <= options.temperature <= MAX_SCALE,
            f"0 (the most probable token), or from {MIN_SCALE} to {MAX_SCALE}",
        ),
        "top_p": (0 < options.top_p <= 1, "above 0, and at most 1"),
        "top_k": (options.top_k >= 0, "at least 0"),
        "repetition_penalty": (
            MIN_SCALE <= options.repetition_penalty <= MAX_SCALE,
            f"from {MIN_SCALE} to {MAX_SCALE}",
        ),
    }
    for name, (fits, wanted) in bounds.items():
        if not fits:
            raise ConfigError(f"{_format_option(options, name)} must be {wanted}")
    for option, excluded in (("chat", "no_chat"), ("client", "backbone")):
        if getattr(options, option) and getattr(options, excluded):
            raise ConfigError(
                f"--{option} and --{excluded.replace('_', '-')}: leave one of them out"
            )


def _format_option(options: Generate, name: str) -> str:
    return f"--{name.replace('_', '-')}={getattr(options, name)}"


def _check_material(options: Generate, *, images: bool) -> None:
    """Refuse options of images for a text model, and the other way around."""
    if not images and options.kind is not None:
        raise ConfigError(
            f"--class={options.kind!r} is for pictures, and this run learns text: say --prompt"
        )
    if images and options.prompt is not None:
        raise ConfigError(
            f"--prompt={options.prompt!r} is for text, and this run learns pictures: say --class"
        )
    if not images and options.prompt is None:
        raise ConfigError("--prompt is missing: give the text to continue")
    if images and options.out is not None and options.out.is_dir():
        raise ConfigError(f"--out={options.out} is a folder: name a file")


def _print_text(options: Generate, task: "TextTask", adapter: "Leaves", *, chat: bool) -> None:
    from fedgen_edge.tasks.generation import Decoding

    decoding = Decoding(
        options.max_new_tokens,
        0.0 if options.greedy else options.temperature,
        options.top_p,
        options.top_k,
        options.repetition_penalty,
    )
    print(task.generate(adapter, options.prompt or "", decoding, options.seed, chat=chat))


def _draw_images(options: Generate, task: "TrainableTask", adapter: "Leaves") -> None:
    from fedgen_edge.tasks.images.common import encode_png

    plan = Evaluation(
        prompts=() if options.kind is None else (options.kind,),
        sample_images=options.n,
        sample_steps=options.steps,
        sampler=options.sampler,
    )
    for sample in task.samples(adapter, plan, options.seed):
        assert sample.image is not None
        out = options.out or options.run / "generated.png"
        files.write(out, encode_png(sample.image))
        print(out)


def export(options: Export) -> None:
    """`fedgen export RUN --out FOLDER`."""
    from fedgen_edge.runs.folders import find_model_folders

    out = options.out or options.run / "export"
    find_model_folders(options.run, [options.client] if options.client or options.merge else ())
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        content = "a run" if (out / "settings.toml").exists() else "files"
        raise ConfigError(f"{out} already holds {content}: name another folder by --out")
    with speed_up_imports():
        from fedgen_edge.runs.models import export as copy_out

    for path in copy_out(options.run, out, options.client, merge=options.merge):
        print(path)
