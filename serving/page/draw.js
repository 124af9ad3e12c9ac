// Drawing on canvases, without a library. Each function takes a canvas and the data, and draws the whole picture anew.
const LANES = ["schedule", "build", "dispatch", "grammar", "wait", "commit"];

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`);

// A context whose unit is a CSS pixel, whatever the screen's; the canvas is cleared.
function begin(canvas) {
  const scale = window.devicePixelRatio || 1;
  const width = canvas.clientWidth;
  const height = Number(canvas.dataset.height ??= canvas.getAttribute("height"));
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "middle";
  return { context, width, height };
}

function duration(seconds) {
  if (seconds >= 1) return `${+seconds.toPrecision(3)} s`;
  return `${+(seconds * 1000).toPrecision(3)} ms`;
}

// Host lanes over the device lane; gaps of the device in the colour of their cause.
export function timeline(canvas, view, seconds) {
  const { context, width, height } = begin(canvas);
  const left = 62;
  const from = view.now - seconds;
  const x = (time) => left + ((time - from) / seconds) * (width - left);
  const row = 20;
  const device = row * LANES.length + 12;
  const deviceHeight = 44;
  const rect = (start, end, y, h, name) => {
    const x0 = Math.max(left, x(start));
    const w = x(end) - x0;
    if (w <= 0) return 0;
    context.fillStyle = colour(name);
    context.fillRect(x0, y, Math.max(w, 1.2), h); // a turn of some microseconds must still be seen
    return w;
  };
  axis(context, left, width, height, seconds);
  context.fillStyle = colour("soft");
  LANES.forEach((lane, index) => context.fillText(lane, 0, index * row + row / 2));
  context.fillText("device", 0, device + deviceHeight / 2);
  for (const [phase, start, end] of view.host) {
    const lane = LANES.indexOf(phase);
    if (lane >= 0) rect(start, end, lane * row + 2, row - 5, phase);
  }
  for (const [start, end, cause] of view.idle) rect(start, end, device + 8, deviceHeight - 16, cause);
  view.steps.forEach((step) => {
    const drawn = rect(step.start, step.ready, device, deviceHeight, step.num_tokens > step.decode_tokens ? "prompt" : "decode");
    if (drawn > 2) { // a seam, so that steps without a gap can be told apart
      context.fillStyle = colour("panel");
      context.fillRect(x(step.ready) - 0.5, device, 1, deviceHeight);
    }
    if (drawn > 34) {
      context.fillText(`${step.num_tokens}/${step.batched_tokens}`, Math.max(left, x(step.start)) + 3, device + deviceHeight / 2);
    }
  });
  context.globalAlpha = 0.35; // dispatched, not read back: it ends in the future
  for (const dispatched of view.inflight) {
    rect(Math.max(dispatched, view.steps.at(-1)?.ready ?? 0), view.now, device, deviceHeight, "decode");
  }
  context.globalAlpha = 1;
}

function axis(context, left, width, height, seconds) {
  context.fillStyle = colour("soft");
  context.strokeStyle = colour("line");
  const marks = 5;
  for (let mark = 0; mark < marks; mark++) {
    const at = left + (mark / (marks - 1)) * (width - left);
    context.textAlign = mark === 0 ? "left" : mark === marks - 1 ? "right" : "center";
    const back = seconds * (1 - mark / (marks - 1));
    context.fillText(back ? `-${duration(back)}` : "now", at, height - 7);
    context.beginPath();
    context.moveTo(at, 0);
    context.lineTo(at, height - 16);
    context.stroke();
  }
  context.textAlign = "left";
}

// Several values over time, the newest at the right.
export function lines(canvas, rows, names) {
  const { context, width, height } = begin(canvas);
  const top = Math.max(1, ...rows.flat());
  const colours = ["accent", "dispatch"];
  names.forEach((name, column) => {
    context.strokeStyle = context.fillStyle = colour(colours[column]);
    context.lineWidth = 1.5;
    context.beginPath();
    rows.forEach((row, index) => {
      const x = width - (rows.length - 1 - index) * (width / 149);
      context.lineTo(x, height - 3 - (row[column] / top) * (height - 24));
    });
    context.stroke();
    context.fillText(`${name} ${rows.at(-1)?.[column] ?? 0}`, 4 + column * 90, 8);
  });
  context.fillStyle = colour("soft");
  context.textAlign = "right";
  context.fillText(`${top}`, width - 2, 8);
  canvas.setAttribute("aria-label", names.map((name, column) => `${name} ${rows.at(-1)?.[column] ?? 0}`).join(", "));
}

// One stacked bar per step: what of the compiled size was decode tokens, prompt tokens, padding.
export function bars(canvas, steps) {
  const { context, width, height } = begin(canvas);
  const top = Math.max(1, ...steps.map((step) => step.batched_tokens));
  const room = height - 18;
  const step_width = width / Math.max(60, steps.length);
  steps.forEach((step, index) => {
    const parts = [
      ["decode", step.decode_tokens],
      ["prompt", step.num_tokens - step.decode_tokens],
      ["padding", step.batched_tokens - step.num_tokens],
    ];
    let y = height;
    for (const [name, count] of parts) {
      const h = (count / top) * room;
      context.fillStyle = colour(name);
      context.fillRect(index * step_width, y - h, step_width * 0.85, h);
      y -= h;
    }
  });
  context.fillStyle = colour("soft");
  context.fillText(`last ${steps.length} steps, highest ${top} tokens`, 4, 8);
  canvas.setAttribute("aria-label", `The last ${steps.length} steps; the largest computes ${top} tokens.`);
}

// Counts by bucket, with the median and the 99th percentile (upper bounds of their buckets).
export function histogram(canvas, data) {
  const { context, width, height } = begin(canvas);
  const total = data.counts.reduce((sum, count) => sum + count, 0);
  const first = data.counts.findIndex((count) => count > 0);
  const last = data.counts.findLastIndex((count) => count > 0);
  if (!total) {
    context.fillStyle = colour("soft");
    context.fillText("nothing yet", 4, 8);
    canvas.setAttribute("aria-label", "nothing yet");
    return;
  }
  const low = Math.max(0, first - 1);
  const counts = data.counts.slice(low, last + 2);
  const top = Math.max(...counts);
  const step = width / counts.length;
  const bound = (index) => (index < data.bounds.length ? duration(data.bounds[index]) : "more");
  const widest = Math.max(...counts.map((_, index) => context.measureText(bound(low + index)).width));
  const every = Math.ceil((widest + 6) / step); // labels must not run into each other
  counts.forEach((count, index) => {
    const h = (count / top) * (height - 36);
    const wide = Math.min(step - 2, 60);
    context.fillStyle = colour("accent");
    context.fillRect((index + 0.5) * step - wide / 2, height - 16 - h, wide, h);
    context.fillStyle = colour("soft");
    context.textAlign = "center";
    if (index % every === 0) context.fillText(bound(low + index), (index + 0.5) * step, height - 7);
  });
  const quantile = (share) => {
    let seen = 0;
    return bound(data.counts.findIndex((count) => (seen += count) >= share * total));
  };
  const text = `p50 ≤ ${quantile(0.5)}, p99 ≤ ${quantile(0.99)}, ${total} values`;
  context.textAlign = "left";
  context.fillText(text, 4, 8);
  canvas.setAttribute("aria-label", text);
}

// The pool as a grid: a cell is stronger the more of it is held; a page held by several has a mark, one that only the
// prefix cache keeps another colour.
export function pool(canvas, pages) {
  const { context, width, height } = begin(canvas);
  const count = pages.cells.length;
  let size = Math.min(14, Math.max(3, Math.floor(Math.sqrt((width * height) / count))));
  while (size > 3 && Math.ceil(count / Math.floor(width / size)) * size > height) size -= 1;
  const columns = Math.max(1, Math.floor(width / size));
  pages.cells.forEach((held, index) => {
    const x = (index % columns) * size;
    const y = Math.floor(index / columns) * size;
    context.globalAlpha = held > 0 ? 0.35 + 0.65 * Math.min(1, held / pages.per_cell) : held < 0 ? 0.5 : 1;
    context.fillStyle = colour(held > 0 ? "decode" : held < 0 ? "prompt" : "no_work");
    context.fillRect(x, y, size - 1, size - 1);
    if (pages.per_cell === 1 && held > 1) {
      context.globalAlpha = 1;
      context.fillStyle = colour("dispatch");
      context.fillRect(x + size / 4, y + size / 4, (size - 1) / 2, (size - 1) / 2);
    }
  });
  context.globalAlpha = 1;
  canvas.setAttribute("aria-label", `${pages.cells.filter((held) => held > 0).length} of ${count} cells are in use`);
}
