// Explorer of the chapter wav2pos: switch microphones off, hide positions, hear the talker's own
// sound or not, and see where the net puts her. The first part is pure; the second draws.

export const STATES = ["on", "position hidden", "off"];
const ON = 0, HIDDEN = 1, OFF = 2;

// At least four microphones that hear and two whose positions are known: what the net has met.
export const allowed = states =>
  states.filter(s => s !== OFF).length >= 4 && states.filter(s => s === ON).length >= 2;

// The states after a microphone went on to the next one that is allowed.
export function turned(states, k) {
  for (const step of [1, 2]) {
    const next = states.map((s, i) => i === k ? (s + step) % 3 : s);
    if (allowed(next)) return next;
  }
  return states;
}

export const name_of = (states, emitted) => states.join("") + (emitted ? "k" : "u");

export const distance = (a, b) => Math.hypot(...a.map((v, i) => v - b[i]));

// The talker's place and those of the hidden microphones, m, from a table in cm.
export function looked_up(answers, states, emitted) {
  const flat = answers[name_of(states, emitted)], points = [];
  for (let i = 0; i < flat.length; i += 3) points.push(flat.slice(i, i + 3).map(v => v / 100));
  return points;
}

// What is said below the picture.
export function told(scene, states, found) {
  const cm = (a, b) => `${Math.round(100 * distance(a, b))} cm`;
  const hidden = states.flatMap((s, k) => s === HIDDEN ? [k] : []);
  return [`The talker is put ${cm(found[0], scene.talker)} from where she is.`,
          ...hidden.map((k, i) => `Microphone ${k} is put ${cm(found[i + 1], scene.mics[k])} from ` +
                                  "where it is.")].join(" ");
}

// A model without Python: it answers from the table.
export function fixed_model(scene, answers) {
  const values = {scene, states: scene.mics.map(() => ON), emitted: false}, listeners = [];
  const answer = () => { values.found = looked_up(answers, values.states, values.emitted); };
  answer();
  return {get: name => values[name], set: (name, value) => { values[name] = value; },
          save_changes: () => { answer(); listeners.forEach(f => f()); },
          on: (event, f) => { if (event === "change:found") listeners.push(f); }};
}

const NS = "http://www.w3.org/2000/svg", SCALE = 56, EDGE = 22;
const COLORS = ["#0072B2", "#E69F00", "#888888"];

// A view of the room: `up` is the axis that points up in the picture (1 from above, 2 from a side).
function view(scene, states, found, up, title) {
  const [width, height] = [scene.size[0] * SCALE, scene.size[up] * SCALE];
  const X = p => EDGE + SCALE * p[0], Y = p => EDGE + height - SCALE * p[up];
  const svg = document.createElementNS(NS, "svg");
  svg.setAttribute("viewBox", `0 0 ${width + 2 * EDGE} ${height + 2 * EDGE}`);
  svg.setAttribute("width", width + 2 * EDGE);
  svg.setAttribute("role", "img"); svg.setAttribute("aria-label", title);
  svg.style.maxWidth = "100%";
  const add = (tag, attributes, text = "") => {
    const node = document.createElementNS(NS, tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.textContent = text; svg.append(node); return node;
  };
  const line = (p, q, color) => add("line", {x1: X(p), y1: Y(p), x2: X(q), y2: Y(q), stroke: color});
  const cross = (p, color, r) => {
    for (const s of [1, -1])
      add("line", {x1: X(p) - r, y1: Y(p) - s * r, x2: X(p) + r, y2: Y(p) + s * r, stroke: color,
                   "stroke-width": 2.5});
  };
  add("text", {x: EDGE, y: 14, "font-size": 13, fill: "currentColor"}, title);
  add("rect", {x: EDGE, y: EDGE, width, height, fill: "none", stroke: "currentColor"});
  const hidden = states.flatMap((s, k) => s === HIDDEN ? [k] : []);
  hidden.forEach((k, i) => {
    line(scene.mics[k], found[i + 1], COLORS[HIDDEN]);
    const r = 5;
    add("rect", {x: X(found[i + 1]) - r, y: Y(found[i + 1]) - r, width: 2 * r, height: 2 * r,
                 fill: "none", stroke: COLORS[HIDDEN], "stroke-width": 2});
  });
  scene.mics.forEach((p, k) => {
    add("circle", {cx: X(p), cy: Y(p), r: 8, stroke: COLORS[states[k]], "stroke-width": 2,
                   fill: states[k] === ON ? COLORS[ON] : "none", "data-mic": k});
    add("text", {x: X(p), y: Y(p) + 4, "font-size": 11, "text-anchor": "middle",
                 "pointer-events": "none", fill: states[k] === ON ? "white" : "currentColor"}, k);
  });
  line(scene.talker, found[0], "currentColor");
  add("circle", {cx: X(scene.talker), cy: Y(scene.talker), r: 6, fill: "#D55E00"});
  cross(found[0], "currentColor", 6);
  return svg;
}

export function render({model, el}) {
  const scene = model.get("scene"), make = (tag, parent) => {
    const node = document.createElement(tag); parent.append(node); return node;
  };
  const pictures = make("div", el), row = make("div", el), note = make("p", el);
  note.setAttribute("aria-live", "polite");
  const change = (name, value) => { model.set(name, value); model.save_changes(); };
  const next = k => change("states", turned(model.get("states"), k));
  const buttons = scene.mics.map((_, k) => {
    const button = make("button", row);
    button.type = "button"; button.style.margin = "2px";
    button.addEventListener("click", () => next(k));
    return button;
  });
  const label = make("label", row), box = document.createElement("input");
  box.type = "checkbox"; label.style.display = "block";
  label.append(box, " her sound and its time are known");
  box.addEventListener("change", () => change("emitted", box.checked));
  const draw = () => {
    const states = model.get("states"), found = model.get("found");
    if (found.length !== 1 + states.filter(s => s === HIDDEN).length) return;  // not answered yet
    pictures.replaceChildren(view(scene, states, found, 1, "from above"),
                             view(scene, states, found, 2, "from the side"));
    for (const circle of pictures.querySelectorAll("[data-mic]")) {
      circle.style.cursor = "pointer";
      circle.addEventListener("click", () => next(Number(circle.dataset.mic)));
    }
    buttons.forEach((button, k) => {
      button.textContent = `microphone ${k}: ${STATES[states[k]]}`;
      button.style.borderColor = COLORS[states[k]];
    });
    box.checked = model.get("emitted");
    note.textContent = told(scene, states, found);
  };
  model.on("change:found", draw);
  draw();
}

export default {render};
