"""How well numbers tell two sets apart, and how well chance does."""

import numpy as np
import torch
from jaxtyping import Bool, Float

SHUFFLES = 1000
"""Number of random labellings that give the chance level."""


def auroc(
    scores: Float[np.ndarray, "layer text"], labels: Bool[np.ndarray, "labelling text"]
) -> Float[np.ndarray, "layer labelling"]:
    """Computes the area under the ROC curve of each layer's scores for each labelling.

    It is the share of pairs of a text with the label and one without in which the former scores
    higher; ties count half.
    """
    ahead = np.sign(scores[:, :, None] - scores[:, None, :])  # [layer, text, text]
    won = np.einsum("nt,ltu,nu->ln", labels, ahead, ~labels, optimize=True)
    pairs = labels.sum(1) * (~labels).sum(1)
    return 0.5 + won / (2 * pairs)


def shuffled(labels: Bool[np.ndarray, " text"]) -> Bool[np.ndarray, "labelling text"]:
    """Random labellings, the same ones at each call; they leave the global random state alone."""
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(labels), generator=generator).numpy() for _ in range(SHUFFLES)]
    return np.stack([labels[order] for order in orders])


def percentile_95(null: Float[np.ndarray, "*layer labelling"]) -> np.ndarray:
    """The smallest number that at least 95 % of the labellings do not exceed."""
    return np.asarray(np.quantile(null, 0.95, axis=-1, method="inverted_cdf"))
