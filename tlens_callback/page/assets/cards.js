// Draws rollouts: a row of cards for each group, the best first, and the prompt above them.

const FACTS_AT_FIRST = 3;
const LONG_PROMPT = 160; // letters: a longer prompt is folded

function rolloutsView(root) {
  const which = el("select", { "aria-label": "instrument", onchange: () => set({ rollouts: which.value }) });
  const tint = el("select", { id: "rollouttint", "aria-label": "colour the tokens of rollouts by",
    onchange: () => set({ colour: tint.value }) });
  const all = el("input", { type: "checkbox", id: "allnumbers", onchange: () => set({ numbers: all.checked }) });
  const told = el("p", { class: "told" }), bar = el("div", { id: "rolloutlegend" });
  const tinting = el("label", {}, "colour the tokens by ", tint);
  const controls = el("div", { class: "controls" }, which, tinting, el("label", {}, all, " all numbers"));
  const groups = el("div", { class: "groups" }), contrast = contrastBlock();
  const box = el("details", { class: "card section", id: "rollouts", open: true },
    el("summary", {}, el("h2", {}, "Rollouts")),
    el("p", { class: "told" }, "Completions that the model learns from, seen with the weights of this step; a trainer that samples them logs their rewards one step later. Each row is one prompt, its best completion first; "
      + "▲ is better than the mean of its group, ▼ worse."),
    controls, bar, told, groups, contrast.root);
  box.addEventListener("toggle", () => redraw("rollouts", "data"));
  root.append(box);
  const made = [], seen = new IntersectionObserver((found) => {
    for (const { target, isIntersecting } of found) target.card.see(isIntersecting);
  }, { rootMargin: "120px" });
  let shown = null, turn = 0;

  async function draw(changed) {
    const mine = ["data", "step", "rollouts", "colour", "numbers", "theme", "layer", "head", "contrast", "size"];
    if (!box.open || !mine.some((name) => changed.has(name))) return;
    const one = chosenRollouts(), got = one && rolloutsAt(one, state.step), now = ++turn;
    for (const node of [controls, bar, groups]) node.hidden = !got;
    if (one && ["data", "step", "rollouts", "colour"].some((name) => changed.has(name))) fillChoices(one, got?.step ?? null);
    if (got) {
      const tinted = tintOf(got), key = tintKey(one);
      tint.value = key === null ? "" : withoutInstrument(key);
      all.checked = state.numbers;
      const rearranged = ["data", "step", "rollouts", "numbers"].some((name) => changed.has(name));
      if (rearranged || !shown) arrange(got, tinted);
      shown = { got, tinted };
      for (const card of made.flatMap((group) => group.cards)) card.colour(shown);
      bar.hidden = !tinted.scale || !(one.token && data.has(one.token, got.step));
      if (!bar.hidden) legendIn(bar, tinted.scale, legendWords(one, tinted));
    }
    tellOf(one, got);
    contrast.draw(changed, got);
    if (!got) return;
    if (await decoded(got, () => now !== turn)) redraw("colour");
  }

  // Decodes what colours the tokens, at this step and, for colours that stay, at the others.
  async function decoded({ one, step }, late) {
    const key = tintKey(one);
    let found = false;
    const steps = key === one.attention ? [step] : [step, ...data.stepsOf(key)];
    const wanted = [...steps.map((at) => [key, at]), ...one.measures.map((measure) => [measure, step]),
      ...(one.attention ? [[one.attention, step]] : [])];
    for (const [name, at] of wanted) {
      if (!name || data.codes(name, at) || !data.has(name, at)) continue;
      // More would push out what is shown, which would be decoded again, without end.
      if (at !== step && data.decodedBytes > MOST_DECODED / 2) continue;
      found = await data.ready(name, at) || found;
      if (late()) return false;
    }
    return found;
  }

  function fillChoices(one, step) {
    const fill = (select, items) => {
      const words = JSON.stringify(items);
      if (select.words === words) return;
      select.words = words;
      select.replaceChildren(...items.map(([value, text]) => el("option", { value }, cut(visible(text), 60))));
    };
    fill(which, [...allRollouts().keys()].map((name) => [name, name]));
    which.value = one.instrument;
    which.hidden = allRollouts().size < 2;
    const choices = tintChoices(one, step);
    fill(tint, choices);
    tinting.hidden = !one.token || !choices.length;
  }

  function arrange(got) {
    while (made.length < got.groups.length) {
      made.push(groupRow(seen));
      groups.append(made.at(-1).root);
    }
    made.forEach((group, i) => group.put(got.groups[i] ?? null, got, () => shown));
  }

  function tellOf(one, got) {
    if (!one) return write(told, "");
    if (!got) return write(told, `Nothing was sampled at or before step ${state.step}.`);
    const lines = got.step === state.step ? [] : [`Sampled at step ${got.step}.`];
    const gone = one.token && !data.has(one.token, got.step);
    const read = tintKey(one) === one.attention && one.attention ? data.entry(one.attention, got.step) : null;
    const tinted = tintKey(one);
    if (tinted !== null && tinted !== one.attention && !data.has(tinted, got.step)) lines.push(`${titleIn(one.measures, tinted)} was not read at this step.`);
    if (read?.labels.rollout) lines.push(`Attention was read of the rollouts ${read.labels.rollout.map(plain).join(" and ")}.`);
    if (gone) lines.push("The texts of this step are not in this page, for want of room. ");
    told.replaceChildren(lines.join(" "), ...(gone ? [linkToNearest(one.token, got.step)] : []));
  }
  return { draw };
}

// A button that goes to the nearest step with this reading.
function linkToNearest(key, step) {
  const there = nearest(step, data.stepsOf(key));
  return el("button", { class: "link", onclick: () => set({ step: there }) }, `Go to step ${there}.`);
}

function legendWords(one, { key, unit }) {
  if (key !== one.attention) return unit;
  return `${unit}: how much the sampled tokens look at each, L${state.layer}H${state.head}`;
}

// The end of a text: that of a prompt is the question, behind what all prompts have in common.
function lastOf(text, most) {
  const letters = [...text];
  return letters.length > most ? `…${letters.slice(letters.length - most + 1).join("")}` : text;
}

// A group's prompt and its cards; both are kept from one step to the next.
function groupRow(seen) {
  const title = el("span", { class: "name" }), short = el("span", { class: "short", dir: "auto" });
  const whole = el("div", { class: "prompt", dir: "auto" }), note = el("span", { class: "told" });
  const folded = el("details", {}, el("summary", {}, title, short, note), whole);
  const row = el("div", { class: "cards", tabindex: -1 });
  const root = el("section", { class: "group" }, folded, row), cards = [];

  function put(group, got, shown) {
    root.hidden = !group;
    if (!group) return;
    const prompt = group.prompt && joinedBytes(group.prompt).map(readableToken).join("");
    const long = prompt !== null && (prompt.length > LONG_PROMPT || prompt.includes("\n"));
    write(title, `Prompt ${plain(group.name)}`);
    write(short, prompt === null ? "" : lastOf(prompt.replaceAll("↵\n", "↵ "), LONG_PROMPT));
    write(whole, long ? prompt : "");
    folded.classList.toggle("plain", !long);
    if (!long) folded.open = false;
    const equal = group.rollouts.length > 1 && group.rollouts.every(({ advantage }) => advantage === 0);
    write(note, equal ? "All are equally good: nothing to learn here." : "");
    while (cards.length < group.rollouts.length) {
      const card = rolloutCard();
      card.root.card = card;
      cards.push(card);
      row.append(card.root);
      seen.observe(card.root);
    }
    cards.forEach((card, i) => card.put(group.rollouts[i] ?? null, got, shown));
  }
  return { root, cards, put };
}

function rolloutCard() {
  const advantage = el("b", { class: "advantage" }), name = el("span", { class: "told" });
  const rewards = el("div", { class: "facts" }), facts = el("div", { class: "facts" });
  let rollout = null, got = null, shown = null, visible = false;
  const text = tokenText("completion", (i, word) => toldOfToken(got, rollout, i, word, shown().tinted));
  const root = el("article", { class: "rollout" }, el("div", { class: "head" }, advantage, name), rewards, facts, text.root);

  function put(given, all, tell) {
    [rollout, got, shown] = [given, all, tell];
    root.hidden = !rollout;
    if (!rollout) return;
    const { advantage: value } = rollout, sign = value > 0 ? "▲ " : value < 0 ? "▼ " : "";
    write(advantage, sign + advantageOf(rollout));
    advantage.title = "advantage: how much better this is than its group, as the trainer counts it";
    write(name, `advantage · rollout ${plain(rollout.name)}`);
    rewards.replaceChildren(...rollout.rewards.map(([of, gave]) => fact(`reward ${plain(of)}`, Number.isNaN(gave) ? "none" : fmt(gave), "")));
    facts.replaceChildren(...factsOf(got, rollout.i).map(([key, said]) => fact(...said, meaningOf(key).title)));
    root.setAttribute("aria-label", `rollout ${plain(rollout.name)}, advantage ${advantageOf(rollout)}`);
    text.root.hidden = !rollout.tokens;
    text.put(rollout.tokens ?? []);
    if (visible) text.split();
  }
  function colour({ tinted }) {
    if (!rollout || !visible) return;
    text.colour((i) => (tinted.scale ? shade(tinted.scale, tinted.at(rollout, i)) : null));
  }
  function see(is) {
    visible = is;
    if (!is || !rollout) return;
    text.split();
    if (shown()) colour(shown());
  }
  return { root, put, colour, see };
}

const advantageOf = ({ advantage }) => (Number.isNaN(advantage) ? "unknown"
  : `${advantage > 0 ? "+" : ""}${advantage.toFixed(2)}`.replace("-", "−"));

// [key, [name, value]] of a rollout's numbers: what is yes or no, then the first few, or all.
function factsOf({ one, step }, i) {
  const there = one.facts.filter((key) => data.has(key, step));
  const [is, numbers] = [there.filter(isYesOrNo), there.filter((key) => !isYesOrNo(key))];
  const words = (key) => parts(key).measure.replaceAll("_", " ") + ofWhat(key);
  return [...(state.numbers ? numbers : numbers.slice(0, FACTS_AT_FIRST)).map((key) =>
    [key, [words(key), saidOf(key, data.number(key, step, i))]]),
  ...is.map((key) => {
    const value = data.number(key, step, i);
    return [key, ["", Number.isNaN(value) ? `${words(key)} unknown` : value ? words(key) : `not ${words(key)}`]];
  })];
}

const fact = (name, value, title) => el("span", { class: "fact", title }, name ? `${name} ` : "", el("b", {}, value));
