// Draws the figures of a page from the JSON in it, and lets a person choose what they show. Texts from outside reach
// the page as text nodes, and plotly only where they have been made plain.
(function () {
'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const sweep = data.sweep, root = document.documentElement, live = document.getElementById('live');
const PRINT_PX = 680, PRINT_HIGH_PX = 370, BINS = 12, NARROW_PX = 560, RESIZE_MS = 120, AHEAD = '300px';
let printing = false;

// --- theme: colours named @ink and the like follow the page's, light, dark or printed.
function colours() {
  const probe = document.body.appendChild(document.createElement('span')), found = {};
  for (const name of ['ink', 'muted', 'paper', 'grid', 'bad', 'panel']) {
    probe.style.color = 'var(--' + name + ')';
    found['@' + name] = getComputedStyle(probe).color;
  }
  probe.remove();
  return found;
}
function themed(value, known) {
  if (typeof value === 'string') { return known[value] || value; }
  if (Array.isArray(value)) { return value.map(inner => themed(inner, known)); }
  if (value === null || typeof value !== 'object') { return value; }
  return Object.fromEntries(Object.entries(value).map(([name, inner]) => [name, themed(inner, known)]));
}

// --- one plot
// What counting reaches: lines across the plot, or a remark where they are off its scale.
function floorMarks(floors) {
  const near = floors.filter(floor => floor.near), far = floors.filter(floor => !floor.near);
  const remark = { xref: 'paper', x: 1, xanchor: 'right', yanchor: 'bottom', showarrow: false,
    font: { size: 11, color: '@muted' } };
  const named = near.map(floor => ({ ...remark, y: floor.value, text: floor.name }));
  const off = { ...remark, yref: 'paper', y: 1,
    text: 'off scale: ' + far.map(floor => floor.name + ' ' + floor.value.toPrecision(3)).join(', ') };
  return { annotations: far.length ? [...named, off] : named, shapes: near.map(floor => ({ type: 'line',
    xref: 'paper', yref: 'y', x0: 0, x1: 1, y0: floor.value, y1: floor.value, layer: 'below',
    line: { color: '@muted', width: 1, dash: 'dash' } })) };
}
function draw(plot, panel) {
  const narrow = plot.clientWidth < NARROW_PX && !printing, given = panel.layout;
  const marks = floorMarks(panel.floors || []);
  const axis = { gridcolor: '@grid', linecolor: '@grid', zeroline: false, automargin: true, ticks: '',
    tickfont: { color: '@muted', size: 12 } };
  const titled = found => ({ ...axis, ...found, title: { standoff: 8, ...(found || {}).title,
    font: { color: '@muted', size: 12 } } });
  const layout = {
    ...given, annotations: [...(given.annotations || []), ...marks.annotations],
    shapes: [...(given.shapes || []), ...marks.shapes], xaxis: titled(given.xaxis), yaxis: titled(given.yaxis), autosize: !printing, hovermode: 'closest',
    margin: { l: 48, r: 16, t: 14, b: given.showlegend ? 76 : 50, ...given.margin }, paper_bgcolor: 'rgba(0,0,0,0)',
    plot_bgcolor: 'rgba(0,0,0,0)', font: { color: '@ink', size: 12, family: 'Inter, Segoe UI, Arial, sans-serif' },
    hoverlabel: { bgcolor: '@panel', bordercolor: '@muted', font: { color: '@ink', size: 12 }, align: 'left' },
    showlegend: Boolean(given.showlegend), legend: { orientation: 'h', yref: 'container', y: 0, yanchor: 'bottom',
      itemclick: false, itemdoubleclick: false, font: { size: 11 } },
  };
  if (printing) { Object.assign(layout, { width: PRINT_PX, height: PRINT_HIGH_PX }); }
  const traces = panel.traces.map(trace => {
    const bar = trace.marker && trace.marker.colorbar;
    if (!bar) { return trace; }
    const flat = { orientation: 'h', x: 0.5, y: -0.16, yanchor: 'top', len: 0.9 };
    const shared = { thickness: 10, outlinewidth: 0, ...bar, ...(narrow ? flat : { x: 1.01, len: 0.95 }) };
    return { ...trace, marker: { ...trace.marker, colorbar: shared } };
  });
  return Plotly.react(plot, ...themed([traces, layout], colours()), { displayModeBar: false });
}
const plain = text => text.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;');
const spoken = text => text.replaceAll('<br>', ', ').replaceAll('&lt;', '<').replaceAll('&gt;', '>')
  .replaceAll('&amp;', '&');
// The next point to the right (or left) of those that say something: shown as if hovered, and read out.
function walk(plot, step) {
  const told = (plot.data || []).flatMap((trace, curve) => trace.hoverinfo !== 'text' ? [] : trace.text.map(
    (text, place) => ({ text, curve, place, x: Number(trace.x[place]) })));
  const found = told.filter(point => point.text).sort((a, b) => a.x - b.x);
  if (!found.length) { return; }
  const from = plot.walked === undefined ? (step > 0 ? -1 : 0) : plot.walked;
  plot.walked = (from + step + found.length) % found.length;
  const point = found[plot.walked];
  Plotly.Fx.hover(plot, [{ curveNumber: point.curve, pointNumber: point.place }]);
  live.textContent = spoken(String(point.text));
}

// --- figures of a sweep's results
const column = name => sweep.columns.find(found => found.name === name);
const log = axis => axis.type === 'log';
function colourOf(name) {
  const found = column(name) || column('C'), axis = found.axis || {};
  const at = (found.value || []).map(value => value === null ? null : log(axis) ? Math.log10(value) : value);
  const known = at.filter(value => value !== null), low = Math.min(...known), high = Math.max(...known);
  const scale = sweep.scales[found.name === 'C' ? 'rung' : 'size'], ticks = axis.tickvals || [];
  return { at, low, high: high > low ? high : low + 1,
    scale: scale.map((hex, place) => [place / (scale.length - 1), hex]),
    bar: { title: { text: axis.title ? axis.title.text : '', font: { size: 11 } }, tickfont: { size: 11 },
      ...(ticks.length ? { tickvals: log(axis) ? ticks.map(Math.log10) : ticks, ticktext: axis.ticktext } : {}) } };
}
function about(row, metric) {
  const told = ['C', 'N', 'D', 's'].map(column).filter(Boolean).map(found => found.name + ' ' + found.text[row]);
  const value = column(metric), behind = value.remark && value.remark[row];
  const beside = !behind ? '' : behind === 'best' ? ', best of its rung'
    : '<br>' + behind + ' (to the best of its rung)';
  return [sweep.label[row], told.join(', '), sweep.metrics[metric].label + ' ' + value.text[row] + beside].join('<br>');
}
function within(value, edges) { return value === null ? null : Math.min(Math.max(value, edges[0]), edges[1]); }
function points(rows, x, metric, colour) {
  const facts = sweep.metrics[metric], values = column(metric).value, paint = colourOf(colour);
  return { type: 'scatter', mode: 'markers', x: rows.map(row => x[row]), showlegend: false, hoverinfo: 'text',
    y: rows.map(row => within(values[row], facts.edges)), text: rows.map(row => about(row, metric)),
    marker: { size: 7, opacity: 0.85, color: rows.map(row => paint.at[row]), cmin: paint.low, cmax: paint.high,
      colorscale: paint.scale, line: { color: '@paper', width: 0.6 }, colorbar: paint.bar, showscale: true } };
}
const measured = metric => [...sweep.flops.keys()].filter(row => column(metric).value[row] !== null);
function failed(x, metric) {
  const rows = [...sweep.flops.keys()].filter(row => sweep.failed[row] && x[row] !== null);
  const facts = sweep.metrics[metric], worst = facts.edges[facts.goal === 'minimize' ? 1 : 0];
  const status = column('status').text;
  return { type: 'scatter', mode: 'markers', x: rows.map(row => x[row]), y: rows.map(() => worst), hoverinfo: 'text',
    text: rows.map(row => sweep.label[row] + '<br>' + plain(status[row]) + ', N ' + column('N').text[row]),
    name: 'no result', showlegend: rows.length > 0, marker: { symbol: 'x', size: 8, color: '@bad' } };
}
const bar = sizes => ({ type: 'data', array: sizes.map(size => size || 0), color: '@ink', thickness: 1.3, width: 0 });
const builders = {
  frontier(chosen) {
    const facts = sweep.metrics[chosen.metric], points_ = facts.frontier, end = 10 ** sweep.rungs.axis.range[1];
    const held = points_.filter(point => !point.carried);
    const texts = held.map(point => about(point.row, chosen.metric)
      + (point.change ? '<br>' + point.change + ' against the rung below' : '')
      + (point.floor ? '<br>' + point.floor : ''));
    const step = { type: 'scatter', mode: 'lines', hoverinfo: 'skip', showlegend: false,
      x: [...points_.map(point => point.flops), end], line: { color: '@ink', width: 1.6, shape: 'hv' },
      y: [...points_.map(point => point.value), points_[points_.length - 1].value] };
    const rows = held.map(point => point.row);
    const plot = some => points(some, sweep.fanned, chosen.metric, chosen.colour);
    const best = { ...plot(rows), text: texts, error_y: bar(held.map(point => point.bar)) };
    // As large as the dots: of two points under a pointer plotly takes the smaller one, of equal ones the later.
    best.marker = { ...best.marker, line: { color: '@ink', width: 2 }, opacity: 1, showscale: false };
    const dots = plot(measured(chosen.metric).filter(row => !rows.includes(row)));
    const crosses = failed(sweep.fanned, chosen.metric);
    return { traces: [dots, step, best, crosses], floors: facts.floors,
      layout: { xaxis: sweep.rungs.axis, yaxis: facts.axis, showlegend: crosses.showlegend } };
  },
  curves(chosen) {
    const facts = sweep.metrics[chosen.metric], values = column(chosen.metric).value, paint = colourOf(chosen.colour);
    const rows = measured(chosen.metric);
    rows.sort((a, b) => sweep.trial[a] - sweep.trial[b] || sweep.flops[a] - sweep.flops[b]);
    const bins = Array.from({ length: BINS }, () => ({ x: [], y: [] })), open = [];
    rows.forEach((row, place) => {
      const last = sweep.trial[rows[place + 1]] !== sweep.trial[row];
      const share = paint.at[row] === null ? 0 : (paint.at[row] - paint.low) / (paint.high - paint.low);
      const bin = bins[Math.min(Math.floor(share * BINS), BINS - 1)], next = rows[place + 1];
      open.push(last && sweep.flops[row] < sweep.rungs.flops[sweep.rungs.flops.length - 1]);
      if (last) { return; }
      bin.x.push(sweep.flops[row], sweep.flops[next], null);
      bin.y.push(within(values[row], facts.edges), within(values[next], facts.edges), null);
    });
    const lines = bins.map((bin, place) => ({ type: 'scatter', mode: 'lines', ...bin, hoverinfo: 'skip', opacity: 0.8,
      showlegend: false, line: { color: shade(paint.scale, (place + 0.5) / BINS), width: 1.3 } }));
    const dots = points(rows, sweep.flops, chosen.metric, chosen.colour);
    dots.marker = { ...dots.marker, size: 6, symbol: open.map(waits => waits ? 'circle-open' : 'circle') };
    const crosses = failed(sweep.flops, chosen.metric);
    return { traces: [...lines, dots, crosses],
      layout: { xaxis: sweep.rungs.axis, yaxis: facts.axis, showlegend: crosses.showlegend } };
  },
  scatter(chosen) {
    const facts = sweep.metrics[chosen.metric], against = column(chosen.x), values = column(chosen.metric).value;
    const rows = measured(chosen.metric).filter(row => against.value[row] !== null);
    const bests = facts.bests.filter(best => rows.includes(best.row));
    const best = { type: 'scatter', mode: 'lines+markers', x: bests.map(found => against.value[found.row]),
      y: bests.map(found => values[found.row]), text: bests.map(found => about(found.row, chosen.metric)),
      hoverinfo: 'text', showlegend: false, error_y: bar(bests.map(found => found.bar)),
      line: { color: '@muted', dash: 'dot', width: 1.2 },
      marker: { symbol: 'diamond-open', size: 12, color: '@ink', line: { width: 2 } } };
    const crosses = failed(against.value, chosen.metric);
    return { traces: [points(rows, against.value, chosen.metric, chosen.colour), best, crosses],
      layout: { xaxis: against.axis, yaxis: facts.axis, showlegend: crosses.showlegend } };
  },
};
function shade(scale, share) {
  const whole = share * (scale.length - 1), place = Math.min(Math.floor(whole), scale.length - 2), rest = whole - place;
  const part = (hex, start) => parseInt(hex.slice(start, start + 2), 16);
  const mixed = [1, 3, 5].map(start => Math.round(
    part(scale[place][1], start) * (1 - rest) + part(scale[place + 1][1], start) * rest));
  return 'rgb(' + mixed.join(',') + ')';
}

// --- a figure: its choices, its sentence, its panels
function save(plot, filename) {
  Plotly.downloadImage(plot, { format: 'svg', width: plot.clientWidth, height: plot.clientHeight, filename });
}
function chosenOf(figure) {
  return Object.fromEntries([...figure.querySelectorAll('select')].map(found => [found.dataset.choice, found.value]));
}
// What a figure says and the frames of its panels; a panel's traces are made when it is drawn.
function told(figure) {
  const name = figure.dataset.figure, chosen = chosenOf(figure);
  if (!builders[name]) { return data.figures[name][Number(chosen.metric || 0)]; }
  const said = name === 'frontier' ? sweep.metrics[chosen.metric].said : '';
  return { said, panels: [{ title: '', make: () => builders[name](chosen) }] };
}
function frame(figure) {
  const { said, panels } = told(figure), frames = figure.querySelector('.panels');
  figure.querySelector('.said').textContent = said;
  while (frames.children.length > panels.length) { frames.lastChild.remove(); }
  while (frames.children.length < panels.length) { newPanel(frames); }
  const sentence = said || figure.querySelector('figcaption').textContent;
  return panels.map((panel, place) => {
    const plot = frames.children[place].querySelector('.plot');
    plot.previousSibling.textContent = panel.title;
    plot.setAttribute('aria-label', [panel.title, sentence].filter(Boolean).join('. '));
    return [plot, panel];
  });
}
function show(figure) {
  frame(figure).forEach(([plot, panel]) => draw(plot, panel.make ? panel.make() : panel));
}
function newPanel(frame) {
  const panel = frame.appendChild(document.createElement('div'));
  const title = panel.appendChild(document.createElement('p')), plot = panel.appendChild(document.createElement('div'));
  panel.className = 'panel'; plot.className = 'plot'; title.dir = 'auto';
  plot.tabIndex = 0; plot.setAttribute('role', 'img');
  plot.addEventListener('keydown', event => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) { event.preventDefault(); walk(plot, step); }
  });
}
const figures = [...document.querySelectorAll('[data-figure]')];
figures.forEach(figure => {
  frame(figure);
  figure.addEventListener('change', () => show(figure));
  figure.addEventListener('click', event => {
    const act = event.target.dataset.act, plots = [...figure.querySelectorAll('.plot')];
    if (act === 'reset') { show(figure); }
    if (act === 'save') {
      plots.forEach((plot, place) => save(plot, figure.dataset.figure + (place ? '-' + (place + 1) : '')));
    }
  });
});

// --- lists of results: heads sort; what has no number stays at the end.
function sortBy(head) {
  const table = head.closest('table'), body = table.tBodies[0], at = head.cellIndex;
  const up = head.getAttribute('aria-sort') !== 'ascending';
  table.querySelectorAll('th[aria-sort]').forEach(other => other.removeAttribute('aria-sort'));
  head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
  const key = row => {
    const value = row.cells[at].dataset.value;
    return value === '' ? null : value === undefined ? row.cells[at].textContent : Number(value);
  };
  [...body.rows].map(row => [key(row), row]).sort((a, b) => {
    if (a[0] === null || b[0] === null) { return (a[0] === null) - (b[0] === null); }
    const order = typeof a[0] === 'number' ? a[0] - b[0] : String(a[0]).localeCompare(String(b[0]));
    return up ? order : -order;
  }).forEach(pair => body.appendChild(pair[1]));
}
function list(frame) {
  const table = frame.appendChild(document.createElement('table')), heads = table.createTHead().insertRow();
  table.createCaption().textContent = frame.getAttribute('aria-label');
  for (const found of sweep.columns) {
    const head = heads.appendChild(document.createElement('th'));
    head.scope = 'col'; head.appendChild(document.createElement('button')).textContent = found.name;
    head.addEventListener('click', () => sortBy(head));
  }
  const body = table.createTBody();
  for (const row of frame.dataset.list === 'trials' ? sweep.trials : sweep.flops.keys()) {
    const line = body.insertRow();
    sweep.columns.forEach((found, place) => {
      const cell = line.appendChild(document.createElement(place ? 'td' : 'th'));
      cell.appendChild(document.createElement('bdi')).textContent = found.text[row];
      if (!place) { cell.scope = 'row'; }
      if (found.value) { cell.dataset.value = found.value[row] === null ? '' : found.value[row]; }
      const remark = found.remark && found.remark[row];
      if (remark) { cell.appendChild(document.createElement('small')).textContent = remark; }
      if (remark === 'best') { cell.className = 'best'; }
      if (found.name === 'status' && sweep.failed[row]) { cell.className = 'bad'; }
    });
  }
}
const lists = [...document.querySelectorAll('[data-list]')];

// --- the switch of the theme, and paper
const button = document.getElementById('theme'), prefersDark = matchMedia('(prefers-color-scheme: dark)');
const isDark = () => (root.dataset.theme || (prefersDark.matches ? 'dark' : 'light')) === 'dark';
const isDrawn = one => one.querySelector('.main-svg, table') !== null;
const redraw = () => figures.filter(isDrawn).forEach(show);
function tellTheme() { button.setAttribute('aria-pressed', String(isDark())); }
button.addEventListener('click', () => { root.dataset.theme = isDark() ? 'light' : 'dark'; tellTheme(); redraw(); });
prefersDark.addEventListener('change', () => { tellTheme(); redraw(); });
tellTheme();
let width = innerWidth, due;
addEventListener('resize', () => {
  // A phone's own bars change the height alone.
  if (innerWidth !== width) { width = innerWidth; clearTimeout(due); due = setTimeout(redraw, RESIZE_MS); }
});
const drawOne = one => one.dataset.list ? list(one) : show(one);
addEventListener('beforeprint', () => {
  printing = true;
  lists.filter(one => !isDrawn(one) && one.checkVisibility()).forEach(list);
  figures.forEach(show);
});
addEventListener('afterprint', () => { printing = false; redraw(); });

// The first figure at once; the others, and lists, shortly before they are seen.
const ahead = new IntersectionObserver(entries => {
  for (const { target } of entries.filter(entry => entry.isIntersecting)) {
    ahead.unobserve(target);
    if (!isDrawn(target)) { drawOne(target); }
  }
}, { rootMargin: AHEAD });
if (figures.length) { show(figures[0]); }
[...figures, ...lists].forEach(one => ahead.observe(one));
root.dataset.ready = '';
}());
