"""What a stack reads is what plain hooks read, in groups of any size and whoever else reads it."""

import copy
import weakref
from typing import Any

import pytest
import torch

from tests import tiny
from tests.instruments.common import Played, encoded, of_layers
from tests.shadow.test_shadow import lora
from tlens_callback import Probe, Shadow
from tlens_callback.shadow import Stack, stacks

BATCH = encoded()
ROWS, WIDTH = BATCH.tokens.shape
LAYERS = 5
RESID, PATTERN, ATTN, MLP = "hook_resid_post", "attn.hook_pattern", "hook_attn_out", "hook_mlp_out"
EVERY = tuple(range(LAYERS))
GROUPS = (0, 2 * 4 * ROWS * WIDTH * 32, 2**40)
"""Limits in bytes: layers of a residual stream are given one by one, two together, or all."""


@pytest.fixture(scope="module")
def of() -> Shadow:
    return Shadow.of(tiny.model("llama", num_hidden_layers=LAYERS))


def whole(of: Shadow, end: str, batch=BATCH) -> torch.Tensor:
    """[layer, ...], by plain hooks."""
    names = [f"blocks.{layer}.{end}" for layer in range(of.n_layers)]
    (taken,) = of.run(batch, [{name: lambda value: value.clone() for name in names}])
    return torch.stack([taken[name] for name in names])


def read(of: Any, *keys: Stack, batch=BATCH) -> list[torch.Tensor]:
    """What each stack gives, each to an instrument of its own."""
    taken = of.run(batch, [{key: lambda value, part: value.clone()} for key in keys])
    return [got[key] for got, key in zip(taken, keys, strict=True)]


def expected(of: Shadow, key: Stack, batch=BATCH) -> torch.Tensor:
    ends = [key.end] if isinstance(key.end, str) else key.end
    each = []
    for end in ends:
        value = whole(of, end, batch)[list(key.layers)]
        if key.rows is not None:
            value = value[:, list(key.rows)]
        if key.tokens is not None:
            value = torch.stack(
                [value[:, at // batch.tokens.shape[1], at % batch.tokens.shape[1]]
                 for at in key.tokens], 1
            )  # fmt: skip
        each.append(value)
    return each[0] if isinstance(key.end, str) else torch.stack(each, 1)


KEYS = [
    Stack(RESID, EVERY),
    Stack(RESID, (3,)),
    Stack(RESID, (0, 2, 4)),
    Stack(RESID, EVERY, rows=(1,)),
    Stack(RESID, EVERY, rows=(2, 3, 4)),
    Stack(RESID, EVERY, rows=(0, 2, 6)),
    Stack(RESID, EVERY, rows=(5, 0, 3)),
    Stack(RESID, EVERY, rows=(4, 4, 1, 4)),
    Stack(PATTERN, EVERY, rows=(6, 1)),
    Stack(PATTERN, (1, 2)),
    Stack(RESID, EVERY, tokens=(WIDTH + 2,)),
    Stack(RESID, EVERY, tokens=tuple(range(ROWS * WIDTH))),
    Stack(RESID, EVERY, tokens=tuple(range(WIDTH - 2, WIDTH + 3))),
    Stack(RESID, EVERY, tokens=(7, 3 * WIDTH, WIDTH, 7, 2 * WIDTH + 1)),
    Stack("attn.hook_z", (1, 4), tokens=(2 * WIDTH + 3, 5)),
    Stack((RESID, ATTN, MLP), EVERY),
    Stack((RESID, MLP), (1, 2, 4), rows=(3, 0)),
    Stack((MLP, RESID), EVERY, tokens=(9, 2 * WIDTH, 4)),
]


@pytest.mark.parametrize("limit", GROUPS)
@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key} of {key.rows or key.tokens}"[:60])
def test_equals_plain_hooks(of, key, limit, monkeypatch):
    monkeypatch.setattr(stacks, "_ON_CPU", limit)
    (got,) = read(of, key)
    assert torch.equal(got, expected(of, key))


@pytest.mark.parametrize("limit", GROUPS)
def test_all_in_one_pass_equal_plain_hooks(of, limit, monkeypatch):
    """What the one reads is a part of what is gathered for all."""
    monkeypatch.setattr(stacks, "_ON_CPU", limit)
    for key, got in zip(KEYS, read(of, *KEYS), strict=True):
        assert torch.equal(got, expected(of, key)), key
    # The check can fail: of other layers, rows and ends there are other numbers.
    values = [expected(of, key) for key in KEYS]
    alike = [(i, j) for i in range(len(KEYS)) for j in range(i) if values[i].equal(values[j])]
    assert alike == []


def test_one_instrument_may_have_many(of):
    (taken,) = of.run(BATCH, [{key: lambda value, part: value.clone() for key in KEYS}])
    assert list(taken) == KEYS
    for key, got in taken.items():
        assert torch.equal(got, expected(of, key)), key


@pytest.mark.parametrize(
    ("limit", "sizes"), [(GROUPS[0], [1] * 5), (GROUPS[1], [2, 2, 1]), (GROUPS[2], [5])]
)
def test_groups_come_in_order_and_say_which_layers_they_are(of, limit, sizes, monkeypatch):
    monkeypatch.setattr(stacks, "_ON_CPU", limit)
    parts = []

    def reduce(value, part):
        parts.append(part)
        assert len(value) == part.stop - part.start
        return value.sum((1, 2, 3)), value.amax((1, 2, 3))

    key = Stack(RESID, EVERY)
    (taken,) = of.run(BATCH, [{key: reduce}])
    assert [part.stop - part.start for part in parts] == sizes
    assert [part.start for part in parts] == [sum(sizes[:i]) for i in range(len(sizes))]
    sums, largest = taken[key]
    assert torch.equal(largest, whole(of, RESID).amax((1, 2, 3)))
    torch.testing.assert_close(sums, whole(of, RESID).sum((1, 2, 3)))


def test_several_ends_of_a_layer_stay_together(of, monkeypatch):
    """Also where less than a layer fits the limit."""
    monkeypatch.setattr(stacks, "_ON_CPU", 1)
    shapes = []

    def reduce(value, part):
        shapes.append((tuple(value.shape[:2]), part))
        return value.new_zeros(len(value))

    of.run(BATCH, [{Stack((RESID, ATTN, MLP), EVERY): reduce}])
    assert shapes == [((1, 3), slice(i, i + 1)) for i in range(LAYERS)]


@pytest.mark.parametrize("limit", GROUPS)
def test_an_empty_tuple_adds_nothing(of, limit, monkeypatch):
    monkeypatch.setattr(stacks, "_ON_CPU", limit)
    key, kept = Stack(RESID, EVERY, tokens=(1, 5)), []

    def at_the_end(value, part):
        kept.append(value)
        return torch.cat(kept).mean((0, 2)) if part.stop == LAYERS else ()

    (taken,) = of.run(BATCH, [{key: at_the_end}])
    torch.testing.assert_close(taken[key], expected(of, key).mean((0, 2)))
    (taken,) = of.run(BATCH, [{key: lambda value, part: ()}])
    assert taken[key] == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_precision_is_the_models(of, dtype):
    other = Shadow.of(tiny.model("llama", num_hidden_layers=LAYERS).to(dtype))
    for key, got in zip(KEYS[:4], read(other, *KEYS[:4]), strict=True):
        assert got.dtype == dtype and torch.equal(got, expected(other, key))


def test_what_several_read_is_gathered_once(of, monkeypatch):
    """Places that only one of them reads come along; other layers are gathered apart."""
    picked = []
    pick = stacks._pick

    def recorded(value, within, dim=0):
        if isinstance(within, torch.Tensor):
            picked.append(len(within))
        return pick(value, within, dim)

    monkeypatch.setattr(stacks, "_pick", recorded)
    monkeypatch.setattr(stacks, "_ON_CPU", 2**40)
    places = (3, WIDTH, 2 * WIDTH + 1)
    one = Stack(RESID, EVERY, tokens=places)
    read(of, one)
    assert picked == [3] * LAYERS
    picked.clear()
    read(of, one, one, Stack(RESID, EVERY, tokens=places), Stack(ATTN, EVERY, tokens=places))
    assert picked == [3] * 2 * LAYERS, "of each of the two activations"
    picked.clear()
    read(of, one, Stack(RESID, (1, 2), tokens=places))
    assert picked == [3] * LAYERS, "the same places of the same activation"
    picked.clear()
    read(of, one, Stack(RESID, EVERY, tokens=(5, 2 * WIDTH + 1)))
    assert picked[:LAYERS] == [4] * LAYERS, "all places together"
    assert sorted(picked[LAYERS:]) == [2, 3], "of which each has its own, in all layers at once"


def test_where_places_are_is_worked_out_once_for_a_batch(of, monkeypatch):
    batch, made = encoded(), []
    plan = stacks._plan
    monkeypatch.setattr(stacks, "_plan", lambda *args, **of: made.append(args) or plan(*args, **of))
    for times in range(3):
        for key, got in zip(KEYS, read(of, *KEYS, batch=batch), strict=True):
            assert torch.equal(got, expected(of, key))
        if times == 0:
            first = len(made)
    assert len(made) == first > 0
    read(of, *KEYS, batch=encoded())
    assert len(made) == 2 * first, "for each batch its own"


def test_rows_and_tokens_of_probes_of_one_token_are_told_apart(of):
    """There the places have the same numbers."""
    batch = encoded([Probe(name, [i]) for i, name in enumerate("abc", 20)])
    rows, tokens = Stack(RESID, EVERY, rows=(0, 2)), Stack(RESID, EVERY, tokens=(0, 2))
    for keys in ((rows, tokens), (tokens, rows)):
        for key, got in zip(keys, read(of, *keys, batch=batch), strict=True):
            wanted = expected(of, key, batch)
            assert got.shape == wanted.shape and torch.equal(got, wanted)


def failures(of: Any, *taps: Any, batch=BATCH) -> tuple[list[Any], dict[int, Exception]]:
    """The results, and the error of each instrument that failed; none fails twice."""
    failed: dict[int, Exception] = {}

    def fail(i: int, error: Exception) -> None:
        assert i not in failed
        failed[i] = error

    return of.run(batch, taps, on_error=fail), failed


def largest(value: torch.Tensor, part: slice) -> torch.Tensor:
    return value.flatten(1).amax(1)


OTHER = Stack(ATTN, EVERY)


def assert_well(of: Shadow, taken: Any, key: Stack) -> None:
    assert torch.equal(taken[key], expected(of, key).flatten(1).amax(1))


@pytest.mark.parametrize("limit", GROUPS)
def test_a_missing_hook_point_fails_its_own_instrument_and_is_named(of, limit, monkeypatch):
    monkeypatch.setattr(stacks, "_ON_CPU", limit)
    gone = Stack(RESID, (0, 1, LAYERS))
    taken, failed = failures(of, {OTHER: largest}, {OTHER: largest, gone: largest})
    assert list(failed) == [1] and f"no hook point 'blocks.{LAYERS}.{RESID}'" in str(failed[1])
    assert taken[1] == {}
    assert_well(of, taken[0], OTHER)
    with pytest.raises(ValueError, match=r"no hook point 'blocks\.0\.hook_nowhere'"):
        of.run(BATCH, [{Stack((RESID, "hook_nowhere"), EVERY): largest}])
    assert all(not point.has_hooks() for point in of.hooks.values())


@pytest.mark.parametrize("limit", GROUPS)
def test_a_reduction_that_fails_fails_its_own_instrument(of, limit, monkeypatch):
    """Also of two that read the same activation, and whatever it is that fails."""
    monkeypatch.setattr(stacks, "_ON_CPU", limit)

    def late(value, part):
        if part.stop == LAYERS:
            raise ZeroDivisionError
        return largest(value, part)

    taken, failed = failures(of, {OTHER: late}, {OTHER: largest}, {OTHER: lambda value, part: 1.0})
    assert list(failed) == [2, 0] if limit < GROUPS[2] else [0, 2]
    assert isinstance(failed[0], ZeroDivisionError)
    assert "{layer}.hook_attn_out' returned float" in str(failed[2])
    assert taken[0] == taken[2] == {}
    assert_well(of, taken[1], OTHER)
    with pytest.raises(ZeroDivisionError):
        of.run(BATCH, [{OTHER: late}])
    assert all(not point.has_hooks() for point in of.hooks.values())


@pytest.mark.parametrize(
    "reduce",
    [
        lambda value, part: value.sum(),
        lambda value, part: (value[:, 0],) * (1 + part.start % 2),
        lambda value, part: value[:, 0, : part.stop],
    ],
    ids=["numbers without an axis", "more and fewer tensors", "other shapes"],
)
def test_results_that_cannot_be_joined_fail_their_own_instrument(of, reduce, monkeypatch):
    """Layers come one by one, so that there are several results."""
    monkeypatch.setattr(stacks, "_ON_CPU", 0)
    key = Stack(RESID, EVERY)
    taken, failed = failures(of, {key: reduce}, {OTHER: largest})
    assert list(failed) == [0] and taken[0] == {}
    assert_well(of, taken[1], OTHER)


@pytest.mark.parametrize(
    "places",
    [
        {"tokens": ()},
        {"rows": ()},
        {"rows": (ROWS,)},
        {"tokens": (ROWS * WIDTH,)},
        {"tokens": (-1,)},
        {"layers": ()},
    ],
    ids=["no tokens", "no rows", "a row too far", "a token too far", "a token before", "no layers"],
)
def test_places_that_are_not_there_fail_their_own_instrument(of, places):
    key = Stack(RESID, **{"layers": EVERY, **places})
    taken, failed = failures(of, {key: largest}, {OTHER: largest})
    assert list(failed) == [0] and taken[0] == {}
    assert_well(of, taken[1], OTHER)


def made(layers: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(layers, ROWS, WIDTH, 4, generator=generator)


ORDERS = {
    "twice": (0, 1, 1, 2),
    "twice at the end": (0, 1, 2, 2),
    "once more": (0, 1, 2, 0),
    "out of order": (1, 0, 2),
    "backwards": (2, 1, 0),
    "one left out": (0, 2),
}


@pytest.mark.parametrize("limit", [0, 2 * 4 * ROWS * WIDTH * 4])
@pytest.mark.parametrize("order", ORDERS)
def test_layers_twice_or_out_of_order_are_an_error_of_their_readers(order, limit, monkeypatch):
    """A plain hook beside them, and a stack of another activation, go on. Of those that are
    reduced together any may come first."""
    monkeypatch.setattr(stacks, "_ON_CPU", limit)
    resid, other = made(), made() + 1
    passes = Played(of_layers(RESID, resid) | of_layers(ATTN, other))

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        for layer in ORDERS[order]:
            passes.hooks[f"blocks.{layer}.{RESID}"](resid[layer])
        for layer in range(3):
            passes.hooks[f"blocks.{layer}.{ATTN}"](other[layer])
        return torch.zeros(*tokens.shape, tiny.VOCAB)

    passes.logits = logits
    key, beside = Stack(RESID, (0, 1, 2)), Stack(ATTN, (0, 1, 2))
    taken, failed = failures(
        passes,
        {key: largest, beside: largest},
        {key: largest},
        {beside: largest, f"blocks.2.{RESID}": lambda value: value.amax()},
    )
    if limit and order == "out of order":
        assert failed == {} and torch.equal(taken[1][key], resid.flatten(1).amax(1))
    else:
        assert sorted(failed) == [0, 1] and taken[:2] == [{}, {}]
        assert f".{RESID}" in str(failed[0])
    assert torch.equal(taken[2][beside], other.flatten(1).amax(1))


@pytest.mark.parametrize("limit", [0, 2 * 4 * ROWS * WIDTH * 4, 2**40])
@pytest.mark.parametrize("reached", [(), (0,), (0, 1)])
def test_layers_that_are_never_reached_are_an_error(reached, limit, monkeypatch):
    """However many were reduced before: fewer layers than asked for are no result."""
    monkeypatch.setattr(stacks, "_ON_CPU", limit)
    resid, other = made(), made() + 1
    passes = Played(of_layers(RESID, resid) | of_layers(ATTN, other))
    played = [passes.hooks[f"blocks.{i}.{RESID}"] for i in reached]

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        for point, value in zip(played, resid, strict=False):
            point(value)
        for layer in range(3):
            passes.hooks[f"blocks.{layer}.{ATTN}"](other[layer])
        return torch.zeros(*tokens.shape, tiny.VOCAB)

    passes.logits = logits
    key, beside = Stack(RESID, (0, 1, 2)), Stack(ATTN, (0, 1, 2))
    taken, failed = failures(passes, {key: largest}, {beside: largest})
    assert list(failed) == [0] and "never reached the hook point" in str(failed[0])
    assert taken[0] == {} and len(taken[1][beside]) == 3


@pytest.mark.parametrize("limit", [0, 2**40])
def test_an_activation_that_the_model_changes_in_place_is_no_other(limit, monkeypatch):
    """It is right if it is read before, and refused if it were read too late."""
    monkeypatch.setattr(stacks, "_ON_CPU", limit)
    resid = made()
    passes = Played(of_layers(RESID, resid))

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        for layer, value in enumerate(resid.clone().unbind()):
            passes.hooks[f"blocks.{layer}.{RESID}"](value)
            value.add_(1)
        return torch.zeros(*tokens.shape, tiny.VOCAB)

    passes.logits = logits
    key, some = Stack(RESID, (0, 1, 2)), Stack(RESID, (0, 1, 2), rows=(3, 0))
    taken, failed = failures(passes, {key: largest})
    if limit:
        assert "was changed in place" in str(failed[0])
    else:
        assert torch.equal(taken[0][key], resid.flatten(1).amax(1))
    taken, failed = failures(passes, {some: largest})
    assert failed == {}, "what is picked by an index is a copy"
    assert torch.equal(taken[0][some], resid[:, [3, 0]].flatten(1).amax(1))


def test_layers_of_different_shapes_are_an_error_of_their_readers():
    resid = [*made(2), torch.zeros(ROWS, WIDTH, 5)]
    passes = Played(of_layers(RESID, resid) | of_layers(ATTN, made()))
    beside = Stack(ATTN, (0, 1, 2))
    taken, failed = failures(passes, {Stack(RESID, (0, 1, 2)): largest}, {beside: largest})
    assert list(failed) == [0] and len(taken[1][beside]) == 3


def test_with_streamed_weights_a_layer_has_its_own_while_it_is_reduced(monkeypatch):
    """Each call has one layer, whose weights are there; those of the others are not."""
    monkeypatch.setattr(stacks, "_ON_CPU", 2**40)
    model = lora(tiny.model("llama", num_hidden_layers=LAYERS), lora_dropout=0.0)
    resident, streamed = (Shadow.of(copy.deepcopy(model), weights=how)
                          for how in ("resident", "streamed"))  # fmt: skip
    assert streamed.streamed and not resident.streamed
    key, sizes = Stack("attn.hook_z", EVERY, tokens=(3, WIDTH + 2)), {}

    def through(of: Shadow) -> Any:
        def reduce(z, part):
            sizes.setdefault(of, []).append(len(z))
            blocks: Any = of.bridge.blocks
            w_o = torch.stack([blocks[layer].attn.W_O for layer in EVERY[part]])
            return torch.einsum("lthd,lhdm->ltm", z, w_o)

        return reduce

    found = [of.run(BATCH, [{key: through(of)}])[0][key] for of in (resident, streamed)]
    assert sizes == {resident: [LAYERS], streamed: [1] * LAYERS}
    torch.testing.assert_close(*found)

    def of_another_layer(z, part):
        blocks: Any = streamed.bridge.blocks
        return blocks[(part.start + 1) % LAYERS].attn.W_O.sum()[None]

    (taken,) = streamed.run(BATCH, [{key: of_another_layer}])
    assert taken[key].isnan().all(), "the control"


def test_no_activation_outlives_the_pass(of):
    """What is held to be stacked, and what was picked for several, goes with the pass."""
    seen = []

    def reduce(value, part):
        seen.append(weakref.ref(value))
        return largest(value, part)

    taken = of.run(BATCH, [{key: reduce for key in KEYS[:14]}, {KEYS[5]: reduce}])
    assert len(seen) > 14 and len(taken) == 2
    assert [value for value in seen if value() is not None] == []


def test_its_name_stands_for_all_layers():
    assert str(Stack(PATTERN, (3, 4))) == "blocks.{layer}.attn.hook_pattern"
    assert Stack((RESID, MLP), (1, 2)).hooks == [
        f"blocks.{layer}.{end}" for layer in (1, 2) for end in (RESID, MLP)
    ]
