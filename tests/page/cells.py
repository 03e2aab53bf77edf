"""Pointing at the cells of a canvas, and what is said there, without knowing how it is laid out."""

import re

MINUS = "\u2212"

_WALK = """([selector, pattern, every]) => {
  const canvas = document.querySelector(selector), box = canvas.getBoundingClientRect();
  const tip = document.getElementById("tip"), says_ = new RegExp(pattern, "s");
  const at = (x, y) => {
    const place = { clientX: box.left + x, clientY: box.top + y };
    canvas.dispatchEvent(new MouseEvent("mousemove", place));
    // Not innerText: it would lay the page out each time.
    const lines = [...tip.children].map((line) => line.textContent);
    return tip.hidden ? null : lines.join("\\n").match(says_);
  };
  const runs = (walk, group) => {
    const found = new Map();
    walk((place, match) => {
      if (!match) return;
      const name = match[group];
      if (!found.has(name)) found.set(name, [place, place]);
      found.get(name)[1] = place;
    });
    return [...found];
  };
  const { width, height } = box, corner = [width - 6, height - 6];
  const rows = runs((see) => { for (let y = 0; y < height; y++) see(y, at(corner[0], y)); }, 1);
  const columns = runs((see) => { for (let x = 0; x < width; x++) see(x, at(x, corner[1])); }, 2);
  const says = rows.map(([, [y0, y1]], row) => columns.map(([, [x0, x1]], column) => {
    if (row % every || column % every) return null;
    at((x0 + x1) / 2, (y0 + y1) / 2);
    return [...tip.children].map((line) => line.textContent);
  }));
  // Of a copy: a canvas that is read often warns, and is drawn otherwise from then on.
  const ratio = canvas.width / width, copy = new OffscreenCanvas(canvas.width, canvas.height);
  const context = copy.getContext("2d", { willReadFrequently: true });
  canvas.dispatchEvent(new MouseEvent("mouseleave"));
  context.drawImage(canvas, 0, 0);
  const colours = rows.map(([, [y0, y1]]) => columns.map(([, [x0, x1]]) =>
    [...context.getImageData(((x0 + x1) / 2) * ratio, ((y0 + y1) / 2) * ratio, 1, 1).data]));
  return { rows, columns, says, colours };
}"""


class Cells:
    """The cells of a canvas: names of rows and columns, what hovering says, where they are.

    Args:
        pattern: a regular expression with two groups, the names of row and column, of the tip.
        every: hover over every n-th cell of every n-th row only.
    """

    def __init__(self, page, selector, pattern, *, every=1):
        found = page.evaluate(_WALK, [selector, pattern, every])
        self.page, self.selector = page, selector
        self.rows = [name for name, _ in found["rows"]]
        self.columns = [name for name, _ in found["columns"]]
        self.says, self.colours = found["says"], found["colours"]
        self._places = [[tuple(place) for _, place in found[axis]] for axis in ("rows", "columns")]

    def centre(self, row, column):
        """Pixels from the canvas's left and top."""
        y, x = (sum(places[i]) / 2 for places, i in zip(self._places, (row, column), strict=True))
        return {"x": x, "y": y}

    def click(self, row, column, **options):
        at = self.centre(row, column)
        self.page.locator(self.selector).first.click(position=at, **options)

    def hover(self, row, column):
        self.page.locator(self.selector).first.hover(position=self.centre(row, column))
        return tip(self.page)


def tip(page):
    """The lines of the tooltip, or nothing."""
    return page.evaluate(
        "[...document.querySelectorAll('#tip:not([hidden]) > div')].map(line => line.textContent)"
    )


def number(text):
    """What a number on the page stands for, and half of its last digit."""
    if text == "not a number":
        return float("nan"), 0.0
    text = text.replace(MINUS, "-")
    digits = re.fullmatch(r"[+-]?\d+(?:\.(\d+))?(?:e([+-]?\d+))?", text)
    assert digits, text
    last = int(digits[2] or 0) - len(digits[1] or "")
    return float(text), 0.5 * 10.0**last


def is_said(text, value):
    """Whether a number on the page is this one, to half of its last digit and to half a percent."""
    shown, half = number(text)
    if value != value:
        return shown != shown
    off = abs(shown - float(value))
    return off <= half * (1 + 1e-5) and off <= 0.005 * abs(float(value))


STOPS = {
    "sequential": "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725",
    "light": "053061 1460a5 3c8ebd 8ec1da d0e4ef f7f7f7 fcdac6 f6a784 d8624f b71f2f 67001f",
    "dark": "b1ddfc 73b6de 3c8dc1 226597 1c3e5b 1c1c1c 5f2c28 9e453a d8624f e99b79 f2d1bd",
}


def colour(share, stops):
    """Of a share 0..1 of a colour map: red, green and blue, not rounded."""
    rgb = [[int(h[i : i + 2], 16) for i in (0, 2, 4)] for h in STOPS[stops].split()]
    low = min(int(share * (len(rgb) - 1)), len(rgb) - 2)
    part = share * (len(rgb) - 1) - low
    return [a + (b - a) * part for a, b in zip(rgb[low], rgb[low + 1], strict=True)]
