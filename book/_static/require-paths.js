// Loaded between require.js and the html-manager: custom widgets, and the fonts that the html-manager
// looks for beside its modules, come from this folder. A page built without npm names the
// html-manager's folder on its CDN instead.
(() => {
  const { src, dataset } = document.currentScript;
  const assets = src.replace(/[^/]*$/, "assets/");
  const manager = dataset.htmlManager ?? `${assets}@jupyter-widgets/html-manager/dist`;
  window.require.config({
    paths: {
      anywidget: `${assets}anywidget/index`,
      "@jupyter-widgets/html-manager": `${manager}/embed-amd`,
      "@jupyter-widgets/html-manager/dist/libembed-amd": `${manager}/libembed-amd`,
    },
  });
})();
