"""A saved view of a W&B project: the panels of `WandbSink`, in an order to look through."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tlens_callback.events import Watch
from tlens_callback.instruments import fast
from tlens_callback.meaning import Description, Quantity, described
from tlens_callback.reading import RESERVED
from tlens_callback.sinks.shown import STEP, Keys, figure_name, table_name

REPEATED = "repeat-24-0"
"""The repeated block that shown unless told otherwise."""

_MISSING = "a workspace needs wandb-workspaces: pip install 'tlens-callback[workspace]'"


def split_project(text: str) -> tuple[str, str]:
    """Entity and project of "ENTITY/PROJECT".

    Raises:
        ValueError: for anything else.
    """
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", text):
        raise ValueError(
            f"a project is named ENTITY/PROJECT, as in the address of its page, wandb.ai/ENTITY/"
            f"PROJECT; got {text!r}."
        )
    entity, project = text.split("/")
    return entity, project


def unreachable() -> str | None:
    """What keeps this machine from saving a view, and what to do about it; None if nothing does.

    Raises:
        ImportError: where wandb is not installed.
    """
    mode = os.environ.get("WANDB_MODE", "")
    if mode in ("offline", "disabled", "dryrun"):
        return f"WANDB_MODE is {mode}; unset it on a machine with a network"
    try:
        import wandb
    except ImportError as error:
        raise ImportError(_MISSING) from error
    try:
        known = wandb.login(prompt=False)
    except TypeError:  # wandb before 0.31 has no such argument
        known = wandb.api.api_key
    if not known:
        return "there is no API key; run `wandb login` or set WANDB_API_KEY"
    return None


@dataclass(frozen=True)
class Logged:
    """What the latest run of a project has logged.

    Attributes:
        probes: those whose attention patterns it shows.
        numbers, media: keys, without the name of the callback, of the instruments that the package
            does not have.
    """

    probes: Sequence[str] = ()
    numbers: Sequence[str] = ()
    media: Sequence[str] = ()


def logged_by(entity: str, project: str, *, name: str) -> Logged:
    """What the project's latest run has; nothing where it has none, or no run."""
    import wandb

    pattern = _patterns()
    known = {instrument for instrument, _ in _described()} | {*RESERVED, "page"}
    for run in wandb.Api().runs(f"{entity}/{project}", order="-created_at", per_page=1):
        keys = [k.removeprefix(f"{name}/") for k in run.summary.keys() if k.startswith(f"{name}/")]
        probes = sorted(k.removeprefix(pattern) for k in keys if k.startswith(pattern))
        others = sorted(k for k in keys if k.split("/")[0] not in known)
        is_file = {k: hasattr(run.summary[f"{name}/{k}"], "keys") for k in others}
        return Logged(
            probes, [k for k in others if not is_file[k]], [k for k in others if is_file[k]]
        )
    return Logged()


def _described() -> list[tuple[str, Description]]:
    """The instruments that a callback has unless told otherwise, what the observer and the watch
    read, and what each says about itself."""
    return [(one.name, described(one)) for one in (*fast(), Watch())]


def _patterns() -> str:
    """What the keys of attention patterns begin with."""
    return next(
        f"{name}/{measure}/"
        for name, said in _described()
        for measure, meaning in said.measures.items()
        if meaning.quantity is Quantity.ATTENTION
    )


def _headlines(said: Description) -> dict[tuple[str, ...], dict[str, list[str]]]:
    """Axes -> title of a panel -> measures, where every run has one of them."""
    found: dict[tuple[str, ...], dict[str, list[str]]] = {}
    always = {meaning.title for meaning in said.measures.values() if not meaning.sometimes}
    for measure, meaning in said.measures.items():
        if meaning.headline and meaning.axes is not None and meaning.title in always:
            found.setdefault(meaning.axes, {}).setdefault(meaning.title, []).append(measure)
    return found


def build(
    entity: str,
    project: str,
    *,
    name: str = "tlens",
    title: str = "Inside the model",
    probes: Sequence[str] = (REPEATED,),
    logged: Logged | None = None,
) -> Any:
    """The view, a `wandb_workspaces.workspaces.Workspace`, which is not saved yet.

    Sections, in this order: Training (loss, reward and gradient norm, evaluation loss, and what
    watching costs), Events, one for each group of instruments with their headlines (Heads, Answers,
    ...), Pictures, Tables, Page. Curves are over `train/global_step`; a media panel shows one step,
    with a slider.

    Args:
        name: the first segment of the keys, `name=` of the callback.
        probes: whose attention to show, one panel each.
        logged: of a run; what it has of other instruments is shown too, under "Others".

    Raises:
        ImportError: where wandb-workspaces is not installed.
        ValueError: for a name that a callback cannot have.
    """
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise ImportError(_MISSING) from error
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"name is made of letters, digits, - and _, got {name!r}.")

    keys = Keys(name)

    def curves(*panels: tuple[str, Sequence[str]]) -> list[Any]:
        return [reports.LinePlot(title=heading, x=STEP, y=list(y)) for heading, y in panels]

    def searched(*panels: tuple[str, str]) -> list[Any]:
        """Curves of all keys that match a pattern: one for each probe, say."""
        return [
            reports.LinePlot(title=heading, x=STEP, metric_regex=pattern)
            for heading, pattern in panels
        ]

    def shown(media: Sequence[tuple[str, str]]) -> list[Any]:
        return [
            reports.MediaBrowser(
                title=heading,
                media_keys=[keys(key)],
                mode="gallery",
                gallery_axis="step",
                num_columns=1,
            )
            for key, heading in media
        ]

    groups: dict[str, list[Any]] = {"Heads": [[], []]}
    tables: list[tuple[str, str]] = []
    for instrument, said in _described():
        if said.group in ("Events", "Pictures"):
            continue
        numbers, figures = groups.setdefault(said.group, [[], []])
        for axes, titled in _headlines(said).items():
            if not axes:
                numbers += [(title, _any_of(name, instrument, of)) for title, of in titled.items()]
            elif len(axes) == 1 and axes != ("layer",):
                tables.append((f"{instrument}/{table_name(*axes)}", next(iter(titled))))
            elif axes[1:2] == ("rank",):
                tables.append((f"{instrument}/{table_name(*axes)}", next(iter(titled))))
            elif len(axes) <= 2:
                figure = "by_layer" if axes == ("layer",) else figure_name(*axes)
                figures.append((f"{instrument}/{figure}", said.title))
    watch = Watch()
    followed = [(described(watch).others.title, f"^{name}/{watch.name}/.*_L[0-9]+H[0-9]+$")]
    groups["Heads"][0][:0] = followed
    pictures = [(f"{_patterns()}{probe}", f"Attention: {probe}") for probe in probes]
    sections = [
        (
            "Training",
            curves(
                ("Loss", ["train/loss", "eval/loss"]),
                ("Reward", ["train/reward"]),
                ("Gradient norm", ["train/grad_norm"]),
                ("Share of the time spent on looking", [f"{name}/cost/share"]),
            ),
        ),
        (
            "Events",
            [
                *curves(("Events", [f"{name}/{watch.name}/count"])),
                *shown([(f"{watch.name}/{table_name('event')}", "What happened")]),
            ],
        ),
        *(
            (group, [*searched(*numbers), *shown(figures)])
            for group, (numbers, figures) in groups.items()
            if numbers or figures
        ),
        ("Pictures", shown(pictures)),
        ("Tables", shown(tables)),
    ]
    if logged is not None and (logged.numbers or logged.media):
        of_measures = dict.fromkeys("/".join(key.split("/")[:2]) for key in logged.numbers)
        split = [key.split("/") for key in of_measures]
        others = [("/".join(both), _any_of(name, both[0], both[1:])) for both in split]
        sections.append(("Others", [*searched(*others), *shown([(k, k) for k in logged.media])]))
    sections.append(("Page", shown([("page", "The page")])))
    across = {"Pictures": 1, "Tables": 2, "Page": 1}
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=title,
        sections=[
            workspaces.Section(
                name=heading,
                panels=panels,
                is_open=True,
                layout_settings=workspaces.SectionLayoutSettings(
                    columns=across.get(heading, 3), rows=2 if len(panels) > 1 else 1
                ),
                panel_settings=workspaces.SectionPanelSettings(x_axis=STEP),
            )
            for heading, panels in sections
        ],
        settings=workspaces.WorkspaceSettings(x_axis=STEP),
        auto_generate_panels=False,
    )


def _any_of(name: str, instrument: str, measures: Sequence[str]) -> str:
    """A pattern for the keys of these measures, of a probe or of none."""
    return f"^{name}/{re.escape(instrument)}/({'|'.join(map(re.escape, measures))})(/.*)?$"
