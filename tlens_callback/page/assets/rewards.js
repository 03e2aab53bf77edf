// Draws what a trainer that learns from rewards logs of them: reward by function, completion
// length, and how many completions were truncated. The names are those of TRL's trainers.

const LENGTHS = [["completions/mean_length", "mean"],
  ["completions/mean_terminated_length", "mean of those that ended by themselves"],
  ["completions/min_length", "shortest"], ["completions/max_length", "longest"]];
const SHARES = [["completions/clipped_ratio", "completions cut off at the longest allowed"],
  ["frac_reward_zero_std", "groups with equal rewards, which teach nothing"],
  ["rewards/accuracies", "pairs whose chosen answer has the higher reward"]];

// What is drawn: {title, unit, limits, lines: [{key, name, dash}]}, only charts that have a line.
function rewardCharts() {
  const logged = new Set(data.keys().filter((key) => parts(key).instrument === "trainer")
    .map((key) => parts(key).measure));
  const named = (pattern) => [...logged].map((name) => pattern.exec(name)).filter(Boolean);
  const byFunction = named(/^rewards\/(.+)\/mean$/).map(([name, of]) => [name, plain(of)]);
  const ofPairs = named(/^rewards\/([^/]+)$/).filter(([name]) => !SHARES.some(([one]) => one === name))
    .map(([name, of]) => [name, plain(of)]);
  const total = byFunction.length ? [["reward", "all together, weighted"]] : [];
  return [
    { title: "Reward by function", unit: "reward", lines: [...byFunction, ...total] },
    { title: "Reward", unit: "reward", lines: ofPairs },
    { title: "Completion length", unit: "tokens", lines: LENGTHS },
    { title: "Shares", unit: "fraction", limits: [0, 1], lines: SHARES },
  ].map((chart) => ({ ...chart, lines: ["", "eval_"].flatMap((before) => chart.lines
    .filter(([name]) => logged.has(before + name))
    .map(([name, words]) => ({ key: `trainer/${before}${name}`, dash: before ? "6 3" : "",
      name: words + (before ? ", in evaluation" : "") }))) }))
    .filter(({ lines }) => lines.length);
}

const hasRewards = () => data.keys().some((key) => {
  const { instrument, measure } = parts(key);
  return instrument === "trainer" && /^(eval_)?(rewards|completions)\//.test(measure);
});

function rewardsView(root) {
  const body = el("div", { class: "panels" });
  const box = el("details", { class: "card section", id: "rewards", open: true },
    el("summary", {}, el("h2", {}, "Rewards and completions")), body);
  box.addEventListener("toggle", () => redraw("data"));
  root.append(box);
  const charts = new Map(); // title -> chart

  function draw(changed) {
    if (!box.open || !["data", "step", "other", "theme"].some((name) => changed.has(name))) return;
    const wanted = rewardCharts();
    for (const { title, unit } of wanted) if (!charts.has(title)) charts.set(title, timeChart(title, unit));
    const shown = wanted.map(({ title }) => charts.get(title).root);
    if (shown.length !== body.children.length || shown.some((one, i) => body.children[i] !== one)) {
      body.replaceChildren(...shown);
    }
    for (const chart of wanted) charts.get(chart.title).update(chart, changed);
  }
  return { draw };
}

// Curves over the steps, on the axis of the slider. update({lines: [{key, name, dash}], limits}, changed)
function timeChart(title, unit) {
  const width = 330, height = 150, left = 46, right = 8, top = 8, bottom = 22;
  const still = svg("g"), now = svg("line", { class: "now" }), other = svg("line", { class: "now", "stroke-dasharray": "4 3" });
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img" }, still, other, now);
  const list = el("span", { class: "legends" });
  const root = el("figure", { class: "chart time-chart" },
    el("figcaption", {}, title, el("small", {}, unit)), list, picture);
  let lines = [], span = [0, 1], numbers = [];
  const x = (step) => left + ((step - span[0]) / (span[1] - span[0])) * (width - left - right);

  function update(chart, changed) {
    if (changed.has("data") || changed.has("theme") || !lines.length) rebuild(chart);
    mark(now, state.step);
    mark(other, state.other);
    lines.forEach((line, i) => write(numbers[i], fmt(pointAt(line, state.step).value)));
    picture.setAttribute("aria-label", `${title}, ${unit}, over the steps; `
      + lines.map((line) => `${line.name}: ${fmt(pointAt(line, state.step).value)}`).join("; "));
  }
  function mark(node, step) {
    node.setAttribute("visibility", step === null ? "hidden" : "visible");
    const at = { x1: x(step ?? 0), x2: x(step ?? 0), y1: top, y2: height - bottom };
    for (const [name, value] of Object.entries(at)) node.setAttribute(name, value);
  }
  function rebuild({ lines: asked, limits }) {
    lines = asked.map((line, i) => ({ ...line, ...numbersOf(line.key), colour: LINES[i % LINES.length],
      dash: line.dash || DASHES[Math.floor(i / LINES.length) % DASHES.length] }));
    span = timeSpan();
    let [low, high] = limits ?? rangeOf(lines.flatMap(({ values }) => Array.from(values)));
    if (low > high) [low, high] = [0, 1];
    if (low === high) [low, high] = [low - 0.5, high + 0.5];
    const by = tickSize(low, high);
    [low, high] = [Math.floor(low / by + 1e-9) * by, Math.ceil(high / by - 1e-9) * by];
    const y = (value) => top + 3 + (1 - (value - low) / (high - low)) * (height - top - bottom - 6);
    const drawn = ticks(low, high).flatMap((value) => [
      svg("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), class: value === 0 ? "zero" : "grid" }),
      words(left - 4, y(value) + 3, tickText(value, by), "end")]);
    drawn.push(words(left, height - 6, fmt(span[0]), "start"), words(width - right, height - 6, fmt(span[1]), "end"),
      words((left + width - right) / 2, height - 6, "step", "middle"));
    for (const line of lines) {
      const { path, dots } = pathOf(line, x, y), paint = { fill: "none", stroke: line.colour };
      drawn.push(svg("path", { ...paint, d: path, class: "line", "stroke-dasharray": line.dash }),
        svg("path", { ...paint, d: dots, "stroke-width": 5, "stroke-linecap": "round" }));
    }
    still.replaceChildren(...drawn);
    numbers = lines.map(() => el("b"));
    list.replaceChildren(...lines.map(({ name, key, colour, dash }, i) =>
      el("span", { class: "curve", title: key }, sampleOf(colour, dash), el("span", {}, name), numbers[i])));
  }
  const stepAt = (event) => nearest(span[0] + ((offsetIn(picture, event) - left) / (width - left - right)) * (span[1] - span[0]));
  picture.addEventListener("mousemove", (event) => {
    const step = stepAt(event);
    tip.show(event, `${title}, ${stepName(step)}`, ...lines.map((line) => {
      const found = pointAt(line, step);
      return `${line.name}: ${fmt(found.value)}` + (found.step === step || found.step === null ? "" : ` (step ${found.step})`);
    }));
  });
  picture.addEventListener("mouseleave", tip.hide);
  picture.addEventListener("click", (event) => set({ step: stepAt(event) }));
  return { root, update };
}
