"""Checks what a directory, or a repository on the Hub, holds before anything is loaded."""

import difflib
import functools
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
_CHECKPOINT = rf"{PREFIX_CHECKPOINT_DIR}-(\d+)"
_ADAPTER_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
_WEIGHTS = "model.safetensors", "pytorch_model.bin"
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)


def find(place: str, name: str) -> Path | None:
    """Finds a file in a directory, or in the repository NAME or NAME@REVISION on the Hub.

    Returns:
        The path of the file; None if the place has no such file.

    Raises:
        ValueError: if there is no such place, or it cannot be reached.
    """
    if Path(place).is_dir():
        file = Path(place) / name
        return file if file.is_file() else None
    if Path(place).is_file():
        raise ValueError(f"{place!r} is a file. Name the directory that it is in.")
    return _fetched(*repository(place), name)


def repository(place: str) -> tuple[str, str | None]:
    """Splits a place into the name that `from_pretrained` takes, and the revision."""
    name, _, revision = place.partition("@")
    return (place, None) if Path(place).is_dir() or not revision else (name, revision)


@functools.lru_cache(maxsize=256)
def _fetched(name: str, revision: str | None, file: str) -> Path | None:
    place = name if revision is None else f"{name}@{revision}"
    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except LocalEntryNotFoundError:
        # Without a network, a repository in the cache has only the files that were fetched before.
        folder = repo_folder_name(repo_id=name, repo_type="model")
        if (Path(constants.HF_HUB_CACHE) / folder).is_dir():
            return None
        why = "the Hub cannot be reached; no model of that name is in the cache"
    except EntryNotFoundError:
        return None
    except GatedRepoError:
        why = "the model of that name on the Hub needs a login: hf auth login"
    except RevisionNotFoundError:
        why = f"the model of that name on the Hub has no revision {revision!r}"
    except RepositoryNotFoundError:
        why = "the Hub has no model of that name, or does not show it to you"
    except HFValidationError:
        why = "it cannot be a name on the Hub either"
    except HfHubHTTPError as error:
        why = f"the Hub does not answer: {error}"
    raise ValueError(f"There is no directory {place!r}, and {why}.{_near(place)}") from None


def _near(place: str) -> str:
    """A hint that lists directories with similar names."""
    path = Path(place)
    if not path.parent.is_dir():
        missing = next(p for p in path.parents if p.parent.is_dir() and not p.is_dir())
        return f" There is no {str(missing)!r} either." if path.is_absolute() else ""
    names = [one.name for one in path.parent.iterdir() if one.is_dir()]
    close = difflib.get_close_matches(path.name, names, n=3)
    similar = ", ".join(str(path.parent / one) for one in close)
    return f" Directories with similar names: {similar}." if close else ""


def is_adapter(place: str) -> bool:
    """Whether a place counts as an adapter.

    A directory does if it has an adapter's config; a name on the Hub does if it has no full model.
    """
    if Path(place).is_dir():
        return find(place, ADAPTER_CONFIG) is not None
    return find(place, CONFIG) is None and find(place, ADAPTER_CONFIG) is not None


def read_json(file: Path) -> dict[str, Any]:
    """Reads the JSON object in a file.

    Raises:
        ValueError: if the file cannot be read or holds something else; the text names the file.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read ({error}). Was saving it interrupted?") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} does not hold a JSON object.")
    return content


def check_model(place: str) -> None:
    """Checks from the headers of the files that all weights of a model are there.

    Raises:
        ValueError: if they are not; the text names what is missing or broken, or says what the
            place holds instead.
    """
    file = find(place, CONFIG)
    if file is None:
        raise ValueError(_nothing_in(place))
    config = read_json(file)
    if packed := config.get("quantization_config"):
        method = packed.get("quant_method", "packed") if isinstance(packed, dict) else packed
        raise ValueError(
            f"The weights in {place!r} are quantised ({method}). They can neither be shared with "
            f"the shadow nor take a merged adapter. Name the model in bfloat16 or float32."
        )
    if not Path(place).is_dir():
        return
    for name in _WEIGHTS:
        whole, index = Path(place) / name, Path(place) / f"{name}.index.json"
        if whole.is_file():
            shapes(whole)
            return
        if index.is_file():
            shards = read_json(index).get("weight_map", {})
            if not isinstance(shards, dict) or not all(
                isinstance(one, str) for one in shards.values()
            ):
                raise ValueError(f"{index} is damaged: its weight_map must name a file per tensor.")
            if missing := sorted({s for s in shards.values() if not (Path(place) / s).is_file()}):
                raise ValueError(
                    f"{index} names {len(missing)} files that do not exist, such as {missing[0]}. "
                    f"Was saving or downloading interrupted?"
                )
            for shard in sorted(set(shards.values())):
                shapes(Path(place) / shard)
            return
    raise ValueError(f"{place!r} has a {CONFIG} but no weights: no {' or '.join(_WEIGHTS)}.")


def precision(place: str) -> torch.dtype | None:
    """The precision in which a model was saved, from its config; None if it does not say."""
    file = find(place, CONFIG)
    config = read_json(file) if file is not None else {}
    found = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return found if isinstance(found, torch.dtype) else None


def adapter_config(place: str) -> dict[str, Any]:
    """Reads the saved config of an adapter.

    Raises:
        ValueError: if there is none, or it is broken.
    """
    file = find(place, ADAPTER_CONFIG)
    if file is None:
        raise ValueError(
            f"{place!r} is not an adapter: it has no {ADAPTER_CONFIG}. {_contents(place)}"
        )
    config = read_json(file)
    if "peft_type" not in config:
        raise ValueError(f"{file} is not a config of PEFT: it has no peft_type.")
    for name in ("peft_type", "base_model_name_or_path", "revision"):
        value = config.get(name)
        parts = value.split("/") if isinstance(value, str) else [value or ""]
        # No name on a disk or on the Hub has more bytes.
        if not all(isinstance(one, str) and len(one) < 250 and "\0" not in one for one in parts):
            raise ValueError(f"{file} is damaged: {name} is no name, {value!r:.80}.")
    return config


def adapter_weights(place: str) -> Path:
    """Finds the file with an adapter's weights.

    Raises:
        ValueError: if there is none.
    """
    for name in _ADAPTER_WEIGHTS:
        if (file := find(place, name)) is not None:
            return file
    raise ValueError(
        f"{place!r} has an {ADAPTER_CONFIG} but no weights: no {' or '.join(_ADAPTER_WEIGHTS)}. "
        f"Was saving interrupted?"
    )


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor in a file of weights, from its header.

    Empty for a full model's file in pickle format, which has no header.

    Raises:
        ValueError: if the file is incomplete; the text names it.
    """
    broken = f"{file} is incomplete ({{}}). Was saving or downloading it interrupted?"
    if file.suffix != ".safetensors":
        if not zipfile.is_zipfile(file):
            raise ValueError(broken.format("it is not an archive of torch"))
        if file.name not in _ADAPTER_WEIGHTS:
            return {}
        return {name: tuple(tensor.shape) for name, tensor in tensors(file).items()}
    try:
        with safe_open(file, "pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(broken.format(error)) from error


def tensors(file: Path, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Reads the tensors of an adapter.

    Raises:
        ValueError: if the file is incomplete; the text names it.
    """
    try:
        if file.suffix != ".safetensors":
            return torch.load(file, map_location=device, weights_only=True)
        with safe_open(file, "pt", device=str(device)) as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}
    except Exception as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def has_vocabulary(place: str) -> bool:
    """Whether a place has the vocabulary of a tokenizer.

    Without one, transformers would build an empty tokenizer from the model's config alone.

    Raises:
        ValueError: if there is a tokenizer's config but no vocabulary.
    """
    files = [*_VOCABULARIES]
    if Path(place).is_dir():
        files += [one.name for one in Path(place).glob("*.tiktoken")]
    if any(find(place, name) for name in files):
        return True
    if config := find(place, "tokenizer_config.json"):
        raise ValueError(
            f"{config} exists, but the tokenizer has no vocabulary: none of "
            f"{', '.join(_VOCABULARIES)}."
        )
    return False


def checkpoints_of(folder: Path) -> dict[int, Path]:
    """Step -> folder of each `checkpoint-<step>` in a folder, sorted by step."""
    found = [(re.fullmatch(_CHECKPOINT, one.name), one) for one in folder.iterdir()]
    return dict(sorted((int(name[1]), one) for name, one in found if name and one.is_dir()))


def step_of(folder: Path) -> int | None:
    """The step in a folder's name, also if the folder is given as `.` or as a link."""
    for path in (folder.absolute(), folder.resolve()):
        if name := re.fullmatch(_CHECKPOINT, path.name):
            return int(name[1])
    return None


def _nothing_in(place: str) -> str:
    if Path(place).is_dir() and (found := checkpoints_of(Path(place))):
        folders = [one.name for one in found.values()]
        shown = ", ".join(folders if len(folders) < 7 else [*folders[:3], "...", *folders[-3:]])
        return (
            f"{place!r} has no weights of its own, but it has checkpoints: {shown}. Name one of "
            f"them, or look at all of them with: tlens-callback replay {place}"
        )
    return (
        f"{place!r} is not a saved model: it has no {CONFIG} and no {ADAPTER_CONFIG}. "
        f"{_contents(place)}"
    )


def _contents(place: str) -> str:
    """A hint that says what a directory contains."""
    if not Path(place).is_dir():
        return "Is it the name of a model on the Hub?"
    names = sorted(one.name + "/" * one.is_dir() for one in Path(place).iterdir())
    if not names:
        return "It is empty."
    inner = [name for name in names if (Path(place) / name / ADAPTER_CONFIG).is_file()]
    hint = f" There is an adapter in {Path(place) / inner[0]}." if inner else ""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"It contains {', '.join(names[:8])}{more}.{hint}"


def same_place(one: str, other: str) -> bool:
    """Whether two names stand for the same place.

    Names of two existing directories are compared as directories, other names as text.
    """
    if Path(one).is_dir() and Path(other).is_dir():
        return Path(one).samefile(other)
    return one == other


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an adapter's config that determine its layers; lists of names as sets."""
    idle = "inference_mode", "base_model_name_or_path", "revision", "peft_version"
    return {
        key: frozenset(value)
        if isinstance(value, list | tuple | set) and all(isinstance(v, str) for v in value)
        else value
        for key, value in config.items()
        if key not in idle
    }
