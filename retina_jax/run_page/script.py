"""What the page looks and acts like beyond `pages.page`: everything can be read without the script."""

from __future__ import annotations

STYLE = """
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem }
.headline { font-size: 1.05rem; color: var(--ink) }
.warning { border-left: 3px solid #d55e00; padding-left: .7rem; color: var(--ink); overflow-wrap: anywhere }
summary { cursor: pointer } details.pictures > summary { font-size: 1rem; margin: .6rem 0 }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem; margin: 0 0 1rem }
.pair img { width: 100%; cursor: zoom-in }
.pair figure.zoomed { grid-column: 1 / -1; overflow: auto; max-height: 95vh }
.pair figure.zoomed img { width: auto; max-width: none; min-width: 100%; cursor: zoom-out }
.kinds small { display: block; color: var(--grey) } .kinds td:first-child { min-width: 8rem }
.kinds td { vertical-align: top } .kinds td:nth-child(2) { text-align: left; min-width: 6.2rem }
.kinds th:nth-child(2) { text-align: left } .kinds th { max-width: 7rem }
.settings { columns: 22rem; padding: 0; list-style: none; font-size: .85rem; overflow-wrap: anywhere }
.settings li { break-inside: avoid; margin-bottom: .25rem } .settings small { color: var(--grey) }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)) }
.bar { display: inline-block; height: .8rem; background: #0072b2 }
.sum td { font-weight: 600 }
.facts dd { margin-bottom: .2rem }
th button { all: unset; cursor: pointer; font: inherit }
th button:focus-visible { outline: 2px solid #0072b2 }
th[aria-sort=ascending] button::after { content: " \\25B2" } th[aria-sort=descending] button::after { content: " \\25BC" }
details .charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)) }
@media (max-width: 44rem) {
  th { min-width: 0 } th, td { padding: .3rem .35rem }
  .kinds td:first-child { position: static; min-width: 6.5rem; max-width: 8rem }
  .pair { grid-template-columns: 1fr } dl { grid-template-columns: 1fr } dd { margin-bottom: .5rem }
}
"""

SCRIPT = """
for (const table of document.querySelectorAll(".sortable table")) {
  const heads = [...table.tHead.rows[0].cells], rows = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.textContent = head.textContent;
    button.title = "sort";
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      const up = (before || (column ? "ascending" : "descending")) === "descending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const text = row => row.cells[column].textContent;
      const number = row => Number.isNaN(Number(text(row))) ? -Infinity : Number(text(row));
      const compare = column ? (a, b) => number(a) - number(b) : (a, b) => text(a).localeCompare(text(b));
      rows.replaceChildren(...[...rows.rows].sort((a, b) => up ? compare(a, b) : compare(b, a)));
    });
  });
}
for (const picture of document.querySelectorAll(".pair img"))
  picture.addEventListener("click", () => picture.closest("figure").classList.toggle("zoomed"));
"""
