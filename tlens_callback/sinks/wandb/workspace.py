"""Builds a saved view of a W&B project: the panels of `WandbSink` in a useful order."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tlens_callback.events import Watch
from tlens_callback.instruments import fast
from tlens_callback.meaning import Description, Quantity, described
from tlens_callback.reading import RESERVED
from tlens_callback.rollouts import Look
from tlens_callback.sinks.shown import STEP, Keys, figure_name, table_name

REPEATED = "repeat-24-0"
"""The repeated block whose attention is shown by default."""

_MISSING = "The workspace needs wandb-workspaces: pip install 'tlens-callback[workspace]'"


def split_project(text: str) -> tuple[str, str]:
    """Splits "ENTITY/PROJECT" into entity and project.

    Raises:
        ValueError: if the text has another form.
    """
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", text):
        raise ValueError(
            f"the project must be given as ENTITY/PROJECT, as in the address of its page, "
            f"wandb.ai/ENTITY/PROJECT; got {text!r}."
        )
    entity, project = text.split("/")
    return entity, project


def unreachable() -> str | None:
    """Says why this machine cannot save a view and what to do about it; None if it can.

    Raises:
        ImportError: if wandb is not installed.
    """
    mode = os.environ.get("WANDB_MODE", "")
    if mode in ("offline", "disabled", "dryrun"):
        return f"WANDB_MODE is {mode}; unset it, on a machine with a network"
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
    """Lists what the latest run of a project has logged.

    Attributes:
        probes: the probes whose attention patterns it shows.
        numbers, media: keys, without the name of the callback, of instruments that are not the
            package's own.
        rollouts: whether it has looked at rollouts.
    """

    probes: Sequence[str] = ()
    numbers: Sequence[str] = ()
    media: Sequence[str] = ()
    rollouts: bool = False


def logged_by(entity: str, project: str, *, name: str) -> Logged:
    """Returns what the project's latest run has logged; nothing if there is no run."""
    import wandb

    pattern = _patterns_prefix()
    known = {instrument for instrument, _ in _descriptions()} | {*RESERVED, "page"}
    for run in wandb.Api().runs(f"{entity}/{project}", order="-created_at", per_page=1):
        keys = [k.removeprefix(f"{name}/") for k in run.summary.keys() if k.startswith(f"{name}/")]
        probes = sorted(k.removeprefix(pattern) for k in keys if k.startswith(pattern))
        others = sorted(k for k in keys if k.split("/")[0] not in known)
        is_file = {k: hasattr(run.summary[f"{name}/{k}"], "keys") for k in others}
        return Logged(
            probes,
            [k for k in others if not is_file[k]],
            [k for k in others if is_file[k]],
            rollouts=any(k.startswith(f"{Look.name}/") for k in keys),
        )
    return Logged()


def _descriptions() -> list[tuple[str, Description]]:
    """Returns name and description of the default instruments and of the watch."""
    return [(one.name, described(one)) for one in (*fast(), Watch())]


def _patterns_prefix() -> str:
    """Returns what the keys of attention patterns begin with."""
    return next(
        f"{name}/{measure}/"
        for name, said in _descriptions()
        for measure, meaning in said.measures.items()
        if meaning.quantity is Quantity.ATTENTION
    )


def _headline_panels(
    said: Description, *, sometimes: bool = False
) -> dict[tuple[str, ...], dict[str, list[str]]]:
    """Returns axes -> title of a panel -> measures, for panels that have a measure in any run; with
    `sometimes`, also for those that have one in some."""
    found: dict[tuple[str, ...], dict[str, list[str]]] = {}
    measures = said.measures.items()
    shown = {meaning.title for _, meaning in measures if sometimes or not meaning.sometimes}
    for measure, meaning in measures:
        if meaning.headline and meaning.axes is not None and meaning.title in shown:
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
    """Builds the view, a `wandb_workspaces.workspaces.Workspace`, without saving it.

    It has these sections, in this order: Training (loss, reward and gradient norm, evaluation loss,
    and what watching costs), Events, Rollouts (curves, winners against losers, and the rollouts
    themselves) if the run has looked at some, one for each group of instruments with their
    headlines (Heads, Answers, ...), Pictures, Tables, Page. Curves are over `train/global_step`; a
    media panel shows one step, with a slider.

    Args:
        name: the first segment of the keys, `name=` of the callback.
        probes: the probes whose attention is shown, one panel each.
        logged: what a run has logged; its readings of other instruments are shown under "Others".

    Raises:
        ImportError: if wandb-workspaces is not installed.
        ValueError: for a name that a callback cannot have.
    """
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise ImportError(_MISSING) from error
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"name may only have letters, digits, - and _ in it, got {name!r}.")

    keys = Keys(name)

    def curves(*panels: tuple[str, Sequence[str]]) -> list[Any]:
        return [reports.LinePlot(title=heading, x=STEP, y=list(y)) for heading, y in panels]

    def searched(*panels: tuple[str, str]) -> list[Any]:
        """Makes panels with the curves of all keys that match a pattern, such as one per probe."""
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

    def rollouts() -> list[Any]:
        found: list[Any] = []
        media: list[Any] = []
        for axes, titled in _headline_panels(Look.description, sometimes=True).items():
            if not axes:
                by_title = {t: [keys(f"{Look.name}/{of}") for of in ms] for t, ms in titled.items()}
                found += curves(*by_title.items())
            elif len(axes) == 2:
                title = "Winners minus losers, and the false discovery rates"
                media += shown([(f"{Look.name}/{figure_name(*axes)}", title)])
            else:
                # A media browser shows no table of log mode "INCREMENTAL", a query panel does.
                key = keys(f"{Look.name}/{table_name(*axes)}")
                media.append(reports.WeavePanelSummaryTable(table_name=key))
        return found + media

    groups: dict[str, list[Any]] = {"Heads": [[], []]}
    tables: list[tuple[str, str]] = []
    for instrument, said in _descriptions():
        if said.group in ("Events", "Pictures"):
            continue
        numbers, figures = groups.setdefault(said.group, [[], []])
        for axes, titled in _headline_panels(said).items():
            if not axes:
                numbers += [
                    (title, _measures_pattern(name, instrument, of)) for title, of in titled.items()
                ]
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
    pictures = [(f"{_patterns_prefix()}{probe}", f"Attention: {probe}") for probe in probes]
    sections = [
        (
            "Training",
            curves(
                ("Loss", ["train/loss", "eval/loss"]),
                ("Reward", ["train/reward"]),
                ("Gradient norm", ["train/grad_norm"]),
                ("Share of the time spent on observing", [f"{name}/cost/share"]),
            ),
        ),
        (
            "Events",
            [
                *curves(("Events", [f"{name}/{watch.name}/count"])),
                *shown([(f"{watch.name}/{table_name('event')}", "What happened")]),
            ],
        ),
        *([("Rollouts", rollouts())] if logged is not None and logged.rollouts else []),
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
        others = [("/".join(both), _measures_pattern(name, both[0], both[1:])) for both in split]
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


def _measures_pattern(name: str, instrument: str, measures: Sequence[str]) -> str:
    """Returns a pattern for the keys of these measures, with or without a probe."""
    return f"^{name}/{re.escape(instrument)}/({'|'.join(map(re.escape, measures))})(/.*)?$"
