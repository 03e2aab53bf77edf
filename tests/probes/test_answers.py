"""Target and foil are the tokens that training writes behind the probe, whatever the tokenizer."""

import pytest
from datasets import Dataset

from tests import pieces, tiny, training
from tlens_callback import MemorySink, Probe, ProbeBatch, TargetScores, TLensCallback

KINDS = ["first", "always", "prepend"]
CAPITAL = "The capital of France is"
CHAT = [{"role": "user", "content": "is Paris the capital of France?"}]


def trained(folder, tokenizer, row, probe, **settings):
    """key -> the number at step 0 and at the last, of a model that learns one row."""
    memory = MemorySink()
    callback = TLensCallback(
        [probe],
        instruments=[TargetScores()],
        sinks=[memory],
        every_n_steps=100,
        repeats=False,
        watch=False,
    )
    trainer = training.trainer(
        folder,
        callback,
        tiny.model("llama", vocab_size=pieces.VOCAB),
        processing_class=tokenizer,
        max_steps=20,
        per_device_train_batch_size=1,
        **settings,
    )
    trainer.train_dataset = Dataset.from_list([{"input_ids": row, "labels": row}] * 4)
    trainer.train()
    return {
        key: [float(at[step].values) for step in (memory.steps[0], memory.steps[-1])]
        for key, at in memory.readings.items()
        if key.startswith("target_scores")
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_of_a_chat_is_the_token_that_is_trained(tmp_path, kind):
    tokenizer = pieces.sentencepiece(kind)
    conversation = [*CHAT, {"role": "assistant", "content": "No"}]
    text = tokenizer.apply_chat_template(conversation, tokenize=False)
    row = tokenizer(text, add_special_tokens=False)["input_ids"]
    got = trained(tmp_path, tokenizer, row, Probe("chat", CHAT, target="No"))
    before, after = got["target_scores/probability/chat"]
    assert before < 0.1 and after > 0.9


def target(tokenizer, content, text):
    """The target's tokens, by their names in the vocabulary."""
    probe = Probe("p", content, target=text)
    batch = ProbeBatch.encode([probe], tokenizer, vocab_size=pieces.VOCAB)
    return tokenizer.convert_ids_to_tokens(batch.targets[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_rule_about_spaces_holds_for_sentencepiece(kind, caplog):
    tokenizer = pieces.sentencepiece(kind)
    assert target(tokenizer, CAPITAL, " Paris") == pieces.SPACE + "Paris"
    assert target(tokenizer, CHAT, "No") == "No"
    ids = tokenizer(CAPITAL)["input_ids"]
    assert target(tokenizer, ids, " Paris") == pieces.SPACE + "Paris"
    assert target(tokenizer, ids, "Paris") == "Paris"
    assert caplog.text == ""
    assert target(tokenizer, CAPITAL, "Paris") == "Paris"
    assert "the model is likelier to write ' Paris'" in caplog.text


def test_the_rule_about_spaces_holds_for_bytes(caplog):
    tokenizer = pieces.byte_level()
    tokenizer.chat_template = pieces.TEMPLATE
    assert target(tokenizer, CAPITAL, " Paris") == "\u0120Paris"
    assert target(tokenizer, CHAT, "No") == "No"
    assert target(tokenizer, tokenizer(CAPITAL)["input_ids"], " Paris") == "\u0120Paris"
    assert caplog.text == ""
    assert target(tokenizer, CAPITAL, "Paris") == "Paris"
    assert "the model is likelier to write ' Paris'" in caplog.text


@pytest.mark.parametrize("make", [pieces.byte_level, pieces.sentencepiece])
def test_a_prompt_that_ends_in_the_targets_space_is_told_so(make, caplog):
    """Of a whole text, the space is a part of the word's token."""
    tokenizer = make()
    assert target(tokenizer, CAPITAL + " ", "Paris") == "Paris"
    assert "end the text before ' ' and give target=' Paris'" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_the_space_that_a_template_writes_before_an_answer_is_said(kind, caplog):
    tokenizer = pieces.sentencepiece(kind, template=pieces.LLAMA_2)
    target(tokenizer, CHAT, "No")
    assert "begins the answer of probe 'p' with ' No', not with the target 'No'" in caplog.text
    assert "target=' No' is what is trained" in caplog.text
    caplog.clear()
    spaced = target(tokenizer, CHAT, " No")
    conversation = [*CHAT, {"role": "assistant", "content": "No"}]
    row = tokenizer(
        tokenizer.apply_chat_template(conversation, tokenize=False), add_special_tokens=False
    )["input_ids"]
    assert spaced == pieces.SPACE + "No" and spaced in tokenizer.convert_ids_to_tokens(row)
    assert caplog.text == ""


def test_a_space_that_no_template_writes_is_said(caplog):
    target(pieces.sentencepiece(), CHAT, " No")
    assert "target='No' is what is trained" in caplog.text


def test_what_a_template_puts_before_each_answer_is_said(caplog):
    thinks = "('<t>' if message['role'] == 'assistant' else '') + message['content'] }}"
    thinking = pieces.TEMPLATE.replace("message['content'] }}", thinks)
    tokenizer = pieces.sentencepiece(template=thinking)
    assert target(tokenizer, CHAT, "No") == "No"
    assert "with '<t>No', not with the target 'No'; give the prompt as text" in caplog.text


def test_an_answer_that_has_begun_is_continued_with_a_space(caplog):
    tokenizer = pieces.sentencepiece()
    begun = [*CHAT, {"role": "assistant", "content": "The capital of France is"}]
    assert target(tokenizer, begun, " Paris") == pieces.SPACE + "Paris"
    assert caplog.text == ""
    assert target(tokenizer, begun, "Paris") == "Paris"
    assert "has no leading space" in caplog.text


def test_a_target_behind_a_line_or_a_letter_of_another_script_needs_no_space(caplog):
    """Where words have no space before them, none is asked for."""
    tokenizer = pieces.byte_level()
    target(tokenizer, CAPITAL + "\n", "Paris")
    target(tokenizer, "\u4e01\u4e02", "\u4e2d")
    assert caplog.text == ""
    # Of as many tokens with a space as without one.
    assert len(tokenizer.tokenize("\u4e01")) == len(tokenizer.tokenize(" \u4e01")) == 2
    target(tokenizer, "\u4e02", "\u4e01")
    assert "space" not in caplog.text and "is 2 tokens" in caplog.text


def test_a_word_that_is_one_token_only_with_its_space_is_told_so(caplog):
    tokenizer = pieces.byte_level()
    probes = [Probe("p", CAPITAL, target="Rome"), Probe("q", CAPITAL, target=" Rome")]
    batch = ProbeBatch.encode(probes, tokenizer, vocab_size=pieces.VOCAB)
    assert list(map(len, batch.target_tokens)) == [4, 1]
    assert "target 'Rome' of probe 'p' has no leading space" in caplog.text
    assert "'q'" not in caplog.text
