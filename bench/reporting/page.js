"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const AXES = ["dataset", "model", "variant", "setting", "attack", "rate", "defense"];
const NAMES = { dataset: "data set", model: "architecture", variant: "swept", setting: "setting", attack: "attack", rate: "poison rate", defense: "defense" };
const ROWS = 100;
const $ = (id) => document.getElementById(id);

/** An element; texts become text nodes, so that no name is ever read as HTML. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== ""));
  return node;
}

const number = (value) => (value === null ? NaN : Number(value));
const columns = data.columns;
const index = Object.fromEntries(columns.map((column, i) => [column.name, i]));
const ACC = columns[index.clean_accuracy], ASR = columns[index.asr];
const cells = data.cells.map((cell, id) => {
  const place = Object.fromEntries(AXES.map((axis, i) => [axis, cell.place[i]]));
  return { ...cell, ...place, id, means: cell.means.map(number), stds: cell.stds.map(number), t95: (cell.t95 ?? []).map(number) };
});
const rankings = new Map(data.rankings.map((entry) => [JSON.stringify(entry.slice(0, 4)), entry[4]]));
const rowMarks = new Map(data.row_marks.map((entry) => [JSON.stringify(entry.slice(0, 6)), entry[6]]));
const values = Object.fromEntries(AXES.map((axis) => [axis, [...new Set(cells.map((cell) => cell[axis]))]]));
const attacks = values.attack;
const cleanAttacks = new Set(cells.filter((cell) => cell.clean).map((cell) => cell.attack));

/** The text of a figure as the other tables have it: of two equally near decimals, the even one. */
function fixed(x, decimals) {
  if (!Number.isFinite(x)) return String(x).replace("Infinity", "inf");
  const text = plain(x.toFixed(decimals));
  const tie = decimals === 0 ? Math.abs(x % 1) === 0.5 : Number.isInteger(x * 4) && Math.abs(x * 4) % 2 === 1;
  if (!tie || Number(text.at(-1)) % 2 === 0) return text;
  return plain((x - Math.sign(x) * 10 ** -decimals / 2).toFixed(decimals));
}
const plain = (text) => text.replace(/^-(?=[0.]*$)/, ""); // a minus before nothing but zeros is none
const figure = (column, value) => (Number.isNaN(value) ? "–" : fixed(column.scale * value, column.decimals));
const spread = (column, mean, std) => figure(column, mean) + (Number.isNaN(std) ? "" : "±" + figure(column, std));

const mean = (list) => (list.length ? list.reduce((a, b) => a + b, 0) / list.length : NaN);
function median(list) {
  if (!list.length) return NaN;
  const sorted = [...list].sort((a, b) => a - b), half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

// What is shown now, and the address that says so -------------------------------------------------------------------

const initial = () => ({
  view: "defenses", sort: null, down: false, page: 0, cell: null,
  filters: Object.fromEntries(AXES.map((axis) => [axis, null])),
  columns: new Set(columns.filter((column) => column.shown).map((column) => column.name)),
});
let state = initial();

const NOTHING = "\u2205"; // in the address: no value of an axis is chosen
const address = (cell) => JSON.stringify([cell.kind, ...cell.place]);

function readAddress() {
  state = initial();
  const wanted = new URLSearchParams(location.hash.slice(1));
  if (wanted.get("view") === "cells") state.view = "cells";
  state.sort = wanted.get("sort");
  state.down = wanted.get("order") === "down";
  for (const axis of AXES) {
    const chosen = wanted.getAll(axis).filter((value) => values[axis].includes(value));
    if (chosen.length || wanted.getAll(axis).includes(NOTHING)) state.filters[axis] = new Set(chosen);
  }
  if (wanted.has("columns")) state.columns = new Set(wanted.get("columns").split(",").filter((name) => name in index));
  state.cell = cells.find((cell) => address(cell) === wanted.get("cell")) ?? null;
}

function writeAddress() {
  const now = new URLSearchParams(), usual = initial();
  if (state.view !== usual.view) now.set("view", state.view);
  if (state.sort) { now.set("sort", state.sort); if (state.down) now.set("order", "down"); }
  for (const axis of AXES) for (const value of state.filters[axis]?.size === 0 ? [NOTHING] : state.filters[axis] ?? []) now.append(axis, value);
  if ([...state.columns].sort().join() !== [...usual.columns].sort().join()) now.set("columns", [...state.columns].join());
  if (state.cell) now.set("cell", address(state.cell));
  history.replaceState(null, "", "#" + now);
}

const passes = (cell) => AXES.every((axis) => !state.filters[axis] || state.filters[axis].has(cell[axis]));

// Marks: those of the whole table, or under a filter worked out anew over what it shows -------------------------------

/** Does a filter hide a part of what a figure was compared with? Figures are compared within the other axes. */
const partial = () => Boolean(state.filters.attack || state.filters.rate || state.filters.defense);
const place = (cell) => JSON.stringify([cell.dataset, cell.model, cell.variant, cell.setting]);
const bases = new Map(cells.filter((cell) => cell.base && cell.kind === "measured").map((cell) => [place(cell) + cell.attack, cell]));
const complete = (cell) => cell.states[0] === cell.seeds && !cell.other;

/** The figure of the models that a cell's defense was given. */
function undefended(cell, i) {
  const own = index[{ clean_accuracy: "infected_accuracy", asr: "infected_asr" }[columns[i].name]];
  if (own !== undefined && !Number.isNaN(cell.means[own])) return cell.means[own];
  return bases.get(place(cell) + cell.attack)?.means[i] ?? NaN;
}

/** Of entries [key, mean, figure without a defense] the keys of the best, but of none that is worse than no defense. */
function best(column, entries) {
  const known = entries.filter(([, value]) => column.sign && !Number.isNaN(value));
  const lead = known.reduce((a, b) => (column.sign * b[1] < column.sign * a[1] ? b : a), known[0]);
  const worse = ([, value, floor]) => !Number.isNaN(floor) && column.sign * Number(figure(column, value)) > column.sign * Number(figure(column, floor));
  return new Set(known.filter((entry) => figure(column, entry[1]) === figure(column, lead[1]) && !worse(entry)).map(([key]) => key));
}

function grouped(list, key) {
  const groups = new Map();
  for (const item of list) groups.set(key(item), [...(groups.get(key(item)) ?? []), item]);
  return groups;
}

/** The attacks that a mean of figure i is over, among the measured cells of one setting. */
function attacksOf(group, i) {
  const name = columns[i].name;
  return new Set([...grouped(group, (cell) => cell.attack)].filter(([, list]) =>
    list.some((cell) => !Number.isNaN(cell.means[i])) || (list.every((cell) => !cell.states[0]) && (name === "clean_accuracy" || (name === "asr" && !list[0].clean)))).map(([attack]) => attack));
}

let shownMarks = null; // under a filter: "cell id / figure" of what is bold

function markCells(found) {
  shownMarks = null;
  if (!partial()) return;
  shownMarks = new Set();
  const rivals = found.filter((cell) => cell.kind === "measured" && !cell.base && complete(cell));
  for (const list of grouped(rivals, (cell) => place(cell) + cell.attack).values())
    columns.forEach((column, i) => best(column, list.map((cell) => [cell.id, cell.means[i], undefended(cell, i)])).forEach((id) => shownMarks.add(`${id}/${i}`)));
}
const markOf = (cell, i) => (shownMarks ? Number(shownMarks.has(`${cell.id}/${i}`)) : cell.marks[i]);

/** The marks of the means, and of which of them a part is not done. */
function markRows(rows) {
  for (const group of grouped(rows.filter((row) => row.kind === "measured"), place).values()) {
    const all = group.flatMap((row) => row.all);
    columns.forEach((column, i) => {
      const over = attacksOf(all, i);
      const counted = (row) => row.all.filter((cell) => over.has(cell.attack));
      for (const row of group) if (counted(row).some((cell) => cell.states[0] !== cell.seeds)) row.parts.add(i);
      if (!partial()) return;
      const rivals = group.filter((row) => !row.base && counted(row).length === over.size && counted(row).every((cell) => complete(cell) && !Number.isNaN(cell.means[i])));
      const bold = best(column, rivals.map((row) => [row, mean(counted(row).map((cell) => cell.means[i])), mean(counted(row).map((cell) => undefended(cell, i)))]));
      for (const row of bold) row.bold.add(column.name);
    });
  }
}

// The two tables ------------------------------------------------------------------------------------------------------

/** One row for each defense: the figures of its cells that pass the filter. */
function defenses(found) {
  const rows = new Map();
  for (const cell of found) {
    const key = JSON.stringify([cell.kind, cell.dataset, cell.model, cell.variant, cell.setting, cell.defense]);
    if (!rows.has(key)) rows.set(key, { ...cell, cells: new Map(), all: [] });
    rows.get(key).cells.set(cell.attack, cell);
    rows.get(key).all.push(cell);
  }
  // Ranks, and what is underlined, were worked out over all attacks and defenses: over some of them they would be wrong.
  const whole = !partial();
  const listed = [...rows.values()].map((row) => {
    const of = (i) => row.all.map((cell) => cell.means[i]).filter((value) => !Number.isNaN(value));
    row.means = columns.map((column, i) => (column.largest ? Math.max(...of(i), -Infinity) : mean(of(i))));
    row.means = row.means.map((value, i) => (of(i).length ? value : NaN));
    const asr = "asr" in index ? of(index.asr) : [];
    row.median = median(asr);
    row.high = asr.filter((value) => value > data.high).length;
    row.count = asr.length;
    row.done = row.kind === "reported" || row.all.every((cell) => cell.states[0] === cell.seeds);
    const where = [row.dataset, row.model, row.variant, row.setting];
    row.rank = whole && row.kind === "measured" ? rankings.get(JSON.stringify(where))?.[row.defense] ?? NaN : NaN;
    [row.bold, row.parts] = [new Set(), new Set()];
    row.mark = (name) => (row.kind !== "measured" ? 0 : whole ? rowMarks.get(JSON.stringify([...where, row.defense, name])) ?? 0 : Number(row.bold.has(name)));
    row.worth = Number.isNaN(row.means[index.asr] ?? NaN) ? Infinity : row.means[index.asr];
    return row;
  });
  markRows(listed);
  return listed;
}

const stateText = (cell) => data.states.map((name, i) => [name, cell.states[i]]).filter(([name, n]) => n && name !== "done");

/** ACC / ASR of one cell, or why there is none: the text of the printed tables, part by part. */
function parts(cell) {
  if (cell.kind !== "reported") {
    const others = stateText(cell);
    if (cell.states[1] === cell.seeds) return { figures: [], note: "n/a" };
    if (!cell.states[0]) return { figures: [], note: others.map(([name]) => name).join(", ") };
  }
  const figures = [], a = index.clean_accuracy, b = index.asr;
  if (a !== undefined) figures.push([spread(ACC, cell.means[a], cell.stds[a]), cell.clean ? markOf(cell, a) : 0]);
  if (b !== undefined && !cell.clean && !Number.isNaN(cell.means[b])) figures.push([spread(ASR, cell.means[b], cell.stds[b]), markOf(cell, b)]);
  return { figures, note: cell.kind === "reported" ? "" : stateText(cell).map(([name, n]) => `${n} ${name}`).join(", ") };
}

function marked(text, mark) {
  if (mark === 1) return el("strong", {}, text, el("span", { class: "vh" }, " best"));
  if (mark === 2) return el("u", {}, text, el("span", { class: "vh" }, " not significantly worse than the best"));
  return document.createTextNode(text);
}

function cellButton(cell) {
  const { figures, note } = parts(cell);
  const inside = figures.flatMap(([text, mark], i) => (i ? [" / ", marked(text, mark)] : [marked(text, mark)]));
  if (note) inside.push(el("span", { class: "note" }, figures.length ? ` (${note})` : note));
  return el("button", { type: "button", "data-cell": cell.id }, ...inside);
}

/** The columns of the table that is shown: id, heading, a value to sort by, and a td. */
function layout() {
  const chosen = columns.map((column, i) => ({ ...column, i })).filter((column) => state.columns.has(column.name));
  if (state.view === "cells") {
    const named = AXES.filter((axis) => axis === "defense" || axis === "attack" || values[axis].length > 1)
      .sort((a, b) => (b === "defense") - (a === "defense"));
    return [
      ...named.map((axis) => ({
        id: axis, title: NAMES[axis], name: true, value: (cell) => (axis === "rate" ? parseFloat(cell.rate) || 0 : cell[axis]),
        show: (cell) => (axis === "defense" ? el("button", { type: "button", class: "plain", "data-cell": cell.id, title: cell.defense }, cell.defense) : cell[axis]),
      })),
      ...chosen.map((column) => ({
        id: column.name, title: column.title, about: column.about, value: (cell) => cell.means[column.i],
        show: (cell) => marked(spread(column, cell.means[column.i], cell.stds[column.i]), markOf(cell, column.i)),
      })),
      {
        id: "state", title: "state", name: true, value: (cell) => cell.states[0] / (cell.seeds || 1),
        show: (cell) => {
          const others = stateText(cell);
          if (cell.kind === "reported") return "reported, not measured";
          return el("span", { class: others.length ? "note" : "" }, others.map(([name, n]) => `${n} ${name}`).join(", ") || `${cell.seeds} done`);
        },
      },
    ];
  }
  const dagger = (row, column) => (!row.parts.has(column.i) || column.scale === 1 || Number.isNaN(row.means[column.i]) ? "" : "†");
  const means = chosen.map((column) => ({
    id: column.name, title: (column.scale === 1 ? "" : "mean ") + column.title, about: column.about, value: (row) => row.means[column.i],
    show: (row) => marked(figure(column, row.means[column.i]) + dagger(row, column), row.mark(column.name)),
  }));
  const hasAsr = ASR && state.columns.has("asr");
  const extra = hasAsr ? [
    { id: "median", title: "median ASR", value: (row) => row.median, show: (row) => figure(ASR, row.median) + (!row.parts.has(index.asr) || !row.count ? "" : "†") },
    { id: "high", title: `ASR >\u00a0${100 * data.high}\u00a0%`, value: (row) => (row.count ? row.high / row.count : NaN), show: (row) => (row.count ? `${row.high} of ${row.count}` : "–") },
  ] : [];
  const after = means.findIndex((column) => column.id === "asr") + 1 || means.length;
  return [
    { id: "defense", title: "defense", name: true, value: (row) => row.defense, show: (row) => el("span", { title: row.defense }, row.defense) },
    { id: "rank", title: "rank", about: "mean rank by ASR over attacks, 1 is best", value: (row) => row.rank, show: (row) => marked(Number.isNaN(row.rank) ? "–" : fixed(row.rank, 1), row.mark("rank")) },
    ...means.slice(0, after), ...extra, ...means.slice(after),
    ...attacks.filter((attack) => !state.filters.attack || state.filters.attack.has(attack)).map((attack) => ({
      id: "attack:" + attack, title: `${attack} ${cleanAttacks.has(attack) ? "ACC" : "ACC / ASR"}`,
      value: (row) => { const cell = row.cells.get(attack); return cell ? cell.means[index[cell.clean ? "clean_accuracy" : "asr"]] ?? NaN : NaN; },
      show: (row) => (row.cells.has(attack) ? cellButton(row.cells.get(attack)) : "–"),
    })),
  ];
}

const collator = new Intl.Collator("en", { numeric: true });

/** Rows in the order of a column; what has no figure comes last, whichever way. */
function ordered(rows, column) {
  const way = state.down ? -1 : 1;
  const keyed = rows.map((row) => [column.value(row), row]);
  keyed.sort(([a], [b]) => (typeof a === "string" ? way * collator.compare(a, b) : Number.isNaN(a) - Number.isNaN(b) || way * (a === b ? 0 : a - b)));
  return keyed.map(([, row]) => row);
}

const usual = (a, b) => b.base - a.base || b.done - a.done || (a.worth === b.worth ? 0 : a.worth - b.worth);

function draw() {
  const found = cells.filter(passes), shape = layout();
  markCells(found);
  const sorted = shape.find((column) => column.id === state.sort);
  let groups;
  if (state.view === "cells") groups = [["", sorted ? ordered(found, sorted) : found]];
  else {
    // Within a setting only: a defender with clean data is not the rival of one without.
    const byPlace = new Map();
    for (const row of defenses(found)) {
      const name = [row.dataset, row.model, row.variant, `setting ${row.setting}`].filter((text) => text).join(" · ") + (row.kind === "reported" ? " · reported, not measured here, not ranked" : "");
      byPlace.set(name, [...(byPlace.get(name) ?? []), row]);
    }
    groups = [...byPlace].map(([name, rows]) => [name, sorted ? ordered(rows, sorted) : rows.sort(usual)]);
  }
  const total = groups.reduce((sum, [, rows]) => sum + rows.length, 0);
  state.page = Math.max(0, Math.min(state.page, Math.ceil(total / ROWS) - 1));
  const head = el("tr", {}, ...shape.map((column) => el("th", {
    scope: "col", class: column.name ? "name" : "", title: column.about, "aria-sort": column.id === state.sort ? (state.down ? "descending" : "ascending") : null,
  }, el("button", { type: "button", "data-sort": column.id }, column.title, el("span", { "aria-hidden": "true" }, column.id === state.sort ? (state.down ? " ▼" : " ▲") : "")))));
  const table = el("table", {}, el("caption", { class: "vh" }, `${data.title}: ${state.view === "cells" ? "every cell" : "defenses"}`), el("thead", {}, head));
  let skip = state.page * ROWS, left = ROWS;
  for (const [name, rows] of groups) {
    const part = rows.slice(skip, skip + left);
    skip = Math.max(0, skip - rows.length);
    if (!part.length) continue;
    left -= part.length;
    const body = el("tbody");
    if (name) body.append(el("tr", {}, el("th", { class: "group", scope: "rowgroup", colspan: shape.length }, el("span", {}, name))));
    for (const row of part) {
      const line = document.createElement("tr");
      shape.forEach((column, i) => {
        const td = document.createElement(i ? "td" : "th");
        if (!i) td.scope = "row";
        if (column.name) td.className = "name";
        td.append(column.show(row));
        line.append(td);
      });
      body.append(line);
    }
    table.append(body);
  }
  const focused = document.activeElement?.dataset?.sort;
  $("board").replaceChildren(total ? table : el("p", { class: "faint" }, "Nothing passes these filters."));
  if (focused) [...$("board").querySelectorAll("[data-sort]")].find((button) => button.dataset.sort === focused)?.focus();
  const remark = partial() ? "; means and bold figures are over what is shown, ranks and underlined figures need all" : "";
  $("count").textContent = `${found.length} of ${cells.length} cells, ${total} rows${remark}`;
  drawPages(total);
  writeAddress();
}

function drawPages(total) {
  const last = Math.ceil(total / ROWS) - 1;
  const turn = (text, to) => el("button", { type: "button", disabled: to < 0 || to > last, onclick: () => { state.page = to; draw(); } }, text);
  $("pages").replaceChildren(...(last > 0 ? [turn("Previous", state.page - 1), el("span", {}, `page ${state.page + 1} of ${last + 1}`), turn("Next", state.page + 1)] : []));
}

// Controls ------------------------------------------------------------------------------------------------------------

function menu(id, title, options, isOn, change) {
  const boxes = options.map(([value, text]) => el("label", {}, el("input", { type: "checkbox", value, onchange: change }), " ", text));
  const node = el("details", { class: "menu", id }, el("summary", {}), el("fieldset", {}, el("legend", {}, title), el("button", { type: "button", onclick: () => change(null) }, "All"), " ", el("button", { type: "button", onclick: () => change() }, "None"), ...boxes));
  node.refresh = () => {
    const on = boxes.filter((box) => (box.firstChild.checked = isOn(box.firstChild.value)));
    node.firstChild.textContent = `${title}: ${on.length === boxes.length ? "all" : on.length === 1 ? on[0].textContent.trim() : on.length + " of " + boxes.length}`;
  };
  return node;
}

function drawControls() {
  const view = (id, text) => el("button", { type: "button", id: "view-" + id, onclick: () => { state.view = id; state.sort = null; state.page = 0; refresh(); } }, text);
  const menus = AXES.filter((axis) => values[axis].length > 1).map((axis) => menu("filter-" + axis, NAMES[axis], values[axis].map((value) => [value, value]),
    (value) => !state.filters[axis] || state.filters[axis].has(value),
    (event) => {
      const box = event?.target, chosen = event === undefined ? new Set() : new Set(state.filters[axis] ?? values[axis]);
      if (box) box.checked ? chosen.add(box.value) : chosen.delete(box.value);
      state.filters[axis] = event === null || chosen.size === values[axis].length ? null : chosen;
      state.page = 0;
      refresh();
    }));
  menus.push(menu("columns", "columns", columns.map((column) => [column.name, column.title]), (value) => state.columns.has(value), (event) => {
    if (!event) state.columns = new Set(event === null ? columns.map((column) => column.name) : []);
    else event.target.checked ? state.columns.add(event.target.value) : state.columns.delete(event.target.value);
    refresh();
  }));
  $("controls").append(view("defenses", "Defenses"), view("cells", "Every cell"), ...menus, el("button", { type: "button", id: "reset", onclick: () => { state = initial(); refresh(); } }, "Reset"));
}

function refresh() {
  for (const node of $("controls").children) {
    node.refresh?.();
    if (node.id.startsWith("view-")) node.setAttribute("aria-pressed", node.id === "view-" + state.view);
  }
  draw();
}

// One cell ------------------------------------------------------------------------------------------------------------

/** What stands behind a cell: on this page, or, of a large grid, in a file beside it. Resolves to the cell with its trials. */
const loading = new Map();
function detailsOf(cell) {
  if (!data.parts.length || cell.part === undefined) return Promise.resolve(withDetails(cell, data));
  if (!loading.has(cell.part)) {
    loading.set(cell.part, new Promise((resolve, reject) => document.head.append(el("script", {
      src: data.parts[cell.part],
      onload: () => resolve(window.parts[cell.part]),
      onerror: () => { loading.delete(cell.part); reject(new Error(`${data.parts[cell.part]} is not beside this page`)); },
    }))));
  }
  return loading.get(cell.part).then((part) => withDetails(cell, part));
}

function withDetails(cell, source) {
  const more = source.cells?.[cell.id], whole = more ? { ...cell, command: more.command, t95: more.t95.map(number) } : cell;
  const trials = (source.trials ?? []).slice(...cell.trials).map(([seed, status, reason, warnings, commit, clean, machine, figures, keys, configs, curves, more]) =>
    ({ seed, status, reason, warnings, commit, clean, machine, values: figures.map(number), keys, more, configs: configs.map((i) => source.configs[i]), curves: curves.map((i) => source.curves[i]) }));
  return { ...whole, list: trials };
}

function seedsText(cell) {
  const shown = columns.map((column, i) => [column, i]).filter(([column, i]) => state.columns.has(column.name) && !Number.isNaN(cell.means[i]) && column.scale === 100);
  const lines = cell.list.map((trial) => `seed ${trial.seed}: ` + (["done", "wrecked"].includes(trial.status)
    ? shown.map(([column, i]) => `${column.title} ${figure(column, trial.values[i])}`).join(", ") : `${trial.status}: ${trial.reason}`));
  const half = shown.filter(([, i]) => !Number.isNaN(cell.t95[i])).map(([column, i]) => `${column.title} ±${figure(column, cell.t95[i])}`);
  if (half.length) lines.push(`95 % t-interval of the mean: ${half.join(", ")}`);
  return cell.source ? `reported: ${cell.source}` : lines.join("\n");
}

function chart(name, points) {
  const W = 270, H = 120, known = points.filter(([, y]) => y !== null);
  if (!known.length) return el("figure", {}, el("figcaption", {}, `${name}: no finite value`));
  const xs = points.map(([x]) => x), ys = known.map(([, y]) => y);
  const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const px = (x) => 54 + (W - 62) * (x1 > x0 ? (x - x0) / (x1 - x0) : 0.5), py = (y) => H - 20 - (H - 30) * (y1 > y0 ? (y - y0) / (y1 - y0) : 0.5);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const add = (tag, attributes, text) => {
    const node = document.createElementNS(svg.namespaceURI, tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    svg.append(node);
  };
  const brief = (value) => Number(value.toPrecision(3)).toString();
  for (const [key, value] of Object.entries({ viewBox: `0 0 ${W} ${H}`, width: W, height: H, role: "img", "aria-label": `${name}: from ${brief(ys[0])} to ${brief(ys.at(-1))}, between ${brief(y0)} and ${brief(y1)}` })) svg.setAttribute(key, value);
  add("path", { class: "axis", d: `M54 6V${H - 20}H${W - 4}` });
  let path = "", pen = false;
  for (const [x, y] of points) { if (y === null) { pen = false; continue; } path += `${pen ? "L" : "M"}${px(x).toFixed(1)} ${py(y).toFixed(1)}`; pen = true; }
  add("path", { class: "curve", d: path });
  if (known.length === 1) add("circle", { cx: px(known[0][0]), cy: py(ys[0]), r: 3, class: "curve" });
  add("text", { x: 50, y: 14, "text-anchor": "end" }, brief(y1));
  if (y1 > y0) add("text", { x: 50, y: H - 20, "text-anchor": "end" }, brief(y0));
  add("text", { x: 54, y: H - 6 }, String(x0));
  if (x1 > x0) add("text", { x: W - 4, y: H - 6, "text-anchor": "end" }, String(x1));
  return el("figure", {}, svg, el("figcaption", {}, name));
}

function copyButton(text) {
  const button = el("button", { type: "button", class: "copy" }, "Copy the command");
  button.addEventListener("click", async () => {
    try { await navigator.clipboard.writeText(text); } catch {
      const area = el("textarea", {});
      area.value = text;
      button.after(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy the command"), 1500);
  });
  return button;
}

function trialDetails(cell, trial, open) {
  const node = el("details", { class: "trial", open }, el("summary", {}, `seed ${trial.seed}: ${trial.status}`));
  if (trial.reason) node.append(el("p", { class: "bad wrap" }, trial.reason));
  if (trial.warnings) node.append(el("p", { class: "bad wrap" }, `warning: ${trial.warnings}`));
  if (cell.command) {
    const command = `${cell.command} 'grid.seeds=[${trial.seed}]'`;
    node.append(el("h3", {}, "Compute it again"), el("pre", { class: "command", tabindex: "0", role: "region", "aria-label": "command" }, command), copyButton(command));
  }
  if (trial.commit) node.append(el("p", { class: "faint wrap" }, `commit ${trial.commit}${trial.clean === "True" ? "" : " (changed tree)"}; ${trial.machine}`));
  if (trial.keys.length) node.append(el("p", { class: "faint wrap" }, "in the store: " + trial.keys.join(", ")));
  const charts = trial.curves.flatMap((curves) => Object.entries(curves)).map(([name, points]) => chart(name, points));
  if (charts.length) node.append(el("h3", {}, "Curves"), el("div", { class: "charts" }, ...charts));
  for (const [title, value] of trial.more) node.append(el("h3", {}, title), el("pre", { tabindex: "0", role: "region", "aria-label": title }, JSON.stringify(value, null, 1)));
  if (trial.configs.length) {
    const config = Object.assign({}, ...trial.configs);
    node.append(el("details", {}, el("summary", {}, "Settings"), el("pre", { tabindex: "0", role: "region", "aria-label": "settings" }, JSON.stringify(config, null, 1))));
  }
  return node;
}

function openCell(cell) {
  state.cell = cell;
  writeAddress();
  const shown = (then) => (value) => { if (state.cell === cell) then(value); }; // another may have been opened since
  detailsOf(cell).then(shown(showCell), shown((error) => {
    $("cell").replaceChildren(el("h2", { id: "cell-title" }, `${cell.defense} against ${cell.attack}`), el("p", { class: "bad wrap" }, error.message), el("button", { type: "button", onclick: () => $("cell").close() }, "Close"));
    if (!$("cell").open) $("cell").showModal();
  }));
}

function showCell(cell) {
  const trials = cell.list, known = columns.map((column, i) => ({ ...column, i })).filter((column) => trials.some((trial) => !Number.isNaN(trial.values[column.i])) || !Number.isNaN(cell.means[column.i]));
  const line = (name, texts) => el("tr", {}, el("th", { scope: "row", class: "name" }, name), ...texts.map((text) => el("td", {}, text)));
  const title = `${cell.defense} against ${cell.attack}`;
  const dialog = $("cell");
  dialog.replaceChildren(
    el("header", {}, el("h2", { id: "cell-title" }, title), el("button", { type: "button", id: "close", onclick: () => dialog.close() }, "Close")),
    el("p", { class: "faint wrap" }, [cell.dataset, cell.model, cell.variant, `setting ${cell.setting}`, `poison rate ${cell.rate}`].filter((text) => text).join(", ") + (cell.source ? `; reported, not measured here: ${cell.source}` : "")),
    el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "figures of each seed" }, el("table", {}, el("caption", { class: "vh" }, `Figures of each seed: ${title}`),
      el("thead", {}, el("tr", {}, el("th", { scope: "col", class: "name" }, "seed"), el("th", { scope: "col" }, "state"), ...known.map((column) => el("th", { scope: "col", title: column.about }, column.title)))),
      el("tbody", {}, ...trials.map((trial) => line(String(trial.seed), [trial.status, ...known.map((column) => figure(column, trial.values[column.i]))])),
        line("mean ± std", ["", ...known.map((column) => spread(column, cell.means[column.i], cell.stds[column.i]))])))),
    data.pictures[cell.picture] ? el("figure", {}, el("img", { src: data.pictures[cell.picture], alt: `Images without and with the trigger of ${cell.attack}, and the difference` }), el("figcaption", {}, "clean, triggered, difference")) : "",
    ...trials.map((trial, i) => trialDetails(cell, trial, i === 0)),
  );
  if (!dialog.open) dialog.showModal();
}

// Start ---------------------------------------------------------------------------------------------------------------

$("board").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button?.dataset.cell) openCell(cells[button.dataset.cell]);
  else if (button?.dataset.sort) {
    const id = button.dataset.sort;
    if (state.sort !== id) [state.sort, state.down] = [id, false];
    else if (!state.down) state.down = true;
    else [state.sort, state.down] = [null, false];
    state.page = 0;
    draw();
  }
});
$("board").addEventListener("mouseover", (event) => {
  const button = event.target.closest("button[data-cell]");
  if (button && !button.title.includes("seed ")) detailsOf(cells[button.dataset.cell]).then((cell) => { button.title = seedsText(cell); }, () => {});
});
$("cell").addEventListener("close", () => { state.cell = null; writeAddress(); });
$("cell").addEventListener("click", (event) => { if (event.target === $("cell")) $("cell").close(); });
document.addEventListener("click", (event) => {
  for (const node of document.querySelectorAll(".menu[open]")) if (!node.contains(event.target)) node.open = false;
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  for (const node of document.querySelectorAll(".menu[open]")) { node.open = false; node.firstChild.focus(); }
});

const THEMES = ["as the system", "dark", "light"];
function setTheme(theme) {
  if (theme === THEMES[0]) delete document.documentElement.dataset.theme; else document.documentElement.dataset.theme = theme;
  $("theme").textContent = "Theme: " + theme;
  try { localStorage.setItem("theme", theme); } catch { /* a page from a file may have no storage */ }
}
let theme = THEMES[0];
try { theme = THEMES.includes(localStorage.getItem("theme")) ? localStorage.getItem("theme") : theme; } catch { /* as above */ }
setTheme(theme);
$("theme").addEventListener("click", () => setTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme ?? THEMES[0]) + 1) % 3]));

$("notes").append(
  el("dl", { class: "about" }, ...columns.flatMap((column) => [el("dt", {}, column.title), el("dd", {}, column.about)])),
  el("ul", {}, ...data.rankings.map(([d, m, v, s, , text]) => el("li", {}, `${[d, m, v].filter((name) => name).join(", ")}, setting ${s}: ${text}`)), ...data.notes.map((note) => el("li", {}, note)),
    ...(data.commits.length ? [el("li", {}, "commit: " + data.commits.join(", "))] : [])),
);
if (data.plots.length) $("plots").append(el("details", {}, el("summary", {}, "Plots"), ...data.plots.map(([name, uri]) => el("figure", {}, el("img", { src: uri, alt: name }), el("figcaption", {}, name)))));
function start() {
  readAddress();
  refresh();
  if (state.cell) openCell(state.cell); else if ($("cell").open) $("cell").close();
}
drawControls();
start();
addEventListener("hashchange", start);
