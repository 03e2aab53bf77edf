"""Probes are encoded as the tokenizer does it, and leave the tokenizer as it was."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from tests import tiny
from tlens_callback import Probe, ProbeBatch
from tlens_callback.probes.builtin import first_rows, repeated_blocks

CHAT = [{"role": "user", "content": "the capital of France is"}]


def encode(*probes, tokenizer="default", **kwargs):
    tokenizer = tiny.tokenizer() if tokenizer == "default" else tokenizer
    return ProbeBatch.encode(probes, tokenizer, vocab_size=tiny.VOCAB, **kwargs)


def test_text_chat_and_ids_are_what_the_tokenizer_says():
    tokenizer = tiny.tokenizer()
    batch = encode(Probe("text", "the cat sat"), Probe("chat", CHAT), Probe("ids", [9, 8, 7]))
    chat = tokenizer.apply_chat_template(
        CHAT, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    want = [tokenizer("the cat sat")["input_ids"], chat["input_ids"], [9, 8, 7]]
    for row, mask, ids in zip(batch.tokens, batch.mask, want, strict=True):
        assert row[mask].tolist() == ids and mask[: len(ids)].all() and not mask[len(ids) :].any()
    assert batch.lengths == tuple(map(len, want))
    assert batch.last.tolist() == [len(ids) - 1 for ids in want]


def test_a_chat_that_ends_with_the_assistant_is_continued():
    tokenizer = tiny.tokenizer()
    messages = [*CHAT, {"role": "assistant", "content": "Paris"}]
    batch = encode(Probe("chat", messages))
    want = tokenizer.apply_chat_template(
        messages, continue_final_message=True, tokenize=True, return_dict=True
    )
    assert batch.tokens[0].tolist() == want["input_ids"]


def test_labels_read_as_text_and_fragments_keep_their_names():
    batch = encode(Probe("text", "The cat sat"))
    assert "".join(batch.labels[0]).replace("<bos>", "").split() == ["The", "cat", "sat"]
    assert encode(Probe("ids", [9, 8]), tokenizer=None).labels == (("9", "8"),)


def test_ids_may_be_numpys_or_torchs():
    want = encode(Probe("ids", [9, 8, 7], target=5)).tokens
    for ids in (np.array([9, 8, 7]), list(np.array([9, 8, 7])), torch.tensor([9, 8, 7])):
        batch = encode(Probe("ids", ids, target=np.int64(5)))
        assert torch.equal(batch.tokens, want) and batch.targets == (5,)


def test_the_tokenizer_is_left_as_it_was():
    tokenizer = tiny.tokenizer()
    tokenizer(["the cat", "a"], padding="max_length", max_length=7, truncation=True)
    before = tokenizer.backend_tokenizer.to_str(), tokenizer.padding_side, len(tokenizer)
    encode(Probe("text", "the cat sat"), Probe("chat", CHAT, target="Paris"), tokenizer=tokenizer)
    assert before == (tokenizer.backend_tokenizer.to_str(), tokenizer.padding_side, len(tokenizer))
    tokenizer("the cat sat")
    assert before[0] != tokenizer.backend_tokenizer.to_str(), "an ordinary call does change it"


def test_repeated_blocks_repeat_distinct_ordinary_tokens():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    batch = encode(Probe.repeated("r", block=10, times=3), Probe.repeated("s", block=10, seed=1))
    assert torch.equal(state, torch.get_rng_state())
    row, other = batch.tokens[0].tolist(), batch.tokens[1].tolist()
    tokenizer = tiny.tokenizer()
    assert row[0] == tokenizer.bos_token_id and len(row) == 31
    assert row[1:11] == row[11:21] == row[21:31] and len(set(row[1:11])) == 10
    assert not set(row[1:]) & set(tokenizer.all_special_ids)
    assert other[1:11] != row[1:11]
    assert encode(Probe.repeated("r", block=10, times=3)).tokens[0].tolist() == row


@pytest.mark.parametrize("context", [13, 64, 2048, 2**31])
def test_built_in_blocks_have_three_lengths_and_fit(context):
    probes = repeated_blocks(context)
    assert len({probe.block for probe in probes}) == 3 and len(probes) == 12
    assert all(1 + probe.block * probe.times <= min(context, 49) for probe in probes)


def test_a_context_too_short_for_blocks_says_so():
    with pytest.raises(ValueError, match="too short for repeated blocks"):
        repeated_blocks(6)


def test_targets_and_foils_are_single_tokens():
    tokenizer = tiny.tokenizer()
    batch = encode(Probe("a", "the", target="Paris", foil=5), Probe("b", "the"))
    assert batch.targets == (tokenizer.convert_tokens_to_ids("Paris"), None)
    assert batch.foils == (5, None)


def test_a_target_without_its_space_is_said(caplog):
    encode(Probe("p", "the capital of France is", target="Paris", foil=" London"))
    assert "target 'Paris' of probe 'p' has no leading space" in caplog.text
    caplog.clear()
    encode(Probe("p", "the capital is", target=" Paris"), Probe("chat", CHAT, target="Paris"))
    assert caplog.text == ""


BAD = [
    (lambda: Probe("", "x"), "needs a name"),
    (lambda: Probe("a/b", "x"), "without '/'"),
    (lambda: Probe("p", "  "), "is empty"),
    (lambda: Probe("p", []), "is empty"),
    (lambda: Probe("p"), "is empty"),
    (lambda: Probe("p", "x", foil="y"), "a foil but no target"),
    (lambda: Probe(5, "x"), "needs a name"),
    (lambda: Probe("p", ["The", "cat"]), "text, chat messages"),
    (lambda: Probe("p", {"role": "user"}), "text, chat messages"),
    (lambda: Probe("p", None), "text, chat messages"),
    (lambda: Probe("p", torch.ones(2, 2)), "text, chat messages"),
    (lambda: Probe("p", "x", target=True), "a string or a token id"),
    (lambda: Probe("p", "x", target=1.5), "a string or a token id"),
    (lambda: Probe.repeated("p", block=1), "block >= 2"),
    (lambda: Probe.repeated("p", block=5, times=1), "times >= 2"),
    (lambda: encode(), "no probes"),
    (lambda: encode(Probe("p", "the"), Probe("p", "cat")), "Two probes are named 'p'"),
    (lambda: encode(Probe("p", "the"), tokenizer=None), "needs a tokenizer"),
    (lambda: encode(Probe("p", [1], target="x"), tokenizer=None), "Give the token id"),
    (lambda: encode(Probe("p", "the cat", target="")), "is 0 tokens"),
    (lambda: encode(Probe("p", [1], target=999)), "outside the model's vocabulary"),
    (lambda: encode(Probe("p", [1, 999])), "token id 999"),
    (
        lambda: encode(Probe("p", "the cat", target=" sat on mat"), context=4),
        "its target or foil 3",
    ),
    (lambda: encode(Probe("p", "the cat sat on the mat"), context=3), "context is 3"),
    (lambda: encode(Probe.repeated("p", block=95)), "a vocabulary of at least"),
]


@pytest.mark.parametrize("act, text", BAD)
def test_bad_probes_say_what_to_do(act, text):
    with pytest.raises(ValueError, match=text):
        act()


def test_chat_without_a_template_says_so():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        encode(Probe("chat", CHAT), tokenizer=tokenizer)


RAISES = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ message['content'] + '.' }}{% endfor %}"
)
WRITES = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
PARTS = [{"role": "user", "content": [{"type": "text", "text": "the cat"}]}]
SYSTEM = [{"role": "system", "content": "the cat"}]


@pytest.mark.parametrize(
    ("template", "messages", "text"),
    [
        (RAISES, SYSTEM, "Probe 'asks': .*refuses its messages .*System role not supported"),
        (RAISES, PARTS, "Probe 'asks': .*a list of parts, .*one string"),
        (WRITES, PARTS, "Probe 'asks': .*a list of parts, .*one string"),
        ("{% for", CHAT, "Probe 'asks': .*TemplateSyntaxError"),
        ({"tools": WRITES}, CHAT, "Probe 'asks': "),
    ],
)
def test_what_a_chat_template_does_not_take_names_the_probe(template, messages, text):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=text):
        encode(
            Probe("fine", "the cat"), Probe("asks", messages, target=" cat"), tokenizer=tokenizer
        )


def test_a_template_that_takes_parts_gets_them():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{% for part in message['content'] %}{{ part['text'] }}"
        "{% endfor %}{% endfor %}"
    )
    batch = encode(Probe("asks", PARTS), tokenizer=tokenizer)
    assert "".join(batch.labels[0]).split() == ["<unk>", "cat"]


class Augmented:
    """A data set that draws random numbers when it is read."""

    def __len__(self):
        return 5

    def __getitem__(self, i):
        return {"input_ids": torch.randint(8, 90, (60,))}


def test_first_rows_leave_the_loader_and_the_random_state_alone():
    state = torch.get_rng_state()
    probes = first_rows(DataLoader(Augmented()), None, context=64)
    assert [p.name for p in probes] == ["train-0", "train-1"]
    assert all(len(p.content) == 48 for p in probes)
    assert torch.equal(state, torch.get_rng_state())
    Augmented()[0]
    assert not torch.equal(state, torch.get_rng_state()), "reading a row does draw"


class Broken(Augmented):
    def __getitem__(self, i):
        raise NotImplementedError


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])

    def __len__(self):
        return 5


@pytest.mark.parametrize("dataset", [Broken(), Stream(), None])
def test_probes_that_nobody_asked_for_never_raise(dataset):
    loader = type("Loader", (), {"dataset": dataset})()
    assert first_rows(loader, tiny.tokenizer(), context=64) == []


@pytest.mark.parametrize(
    "row",
    [
        {"input_ids": [3, 3, 1, 20, 21, 3], "attention_mask": [0, 0, 1, 1, 1, 0]},
        {"input_ids": [1, 20, 21, 3, 3]},
        {"input_ids": [3, 3, 1, 20, 21]},
    ],
)
def test_padding_of_the_training_rows_is_left_out(row):
    loader = type("Loader", (), {"dataset": [row]})()
    (probe,) = first_rows(loader, tiny.tokenizer(), context=64)
    assert probe.content == (1, 20, 21)


@pytest.mark.parametrize(
    "ids, want", [([2, 5, 6, 2], (2, 5, 6, 2)), ([2, 2, 2, 5, 6, 2, 2, 2], (2, 5, 6, 2))]
)
def test_padding_that_is_also_the_end_of_a_text_keeps_the_end(ids, want):
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    loader = type("Loader", (), {"dataset": [{"input_ids": ids}]})()
    (probe,) = first_rows(loader, tokenizer, context=64)
    assert probe.content == want


def test_rows_of_preference_data_give_their_prompts():
    row = {"prompt_ids": [1, 20, 21], "chosen_ids": [22], "rejected_ids": [23]}
    (probe,) = first_rows(type("Loader", (), {"dataset": [row]})(), tiny.tokenizer(), context=64)
    assert probe.content == (1, 20, 21)


def test_a_probe_that_pads_the_others_by_far_is_named(caplog):
    short = [Probe(f"s{i}", [1, 2, 3]) for i in range(20)]
    encode(*short, Probe("long", [5] * 400))
    assert "'long' is 400 tokens long" in caplog.text
    caplog.clear()
    encode(*short, Probe("long", [5] * 10))
    assert caplog.text == ""


@pytest.mark.parametrize(
    "rows, want",
    [
        ([{"prompt": "the cat sat"}, {"text": "a dog"}], 2),
        ([{"prompt": CHAT}], 1),
        ([{"messages": [*CHAT, {"role": "assistant", "content": "Paris"}]}], 1),
        ([{"prompt": None, "messages": CHAT, "text": None}], 1),
        ([{"conversations": CHAT}], 1),
        ([{"conversations": [{"from": "human", "value": "the cat"}]}], 0),
        ([{"label": 3}, {"text": ""}], 0),
        ([(1, 2)], 0),
        (iter([]), 0),
    ],
)
def test_first_rows_take_what_makes_a_probe(rows, want):
    loader = type("Loader", (), {"dataset": rows})()
    assert len(first_rows(loader, tiny.tokenizer(), context=64)) == want


def test_a_target_may_be_several_tokens_and_that_is_said(caplog):
    tokenizer = tiny.tokenizer()
    batch = encode(Probe("p", "the cat", target=" sat on mat", foil=" sat"), context=5)
    want = tokenizer(" sat on mat", add_special_tokens=False)["input_ids"]
    assert batch.target_tokens == (tuple(want),) and batch.foil_tokens == ((want[0],),)
    assert batch.targets == (want[0],) == batch.foils
    assert "' sat on mat' of probe 'p' is 3 tokens, [' sat', ' on', ' mat']" in caplog.text
    assert "what needs one token uses the first" in caplog.text
    assert "begin with the same token, ' sat'" in caplog.text
    caplog.clear()
    encode(Probe("p", "the cat", target=" sat", foil=" sat"))
    assert caplog.text == ""


def test_what_depends_on_a_batch_is_made_once():
    """For each batch and each key; also a batch that is made from another has its own."""
    batch = encode(Probe("a", [9, 8, 7]), Probe("b", [6]))
    made: list[str] = []

    def make(what: str) -> list[str]:
        made.append(what)
        return [what]

    first = batch.once("key", lambda: make("first"))
    assert batch.once("key", lambda: make("second")) is first == ["first"]
    assert batch.once(("key", 1), lambda: make("other")) == ["other"]
    assert batch.once("nothing", lambda: None) is batch.once("nothing", lambda: make("no")) is None
    assert made == ["first", "other"]
    for beside in (
        batch.beside([Probe("c", [5, 4])]),
        dataclasses.replace(batch, training=lambda n: []),
        encode(Probe("a", [9, 8, 7])),
    ):
        assert beside.once("key", lambda: make("beside")) == ["beside"]
    assert batch.once("key", lambda: make("again")) is first
    assert "first" not in repr(batch)


def test_what_fails_to_be_made_is_made_again():
    batch = encode(Probe("a", [9, 8, 7]))
    with pytest.raises(ZeroDivisionError):
        batch.once("key", lambda: 1 // 0)
    assert batch.once("key", lambda: 2) == 2


def test_what_is_made_for_a_batch_may_ask_for_more():
    batch = encode(Probe("a", [9, 8, 7]), Probe("b", [6]))
    assert batch.once("sum", lambda: batch.last.sum() + batch.once("one", lambda: 1)) == 3
    assert batch.last is batch.last and batch.last.tolist() == [2, 0]
