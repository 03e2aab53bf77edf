"""Constructor arguments of the instruments, for the tests that run all of them."""

import torch

from tlens_callback import Probe
from tlens_callback.sae import Autoencoder

_generator = torch.Generator().manual_seed(0)
_RANDOM_SAE = Autoencoder(
    W_enc=torch.randn(32, 48, generator=_generator) / 6,
    b_enc=torch.zeros(48),
    W_dec=torch.randn(48, 32, generator=_generator) / 6,
    b_dec=torch.zeros(32),
    hook="blocks.1.hook_resid_pre",
)

SETTINGS: dict[str, list[dict]] = {
    # The first is the one that every contract is tested with. The others emit what it does not.
    # An instrument that is not here is made without arguments.
    "ActivationPatching": [
        {"clean": "capital", "corrupt": Probe("other", "Red green blue five nine")},
    ],
    "HeadAblation": [{}, {"method": "first_order", "mode": "zero", "tokens": True}],
    "Contrast": [
        {
            "having": [
                "The cat is red",
                "A dog sat on mat",
                [1, 20, 21],
                "Paris is in France then",
            ],
            "without": ["What is three plus two", "one two three", " six", "seven eight nine"],
            "k": 4,
        }
    ],
    "Generations": [{"tokens": 3}],
    "HeadScores": [{}, {"strict": False}],
    "LogitAttribution": [{}, {"neurons": 3}],
    "LogitLens": [{}, {"every_token": True}],
    "SparseFeatures": [{"sae": _RANDOM_SAE}],
    "UpdateSparsity": [{"sample": 50}, {"sample": None}],
    "TokenChange": [{}, {"rows": 2}],
    "TrainedFeatures": [{"hook": "blocks.1.hook_resid_pre", "steps": 3}],
}
