// Puts the views on the page, reads the data, and shows the keyboard help.

window.tlens = {
  index: (index) => live.index(index),
  chunk: (step, stamp, small) => live.chunk(step, stamp, small),
  blob: (step, stamp, i, text) => live.given(step, stamp, i, text),
  state, data, set,
};

const EVERYTHING = ["data", "size", "theme", ...Object.keys(START)];

// A view in a box of its own. What goes wrong in it is said there, and harms no other.
// `wanted`: whether there is anything for it to show.
function mount(build, root, wanted = () => true) {
  const box = el("div", { class: "view", hidden: true });
  const trouble = el("p", { class: "error", role: "alert", hidden: true });
  let stale = true, view = { draw() {} };
  root.append(box);
  const failed = (error) => {
    stale = true;
    trouble.textContent = `This part could not be drawn: ${error?.message ?? error}`;
    trouble.hidden = false;
    console.error(error);
  };
  try {
    view = build(box);
  } catch (error) {
    failed(error);
  }
  box.append(trouble);
  views.push({ draw(changed) {
    const shown = arranged && data.steps.length > 0 && wanted();
    box.hidden = !shown;
    if (!shown) stale = true;
    if (!shown) return;
    const what = stale ? new Set(EVERYTHING) : changed;
    stale = false;
    try {
      const drawn = view.draw(what);
      if (what.size === EVERYTHING.length) trouble.hidden = true;
      drawn?.catch?.(failed);
    } catch (error) {
      failed(error);
    }
  } });
}

function begin() {
  data.about = JSON.parse(document.getElementById("about").textContent);
  const top = document.getElementById("top"), main = document.getElementById("main");
  top.append(titleBar());
  main.append(el("ul", { id: "notes" }), el("p", { id: "empty" }));
  Object.assign(state, readAddress());
  mount(timeView, top);
  mount(rewardsView, main, hasRewards);
  mount(rolloutsView, main, hasRollouts);
  const left = el("div", { class: "column" }), right = el("div", { class: "column wide" });
  main.append(el("div", { class: "columns" }, left, right));
  mount(matrixView, left, () => scores().length > 0);
  mount(patternView, right, () => patterns().length > 0);
  mount(tokensView, right, () => probes().length > 0);
  mount(lensView, right, () => data.keys().some(isLens));
  mount(eventsView, left);
  mount(panelsView, main);
  addEventListener("resize", () => redraw("size"));
  DARK.addEventListener("change", () => redraw("theme", "data"));
  addEventListener("hashchange", () => {
    Object.assign(state, readAddress());
    show(true);
  });
  views.push({ draw: () => whenIdle(readAhead) });
  if (data.about.live) {
    show(true);
    live.start();
  } else readPacked();
}

// Whether a reading is tokens that a lens reads.
function isLens(key) {
  const { axes, texts } = data.entry(key, data.first(key));
  return texts && axes.join() === "layer,rank";
}

function titleBar() {
  const turn = () => {
    document.documentElement.dataset.theme = theme() === "dark" ? "light" : "dark";
    redraw("theme", "data");
  };
  return el("div", { class: "bar0" },
    el("h1", { id: "title" }), el("span", { id: "status" }),
    el("button", { id: "help", title: "keys (?)", "aria-label": "keyboard help",
      onclick: openHelp }, "?"),
    el("button", { id: "theme", title: "dark or light", "aria-label": "dark or light",
      onclick: turn }, "◐"));
}

// The steps of a page that holds them. A step that the address names is shown as soon as it is in.
async function readPacked() {
  const scripts = [...document.querySelectorAll("script.step")];
  const wanted = state.step ?? Infinity, status = document.getElementById("status");
  const texts = scripts.map((script) => script.textContent.trim().split("\n"));
  const ahead = 16, unpacking = [];
  let drawn = false;
  for (const [i, script] of scripts.entries()) {
    // Some on their way at a time, taken in order: a step builds on the one before it.
    for (let j = unpacking.length; j < Math.min(i + ahead, scripts.length); j++) {
      unpacking.push(unpack(texts[j][0]));
    }
    data.take(Number(script.dataset.step), await unpacking[i], texts[i].slice(1));
    unpacking[i] = texts[i] = null;
    script.remove();
    if (!drawn && state.other === null && data.steps.at(-1) >= wanted) {
      drawn = true;
      show(true);
    }
    if (i % 50 === 49) status.textContent = `reading step ${i + 1} of ${scripts.length}`;
  }
  status.textContent = "";
  data.about.done = true;
  show(true);
}

let arranged = false; // whether `state` says what there is: before that, nothing is drawn

// Brings all to what there is, and draws what is concerned.
function show(all = false) {
  const before = { ...state };
  settle();
  arranged = true;
  const changed = Object.keys(state).filter((name) => state[name] !== before[name]);
  document.title = data.about.title ?? "tlens";
  document.getElementById("title").textContent = data.about.title ?? "tlens";
  const notes = document.getElementById("notes"), told = data.about.notes ?? [];
  if ([...notes.children].map((item) => item.textContent).join("\n") !== told.join("\n")) {
    notes.replaceChildren(...told.map((text) => el("li", {}, text)));
  }
  const empty = document.getElementById("empty");
  empty.hidden = data.steps.length > 0;
  empty.textContent = data.about.live
    ? "No step has been observed yet. The first one will appear here by itself."
    : "This store holds no steps.";
  redraw(...(all ? EVERYTHING : ["data", ...changed]));
}

// The patterns that may be wanted next, decoded while there is nothing else to do: those beside
// the slider's step, then all that a packed page holds.
async function readAhead() {
  const key = shownPattern(), at = data.steps.indexOf(state.step), turn = ++ahead;
  const beside = [1, -1, 2].map((by) => data.steps[at + by]).filter((step) => step !== undefined)
    .map((step) => data.latest(key, step) ?? data.first(key));
  for (const step of [...beside, ...(data.about.live ? [] : data.stepsOf(key))]) {
    if (turn !== ahead || data.decodedBytes > MOST_DECODED / 2) return;
    await data.ready(key, step);
    await new Promise((done) => setTimeout(done, 5));
  }
}

let ahead = 0;
let idle = 0;

function whenIdle(act) {
  if (window.requestIdleCallback) {
    cancelIdleCallback(idle);
    idle = requestIdleCallback(act, { timeout: 500 });
  } else {
    clearTimeout(idle);
    idle = setTimeout(act, 60);
  }
}

const KEYS = [
  ["← →", "go one step back or forward (with Shift: ten)"],
  ["Home, End", "go to the first or last step"],
  ["Page Up, Page Down", "move the slider by ten steps"],
  ["Space", "play or pause"],
  ["Tab", "go to the next control: slider, events, matrix, patterns, tokens"],
  ["↑ ↓ ← →", "go to the next cell of a matrix or a pattern, or to the next token"],
  ["Enter", "in the matrix: pin or unpin the head; in a pattern or the tokens: choose this token as "
    + "the query; on an event: go to its step"],
  ["?", "show this help; Escape closes it"],
];

function openHelp() {
  let dialog = document.getElementById("keys");
  if (!dialog) {
    const rows = KEYS.map(([key, does]) =>
      el("tr", {}, el("th", {}, el("kbd", {}, key)), el("td", {}, does)));
    dialog = el("dialog", { id: "keys", "aria-label": "keyboard help" }, el("table", {}, ...rows),
      el("button", { onclick: () => dialog.close() }, "close"));
    document.body.append(dialog);
  }
  if (!dialog.open) dialog.showModal();
}

begin();
