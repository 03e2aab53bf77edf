"""`tlens-callback workspace`: saves a view of a project in W&B."""

import json

import click

from tlens_callback.cli.echo import echo


@click.command()
@click.argument("project", metavar="ENTITY/PROJECT")
@click.option(
    "--name", default="tlens", show_default=True, help="The name= that the callback was given."
)
@click.option(
    "--title", default="Inside the model", show_default=True, help="Title of the saved view."
)
@click.option(
    "--probe",
    "probes",
    multiple=True,
    help="A probe whose attention to show. Can be given several times. The default is all probes "
    "of the latest run.",
)
@click.option(
    "--print", "printed", is_flag=True, help="Print the view as JSON and send nothing to W&B."
)
def workspace(project: str, name: str, title: str, probes: tuple[str, ...], printed: bool) -> None:
    """Save a view of a W&B project in which the panels of TLensCallback are in order.

    It shows the loss of the run, events, head scores, pictures with a step slider, tables and the
    page. The project must exist; its runs are not changed. With --print, without an API key, or
    with WANDB_MODE=offline, the view is printed as JSON and not saved.

    \b
    Example:
      tlens-callback workspace my-team/my-project --probe capital
    """
    from tlens_callback.sinks.wandb.workspace import (
        REPEATED,
        Logged,
        build,
        logged_by,
        split_project,
        unreachable,
    )

    try:
        entity, project = split_project(project)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="ENTITY/PROJECT") from error
    try:
        why = None if printed else unreachable()
        logged = Logged() if printed or why else logged_by(entity, project, name=name)
        shown = list(probes) or logged.probes or [REPEATED]
        view = build(entity, project, name=name, title=title, probes=shown, logged=logged)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    except ImportError as error:
        raise click.ClickException(str(error)) from error
    except Exception as error:
        raise click.ClickException(_refused(entity, project, error)) from error
    if printed or why:
        # wandb_workspaces has no public method that returns a view as JSON.
        echo(json.dumps(view._to_model().model_dump(by_alias=True, mode="json"), indent=1))
        if why:
            command = f"tlens-callback workspace {entity}/{project}"
            echo(f"Nothing was saved: {why}. Then run: {command}", err=True)
        return
    try:
        view.save()
    except Exception as error:
        raise click.ClickException(_refused(entity, project, error)) from error
    echo(f"Saved: {view.url}")


def _refused(entity: str, project: str, error: Exception) -> str:
    return (
        f"W&B did not take the view of {entity}/{project}: {error} Does the project exist, and can "
        f"your API key write to it?"
    )
