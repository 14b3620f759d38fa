// Draw each plot from the JSON beside it, in the colours of the page, light or dark.
(function () {
  "use strict";
  var dark = window.matchMedia("(prefers-color-scheme: dark)");

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  function theme(layout) {
    var themed = JSON.parse(JSON.stringify(layout));
    var narrow = window.innerWidth < 600;
    themed.font = { family: colour("--font"), size: narrow ? 12 : 13, color: colour("--muted") };
    themed.hoverlabel = {
      bgcolor: colour("--card"), bordercolor: colour("--line"), align: "left",
      font: { family: colour("--font"), size: 13, color: colour("--ink") }
    };
    ["xaxis", "yaxis"].forEach(function (axis) {
      themed[axis].gridcolor = colour("--grid");
      themed[axis].zerolinecolor = colour("--muted");
      themed[axis].title.font = { size: narrow ? 12 : 13 };
    });
    return themed;
  }

  function draw() {
    document.querySelectorAll(".plot").forEach(function (place) {
      var figure = JSON.parse(document.getElementById("data-" + place.id).textContent);
      Plotly.react(place, figure.data, theme(figure.layout), { displayModeBar: false, responsive: true });
    });
  }

  draw();
  dark.addEventListener("change", draw);
  window.addEventListener("beforeprint", draw);
  window.addEventListener("afterprint", draw);
})();
