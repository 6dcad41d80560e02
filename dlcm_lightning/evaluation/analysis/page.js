(() => {
  const about = document.getElementById("about");
  let shown = null;
  const line = (token, number, all) => {
    const [p, boundary, length, loss] = token.split(";");
    const parts = all > 1 ? [`token ${number + 1} of ${all} of this character`] : [];
    if (p) parts.push(`p = ${p}${boundary ? ", closes its concept" : ""}`);
    if (p) parts.push(length ? `concept of ${length} token${length === "1" ? "" : "s"}` : "after the last boundary");
    parts.push(loss ? `loss ${loss} nats` : "nothing predicts it");
    return parts.join(" \u00b7 ");
  };
  const tell = (event) => {
    const cell = event.target instanceof Element ? event.target.closest("[data-i]") : null;
    if (shown) shown.classList.remove("on");
    shown = cell;
    about.hidden = !cell;
    if (!cell) return;
    cell.classList.add("on");
    const tokens = cell.dataset.i.split("|");
    about.textContent = tokens.map((token, number) => line(token, number, tokens.length)).join("\n");
  };
  document.addEventListener("mouseover", tell);
  document.addEventListener("click", tell);
})();
