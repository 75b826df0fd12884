// A click on a heading sorts its table. Without scripts the table stands as it was written.
for (const table of document.querySelectorAll("table.sortable")) {
  for (const heading of table.tHead.rows[0].cells) {
    const button = heading.querySelector("button");
    if (!button) continue;
    button.addEventListener("click", () => {
      const up = heading.getAttribute("aria-sort") !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => row.cells[heading.cellIndex].dataset.key ?? row.cells[heading.cellIndex].textContent;
      const body = table.tBodies[0];
      const compare = new Intl.Collator("en", { numeric: true }).compare;
      const number = (a, b) => Number(key(a)) - Number(key(b));
      const rows = [...body.rows];
      const order = rows.every((row) => key(row) !== "" && !Number.isNaN(Number(key(row)))) ? number : (a, b) => compare(key(a), key(b));
      rows.sort((a, b) => (up ? order(a, b) : order(b, a)));
      body.append(...rows);
    });
  }
}
