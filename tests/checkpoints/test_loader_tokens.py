"""Tokens that a run added, and the tokenizer that goes with a saved model."""

import logging

import pytest
import torch

from tests import tiny
from tests.adapters import logits
from tests.checkpoints.test_loader import adapt, loaded, refused, write
from tlens_callback.checkpoints import Checkpoint, Loader

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to .True.")
def test_tokens_that_were_added(tmp_path, tied):
    """As many rows as were saved, which may be more than there are tokens."""
    base = write(tmp_path / "base", tie_word_embeddings=tied)
    live = adapt(base, tmp_path / "adapter", vocab=tiny.VOCAB + 8)
    model = loaded(tmp_path / "adapter")
    assert model.get_input_embeddings().weight.shape[0] == tiny.VOCAB + 8
    assert torch.equal(logits(model), logits(live))
    assert logits(model).shape[-1] == tiny.VOCAB + 8
    # Before training, too, the new rows were what the run had begun with: it did not train them.
    loader = Loader(device="cpu")
    first = loader.untrained(Checkpoint.of(tmp_path / "adapter"))
    assert first is not None
    with live.disable_adapter():
        assert torch.equal(logits(loader.load(first)), logits(live))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [tiny.VOCAB, tiny.VOCAB + 1]},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.filterwarnings("ignore")
def test_tokens_that_were_added_and_trained(tmp_path, tied, settings):
    """Exactly, or not at all where PEFT has not saved the rows of the other embedding."""
    base = write(tmp_path / "base", tie_word_embeddings=tied)
    live = adapt(base, tmp_path / "adapter", vocab=tiny.VOCAB + 2, **settings)
    if "target_modules" in settings and not tied:
        assert "rows of lm_head.weight were not saved" in refused(tmp_path / "adapter")
    else:
        assert torch.equal(logits(loaded(tmp_path / "adapter")), logits(live))


@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to .True.")
def test_rows_of_new_tokens_that_were_trained_have_no_known_start(tmp_path, caplog):
    base = write(tmp_path / "base")
    live = adapt(
        base, tmp_path / "a", vocab=tiny.VOCAB + 3, modules_to_save=["embed_tokens", "lm_head"]
    )
    assert torch.equal(logits(loaded(tmp_path / "a")), logits(live))
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        assert Loader(device="cpu").untrained(Checkpoint.of(tmp_path / "a")) is None
    assert "embeddings of new tokens were trained" in caplog.text


def test_the_tokenizer_of_the_adapter_or_else_of_the_model(tmp_path):
    base = write(tmp_path / "base", "gpt2")
    adapt(base, tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True)
    loader, checkpoint = Loader(device="cpu"), Checkpoint.of(tmp_path / "adapter")
    # transformers would build one from the config, without a single word.
    assert loader.tokenizer(checkpoint) is None
    words = tiny.tokenizer()
    words.save_pretrained(base)
    assert loader.tokenizer(checkpoint)("yes the cat").input_ids == words("yes the cat").input_ids
    words.add_tokens(["brand-new"])
    words.save_pretrained(tmp_path / "adapter")
    assert len(loader.tokenizer(checkpoint)) == tiny.VOCAB + 1
    assert len(loader.tokenizer(checkpoint, str(base))) == tiny.VOCAB
    with pytest.raises(ValueError, match="no tokenizer in"):
        loader.tokenizer(checkpoint, str(tmp_path))
    with pytest.raises(ValueError, match=r"no directory '.*nowhere'"):
        loader.tokenizer(checkpoint, str(tmp_path / "nowhere"))


def test_a_broken_tokenizer_is_not_passed_over(tmp_path):
    base = write(tmp_path / "base")
    tiny.tokenizer().save_pretrained(base)
    loader, checkpoint = Loader(device="cpu"), Checkpoint.of(base)
    whole = (base / "tokenizer.json").read_text()
    (base / "tokenizer.json").write_text(whole[:500])
    with pytest.raises(ValueError, match=f"tokenizer in '{base}' cannot be loaded"):
        loader.tokenizer(checkpoint)
    (base / "tokenizer.json").unlink()
    with pytest.raises(
        ValueError, match=r"tokenizer_config\.json exists, but the tokenizer has no vocabulary"
    ):
        loader.tokenizer(checkpoint)
    (base / "tokenizer_config.json").unlink()
    assert loader.tokenizer(checkpoint) is None
