// Gives steps the names of their checkpoints, if the run is a series of saved models.

const CHECKPOINT = "checkpoint/name"; // its only text is the name, often a path

function checkpointAt(step) { return data.entry(CHECKPOINT, step)?.texts?.[0] ?? ""; }

// "step 1 · fine-tune". A name that only says the step again is left out.
function stepName(step, most = 36) {
  const name = checkpointAt(step), last = name.split("/").filter(Boolean).at(-1);
  return !last || last === `checkpoint-${step}` ? `step ${step}`
    : `step ${step} · ${ending(visible(name), most)}`;
}

// The end of a path, which tells more than its beginning; from a folder on, where there is one.
function ending(text, most) {
  const letters = [...text.replace(/\/+$/, "")];
  if (letters.length <= most) return letters.join("");
  const end = letters.slice(letters.length - most + 1).join(""), folder = end.indexOf("/");
  return `…${folder >= 0 && folder < end.length - 1 ? end.slice(folder) : end}`;
}

// The whole names of these steps, for a title.
function wholeNames(...steps) {
  return steps.filter((step) => step !== null && checkpointAt(step))
    .map((step) => `step ${step}: ${visible(checkpointAt(step))}`).join("\n");
}

// One observation, and no more to come: there is nothing to play, to compare or to draw over time.
const isAlone = () => data.steps.length === 1 && data.about.done === true;
