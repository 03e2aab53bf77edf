"""`Asker`: every number that an answer prints, against arithmetic on the Hugging Face model."""

import re
import tempfile
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests import tiny
from tests.adapters import randomise
from tests.browser import needs_browser, opened
from tlens_callback import FidelityError, LogitAttribution, Probe, TokenLoss
from tlens_callback.offline.ask import Asker
from tlens_callback.run import fidelity_monitor

PROMPT = Probe("capital", "the capital of France is")


@pytest.fixture(scope="module")
def model():
    """Four layers with an adapter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        made = get_peft_model(
            tiny.model("llama", num_hidden_layers=4),
            LoraConfig(r=4, target_modules="all-linear"),
        )
        randomise(made, only_trainable=True)
    return made.eval()


@pytest.fixture(scope="module")
def asker(model):
    return Asker(model, tiny.tokenizer(), name="runs/checkpoint-7", step=7)


def token(text):
    return tiny.tokenizer().convert_tokens_to_ids(text.replace(" ", "\u0120"))


@torch.no_grad()
def by_hand(model, text):
    """Probabilities of the next token; the lens's logits [layer, vocab]; what every head
    [layer, head, d_model] and MLP [layer, d_model] writes at the last token, norm applied."""
    base = model.get_base_model()
    kept = {}
    handles = []
    for i, layer in enumerate(base.model.layers):

        def before(module, args, i=i):
            kept["z", i] = args[0][0, -1]

        def after(module, args, out, i=i):
            kept["mlp", i] = out[0, -1]

        def leaves(module, args, out, i=i):
            kept["resid", i] = (out[0] if isinstance(out, tuple) else out)[0, -1]

        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(before))
        handles.append(layer.mlp.register_forward_hook(after))
        handles.append(layer.register_forward_hook(leaves))
    ids = tiny.tokenizer()(text, return_tensors="pt")["input_ids"]
    logits = model(ids).logits[0, -1].double()
    for handle in handles:
        handle.remove()
    norm, heads = base.model.norm, base.config.num_attention_heads
    layers = range(len(base.model.layers))
    lens = torch.stack([base.lm_head(norm(kept["resid", i][None]))[0] for i in layers])
    size = kept["resid", layers[-1]].pow(2).mean().add(norm.variance_epsilon).sqrt()
    written, mlp = [], []
    for i in layers:
        module = base.model.layers[i].self_attn.o_proj
        weight = module.base_layer.weight + module.get_delta_weight("default")
        z = kept["z", i].view(heads, -1)
        each = torch.einsum("hd,mhd->hm", z, weight.view(len(weight), heads, -1))
        written.append(each * norm.weight / size)
        mlp.append(kept["mlp", i] * norm.weight / size)
    return logits, lens, torch.stack(written), torch.stack(mlp), base.lm_head.weight


@pytest.mark.parametrize(
    ("target", "foil"), [(None, None), (" Rome", None), (None, " London"), (" Rome", " dog")]
)
def test_numbers_of_an_answer(model, asker, target, foil):
    logits, lens, heads, mlps, unembedding = by_hand(model, PROMPT.content)
    order = logits.argsort(descending=True).tolist()
    meant = token(target) if target else next(i for i in order if not foil or i != token(foil))
    against = token(foil) if foil else next(i for i in order if i != meant)
    decode = tiny.tokenizer().decode

    answer = asker.ask(replace(PROMPT, target=target), foil=foil)
    assert (answer.target, answer.foil) == (decode([meant]), decode([against]))
    assert (answer.probe.target, answer.probe.foil) == (meant, against)
    chance = logits.softmax(0)
    assert [text for text, _ in answer.next_tokens] == [decode([i]) for i in order[:5]]
    assert [p for _, p in answer.next_tokens] == pytest.approx(chance[order[:5]].tolist(), rel=1e-4)

    worth = unembedding[meant] - unembedding[against]
    parts = {f"L{i} MLP": float(row @ worth) for i, row in enumerate(mlps)}
    for i, layer in enumerate(heads):
        parts |= {f"L{i}H{h}": float(row @ worth) for h, row in enumerate(layer)}
    largest = sorted(parts, key=lambda name: -parts[name])[:3]
    assert [name for name, _ in answer.writers] == largest
    assert [logit for _, logit in answer.writers] == pytest.approx(
        [parts[name] for name in largest], abs=1e-4
    )

    lines = answer.lines()
    assert lines[0] == "capital:"
    for line, i in zip(lines[1:6], order, strict=False):
        assert line == f"{chance[i]:7.3f}  {decode([i])!r}"
    lead = float(logits[meant] - logits[against])
    assert f"  lead of {answer.target!r} over {answer.foil!r}: {lead:+.2f} logits" in lines
    rank = int((logits > logits[meant]).sum())
    if rank >= 5:
        assert f"{chance[meant]:7.2g}  {answer.target!r}; {rank} tokens are likelier" in lines
    tops = lens.argmax(1).tolist()
    (lens_line,) = [line for line in lines if "logit lens" in line]
    if tops[-1] != meant:
        assert lens_line.endswith(f"ends with {decode([tops[-1]])!r}, not with {answer.target!r}")
    else:
        first = max((i + 1 for i, top in enumerate(tops) if top != meant), default=0)
        after = f"L{first} and each later layer" if first < 3 else "the last layer only (L3)"
        assert lens_line.endswith(after)
    named = ", ".join(f"{name} {parts[name]:+.2f}" for name in largest)
    assert f"  largest direct contributions to the lead: {named}" in lines


def test_the_lens_says_from_which_layer_on(asker):
    answer = asker.ask(PROMPT)
    lens = answer.readings["logit_lens/token/capital"]
    first = answer.readings["logit_lens/first_layer/capital"]

    def said(layer):
        changed = {first.key: replace(first, values=first.values * 0 + layer)}
        (line,) = [
            line
            for line in replace(answer, readings={**answer.readings, **changed}).lines()
            if "lens" in line
        ]
        return line

    assert said(0).endswith(f"reads {answer.target!r} after L0 and each later layer")
    assert said(2).endswith("after L2 and each later layer")
    assert said(3).endswith("after the last layer only (L3)")
    assert said(4).endswith(f"ends with {str(lens.texts[-1, 0])!r}, not with {answer.target!r}")


@pytest.mark.parametrize("cap", [None, 2.0])
def test_a_soft_cap_is_said_where_the_lead_is_behind_it(cap):
    model = tiny.model("gemma2", final_logit_softcapping=cap)
    answer = Asker(model, tiny.tokenizer()).ask(replace(PROMPT, target=" Rome"), foil=" London")
    ids = tiny.tokenizer()(PROMPT.content, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
    lead = float(logits[token(" Rome")] - logits[token(" London")])
    assert f"  lead of ' Rome' over ' London': {lead:+.2f} logits" in answer.lines()
    (line,) = [line for line in answer.lines() if "contributions to the lead" in line]
    assert ("before the soft cap" in line) == (cap is not None)


def test_weights_are_those_of_the_moment():
    live = tiny.model("llama")
    asker = Asker(live, tiny.tokenizer())
    before = asker.ask(PROMPT)
    with torch.no_grad():
        live.lm_head.weight.mul_(-1)
    after = asker.ask(PROMPT)
    assert before.next_tokens[0][0] != after.next_tokens[0][0]
    ids = tiny.tokenizer()(PROMPT.content, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        top = live(ids).logits[0, -1].argmax()
    assert after.next_tokens[0][0] == tiny.tokenizer().decode([int(top)])


def test_a_chat_and_ids_are_asked_too(asker):
    messages = [{"role": "user", "content": "what is the capital of Italy"}]
    ids = tiny.tokenizer().apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    chat, same = asker.ask(Probe("chat", messages)), asker.ask(Probe("ids", ids))
    assert chat.next_tokens == same.next_tokens


@pytest.mark.parametrize(
    ("probe", "foil", "message"),
    [
        (Probe("p", "the cat", target=" cat"), " cat", "are the same token"),
        (Probe("p", "the cat", target=""), None, "is 0 tokens"),
        (Probe("p", "the cat"), "", "is 0 tokens"),
        (Probe("p", " ".join(["cat"] * 80)), None, "context"),
        (Probe.repeated("p", block=4), None, "no answer"),
    ],
)
def test_what_cannot_be_asked(asker, probe, foil, message):
    with pytest.raises(ValueError, match=message):
        asker.ask(probe, foil=foil)


def test_of_a_longer_answer_the_first_token_is_explained_and_that_is_said(asker):
    answer = asker.ask(Probe("p", "the cat", target=" cat sat"), foil=" dog sat")
    assert (answer.target, answer.foil) == (" cat", " dog")
    said = "  left out: what follows ' cat' in the target ' cat sat': only the next token"
    assert [line for line in answer.lines() if line.startswith(said)]
    assert any("' dog' in the foil ' dog sat'" in line for line in answer.lines())
    short = asker.ask(Probe("p", "the cat", target=" cat"), foil=" dog")
    assert "what follows" not in str(short.left_out)


def test_a_shadow_that_is_not_the_model(asker, monkeypatch):
    def off(*given, **named):
        fidelity, logits = compare(*given, **named)
        return replace(fidelity, kl=1.0), logits

    compare = fidelity_monitor.compare
    monkeypatch.setattr(fidelity_monitor, "compare", off)
    with pytest.raises(FidelityError, match="is not the live model"):
        asker.ask(PROMPT)


def test_what_a_family_does_not_have_is_left_out_with_a_line(asker, monkeypatch):
    def taps(*given):
        raise ValueError("this family has no direct path.")

    monkeypatch.setattr(LogitAttribution, "taps", taps)
    answer = asker.ask(PROMPT)
    assert answer.lines()[-1] == "  left out: logit_attribution: this family has no direct path."
    assert answer.writers == [] and not any("contributions" in line for line in answer.lines())
    monkeypatch.setattr(TokenLoss, "taps", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        asker.ask(PROMPT)


def test_nothing_is_shown_as_a_change(asker):
    keys = asker.ask(PROMPT).readings
    assert "logit_attribution/head/capital" in keys and "logit_lens/token_by_pos/capital" in keys
    assert not [key for key in keys if "change" in key]


@needs_browser()
def test_the_page_is_one_file_and_a_hostile_prompt_is_text_on_it(asker, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    hostile = "</script><script>alert('mine')</script><img src=x onerror=alert(1)>"
    answer = asker.ask(Probe("hostile", hostile + " the cat"))
    page = answer.save(tmp_path / "pages" / "hostile.html")
    assert [path.name for path in page.parent.iterdir()] == ["hostile.html"]
    assert list((tmp_path / "temporary").iterdir()) == []
    monkeypatch.setattr(tempfile, "tempdir", None)
    with opened(page.as_uri()) as (seen, faults):
        seen.wait_for_timeout(500)
        text = seen.inner_text("body")
    assert faults == []
    assert re.search("step 7", text) and "checkpoint-7/hostile" in text
