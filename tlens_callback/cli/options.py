"""Options that several commands take, and what they mean."""

import ast
import difflib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tlens_callback.checkpoints import Loader
    from tlens_callback.interfaces import Instrument
    from tlens_callback.probes import Probe
    from tlens_callback.run.settings import Settings

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
        help="What to measure: HeadAblation, 'LogitLens(k=10)', or fast for the default ones; may "
        "be repeated. Those with every= are asked at the first look, every n-th and the last: "
        "'ActivationPatching(every=1)'.",
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
) -> "tuple[Settings, Loader]":
    """What the options of `looking` ask for. Without prompts, repeated blocks are shown alone.

    Raises:
        ValueError: for a probe, an instrument or a device that there is not, or nothing to show.
    """
    import torch

    from tlens_callback.checkpoints import Loader
    from tlens_callback.run.settings import Settings

    loader = Loader(device=device, dtype=getattr(torch, dtype) if dtype else None)
    filed: list[Probe] = []
    if probes_file is not None:
        from tlens_callback.probes.file import read_probes

        filed = read_probes(probes_file)
    others = [probe.name for probe in filed]
    arguments = Settings(
        [*given_prompts(prompts, chat=chat, target=target, foil=foil, others=others), *filed],
        instruments=chosen(instruments) if instruments else None,
        every_n_steps=1,
        repeats=not no_repeats,
        on_error="raise",
        writing="inline",
    )
    if not (arguments.prompts or arguments.with_blocks):
        raise ValueError("There is nothing to show the model: give --prompt TEXT or --probes FILE.")
    return arguments, loader


def given_prompts(
    prompts: Sequence[str],
    *,
    chat: bool,
    target: str | None,
    foil: str | None,
    others: Sequence[str] = (),
) -> "list[Probe]":
    """A probe for each prompt, named by its first words and unlike `others`.

    Raises:
        ValueError: a target or foil for several prompts or none, a foil alone, an empty prompt.
    """
    from tlens_callback.probes import Probe
    from tlens_callback.probes.file import short_name

    if len(prompts) != 1 and (target is not None or foil is not None):
        raise ValueError("--target and --foil are of one --prompt; for more, use --probes FILE.")
    if foil is not None and target is None:
        raise ValueError("--foil is what --target is compared with: give both.")
    probes: list[Probe] = []
    for prompt in prompts:
        if not prompt.strip():
            raise ValueError(f"The prompt {prompt!r} is empty.")
        content = [{"role": "user", "content": prompt}] if chat else prompt
        name = short_name(prompt, [*others, *(probe.name for probe in probes)])
        probes.append(Probe(name, content, target=target, foil=foil))
    return probes


def chosen(texts: Sequence[str]) -> "list[Instrument]":
    """The instruments of several `--instruments`; `fast` stands for the default ones.

    Raises:
        ValueError: as `made`.
    """
    from tlens_callback.instruments import fast

    found: list[Instrument] = []
    for text in texts:
        found += fast() if text.replace(" ", "") in ("fast", "fast()") else [made(text)]
    return found


def made(text: str) -> "Instrument":
    """An instrument from its class's name, with arguments as in Python: `LogitLens(k=10)`.

    An autoencoder is given by its directory: `SparseFeatures('path/to/sae')`.

    Raises:
        ValueError: for no such instrument, and for arguments that it does not take.
    """
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
            f"LogitLens or 'LogitLens(k=10)'. For several instruments repeat the option."
        ) from None
    names = {_plain(one): one for one in instruments.__all__}
    if name not in names.values():
        near = difflib.get_close_matches(_plain(name), names, n=3)
        found = [names[one] for one in near or names]
        there = f"{'Near it' if near else 'There are'}: {', '.join(found)}"
        raise ValueError(f"There is no instrument {name!r}. {there}.")
    try:
        return getattr(instruments, name)(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--instruments {text!r}: {error}") from error


def _plain(name: str) -> str:
    """A name as those who write it otherwise do: head_scores is HeadScores."""
    return name.replace("_", "").lower()
