"""A saved view of a W&B project: the panels of `WandbSink`, in an order to look through."""

import os
import re
from collections.abc import Sequence
from typing import Any

from tlens_callback.sinks.shown import STEP, Keys

REPEATED = "repeat-24-0"
"""The repeated block that `AttentionPatterns` shows unless told otherwise."""

_FIGURES = (
    ("head_scores/heads", "Heads by their roles"),
    ("attention_drift/heads", "Attention: change since the start"),
    ("logit_attribution/heads", "What each head adds to the answer"),
    ("logit_lens/by_layer", "Logit lens by layer"),
    ("activation_drift/by_part", "Activations: change since the start"),
    ("adapter_spectrum/by_module", "Adapters by layer and module"),
)
_TABLES = (
    ("logit_lens/table", "What each layer would say"),
    ("top_neurons/table", "Neurons that fire most"),
    ("difference_lens/table", "Tokens that training adds"),
    ("token_loss/token_table", "Loss by token"),
)


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


def probes_of(entity: str, project: str, *, name: str) -> list[str]:
    """The probes whose pictures the project's latest run has; none where it has none, or no run."""
    import wandb

    for run in wandb.Api().runs(f"{entity}/{project}", order="-created_at", per_page=1):
        start = f"{name}/attention_patterns/pattern/"
        return sorted(
            key.removeprefix(start) for key in run.summary.keys() if key.startswith(start)
        )
    return []


def build(
    entity: str,
    project: str,
    *,
    name: str = "tlens",
    title: str = "Inside the model",
    probes: Sequence[str] = (REPEATED,),
) -> Any:
    """The view, a `wandb_workspaces.workspaces.Workspace`, which is not saved yet.

    Sections, in this order: Training (loss, reward and gradient norm, evaluation loss, and what
    watching costs), Events, Heads, Answers, Pictures, Tables, Page. Curves are over
    `train/global_step`; a media panel shows one step, with a slider.

    Args:
        name: the first segment of the keys, `name=` of the callback.
        probes: whose attention to show, one panel each.

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

    scores = f"{name}/head_scores"
    pictures = [(f"attention_patterns/pattern/{probe}", f"Attention: {probe}") for probe in probes]
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
                *curves(("Events", [f"{name}/watch/count"])),
                *shown([("watch/event_table", "What happened")]),
            ],
        ),
        (
            "Heads",
            [
                *searched(("Heads that are followed", f"^{name}/watch/.*_L[0-9]+H[0-9]+$")),
                *curves(
                    (
                        "Strongest head in each role",
                        [f"{scores}/max_previous", f"{scores}/max_induction"],
                    ),
                    ("Attention to the first token", [f"{scores}/sink_share"]),
                    (
                        "Change of attention",
                        [f"{name}/attention_drift/mean", f"{name}/attention_drift/max"],
                    ),
                ),
                *shown(_FIGURES[:2]),
            ],
        ),
        (
            "Answers",
            [
                *searched(
                    ("Probability of the answer", f"^{name}/target_scores/probability/.*$"),
                    ("Lead of the answer", f"^{name}/target_scores/logit_diff/.*$"),
                    ("Loss of a probe", f"^{name}/token_loss/mean/.*$"),
                ),
                *shown(_FIGURES[2:]),
            ],
        ),
        ("Pictures", shown(pictures)),
        ("Tables", shown(_TABLES)),
        ("Page", shown([("page", "The page")])),
    ]
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
