// Draws curves over training: the loss, the score of the chosen heads, and any other number.

const PAD = 56; // pixels left and right of the time axis, the slider's and the curves'
const PLOT = { height: 136, top: 18, base: 112 };
const DASHES = ["", "6 3", "2 3", "8 3 2 3"];

// A name as it can be seen; its spaces stay spaces.
const worded = (text, most) => cut(token(text).replaceAll("·", " "), most);

// First and last step of the axis: of what was observed, of other numbers, and of what the trainer
// logged.
function timeSpan() {
  const ends = (steps) => [steps[0], steps.at(-1)];
  let [low, high] = ends(data.steps);
  for (const key of numberKeys()) {
    const logged = data.entry(key, data.first(key)).axes.length > 0;
    for (const step of logged ? numbersOf(key).steps : ends(data.stepsOf(key))) {
      if (step < low) low = step;
      if (step > high) high = step;
    }
  }
  return low < high ? [low, high] : [low - 1, high + 1];
}

// Keys of all that is one number at a step.
function numberKeys() {
  return data.keys().filter((key) => key !== CHECKPOINT
    && ["", "update"].includes(data.entry(key, data.first(key)).axes.join()));
}

const numbers = new Map(); // key -> {version, steps, values}

function numbersOf(key) {
  const known = numbers.get(key), version = data.versionOf(key);
  if (known?.version === version) return known;
  let points = [];
  for (const step of data.stepsOf(key)) {
    const entry = data.entry(key, step), values = data.values(key, step) ?? [];
    const names = entry.axes.length ? entry.labels.update : [step];
    values.forEach((value, i) => points.push([Number(names?.[i] ?? step), value]));
  }
  points = points.filter(([step]) => Number.isFinite(step)).sort((a, b) => a[0] - b[0]);
  const one = { version, steps: points.map(([step]) => step), values: points.map(([, v]) => v) };
  numbers.set(key, one);
  return one;
}

// How the training goes, and how likely the answer of the shown probe has become.
function usualCurves() {
  const there = new Set(numberKeys());
  const answer = [...there].find((key) => parts(key).probe === state.probe
    && meaningOf(key).quantity === "answer_probability");
  return ["trainer/loss", "trainer/reward", answer].filter((key) => there.has(key));
}

// What is drawn: {name, unit, limits, steps, values, scale}. Curves of one scale share their range.
function chosenCurves() {
  const asked = state.curves ?? usualCurves(), there = new Set(numberKeys());
  const left = asked.find((key) => there.has(key)), lines = [];
  for (const key of asked.filter((one) => there.has(one))) {
    const { instrument, measure } = parts(key), { unit, limits } = data.entry(key, data.first(key));
    lines.push({ name: key, unit, limits, ...numbersOf(key),
      scale: key === left ? "left" : `${instrument}/${measure}` });
  }
  const leftMeasure = left && `${parts(left).instrument}/${parts(left).measure}`;
  for (const line of lines) if (line.scale === leftMeasure) line.scale = "left";
  return [...lines.filter((line) => line.scale === "left"), ...headCurves(),
    ...lines.filter((line) => line.scale !== "left")]
    .map((line, i) => ({ ...line, colour: LINES[i % LINES.length],
      dash: DASHES[Math.floor(i / LINES.length) % DASHES.length] }));
}

// The score of the head that is looked at, and of every pinned head.
function headCurves() {
  const same = ([layer, head]) => layer === state.layer && head === state.head;
  const heads = [[state.layer, state.head], ...state.pins.filter((pin) => !same(pin))];
  return heads.map(([layer, head]) => {
    const curve = scoreCurve(state.score, layer, head);
    return curve && { ...curve, name: curve.label, limits: curve.entry.limits, scale: "right" };
  }).filter(Boolean);
}

// The range of each scale, out to round numbers. What has an end on either side (a share, a score)
// is drawn from zero: else a change that says nothing would fill the plot.
function scalesOf(lines) {
  const scales = new Map();
  for (const { scale, values, limits } of lines) {
    const range = scales.get(scale) ?? { low: Infinity, high: -Infinity };
    const base = limits?.every(Number.isFinite) ? [Math.max(limits[0], Math.min(limits[1], 0))] : [];
    for (const value of [...base, ...values]) {
      if (!Number.isFinite(value)) continue;
      range.low = Math.min(range.low, value);
      range.high = Math.max(range.high, value);
    }
    scales.set(scale, range);
  }
  for (const range of scales.values()) {
    if (range.low > range.high) Object.assign(range, { low: 0, high: 0 });
    range.by = tickSize(range.low, range.high);
    if (range.by) {
      range.low = Math.floor(range.low / range.by + 1e-9) * range.by;
      range.high = Math.ceil(range.high / range.by - 1e-9) * range.by;
    }
  }
  return scales;
}

// The path of a line; where steps are denser than pixels, the least and most of each pixel.
function pathOf({ steps, values }, x, y) {
  let path = "", dots = "", open = false, i = 0;
  while (i < steps.length) {
    const column = Math.round(x(steps[i])), kept = [];
    let low = -1, high = -1, end = i;
    for (; end < steps.length && Math.round(x(steps[end])) === column; end++) {
      if (!Number.isFinite(values[end])) continue;
      if (low < 0 || values[end] < values[low]) low = end;
      if (high < 0 || values[end] > values[high]) high = end;
    }
    if (end - i < 3) for (let j = i; j < end; j++) kept.push(j);
    else if (low >= 0) kept.push(...new Set([low, high].sort((a, b) => a - b)));
    for (const j of kept) {
      if (!Number.isFinite(values[j])) {
        open = false;
        continue;
      }
      const point = `${x(steps[j]).toFixed(1)} ${y(values[j]).toFixed(1)}`;
      const alone = !open && (j + 1 >= steps.length || !Number.isFinite(values[j + 1]));
      if (alone) dots += `M${point}h0`;
      path += `${open ? "L" : "M"}${point}`;
      open = true;
    }
    i = end;
  }
  return { path, dots };
}

// The plot: `draw(lines)` all of it, `mark(step, other)` only where one is.
function plotOf(root) {
  let lines = [], span = [0, 1], width = 0, marked = "[]";
  const still = svg("g"), now = markLine("now"), other = markLine("other");
  const hovered = svg("line", { class: "hovered", y1: PLOT.top, y2: PLOT.base,
    visibility: "hidden" });
  const events = svg("g");
  root.setAttribute("height", PLOT.height);
  root.append(still, hovered, other, now, events);

  const x = (step) => PAD + ((step - span[0]) / (span[1] - span[0])) * (width - 2 * PAD);
  const stepAt = (offset) => span[0] + ((offset - PAD) / (width - 2 * PAD)) * (span[1] - span[0]);

  function draw(chosen) {
    lines = chosen;
    width = root.clientWidth;
    span = timeSpan();
    const scales = scalesOf(lines);
    still.replaceChildren(...timeAxis(x, span, width), ...valueAxis(lines, scales, "left", width),
      ...valueAxis(lines, scales, "right", width));
    for (const line of [...lines].reverse()) {
      const { low, high } = scales.get(line.scale);
      line.range = [low, high];
      const y = (value) => (high > low
        ? PLOT.base - 4 - ((value - low) / (high - low)) * (PLOT.base - PLOT.top - 8)
        : (PLOT.base + PLOT.top) / 2);
      const { path, dots } = pathOf(line, x, y);
      const props = { fill: "none", stroke: line.colour, "stroke-linejoin": "round" };
      still.append(
        svg("path", { ...props, d: path, "stroke-width": 1.6, "stroke-dasharray": line.dash }),
        svg("path", { ...props, d: dots, "stroke-width": 5, "stroke-linecap": "round" }));
    }
    const said = eventsSaid();
    const drawn = JSON.stringify([...said].map(([step, words]) => [x(step), words]));
    if (drawn !== marked) events.replaceChildren(...eventMarks(said, x)); // else the focus would go
    marked = drawn;
  }
  function mark() {
    now.place(x(state.step), true);
    other.place(state.other === null ? 0 : x(state.other), state.other !== null);
  }
  function hover(step) {
    hovered.setAttribute("visibility", step === null ? "hidden" : "visible");
    if (step === null) return;
    hovered.setAttribute("x1", x(step));
    hovered.setAttribute("x2", x(step));
  }
  return { draw, mark, hover, stepAt, span: () => span };
}

function markLine(name) {
  const node = svg("line", { class: `at ${name}`, y1: PLOT.top - 2, y2: PLOT.base + 6 });
  node.place = (x, shown) => {
    node.setAttribute("visibility", shown ? "visible" : "hidden");
    node.setAttribute("x1", x);
    node.setAttribute("x2", x);
  };
  return node;
}

function textAt(x, y, anchor, words, props = {}) {
  const node = svg("text", { x, y, "text-anchor": anchor, ...props });
  node.textContent = words;
  return node;
}

// The line, a tick at each observed step, and numbers where there is room.
function timeAxis(x, [low, high], width) {
  const nodes = [svg("path", { class: "axis", d: `M${PAD} ${PLOT.base}H${width - PAD}` })];
  let ticks = "", last = -Infinity;
  for (const step of data.steps) {
    if (x(step) - last < 2) continue;
    last = x(step);
    ticks += `M${last.toFixed(1)} ${PLOT.base}v5`;
  }
  nodes.push(svg("path", { class: "axis ticks", d: ticks }));
  const rough = ((high - low) / Math.max(1, (width - 2 * PAD) / 80)) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const by = Math.max(1, [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough));
  for (let step = Math.ceil(low / by) * by; step <= high; step += by) {
    nodes.push(textAt(x(step), PLOT.base + 17, "middle", String(step)));
  }
  nodes.push(textAt(width - 2, PLOT.base + 17, "end", "step"));
  return nodes;
}

// Numbers and unit of the left or the right axis.
function valueAxis(lines, scales, side, width) {
  const mine = lines.filter((line) => line.scale === side);
  if (!mine.length) return [];
  const { low, high, by } = scales.get(side), left = side === "left";
  const at = left ? PAD - 6 : width - PAD + 6, anchor = left ? "end" : "start";
  const title = side === "left" ? mine[0].name : state.score;
  // Half the width, at some 6 px a letter: the other axis has its title beside it.
  const letters = Math.max(10, Math.min(60, Math.floor(width / 12) - mine[0].unit.length - 2));
  const nodes = [textAt(left ? 2 : width - 2, 11, left ? "start" : "end",
    `${worded(title, letters)}, ${mine[0].unit}`)];
  const room = PLOT.base - PLOT.top - 8;
  for (const value of by ? ticks(low, high) : [low]) {
    const y = PLOT.base - 4 - (by ? (value - low) / (high - low) : 0.5) * room;
    nodes.push(textAt(at, y + 3.5, anchor, by ? tickText(value, by) : fmt(value)),
      svg("path", { class: "axis", d: `M${left ? PAD - 4 : width - PAD} ${y}h4` }));
  }
  return nodes;
}

// Step -> what happened there, in sentences.
function eventsSaid() {
  const said = new Map();
  for (const key of data.keys()) {
    if (data.entry(key, data.first(key)).axes.join() !== "event") continue;
    for (const step of data.stepsOf(key)) {
      const entry = data.entry(key, step), sentences = entry.texts ?? entry.labels.event ?? [];
      if (sentences.length) said.set(step, [...(said.get(step) ?? []), ...sentences]);
    }
  }
  return said;
}

// A triangle at each step with events; it says them when pointed at, and goes there when clicked.
function eventMarks(said, x) {
  return [...said].map(([step, sentences]) => {
    const lines = [`step ${step}`, ...sentences.map((text) => cut(text, 300))];
    const node = svg("path", { class: "event", d: `M${x(step)} ${PLOT.base - 9}l5 9h-10z`,
      tabindex: 0, role: "button", "aria-label": lines.join(". ") });
    const show = () => {
      const box = node.getBoundingClientRect();
      tip.show({ clientX: box.right, clientY: box.bottom }, ...lines);
    };
    const choose = (event) => {
      event.stopPropagation();
      set({ step });
      say(lines.join(". "));
    };
    node.addEventListener("mousemove", (event) => { event.stopPropagation(); show(); });
    node.addEventListener("mouseleave", tip.hide);
    node.addEventListener("focus", () => { if (node.matches(":focus-visible")) show(); });
    node.addEventListener("blur", tip.hide);
    node.addEventListener("click", choose);
    node.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      choose(event);
    });
    return node;
  });
}
