"""Autoencoders of random weights, written as SAELens and sparsify write them, and in float64 what
the papers say they compute: loops over numpy, none of it shared with the package."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

D_IN, N = 12, 30


def weights(seed: int = 0, **more: np.ndarray) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {
        "W_enc": draw.normal(size=(D_IN, N)) / 3,
        "b_enc": draw.normal(size=N) / 4,
        "W_dec": draw.normal(size=(N, D_IN)) / 3,
        "b_dec": draw.normal(size=D_IN) / 2,
        **more,
    }


def extra(seed: int, low: float = -0.5, high: float = 0.8) -> np.ndarray:
    return np.random.default_rng(seed).uniform(low, high, size=N)


def inputs(n: int = 40, seed: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, D_IN)) * 1.5 + 0.3


def write(path: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], file: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "cfg.json").write_text(json.dumps(config))
    saved = {
        name: torch.tensor(value, dtype=torch.float32).contiguous()
        for name, value in tensors.items()
    }
    save_file(saved, path / file)
    return path


def saelens(path: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    return write(path, config, tensors, "sae_weights.safetensors")


def sparsify(path: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    renamed = {
        "encoder.weight": tensors["W_enc"].T,
        "encoder.bias": tensors["b_enc"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }
    return write(path, config, renamed, "sae.safetensors")


def pre(w: dict[str, np.ndarray], x: np.ndarray, subtract: bool = True) -> list[list[float]]:
    """h, feature by feature."""
    h = []
    for row in x:
        at = row - w["b_dec"] if subtract else row
        bias = w["b_enc"] if "b_enc" in w else np.zeros(N)
        h.append([sum(at[i] * w["W_enc"][i, n] for i in range(D_IN)) + bias[n] for n in range(N)])
    return h


def standard(w: dict[str, np.ndarray], x: np.ndarray, subtract: bool = True) -> np.ndarray:
    return np.array([[v if v > 0 else 0.0 for v in row] for row in pre(w, x, subtract)])


def topk(w: dict[str, np.ndarray], x: np.ndarray, k: int, subtract: bool = True) -> np.ndarray:
    out = []
    for row in pre(w, x, subtract):
        kept = sorted(range(N), key=lambda n: -row[n])[:k]
        out.append([max(row[n], 0.0) if n in kept else 0.0 for n in range(N)])
    return np.array(out)


def jumprelu(w: dict[str, np.ndarray], x: np.ndarray, subtract: bool = True) -> np.ndarray:
    return np.array(
        [
            [v if v > max(w["threshold"][n], 0.0) else 0.0 for n, v in enumerate(row)]
            for row in pre(w, x, subtract)
        ]
    )


def gated(w: dict[str, np.ndarray], x: np.ndarray, subtract: bool = True) -> np.ndarray:
    out = []
    for row in pre(w, x, subtract):
        size = [v * np.exp(w["r_mag"][n]) + w["b_mag"][n] for n, v in enumerate(row)]
        out.append(
            [max(size[n], 0.0) if v + w["b_gate"][n] > 0 else 0.0 for n, v in enumerate(row)]
        )
    return np.array(out)


def decode(w: dict[str, np.ndarray], f: np.ndarray) -> np.ndarray:
    return np.array(
        [sum(f[t, n] * w["W_dec"][n] for n in range(N)) + w["b_dec"] for t in range(len(f))]
    )
