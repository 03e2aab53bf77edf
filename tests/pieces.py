"""Tokenizers like those of SentencePiece, and one of bytes, built in code."""

from typing import Literal

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

SPACE = "\u2581"
SPECIAL = ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>")
WORDS = "The capital of France is Paris London New York Jersey Yes No was a to".split()
VOCAB = 400
"""Ids of a model beside these tokenizers, more than the tokenizers have."""

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""Its prompt ends in a newline."""

LLAMA_2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
"""An answer begins with a space, as Llama 2 and the first Mistrals have it."""

Kind = Literal["first", "always", "prepend"]


def sentencepiece(
    kind: Kind = "first", *, ends: str = "", template: str = TEMPLATE, begins: str = "<s>"
) -> PreTrainedTokenizerFast:
    """A tokenizer of words with a space before them, of words without, of letters and of bytes.

    Args:
        kind: which texts get a space in front: the first of a text, each one behind a special
            token, or by a normalizer, as in older files.
        ends: "</s>" where a text is to end with it.
        begins: the token before a text; "" for none.
    """
    pieces = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), SPACE]
    pieces += [*WORDS, *(SPACE + word for word in (*WORDS, "?"))]
    letters = sorted({letter for word in WORDS for letter in word} | set(".?:[]/'"))
    pieces += [letter for letter in letters if letter not in pieces]
    assert len(set(pieces)) == len(pieces) < VOCAB
    # Each piece costs the same, so that a text is cut into as few as there can be.
    backend = Tokenizer(
        models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True)
    )
    if kind == "prepend":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=kind, split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens([AddedToken(one, special=True) for one in SPECIAL])
    around = f"{begins} $A {ends}".strip()
    backend.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.pad_token = "</s>"
    fast.chat_template = template
    return fast


def byte_level() -> PreTrainedTokenizerFast:
    """A tokenizer of the 256 bytes and of words, as GPT-2's is one."""
    names = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    # Rome is a token only with its space. The letter U+4E2D is a token; of its neighbours, and of
    # Devanagari letters, the first two of three bytes are one.
    own = ("\u0120Rome", "\u00e4\u00b8\u0143", "\u00e0\u00a4")
    for word in (*sorted(WORDS, key=len, reverse=True), *own):
        for i in range(1, len(word)):
            if word[: i + 1] not in names:
                names.append(word[: i + 1])
                merges.append((word[:i], word[i]))
    for word in (*WORDS, own[1][:2]):
        names.append(f"\u0120{word}")
        merges.append(("\u0120", word))
    assert len(names) < VOCAB
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
