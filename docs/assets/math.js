// Renders formulas with the KaTeX of this site, and loads KaTeX only on pages that have formulas.
const assets = new URL(".", document.currentScript.src);

function loadKatex() {
  const style = document.createElement("link");
  style.rel = "stylesheet";
  style.href = new URL("katex/katex.min.css", assets);
  document.head.append(style);
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = new URL("katex/katex.min.js", assets);
    script.onload = resolve;
    script.onerror = reject;
    document.head.append(script);
  });
}

document.addEventListener("DOMContentLoaded", async () => {
  const formulas = document.querySelectorAll(".arithmatex");
  if (!formulas.length) return;
  await loadKatex();
  for (const formula of formulas) {
    const source = formula.textContent.trim();
    katex.render(source.slice(2, -2), formula, { displayMode: source.startsWith("\\["), throwOnError: false });
  }
});
