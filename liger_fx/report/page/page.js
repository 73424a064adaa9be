"use strict";
/* The tree, the search, the filters and the chosen site. Text from the report is only ever set as
   text (textContent), never as markup. */

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const body = document.querySelector("#tree tbody");
const state = {
  words: [], rules: new Set(), refused: false,
  open: new Set(), unfolded: new Set(), chosen: null, active: null,
};

/* -- what is shown ------------------------------------------------------------------------------ */

const join = (path, name) => (path ? path + "." + name : name);
const filtering = () => state.words.length > 0 || state.rules.size > 0 || state.refused;

function kindFits(kind) {
  return (!state.rules.size || state.rules.has(kind.rule)) && (!state.refused || kind.refused);
}

/* The paths of a kind's sites that the search finds. */
function pathsFound(kind) {
  return kind.paths.filter((path) => {
    const text = (path + " " + kind.text).toLowerCase();
    return state.words.every((word) => text.includes(word));
  });
}

function fits(node, path) {
  const kinds = node.kinds.map((i) => data.kinds[i]).filter(kindFits);
  if ((state.rules.size || state.refused) && !kinds.length) return false;
  const text = [path, node.before, node.after, ...kinds.map((k) => k.text)].join(" ").toLowerCase();
  return state.words.every((word) => text.includes(word));
}

function fitsBelow(node, path) {
  return fits(node, path) || node.below.some((child) => child.names.some(
    (name) => fitsBelow(child, join(path, name))));
}

/* Every row to show, outermost first: {key, path, name, level, node, count, open, hasBelow}. */
function rows() {
  const found = [];
  const visit = (node, name, parent, level, count) => {
    const path = level === 1 ? "" : join(parent, name);
    const key = path + (count > 1 ? "*" : "");
    const open = filtering() ? !state.open.has("-" + key) : state.open.has(key);
    const row = { key, path, name, level, node, count, open, hasBelow: node.below.length > 0 };
    found.push(row);
    if (!open) return;
    for (const child of node.below) visitNames(child, path, level + 1);
  };
  const visitNames = (child, parent, level) => {
    const all = child.names;
    const wanted = filtering() ? all.filter((n) => fitsBelow(child, join(parent, n))) : all;
    if (!wanted.length) return;
    const key = join(parent, all[0]) + "*";
    if (all.length === 1 || (wanted.length < all.length && !state.unfolded.has(key))) {
      for (const name of wanted) visit(child, name, parent, level, 1);
    } else if (!state.unfolded.has(key)) {
      visit(child, all[0], parent, level, all.length);
    } else {
      found.push({ key, path: join(parent, all[0]), name: all[0], level, node: child,
        count: all.length, open: true, hasBelow: true, unfolded: true });
      for (const name of wanted) visit(child, name, parent, level + 1, 1);
    }
  };
  visit(data.tree, "model", "", 1, 1);
  return found;
}

/* -- the tree ----------------------------------------------------------------------------------- */

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.append(...highlighted(text));
  return made;
}

function highlighted(text) {
  const parts = [];
  let rest = text;
  while (rest) {
    const places = state.words.map((w) => [rest.toLowerCase().indexOf(w), w]).filter(([i]) => i >= 0);
    if (!places.length) break;
    const [at, word] = places.reduce((a, b) => (b[0] < a[0] ? b : a));
    const mark = document.createElement("mark");
    mark.textContent = rest.slice(at, at + word.length);
    parts.push(rest.slice(0, at), mark);
    rest = rest.slice(at + word.length);
  }
  return [...parts, rest];
}

function ranges(names) {
  const numbers = names.map(Number);
  const runs = [];
  for (const n of numbers) {
    const last = runs[runs.length - 1];
    if (last && n === last[1] + 1) last[1] = n; else runs.push([n, n]);
  }
  return runs.map(([a, b]) => (a === b ? `${a}` : `${a}–${b}`)).join(",");
}

function classCell(text, className) {
  const cell = element("td", className);
  cell.setAttribute("role", "gridcell");
  if (!text) return cell;
  cell.title = text;
  const at = text.indexOf("(");
  cell.append(element("span", "", at < 0 ? text : text.slice(0, at)));
  if (at >= 0) cell.append(element("span", "extra", text.slice(at)));
  return cell;
}

function rowElement(row) {
  const { node } = row;
  const line = document.createElement("tr");
  line.setAttribute("role", "row");
  line.setAttribute("aria-level", row.level);
  if (row.hasBelow) line.setAttribute("aria-expanded", row.open);
  line.dataset.key = row.key;
  line.dataset.path = row.path;
  line.style.setProperty("--level", row.level - 1);
  const name = element("td");
  name.setAttribute("role", "gridcell");
  name.append(element("span", row.hasBelow ? "twist" : "twist leaf"));
  const kinds = node.kinds.map((i) => data.kinds[i]);
  const isBlock = node.block !== null && !row.unfolded;
  if ((kinds.length && !row.unfolded) || isBlock) {
    line.setAttribute("aria-selected", state.chosen === row.path);
  }
  if (kinds.length && !row.unfolded) {
    line.classList.add("site");
    const refused = kinds.some((kind) => kind.refused);
    const dot = element("span", refused ? "dot warn" : "dot");
    dot.setAttribute("role", "img");
    dot.setAttribute("aria-label", refused ? "a refused site" : "a rewritten site");
    name.append(dot);
  }
  name.append(element("span", "name", row.count > 1 ? ranges(node.names) : row.name));
  if (row.count > 1) {
    const times = element("button", "times", `${row.count} ×`);
    times.type = "button";
    times.tabIndex = -1;
    times.setAttribute("aria-label", row.unfolded
      ? `Fold ${row.count} alike modules` : `Unfold ${row.count} alike modules`);
    name.append(times);
  }
  if (isBlock) {
    const graph = element("button", "block", "graph");
    graph.type = "button";
    graph.tabIndex = -1;
    graph.setAttribute("aria-label", "Show the graph of this block");
    name.prepend(graph);
  }
  if (row.unfolded) {
    line.append(name, classCell(""), classCell(""));
  } else {
    const same = node.before === node.after;
    line.classList.toggle("changed", !same && Boolean(node.after));
    line.append(name, classCell(node.before, node.after ? "" : "gone"));
    line.append(same ? classCell("=", "same") : classCell(node.after));
  }
  return line;
}

function draw(focus) {
  const shown = rows();
  if (!shown.some((row) => row.key === state.active)) state.active = shown[0].key;
  body.replaceChildren(...shown.map(rowElement));
  for (const line of body.rows) line.tabIndex = line.dataset.key === state.active ? 0 : -1;
  if (focus) activeRow().focus();
  let sites = 0;
  for (const line of document.querySelectorAll("#sites tbody tr")) {
    const kind = data.kinds[line.dataset.kind];
    const paths = kindFits(kind) ? pathsFound(kind) : [];
    line.hidden = !paths.length;
    sites += paths.length;
  }
  byId("found").textContent = !filtering() ? "" : sites === 1 ? "1 site" : `${sites} sites`;
}

const activeRow = () => [...body.rows].find((line) => line.dataset.key === state.active);
const rowOf = (line) => rows().find((row) => row.key === line.dataset.key);

function setOpen(row, open) {
  if (row.unfolded) { if (!open) fold(row); return; }
  const key = filtering() ? "-" + row.key : row.key;
  if (open !== filtering()) state.open.add(key); else state.open.delete(key);
  draw(true);
}

function fold(row) {
  if (state.unfolded.has(row.key)) state.unfolded.delete(row.key); else state.unfolded.add(row.key);
  state.active = row.key;
  draw(true);
}

/* -- the chosen site ---------------------------------------------------------------------------- */

function choose(kinds, path, block) {
  state.chosen = path;
  for (const article of document.querySelectorAll("#panel article")) {
    const isBlock = article.dataset.block !== undefined;
    article.hidden = isBlock
      ? Number(article.dataset.block) !== block : !kinds.includes(Number(article.dataset.kind));
    if (article.hidden) continue;
    article.querySelector(".path").textContent = path || "the model";
    if (isBlock) continue;
    const verified = article.querySelector(".verified");
    const told = data.verified[path];
    verified.hidden = told === undefined;
    verified.textContent = told === undefined ? "" : `verified: ${told}`;
  }
  for (const line of document.querySelectorAll("#sites tbody tr")) {
    line.classList.toggle("chosen", kinds.includes(Number(line.dataset.kind)));
  }
  document.querySelector("#panel .empty").hidden = true;
  byId("panel").scrollTop = 0;
  for (const line of body.rows) {
    if (line.hasAttribute("aria-selected")) {
      line.setAttribute("aria-selected", line.dataset.path === path);
    }
  }
}

function chooseBlock(row) {
  if (row.node.block !== null && !row.unfolded) choose([], row.path, row.node.block);
}

function chooseRow(row) {
  if (row.node.kinds.length && !row.unfolded) choose(row.node.kinds, row.path);
}

/* -- mouse and keyboard ------------------------------------------------------------------------- */

body.addEventListener("click", (event) => {
  const line = event.target.closest("tr");
  const row = rowOf(line);
  state.active = row.key;
  if (event.target.closest(".block")) return chooseBlock(row);
  if (event.target.closest(".times")) return fold(row);
  if (event.target.closest(".twist") || !row.node.kinds.length || row.unfolded) {
    if (row.hasBelow) return setOpen(row, !row.open);
  } else {
    chooseRow(row);
  }
  for (const other of body.rows) other.tabIndex = other === line ? 0 : -1;
  line.focus();
});

body.addEventListener("keydown", (event) => {
  const line = event.target.closest("tr");
  const row = rowOf(line);
  const to = (target) => {
    if (!target) return;
    line.tabIndex = -1;
    target.tabIndex = 0;
    state.active = target.dataset.key;
    target.focus();
  };
  const parent = () => {
    let above = line.previousElementSibling;
    while (above && above.ariaLevel >= row.level) above = above.previousElementSibling;
    return above;
  };
  const actions = {
    ArrowDown: () => to(line.nextElementSibling),
    ArrowUp: () => to(line.previousElementSibling),
    Home: () => to(body.rows[0]),
    End: () => to(body.rows[body.rows.length - 1]),
    ArrowRight: () => {
      if (row.hasBelow && !row.open) setOpen(row, true); else if (row.open) to(line.nextElementSibling);
    },
    ArrowLeft: () => { if (row.hasBelow && row.open) setOpen(row, false); else to(parent()); },
    Enter: () => (row.node.kinds.length ? chooseRow(row) : setOpen(row, !row.open)),
    " ": () => (row.node.kinds.length ? chooseRow(row) : setOpen(row, !row.open)),
    u: () => { if (row.count > 1) fold(row); },
    g: () => chooseBlock(row),
  };
  const action = event.ctrlKey || event.metaKey || event.altKey ? undefined : actions[event.key];
  if (!action) return;
  event.preventDefault();
  action();
});

byId("search").addEventListener("input", (event) => {
  state.words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const key of state.open) if (key.startsWith("-")) state.open.delete(key);
  draw();
});
document.querySelector(".tools").addEventListener("submit", (event) => event.preventDefault());

for (const button of document.querySelectorAll(".filter")) {
  button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", on);
    if (button.id === "refused") state.refused = on;
    else if (on) state.rules.add(button.dataset.rule);
    else state.rules.delete(button.dataset.rule);
    draw();
  });
}

byId("unfold").addEventListener("click", (event) => {
  const all = event.target.textContent === "Unfold all";
  state.unfolded.clear();
  const visit = (node, parent, level) => {
    for (const name of node.names) {
      const path = level === 1 ? "" : join(parent, name);
      state.open.add(path);
      if (node.names.length > 1) state.unfolded.add(join(parent, node.names[0]) + "*");
      for (const child of node.below) visit(child, path, level + 1);
    }
  };
  if (all) visit(data.tree, "", 1); else start();
  event.target.textContent = all ? "Fold all" : "Unfold all";
  draw();
});

byId("sites")?.addEventListener("click", (event) => {
  const line = event.target.closest("tbody tr");
  if (!line) return;
  const kind = Number(line.dataset.kind);
  choose([kind], pathsFound(data.kinds[kind])[0]);
  byId("panel").scrollIntoView({ block: "nearest" });
});

/* -- drawings ----------------------------------------------------------------------------------- */

function light(box, on) {
  const svg = box.closest("svg");
  for (const arrow of svg.querySelectorAll(".arrow")) {
    const touches = arrow.dataset.from === box.dataset.box || arrow.dataset.to === box.dataset.box;
    arrow.classList.toggle("near", on && touches);
  }
}
for (const box of document.querySelectorAll(".box")) {
  for (const name of ["mouseenter", "focus"]) box.addEventListener(name, () => light(box, true));
  for (const name of ["mouseleave", "blur"]) box.addEventListener(name, () => light(box, false));
}

const large = byId("large");
for (const button of document.querySelectorAll(".enlarge")) {
  button.addEventListener("click", () => {
    const home = button.closest("figure").querySelector(".canvas");
    const svg = home.firstElementChild;
    large.querySelector(".canvas").replaceChildren(svg);
    large.addEventListener("close", () => { home.append(svg); button.focus(); }, { once: true });
    large.showModal();
  });
}

/* -- colours ------------------------------------------------------------------------------------ */

const dark = matchMedia("(prefers-color-scheme: dark)");
function setTheme(name) {
  document.documentElement.dataset.theme = name;
  byId("theme").textContent = name === "dark" ? "Light" : "Dark";
}
byId("theme").addEventListener("click", () => {
  setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
});
dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
setTheme(dark.matches ? "dark" : "light");

/* -- start: open down to the first layer, show the first site ----------------------------------- */

function start() {
  state.open.clear();
  const visit = (node, parent, level) => {
    const name = node.names[0];
    const path = level === 1 ? "" : join(parent, name);
    const inside = level <= 2 || (node.names.length > 1 && level <= 5) || /\.\d+$/.test(path);
    if (inside || node.below.some((child) => child.names.length > 1)) {
      state.open.add(path + (node.names.length > 1 ? "*" : ""));
      node.below.forEach((child) => visit(child, path, level + 1));
    }
  };
  visit(data.tree, "", 1);
}
start();
draw();
if (data.kinds.length) choose([0], data.kinds[0].paths[0]);
