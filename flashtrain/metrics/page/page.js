// Point at a chart: every chart shows its values at that step. Without this script the last values stand there.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const charts = [...document.querySelectorAll("figure[data-key]")].filter((figure) => figure.querySelector(".plot"));
  const plain = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
  const format = (value) => (value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(2) : plain.format(value));

  const nearest = (points, step) => {
    let low = 0, high = points.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (points[middle][0] < step) low = middle + 1; else high = middle;
    }
    return low > 0 && step - points[low - 1][0] <= points[low][0] - step ? points[low - 1] : points[low];
  };

  const show = (wanted) => {
    for (const figure of charts) {
      const series = data.charts[figure.dataset.key];
      const step = nearest(series[0].points, wanted)[0];
      const cursor = figure.querySelector(".cursor");
      cursor.hidden = false;
      cursor.style.left = `${100 * (step - data.first) / (data.last - data.first)}%`;
      cursor.firstElementChild.textContent = step.toLocaleString("en");
      for (const output of figure.querySelectorAll("output[data-series]")) {
        const [at, value] = nearest(series[output.dataset.series].points, step);
        output.textContent = (value === null ? "not finite" : format(value)) + (at === step ? "" : ` at ${at}`);
      }
    }
  };

  const rest = () => {
    for (const figure of charts) {
      figure.querySelector(".cursor").hidden = true;
      for (const output of figure.querySelectorAll("output[data-series]")) output.textContent = output.dataset.last;
    }
  };

  for (const figure of charts) {
    const plot = figure.querySelector(".plot");
    const point = (event) => {
      const box = plot.getBoundingClientRect();
      const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      show(data.first + share * (data.last - data.first));
    };
    plot.addEventListener("pointermove", point);
    plot.addEventListener("pointerdown", point);
    plot.addEventListener("pointerleave", rest);
  }
})();
