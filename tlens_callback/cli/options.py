"""The options that several commands share, and the functions that read their values."""

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
    from tlens_callback.shadow.memory import Holding

_LONGEST = 10_000
"""Letters of an instrument with its arguments; a deeper expression could not be parsed."""

DTYPES = ("float32", "bfloat16", "float16")

_MODEL_OPTIONS = (
    click.option(
        "--prompt",
        "prompts",
        multiple=True,
        metavar="TEXT",
        help="A text to show the model. Can be given several times.",
    ),
    click.option("--chat", is_flag=True, help="Send each prompt as a user's message in a chat."),
    click.option(
        "--target",
        help="The expected next token after the prompt, with its space if it has one: ' Paris'.",
    ),
    click.option("--foil", help="The token to compare the target with."),
    click.option(
        "--probes",
        "probes_file",
        type=click.Path(dir_okay=False),
        metavar="FILE",
        help="Read probes from a file in YAML, JSON or JSON lines.",
    ),
    click.option(
        "--instruments",
        "-i",
        multiple=True,
        metavar="NAME",
        help="An instrument to use, with its arguments: HeadAblation, 'LogitLens(k=10)'. The name "
        "fast stands for the default ones. Can be given several times. An instrument with every=n "
        "measures at the first observation, at each n-th one and at the last: "
        "'ActivationPatching(every=1)'.",
    ),
    click.option("--no-repeats", is_flag=True, help="Leave out the repeated random blocks."),
    click.option("--device", help="Device to compute on. The default is the GPU, if there is one."),
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        help="Precision to compute in. The default is the precision of the saved weights.",
    ),
    click.option(
        "--weights",
        type=click.Choice(["auto", "resident", "streamed"]),
        default="auto",
        help="How merged weights are held: all at once, or one layer at a time, which is slower. "
        "The default holds all if they take at most a quarter of the free memory.",
    ),
)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of a command that observes models; `settings_and_loader` takes them."""
    for option in reversed(_MODEL_OPTIONS):
        command = option(command)
    return command


def settings_and_loader(
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
    weights: "Holding" = "auto",
) -> "tuple[Settings, Loader]":
    """Turns the values of `model_options` into settings of the observer and a loader.

    Without prompts, the model is shown only repeated blocks.

    Raises:
        ValueError: if a probe, an instrument or a device does not exist, or there is nothing to
            show the model.
    """
    import torch

    from tlens_callback.checkpoints import Loader
    from tlens_callback.run.settings import Settings

    loader = Loader(device=device, dtype=getattr(torch, dtype) if dtype else None)
    from_file: list[Probe] = []
    if probes_file is not None:
        from tlens_callback.probes.file import read_probes

        from_file = read_probes(probes_file)
    others = [probe.name for probe in from_file]
    arguments = Settings(
        [*prompt_probes(prompts, chat=chat, target=target, foil=foil, others=others), *from_file],
        instruments=parse_instruments(instruments) if instruments else None,
        every_n_steps=1,
        repeats=not no_repeats,
        weights=weights,
        on_error="raise",
        writing="inline",
    )
    if not (arguments.prompts or arguments.with_blocks):
        raise ValueError("There is nothing to show the model: give --prompt TEXT or --probes FILE.")
    return arguments, loader


def prompt_probes(
    prompts: Sequence[str],
    *,
    chat: bool,
    target: str | None,
    foil: str | None,
    others: Sequence[str] = (),
) -> "list[Probe]":
    """Makes a probe of each prompt, named by its first words; no name is one of `others`.

    Raises:
        ValueError: if a target or a foil is given without exactly one prompt, a foil is given
            without a target, or a prompt is empty.
    """
    from tlens_callback.probes import Probe
    from tlens_callback.probes.file import short_name

    if len(prompts) != 1 and (target is not None or foil is not None):
        raise ValueError(
            "--target and --foil can only be used with exactly one --prompt. To give several "
            "prompts their targets, use --probes FILE."
        )
    if foil is not None and target is None:
        raise ValueError("--foil is the token that --target is compared with. Give both.")
    probes: list[Probe] = []
    names = {*others}
    for prompt in prompts:
        if not prompt.strip():
            raise ValueError(f"The prompt {prompt!r} is empty.")
        content = [{"role": "user", "content": prompt}] if chat else prompt
        names.add(name := short_name(prompt, names))
        probes.append(Probe(name, content, target=target, foil=foil))
    return probes


def parse_instruments(texts: Sequence[str]) -> "list[Instrument]":
    """Makes the instruments that several `--instruments` name; `fast` names the default ones.

    Raises:
        ValueError: as `parse_instrument`.
    """
    from tlens_callback.instruments import fast

    found: list[Instrument] = []
    for text in texts:
        is_fast = text.replace(" ", "") in ("fast", "fast()")
        found += fast() if is_fast else [parse_instrument(text)]
    return found


def parse_instrument(text: str) -> "Instrument":
    """Makes an instrument from its class's name, with arguments as in Python: `LogitLens(k=10)`.

    An autoencoder is given by its directory: `SparseFeatures('path/to/sae')`.

    Raises:
        ValueError: if there is no such instrument, or it does not take these arguments.
    """
    from tlens_callback import instruments

    try:
        if len(text) > _LONGEST:
            raise ValueError
        call: Any = ast.parse(text.strip(), mode="eval").body
        call = call if isinstance(call, ast.Call) else ast.Call(call, [], [])
        name = call.func.id
        args = [ast.literal_eval(one) for one in call.args]
        kwargs = {one.arg: ast.literal_eval(one.value) for one in call.keywords}
        if None in kwargs or len(kwargs) < len(call.keywords):
            raise ValueError
    except (SyntaxError, AttributeError, ValueError, TypeError, RecursionError, MemoryError):
        raise ValueError(
            f"--instruments {text[:80]!r} is neither a name nor a call with plain values, such as "
            f"LogitLens or 'LogitLens(k=10)'. For several instruments, repeat the option."
        ) from None
    names = {_bare(one): one for one in instruments.__all__}
    if name not in names.values():
        near = difflib.get_close_matches(_bare(name), names, n=3)
        listed = ", ".join(names[one] for one in near or names)
        hint = f"Did you mean {listed}?" if near else f"The instruments are: {listed}."
        raise ValueError(f"There is no instrument {name!r}. {hint}")
    try:
        return getattr(instruments, name)(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--instruments {text!r}: {str(error).rstrip('.')}.") from error


def _bare(name: str) -> str:
    """Strips a name of what people spell differently, so that head_scores matches HeadScores."""
    return name.replace("_", "").lower()
