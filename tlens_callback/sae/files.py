"""Loads published autoencoders from files in the layouts of SAELens and of sparsify."""

import json
import math
import os
import re
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tlens_callback.sae.autoencoder import Autoencoder, Normalize

_CONFIG = "cfg.json"
_SAELENS = "sae_weights.safetensors"
_SPARSIFY = "sae.safetensors"

_NORMALIZE: dict[Any, Normalize] = {
    None: "none",
    False: "none",
    "none": "none",
    "constant_norm_rescale": "norm",
    "layer_norm": "layer_norm",
}

_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys("architecture activation hook_name hook_point hook_name_out".split(), (str,)),
    **dict.fromkeys("activation_fn activation_fn_str".split(), (str,)),
    **dict.fromkeys("activation_fn_kwargs model_from_pretrained_kwargs".split(), (dict,)),
    **dict.fromkeys("d_in d_sae num_latents hook_layer hook_point_layer".split(), (int,)),
    "k": (int, float),
    "normalize_activations": (str, bool),
    **dict.fromkeys("apply_b_dec_to_input rescale_acts_by_decoder_norm".split(), (bool,)),
    **dict.fromkeys("signed transcode skip_connection multi_topk".split(), (bool,)),
}
"""Settings -> the types that they may have beside null."""

_SPARSIFY_FIELDS = frozenset(
    "activation d_in expansion_factor k multi_topk normalize_decoder num_latents signed "
    "skip_connection transcode".split()
)
"""Settings that are read, those refused by name, and those that matter only in its training."""


def load_sae(
    path: str | os.PathLike[str], *, scale: float | None = None, centred: bool | None = None
) -> Autoencoder:
    """Loads an autoencoder from a directory written by SAELens or by EleutherAI's sparsify.

    Neither package is needed. SAELens: `cfg.json` and `sae_weights.safetensors`, of any version,
    architectures standard, topk, jumprelu and gated (what SAELens trains as batch top-k or
    Matryoshka it saves as one of them). sparsify: `cfg.json` and `sae.safetensors`, top-k. Weights
    become float32, on the CPU.

    The hook point is SAELens's `hook_name`; for sparsify it follows from the directory's name, a
    module's path: `layers.10` is `blocks.10.hook_resid_post`, `layers.10.mlp` is
    `blocks.10.mlp.hook_out`, `layers.10.self_attn` is `blocks.10.attn.hook_out`, `embed_tokens` is
    `hook_embed`. For any other name it stays None.

    Args:
        path: the directory; from the Hub, what `huggingface_hub.snapshot_download` returned and the
            autoencoder's folder in it.
        scale: the factor on activations where the configuration has `normalize_activations:
            expected_average_only_in`, whose factor is in no file.
        centred: see `Autoencoder`. Default: the configuration's
            `model_from_pretrained_kwargs.center_writing_weights`; False if that is missing, or if
            the hook point is not a write to the residual stream, since centring does not remove the
            mean elsewhere. For some releases SAELens keeps this in its own list and not in their
            files: gpt2-small-res-jb needs True. Models with RMSNorm need False: TransformerLens
            does not centre them, whatever the configuration says.

    Raises:
        ValueError: for a directory of another layout, or an unknown configuration or tensor, which
            the message names.
    """
    path = Path(path)
    weights = [name for name in (_SAELENS, _SPARSIFY) if (path / name).is_file()]
    if not (path / _CONFIG).is_file() or len(weights) != 1:
        raise ValueError(
            f"{path} is not the directory of one autoencoder: it has to hold {_CONFIG} and either "
            f"{_SAELENS} (SAELens) or {_SPARSIFY} (sparsify). A release with many of them has a "
            f"folder for each."
        )
    config = _config(path / _CONFIG)
    try:
        with safe_open(path / weights[0], "pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"{path / weights[0]} is incomplete ({error}). Was downloading it interrupted?"
        ) from error
    if scale is not None and not (isinstance(scale, Real) and 0 < float(scale) < math.inf):
        raise ValueError(f"scale must be a positive number, got {scale!r}.")
    if weights[0] == _SPARSIFY:
        if scale is not None:
            raise ValueError("scale is for SAELens's expected_average_only_in; this is sparsify's.")
        return _sparsify(path, config, tensors, bool(centred))
    return _saelens(path, config, tensors, scale, centred)


def _config(file: Path) -> dict[str, Any]:
    """Reads a configuration, and checks the types of the settings that are used.

    Raises:
        ValueError: if it is no JSON object, or a setting is of another type; the text names it.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}. Was downloading it interrupted?") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(config).__name__}.")
    parts = [config, config.get("meta"), config.get("metadata")]
    for part in parts:
        if not isinstance(part, dict | None):
            raise ValueError(f"{file}: meta and metadata must be JSON objects, got {part!r:.80}.")
        for name, value in (part or {}).items():
            kinds = _TYPES.get(name)
            if kinds is not None and value is not None and type(value) not in kinds:
                names = " or ".join(kind.__name__ for kind in kinds)
                raise ValueError(f"{file}: {name} must be of type {names}, got {value!r:.80}.")
    return config


def _saelens(
    path: Path,
    config: Mapping[str, Any],
    tensors: dict[str, Tensor],
    scale: float | None,
    centred: bool | None,
) -> Autoencoder:
    # Version 6 was released with "metadata"; before that it was "meta".
    settings = {**config, **(config.get("meta") or {}), **(config.get("metadata") or {})}
    architecture = settings.get("architecture") or "standard"
    activation = settings.get("activation_fn_str") or settings.get("activation_fn") or "relu"
    kwargs = settings.get("activation_fn_kwargs") or {}
    k = settings.get("k", kwargs.get("k"))
    if architecture == "standard" and activation == "topk":
        architecture = "topk"
    own = {
        "standard": {"b_enc"},
        "topk": {"b_enc"},
        "jumprelu": {"b_enc", "threshold"},
        "gated": {"b_gate", "r_mag", "b_mag"},
    }
    if architecture not in own:
        raise _unknown_error(path, f"architecture {architecture!r}", f"one of {list(own)}")
    known = ("relu", "topk") if architecture == "topk" else ("relu",)
    if activation not in known or set(kwargs) - {"k"}:
        raise _unknown_error(
            path, f"activation {activation!r} with {kwargs}", f"{' or '.join(known)}"
        )
    if architecture == "topk" and type(k) is not int:
        raise _unknown_error(path, f"top-k with k={k!r}", "a whole number")
    if settings.get("hook_head_index", settings.get("hook_point_head_index")) is not None:
        raise _unknown_error(
            path, "a single head's activations (hook_head_index)", "all heads together"
        )
    if settings.get("hook_name_out") not in (None, settings.get("hook_name")):
        raise _unknown_error(
            path, f"a transcoder to {settings['hook_name_out']!r}", "an autoencoder"
        )

    if "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    factors = [tensors.pop(name, None) for name in ("scaling_factor", "finetuning_scaling_factor")]
    _check_tensors(path, tensors, {"W_enc", "W_dec", "b_dec", *own[architecture]})
    for factor in factors:
        if factor is None or torch.equal(factor, torch.ones_like(factor)):
            continue
        if not settings.get("finetuning_scaling_factor"):
            raise _unknown_error(
                path, "a scaling_factor that the configuration does not use", "none"
            )
        tensors["W_dec"] = factor[:, None] * tensors["W_dec"]
    for name, dim in (("d_in", 0), ("d_sae", 1)):
        if settings.get(name) not in (None, tensors["W_enc"].shape[dim]):
            raise _unknown_error(
                path, f"{name} {settings[name]}", f"W_enc's {tensors['W_enc'].shape[dim]}"
            )
    if architecture == "topk" and settings.get("rescale_acts_by_decoder_norm"):
        # It then chooses by what a feature writes, not by what it reads: the same as a decoder
        # with rows of norm 1.
        norm = tensors["W_dec"].norm(dim=1)
        tensors["W_enc"], tensors["b_enc"] = tensors["W_enc"] * norm, tensors["b_enc"] * norm
        tensors["W_dec"] = tensors["W_dec"] / norm[:, None]

    normalize = settings.get("normalize_activations")
    if normalize in (True, "expected_average_only_in"):
        if scale is None:
            raise ValueError(
                f"{path}: normalize_activations is 'expected_average_only_in': activations are "
                f"multiplied by a factor that makes their norm sqrt(d_in) on average. No file "
                f"contains this factor; give it: load_sae(path, scale=...)."
            )
        tensors["W_enc"] = tensors["W_enc"] * scale
        tensors["W_dec"], tensors["b_dec"] = tensors["W_dec"] / scale, tensors["b_dec"] / scale
        normalize = "none"
    elif scale is not None:
        raise ValueError(
            f"{path}: normalize_activations is {normalize!r}, which takes no scale; leave it out."
        )
    if normalize not in _NORMALIZE:
        raise _unknown_error(
            path, f"normalize_activations {normalize!r}", f"one of {list(_NORMALIZE)}"
        )
    hook = settings.get("hook_name") or settings.get("hook_point")
    if hook is not None:
        hook = hook.replace(
            "{layer}", str(settings.get("hook_layer", settings.get("hook_point_layer")))
        )
    if centred is None:
        model_settings = settings.get("model_from_pretrained_kwargs") or {}
        writes = hook is None or "resid" in hook or hook.endswith(("_out", "_embed"))
        centred = writes and bool(model_settings.get("center_writing_weights"))
    return Autoencoder(
        W_enc=tensors["W_enc"],
        b_enc=tensors["b_gate" if architecture == "gated" else "b_enc"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        k=k if architecture == "topk" else None,
        threshold=tensors.get("threshold"),
        r_mag=tensors.get("r_mag"),
        b_mag=tensors.get("b_mag"),
        subtract_b_dec=bool(settings.get("apply_b_dec_to_input", True)),
        normalize=_NORMALIZE[normalize],
        centred=centred,
        hook=hook,
    )


def _sparsify(
    path: Path, config: Mapping[str, Any], tensors: dict[str, Tensor], centred: bool
) -> Autoencoder:
    activation = config.get("activation", "topk")
    if activation != "topk":
        raise _unknown_error(path, f"activation {activation!r}", "topk")
    for name, what in (
        ("signed", "negative features"),
        ("transcode", "a transcoder"),
        ("skip_connection", "a skip connection"),
    ):
        if config.get(name):
            raise _unknown_error(path, f"{what} ({name})", "an autoencoder with features >= 0")
    ours = {key for key, value in config.items() if value} - _SPARSIFY_FIELDS
    # Settings of something that is switched off have no effect.
    if other := sorted(key for key in ours if not key.startswith(("lookup_", "gram_table_"))):
        raise _unknown_error(
            path, f"the setting {other[0]}={config[other[0]]!r}", "left out or false"
        )
    _check_tensors(path, tensors, {"encoder.weight", "encoder.bias", "W_dec", "b_dec"})
    if type(k := config.get("k", 32)) is not int:
        raise _unknown_error(path, f"top-k with k={k!r}", "a whole number")
    encoder = tensors["encoder.weight"]
    if config.get("d_in") not in (None, encoder.shape[1]):
        raise _unknown_error(path, f"d_in {config['d_in']}", f"the encoder's {encoder.shape[1]}")
    return Autoencoder(
        W_enc=encoder.T.contiguous(),
        b_enc=tensors["encoder.bias"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        k=k,
        centred=centred,
        hook=_hook_of_module(path.resolve()),
    )


def _hook_of_module(path: Path) -> str | None:
    """Returns the hook point of the module whose path in the base model is the folder's name."""
    name = path.parent.name if re.fullmatch(r"seed\d+", path.name) else path.name
    if name in ("embed_tokens", "embed_in", "wte"):
        return "hook_embed"
    found = re.fullmatch(r"(?:\w+\.)*(?:layers|h)\.(\d+)(?:\.(\w+))?", name)
    if found is None:
        return None
    layer, module = found.groups()
    if module is None:
        return f"blocks.{layer}.hook_resid_post"
    part = {"mlp": "mlp", "self_attn": "attn", "attn": "attn", "attention": "attn"}.get(module)
    return None if part is None else f"blocks.{layer}.{part}.hook_out"


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], names: set[str]) -> None:
    if set(tensors) != names:
        lacking, other = sorted(names - set(tensors)), sorted(set(tensors) - names)
        raise ValueError(
            f"{path}: the autoencoder that {_CONFIG} describes has the tensors {sorted(names)}; "
            f"the file lacks {lacking} and also has {other}."
        )
    for name, tensor in tensors.items():
        dims = 2 if name in ("W_enc", "W_dec", "encoder.weight") else 1
        if tensor.dim() != dims or 0 in tensor.shape:
            raise ValueError(
                f"{path}: the tensor {name} must have {dims} dimensions and at least one number, "
                f"but has the shape {tuple(tensor.shape)}."
            )


def _unknown_error(path: Path, what: str, known: str) -> ValueError:
    return ValueError(
        f"{path}: {_CONFIG} says {what}; this package reads {known}. Build an Autoencoder from the "
        f"tensors yourself if you know what they stand for."
    )
