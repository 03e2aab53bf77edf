"""Probes beside a processor of images and texts: text alone, in its own chat template."""

import pytest
from PIL import Image

from tests import tiny, tiny_vision
from tlens_callback import Probe, ProbeBatch
from tlens_callback.probes.builtin import first_rows, training_rows
from tlens_callback.probes.encoding import own_tokenizer
from tlens_callback.probes.file import read_probes

CHAT = [{"role": "user", "content": "what is the capital of Italy"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": CHAT[0]["content"]}]}]
ANSWER = {"role": "assistant", "content": "the capital is"}


def encode(*probes: Probe, **given) -> ProbeBatch:
    return ProbeBatch.encode(
        probes, tiny_vision.processor(), vocab_size=tiny.VOCAB, context=tiny.CONTEXT, **given
    )


def by_the_processor(messages, **how) -> list[int]:
    processor = tiny_vision.processor()
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, **how)[
        "input_ids"
    ][0]


def test_a_chat_is_written_by_the_template_of_the_processor():
    """Which takes the content as a list of parts, and writes nothing of a string."""
    batch = encode(
        Probe("string", CHAT, target=" Rome"),
        Probe("parts", PARTS, target=" Rome"),
        Probe("begun", [*CHAT, ANSWER], target=" Rome"),
    )
    theirs = by_the_processor(PARTS, add_generation_prompt=True)
    for row in batch.tokens[:2].tolist():
        assert row[: len(theirs)] == theirs
    assert batch.lengths[:2] == (len(theirs),) * 2 and " capital" in batch.labels[0]
    assert batch.labels[2][-2:] == (" capital", " is")
    (rome,) = tiny.tokenizer()(" Rome", add_special_tokens=False)["input_ids"]
    assert batch.target_tokens == ((rome,),) * 3


def test_the_processor_stays_as_it_was():
    processor = tiny_vision.processor()
    own = own_tokenizer(processor)
    assert own.chat_template == processor.chat_template
    assert processor.tokenizer.chat_template is None and own is not processor.tokenizer


def test_a_template_that_takes_strings_gets_strings():
    tokenizer = tiny.tokenizer()
    want = tokenizer.apply_chat_template(CHAT, tokenize=True, add_generation_prompt=True)
    batch = ProbeBatch.encode([Probe("chat", CHAT)], tokenizer, vocab_size=tiny.VOCAB)
    assert batch.tokens[0].tolist() == want["input_ids"]


@pytest.mark.parametrize("kind", ["image", "image_url", "video", "audio"])
def test_a_part_that_is_no_text_is_refused_by_name(kind):
    content = [{"type": kind}, {"type": "text", "text": "what is this"}]
    with pytest.raises(ValueError, match=rf"Probe 'seen' has a part of type '{kind}' in its mess"):
        Probe("seen", [{"role": "user", "content": content}])


def test_in_a_file_too(tmp_path):
    file = tmp_path / "probes.yaml"
    file.write_text("- name: seen\n  chat:\n  - {role: user, content: [{type: image}]}\n")
    with pytest.raises(ValueError, match="content of a message must be a string"):
        read_probes(file)


def test_a_token_in_the_place_of_an_image_is_refused_and_never_drawn():
    image = tiny_vision.processor().image_token
    for content in (f"{image} the cat", [1, tiny_vision.IMAGE, 20]):
        with pytest.raises(ValueError, match=r"Probe 'seen' has the token .* text alone"):
            encode(Probe("seen", content), placeholders=frozenset({tiny_vision.IMAGE}))
    without = set(range(20, tiny.VOCAB))
    block = Probe.repeated("block", block=8, times=2)
    batch = ProbeBatch.encode([block], vocab_size=tiny.VOCAB, placeholders=frozenset(without))
    assert without.isdisjoint(batch.tokens[0].tolist())
    other = Probe("seen", [1, 20])
    with pytest.raises(ValueError, match="Probe 'seen' has the token"):
        batch.beside([other])


class Rows(list):
    """A data set, and what holds it."""

    @property
    def dataset(self):
        return self


def test_a_row_with_an_image_is_no_text():
    image = Image.new("RGB", (4, 4))
    rows = Rows(
        [
            {"messages": CHAT, "images": [image]},
            {"messages": CHAT, "images": []},
            {"input_ids": [1, 20, 21], "pixel_values": [[0.0]]},
            {"input_ids": [1, 22, 23], "pixel_values": None},
        ]
    )
    processor = tiny_vision.processor()
    probes = first_rows(rows, processor, context=tiny.CONTEXT, rows=4)
    assert [probe.name for probe in probes] == ["train-1", "train-3"]
    assert list(probes[0].content) == by_the_processor(PARTS, add_generation_prompt=True)
    given = training_rows(rows, processor)(4)
    assert sorted(map(len, given)) == sorted([len(probes[0].content), 3])
