"""`Shadow`: a hooked copy of the live model that is kept equal to it and never changes it."""

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tlens_callback.probes import ProbeBatch
from tlens_callback.shadow import bridge
from tlens_callback.shadow.base import base_lent, changed_base
from tlens_callback.shadow.memory import Holding, demand_holding
from tlens_callback.shadow.mirror import Mirror
from tlens_callback.shadow.ranks import Ranks
from tlens_callback.shadow.refusals import language_model, refuse
from tlens_callback.shadow.stacks import Taken
from tlens_callback.shadow.taps import OUTPUTS, Taps, run_taps
from tlens_callback.shadow.weights import unwrap

_ID = ("id", "index")
"""Endings of a config's fields that hold the id of a token."""


class Shadow:
    """A `TransformerBridge` that holds the live model's current, adapter-merged weights.

    `TransformerBridge` is TransformerLens 4's successor of `HookedTransformer`: same hook names.
    Its module tree is the shadow's own; the tensors in it are of two kinds. A parameter that no
    adapter changes is *aliased*: it is the live tensor, whatever training does to it. One that an
    adapter changes has storage of its own, filled in place by `sync`, or, if its layer is streamed,
    when a forward pass enters the layer. Full fine-tuning aliases everything and a sync does
    nothing.

    The bridge is raw (no compatibility mode): weights are not folded or centred, which would
    break the aliases.

    Attributes:
        bridge: the bridge; `bridge.blocks[0].attn.W_O`, `bridge.W_U` and so on are views.
        hooks: every hook point by every name it has.
        n_layers, n_heads, d_model, vocab_size: sizes of the model.
        context: longest input in tokens, or None if the model sets no limit.
        device, dtype: the device and the precision in which the shadow computes.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weights: Holding = "auto",
        ranks: Ranks | None = None,
    ) -> None:
        demand_holding(weights)
        self._model = model
        self.ranks = ranks
        self._holding: Holding = weights
        # A tensor's device has an index where "cuda" has none, and the two are not equal.
        self._device = (
            None if device is None else torch.empty(0, dtype=torch.uint8, device=device).device
        )
        self._dtype = dtype
        self._blocks_without = 0
        self._base_lent: ExitStack | None = None
        self.builds = 0
        self._build()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weights: Holding = "auto",
    ) -> "Shadow":
        """Makes the shadow of a `PreTrainedModel`, plain or wrapped by PEFT, DDP or compile.

        Args:
            device: device of the shadow. Default: that of the live model. Another device needs a
                full copy of the weights there, and each sync moves what training changes.
            dtype: precision of the shadow. Default: that of most live parameters. Another dtype
                needs a full copy of the weights in it: 4 bytes a parameter for float32.
            weights: how weights are held that cannot be borrowed. "resident": all of them, brought
                up to date by `sync`. "streamed": of the decoder layers, one at a time; each forward
                pass merges a layer's weights when it enters the layer. It takes the memory of one
                layer, and the time of a sync for each pass. "auto": resident, unless those of
                the layers would take more than a quarter of the free memory or the base is
                quantised.

        Raises:
            ValueError: if the model is no causal language model, is not supported by
                TransformerLens's bridge, has no single merged weight, or cannot be read (sharded,
                offloaded, packed in an unknown way ...); the text gives name and reason. Or if
                `weights` is none of the three.
        """
        return cls(model, device=device, dtype=dtype, weights=weights)

    def _build(self) -> None:
        refuse(self._model, device=self._device, together=self.ranks is not None)
        base = language_model(self._model)
        self.mirror = Mirror(
            base,
            device=self._device,
            dtype=self._dtype,
            weights=self._holding,
            ranks=self.ranks,
        )
        self.device, self.dtype = self.mirror.device, self.mirror.dtype
        text = base.config.get_text_config()
        embeddings: Any = self.mirror.module.get_input_embeddings()
        self.vocab_size = int(embeddings.weight.shape[0])
        self.context: int | None = getattr(text, "max_position_embeddings", None)
        self._keeps_logits = (
            "logits_to_keep" in inspect.signature(type(self.mirror.module).forward).parameters
        )
        try:
            self.bridge = bridge.build(self.mirror.module, self.device)
            self._split = bridge.split_copies(self.bridge)
            bridge.round_rotated(self.bridge, self.dtype)
            bridge.quieten_norms(self.bridge)
        except Exception as error:
            raise ValueError(
                f"TransformerLens's bridge cannot take a {type(base).__name__}: {error} "
                f"A later version of transformer-lens may be able to."
            ) from error
        if self.mirror.layers is not None:
            self.mirror.layers.bind(self.bridge.blocks, self._split)
            self._split.clear()
        cfg = self.bridge.cfg
        self.n_layers, self.n_heads, self.d_model = cfg.n_layers, cfg.n_heads, cfg.d_model
        self.hooks: Mapping[str, nn.Module] = dict(self.bridge.hook_dict)
        self.builds += 1
        self._fill()

    @property
    def extra_bytes(self) -> int:
        """Bytes that the shadow holds beyond the live model's own."""
        split = sum(part.copy.numel() * part.copy.element_size() for part in self._split)
        return self.mirror.extra_bytes + split

    @property
    def n_owned(self) -> int:
        """Number of parameters with storage of their own, for a merged weight."""
        return self.mirror.n_owned

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Numbers of layers, heads, entries of the residual stream and tokens."""
        return self.n_layers, self.n_heads, self.d_model, self.vocab_size

    @property
    def placeholders(self) -> frozenset[int]:
        """Ids of the tokens that stand for an image, a video or a sound in the text."""
        config: Any = self.bridge.original_model.config
        kinds = [f"{kind}_token" for kind in ("image", "video", "audio")]
        ids = [getattr(config, f"{kind}_{what}", None) for kind in kinds for what in _ID]
        return frozenset(one for one in ids if isinstance(one, int))

    @property
    def layers_path(self) -> str:
        """Path of the language model's layers in a plain model: "model.layers" in a Llama."""
        mapping: Any = self.bridge.adapter.component_mapping
        return mapping["blocks"].name

    @property
    def attention_layers(self) -> list[int]:
        """The layers whose attention patterns have a hook point; in a hybrid model not all have."""
        return [i for i in range(self.n_layers) if f"blocks.{i}.attn.hook_pattern" in self.hooks]

    @property
    def streamed(self) -> bool:
        """Whether the decoder layers have their weights only while they are entered."""
        return self.mirror.layers is not None

    @contextmanager
    def layer(self, layer: int | None) -> Iterator[Any]:
        """Gives the bridge's block of a layer its weights, for as long as the `with` block lasts.

        Inside a forward pass, a reduction can read the weights of the layer that its hook is in
        without it. Weights of a streamed layer that are read elsewhere are NaN.

        Args:
            layer: number of the layer; None stands for what is in no layer, and gives None.
        """
        layers = self.mirror.layers
        with nullcontext() if layers is None or layer is None else layers.entered(layer):
            yield None if layer is None else self.bridge.blocks[layer]  # type: ignore[index]

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Inside the `with` block the shadow is the base: the model with every adapter left out.

        `logits`, `run`, `layer` and the bridge then give what the live model computes, and holds,
        under `with model.disable_adapter()`: `modules_to_save` are their originals, trained tokens
        have the base's embeddings. After the block all is, bit for bit, as it was before. Blocks
        can be nested, and `sync` can be called inside. `changed_base` says whether this base is
        the pretrained model.

        Cost: no memory. Resident weights point at the live tensors of the base meanwhile; entering
        and leaving takes a seventh of a sync (SmolLM2-135M, LoRA). Those that cannot (packed,
        computed, another dtype or device) are overwritten and come back as a sync brings them; that
        takes a sync and a half. Streamed layers are written without adapters when a pass enters
        them, which takes less time than with adapters.

        Raises:
            ValueError: if the live model has no adapter, so that nothing holds the weights it had
                before training, or one is merged into the live weights at the moment.
        """
        self._blocks_without += 1
        try:
            if self._base_lent is None:
                self._lend_base()
            yield
        finally:
            self._blocks_without -= 1
            if not self._blocks_without:
                self._give_base_back()

    def _lend_base(self) -> None:
        modules = {*self.bridge.modules(), *self.mirror.module.modules()}
        with ExitStack() as stack:
            base = language_model(self._model)
            stack.enter_context(base_lent(base, self.mirror, [*modules], self._split))
            self._base_lent = stack.pop_all()

    def _give_base_back(self) -> None:
        lent, self._base_lent = self._base_lent, None
        if lent is not None:
            lent.close()

    @property
    def changed_base(self) -> tuple[str, ...]:
        """How the model that `without_adapters` gives differs from the pretrained model.

        A sentence for each reason; none if adapters are all that training changes. PiSSA, OLoRA,
        CorDA, LoftQ, LoRA-GA and KaSA write to the base's weights when the adapter is made, so
        that without it the rest is left. Biases and other weights of the base that are trained in
        place stay as trained. An adapter that was deleted leaves no trace to be found, nor does
        the rounding of merging and unmerging.
        """
        return changed_base(self._model, language_model(self._model), self.mirror)

    @torch.no_grad()
    def sync(self) -> None:
        """Brings the shadow up to the live model's current weights; reads it, never writes it.

        Cost: for plain LoRA one pass over the adapted weights (read W, A, B; write W + sBA, rounded
        once); nothing where all is aliased or streamed. A live model whose parameters moved to
        other storage or whose adapters were exchanged is mapped anew.
        """
        self._give_base_back()
        if self.mirror.fits(unwrap(self._model)):
            self._fill()
        else:
            self.release()
            self._build()
        if self._blocks_without:
            self._lend_base()

    def _fill(self) -> None:
        if self.mirror.layers is not None:
            self.mirror.layers.sync()
        self.mirror.fill()
        bridge.refresh(self._split)

    def release(self) -> None:
        """Frees the shadow's memory at once; it cannot run again until a `sync`."""
        self._give_base_back()
        self.mirror.release()
        self._split.clear()
        for module in self.bridge.modules():
            module._parameters.clear()
            module._buffers.clear()
            # transformer-lens 4.3's norms keep their weight beside that, in a cycle of references.
            held = [name for name, value in vars(module).items() if isinstance(value, Tensor)]
            for name in held:
                delattr(module, name)

    @torch.no_grad()
    def run(
        self,
        batch: ProbeBatch,
        taps: Sequence[Taps],
        *,
        on_error: Callable[[int, Exception], None] | None = None,
    ) -> list[dict[Any, Taken]]:
        """Runs one forward pass over the batch, with the reductions inside it, on the device.

        Args:
            taps: one mapping per instrument, from the name of a hook point to a reduction. Besides
                the names in `hooks` there are "logits", [probe, pos, vocab], and "last_logits",
                [probe, vocab] at each probe's last real token; the full logits are computed only
                if asked for. A `Stack` in place of a name is one hook point of several layers, and
                its `Unembedded` reads the logits that its residual streams would give.
            on_error: called with the index and the exception of an instrument whose reduction
                failed; the result of this instrument is empty. None: the error is raised.

        Returns:
            For each instrument, what its reductions returned, still on the device, under the names
            in its mapping and in their order.

        Raises:
            ValueError: if a name is no hook point of this model, or its hook did not fire.
        """
        return run_taps(self, batch, taps, on_error)

    def logits(
        self,
        tokens: Int[Tensor, "probe pos"],
        positions: Int[Tensor, " kept"] | None = None,
        *,
        grad: bool = False,
    ) -> Float[Tensor, "probe kept vocab"]:
        """The model's output for right-padded tokens, at all positions or only at `positions`.

        Args:
            grad: keep the graph, for `torch.autograd.grad` towards an activation that
                `interventions.edited` made a leaf of it. No weight gets a gradient otherwise.

        There is no attention mask: in a causal model a token is not affected by what stands to its
        right, and the rows of padding are never read.
        """
        self.mirror.follow_state()
        kwargs: dict[str, Any] = {}
        if positions is not None and self._keeps_logits:
            kwargs["logits_to_keep"] = positions
        layers = self.mirror.layers
        passing = nullcontext() if layers is None else layers.passing(grad=grad)
        with passing, torch.set_grad_enabled(grad), torch.autocast(self.device.type, enabled=False):
            logits = self.bridge.original_model(tokens, use_cache=False, **kwargs).logits
        return logits if positions is None or kwargs else logits[:, positions]

    def hook(self, name: str) -> nn.Module:
        """The hook point of this name.

        Raises:
            ValueError: for a name that is no hook point of this model.
        """
        if name not in self.hooks:
            near = difflib.get_close_matches(name, [*self.hooks, *OUTPUTS], n=3)
            raise ValueError(
                f"This model has no hook point {name!r}. "
                + (f"Similar names: {near}. " if near else "")
                + "To list all hook points: list(Shadow.of(model).hooks)."
            )
        return self.hooks[name]
