"""Different tokens have different names, with their spaces, and bytes are named as bytes."""

import pytest

from tests import pieces, tiny
from tlens_callback import Probe, ProbeBatch
from tlens_callback.probes import own_tokenizer
from tlens_callback.probes.names import token_name

KINDS = ["first", "always", "prepend"]


def labels(tokenizer, text):
    batch = ProbeBatch.encode([Probe("p", text)], tokenizer, vocab_size=pieces.VOCAB)
    return list(batch.labels[0])


@pytest.mark.parametrize("kind", KINDS)
def test_labels_keep_their_leading_space(kind):
    tokenizer = pieces.sentencepiece(kind)
    assert labels(tokenizer, "The capital: Paris\n") == [
        *("<s>", " The", " capital", ":", " Paris", "\n"),
    ]
    own = own_tokenizer(tokenizer)
    of = {name: token_name(own, tokenizer.convert_tokens_to_ids(name)) for name in pieces.WORDS}
    assert of == {word: word for word in pieces.WORDS}


def test_the_space_before_a_sign_is_kept():
    tokenizer = pieces.sentencepiece()
    tokenizer.clean_up_tokenization_spaces = True
    assert tokenizer.decode(tokenizer("is ?")["input_ids"]) == "<s> is?", "decoding takes it away"
    assert labels(tokenizer, "is ?") == ["<s>", " is", " ?"]
    assert tokenizer.clean_up_tokenization_spaces is True


@pytest.mark.parametrize("make", [*KINDS, "bytes", "tiny"])
def test_every_token_has_a_name_of_its_own(make):
    if make == "tiny":
        tokenizer = tiny.tokenizer()
    else:
        tokenizer = pieces.byte_level() if make == "bytes" else pieces.sentencepiece(make)
    own = own_tokenizer(tokenizer)
    names = [token_name(own, i) for i in range(len(tokenizer) + 20)]
    assert len(set(names)) == len(names) and all(names)
    assert names[-1] == f"<unused {len(tokenizer) + 19}>"


def test_ids_beyond_the_tokenizer_are_no_none():
    tokenizer = tiny.tokenizer()
    probe = Probe("p", [5, 120, 121], target=122)
    batch = ProbeBatch.encode([probe], tokenizer, vocab_size=128)
    assert batch.labels[0][1:] == ("<unused 120>", "<unused 121>")
    assert batch.token_text(122) == "<unused 122>"


class Raises:
    """A tokenizer that raises for an id that it does not have, as those of Python do."""

    def decode(self, ids):
        return "".join(["the", " cat"][i] for i in ids)

    def convert_ids_to_tokens(self, token):
        return ["the", " cat"][token]

    def __call__(self, text, **_):
        return {"input_ids": [0]}


def test_a_tokenizer_that_raises_for_an_id():
    assert [token_name(Raises(), i) for i in range(3)] == ["the", " cat", "<unused 2>"]


CHINESE, HINDI, PARROT = "\u4e01", "\u0928\u092e", "\U0001f99c"


@pytest.mark.parametrize("text", [CHINESE, HINDI, PARROT, "\u4e2d" + CHINESE])
def test_a_part_of_a_character_tells_its_bytes(text):
    for tokenizer in (pieces.byte_level(), pieces.sentencepiece(begins="")):
        got = "".join(labels(tokenizer, text)).lstrip(" ")
        whole = got.replace("\u4e2d", "<0xE4><0xB8><0xAD>")
        assert whole == "".join(f"<0x{byte:02X}>" for byte in text.encode())


def test_two_bytes_of_a_character_are_one_token_of_two_bytes():
    assert labels(pieces.byte_level(), CHINESE) == ["<0xE4><0xB8>", "<0x81>"]
