"""`Shadow`: the hooked copy of a live model, kept equal to it without touching it."""

import copy
import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from tlens_callback import _bridge
from tlens_callback.interfaces import Reduce, Taken
from tlens_callback.probes import ProbeBatch
from tlens_callback.refusals import refuse
from tlens_callback.weights import adapted_leaves, fill, innermost, live_leaves, resolve, unwrap

LOGITS = "logits"
LAST_LOGITS = "last_logits"
_OUTPUTS = (LOGITS, LAST_LOGITS)


@dataclass(frozen=True)
class _Source:
    """Where the parameters of one skeleton module come from; each is in at most one mapping."""

    path: str
    live: nn.Module
    adapted: frozenset[str]
    own: dict[str, Tensor] = field(default_factory=dict)
    """Changed by an adapter: storage of the shadow's, filled with the merged weight."""
    aliased: dict[str, int] = field(default_factory=dict)
    """The live tensor itself, and where its data stood when it was borrowed."""
    copied: dict[str, Tensor] = field(default_factory=dict)
    """Trained, but kept on another device or in another dtype."""


class Shadow:
    """A `TransformerBridge` that holds the live model's current, adapter-merged weights.

    `TransformerBridge` is TransformerLens 4's successor of `HookedTransformer`: same hook names.
    Its module tree is the shadow's own; the tensors in it are of two kinds. A parameter that no
    adapter changes is *aliased*: it is the live tensor, whatever training does to it. One that an
    adapter changes has storage of its own, filled in place by `sync`. Full fine-tuning aliases
    everything and a sync does nothing.

    The bridge is raw (no compatibility mode): weights are not folded or centred, which would
    break the aliases.

    Attributes:
        bridge: the bridge; `bridge.blocks[0].attn.W_O`, `bridge.W_U` and so on are views.
        hooks: every hook point by every name it has.
        n_layers, n_heads, d_model, vocab_size: of the model.
        context: longest input in tokens, or None where the model sets no limit.
        device, dtype: where the shadow computes, and in which precision.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """See `Shadow.of`."""
        self._model = model
        self._device, self._dtype = None if device is None else torch.device(device), dtype
        self.builds = 0
        self._build()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Shadow":
        """The shadow of a live model: a `PreTrainedModel`, or one wrapped by PEFT, DDP or compile.

        Args:
            device: where to put the shadow. Default: beside the live model. Another device takes a
                full copy of the weights there, and each sync moves what training changes.
            dtype: precision of the shadow. Default: that of each live parameter. Another dtype
                takes a full copy of the weights in it: 4 bytes a parameter for float32.

        Raises:
            ValueError: for a model that has no single merged weight or cannot be read in place
                (quantised, sharded, offloaded, prompt methods ...), by name and with the reason.
        """
        return cls(model, device=device, dtype=dtype)

    @torch.no_grad()
    def _build(self) -> None:
        refuse(self._model, device=self._device)
        base = unwrap(self._model)
        first = next(base.parameters())
        self.device = self._device or first.device
        self.dtype = self._dtype or first.dtype
        skeleton = _skeleton(base)
        self._held: list[Tensor] = []
        self._sources = self._borrow(skeleton, base)
        self.bridge = _bridge.build(skeleton, self.device)
        self._split = _bridge.split_copies(self.bridge)
        self._held += [own for own, _, _ in self._split]
        self.hooks: Mapping[str, nn.Module] = dict(self.bridge.hook_dict)
        cfg, text = self.bridge.cfg, base.config.get_text_config()
        self.n_layers, self.n_heads, self.d_model = cfg.n_layers, cfg.n_heads, cfg.d_model
        self.vocab_size = int(skeleton.get_input_embeddings().weight.shape[0])
        self.context: int | None = getattr(text, "max_position_embeddings", None)
        self._keeps_logits = "logits_to_keep" in inspect.signature(type(base).forward).parameters
        self.builds += 1
        self._fill()

    @property
    def extra_bytes(self) -> int:
        """Bytes that the shadow holds beyond the live model's own."""
        return sum(t.numel() * t.element_size() for t in self._held)

    @property
    def n_owned(self) -> int:
        """Number of parameters with storage of their own."""
        return sum(len(source.own) for source in self._sources)

    @torch.no_grad()
    def sync(self) -> None:
        """Brings the owned weights up to the live model's current ones; reads it, never writes it.

        Cost: for plain LoRA one pass over the adapted weights (read W, A, B; write W + sBA, rounded
        once); nothing where all is aliased. A live model whose parameters moved to other storage
        or whose adapters were exchanged is mapped anew.
        """
        if self._fits():
            self._fill()
        else:
            self._build()

    def _fits(self) -> bool:
        """Whether each skeleton module still has the source it was built on."""
        base = unwrap(self._model)
        for source in self._sources:
            live = resolve(base, source.path)
            if live is not source.live or adapted_leaves(live) != source.adapted:
                return False
            leaves = live_leaves(live)
            if any(leaves[name].data_ptr() != at for name, at in source.aliased.items()):
                return False
        return True

    def _fill(self) -> None:
        # The bar shows only where filling takes long: a large model, or a costly kind of adapter.
        for source in tqdm(self._sources, desc="tlens: weights", delay=5.0, leave=False):
            if source.own:
                leaves = live_leaves(source.live)
                beside = {
                    name: own
                    if own.device == leaves[name].device
                    else torch.empty_like(own, device=leaves[name].device)
                    for name, own in source.own.items()
                }
                fill(source.live, beside)
                for name, own in source.own.items():
                    if beside[name] is not own:
                        own.copy_(beside[name])
            if source.copied:
                leaves = live_leaves(source.live)
                for name, own in source.copied.items():
                    own.copy_(leaves[name])
        _bridge.refresh(self._split)

    def _borrow(self, skeleton: nn.Module, base: nn.Module) -> list[_Source]:
        """Gives every parameter and buffer of the meta skeleton its tensor."""
        sources: list[_Source] = []
        tied: dict[tuple[int, ...], nn.Parameter] = {}
        for path, module in skeleton.named_modules(remove_duplicate=False):
            live = resolve(base, path)
            _borrow_buffers(module, live, self.device)
            names = [name for name, p in module._parameters.items() if p is not None]
            if not names:
                continue
            leaves = live_leaves(live)
            source = _Source(path, live, adapted_leaves(live))
            for name in names:
                origin = leaves[name]
                # Tied weights stay one parameter, unless an adapter on one of them parts them.
                key = (origin.data_ptr(), *origin.shape)
                if name in source.adapted:
                    module._parameters[name] = self._own(source, name, origin)
                elif key in tied:
                    module._parameters[name] = tied[key]
                else:
                    module._parameters[name] = tied[key] = self._share(source, name, origin)
            sources.append(source)
        left = [
            n for n, t in (*skeleton.named_parameters(), *skeleton.named_buffers()) if t.is_meta
        ]
        assert not left, f"no source for {left}"
        return sources

    def _own(self, source: _Source, name: str, origin: Tensor) -> nn.Parameter:
        own = torch.empty_like(origin, dtype=self._dtype or origin.dtype, device=self.device)
        source.own[name] = own
        self._held.append(own)
        return nn.Parameter(own, requires_grad=False)

    def _share(self, source: _Source, name: str, origin: Tensor) -> nn.Parameter:
        dtype = self._dtype or origin.dtype
        if origin.device == self.device and origin.dtype == dtype:
            source.aliased[name] = origin.data_ptr()
            return nn.Parameter(origin, requires_grad=False)
        copied = origin.to(self.device, dtype, copy=True)
        if source.live._parameters[name].requires_grad:
            source.copied[name] = copied
        self._held.append(copied)
        return nn.Parameter(copied, requires_grad=False)

    @torch.no_grad()
    def run(
        self,
        batch: ProbeBatch,
        taps: Sequence[Mapping[str, Reduce]],
        *,
        on_error: Callable[[int, Exception], None] | None = None,
    ) -> list[dict[str, Taken]]:
        """One forward pass over the batch; the reductions run inside it, on the device.

        Args:
            taps: one mapping of hook name to reduction per instrument. Besides the names in
                `hooks` there are "logits", [probe, pos, vocab], and "last_logits", [probe, vocab]
                at each probe's last real token; the full logits are computed only if asked for.
            on_error: takes the index and the exception of an instrument whose reduction failed;
                its mapping comes back empty. None raises.

        Returns:
            Per instrument, what its reductions returned, still on the device, under the names
            asked for and in their order.

        Raises:
            ValueError: for a name that is no hook point of this model, or one that did not fire.
        """
        taken: list[dict[str, Taken]] = [{} for _ in taps]
        failed: set[int] = set()

        def take(i: int, name: str, reduce: Reduce, value: Tensor) -> None:
            if i in failed:
                return
            try:
                taken[i][name] = reduce(value)
            except Exception as error:
                if on_error is None:
                    raise
                failed.add(i)
                on_error(i, error)

        plan = [(i, n, reduce) for i, tap in enumerate(taps) for n, reduce in tap.items()]
        hooked = [(self._hook(n), i, n, reduce) for i, n, reduce in plan if n not in _OUTPUTS]
        outputs = [(i, n, reduce) for i, n, reduce in plan if n in _OUTPUTS]
        if not plan:
            return taken
        handles = []
        try:
            for point, i, name, reduce in hooked:
                listen = partial(_listen, take, i, name, reduce)
                handles.append((point, point.add_hook(listen)))  # type: ignore[operator]
            last = batch.last
            if any(name == LOGITS for _, name, _ in outputs):
                logits, at = self.logits(batch.tokens), last
            else:
                kept, at = torch.unique(last, return_inverse=True)
                logits = self.logits(batch.tokens, kept)
        finally:
            for point, handle in handles:
                handle.hook.remove()
                point.fwd_hooks.remove(handle)  # type: ignore[union-attr]
        for i, name, reduce in outputs:
            rows = torch.arange(len(at), device=at.device)
            take(i, name, reduce, logits if name == LOGITS else logits[rows, at])
        for i, name, _ in plan:
            if i not in failed and name not in taken[i]:
                raise ValueError(
                    f"Hook point {name!r} exists but the forward pass never reached it; "
                    f"tap another one."
                )
        return [
            {} if i in failed else {name: got[name] for name in tap}
            for i, (tap, got) in enumerate(zip(taps, taken, strict=True))
        ]

    @torch.no_grad()
    def logits(
        self, tokens: Int[Tensor, "probe pos"], positions: Int[Tensor, " kept"] | None = None
    ) -> Float[Tensor, "probe kept vocab"]:
        """The model's output for right-padded tokens, at all positions or at some.

        No attention mask: under a causal model what stands right of a token cannot reach it, and
        the rows of padding are never read.
        """
        kwargs: dict[str, Any] = {}
        if positions is not None and self._keeps_logits:
            kwargs["logits_to_keep"] = positions
        with torch.autocast(self.device.type, enabled=False):
            logits = self.bridge.original_model(tokens, use_cache=False, **kwargs).logits
        return logits if positions is None or kwargs else logits[:, positions]

    def _hook(self, name: str) -> nn.Module:
        if name not in self.hooks:
            near = difflib.get_close_matches(name, [*self.hooks, *_OUTPUTS], n=3)
            raise ValueError(
                f"This model has no hook point {name!r}. "
                + (f"Near it are {near}. " if near else "")
                + "All of them: list(shadow.hooks)."
            )
        return self.hooks[name]


def _listen(
    take: Callable[..., None], i: int, name: str, reduce: Reduce, value: Any, hook: Any
) -> None:
    """A hook that only looks: what it returns would replace the activation."""
    del hook
    take(i, name, reduce, value)


def _skeleton(base: nn.Module) -> nn.Module:
    """An empty model of the live one's class, on the meta device, with a config of its own.

    Nothing is drawn or allocated. A deep copy of the live model would not do: trainers patch
    `forward` on the instance, and the copy's patch still calls the live model.
    """
    config = copy.deepcopy(base.config)
    for part in (config, config.get_text_config()):  # type: ignore[operator, union-attr]
        part.tie_word_embeddings = False
        part.use_cache = False
    config._attn_implementation = "eager"  # type: ignore[union-attr]
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        skeleton = type(base)(config)
    return skeleton.eval()


def _borrow_buffers(module: nn.Module, live: nn.Module, device: torch.device) -> None:
    """Buffers, and tensors kept as plain attributes (the unscaled rotary frequencies)."""
    live = innermost(live)
    for name, value in live._buffers.items():
        if name in module._buffers and value is not None:
            module._buffers[name] = value.detach().to(device)
    for name, value in vars(live).items():
        if isinstance(value, Tensor) and isinstance(vars(module).get(name), Tensor):
            setattr(module, name, value.detach().to(device))
