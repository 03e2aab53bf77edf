"""Turns ids of tokens into texts."""

import numpy as np

from tlens_callback.probes import ProbeBatch


def token_texts(tokens: np.ndarray, batch: ProbeBatch) -> np.ndarray:
    """Returns the tokens as readable texts, in an array of the same shape; NaN becomes ''."""
    distinct, back = np.unique(tokens, return_inverse=True)
    texts = np.array(
        ["" if token != token else batch.token_text(int(token)) for token in distinct],
        dtype=np.str_,
    )
    return texts[back].reshape(tokens.shape)
