// A table that is wider than the screen scrolls. The focus lets keys scroll it.
function focusable() {
  for (const table of document.querySelectorAll(".md-typeset__scrollwrap")) {
    if (table.scrollWidth > table.clientWidth) table.tabIndex = 0;
    else table.removeAttribute("tabindex");
  }
}
window.addEventListener("load", focusable);
window.addEventListener("resize", focusable);
