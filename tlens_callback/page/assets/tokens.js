// Shows a probe's tokens as text, coloured by a measured value, and all values of one token.

function tokensView(root) {
  const { root: box, body, heading } = card("Tokens", { id: "tokens" });
  const probe = el("strong", { id: "tokenprobe" });
  const choose = el("select", { id: "tint", "aria-label": "colour the tokens by",
    onchange: () => { tint = choose.value; draw(new Set(["tint"])); } });
  const leads = el("span", { id: "leads" }), name = el("p", { class: "told", id: "tintname" });
  const strip = el("div", { id: "strip", role: "listbox" }), bar = el("div");
  const panel = el("aside", { id: "attoken", "aria-label": "the token looked at" });
  const which = el("h3", { id: "whichtoken" });
  const none = el("p", { class: "told", id: "notokens" });
  const row = el("div", { class: "tokenrow" }, el("div", { class: "tokentext" }, name, strip, bar), panel);
  heading.append(probe, choose, leads);
  body.append(none, row);
  root.append(box);
  let tint = null, keys = [], tokens = [], words = [], readings = [], source = null, listed = [], turn = 0;
  let hovered = null, pointer = null, tabbed = 0, signature = null;
  const place = { layer: null }; // axis before the tokens -> index that is shown

  async function draw(changed) {
    const mine = ["data", "step", "probe", "pattern", "query", "layer", "head", "tint", "theme"];
    if (!mine.some((what) => changed.has(what))) return;
    if (["data", "probe", "pattern"].some((what) => changed.has(what))) survey();
    row.hidden = choose.hidden = leads.hidden = !tokens.length;
    none.hidden = tokens.length > 0;
    write(probe, state.probe === null ? "" : `of ${cut(token(state.probe), 40)}`);
    write(none, state.probe === null ? "No probe has readings in this run."
      : "This probe has no readings for its tokens: no attention, neurons, features or losses.");
    if (!tokens.length) return;
    const now = ++turn, { version } = data;
    const late = () => now !== turn || version !== data.version; // another drawing comes
    await prepare(late);
    if (late()) return;
    source = sourceOf();
    colour();
    show();
    if (pointer) point(); // the step may move under a mouse that rests
  }

  // What this probe has: its tokens, and its readings that have a value for each of them.
  function survey() {
    keys = data.keys().filter((key) => parts(key).probe === state.probe);
    tokens = state.probe === null ? [] : tokensOf(keys);
    readings = keys.filter((key) => isByToken(data.entry(key, data.first(key)), tokens));
    const attention = data.entry(shownPattern() ?? "", data.first(shownPattern() ?? ""));
    const looks = attention?.shape.at(-1) === tokens.length;
    const next = JSON.stringify([state.probe, tokens, readings, looks]);
    if (next === signature) return;
    signature = next;
    hovered = pointer = source = null;
    tabbed = tokens.length - 1;
    const options = looks ? { attention: [["from", "attention from the query"], ["received", "attention received"]] } : {};
    for (const key of readings) {
      const { instrument, measure } = parts(key);
      (options[instrument] ??= []).push([`${instrument}/${measure}`, measure.replaceAll("_", " ")]);
    }
    choose.replaceChildren(...Object.entries(options).map(([label, all]) =>
      el("optgroup", { label }, ...all.map(([value, text]) => el("option", { value }, text)))));
    const values = Object.values(options).flat().map(([value]) => value);
    if (!values.includes(tint)) tint = values[0] ?? null;
    strip.setAttribute("aria-label", `tokens of ${token(state.probe)}; Enter makes one the query`);
    words = joinedBytes(tokens);
    strip.replaceChildren(...tokens.flatMap((text, i) => {
      const later = words[i] === "" && text !== ""; // its character stands at an earlier token
      const about = { role: "option", tabindex: i === tabbed ? 0 : -1, "data-i": i };
      const one = el("span", later ? { class: "token later", ...about, "aria-label": token(text) } : { class: "token", ...about },
        text === null ? "(first token)" : later ? "" : cut(token(words[i]), 40));
      return text?.includes("\n") ? [one, el("br")] : [one];
    }));
    panel.replaceChildren(which);
    listed = [listing(panel, "numbers"), listing(panel, "looksat"),
      ...ranked().map(() => listing(panel, null)), listing(panel, "lensread")];
  }

  const chosen = () => readings.find((key) => key.startsWith(`${tint}/`)
    && parts(key).measure === tint.split("/")[1]) ?? null;
  const ranked = () => readings.filter((key) => {
    const { axes } = data.entry(key, data.first(key));
    return axes.length > 1 && !(axes.length === 2 && axes[0] === "layer");
  });
  const query = () => (state.query !== null && state.query < tokens.length ? state.query : tokens.length - 1);
  const spans = () => strip.querySelectorAll(".token");

  // Decodes what is shown now; and every step of the chosen reading once, for limits that stay.
  async function prepare(late) {
    const key = chosen();
    choose.value = tint;
    if (key) {
      fillLeads(key);
      const lead = leadOf(key);
      for (const step of data.stepsOf(key)) {
        if (spanOf(key, step, lead)) continue;
        await data.ready(key, step);
        if (late()) return;
        spanOf(key, step, lead);
      }
    } else leads.replaceChildren();
    const wanted = [shownPattern(), ...keys.filter((one) => data.entry(one, data.first(one)).axes
      .some((axis) => axis === "pos" || axis === "token"))];
    await Promise.all(wanted.map((one) => one && data.ready(one, data.latest(one, state.step))));
  }

  // One choice for each axis before the tokens: the layer, the rank with its neuron's number.
  function fillLeads(key) {
    const step = data.latest(key, state.step) ?? data.first(key), entry = data.entry(key, step);
    const axes = entry.axes.slice(0, -1);
    const fresh = JSON.stringify([key, axes, axes.map((axis, i) => entry.labels[axis] ?? entry.shape[i])]);
    place.layer ??= Math.max(0, indexOf(entry, "layer", state.layer));
    if (leads.dataset.of !== fresh || !leads.children.length) {
      leads.dataset.of = fresh;
      leads.replaceChildren(...axes.map((axis, i) => el("label", {}, `${axis} `, el("select", {
        id: `lead-${axis}`,
        onchange: (event) => { place[axis] = event.target.selectedIndex; draw(new Set(["tint"])); },
      }, ...Array.from({ length: entry.shape[i] }, (_, at) => el("option", { value: at }))))));
    }
    const lead = leadOf(key);
    axes.forEach((axis, i) => {
      const select = leads.children[i].firstElementChild;
      const base = lead - (lead % entry.shape[i]);
      for (const option of select.options) {
        const neuron = axis === "rank" ? numberBeside(entry, "neuron", base + option.index, ": neuron ") : "";
        write(option, cut(`${nameOf(entry, axis, option.index)}${neuron}`, 40));
      }
      select.selectedIndex = Math.min(place[axis] ?? 0, entry.shape[i] - 1);
    });
  }

  function leadOf(key) {
    const entry = data.entry(key, data.first(key));
    return entry.axes.slice(0, -1).reduce((at, axis, i) =>
      at * entry.shape[i] + Math.min(place[axis] ?? 0, entry.shape[i] - 1), 0);
  }

  // {name, unit, step, scale, at(i), masked(i)}: what the colours stand for.
  function sourceOf() {
    const key = chosen();
    const step = data.latest(key ?? shownPattern(), state.step);
    const absent = (told) => ({ name: told, unit: "", step: null, scale: null, at: () => NaN, masked: () => false });
    if (step === null) return absent(`Not measured at or before step ${state.step}.`);
    const entry = data.entry(key ?? shownPattern(), step);
    if (key) {
      const lead = leadOf(key), n = entry.shape.at(-1), offset = offsetOf(entry, tokens);
      return { unit: entry.unit, step, masked: () => false, scale: scaleOver(key, lead),
        name: `${tint.replace("/", " ").replaceAll("_", " ")} ${nameOfLead(entry, lead)}`,
        at: (i) => (i < offset || i >= offset + n ? NaN : data.number(key, step, lead * n + i - offset)) };
    }
    const got = headAt(shownPattern(), step);
    if (!got) return absent(`There is no attention of L${state.layer}H${state.head} here.`);
    const kind = kindOf(entry.key), scale = scaleOf(entry, got.values, { root: true });
    const head = `${isAttention(kind) ? "attention" : kind} of L${state.layer}H${state.head}`;
    const from = query(), { values, causal, n } = got;
    const means = tint === "received" ? receivedBy(got) : null;
    return { unit: entry.unit, step, scale,
      name: means ? `${head} to each token, mean over ${causal ? "the queries from it on" : "all queries"}`
        : `${head} from ${from} ${token(tokens[from] ?? "")}`,
      at: (i) => (means ? means[i] : causal && i > from ? NaN : values[from * n + i]),
      masked: (i) => !means && causal && i > from };
  }

  function colour() {
    const from = query(), all = spans();
    write(name, source.name + (source.step === null || source.step === state.step ? ""
      : ` (measured at step ${source.step})`));
    for (let i = 0; i < all.length; i++) {
      const value = source.at(i), rgb = source.scale && shade(source.scale, value);
      const back = rgb ? css(rgb) : source.masked(i) ? "var(--masked)" : "transparent";
      if (all[i].back !== back) {
        all[i].back = back;
        all[i].style.background = back;
        all[i].style.color = rgb ? inkOn(rgb) : "var(--faint)";
      }
      if ((all[i].getAttribute("aria-selected") === "true") !== (i === from)) {
        all[i].setAttribute("aria-selected", i === from);
      }
    }
    bar.hidden = !source.scale;
    if (source.scale) legendIn(bar, source.scale, source.unit);
  }

  function describe(i) {
    const value = source.at(i);
    return [`${i} ${nameAt(i)}`, source.masked(i) ? "masked: after the query"
      : Number.isNaN(value) ? "no value" : `${fmt(value)} ${source.unit}`];
  }
  function nameAt(i) {
    if (tokens[i] === null) return "(first token)";
    const of = words[i] === tokens[i] ? null : words.slice(0, i + 1).findLast((word) => word !== "");
    return of ? `${token(tokens[i])} of ${token(of)}` : token(tokens[i]);
  }

  // The panel: of the token under the mouse or the focus, or else of the query.
  function show(i = hovered ?? query()) {
    write(which, `${i} ${nameAt(i)}`);
    const [numbers, looks, ...rest] = listed, lens = rest.pop();
    const lines = readings.filter((key) => data.entry(key, data.first(key)).axes.length === 1);
    numbers(lines.length ? "measured at this token" : null, lines.map((key) => {
      const { step, entry, at } = readAt(key, i);
      return [parts(key).measure.replaceAll("_", " "), step === null || Number.isNaN(at(0)) ? "none" : fmt(at(0)),
        step === null ? "" : entry.unit];
    }));
    const key = shownPattern(), step = key && data.latest(key, state.step);
    const got = step === null ? null : headAt(key, step);
    const scale = got && scaleOf(data.entry(key, step), got.values, { root: true });
    looks(got && `L${state.layer}H${state.head} looks from here at`, got
      ? topOf(got.n, 5, (j) => got.values[i * got.n + j]).map(([j, value]) =>
        [`${j} ${cut(nameAt(j), 24)}`, fmt(value), "", shade(scale, value)]) : []);
    ranked().forEach((one, at) => rest[at](...strongest(one, i)));
    lens(...lensAt(keys, i, tokens));
  }

  // {step, entry, at(lead)} of a reading at token i.
  function readAt(key, i) {
    const step = data.latest(key, state.step), entry = data.entry(key, step ?? data.first(key));
    const n = entry.shape.at(-1), j = i - offsetOf(entry, tokens);
    return { step, entry, at: (lead) => (j < 0 || j >= n ? NaN : data.number(key, step, lead * n + j)) };
  }

  // Title and rows: which of a reading's neurons, features, ... are strongest at token i.
  function strongest(key, i) {
    const { step, entry, at } = readAt(key, i), { instrument, measure } = parts(key);
    if (step === null) return [null, []];
    const rows = topOf(product(entry.shape.slice(0, -1)), 5, at).map(([lead, value]) =>
      [nameOfLead(entry, lead), fmt(value), numberBeside(entry, "write", lead, "writes ")]);
    const writes = rows.some(([, , note]) => note) ? "; writes: logit, at the last token" : "";
    return [`${instrument} ${measure}: largest here (${entry.unit}${writes})`.replaceAll("_", " "), rows];
  }

  function hover(event) {
    const at = event.target.dataset?.i;
    if (at === undefined || !source) return;
    hovered = Number(at);
    if (event.type === "mouseover") {
      pointer = event;
      point();
    } else say(describe(hovered).map((line) => cut(line, 200)).join(", "));
    show();
  }
  const point = () => tip.show(pointer, ...describe(hovered).map((line) => cut(line, 2200)));
  function leave() {
    tip.hide();
    pointer = null;
    hovered = strip.contains(document.activeElement) ? tabbed : null;
    if (source) show();
  }
  function focus(i) {
    const all = spans();
    all[tabbed].tabIndex = -1;
    tabbed = Math.max(0, Math.min(all.length - 1, i));
    all[tabbed].tabIndex = 0;
    all[tabbed].focus();
  }
  strip.addEventListener("mouseover", hover);
  strip.addEventListener("mouseleave", leave);
  strip.addEventListener("focusin", hover);
  strip.addEventListener("focusout", () => {
    if (pointer || !source) return;
    hovered = null;
    show();
  });
  strip.addEventListener("click", (event) => {
    const at = event.target.dataset?.i;
    if (at === undefined) return;
    focus(Number(at));
    set({ query: Number(at) === state.query ? null : Number(at) });
  });
  strip.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (by) focus(tabbed + by);
    else if (event.key === "ArrowUp" || event.key === "ArrowDown") focus(nextLine(spans(), tabbed, event.key === "ArrowDown"));
    else if (event.key === "Enter" || event.key === " ") set({ query: tabbed === state.query ? null : tabbed });
    else if (event.key === "Escape") set({ query: null });
    else return;
    event.preventDefault();
  });

  // {values, n, causal} of the chosen head; kept, for the mouse asks again and again.
  let kept = { entry: null };
  function headAt(key, step) {
    const entry = data.entry(key, step), row = indexOf(entry, "layer", state.layer), n = entry.shape.at(-1);
    if (row < 0 || state.head >= entry.shape[1]) return null;
    const lead = row * entry.shape[1] + state.head;
    if (kept.entry !== entry || kept.lead !== lead) {
      const values = data.slice(key, step, lead);
      if (!values) return null;
      const causal = entry.tril || values.every((value, i) => value === 0 || i % n <= Math.floor(i / n));
      kept = { entry, lead, values, n, causal };
    }
    return kept;
  }
  return { draw };
}

// The mean of each column over the queries that can see it.
function receivedBy({ values, n, causal }) {
  return Array.from({ length: n }, (_, key) => {
    let sum = 0;
    for (let query = causal ? key : 0; query < n; query++) sum += values[query * n + key];
    return sum / (causal ? n - key : n);
  });
}

// The token in the line above or below that is nearest to token i.
function nextLine(all, i, down) {
  const from = all[i].getBoundingClientRect(), middle = (box) => (box.left + box.right) / 2;
  let best = i, top = null;
  for (let j = i; j >= 0 && j < all.length; j += down ? 1 : -1) {
    const box = all[j].getBoundingClientRect();
    if (down ? box.top < from.bottom - 2 : box.bottom > from.top + 2) continue;
    top ??= box.top;
    if (Math.abs(box.top - top) > 2) break;
    const far = (one) => Math.abs(middle(one) - middle(from));
    if (best === i || far(box) < far(all[best].getBoundingClientRect())) best = j;
  }
  return best;
}

// Whether a reading has a number for each token, behind at most two other axes.
function isByToken(entry, tokens) {
  return ["pos", "token"].includes(entry.axes.at(-1)) && entry.axes.length <= 3 && entry.unit !== "index"
    && offsetOf(entry, tokens) !== null;
}

// The token that a reading's first index stands for; null where its labels are other tokens.
function offsetOf(entry, tokens) {
  const n = entry.shape.at(-1), labels = entry.labels[entry.axes.at(-1)], late = tokens.length - n;
  const fits = (offset) => offset >= 0 && offset + n <= tokens.length
    && labels.every((label, i) => tokens[i + offset] === null || tokens[i + offset] === label);
  if (labels) return fits(late) ? late : fits(0) ? 0 : null;
  return late === 0 || (late === 1 && entry.axes.at(-1) === "token") ? late : null;
}

// [index, value] of the largest magnitudes among count, those that are 0 or no number left out.
function topOf(count, most, valueAt) {
  const best = [];
  for (let i = 0; i < count; i++) {
    const value = valueAt(i), size = Math.abs(value);
    if (!size || (best.length === most && size <= Math.abs(best[most - 1][1]))) continue;
    let at = best.length;
    while (at > 0 && Math.abs(best[at - 1][1]) < size) at--;
    best.splice(at, 0, [i, value]);
    if (best.length > most) best.pop();
  }
  return best;
}
