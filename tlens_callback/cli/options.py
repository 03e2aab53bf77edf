"""Options that several commands take, and what they mean."""

import ast
import difflib
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tlens_callback.arguments import Arguments
    from tlens_callback.checkpoints import Loader
    from tlens_callback.interfaces import Instrument
    from tlens_callback.probes import Probe

DTYPES = ("float32", "bfloat16", "float16")

_LOOKING = (
    click.option(
        "--prompt",
        "prompts",
        multiple=True,
        metavar="TEXT",
        help="A text to ask the model; may be repeated.",
    ),
    click.option("--chat", is_flag=True, help="Prompts are a user's messages, not plain text."),
    click.option("--target", help="The token after the prompt that is meant; mind its space."),
    click.option("--foil", help="The token to compare the target with."),
    click.option(
        "--probes",
        "probes_file",
        type=click.Path(dir_okay=False),
        metavar="FILE",
        help="Prompts from a file: YAML, or JSON lines.",
    ),
    click.option(
        "--instruments",
        "-i",
        multiple=True,
        metavar="NAME",
        help="What to measure: HeadScores, 'LogitLens(k=10)', or fast for the default ones; may "
        "be repeated.",
    ),
    click.option("--no-repeats", is_flag=True, help="Leave out the repeated random blocks."),
    click.option("--device", help="Where to compute; the GPU, if there is one."),
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        help="Precision to compute in. Without it, that in which the weights were saved.",
    ),
)


def looking(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a command that looks at models; `asked` takes them."""
    for option in reversed(_LOOKING):
        command = option(command)
    return command


def asked(
    *,
    prompts: Sequence[str] = (),
    chat: bool = False,
    target: str | None = None,
    foil: str | None = None,
    probes_file: str | None = None,
    instruments: Sequence[str] = (),
    no_repeats: bool = False,
    device: str | None = None,
    dtype: str | None = None,
) -> "tuple[Arguments, Loader]":
    """What the options of `looking` ask for.

    Raises:
        ValueError: for a probe, an instrument or a device that there is not.
    """
    import torch

    from tlens_callback.arguments import Arguments
    from tlens_callback.checkpoints import Loader

    precision = getattr(torch, dtype) if dtype else None
    probes = given_prompts(prompts, chat=chat, target=target, foil=foil)
    if probes_file is not None:
        from tlens_callback.probe_file import read_probes

        probes += read_probes(probes_file)
    arguments = Arguments(
        probes,
        instruments=[made(text) for text in instruments] if instruments else None,
        sinks=None,
        watch=None,
        every_n_steps=1,
        repeats=not no_repeats,
        device=None,
        dtype=None,
        on_error="raise",
        writing="inline",
        name="tlens",
    )
    return arguments, Loader(device=device, dtype=precision)


def given_prompts(
    prompts: Sequence[str], *, chat: bool, target: str | None, foil: str | None
) -> "list[Probe]":
    """A probe for each prompt, named by its first words."""
    from tlens_callback.probes import Probe

    if len(prompts) != 1 and (target or foil):
        raise ValueError("--target and --foil are of one --prompt; for more, use --probes FILE.")
    probes: list[Probe] = []
    for prompt in prompts:
        content = [{"role": "user", "content": prompt}] if chat else prompt
        name = _short(prompt, [probe.name for probe in probes])
        probes.append(Probe(name, content, target=target, foil=foil))
    return probes


def _short(prompt: str, others: Sequence[str]) -> str:
    words = re.findall(r"\w+", prompt.lower())
    name = base = "-".join(words)[:32].strip("-") or "prompt"
    number = 2
    while name in others:
        name, number = f"{base}-{number}", number + 1
    return name


def made(text: str) -> "Instrument":
    """An instrument from its class's name, with arguments as in Python: `LogitLens(k=10)`."""
    from tlens_callback import instruments

    try:
        call: Any = ast.parse(text.strip(), mode="eval").body
        call = call if isinstance(call, ast.Call) else ast.Call(call, [], [])
        name = call.func.id
        args = [ast.literal_eval(one) for one in call.args]
        kwargs = {one.arg: ast.literal_eval(one.value) for one in call.keywords}
    except (SyntaxError, AttributeError, ValueError):
        raise ValueError(
            f"--instruments {text!r} is neither a name nor a call with plain values, such as "
            f"LogitLens or 'LogitLens(k=10)'."
        ) from None
    if name not in instruments.__all__:
        near = difflib.get_close_matches(name, instruments.__all__, n=3)
        raise ValueError(
            f"There is no instrument {name!r}. " + (f"Near it are {near}." if near else "")
        )
    try:
        return getattr(instruments, name)(*args, **kwargs)
    except TypeError as error:
        raise ValueError(f"--instruments {text!r}: {error}.") from error
