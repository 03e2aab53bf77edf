"""Autoencoders of random weights at one hook point of the tiny models, and what a model that no
bridge has touched says of them."""

import numpy as np
import torch
from torch import nn

from tests.instruments.common import PROBES, TEXTS, encoded, hugging_face, ids
from tlens_callback import Autoencoder, observe

HOOK = "blocks.1.hook_resid_pre"
D = 32


def random_sae(n=48, seed=0, d=D, **more):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return Autoencoder(
        W_enc=draw(d, n) / 6,
        b_enc=draw(n) / 4,
        W_dec=draw(n, d) / 6,
        b_dec=draw(d) / 4,
        **{"hook": HOOK, **more},
    )


def identity(d=D, **more):
    """relu(x) - relu(-x), and x is back."""
    eye = torch.eye(d)
    return Autoencoder(
        W_enc=torch.cat([eye, -eye], 1),
        b_enc=torch.zeros(2 * d),
        W_dec=torch.cat([eye, -eye]),
        b_dec=torch.zeros(d),
        **{"hook": HOOK, **more},
    )


def look(instrument, of, probes=PROBES):
    got = observe(of, encoded(probes), [instrument])
    return {reading.key.partition("/")[2]: reading for reading in got}


def numbers(instrument, of, probes=PROBES):
    return {k: float(r.values) for k, r in look(instrument, of, probes).items() if not r.axes}


def layers_of(model):
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)


@torch.no_grad()
def by_hand(family, sae, probes=TEXTS):
    """What enters layer 1 of the model that no bridge has seen, probe by probe without padding;
    features in float64; and the losses with it exchanged there."""
    model = hugging_face(family)
    w = {k: getattr(sae, k).double().numpy() for k in ("W_enc", "b_enc", "W_dec", "b_dec")}
    x, f, back, loss = [], [], [], {"clean": [], "zero": [], "sae": []}

    def put(value):
        def hook(module, args, kwargs):
            hidden = (args[0] if args else kwargs["hidden_states"]).clone()
            hidden[0, 1:] = torch.tensor(value, dtype=hidden.dtype)
            return (
                ((hidden, *args[1:]), kwargs)
                if args
                else (args, {**kwargs, "hidden_states": hidden})
            )

        return hook

    for probe in probes:
        tokens = ids(probe)
        entered = []

        def listen(module, args, kwargs, entered=entered):
            entered.append((args[0] if args else kwargs["hidden_states"])[0, 1:].double().numpy())

        handle = layers_of(model)[1].register_forward_pre_hook(listen, with_kwargs=True)
        model(tokens, use_cache=False)
        handle.remove()
        x.append(entered[0])
        f.append(np.maximum((x[-1] - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0))
        back.append(f[-1] @ w["W_dec"] + w["b_dec"])
        for kind, value in (("clean", x[-1]), ("zero", 0 * x[-1]), ("sae", back[-1])):
            handle = layers_of(model)[1].register_forward_pre_hook(put(value), with_kwargs=True)
            logits = model(tokens, use_cache=False).logits[0].double()
            handle.remove()
            for q in range(1, tokens.shape[1] - 1):
                loss[kind].append(float(logits[q].logsumexp(0) - logits[q, tokens[0, q + 1]]))
    return x, f, back, {kind: np.mean(values) for kind, values in loss.items()}
