"""A model made by hand, whose induction is the work of two heads together."""

from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel


def two_hops(vocab: int = 30, places: int = 40) -> GPT2LMHeadModel:
    """A model that repeats blocks without an induction head.

    The residual stream has parts: the token, what stood four before (`seen`), what stood three
    before (`following`), the answer, the place. Layer 0: head 0 looks four back and writes the
    token there into `seen`, head 1 three back, into `following`. Layer 1: head 0 looks where
    `seen` is its own token, three past the induction place, and copies `following` into the answer.
    """
    width = 4 * places
    assert width >= 4 * vocab + places
    config = GPT2Config(
        vocab_size=vocab,
        n_positions=places,
        n_embd=width,
        n_layer=2,
        n_head=4,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        model: Any = GPT2LMHeadModel(config).eval()
    token, seen, following, answer, place = 0, vocab, 2 * vocab, 3 * vocab, 4 * vocab
    one = torch.eye(vocab)
    head = width // 4

    def attends(block: Any, h: int, query: int, key: int, n: int, shift: int, size: float) -> None:
        """Head h matches n dimensions from `query` with those from `key`, moved by `shift`."""
        start = h * head
        for i in range(shift, n):
            block.attn.c_attn.weight[query + i, start + i - shift] = size
        for i in range(n):
            block.attn.c_attn.weight[key + i, width + start + i] = size

    def moves(block: Any, h: int, source: int, goal: int, size: float) -> None:
        start = h * head
        block.attn.c_attn.weight[
            source : source + vocab, 2 * width + start : 2 * width + start + vocab
        ] = one
        block.attn.c_proj.weight[start : start + vocab, goal : goal + vocab] = size * one

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for norm in (model.transformer.ln_f, *(b.ln_1 for b in model.transformer.h)):
            norm.weight.fill_(1.0)
        model.transformer.wte.weight[:, token : token + vocab] = one
        model.transformer.wpe.weight[:, place : place + places] = torch.eye(places)
        first, second = model.transformer.h
        for h, (shift, goal) in enumerate(((4, seen), (3, following))):
            attends(first, h, place, place, places, shift, 2.0)
            moves(first, h, token, goal, 0.1)
        attends(second, 0, token, seen, vocab, 0, 2.0)
        moves(second, 0, following, answer, 1.0)
        model.lm_head.weight[:, answer : answer + vocab] = 3 * one
    return model
