"""Streamed weights: equal to resident ones, bit for bit, in the memory of one layer."""

import weakref
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny
from tests.instruments.common import MIXED_MOE, encoded
from tests.marks import exhaustive
from tests.shadow.test_shadow import lora, train
from tests.test_no_trace import sft
from tests.test_no_trace_instruments import every_instrument
from tests.training import CAPITAL
from tlens_callback import MemorySink, Shadow, TLensCallback, observe
from tlens_callback.shadow import memory, mirror
from tlens_callback.shadow.interventions import captured, edited, starting_at
from tlens_callback.shadow.layers import LayerWeights

BATCH = encoded()
DOWN, OUT = "model.layers.0.mlp.down_proj.weight", "blocks.0.attn.hook_z"


def both(family="llama", of=None, **config):
    """A model with trained adapters, its resident shadow and its streamed one, in this dtype."""
    experts = family in ("qwen3_moe", "mixtral")
    model = lora(tiny.model(family, **config), lora_dropout=0.0 if experts else 0.1)
    return model, *(Shadow.of(model, weights=how, dtype=of) for how in ("resident", "streamed"))


def activations(shadow, batch=BATCH):
    """All that goes through the hook points in one pass, and the logits."""
    found = {}
    handles = []
    for name, point in shadow.hooks.items():
        keep = lambda value, hook, name=name: found.update({name: value})  # noqa: E731
        handles.append((point, point.add_hook(keep)))
    try:
        found["logits"] = shadow.logits(batch.tokens)
    finally:
        for point, handle in handles:
            handle.hook.remove()
            point.fwd_hooks.remove(handle)
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


READ = ("gemma2", "gpt_neox", "qwen3_moe")
"""Whose readings are compared too."""


@pytest.mark.parametrize("family", exhaustive(tiny.FAMILIES, READ))
def test_every_activation_is_that_of_the_resident_shadow(family):
    model, resident, streamed = both(family)
    for _ in range(2):
        for shadow in (resident, streamed):
            shadow.sync()
        wanted, got = activations(resident), activations(streamed)
        assert got.keys() == wanted.keys() and len(wanted) > 70
        assert all(torch.equal(got[name], value) for name, value in wanted.items())
        train(model, BATCH, steps=1)
    assert streamed.extra_bytes == resident.extra_bytes / streamed.n_layers
    assert streamed.n_owned == resident.n_owned > 0


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"of": torch.float64}),
        ("llama", {"num_hidden_layers": 4}),
        ("gemma2", {}),
        ("gpt_neox", {}),
        ("qwen3_moe", MIXED_MOE),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.slow
def test_every_reading_is_that_of_the_resident_shadow(family, config):
    """Of all instruments, at two observations with a step between them."""
    model, *shadows = both(family, **config)
    sets = [every_instrument() for _ in shadows]
    for _ in range(2):
        found = []
        for shadow, made in zip(shadows, sets, strict=True):
            shadow.sync()
            failed = []
            readings = observe(
                shadow,
                BATCH,
                made,
                on_error=lambda one, error, to=failed: to.append(str(error)),
            )
            found.append(({r.key: r for r in readings}, failed))
        (wanted, refused), (got, also) = found
        assert refused == also and got.keys() == wanted.keys() and len(wanted) > 100
        for key, reading in wanted.items():
            assert reading.values.tobytes() == got[key].values.tobytes(), key
        train(model, BATCH, steps=1)


def test_gradients_are_those_of_the_resident_shadow(monkeypatch):
    _, *shadows = both(num_hidden_layers=4)

    def gradients(shadow):
        names = [f"blocks.{layer}.attn.hook_z" for layer in range(4)]
        logits, got = captured(shadow, BATCH.tokens[0], names, grad=True)
        return torch.autograd.grad(logits.square().sum(), [got[name] for name in names])

    wanted, found = (gradients(shadow) for shadow in shadows)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    layers = shadows[1].mirror.layers
    assert layers.loads == 4 + 4, "down once, up once"
    shadows[1].sync()
    assert layers._entered == {}
    # The control: weights that are kept as they are have been filled with NaN by then.
    monkeypatch.setattr(LayerWeights, "_for_backward", lambda self: nullcontext())
    assert all(gradient.isnan().any() for gradient in gradients(shadows[1])[:3])


def test_late_readers_find_nan():
    """Whoever reads a layer's weights outside its time, and whoever keeps them beyond it."""
    _, resident, streamed = both()
    kept = {}

    def keep(shadow):
        def reads(value):
            kept[shadow] = shadow.bridge.blocks[0].attn.W_O
            return kept[shadow].sum()

        return reads

    def later(shadow):
        return lambda value: torch.stack(
            [kept[shadow].sum(), shadow.bridge.blocks[0].attn.W_O.sum()]
        )

    found = {}
    for shadow in (resident, streamed):
        taps = {OUT: keep(shadow), "blocks.1.attn.hook_z": later(shadow)}
        (found[shadow],) = shadow.run(BATCH, [taps])
    assert torch.equal(found[streamed][OUT], found[resident][OUT]), "in its time it is there"
    assert found[streamed]["blocks.1.attn.hook_z"].isnan().all()
    assert kept[streamed].isnan().all() and streamed.bridge.blocks[1].mlp.W_out.isnan().all()
    # The control: weights that are there all the time.
    assert torch.equal(found[resident]["blocks.1.attn.hook_z"], found[resident][OUT].expand(2))
    weights = {weight.name: weight for weight in streamed.mirror.weights()}
    assert weights[DOWN].value.isnan().all() and weights["model.norm.weight"].value.isfinite().all()


def test_a_layer_can_be_entered_anywhere():
    _, resident, streamed = both()

    def out(shadow, layer):
        with shadow.layer(layer) as block:
            return block.attn.W_O.clone(), block.mlp.W_out.clone()

    wanted = [out(resident, layer) for layer in (0, 1)]
    for layer in (0, 1):
        assert all(
            torch.equal(*pair) for pair in zip(out(streamed, layer), wanted[layer], strict=True)
        )
    with streamed.layer(1) as block, streamed.layer(1), streamed.layer(None) as none:
        assert none is None
        logits = streamed.logits(BATCH.tokens)  # enters and leaves the layer too
        assert torch.equal(block.attn.W_O, wanted[1][0])
    assert block.attn.W_O.isnan().all() and streamed.mirror.layers._entered == {}
    # In a pass, the layer that runs keeps its own.
    taps = {OUT: lambda z: out(streamed, 1)[0].sum(), "logits": lambda given: given}
    (got,) = streamed.run(BATCH, [taps])
    assert torch.equal(got[OUT], wanted[1][0].sum()) and torch.equal(got["logits"], logits)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_pass_that_fails_leaves_no_layer_entered(kind):
    _, resident, streamed = both()

    def fails(value):
        raise kind("in the pass")

    with pytest.raises(kind, match="in the pass"), edited(streamed, {OUT: fails}):
        streamed.logits(BATCH.tokens)
    assert streamed.mirror.layers._entered == {}
    wanted = resident.logits(BATCH.tokens)
    assert torch.equal(streamed.logits(BATCH.tokens), wanted)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_sync_reaches_a_layer_that_is_entered(family):
    model, resident, streamed = both(family)
    with streamed.layer(0):
        before = streamed.logits(BATCH.tokens)
        train(model, BATCH, steps=1)
        for shadow in (resident, streamed):
            shadow.sync()
        wanted = resident.logits(BATCH.tokens)
        assert torch.equal(streamed.logits(BATCH.tokens), wanted) and not torch.equal(
            before, wanted
        )
    # A pass that nobody cleaned up after, as of a bridge that is called by itself.
    streamed.mirror.layers.enter(1)
    train(model, BATCH, steps=1)
    for shadow in (resident, streamed):
        shadow.sync()
    assert torch.equal(streamed.logits(BATCH.tokens), resident.logits(BATCH.tokens))


def test_a_graph_of_weights_that_are_gone_has_no_gradient():
    model, _, streamed = both()
    logits, got = captured(streamed, BATCH.tokens[0], [OUT], grad=True)
    train(model, BATCH, steps=1)
    streamed.sync()
    with pytest.raises(RuntimeError, match="brought up to date after this forward pass"):
        torch.autograd.grad(logits.sum(), [got[OUT]])


def test_a_block_without_its_weights_is_not_streamed(monkeypatch):
    model, *_ = both()
    monkeypatch.setattr("tlens_callback.shadow.layers._tensors", lambda block: ())
    with pytest.raises(ValueError, match=r"does not hold .*Use weights='resident'"):
        Shadow.of(model, weights="streamed")


def test_layers_that_are_skipped_are_not_loaded():
    _, resident, streamed = both(num_hidden_layers=4)
    resid = torch.randn(2, 5, resident.d_model, generator=torch.manual_seed(0))
    for _ in range(2):  # the first shows what a layer returns
        logits = []
        for shadow in (resident, streamed):
            before = 0 if shadow is resident else shadow.mirror.layers.loads
            with starting_at(shadow, 3, resid):
                logits.append(shadow.logits(BATCH.tokens[:2, :5]))
        assert torch.equal(*logits)
    assert streamed.mirror.layers.loads - before == 1


class Living(TorchDispatchMode):
    """Follows the bytes of the storages that are made here and live at the same time."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(made, torch.Tensor) and made.device.type == "cpu":
            at, size = made.untyped_storage().data_ptr(), made.untyped_storage().nbytes()
            if at not in given | self._seen and size:
                self._seen.add(at)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(made, self._gone, at, size)
        return made

    def _gone(self, at, size):
        self._seen.discard(at)
        self.now -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_that_of_one_layer(dtype):
    """Of a whole pass over one short text, activations and all that a merge takes included."""
    config = {"num_hidden_layers": 6, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    model = lora(tiny.model("llama", **config).to(dtype))
    peaks = {}
    for how in ("resident", "streamed"):
        shadow = Shadow.of(model, weights=how)
        layer = sum(p.nbytes for p in shadow.bridge.original_model.model.layers[0].parameters())
        with Living() as living:
            shadow.sync()
            shadow.logits(BATCH.tokens[:1, :4])
        peaks[how] = (shadow.extra_bytes if how == "resident" else 0) + living.most
    assert peaks["streamed"] < 2.5 * layer < 6 * layer < peaks["resident"]


def test_auto_streams_what_would_take_too_much(monkeypatch):
    model, resident, streamed = both()
    needed = resident.extra_bytes
    monkeypatch.setattr(memory, "SHARE", 1 / 4)
    for free, wanted in ((4 * needed - 1, True), (4 * needed, False)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        assert Shadow.of(model).streamed is wanted
    assert streamed.streamed and not resident.streamed
    monkeypatch.setattr(mirror, "layer_paths", lambda model: [])
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    assert not Shadow.of(model).streamed
    with pytest.raises(ValueError, match=r"does not have\. Use weights='resident'"):
        Shadow.of(model, weights="streamed")
    for wrong in (lambda: Shadow.of(model, weights="all"), lambda: TLensCallback(weights="all")):
        with pytest.raises(ValueError, match="weights must be 'auto', 'resident' or 'streamed'"):
            wrong()


def test_a_training_says_so_and_reads_the_same(tmp_path, capsys):
    def train_with(weights):
        memory = MemorySink()
        look = TLensCallback(
            [CAPITAL], sinks=[memory], every_n_steps=2, weights=weights, on_error="raise"
        )
        sft(tmp_path / weights, [look], max_steps=3)
        return memory.readings, capsys.readouterr().out

    (wanted, told), (got, said) = (train_with(weights) for weights in ("resident", "streamed"))
    assert "for one layer at a time (weights='streamed')" in said and "one layer" not in told
    assert got.keys() == wanted.keys()
    for key, steps in wanted.items():
        if not key.startswith(("cost/", "trainer/")):
            for step, reading in steps.items():
                assert reading.values.tobytes() == got[key][step].values.tobytes(), (key, step)
