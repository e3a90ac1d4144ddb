// What is wider than the window scrolls by itself; this lets the keyboard scroll it too, also when it
// was folded while the page loaded, and puts inline formulas that are too long on lines of their own.
window.addEventListener("load", () => {
  const regions =
    "pre, div.math, span.math, mjx-container, figure, .pst-scrollable-table-container, .cell_output";
  const reach = (region) => {
    const wide = region.scrollWidth > region.clientWidth + 1;
    if (wide) region.tabIndex = 0;
    else if (region.tabIndex === 0) region.removeAttribute("tabindex");
  };
  const setApart = (formula) => {
    formula.classList.remove("wide");
    const room = formula.closest("p, li, td, th, div").clientWidth;
    const drawn = formula.querySelector("mjx-container")?.getBoundingClientRect().width ?? 0;
    formula.classList.toggle("wide", room > 0 && drawn > room);
  };
  const measure = () => {
    document.querySelectorAll(".bd-article span.math").forEach(setApart);
    document.querySelectorAll(regions).forEach(reach);
  };
  let waiting;
  const later = () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(measure);
  };
  const article = document.querySelector(".bd-article");
  if (article) new ResizeObserver(later).observe(article);
  window.addEventListener("resize", later);
  window.MathJax?.startup?.promise?.then(later);
});
