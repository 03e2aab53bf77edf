"""transformers' MistralCommonBackend, which has another thing as its member `tokenizer`."""

from pathlib import Path
from typing import Any

import pytest
from transformers import ProcessorMixin

from tests import pieces, tiny, training
from tlens_callback import CopyingScores, MemorySink, Probe, ProbeBatch, TargetScores, TLensCallback
from tlens_callback.probes import own_tokenizer, special_ids

CAPITAL = "The capital of France is"
CHAT = [{"role": "user", "content": "is Paris the capital of France?"}]


class Backend:
    """A tokenizer with the members of MistralCommonBackend that differ from others'."""

    chat_template = None

    def __init__(self):
        self._of = pieces.sentencepiece(template=pieces.LLAMA_2)
        self.tokenizer = object()

    def __call__(self, text, add_special_tokens=True):
        return self._of(text, add_special_tokens=add_special_tokens)

    def __len__(self):
        return len(self._of)

    def __getattr__(self, name):
        if name.startswith("_") or name not in ("decode", "convert_ids_to_tokens", "bos_token_id"):
            raise AttributeError(name)
        return getattr(self._of, name)

    @property
    def all_special_ids(self):
        return self._of.all_special_ids

    def added_tokens_decoder(self):
        raise NotImplementedError

    def apply_chat_template(self, messages, **options):
        if messages[-1]["role"] == "nobody":
            raise RuntimeError("Unknown role")
        return self._of.apply_chat_template(messages, **options)


@pytest.fixture(params=["stand-in", "spm", "tekken"])
def tokenizer(request) -> Any:
    if request.param == "stand-in":
        return Backend()
    common = pytest.importorskip("mistral_common")
    from transformers.tokenization_mistral_common import MistralCommonBackend

    file = {"spm": "mistral_instruct_tokenizer_240323.model.v3", "tekken": "tekken_240911.json"}
    return MistralCommonBackend(str(Path(common.__file__).parent / "data" / file[request.param]))


def test_probes_are_encoded_as_it_does_it(tokenizer):
    open_chat = [*CHAT, {"role": "assistant", "content": "The capital is"}]
    probes = [
        Probe("text", CAPITAL, target=" Paris", foil=" London"),
        Probe("chat", CHAT, target="Paris"),
        Probe("open", open_chat, target=" Paris"),
        Probe.repeated("block", block=4),
    ]
    batch = ProbeBatch.encode(probes, tokenizer, vocab_size=len(tokenizer))
    rows = [row[mask].tolist() for row, mask in zip(batch.tokens, batch.mask, strict=True)]
    assert rows[0] == tokenizer(CAPITAL)["input_ids"]
    ends = {1: CHAT, 2: open_chat}
    for i, messages in ends.items():
        want = tokenizer.apply_chat_template(
            messages, continue_final_message=i == 2, tokenize=True, return_dict=True
        )
        assert rows[i] == list(want["input_ids"])
        # What a whole conversation has there.
        answer = messages[len(CHAT) :] or [{"role": "assistant", "content": ""}]
        answered = [
            *CHAT,
            {**answer[0], "content": answer[0]["content"] + ("", "Paris", " Paris")[i]},
        ]
        whole = tokenizer.apply_chat_template(
            answered, continue_final_message=True, tokenize=True, return_dict=True
        )["input_ids"]
        assert list(whole)[: len(rows[i]) + 1] == [*rows[i], batch.targets[i]]
    assert not {*rows[3][1:]} & set(tokenizer.all_special_ids)
    assert [name.strip(" ") for name in batch.labels[0][1:]] == CAPITAL.split()
    assert batch.token_text(batch.targets[0]) == " Paris"


def test_what_it_refuses_names_the_probe(tokenizer):
    asks = Probe("asks", [*CHAT, {"role": "nobody", "content": "is"}])
    with pytest.raises(ValueError, match="Probe 'asks': the tokenizer's chat template refuses"):
        ProbeBatch.encode([asks], tokenizer, vocab_size=len(tokenizer))


def test_bytes_of_its_tokens_are_told(tokenizer):
    parrot = "\U0001f99c"
    batch = ProbeBatch.encode([Probe("p", parrot)], tokenizer, vocab_size=len(tokenizer))
    assert "".join(batch.labels[0][1:]).strip(" ") == "<0xF0><0x9F><0xA6><0x9C>"


def test_it_is_no_processor_and_a_processor_is_no_tokenizer():
    backend = Backend()
    assert type(own_tokenizer(backend)) is Backend
    assert special_ids(backend) == set(backend.all_special_ids)
    assert not hasattr(ProcessorMixin, "convert_ids_to_tokens")
    processor = type("Processor", (), {"tokenizer": tiny.tokenizer()})()
    assert len(own_tokenizer(processor)) == tiny.VOCAB


def test_a_run_with_it_begins_and_ends(tmp_path):
    memory = MemorySink()
    probes = [Probe("text", CAPITAL, target=" Paris"), Probe("chat", CHAT, target="No")]
    callback = TLensCallback(
        probes, instruments=[TargetScores(), CopyingScores()], sinks=[memory], on_error="raise"
    )
    model = tiny.model("llama", vocab_size=pieces.VOCAB)
    run = training.trainer(tmp_path, callback, model, max_steps=1)
    run.callback_handler.processing_class = Backend()
    run.train()
    assert 0 < memory.readings["target_scores/probability/chat"][0].values < 1
