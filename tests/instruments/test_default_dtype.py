"""What a script sets as torch's default dtype changes no reading."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

import tlens_callback
from tests import tiny
from tests.instruments.common import encoded
from tests.marks import in_turns
from tests.shadow.test_shadow import lora
from tests.test_no_trace_instruments import every_instrument
from tlens_callback import ProbeBatch, Shadow, observe


@pytest.fixture
def default():
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


ROWS = [[1, *((7 * row + i) % 80 + 10 for i in range(20))] for row in range(8)]


def looks(model):
    """The readings of every instrument by key, at first and after the adapters moved."""
    shadow, instruments, plain = Shadow.of(model), every_instrument(), encoded()
    batch = ProbeBatch.encode(
        plain.probes,
        plain.tokenizer,
        vocab_size=tiny.VOCAB,
        context=tiny.CONTEXT,
        training=lambda n: ROWS[:n],
    )
    for factor in (1.0, 1.5):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(factor)
        shadow.sync()
        readings = observe(shadow, batch, instruments)
        yield {reading.key: reading for reading in readings}
    assert {one.name for one in instruments} == {reading.instrument for reading in readings}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype"), in_turns(["llama", "gpt2"], [torch.float64, torch.bfloat16])
)
def test_every_reading_is_the_same(default, family, dtype):
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(lora(tiny.model(family), lora_dropout=0.0))
    usual = list(looks(models[0]))
    default(dtype)
    for before, after in zip(usual, looks(models[1]), strict=True):
        assert list(after) == list(before)
        for key, reading in after.items():
            assert reading.values.dtype == before[key].values.dtype, key
            np.testing.assert_array_equal(reading.values, before[key].values, err_msg=key)


MAKES_FLOATS = {"zeros", "ones", "empty", "full", "eye", "linspace", "logspace", "rand", "randn"}


def without_dtype(source: str) -> list[int]:
    """Lines that make a tensor of the default dtype."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and (node.func.value.id, node.func.attr in MAKES_FLOATS) == ("torch", True)
        and "dtype" not in {word.arg for word in node.keywords}
    ]


def test_no_tensor_is_made_without_a_dtype():
    root = Path(tlens_callback.__file__).parent
    found = {str(p): lines for p in root.rglob("*.py") if (lines := without_dtype(p.read_text()))}
    assert found == {}
    assert without_dtype("x = torch.ones(3)\ny = torch.ones(3, dtype=d)") == [1]
