// Elements, numbers and plots of a report. Text from data only ever becomes a text node. No library, nothing fetched.
// The scripts of this folder are one, in the order in which page.rs names them.
'use strict';

const SVG = document.getElementById('drawing').namespaceURI;
const byId = id => document.getElementById(id);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {}))
    if (value != null && value !== false) node.setAttribute(name, value);
  node.append(...children.flat(Infinity).filter(child => child != null && child !== false));
  return node;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

// Numbers as people read them; a missing one is a dash.
const known = value => typeof value === 'number' && isFinite(value);
const fixed = (value, digits) =>
  known(value)
    ? value.toLocaleString('en', { minimumFractionDigits: digits, maximumFractionDigits: digits }).replace('-', '−')
    : '–';
const count = value => fixed(value, 0);
const signed = (value, digits) => (known(value) ? (value > 0 ? '+' : '') + fixed(value, digits) : '–');
const percent = (value, digits = 1) => (known(value) ? signed(100 * value, digits) + ' %' : '–');
const short = value => {
  const units = [
      [1e12, 'T'],
      [1e9, 'G'],
      [1e6, 'M'],
      [1e3, 'k']
    ],
    size = Math.abs(value);
  const [unit, letter] = units.find(([unit]) => size >= unit) || [1, ''];
  return (
    Number((value / unit).toPrecision(3))
      .toLocaleString('en')
      .replace('-', '−') + letter
  );
};
const plain = value =>
  !known(value)
    ? '–'
    : value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6)
      ? value.toExponential(2).replace('-', '−')
      : Number(value.toPrecision(4)).toLocaleString('en', { maximumFractionDigits: 6 }).replace('-', '−');
const duration = seconds =>
  seconds < 10
    ? fixed(seconds, 1) + ' s'
    : seconds < 60
      ? fixed(seconds, 0) + ' s'
      : seconds < 3600
        ? Math.floor(seconds / 60) + ' min ' + String(Math.round(seconds % 60) % 60).padStart(2, '0') + ' s'
        : Math.floor(seconds / 3600) + ' h ' + String(Math.floor((seconds % 3600) / 60)).padStart(2, '0') + ' min';
const clockTime = unix => new Date(1000 * unix).toISOString().slice(0, 19).replace('T', ' ') + ' UTC';

// Axes. Marks are 1, 2 or 5 times a power of ten.
function roundStep(span, marks) {
  const rough = span / marks,
    power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].map(factor => factor * power).find(step => step >= rough * 0.999);
}
function linear(low, high, from, to, { marks = 5, exact = false } = {}) {
  if (!(high > low)) {
    const room = Math.abs(low) / 10 || 0.5;
    low -= room;
    high += room;
  }
  const step = roundStep(high - low, marks);
  if (!exact) {
    low = Math.floor(low / step + 1e-9) * step;
    high = Math.ceil(high / step - 1e-9) * step;
  }
  const at = value => from + ((value - low) / (high - low)) * (to - from);
  at.marks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) at.marks.push(i * step || 0);
  const digits = Math.max(0, Math.ceil(-Math.log10(step) - 1e-9));
  at.label = value =>
    Math.abs(high) >= 1e4 ? short(value) : step < 1e-4 ? value.toExponential(0) : fixed(value, digits);
  [at.low, at.high] = [low, high];
  return at;
}
function logarithmic(low, high, from, to) {
  const least = Math.floor(Math.log10(low)),
    most = Math.max(Math.ceil(Math.log10(high)), least + 1);
  const at = value => from + ((Math.log10(Math.max(value, 10 ** least)) - least) / (most - least)) * (to - from);
  at.marks = Array.from({ length: most - least + 1 }, (_, i) => 10 ** (least + i));
  at.label = value => (value >= 1 ? short(value) : String(value));
  return at;
}
function bounds(values) {
  let low = Infinity,
    high = -Infinity;
  for (const value of values)
    if (known(value)) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
  return low <= high ? [low, high] : [0, 1];
}
function grid(y, left, right, unit = '') {
  return y.marks.map(mark => [
    draw('line', { class: 'grid', x1: left, x2: right, y1: y(mark), y2: y(mark) }),
    draw('text', { class: 'end', x: left - 7, y: y(mark) + 4 }, y.label(mark) + unit)
  ]);
}
function across(x, bottom, title, right, left = 0) {
  const fit = x.marks.filter(mark => x(mark) >= left - 1 && x(mark) <= right + 1);
  return [
    fit.map(mark => [
      draw('line', { class: 'axis', x1: x(mark), x2: x(mark), y1: bottom, y2: bottom + 4 }),
      draw('text', { class: 'middle', x: x(mark), y: bottom + 17 }, x.label(mark))
    ]),
    draw('text', { class: 'end', x: right, y: bottom + 33 }, title)
  ];
}
const pathOf = points => points.map(([x, y], i) => (i ? 'L' : 'M') + x.toFixed(1) + ' ' + y.toFixed(1)).join('');

// A figure that can be asked by pointer and by arrow keys: `paint(width)` gives {height, nodes, points: [{x, y,
// text}]}, points in the order in which keys walk them. It is painted again when its width changes, or by the function returned.
const charts = [];
function chart(figure, label, paint, { by = 'both' } = {}) {
  const box = el('div', {
    class: 'chart',
    tabindex: 0,
    role: 'group',
    'aria-roledescription': 'chart',
    'aria-label': label + '. Arrow keys move from point to point.'
  });
  const tip = el('div', { class: 'tip', hidden: '', 'aria-hidden': 'true' });
  figure.append(box);
  let state = { points: [] },
    current = -1,
    ring = null,
    width = 0;
  const repaint = () => {
    width = Math.max(box.clientWidth, 240);
    state = paint(width) || { points: [], nodes: [], height: 0 };
    ring = draw('circle', { class: 'ring', r: 6, visibility: 'hidden' });
    box.replaceChildren(
      draw(
        'svg',
        { viewBox: `0 0 ${width} ${state.height}`, height: state.height, 'aria-hidden': 'true' },
        ...state.nodes.flat(9),
        ring
      ),
      tip
    );
    hide();
  };
  const hide = () => {
    current = -1;
    tip.hidden = true;
    ring && ring.setAttribute('visibility', 'hidden');
  };
  const show = (at, aloud) => {
    const point = state.points[at];
    if (!point) return hide();
    current = at;
    const [first, ...rest] = point.text.split('\n');
    tip.replaceChildren(el('b', {}, first), rest.join('\n'));
    tip.hidden = false;
    ring.setAttribute('cx', point.x);
    ring.setAttribute('cy', point.y);
    ring.setAttribute('visibility', 'visible');
    const left = Math.min(Math.max(point.x - tip.offsetWidth / 2, 0), width - tip.offsetWidth);
    const above = point.y - tip.offsetHeight - 14;
    tip.style.left = Math.max(left, 0) + 'px';
    tip.style.top = (above < -40 ? point.y + 16 : above) + 'px';
    if (aloud) byId('said').textContent = point.text.replaceAll('\n', ', ');
  };
  const near = event => {
    const frame = box.getBoundingClientRect(),
      x = event.clientX - frame.left,
      y = event.clientY - frame.top;
    let best = -1,
      least = by === 'x' ? 1e9 : 30 * 30;
    state.points.forEach((point, i) => {
      const far = (point.x - x) ** 2 + (by === 'x' ? 0.02 : 1) * (point.y - y) ** 2;
      if (far < least) [best, least] = [i, far];
    });
    show(best, false);
  };
  box.addEventListener('pointermove', near);
  box.addEventListener('pointerdown', near);
  box.addEventListener('pointerleave', hide);
  box.addEventListener('blur', hide);
  box.addEventListener('keydown', event => {
    const last = state.points.length - 1,
      steps = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageDown: 10, PageUp: -10 };
    if (event.key === 'Escape') return hide();
    if (last < 0 || (!(event.key in steps) && event.key !== 'Home' && event.key !== 'End')) return;
    event.preventDefault();
    const from = current < 0 ? (steps[event.key] > 0 ? -1 : last + 1) : current;
    show(
      event.key === 'Home' ? 0 : event.key === 'End' ? last : Math.min(Math.max(from + steps[event.key], 0), last),
      true
    );
  });
  charts.push({ box, repaint, width: () => width });
  repaint();
  return repaint;
}
let waiting = 0;
addEventListener('resize', () => {
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(() =>
    charts.forEach(chart => {
      if (Math.max(chart.box.clientWidth, 240) !== chart.width()) chart.repaint();
    })
  );
});

// Lines over one axis. `series()` gives [{name, colour, dash, x, y, low, high, raw, text(i)}].
function lineChart(figure, label, series, { xTitle, yLabel = null, log = false, zero = false, height = 250 } = {}) {
  return chart(
    figure,
    label,
    width => {
      const lines = series(),
        [left, right, top, bottom] = [54, width - 12, 10, height - 44];
      const values = lines.flatMap(line => [...line.y, ...(line.low || []), ...(line.high || [])]).filter(known);
      let [low, high] = bounds(values);
      // One step that went wild does not flatten all others.
      if (lines.some(line => line.high)) {
        const sorted = lines
          .flatMap(line => line.high || line.y)
          .filter(known)
          .sort((a, b) => a - b);
        high = Math.min(
          high,
          Math.max(sorted[Math.floor(sorted.length * 0.995)], ...lines.map(line => bounds(line.y)[1]))
        );
      }
      const y =
        log && low > 0 ? logarithmic(low, high, bottom, top) : linear(zero ? Math.min(0, low) : low, high, bottom, top);
      if (yLabel) y.label = yLabel;
      const [first, last] = bounds(lines.flatMap(line => line.x));
      const x = linear(first, last, left, right, { marks: Math.max(3, Math.round(width / 130)), exact: true });
      const inside = value => Math.max(top - 4, Math.min(bottom, y(value)));
      const points = [];
      const nodes = [
        grid(y, left, right),
        across(x, bottom, xTitle(), right, left),
        lines.map(line => {
          const at = line.x.map((_, i) => i).filter(i => known(line.y[i]) && known(line.x[i]));
          for (const i of at) points.push({ x: x(line.x[i]), y: inside(line.y[i]), text: line.text(i) });
          const place = values => at.filter(i => known(values[i])).map(i => [x(line.x[i]), inside(values[i])]);
          return draw('g', { class: 'c' + line.colour }, [
            line.low &&
              at.length > 1 &&
              draw('path', { class: 'band', d: pathOf([...place(line.high), ...place(line.low).reverse()]) + 'Z' }),
            line.raw && draw('path', { class: 'line raw', d: pathOf(place(line.raw)) }),
            draw('path', { class: 'line ' + (line.dash || ''), d: pathOf(place(line.y)) }),
            at.length < 40 && at.map(i => draw('circle', { class: 'c', r: 3, cx: x(line.x[i]), cy: inside(line.y[i]) }))
          ]);
        })
      ];
      points.sort((a, b) => a.x - b.x);
      return { height, nodes, points };
    },
    { by: 'x' }
  );
}

function legend(figure, entries) {
  if (entries.length < 2) return;
  figure.append(
    el(
      'ul',
      { class: 'legend' },
      entries.map(({ name, colour, dash }) =>
        el(
          'li',
          {},
          draw(
            'svg',
            { viewBox: '0 0 22 10', class: 'c' + colour, 'aria-hidden': 'true' },
            draw('line', { class: 'line ' + (dash || ''), x1: 0, x2: 22, y1: 5, y2: 5 })
          ),
          el('bdi', {}, name)
        )
      )
    )
  );
}

// Equal Earth (Šavrič, Patterson and Jenny 2018): areas are true. Degrees to a plane about 5.4 wide and 2.6 high.
function equalEarth(longitude, latitude) {
  const [a, b, c, d] = [1.340264, -0.081106, 0.000893, 0.003796],
    m = Math.sqrt(3) / 2;
  const t = Math.asin(m * Math.sin((latitude * Math.PI) / 180)),
    t2 = t * t,
    t6 = t2 * t2 * t2;
  return [
    (((longitude * Math.PI) / 180) * Math.cos(t)) / (m * (a + 3 * b * t2 + t6 * (7 * c + 9 * d * t2))),
    t * (a + b * t2 + t6 * (c + d * t2))
  ];
}
