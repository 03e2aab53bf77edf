"""A file of probes gives the probes that Python would, or says which entry is wrong and how."""

import inspect
import itertools
import json
import logging
import time

import pytest
import yaml

from tests import tiny
from tlens_callback import Probe, ProbeBatch, read_probes
from tlens_callback.probes.file import CORRUPT_KEYS, KEYS, OTHER_NAMES, short_name

SAID = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is two?"}]
ENTRIES = [
    {"name": "capital", "text": "The capital of France is", "target": " Paris", "foil": " London"},
    {"text": "The capital of Spain is", "target": 40},
    {"name": "asked", "chat": "What is the capital of Italy?", "target": "Rome"},
    {"chat": SAID},
    {"tokens": [1, 20, 21], "target": 5, "foil": 6},
    {"block": 6, "times": 3, "seed": 2},
    {"name": "short", "block": 4},
    {"name": "odd", "text": 'a: b # "c" \u2028 \u00e9 \U0001f600 \\ \t yes\nno'},
    "A text alone",
    {"name": "pair", "text": "one two", "corrupt": "one three", "target": " three", "foil": None},
    {"name": "talk", "chat": "What is it?", "corrupt": "Which is it?"},
    {"name": "ids", "tokens": [7, 8], "corrupt": [7, 9]},
    {"name": "mixed", "tokens": [1, 2], "corrupt": {"text": "x", "target": " y", "foil": 3}},
]
PROBES = [
    Probe("capital", "The capital of France is", target=" Paris", foil=" London"),
    Probe("the-capital-of-spain-is", "The capital of Spain is", target=40),
    Probe("asked", [{"role": "user", "content": "What is the capital of Italy?"}], target="Rome"),
    Probe("what-is-two", SAID),
    Probe("1-20-21", [1, 20, 21], target=5, foil=6),
    Probe.repeated("repeat-6", block=6, times=3, seed=2),
    Probe.repeated("short", block=4),
    Probe("odd", 'a: b # "c" \u2028 \u00e9 \U0001f600 \\ \t yes\nno'),
    Probe("a-text-alone", "A text alone"),
    Probe("pair", "one two", target=" three"),
    Probe("pair-corrupt", "one three"),
    Probe("talk", [{"role": "user", "content": "What is it?"}]),
    Probe("talk-corrupt", [{"role": "user", "content": "Which is it?"}]),
    Probe("ids", [7, 8]),
    Probe("ids-corrupt", [7, 9]),
    Probe("mixed", [1, 2]),
    Probe("mixed-corrupt", "x", target=" y", foil=3),
]


def written(tmp_path, text, name="probes.yaml"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


FORMS = {
    "a.yaml": lambda: yaml.safe_dump(ENTRIES, allow_unicode=True, sort_keys=False),
    "a.yml": lambda: yaml.safe_dump(ENTRIES, default_flow_style=True),
    "A.YAML": lambda: json.dumps(ENTRIES[:7] + ENTRIES[8:]),  # JSON is YAML, but for some escapes
    "a.json": lambda: json.dumps(ENTRIES, indent="\t"),
    "a.jsonl": lambda: "\n".join(json.dumps(entry, ensure_ascii=False) for entry in ENTRIES),
    "a.ndjson": lambda: "\r\n\r\n".join(json.dumps(entry) for entry in ENTRIES) + "\r\n",
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_probes_that_python_would(tmp_path, name):
    expected = [one for one in PROBES if not (name == "A.YAML" and one.name == "odd")]
    assert read_probes(written(tmp_path, FORMS[name](), name)) == expected
    # As an editor on another system saves it.
    marked = b"\xef\xbb\xbf" + FORMS[name]().encode()
    assert read_probes(str(written(tmp_path, marked, name))) == expected


def test_the_docstrings_example_and_keys():
    """The example is a file, and every key is explained."""
    text = inspect.getdoc(read_probes)
    example = text[text.index("    - name: capital") : text.index("An entry is")]
    assert all(f"`{key}`" in text for key in {*KEYS, *CORRUPT_KEYS})
    assert {"name", "target", "foil", "corrupt", "chat", "tokens", "block", "times"} <= {
        key for entry in yaml.safe_load(example)[:4] for key in entry
    }


def test_the_docstrings_example_reads(tmp_path):
    text = inspect.getdoc(read_probes)
    example = text[text.index("    - name: capital") : text.index("An entry is")]
    probes = read_probes(written(tmp_path, example))
    assert [probe.name for probe in probes] == [
        *("capital", "capital-corrupt", "what-is-the-capital-of-france", "504-3575-282"),
        *("repeat-16", "a-text-alone"),
    ]
    assert (probes[0].target, probes[0].foil, probes[1].target) == (" Paris", " London", None)
    assert probes[4] == Probe.repeated("repeat-16", block=16, times=3)


def test_what_is_read_can_be_encoded(tmp_path):
    path = written(tmp_path, '- text: the capital of France is\n  target: " Paris"\n- block: 4\n')
    batch = ProbeBatch.encode(read_probes(path), tiny.tokenizer(), vocab_size=tiny.VOCAB)
    assert batch.token_text(batch.targets[0] or 0) == " Paris"
    assert batch.lengths == (6, 9)


def test_many_texts_that_begin_alike_are_read_at_once(tmp_path):
    """Each name is looked up among the others, not searched for."""
    text = "\n".join(json.dumps(f"the capital of a country far away, {i}") for i in range(2000))
    began = time.process_time()
    probes = read_probes(written(tmp_path, text, "many.jsonl"))
    assert probes[-1].name == "the-capital-of-a-country-far-awa-2000"
    assert time.process_time() - began < 10, "half a second; searched for, a minute"


def test_names_from_first_words_are_unlike_all_others(tmp_path):
    text = "- a cat\n- text: a cat\n- {name: a-cat-2, text: x}\n- {tokens: [1]}\n- '?!'\n"
    names = [probe.name for probe in read_probes(written(tmp_path, text))]
    assert names == ["a-cat", "a-cat-3", "a-cat-2", "1", "prompt"]
    assert short_name("The Capital, of: France/is " * 3, []) == "the-capital-of-france-is-the-cap"


def test_equal_beginnings_are_numbered():
    names: list[str] = []
    for _ in range(40):
        names.append(short_name("a b", names))
    assert names == ["a-b", *(f"a-b-{i}" for i in range(2, 41))]
    # Whatever else has such a name.
    for taken in itertools.product([False, True], repeat=6):
        others = {"a-b", *(f"a-b-{i}" for i, is_taken in enumerate(taken, 2) if is_taken)}
        assert short_name("a b", others) not in others


def test_a_number_for_a_target_is_said_to_be_a_token_id(tmp_path, caplog):
    """`target: 5` behind "2 + 3 =" is meant as text more often than not."""
    text = '- {text: "2 + 3 =", target: 5}\n- {text: b, target: "5"}\n- {tokens: [1], target: 5}\n'
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        probes = read_probes(written(tmp_path, text))
    assert [probe.target for probe in probes] == [5, "5", 5]
    (said,) = caplog.messages
    assert "entry 1 (line 1): target 5 is a token id;" in said and '"5"' in said
    caplog.clear()
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        read_probes(written(tmp_path, text.replace("target: 5}", "target: 5, foil: 7}")))
    (said,) = caplog.messages
    assert "target 5 is a token id, and 1 more are;" in said


BAD_YAML = [
    ("- name: a\n\ttext: b\n", "line 2, column 1. YAML has no tabs before a key"),
    ("[" * 3000, "nested too deeply"),
    ("", r"probes\.yaml has no probes"),
    ("# nothing\n", "no probes"),
    ("[]", "no probes"),
    ("text: a\n", "must be a list of probes, but holds a mapping.*begins with '- '"),
    ("just words", "but holds a string"),
    ("- text: a\n  text: b\n", "'text' stands twice in one entry; is a '- ' missing, line 2"),
    ("- text: The answer: 42\n", "not valid YAML.*line 1, column 19.*in quotes"),
    ("- text: a\n- text: 'b\n", "not valid YAML.*line 3"),
    ("- text: a\n---\n- text: b\n", "not valid YAML.*line 2"),
    ("- \x01\n", "not valid YAML.*special characters are not allowed"),
    (
        "- text: a\n- 5\n",
        r"entry 2 \(line 2\) must be a text or a map.*got 5 \(number\).*in quotes",
    ),
    ("- yes\n", r"got True \(boolean\).*yes, no, on and off"),
    ("- a\n-\n", r"entry 2 .*got None \(null\)"),
    ("- [a]\n", r"got \['a'\] \(list\)"),
    ("- prompt: a\n", "unknown key 'prompt'; did you mean 'text'"),
    ("- messages: []\n", "unknown key 'messages'; did you mean 'chat'"),
    ("- text: a\n  taget: b\n", "unknown key 'taget'; did you mean 'target'"),
    ("- text: a\n  zzz: b\n", "unknown key 'zzz'; The keys are name, text, chat"),
    ("- text: a\n  5: b\n", "unknown key 5"),
    ("- text: a\n  chat: b\n", r"entry 1 \(line 1\) has text and chat"),
    ("- target: a\n", "has none of text, chat, tokens, block"),
    ("- text:\n", "has none of text"),
    ("- text: '  '\n", "is empty"),
    ("- text: 1984\n", r"text must be a string, got 1984 \(number\).*in quotes"),
    ("- text: 2024-01-01\n", r"text must be a string.*\(date\).*in quotes"),
    ("- text: [a]\n", r"text must be a string, got \['a'\] \(list\)\.$"),
    ("- {name: no, text: a}\n", r"name must be a string, got False \(boolean\).*YAML takes"),
    ("- {name: a/b, text: a}\n", r"entry 1 \(line 1\): A probe needs a name without '/'"),
    ("- {text: a, target: yes}\n", "target must be a string.*True.*YAML takes"),
    ("- {text: a, target: 5.0}\n", r"target must be a string.*5\.0.*in quotes"),
    ("- {text: a, target: b, foil: [c]}\n", "foil must be a string or a token id"),
    ("- {text: a, foil: b}\n", r"entry 1 \(line 1\): Probe 'a' has a foil but no target"),
    ("- tokens: a\n", "tokens must be a list of token ids, got 'a'"),
    ("- tokens: [1, true]\n", "tokens must be a list of token ids"),
    ("- tokens: [1, 2.0]\n", "tokens must be a list of token ids"),
    ("- tokens: []\n", "is empty"),
    ("- chat: 5\n", "chat must be a string, got 5"),
    ("- chat: [hello]\n", "a message of chat must be {role: user"),
    ("- chat: [{role: user}]\n", "a message of chat must be"),
    ("- chat: [{role: user, content: 5}]\n", "content of a message must be a string, got 5"),
    ("- block: 1\n", "block >= 2"),
    ("- block: '6'\n", "block must be a whole number, got '6'"),
    ("- block: true\n", "block must be a whole number"),
    ("- {block: 6, times: 1.5}\n", "times must be a whole number"),
    ("- {text: a, times: 2}\n", "times goes with block, not with text"),
    ("- {name: a, text: a}\n- b\n- {name: a, text: c}\n", "entry 3 .line 3.: the probe of entry 1"),
    ("- {name: a, text: a, corrupt: b}\n- {name: a-corrupt, text: c}\n", "named 'a-corrupt'"),
    ("- {block: 4, corrupt: b}\n", "corrupt: beside a block it must be a mapping"),
    ("- {text: a, corrupt: 5}\n", "corrupt: text must be a string, got 5"),
    ("- {tokens: [1], corrupt: b}\n", "corrupt: tokens must be a list"),
    ("- {text: a, corrupt: {}}\n", "corrupt has none of text, chat, tokens"),
    ("- {text: a, corrupt: {text: b, tokens: [1]}}\n", "corrupt has text and tokens"),
    ("- {text: a, corrupt: {prompt: b}}\n", "corrupt: unknown key 'prompt'; did you mean 'text'"),
    (
        "- {text: a, corrupt: {id: b}}\n",
        "unknown key 'id'; The keys are text, chat, tokens, ",
    ),
    ("- {text: a, corrupt: {text: b, foil: c}}\n", "corrupt: Probe 'a-corrupt' has a foil but"),
]


@pytest.mark.parametrize("text, says", BAD_YAML)
def test_what_is_wrong_in_a_list_is_named(tmp_path, text, says):
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=says) as raised:
        read_probes(path)
    assert str(raised.value).startswith(f"{path}") and "\n" not in str(raised.value)


BAD_LINES = [
    ("\n\n", "no probes"),
    ('"a"\n\n{"text": 5}\n', r"line 3: text must be a string, got 5"),
    ('"a"\n{"text": "b"\n', r"line 2 is not JSON.*column"),
    ('[\n  {"text": "b"}\n]\n', r"line 1 is not JSON.*ends in \.json"),
    ('[{"text": "b"}]\n', "line 1 must be a text or a mapping"),
    ('{"prompt": "a", "target": "b"}\n', "line 1: unknown key 'prompt'; did you mean 'text'"),
    ('{"messages": []}\n', "did you mean 'chat'"),
    ('{"text": "a", "text": "b"}\n', "line 1: the key 'text' stands twice"),
    ('{"text": "a", "target": NaN}\n', "line 1: target must be a string"),
    ('{"name": "x", "text": "a"}\n{"name": "x", "text": "b"}\n', "line 2: the probe of line 1 is"),
]


@pytest.mark.parametrize("text, says", BAD_LINES)
def test_what_is_wrong_in_lines_is_named(tmp_path, text, says):
    path = written(tmp_path, text, "probes.jsonl")
    with pytest.raises(ValueError, match=says) as raised:
        read_probes(path)
    assert str(raised.value).startswith(f"{path}") and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "no probes"),
        ('[{"text": "a"},]', "not JSON.*line 1"),
        ("[" * 99999, "nested too deeply"),
        ('{"text": "a"}', "holds a mapping"),
        ('[{"text": "a", "text": "b"}]', "'text' stands twice"),
        ('[{"text": "a"}, {"text": 5}]', "entry 2: text must be a string"),
    ],
)
def test_what_is_wrong_in_json_is_named(tmp_path, text, says):
    with pytest.raises(ValueError, match=says):
        read_probes(written(tmp_path, text, "probes.json"))


def test_the_place_of_the_other_is_short(tmp_path, monkeypatch):
    written(tmp_path, "- {name: a, text: a}\n- {name: a, text: c}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"entry 2 \(line 2\): the probe of entry 1 \(line 1\) is"):
        read_probes("./probes.yaml")


def test_a_file_that_is_none_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no file of probes .*none\.yaml: looked for from /"):
        read_probes(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="is a directory"):
        read_probes(tmp_path)
    with pytest.raises(ValueError, match=r"ends in one of \.yaml.*Rename"):
        read_probes(written(tmp_path, "- a\n", "probes.txt"))
    with pytest.raises(ValueError, match="not UTF-8 text, as its byte 4 shows"):
        read_probes(written(tmp_path, b"- Ca\xe9\n"))


def test_hints_lead_to_keys():
    assert set(OTHER_NAMES.values()) <= set(KEYS) and not set(OTHER_NAMES) & set(KEYS)
