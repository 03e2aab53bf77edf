"""Readings of rollouts that a test makes: groups of completions, their numbers, contrasts of heads;
and what their page shows.

The instrument and its measures have names that the page cannot know: only the descriptions say what
a reading is.
"""

import json
import re

import numpy as np

from tests.browser import drawn
from tlens_callback.meaning import Description, Meaning
from tlens_callback.reading import Reading

NAME = "sampled"

TEXTS = [
    (
        "Ann has 3 apples and buys 4 more. How many has she?",
        [
            "She has 3 apples and buys 4 more, so 3 + 4 = 7.\nThe answer is 7.",
            "3 + 4 = 7. <answer>7</answer>",
            "Ann buys 4 apples. The answer is 4, because she bought 4 of them and 4 is the number.",
            "Well, well, well, well, well, well, well, well, well, well, well, well, well, well",
        ],
    ),
    (
        "Which number comes next: 2, 4, 8, 16?",
        [
            "Each number is twice the one before, so the next one is 32.",
            "The difference grows: 2, 4, 8. So 16 + 16 = 32. <answer>32</answer>",
            "The next number is 18, since all of them are even.",
            "I do not know.",
        ],
    ),
]

MEASURES = {
    "token": Meaning(quantity="rollout_token"),  # pyright: ignore[reportArgumentType]
    "prompt": Meaning(quantity="rollout_prompt"),  # pyright: ignore[reportArgumentType]
    "row": Meaning(quantity="rollout_group"),  # pyright: ignore[reportArgumentType]
    "better": Meaning(quantity="rollout_advantage"),  # pyright: ignore[reportArgumentType]
    "gave": Meaning(quantity="rollout_reward"),  # pyright: ignore[reportArgumentType]
    "looks": Meaning(quantity="rollout_attention"),  # pyright: ignore[reportArgumentType]
    "contrast_direct": Meaning(
        quantity="contrast",  # pyright: ignore[reportArgumentType]
        title="Direct effect on the sampled tokens",
        explanation="Logits that a head adds to the sampled tokens, in winners minus in losers.",
    ),
    "contrast_direct_q": Meaning(quantity="contrast_q"),  # pyright: ignore[reportArgumentType]
    "contrast_first": Meaning(
        quantity="contrast",  # pyright: ignore[reportArgumentType]
        title="Attention to the first token",
    ),
    "change": Meaning(title="Change of the log probability since the base model"),
    "entropy": Meaning(title="Entropy of the next token", headline=True),
    "rank": Meaning(title="Rank of the sampled token"),
    "logp": Meaning(title="Log probability"),
    "logp_base": Meaning(title="Log probability"),
    "length": Meaning(title="Length of the completion"),
}
DESCRIPTION = Description(title="Rollouts", group="Rollouts", measures=MEASURES)


def tokens_of(text):
    """Pieces of a text, each with the space before it."""
    return re.findall(r"\n| ?[^\s]{1,6}", text)


def sample(
    step, *, texts=TEXTS, layers=4, heads=6, with_texts=True, found=((1, 2), (3, 0)), seed=0
):
    """The readings of one step, key -> reading."""
    rng = np.random.default_rng([step, seed])
    groups = [(tokens_of(prompt), [tokens_of(one) for one in ones]) for prompt, ones in texts]
    rollouts = [one for _, ones in groups for one in ones]
    names = [f"{g + 1}.{i + 1}" for g, (_, ones) in enumerate(groups) for i in range(len(ones))]
    row = [g for g, (_, ones) in enumerate(groups) for _ in ones]
    width, n = max(map(len, rollouts)), len(rollouts)
    there = np.arange(width) < np.array([[len(one)] for one in rollouts])
    made: list[Reading] = []

    def add(measure, values, axes, unit, **more):
        labels = more.pop("labels", {})
        if "rollout" in axes:
            labels = {"rollout": names, **labels}
        made.append(
            Reading(key=f"{NAME}/{measure}", values=np.asarray(values), axes=axes, unit=unit,
                    labels=labels, description=DESCRIPTION, **more)
        )  # fmt: skip

    def texts_in(rows, size):
        return np.array([[*one, *[""] * (size - len(one))] for one in rows])

    def token_values(values, measure, unit, limits=None):
        filled = np.where(there, values, np.nan)
        add(measure, filled, ("rollout", "pos"), unit, limits=limits)

    if with_texts:
        ids = np.where(there, rng.integers(0, 5000, (n, width)), np.nan)
        add("token", ids, ("rollout", "pos"), "index", texts=texts_in(rollouts, width))
        prompts = [prompt for prompt, _ in groups]
        size = max(map(len, prompts))
        prompt_ids = [[*range(len(one)), *[np.nan] * (size - len(one))] for one in prompts]
        add("prompt", prompt_ids, ("group", "pos"), "index", texts=texts_in(prompts, size),
            labels={"group": [str(g + 1) for g in range(len(groups))]})  # fmt: skip
    reward = np.round(rng.random((n, 2)), 2)
    total = reward.sum(1)
    mean = np.array([total[np.array(row) == g].mean() for g in row])
    advantage = np.round((total - mean) / 0.3, 2)
    add("row", row, ("rollout",), "index")
    add("better", advantage, ("rollout",), "advantage")
    add("gave", reward, ("rollout", "function"), "reward",
        labels={"function": ["correct", "format"]})  # fmt: skip
    add("length", [len(one) for one in rollouts], ("rollout",), "tokens")
    add("truncated", [float(len(one) == width) for one in rollouts], ("rollout",), "fraction",
        limits=(0, 1))  # fmt: skip

    def mean_of(values):
        return np.where(there, values, 0).sum(1) / np.maximum(there.sum(1), 1)

    entropy = rng.gamma(0.5, 1.2, (n, width))
    token_values(entropy, "entropy", "nats")
    change = rng.standard_t(2, (n, width)) * 0.4 * (1 + step / 10)
    add("mean_entropy", mean_of(entropy), ("rollout",), "nats")
    add("mean_change", mean_of(change), ("rollout",), "nats")
    add("sum_change", np.where(there, change, 0).sum(1), ("rollout",), "nats")
    token_values(change, "change", "nats")
    logp = -rng.gamma(0.4, 1.5, (n, width))
    token_values(logp, "logp", "nats")
    token_values(logp - change, "logp_base", "nats")
    token_values(np.floor(rng.gamma(0.2, 30, (n, width))), "rank", "rank")
    token_values(rng.random((n, width)) < 0.9, "trained", "fraction", limits=(0, 1))
    if with_texts:
        of = [int(np.nanargmax(advantage[: len(groups[0][1])])),
              int(np.nanargmin(advantage[: len(groups[0][1])]))]  # fmt: skip
        made.append(_attention(rng, groups[0][0], [rollouts[i] for i in of], layers, heads,
                               [names[i] for i in of]))  # fmt: skip
    contrast = rng.normal(0, 0.3, (layers, heads))
    q = rng.uniform(0.2, 1, (layers, heads))
    for i, at in enumerate(found):
        contrast[at] *= 6
        q[at] = 0.001 * (i + 1)
    add("contrast_direct", contrast, ("layer", "head"), "logit")
    add("contrast_direct_q", q, ("layer", "head"), "fraction", limits=(0, 1))
    add("contrast_first", rng.normal(0, 0.1, (layers, heads)), ("layer", "head"), "probability")
    add("kl", 0.01 * step, (), "nats")
    return {reading.key: reading for reading in made}


def _attention(rng, prompt, rollouts, layers, heads, names):
    """Of a winner and a loser: to the prompt's tokens, then to those sampled."""
    width = len(prompt) + max(map(len, rollouts))
    values = np.full((len(rollouts), layers, heads, width), np.nan)
    for i, one in enumerate(rollouts):
        n = len(prompt) + len(one)
        looks = rng.gamma(0.3, 1, (layers, heads, n))
        looks[..., 0] += n / 4
        values[i, ..., :n] = looks / looks.sum(-1, keepdims=True)
    return Reading(key=f"{NAME}/looks", values=values, axes=("rollout", "layer", "head", "key"),
                   unit="probability", limits=(0, 1), labels={"rollout": names},
                   description=DESCRIPTION)  # fmt: skip


STEPS = (10, 20, 30)
RUN = {step: sample(step) for step in STEPS}


def value(measure, step):
    return RUN[step][f"{NAME}/{measure}"].values


def ready(page):
    page.wait_for_selector("#rollouts .rollout:not([hidden])")
    drawn(page)
    return page


def put(page, **values):
    page.evaluate(f"tlens.set({json.dumps(values)})")
    drawn(page)


def cards(page):
    """Name of the group -> its cards from the left: {advantage, name, text, facts}."""
    return page.evaluate("""() => Object.fromEntries(
      [...document.querySelectorAll(".group:not([hidden])")].map((group) => [
        group.querySelector(".name").textContent,
        [...group.querySelectorAll(".rollout:not([hidden])")].map((card) => ({
          advantage: card.querySelector(".advantage").textContent,
          name: card.querySelector(".head .told").textContent.split(" ").at(-1),
          text: card.querySelector(".tokentexts").hidden ? null
            : card.querySelector(".tokentexts").textContent,
          facts: [...card.querySelectorAll(".fact")].map((one) => one.textContent),
        }))]))""")


def token(page, rollout, i):
    card = page.locator(f'.rollout[aria-label^="rollout {rollout},"]')
    return card.locator(".t").nth(i)
