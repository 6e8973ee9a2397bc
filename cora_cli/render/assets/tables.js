// Tables sort by the column whose heading is activated: numbers by value, other cells as text, cells without a value last.
"use strict";
const UNITS = { KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30 };
// A number may have a sign before it, and a unit or a word behind it.
const sortKey = (text) => {
  const found = /^(?:[<\u00b1] )?([-+]?[0-9][0-9,]*(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?) ?([^0-9]*)$/.exec(text.replace(/\u2212/g, "-"));
  if (text === "" || text === "\u2013") return null;
  return found ? Number(found[1].replace(/,/g, "")) * (UNITS[found[2]] || 1) : text;
};
document.querySelectorAll(".table table").forEach((table) => {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, place) => {
    const cell = row.cells[place];
    return sortKey((cell.firstChild ? cell.firstChild.textContent : "").trim());
  };
  heads.forEach((head, place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const rows = [...body.rows].map((row) => [value(row, place), row]);
      rows.sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null);
        if (typeof a === "number" && typeof b === "number") return sign * (a - b);
        return sign * String(a).localeCompare(String(b), "en", { numeric: true });
      });
      body.append(...rows.map(([, row]) => row));
    });
  });
});
