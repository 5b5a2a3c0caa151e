// Draws the charts of the page, again when the page turns light or dark. What goes wrong is kept in data-errors of the
// root element, and the number of charts drawn in data-charts, so that a test can read both.
(() => {
  const root = document.documentElement;
  const errors = [];
  const complain = (error) => {
    errors.push(String((error && error.message) || error));
    root.dataset.errors = JSON.stringify(errors);
  };
  root.dataset.errors = "[]";
  window.addEventListener("error", (event) => complain(event.error || event.message));
  window.addEventListener("unhandledrejection", (event) => complain(event.reason));
  document.addEventListener("securitypolicyviolation", (event) => complain(`blocked: ${event.violatedDirective}`));

  const { charts, themes } = JSON.parse(document.getElementById("declarations").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  let drawn = [];
  let turn = 0;

  async function draw() {
    const mine = ++turn;
    drawn.forEach((view) => view.finalize());
    drawn = [];
    const theme = dark.matches ? "dark" : "light";
    for (const [id, declaration] of Object.entries(charts)) {
      const options = {
        mode: "vega-lite",
        renderer: "svg",
        ast: true, // expressions are interpreted, so that the page's policy can forbid eval
        config: themes[theme],
        tooltip: { theme },
        actions: { export: true, source: false, compiled: false, editor: false },
        downloadFileName: id,
      };
      const view = await vegaEmbed(document.getElementById(id), declaration, options);
      if (mine !== turn) return view.finalize();
      drawn.push(view);
    }
    root.dataset.charts = String(drawn.length);
    root.dataset.theme = theme;
  }

  dark.addEventListener("change", () => draw().catch(complain));
  draw().catch(complain);
})();
