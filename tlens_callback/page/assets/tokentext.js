// Shows tokens as a text that reads as one, each token coloured and telling its numbers.

const TOKEN_SPAN = el("span", { class: "t", role: "option", tabindex: -1 });

// A token as it reads: spaces are spaces, a line break is seen and breaks the line.
const readable = (text) => text.split("\n").map(visible).join("↵\n").replaceAll("\\u0009", "⇥");

const readableTokens = new Map(); // the same tokens come again and again

function readableToken(text) {
  if (readableTokens.size > 50_000) readableTokens.clear();
  if (!readableTokens.has(text)) readableTokens.set(text, readable(text));
  return readableTokens.get(text);
}

const SPLIT_AT_FIRST = 200; // tokens: as many as are seen before one scrolls

// `tell(i, name)` gives the lines that pointing at token i shows. Until `split` it is a plain text,
// which costs little where nobody looks; so is the end of a long one until it is scrolled to.
function tokenText(label, tell) {
  const root = el("div", { class: "tokentexts", role: "listbox", dir: "auto", "aria-label": label });
  let tokens = [], words = [], spans = [], tabbed = 0, pointed = null, turn = 0, scrolled = false, rgbOf = () => null;

  // `at`: a line is drawn before this token, where it is not the first.
  function put(given, at = 0) {
    tokens = given;
    turn = at;
    words = joinedBytes(tokens);
    spans = [];
    pointed = null;
    tabbed = 0;
    root.textContent = plainFrom(0);
    if (scrolled) root.scrollTop = 0; // asked of each text, it would lay the page out each time
    scrolled = false;
  }
  const plainFrom = (i) => words.slice(i).map(readableToken).join("");

  // Makes the tokens up to `end` ones that can be pointed at, if they are none yet.
  function split(end = SPLIT_AT_FIRST) {
    const from = spans.length, to = Math.min(end, words.length);
    if (to <= from) return;
    const all = document.createDocumentFragment();
    for (let i = from; i < to; i++) {
      const span = TOKEN_SPAN.cloneNode(), word = words[i];
      const later = word === "" && tokens[i] !== ""; // its character stands at an earlier token
      if (later) span.classList.add("later");
      else span.textContent = word === "" ? "∅" : readableToken(word);
      span.at = i;
      if (turn && i === turn) all.append(el("div", { class: "turn" }));
      all.append(span);
      spans.push(span);
    }
    spans[tabbed].tabIndex = 0;
    if (to < words.length) all.append(plainFrom(to));
    if (from) root.lastChild.replaceWith(all);
    else root.replaceChildren(all);
    for (let i = from; i < to; i++) paintToken(spans[i], rgbOf(i));
  }
  function paintToken(span, rgb) {
    const back = rgb ? css(rgb) : "";
    if (span.back === back) return;
    span.back = back;
    span.style.background = back;
    span.style.color = rgb ? inkOn(rgb) : "";
  }
  // `rgbAt(i)`: [red, green, blue], or null for a token without a value.
  function colour(rgbAt) {
    rgbOf = rgbAt;
    spans.forEach((span, i) => paintToken(span, rgbAt(i)));
    if (pointed) tip.show(pointed.event, ...lines(pointed.at)); // the step may move under the mouse
  }
  const nameAt = (i) => (words[i] === tokens[i] ? token(tokens[i])
    : `${token(tokens[i])} of ${token(words.slice(0, i + 1).findLast((word) => word !== "") ?? "")}`);
  const lines = (i) => tell(i, cut(nameAt(i), 200)).map((line) => cut(line, 300));

  function focus(i) {
    if (i >= spans.length) split(Infinity);
    spans[tabbed].tabIndex = -1;
    tabbed = within(i, spans.length);
    spans[tabbed].tabIndex = 0;
    spans[tabbed].focus();
  }
  root.addEventListener("mouseover", (event) => {
    if (event.target.at === undefined) return;
    pointed = { at: event.target.at, event: { clientX: event.clientX, clientY: event.clientY } };
    tip.show(pointed.event, ...lines(pointed.at));
  });
  root.addEventListener("mouseleave", () => {
    pointed = null;
    tip.hide();
  });
  root.addEventListener("focusin", ({ target }) => {
    if (target.at === undefined) return;
    const box = target.getBoundingClientRect(), told = lines(target.at);
    tip.show({ clientX: box.left, clientY: box.bottom - 8 }, ...told);
    say(told.join("; "));
  });
  root.addEventListener("focusout", tip.hide);
  root.addEventListener("scroll", () => {
    scrolled = true;
    if (spans.length) split(Infinity);
  });
  root.addEventListener("keydown", (event) => {
    if (!spans.length || !bare(event)) return;
    const by = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (by) focus(tabbed + by);
    else if (event.key === "ArrowUp" || event.key === "ArrowDown") focus(nextLine(spans, tabbed, event.key === "ArrowDown"));
    else if (event.key === "Escape") tip.hide();
    else return;
    event.preventDefault();
  });
  return { root, put, split, colour };
}
