"""What is kept of the first observation stays what it was."""

import torch

from tests.instruments.common import PROBES, encoded
from tlens_callback.instruments.parts.baseline import first_value, probes_suffix
from tlens_callback.instruments.parts.selection import tokens_after_first


def test_what_is_kept_is_a_copy_of_its_own():
    baseline: dict[str, torch.Tensor] = {}
    many = torch.arange(12.0).reshape(3, 4)
    assert torch.equal(first_value(baseline, "row", many[1]), many[1])
    kept = baseline["row"]
    assert kept.untyped_storage().nbytes() == kept.nbytes
    many += 1
    assert first_value(baseline, "row", many[1]).tolist() == [4, 5, 6, 7]
    assert first_value(baseline, "other", many[1]).tolist() == [5, 6, 7, 8]


def test_a_choice_of_probes_has_a_name_of_its_own():
    batch = encoded()
    chosen = ([0], [3], [0, 3], [3, 0])
    assert len({probes_suffix(batch, rows) for rows in chosen}) == len(chosen)


def test_tokens_after_the_first():
    batch = encoded()
    rows = [3, 0]
    places = tokens_after_first(batch, rows)
    expected = [(i, t) for i in rows for t in range(1, batch.lengths[i])]
    assert [divmod(place, batch.tokens.shape[1]) for place in places] == expected
    assert max(batch.lengths[i] for i in range(len(PROBES))) > batch.lengths[0]  # padding to skip
    assert len(tokens_after_first(batch, [])) == 0
