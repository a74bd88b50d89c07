// The marks of the page under a filter, by its own script and without a browser: node page_marks.js SCRIPT DATA HASH
const vm = require("vm"), fs = require("fs");
const [script, data, hash] = process.argv.slice(2);
const any = () => new Proxy(function () {}, {
  get: (_, key) => key === Symbol.iterator ? function* () {} : key === Symbol.toPrimitive ? () => "" : any(),
  set: () => true, apply: () => any(), construct: () => any(), has: () => true,
});
const text = fs.readFileSync(data, "utf8");
const document = new Proxy({}, { get: (_, key) => key === "getElementById" ? (id) => id === "data" ? { textContent: text } : any() : any() });
const context = vm.createContext({ document, location: { hash }, history: any(), localStorage: any(), window: {}, navigator: any(),
  addEventListener: () => 0, setTimeout: () => 0, URLSearchParams, Intl, console });
vm.runInContext(fs.readFileSync(script, "utf8"), context);
const found = vm.runInContext(`({
  cells: cells.filter(passes).flatMap((cell) => columns.map((column, i) => [cell.attack, cell.defense, column.name, markOf(cell, i) ?? 0])),
  rows: defenses(cells.filter(passes)).flatMap((row) => columns.map((column, i) => ["mean", row.defense, column.name, row.mark(column.name), row.parts.has(i)])),
})`, context);
console.log(JSON.stringify(found));
