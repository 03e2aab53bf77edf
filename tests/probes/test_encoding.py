"""A probe is encoded as the trainer's rows are, and ends where its text ends."""

import pytest

from tests import pieces, tiny, training
from tlens_callback import MemorySink, Probe, ProbeBatch, TargetScores, TLensCallback, TokenLoss
from tlens_callback.probes.builtin import training_rows

CAPITAL = "The capital of France is"
CHAT = [{"role": "user", "content": "is Paris the capital of France?"}]


class Loader:
    def __init__(self, rows):
        self.dataset = rows


def names(tokenizer, probe, rows=None):
    """The probe's tokens, by their names in the vocabulary."""
    training = rows and training_rows(Loader(rows), tokenizer)
    batch = ProbeBatch.encode([probe], tokenizer, vocab_size=pieces.VOCAB, training=training)
    return tokenizer.convert_ids_to_tokens(batch.tokens[0].tolist())


def spaced(*words):
    return [pieces.SPACE + word for word in words]


@pytest.mark.parametrize("kind", ["first", "always", "prepend"])
def test_a_probe_ends_where_its_text_ends(kind):
    words = spaced(*CAPITAL.split())
    ending = pieces.sentencepiece(kind, ends="</s>")
    assert ending.convert_ids_to_tokens(ending(CAPITAL)["input_ids"])[-1] == "</s>"
    assert names(ending, Probe("p", CAPITAL)) == ["<s>", *words]
    bare = pieces.sentencepiece(kind, begins="", ends="</s>")
    assert names(bare, Probe("p", CAPITAL)) == words
    # An end that the text itself has stays, and what stands in ids is not touched.
    assert names(ending, Probe("p", CAPITAL + "</s>")) == ["<s>", *words, "</s>"]
    ids = ending(CAPITAL)["input_ids"]
    assert names(ending, Probe("p", ids)) == ["<s>", *words, "</s>"]


def test_the_target_is_that_behind_the_text_and_not_behind_the_end():
    tokenizer = pieces.sentencepiece(ends="</s>")
    batch = ProbeBatch.encode(
        [Probe("p", CAPITAL, target=" Paris")], tokenizer, vocab_size=pieces.VOCAB
    )
    assert tokenizer.convert_ids_to_tokens(batch.targets[0]) == pieces.SPACE + "Paris"


@pytest.mark.parametrize("ends", ["", "</s>"])
def test_a_text_begins_as_the_trainers_rows_do(ends):
    words = spaced(*CAPITAL.split())
    usual = pieces.sentencepiece(ends=ends)
    without = pieces.sentencepiece(begins="", ends=ends)
    rows = {
        "with": [{"input_ids": usual(text)["input_ids"]} for text in (CAPITAL, "Paris is")],
        "without": [{"input_ids": without(text)["input_ids"]} for text in (CAPITAL, "Paris is")],
    }
    usual.chat_template = without.chat_template = None
    for tokenizer in (usual, without):
        assert names(tokenizer, Probe("p", CAPITAL), rows["with"]) == ["<s>", *words]
        assert names(tokenizer, Probe("p", CAPITAL), rows["without"]) == words
    # Rows of a long stream may begin anywhere.
    packed = [{"input_ids": [*row["input_ids"][1:], 1, 300]} for row in rows["with"]]
    assert names(usual, Probe("p", CAPITAL), packed) == ["<s>", *words]
    # Text that is not encoded yet is encoded by the tokenizer.
    assert names(without, Probe("p", CAPITAL), [{"text": CAPITAL}]) == words


def test_rows_of_chats_do_not_say_how_a_text_begins():
    """Where a chat template begins with the BOS token and the tokenizer adds none to a text."""
    tokenizer = pieces.sentencepiece(begins="")
    chat = tokenizer.apply_chat_template(CHAT)["input_ids"]
    assert chat[0] == tokenizer.bos_token_id
    got = names(tokenizer, Probe("p", CAPITAL), [{"input_ids": chat}] * 3)
    assert got == spaced(*CAPITAL.split())


def watched(folder, tokenizer, probes, rows=None):
    memory = MemorySink()
    callback = TLensCallback(
        probes, instruments=[TokenLoss(), TargetScores()], sinks=[memory], watch=False
    )
    model = tiny.model("llama", vocab_size=pieces.VOCAB)
    trainer = training.trainer(folder, callback, model, processing_class=tokenizer, max_steps=1)
    if rows:
        trainer.train_dataset = rows
    trainer.train()
    return memory


def test_the_first_lines_of_a_run_show_each_probe_as_it_was_encoded(tmp_path, capsys):
    tokenizer = pieces.sentencepiece(ends="</s>")
    ids = tokenizer("The capital of New York is to the</s>")["input_ids"]
    probes = [
        Probe("capital", CAPITAL, target=" Paris", foil=" New York"),
        Probe("chat", CHAT, target="No"),
        Probe("long", CAPITAL + " Paris" * 30),
    ]
    watched(tmp_path, tokenizer, probes, [{"input_ids": ids[1:], "labels": ids[1:]}] * 8)
    said = capsys.readouterr().out
    assert (
        "tlens: capital is 5 tokens, ' The' ' capital' ' of' ' France' ' is'; its target is "
        "' Paris', its foil ' New' ' York'\n"
    ) in said
    assert "; its target is 'No'\n" in said and "' Paris' ' Paris'\n" in said
    assert "tlens: long is 35 tokens, ' The' ' capital' ' of' ' France' ... ' Paris'" in said
    assert "the training rows do not begin with '<s>', so the texts do not either" in said
    watched(tmp_path, tokenizer, probes[:1], [{"input_ids": ids, "labels": ids}] * 8)
    said = capsys.readouterr().out
    assert "capital is 6 tokens, '<s>' ' The'" in said and "training rows" not in said
    adds_none = pieces.sentencepiece(begins="")
    adds_none.chat_template = None
    many = [Probe(f"p{i}", CAPITAL, target=" Paris") for i in range(10)]
    watched(tmp_path, adds_none, many, [{"input_ids": ids, "labels": ids}] * 8)
    said = capsys.readouterr().out
    assert "p7 is 6 tokens, '<s>' ' The'" in said and "p8 is" not in said
    assert "tlens: and 2 more probes\n" in said
    assert "the training rows begin with '<s>', so the texts do too" in said
