// Draws the slider over the steps, on one axis with the curves: play, keys, legend and the choice
// of curves.

const SPEEDS = [1, 2, 4, 8, 16]; // steps per second

function timeView(root) {
  const slider = el("input", { type: "range", id: "step", step: 1, "aria-label": "training step" });
  const player = playerOf();
  const label = el("output", { for: "step", id: "stepname" });
  const choice = curveChoice();
  const drawing = svg("svg", { id: "curves", role: "group" });
  const list = el("div", { id: "curvelist" });
  const slide = el("div", { class: "slide" }, slider);
  root.append(el("div", { class: "time" }, player.play, player.speed, label, choice.root, list),
    drawing, slide);
  const plot = plotOf(drawing);
  let lines = [], tell = () => {};

  slider.addEventListener("input", () => set({ step: nearest(Number(slider.value)) }));
  // A drag between two steps leaves the thumb where it was dropped.
  slider.addEventListener("change", () => { slider.value = state.step; });
  slider.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 10,
      PageDown: -10 }[event.key];
    if (by && !event.shiftKey && bare(event)) {
      go(by);
      event.preventDefault();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || !bare(event) || usesKeys(event.target, event.key)) return;
    const far = event.shiftKey ? 10 : 1;
    const act = { ArrowRight: () => go(far), ArrowLeft: () => go(-far), " ": player.toggle,
      Home: () => set({ step: data.steps[0] }), End: () => set({ step: data.steps.at(-1) }),
      "?": openHelp }[event.key];
    if (!act || !data.steps.length && event.key !== "?") return;
    event.preventDefault();
    act();
  });
  drawing.addEventListener("mousemove", (event) => {
    const step = nearest(plot.stepAt(offsetIn(drawing, event)));
    plot.hover(step);
    tip.show(event, stepName(step), ...lines.map((line) => wordsOf(line, step)));
  });
  drawing.addEventListener("mouseleave", () => {
    plot.hover(null);
    tip.hide();
  });
  drawing.addEventListener("click", (event) =>
    set({ step: nearest(plot.stepAt(offsetIn(drawing, event))) }));

  function draw(changed) {
    const any = (...names) => names.some((name) => changed.has(name));
    if (any("data")) {
      choice.fill();
      const points = isAlone() && numberKeys().every((key) => numbersOf(key).steps.length < 2);
      for (const node of [choice.root, list, drawing]) node.classList.toggle("needless", points);
      slide.hidden = isAlone();
      const playing = data.about.live && !data.about.done || data.steps.length > 2;
      player.play.hidden = player.speed.hidden = !playing;
    }
    if (any("data", "curves", "size", "score", "layer", "head", "pins", "probe")) {
      lines = chosenCurves();
      plot.draw(lines);
      tell = legendOf(list, lines);
      [slider.min, slider.max] = plot.span();
    } else if (!any("step", "other")) return;
    slider.value = state.step;
    slider.setAttribute("aria-valuetext", stepName(state.step));
    label.textContent = stepName(state.step)
      + (state.other === null ? "" : `, beside ${stepName(state.other)}`);
    label.title = wholeNames(state.step, state.other);
    plot.mark();
    tell();
    drawing.setAttribute("aria-label", [`curves over the steps, ${stepName(state.step)}`,
      ...lines.map((line) => wordsOf(line, state.step))].join("; "));
  }
  return { draw };
}

const bare = (event) => !(event.ctrlKey || event.metaKey || event.altKey);
const offsetIn = (node, event) => event.clientX - node.getBoundingClientRect().left;

// Whether what has the focus does something of its own with this key.
function usesKeys(target, key) {
  if (!target.closest || target === document.body) return false;
  if (target.closest("dialog, textarea, select, [contenteditable], [role=application], "
    + "[role=grid], [role=listbox], [role=tablist], [role=radiogroup], [role=slider]")) return true;
  if (target.closest("input:not([type=checkbox]):not([type=range])")) return true;
  if (key === " ") {
    return Boolean(target.closest("input:not([type=range]), button, summary, a, [tabindex]"));
  }
  const box = target.closest("[tabindex], .card, .menu");
  return key.startsWith("Arrow") && box !== null && box.scrollWidth > box.clientWidth + 1
    && box === target;
}

function go(by) {
  const at = data.steps.indexOf(state.step) + by;
  set({ step: data.steps[Math.max(0, Math.min(data.steps.length - 1, at))] });
}

function playerOf() {
  let timer = 0;
  const play = el("button", { id: "play", title: "play (space)", "aria-label": "play",
    onclick: () => toggle() }, "▶");
  const speed = el("select", { id: "speed", "aria-label": "steps per second", onchange: () => {
    if (timer) toggle(true);
  } }, ...SPEEDS.map((one) => el("option", { value: one, selected: one === 4 }, `${one}/s`)));
  function toggle(on = !timer) {
    clearInterval(timer);
    timer = 0;
    if (on) {
      if (state.step === data.steps.at(-1)) set({ step: data.steps[0] });
      timer = setInterval(() => {
        if (state.step === data.steps.at(-1)) toggle(false);
        else go(1);
      }, 1000 / Number(speed.value));
    }
    play.textContent = timer ? "⏸" : "▶";
    play.setAttribute("aria-label", timer ? "pause" : "play");
  }
  return { play, speed, toggle: () => toggle() };
}

// The value of a curve nearest to a step, and where that is.
function pointAt({ steps, values }, step) {
  const at = after(steps, step);
  if (!steps.length) return { step: null, value: NaN };
  const next = at === 0 || (at < steps.length && steps[at] - step < step - steps[at - 1]);
  const near = next ? at : at - 1;
  return { step: steps[near], value: values[near] };
}

function wordsOf(line, step) {
  const found = pointAt(line, step);
  return `${worded(line.name, 80)}: ${fmt(found.value)} ${line.unit}`
    + (found.step === step || found.step === null ? "" : ` (step ${found.step})`);
}

// A piece of a line, beside its name.
function sampleOf(colour, dash = "") {
  return svg("svg", { width: 20, height: 8, "aria-hidden": true },
    svg("path", { d: "M0 4h20", stroke: colour, "stroke-width": 2.5, "stroke-dasharray": dash }));
}

// One entry a curve. Gives the function that writes the values of the step into them.
function legendOf(list, lines) {
  const values = lines.map(() => el("b"));
  list.replaceChildren(...lines.map((line, i) => {
    const where = ["left", "right"].includes(line.scale) ? `${line.scale} axis`
      : `${fmt(line.range[0])} to ${fmt(line.range[1])} ${line.unit}`;
    return el("span", { class: "curve", title: line.name }, sampleOf(line.colour, line.dash),
      worded(line.name, 44),
      values[i], el("small", {}, where));
  }));
  return () => lines.forEach((line, i) => {
    const { step, value } = pointAt(line, state.step);
    values[i].textContent = fmt(value)
      + (step === state.step || step === null ? "" : ` (step ${step})`);
  });
}

// The menu of all numbers that can be drawn, by instrument.
function curveChoice() {
  const menu = el("div", { class: "groups" });
  const search = el("input", { type: "search", placeholder: "search",
    "aria-label": "search curves" });
  const root = el("details", { id: "choosecurves" }, el("summary", {}, "curves"),
    el("div", { class: "menu" }, search, menu));
  let shown = null;
  search.addEventListener("input", () => {
    for (const one of menu.querySelectorAll("label")) {
      one.hidden = !one.title.toLowerCase().includes(search.value.toLowerCase());
    }
    for (const one of menu.children) one.hidden = !one.querySelector("label:not([hidden])");
  });
  root.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    root.open = false;
    root.querySelector("summary").focus();
  });
  document.addEventListener("click", (event) => {
    if (root.open && !root.contains(event.target)) root.open = false;
  });
  root.addEventListener("toggle", () => tick());

  function tick() {
    const asked = new Set(state.curves ?? usualCurves());
    for (const box of menu.querySelectorAll("input")) box.checked = asked.has(box.value);
  }
  function fill() {
    const keys = numberKeys();
    root.hidden = !keys.length;
    if (shown !== keys.join("\n")) {
      shown = keys.join("\n");
      const groups = new Map();
      for (const key of keys) {
        const { instrument } = parts(key), name = key.slice(instrument.length + 1);
        if (!groups.has(instrument)) {
          groups.set(instrument, el("fieldset", {}, el("legend", {}, token(instrument))));
        }
        const box = el("input", { type: "checkbox", value: key,
          onchange: () => chosen(key, box.checked) });
        groups.get(instrument).append(el("label", { title: key }, box, worded(name, 60)));
      }
      menu.replaceChildren(...groups.values());
    }
    tick();
  }
  function chosen(key, on) {
    const there = new Set(numberKeys());
    const asked = (state.curves ?? usualCurves()).filter((one) => one !== key && there.has(one));
    set({ curves: on ? [...asked, key] : asked });
  }
  return { root, fill };
}
