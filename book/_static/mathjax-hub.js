// The widgets' html-manager calls Hub.Queue of MathJax 2, which MathJax 3 no longer has
// (jupyter-widgets/ipywidgets#3829): hand what it queues to MathJax 3.
document.addEventListener("DOMContentLoaded", () => {
  const mathjax = window.MathJax;
  if (!mathjax || mathjax.Hub) return;
  const typeset = (element) =>
    mathjax.startup?.promise?.then(() => mathjax.typesetPromise([element])).catch(() => {});
  mathjax.Hub = {
    Queue: (...commands) => {
      for (const command of commands) {
        if (Array.isArray(command) && command[0] === "Typeset") typeset(command[2]);
      }
    },
  };
});
