"""Trains a sparse autoencoder from a buffer of activations, a few steps at a time."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tlens_callback.demands import demand_numbers
from tlens_callback.sae.autoencoder import Autoencoder

State = dict[str, Tensor]
"""All that training continues from: the parameters, Adam's two moments of each ("first.W_enc",
"second.W_enc", ...), "steps", "scale" and "fired"."""

_PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")
_BETAS = 0.9, 0.999
_EPS = 1e-8
_CHUNK = 2048


@dataclass(frozen=True)
class Training:
    """The settings and steps of an autoencoder's training.

    An activation a enters as x = scale a. With f = relu((x - b_dec) W_enc + b_enc) and x' =
    f W_dec + b_dec a step lowers the mean over its tokens of

        (|x - x'|^2 + l1 sqrt(d_in) sum_n f_n) / d_in

    by Adam (betas 0.9 and 0.999) at a constant learning rate. Rows of W_dec have norm 1: from
    their gradient the part along the row is removed before the step, and they are scaled back to
    norm 1 after it (Bricken et al. 2023).

    Args:
        l1: weight of the features' sum; larger is sparser. It lowers every feature by about l1 / 2
            of an activation's norm, measured from the mean; smaller features are not used.
        lr: the learning rate.
        batch: tokens in each step, drawn from the buffer with replacement.
        seed: seed of the first decoder, of the draws and of the resampling.

    Raises:
        ValueError: for settings outside their range.
    """

    l1: float = 0.1
    lr: float = 1e-3
    batch: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        demand_numbers(self)
        if self.l1 < 0 or not self.lr > 0 or self.batch < 1:
            raise ValueError(
                f"An autoencoder is trained with l1 >= 0, lr > 0 and batch >= 1; got l1={self.l1}, "
                f"lr={self.lr}, batch={self.batch}."
            )

    def begin(self, a: Float[Tensor, "token d_in"], n_features: int) -> State:
        """Returns the first state: random decoder rows of norm 1, and the encoder their transpose.

        b_dec is the mean of x. `scale` makes the mean norm of x - mean of x sqrt(d_in) over these
        tokens, and then stays the same.

        Raises:
            ValueError: if the activations have no finite spread.
        """
        d_in = a.shape[1]
        a = a.float()
        spread = (a - a.mean(0)).norm(dim=1).mean()
        if not 0 < float(spread) < math.inf:
            raise ValueError(
                f"An autoencoder needs activations that differ. These {len(a)} have a mean "
                f"distance of {float(spread)} from their mean. Give more probes, or training rows."
            )
        scale = math.sqrt(d_in) / spread
        draw = torch.randn(n_features, d_in, dtype=torch.float32, generator=self._generator(0)).to(
            a.device
        )
        decoder = draw / draw.norm(dim=1, keepdim=True)
        parameters = {
            "W_enc": decoder.T.contiguous(),
            "b_enc": a.new_zeros(n_features),
            "W_dec": decoder,
            "b_dec": a.mean(0) * scale,
        }
        moments = {
            f"{moment}.{name}": torch.zeros_like(value)
            for name, value in parameters.items()
            for moment in ("first", "second")
        }
        return {
            **parameters,
            **moments,
            "steps": torch.zeros((), dtype=torch.long, device=a.device),
            "scale": scale,
            "fired": torch.ones(n_features, dtype=torch.bool, device=a.device),
        }

    def steps(self, state: State, a: Float[Tensor, "token d_in"], n: int) -> None:
        """Takes n steps; changes `state` in place. Afterwards "fired" says which features were
        active on any of the tokens drawn."""
        draw = torch.randint(len(a), (n, self.batch), generator=self._generator(1, state))
        draw = draw.to(a.device)
        fired = torch.zeros_like(state["fired"])
        for index in draw:
            fired |= self._step(state, a[index].float() * state["scale"])
        state["fired"] = fired

    def _step(self, state: State, x: Float[Tensor, "token d_in"]) -> Tensor:
        with torch.enable_grad():
            leaves = {name: state[name].detach().requires_grad_() for name in _PARAMETERS}
            features = ((x - leaves["b_dec"]) @ leaves["W_enc"] + leaves["b_enc"]).relu()
            missed = (x - features @ leaves["W_dec"] - leaves["b_dec"]).square().sum(1).mean()
            d_in = x.shape[1]
            loss = (missed + self.l1 * math.sqrt(d_in) * features.sum(1).mean()) / d_in
            found = torch.autograd.grad(loss, list(leaves.values()))
        grads = dict(zip(leaves, found, strict=True))
        with torch.no_grad():
            grads["W_dec"] = without_parallel(grads["W_dec"], state["W_dec"])
            state["steps"] += 1
            self._adam(state, grads)
            state["W_dec"] /= state["W_dec"].norm(dim=1, keepdim=True)
        return (features.detach() > 0).any(0)

    def _adam(self, state: State, grads: State) -> None:
        t = int(state["steps"])
        for name, grad in grads.items():
            first, second = state[f"first.{name}"], state[f"second.{name}"]
            first.lerp_(grad, 1 - _BETAS[0])
            second.mul_(_BETAS[1]).addcmul_(grad, grad, value=1 - _BETAS[1])
            size = (second / (1 - _BETAS[1] ** t)).sqrt_().add_(_EPS)
            state[name].addcdiv_(first, size, value=-self.lr / (1 - _BETAS[0] ** t))

    @torch.no_grad()
    def resample(self, state: State, a: Float[Tensor, "token d_in"]) -> int:
        """Resamples the features that did not fire in the last `steps`; returns their number.

        As in Bricken et al. 2023, a token of the buffer is drawn for each of them, with probability
        in proportion to the square of its loss |x - x'|^2. Its x - b_dec, at norm 1, becomes the
        decoder's row; at 0.2 times the mean norm of the encoder columns of features that fired, it
        becomes the encoder's column. The bias and Adam's moments become 0.
        """
        dead = (~state["fired"]).nonzero()[:, 0]
        if not len(dead):
            return 0
        x = a.float() * state["scale"]
        sae = autoencoder(state, scaled=True)
        loss = torch.cat(
            [(part - sae.reconstruct(part)[1]).square().sum(1) for part in x.split(_CHUNK)]
        )
        weight = (loss / loss.max().clamp(min=1e-30)).square().cpu() + 1e-12
        # Not torch.multinomial, which takes at most 2^24 tokens and sums in float32.
        ladder = weight.double().cumsum(0)
        at = torch.rand(len(dead), generator=self._generator(2, state), dtype=torch.float64)
        index = torch.searchsorted(ladder, at * ladder[-1]).clamp(max=len(x) - 1)
        towards = x[index.to(x.device)] - state["b_dec"]
        towards = towards / towards.norm(dim=1, keepdim=True).clamp(min=1e-30)
        lives = state["fired"]
        norms = state["W_enc"].norm(dim=0)
        size = norms[lives].mean() if bool(lives.any()) else norms.mean()
        state["W_dec"][dead] = towards
        state["W_enc"][:, dead] = 0.2 * size * towards.T
        state["b_enc"][dead] = 0
        for moment in ("first", "second"):
            state[f"{moment}.W_dec"][dead] = 0
            state[f"{moment}.W_enc"][:, dead] = 0
            state[f"{moment}.b_enc"][dead] = 0
        return len(dead)

    def _generator(self, purpose: int, state: State | None = None) -> torch.Generator:
        """Seeds by the seed and the steps taken, so that a resumed run draws the same numbers."""
        steps = 0 if state is None else int(state["steps"])
        return torch.Generator().manual_seed((self.seed * 1_000_003 + steps) * 3 + purpose)


def without_parallel(
    grad: Float[Tensor, "feature d_in"], rows: Float[Tensor, "feature d_in"]
) -> Float[Tensor, "feature d_in"]:
    """Returns the gradient without its component along each row of norm 1."""
    return grad - (grad * rows).sum(1, keepdim=True) * rows


def autoencoder(state: State, *, scaled: bool = False) -> Autoencoder:
    """Returns the autoencoder in this state, for the model's activations.

    With `scaled`, it is for activations already multiplied by `scale`. The features are the same.
    """
    scale = torch.ones_like(state["scale"]) if scaled else state["scale"]
    return Autoencoder(
        W_enc=state["W_enc"] * scale,
        b_enc=state["b_enc"],
        W_dec=state["W_dec"] / scale,
        b_dec=state["b_dec"] / scale,
    )


def appended(
    buffer: Float[Tensor, "token d_in"] | None, new: Float[Tensor, "more d_in"], size: int
) -> Float[Tensor, "kept d_in"]:
    """Returns a copy of the last `size` activations of both."""
    return (new if buffer is None else torch.cat([buffer, new]))[-size:].clone()
