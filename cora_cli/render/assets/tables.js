// Tables sort by the column whose heading is activated: numbers by value, other cells as text, cells without a value last.
"use strict";
document.querySelectorAll(".table table").forEach((table) => {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, place) => {
    const cell = row.cells[place];
    const text = (cell.firstChild ? cell.firstChild.textContent : "").trim();
    const number = Number(text.replace(/,/g, "").replace(/\u2212/g, "-"));
    return text === "" || text === "\u2013" ? null : Number.isNaN(number) ? text : number;
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
