"use strict";
// Draws each chart into its place, in the colours of the page, and again when those change.

const charts = JSON.parse(document.getElementById("charts").textContent);
const places = document.querySelectorAll(".chart");

function themed(layout) {
  const style = getComputedStyle(document.documentElement);
  const [text, quiet, line, card] = ["--text", "--quiet", "--line", "--card"].map((name) => style.getPropertyValue(name));
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, tickfont: { color: quiet }, automargin: true };
  const title = (own) => ({ text: own.title.text, font: { color: quiet, size: 12 } });
  return {
    ...layout,
    font: { family: "system-ui, sans-serif", size: 12, color: text },
    paper_bgcolor: "transparent",
    plot_bgcolor: "transparent",
    margin: { l: 56, r: 16, t: 14, b: 40 },
    hovermode: "x unified",
    hoverlabel: { bgcolor: card, bordercolor: line, font: { color: text } },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    xaxis: { ...axis, ...layout.xaxis, title: title(layout.xaxis), showgrid: false, hoverformat: ",.0f" },
    yaxis: { ...axis, ...layout.yaxis, title: title(layout.yaxis) },
  };
}

function draw() {
  const options = { responsive: true, displayModeBar: false, doubleClick: "autosize" };
  return Promise.all(charts.map(([data, layout], index) => Plotly.react(places[index], data, themed(layout), options)));
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw().then(() => { document.documentElement.dataset.drawn = charts.length; });
