// The page of a report: sections, language table, filters. Everything shown is in the tables of the JSON beside this script.
'use strict';

const report = JSON.parse(byId('report').textContent);
const runs = report.runs.map((run, colour) => {
  const table = name => run[name] || { columns: [], rows: [] };
  const kept = new Map();
  const column = (name, key) => {
    if (!kept.has(name + ' ' + key)) { const at = table(name).columns.indexOf(key); kept.set(name + ' ' + key, table(name).rows.map(row => at < 0 ? null : row[at])); }
    return kept.get(name + ' ' + key);
  };
  const objects = name => table(name).rows.map(row => Object.fromEntries(table(name).columns.map((key, i) => [key, row[i]])));
  return { label: run.label, folder: run.folder, colour, table, column, objects };
});
const single = runs.length === 1;
const named = (run, text) => single ? text : text + ', ' + run.label;

// ---- Languages of all runs, once each.
const languages = new Map();
runs.forEach((run, at) => {
  for (const row of run.objects('languages')) {
    const seen = languages.get(row.language) || { language: row.language, name: '', script: row.script, family: row.family, group: '', of: [] };
    seen.name ||= row.name; seen.group ||= row.group;
    if (known(row.latitude) && known(row.longitude)) seen.place ||= [row.longitude, row.latitude];
    seen.of[at] = row;
    languages.set(row.language, seen);
  }
});
const all = [...languages.values()];
for (const it of all) it.words = [it.language, it.name, it.script, it.family, it.group].join(' ').normalize('NFKD').replace(/\p{M}/gu, '').toLowerCase();
const title = it => it.name ? it.name + ' (' + it.language + ')' : it.language;

const unit = () => byId('unit').value;
const value = (it, run, when) => { const row = it.of[run]; return row ? row[unit() + '_' + when] : null; };
const difference = (a, b) => known(a) && known(b) ? b - a : null;
const delta = (it, run) => difference(value(it, run, 'before'), value(it, run, 'after'));
const measured = when => all.some(it => runs.some((_, run) => known(value(it, run, when))));
const hasBefore = measured('before'), hasAfter = measured('after'), hasBoth = all.some(it => runs.some((_, run) => known(delta(it, run))));

// ---- Header.
byId('lead').textContent = single ? runs[0].folder : runs.length + ' runs side by side';
byId('made').textContent = 'Made by panglot ' + report.panglot + ' on ' + clockTime(report.unix_time) + '. Everything is in this file: nothing is fetched.';
if (!single) byId('runs').append(...runs.map(run => el('li', {}, el('span', { class: 'key c' + run.colour }), el('b', {}, el('bdi', {}, run.label)), ' ', run.folder)));
byId('themes').addEventListener('change', event => {
  if (event.target.value) document.documentElement.dataset.theme = event.target.value; else delete document.documentElement.dataset.theme;
});

// ---- At a glance.
const whats = [...new Set(runs.flatMap(run => run.column('figures', 'what')))];
byId('figures').append(el('div', { class: 'figures' }, whats.map(what => {
  const figures = runs.map(run => run.objects('figures').find(figure => figure.what === what));
  return el('div', { class: 'figure' }, el('h3', {}, what), single
    ? [el('b', {}, figures[0].value), el('p', {}, figures[0].more)]
    : figures.map((figure, at) => el('div', { class: 'of' }, el('i', { class: 'c' + at, title: runs[at].label }),
      el('div', {}, el('span', { class: 'unseen' }, runs[at].label + ': '), el('b', {}, figure ? figure.value : '–'), el('p', {}, figure ? figure.more : '')))));
})));

// ---- Learning, and what of the machine goes by steps.
const along = { step: 'step', tokens: 'target tokens', hours: 'hours since the first step' };
const xs = run => {
  const kind = byId('along').value;
  if (kind === 'step') return run.column('steps', 'step');
  if (kind === 'tokens') return run.column('steps', 'target_tokens');
  const times = run.column('steps', 'unix_time'), seconds = run.column('steps', 'seconds')[0] || 0;
  return times.map(time => (time - times[0] + seconds) / 3600);
};
function smooth(values) {
  // Over about a thirtieth of what is drawn; the weight of what was seen divides, so that the beginning is not drawn towards 0.
  const keep = 1 - 1 / Math.max(values.length / 30, 2);
  let sum = 0, weight = 0;
  return values.map(value => { if (!known(value)) return null; sum = keep * sum + value; weight = keep * weight + 1; return sum / weight; });
}
const byStep = [];
function stepChart(id, label, columns, options) {
  const drawn = runs.filter(run => columns(run).length);
  byId(id).hidden = !drawn.length;
  if (!drawn.length) return;
  byStep.push(lineChart(byId(id), label, () => drawn.flatMap(run => columns(run).map(line => ({ ...line, colour: run.colour, x: xs(run) }))), { xTitle: () => along[byId('along').value], ...options }));
  legend(byId(id), drawn.flatMap(run => columns(run).filter(line => line.name).map(line => ({ ...line, colour: run.colour }))));
}
const place = (run, i) => named(run, 'Step ' + count(run.column('steps', 'step')[i]));
// Columns are looked up once, not at every redraw.
const cached = make => { const kept = new Map(); return run => { if (!kept.has(run)) kept.set(run, make(run)); return kept.get(run); }; };
const stepsColumn = (run, key) => run.column('steps', key).map(value => known(value) ? value : null);
const anyOf = values => values.some(known);

stepChart('loss', 'Loss', cached(run => {
  const loss = stepsColumn(run, 'loss'), mean = smooth(loss);
  return anyOf(loss) ? [{ name: single ? null : run.label, y: mean, raw: loss, low: stepsColumn(run, 'loss_low'), high: stepsColumn(run, 'loss_high'),
    text: i => place(run, i) + '\nloss ' + fixed(loss[i], 4) + '\nrunning mean ' + fixed(mean[i], 4) }] : [];
}), { height: 290 });
stepChart('held-out', 'Bits per byte of held-out text while training', cached(run => {
  const y = stepsColumn(run, 'held_out_bits_per_byte');
  return anyOf(y) ? [{ name: single ? null : run.label, y, text: i => named(run, 'After ' + count(run.column('steps', 'step')[i] + 1) + ' steps') + '\n' + fixed(y[i], 4) + ' bits per byte' }] : [];
}));
const dashes = ['', 'dashed', 'dotted', 'thin', 'thin dashed'];
stepChart('rates', 'Learning rate', cached(run => run.table('steps').columns.filter(key => key.startsWith('lr_')).map((key, i) => {
  const y = stepsColumn(run, key), group = key.slice(3);
  return { name: named(run, group), dash: dashes[i % dashes.length], y, text: i => place(run, i) + '\n' + group + ' ' + plain(y[i]) };
}).filter(line => anyOf(line.y))), { zero: true, yLabel: value => value === 0 ? '0' : Number(value.toPrecision(3)).toExponential().replace('-', '−') });
stepChart('norm', 'Gradient norm', cached(run => {
  const y = stepsColumn(run, 'grad_norm');
  return anyOf(y) ? [{ name: single ? null : run.label, y, dash: 'thin', text: i => place(run, i) + '\ngradient norm ' + plain(y[i]) }] : [];
}), { log: true });
stepChart('speed', 'Tokens per second', cached(run => {
  const y = stepsColumn(run, 'tokens_per_second'), seconds = run.column('steps', 'seconds');
  return anyOf(y) ? [{ name: single ? null : run.label, y, dash: 'thin', text: i => place(run, i) + '\n' + count(y[i]) + ' tokens per second\n' + fixed(seconds[i], 3) + ' s a step' }] : [];
}), { zero: true });
stepChart('memory', 'Memory', cached(run => {
  const y = stepsColumn(run, 'resident_bytes').map(bytes => bytes === null ? null : bytes / 2 ** 30);
  return anyOf(y) ? [{ name: single ? null : run.label, y, text: i => place(run, i) + '\n' + fixed(y[i], 3) + ' GiB in the largest rank' }] : [];
}), { zero: true });
stepChart('sent', 'Bytes sent in a step', cached(run => {
  const [sent, least] = ['bytes_sent', 'bytes_least'].map(key => stepsColumn(run, key).map(bytes => bytes / 2 ** 20));
  if (!sent.some(bytes => bytes > 0)) return [];
  const text = i => place(run, i) + '\n' + fixed(sent[i], 2) + ' MiB sent\n' + fixed(least[i], 2) + ' MiB is the least';
  return [{ name: named(run, 'sent'), y: sent, text }, { name: named(run, 'least'), y: least, dash: 'dashed', text }];
}), { zero: true });
byId('along').addEventListener('change', () => byStep.forEach(repaint => repaint()));
byId('learning').hidden = !runs.some(run => run.table('steps').rows.length);

// ---- What plots of languages show.
const perByte = (it, run, when) => it.of[run] ? it.of[run]['tokens_per_byte_' + when] : null;
const measures = [];
const unitName = () => unit() === 'bits_per_byte' ? 'bits per byte' : 'nats per document';
const digits = () => unit() === 'bits_per_byte' ? 3 : 1;
runs.forEach((run, at) => {
  const has = of => all.some(it => known(of(it)));
  const add = (name, of, diverging, show) => has(of) && measures.push({ name: named(run, name), of, diverging, show });
  add('Change, after less before', it => delta(it, at), true, v => signed(v, digits()) + ' ' + unitName());
  add('Change in per cent', it => { const d = delta(it, at); return known(d) ? 100 * d / value(it, at, 'before') : null; }, true, v => signed(v, 1) + ' %');
  add('After', it => value(it, at, 'after'), false, v => fixed(v, digits()) + ' ' + unitName());
  add('Before', it => value(it, at, 'before'), false, v => fixed(v, digits()) + ' ' + unitName());
  add('Tokens per byte after', it => perByte(it, at, 'after'), false, v => fixed(v, 3) + ' tokens per byte');
  add('Change of tokens per byte in per cent', it => { const [a, b] = [perByte(it, at, 'before'), perByte(it, at, 'after')]; return known(a) && known(b) ? 100 * (b - a) / a : null; }, true, v => signed(v, 1) + ' %');
});
if (runs.length === 2) {
  const of = it => difference(value(it, 0, 'after'), value(it, 1, 'after'));
  if (all.some(it => known(of(it)))) measures.unshift({ name: runs[1].label + ' less ' + runs[0].label + ', after', of, diverging: true, show: v => signed(v, digits()) + ' ' + unitName() });
}
byId('measure').append(...measures.map((measure, i) => el('option', { value: i }, measure.name)));
const measure = () => measures[byId('measure').value] || null;

// ---- Filters, for the table and every plot of languages.
const options = key => [...new Set(all.map(it => it[key]).filter(Boolean))].sort();
for (const [id, key] of [['by-script', 'script'], ['by-group', 'group'], ['by-family', 'family']]) {
  const counts = new Map();
  for (const it of all) counts.set(it[key], (counts.get(it[key]) || 0) + 1);
  byId(id).append(el('option', { value: '' }, 'all'), ...options(key).map(name => el('option', { value: name }, name + ' (' + counts.get(name) + ')')));
}
let passing = new Set(all);
function filter() {
  const words = byId('search').value.normalize('NFKD').replace(/\p{M}/gu, '').toLowerCase().split(/\s+/).filter(Boolean);
  const is = (id, text) => !byId(id).value || byId(id).value === text;
  passing = new Set(all.filter(it => words.every(word => it.words.includes(word)) && is('by-script', it.script) && is('by-group', it.group) && is('by-family', it.family)));
  for (const row of body.rows) row.hidden = !passing.has(row.of);
  byId('shown').textContent = count(passing.size) + ' of ' + count(all.length) + ' languages';
  byLanguage.forEach(repaint => repaint());
}
const byLanguage = [];
const faded = it => passing.has(it) ? '' : ' dim';
const dotText = it => {
  const lines = [title(it), [it.script, it.family, it.group].filter(Boolean).join(' · ')];
  runs.forEach((run, at) => {
    const [before, after] = [value(it, at, 'before'), value(it, at, 'after')];
    if (known(before) || known(after)) lines.push(named(run, known(before) && known(after) ? fixed(before, digits()) + ' → ' + fixed(after, digits()) + ' ' + unitName() : fixed(known(after) ? after : before, digits()) + ' ' + unitName()));
  });
  return lines.join('\n');
};

// ---- Every change.
function paintChanges(width) {
  const height = 230, [left, right, top, bottom] = [54, width - 12, 8, height - 36];
  const lists = runs.map((run, at) => all.filter(it => known(delta(it, at))).sort((a, b) => delta(a, at) - delta(b, at)));
  const [low, high] = bounds([0, ...lists.flatMap((list, at) => list.map(it => delta(it, at)))]);
  const y = linear(low, high, bottom, top), points = [];
  const most = Math.max(...lists.map(list => list.length), 1);
  const nodes = lists.map((list, at) => {
    const x = i => left + (i + 0.5) / list.length * (right - left), room = (right - left) / most;
    list.forEach((it, i) => points.push({ x: x(i), y: y(delta(it, at)), text: title(it) + '\n' + named(runs[at], signed(delta(it, at), digits()) + ' ' + unitName() + ' (' + percent(delta(it, at) / value(it, at, 'before')) + ')') }));
    if (!single) return draw('g', { class: 'c' + at }, draw('path', { class: 'line', d: pathOf(list.map((it, i) => [x(i), y(delta(it, at))])) }));
    return list.map((it, i) => draw('rect', { class: (delta(it, at) < 0 ? 'bar-better' : 'bar-worse') + faded(it), x: (x(i) - room * 0.4).toFixed(2), width: (room * 0.8).toFixed(2),
      y: Math.min(y(0), y(delta(it, at))).toFixed(1), height: Math.abs(y(0) - y(delta(it, at))).toFixed(1) }));
  });
  points.sort((a, b) => a.x - b.x);
  return { height, points, nodes: [grid(y, left, right), nodes, draw('line', { class: 'zero', x1: left, x2: right, y1: y(0), y2: y(0) }),
    draw('text', { class: 'end', x: right, y: height - 12 }, 'languages, by change in ' + unitName())] };
}

// ---- By script, family, resource group.
const ORDER = ['high', 'medium-high', 'medium', 'medium-low', 'low', 'unseen'];
function paintStrip(width) {
  const shown = measure();
  if (!shown) return null;
  byId('strip-title').textContent = shown.name + ' by ' + byId('rows-by').selectedOptions[0].textContent;
  const key = byId('rows-by').value, groups = new Map();
  for (const it of all) if (known(shown.of(it))) { const name = it[key] || 'unknown'; if (!groups.has(name)) groups.set(name, []); groups.get(name).push(it); }
  let rows = [...groups].sort((a, b) => b[1].length - a[1].length);
  if (key === 'group') rows.sort((a, b) => ((ORDER.indexOf(a[0]) + 9) % 9) - ((ORDER.indexOf(b[0]) + 9) % 9));
  const most = 12, many = rows.length > most;
  byId('all-rows').parentNode.hidden = !many;
  if (many && !byId('all-rows').checked) {
    const rest = rows.slice(most - 1);
    rows = [...rows.slice(0, most - 1), [rest.length + ' others', rest.flatMap(([, list]) => list)]];
  }
  const narrow = width < 620, left = narrow ? 14 : 170, right = width - 14, top = 6;
  const [low, high] = bounds([...(shown.diverging ? [0] : []), ...rows.flatMap(([, list]) => list.map(shown.of))]);
  const x = linear(low, high, left, right, { marks: narrow ? 4 : 7 });
  const nodes = [], points = [];
  let y = top;
  for (const [name, list] of rows) {
    // Dots that would lie on one another are stacked about the row's middle.
    const sorted = [...list].sort((a, b) => shown.of(a) - shown.of(b)), columns = new Map();
    for (const it of sorted) { const at = Math.round(x(shown.of(it)) / 5); if (!columns.has(at)) columns.set(at, []); columns.get(at).push(it); }
    const tallest = Math.max(...[...columns.values()].map(list => list.length)), step = Math.min(5, 64 / tallest);
    const height = Math.max(24, tallest * step + 14) + (narrow ? 16 : 0), middle = y + (narrow ? 16 : 0) + (height - (narrow ? 16 : 0)) / 2;
    const mean = list.reduce((sum, it) => sum + shown.of(it), 0) / list.length;
    nodes.push(draw('line', { class: 'grid', x1: narrow ? 0 : 0, x2: width, y1: y + height, y2: y + height }),
      draw('text', { class: 'name' + (narrow ? '' : ' end'), x: narrow ? 2 : left - 14, y: narrow ? y + 14 : middle + 4 }, (name.length > 22 ? name.slice(0, 21) + '…' : name) + '  ' + count(list.length)));
    const dots = new Map();
    for (const [at, pile] of columns) pile.forEach((it, i) => dots.set(it, [at * 5, middle + (i - (pile.length - 1) / 2) * step]));
    for (const it of sorted) {
      const [cx, cy] = dots.get(it);
      nodes.push(draw('circle', { class: 'dot ' + shade(shown.of(it)) + faded(it), r: 3.4, cx, cy: cy.toFixed(1) }));
      if (passing.has(it)) points.push({ x: cx, y: cy, text: dotText(it) + '\n' + shown.show(shown.of(it)) });
    }
    nodes.push(draw('line', { class: 'mean', x1: x(mean), x2: x(mean), y1: middle - 9, y2: middle + 9 }));
    points.push({ x: x(mean), y: middle - 9, text: name + '\nmean of ' + count(list.length) + ': ' + shown.show(mean) });
    y += height;
  }
  const lines = x.marks.map(mark => draw('line', { class: mark === 0 ? 'zero' : 'grid', x1: x(mark), x2: x(mark), y1: top, y2: y }));
  return { height: y + 26, points, nodes: [lines, nodes, x.marks.map(mark => draw('text', { class: 'middle', x: x(mark), y: y + 18 }, x.label(mark)))] };
}

// ---- Colour by value: blue-green is better, orange is worse; blue from light to dark where there is no better.
let shade = () => 'd3';
let steps = [];
function setShades() {
  const shown = measure();
  if (!shown) return;
  const values = all.map(shown.of).filter(known).sort((a, b) => a - b), at = share => values[Math.min(values.length - 1, Math.floor(share * values.length))];
  if (shown.diverging) {
    const far = Math.max(...values.map(Math.abs).sort((a, b) => a - b).slice(0, Math.ceil(values.length * 0.95)).slice(-1), 1e-9);
    steps = [-0.6, -0.25, -0.02, 0.02, 0.25, 0.6].map(share => share * far);
    shade = value => 'd' + steps.filter(step => value > step).length;
  } else {
    steps = [0.2, 0.4, 0.6, 0.8].map(at);
    shade = value => 'q' + steps.filter(step => value > step).length;
  }
}
function shadeLegend() {
  const shown = measure(), kind = shown.diverging ? 'd' : 'q';
  const text = i => i === 0 ? 'up to ' + shown.show(steps[0]) : i === steps.length ? 'above ' + shown.show(steps[i - 1]) : '';
  return el('ul', { class: 'legend' }, Array.from({ length: steps.length + 1 }, (_, i) => el('li', {},
    draw('svg', { viewBox: '0 0 12 10', style: 'width:12px', 'aria-hidden': 'true' }, draw('circle', { class: 'dot ' + kind + i, r: 5, cx: 6, cy: 5 })), text(i) || el('span', { class: 'unseen' }, 'up to ' + shown.show(steps[i])))));
}

// ---- The map.
// Nobody lives south of the map: what a corpus puts there has no place.
const places = all.filter(it => it.place && it.place[1] > -58 && it.place[1] < 84);
function paintMap(width) {
  const shown = measure();
  if (!shown) return null;
  byId('map-title').textContent = shown.name;
  // From 60° south to 84° north.
  const size = width / 5.46, top = equalEarth(0, 84)[1], height = Math.round((top - equalEarth(0, -58)[1]) * size);
  const at = (longitude, latitude) => { const [x, y] = equalEarth(longitude, latitude); return [width / 2 + x * size, (top - y) * size]; };
  const walk = (points, close) => pathOf(points) + (close ? 'Z' : '');
  const range = (from, to, by) => Array.from({ length: Math.round((to - from) / by) + 1 }, (_, i) => from + i * by);
  const graticule = [...range(-180, 180, 30).map(longitude => walk(range(-58, 84, 4).map(latitude => at(longitude, Math.min(latitude, 84))))),
    ...range(-30, 60, 30).map(latitude => walk([at(-180, latitude), at(180, latitude)]))].join('');
  const land = report.land.map(ring => walk(Array.from({ length: ring.length / 2 }, (_, i) => at(ring[2 * i] / 10, Math.max(ring[2 * i + 1] / 10, -58))), true)).join('');
  const dots = places.filter(it => known(shown.of(it))).sort((a, b) => Math.abs(shown.of(a)) - Math.abs(shown.of(b)));
  const points = [], radius = width < 620 ? 3 : 4.4;
  const nodes = dots.map(it => {
    const [x, y] = at(...it.place);
    if (passing.has(it)) points.push({ x, y, text: dotText(it) + '\n' + shown.show(shown.of(it)) });
    return draw('circle', { class: 'dot ' + shade(shown.of(it)) + faded(it), r: radius, cx: x.toFixed(1), cy: y.toFixed(1) });
  });
  points.sort((a, b) => a.x - b.x);
  return { height, points, nodes: [draw('path', { class: 'graticule', d: graticule }), draw('path', { class: 'land', d: land }), nodes] };
}

// ---- Before across, after upwards.
function scatter(of, digits, unitText) {
  return width => {
    const height = Math.min(width, 420), [left, right, top, bottom] = [54, width - 12, 8, height - 52];
    const pairs = runs.flatMap((run, at) => all.map(it => ({ it, at, x: of(it, at, 'before'), y: of(it, at, 'after') })).filter(pair => known(pair.x) && known(pair.y)));
    const [low, high] = bounds(pairs.flatMap(pair => [pair.x, pair.y])), from = low < high / 3 ? 0 : low;
    const x = linear(from, high, left, right), y = linear(from, high, bottom, top), points = [];
    const nodes = pairs.map(pair => {
      if (passing.has(pair.it)) points.push({ x: x(pair.x), y: y(pair.y), text: title(pair.it) + '\n' + named(runs[pair.at], fixed(pair.x, digits()) + ' → ' + fixed(pair.y, digits()) + ' ' + unitText() + ' (' + percent(pair.y / pair.x - 1) + ')') });
      return draw('g', { class: 'c' + pair.at }, draw('circle', { class: 'c dot' + faded(pair.it), r: 3.2, cx: x(pair.x).toFixed(1), cy: y(pair.y).toFixed(1) }));
    });
    points.sort((a, b) => a.x - b.x);
    return { height, points, nodes: [grid(y, left, right), across(x, bottom, 'before, ' + unitText(), right, left), draw('line', { class: 'zero dashed', x1: x(x.low), y1: y(x.low), x2: x(x.high), y2: y(x.high) }), nodes] };
  };
}

// ---- Tokens planned and read.
function paintTokens(width) {
  const height = 300, [left, right, top, bottom] = [54, width - 12, 8, height - 36];
  const row = (it, at) => it.of[at] || {};
  const order = all.filter(it => runs.some((_, at) => row(it, at).planned_tokens || row(it, at).realised_tokens))
    .sort((a, b) => (row(b, 0).planned_tokens || 0) - (row(a, 0).planned_tokens || 0) || (row(b, 0).realised_tokens || 0) - (row(a, 0).realised_tokens || 0));
  const numbers = order.flatMap(it => runs.flatMap((_, at) => [row(it, at).planned_tokens, row(it, at).realised_tokens, row(it, at).corpus_tokens])).filter(n => n > 0);
  const y = logarithmic(...bounds(numbers), bottom, top), points = [], room = (right - left) / Math.max(order.length, 1);
  const nodes = runs.map((run, at) => {
    const planned = order.flatMap((it, i) => row(it, at).planned_tokens > 0 ? [[left + i * room, y(row(it, at).planned_tokens)], [left + (i + 1) * room, y(row(it, at).planned_tokens)]] : []);
    return draw('g', { class: 'c' + at },
      at === 0 && order.map((it, i) => row(it, 0).corpus_tokens > 0 && draw('circle', { class: 'grey' + faded(it), r: 1.6, cx: (left + (i + 0.5) * room).toFixed(1), cy: y(row(it, 0).corpus_tokens).toFixed(1) })),
      planned.length > 0 && draw('path', { class: 'line', d: pathOf(planned) }),
      order.map((it, i) => {
        const { planned_tokens: plan, realised_tokens: read, corpus_tokens: has } = row(it, at);
        if (!known(read)) return null;
        const [cx, cy] = [left + (i + 0.5) * room, y(Math.max(read, 1))];
        if (passing.has(it)) points.push({ x: cx, y: cy, text: title(it) + '\n' + named(run, count(read) + ' tokens read of ' + count(plan) + ' planned') + '\n' + count(has) + ' in the corpus' });
        return draw('circle', { class: 'c dot' + faded(it), r: 2.4, cx: cx.toFixed(1), cy: cy.toFixed(1) });
      }));
  });
  points.sort((a, b) => a.x - b.x);
  return { height, points, nodes: [grid(y, left, right), nodes, draw('text', { class: 'end', x: right, y: height - 12 }, 'languages, by planned tokens')] };
}

// ---- The clock.
const lanes = [['attempt', 'attempts'], ['checkpoint', 'checkpoints'], ['held-out text', 'held-out text'], ['stall', 'stalls']];
const lane = kind => ['attempt', 'checkpoint', 'held-out text'].includes(kind) ? kind : kind === 'not saved' ? 'checkpoint' : 'stall';
function paintClock(width) {
  const narrow = width < 620, left = narrow ? 8 : 110, right = width - 12, row = 22, nodes = [], points = [];
  const lists = runs.map(run => run.objects('timeline')), starts = lists.map(list => Math.min(...list.map(event => event.begin)));
  const longest = Math.max(...lists.flatMap((list, at) => list.map(event => event.end - starts[at])), 1);
  const [per, name] = longest > 5400 ? [3600, 'hours'] : longest > 180 ? [60, 'minutes'] : [1, 'seconds'];
  const x = linear(0, longest / per, left, right, { marks: narrow ? 4 : 8, exact: true });
  let y = 4;
  runs.forEach((run, at) => {
    if (!lists[at].length) return;
    if (!single) { nodes.push(draw('text', { class: 'name', x: 0, y: y + 14 }, run.label)); y += 22; }
    for (const [kind, label] of lanes) {
      const events = lists[at].filter(event => lane(event.kind) === kind);
      if (!events.length) continue;
      if (narrow) { nodes.push(draw('text', { x: left, y: y + 13 }, label)); y += 18; }
      else nodes.push(draw('text', { class: 'end', x: left - 12, y: y + 15 }, label));
      nodes.push(draw('line', { class: 'grid', x1: left, x2: right, y1: y + row, y2: y + row }));
      // Of thousands the longest are drawn; the table has them all.
      const drawn = [...events].sort((a, b) => (b.end - b.begin) - (a.end - a.begin)).slice(0, 800).sort((a, b) => a.begin - b.begin);
      drawn.forEach((event, i) => {
        const from = x((event.begin - starts[at]) / per), to = x((event.end - starts[at]) / per), bad = event.kind === 'not saved' || kind === 'stall';
        nodes.push(draw('g', { class: 'c' + at }, draw('rect', { class: bad ? 'bar-worse' : kind === 'attempt' ? 'c' + (i % 2 ? ' area' : '') : 'c', rx: 2,
          style: kind === 'attempt' ? 'opacity:' + (i % 2 ? 0.28 : 0.5) : '', x: from.toFixed(1), width: Math.max(to - from, 2.2).toFixed(1), y: y + 5, height: 12 })));
        points.push({ x: (from + to) / 2, y: y + 11, text: event.kind[0].toUpperCase() + event.kind.slice(1) + (event.end - event.begin >= 0.05 ? ', ' + duration(event.end - event.begin) : '') + '\n' + event.text + '\n' + clockTime(event.begin) });
      });
      y += row;
    }
    y += 8;
  });
  return { height: y + 34, points, nodes: [nodes, across(x, y, name + ' since the beginning', right, left)] };
}
function spent(run) {
  const parts = run.objects('time');
  if (!parts.length) return null;
  // One colour, five strengths: the words beside it say which is which.
  const strength = [1, 0.62, 0.42, 0.28, 0.16];
  return el('div', { class: 'c' + run.colour }, !single && el('h3', {}, el('bdi', {}, run.label)),
    el('div', { class: 'stack', role: 'img', 'aria-label': 'Where the time went: ' + parts.map(part => part.what + ' ' + fixed(100 * part.share, 1) + ' %').join(', ') },
      parts.map((part, i) => part.share > 0.001 && el('i', { style: `flex:${part.share} 1 0;opacity:${strength[i]}`, title: part.what }))),
    el('dl', { class: 'spent' }, parts.map((part, i) => [el('dt', { style: 'color:var(--ink)' }, el('span', { class: 'key', style: `opacity:${strength[i]};color:var(--s${run.colour})` }), part.what), el('dd', {}, fixed(100 * part.share, 1) + ' %, ' + part.more)])));
}

// ---- The table.
const number = (key, heading, unitText, of, show, mark) => ({ key, heading, unitText, of, show, mark });
function columnsOfTable() {
  const name = unitName(), d = digits();
  const columns = [
    { key: 'language', heading: 'Language', of: it => it.language, first: true },
    { key: 'name', heading: 'Name', of: it => it.name, css: 'text name' },
    { key: 'script', heading: 'Script', of: it => it.script, css: 'text' },
    { key: 'family', heading: 'Family', of: it => it.family, css: 'text' },
    { key: 'group', heading: 'Group', of: it => it.group, css: 'text' }];
  const gain = v => known(v) && v !== 0 ? (v < 0 ? 'gain' : 'loss') : '';
  runs.forEach((run, at) => {
    const of = single ? '' : run.label, sub = text => [of, text].filter(Boolean).join(': ');
    const cell = (it, key) => it.of[at] ? it.of[at][key] : null;
    if (hasBefore) columns.push(number('before' + at, 'Before', sub(name), it => value(it, at, 'before'), v => fixed(v, d)));
    if (hasAfter) columns.push(number('after' + at, 'After', sub(name), it => value(it, at, 'after'), v => fixed(v, d)));
    if (hasBoth) {
      columns.push(number('difference' + at, 'Difference', sub(name), it => delta(it, at), v => signed(v, d), gain));
      columns.push(number('change' + at, 'Change', sub('per cent'), it => { const v = delta(it, at); return known(v) ? v / value(it, at, 'before') : null; }, v => percent(v), gain));
    }
    if (single && unit() === 'bits_per_byte' && all.some(it => known(cell(it, 'after_low')))) {
      columns.push({ ...number('interval', 'After, 95 %', name, it => cell(it, 'after_low'), v => fixed(v, d)), both: it => known(cell(it, 'after_low')) ? fixed(cell(it, 'after_low'), d) + ' – ' + fixed(cell(it, 'after_high'), d) : '–' });
    }
    if (single && hasBefore && hasAfter) columns.push(number('fb' + at, 'Tokens', 'per byte, before', it => perByte(it, at, 'before'), v => fixed(v, 3)));
    if (hasBefore || hasAfter) columns.push(number('fa' + at, 'Tokens', sub(hasAfter ? 'per byte, after' : 'per byte'), it => perByte(it, at, hasAfter ? 'after' : 'before'), v => fixed(v, 3)));
    if (single) columns.push(number('documents', 'Documents', 'measured', it => cell(it, 'documents'), count), number('corpus', 'Tokens', 'in the corpus', it => cell(it, 'corpus_tokens'), count));
    columns.push(number('planned' + at, 'Tokens', sub('planned'), it => cell(it, 'planned_tokens'), count));
    columns.push(number('read' + at, 'Tokens', sub('read'), it => cell(it, 'realised_tokens'), count));
    if (single) columns.push(number('epochs', 'Epochs', 'read', it => cell(it, 'epochs'), v => fixed(v, 2)));
  });
  if (runs.length === 2 && hasAfter) columns.splice(5, 0, number('apart', 'Apart', runs[1].label + ' less ' + runs[0].label, it => difference(value(it, 0, 'after'), value(it, 1, 'after')), v => signed(v, d), gain));
  return columns.filter(column => column.first || all.some(it => { const v = column.of(it); return column.show ? known(v) : v; }));
}
const table = byId('table'), body = el('tbody');
let columns = [], sorted = { key: null, up: true };
function fillTable() {
  columns = columnsOfTable();
  if (!columns.some(column => column.key === sorted.key)) {
    sorted = { key: ['apart', 'difference0', 'after0', 'before0', 'language'].find(key => columns.some(column => column.key === key)), up: true };
  }
  table.replaceChildren(el('caption', { class: 'unseen' }, 'All languages; a column\'s button sorts by it'), el('thead', {}, el('tr', {}, columns.map(column => {
    const button = el('button', { type: 'button' }, column.heading);
    button.addEventListener('click', () => { sorted = { key: column.key, up: sorted.key === column.key ? !sorted.up : true }; sortTable(); });
    return el('th', { scope: 'col', class: column.first ? 'first text' : column.css, 'data-key': column.key }, button, column.unitText && el('small', {}, column.unitText));
  }))), body);
  body.replaceChildren(...all.map(it => {
    const row = el('tr', {}, columns.map(column => {
      const v = column.of(it);
      if (!column.show) return el('td', { class: column.first ? 'first text' : column.css, title: column.css === 'text name' ? v : null }, el('bdi', {}, v || '–'));
      return el('td', { class: column.mark ? column.mark(v) : null }, column.both ? column.both(it) : column.show(v));
    }));
    row.of = it;
    return row;
  }));
  sortTable();
}
function sortTable() {
  const column = columns.find(column => column.key === sorted.key), sign = sorted.up ? 1 : -1;
  for (const head of table.tHead.rows[0].cells) {
    if (head.dataset.key === sorted.key) head.setAttribute('aria-sort', sorted.up ? 'ascending' : 'descending'); else head.removeAttribute('aria-sort');
  }
  // What is not known comes last either way.
  const order = [...body.rows].map(row => ({ row, v: column.of(row.of) })).sort(({ v: a }, { v: b }) => column.show
    ? (known(b) - known(a)) || (known(a) ? sign * (a - b) : 0) : (!a - !b) || sign * String(a).localeCompare(String(b)));
  body.append(...order.map(({ row }) => row));
}
byId('save-csv').addEventListener('click', () => {
  const quote = text => /[",\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
  const cell = v => v == null ? '' : quote(String(v));
  const lines = [columns.map(column => cell([column.heading, column.unitText].filter(Boolean).join(', '))), ...[...body.rows].filter(row => !row.hidden).map(row => columns.map(column => cell(column.of(row.of))))];
  const link = el('a', { download: 'languages.csv', href: URL.createObjectURL(new Blob([lines.map(line => line.join(',')).join('\r\n') + '\r\n'], { type: 'text/csv' })) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});

// ---- Plan and environment.
function settings() {
  const rows = [['environment', 'Environment'], ['plan', 'Plan']].flatMap(([table, heading]) => {
    const keys = [...new Set(runs.flatMap(run => run.column(table, 'key')))];
    const values = runs.map(run => new Map(run.table(table).rows));
    return keys.length ? [el('tr', { class: 'part' }, el('th', { colspan: runs.length + 1, scope: 'colgroup' }, heading)), ...keys.map(key => {
      const of = values.map(map => map.has(key) ? map.get(key) : '–'), differs = new Set(of).size > 1;
      const row = el('tr', { class: differs ? 'differs' : null }, el('td', { class: 'first' }, key), of.map(text => el('td', { class: 'value' }, el('bdi', {}, text))));
      row.words = [key, ...of].join(' ').toLowerCase();
      row.differs = differs;
      return row;
    })] : [];
  });
  byId('settings').append(el('caption', { class: 'unseen' }, 'Plan and environment'), el('thead', {}, el('tr', {}, el('th', { class: 'first', scope: 'col' }, 'Key'), runs.map(run => el('th', { scope: 'col' }, single ? 'Value' : el('bdi', {}, run.label))))), el('tbody', {}, rows));
  byId('only-label').hidden = single;
  const choose = () => rows.forEach(row => { if (row.words) row.hidden = !row.words.includes(byId('search-plan').value.toLowerCase()) || (byId('only').checked && !row.differs); });
  byId('search-plan').addEventListener('input', choose);
  byId('only').addEventListener('change', choose);
}
function events() {
  const list = runs.flatMap(run => run.objects('timeline').map(event => [event, run]));
  byId('events').hidden = !list.length;
  byId('events').querySelector('table').append(el('thead', {}, el('tr', {}, ['When', 'What', ...(single ? [] : ['Run']), 'Lasted', 'More'].map(text => el('th', { scope: 'col' }, text)))),
    el('tbody', {}, list.slice(0, 4000).map(([event, run]) => el('tr', {}, el('td', { class: 'first' }, clockTime(event.begin)), el('td', {}, event.kind), !single && el('td', {}, run.label), el('td', {}, duration(event.end - event.begin)), el('td', {}, event.text)))));
}

// ---- All together.
function languageChart(id, label, has, paint) {
  byId(id).hidden = !has;
  if (has) byLanguage.push(chart(byId(id), label, paint));
}
setShades();
languageChart('changes', 'Every language\'s change', hasBoth, paintChanges);
languageChart('strip', 'Languages by script, family or resource group', measures.length > 0, paintStrip);
languageChart('map', 'Languages on a map of the world', measures.length > 0 && places.length > 0, paintMap);
languageChart('scatter', 'Every language before and after', hasBoth, scatter(value, digits, unitName));
languageChart('fertility', 'Tokens per byte before and after', hasBoth, scatter(perByte, () => 3, () => 'tokens per byte'));
languageChart('tokens', 'Tokens by language, planned and read', all.some(it => it.of.some(row => row && (row.planned_tokens > 0 || row.realised_tokens > 0))), paintTokens);
byId('data').hidden = byId('tokens').hidden;
if (!single) for (const id of ['changes', 'scatter', 'fertility', 'tokens']) if (!byId(id).hidden) legend(byId(id), runs.map(run => ({ name: run.label, colour: run.colour })));
const colours = () => { for (const id of ['strip', 'map']) if (!byId(id).hidden) { byId(id).querySelector('ul.legend')?.remove(); byId(id).append(shadeLegend()); } };
if (measures.length) colours();
const timed = runs.some(run => run.table('timeline').rows.length);
byId('clock').hidden = !timed;
if (timed) chart(byId('clock'), 'Time line', paintClock);
byId('time').append(...runs.map(spent).filter(Boolean));
byId('machine').hidden = !timed && byId('speed').hidden;
fillTable();
filter();
settings();
events();

byId('languages').hidden = !all.length;
byId('languages-why').textContent = hasBoth ? 'Held-out text before and after training: the negative log-likelihood in ' + 'bits per byte is the same measure whatever the tokenizer. Search and filters hold for every plot here and for the table.'
  : 'Search and filters hold for every plot here and for the table.';
for (const id of ['unit', 'measure', 'rows-by', 'all-rows']) byId(id).closest('label').hidden = !measures.length;
byId('all-rows').closest('label').hidden = byId('all-rows').closest('label').hidden || new Set(all.map(it => it[byId('rows-by').value])).size <= 12;
for (const id of ['search', 'by-script', 'by-group', 'by-family']) byId(id).addEventListener('input', filter);
byId('reset').addEventListener('click', () => { for (const id of ['search', 'by-script', 'by-group', 'by-family']) byId(id).value = ''; filter(); });
byId('unit').addEventListener('change', () => { setShades(); fillTable(); filter(); colours(); });
byId('measure').addEventListener('change', () => { setShades(); byLanguage.forEach(repaint => repaint()); colours(); });
for (const id of ['rows-by', 'all-rows']) byId(id).addEventListener('change', () => byLanguage.forEach(repaint => repaint()));

// An odd one takes the whole width.
for (const plots of document.querySelectorAll('.plots')) {
  const shown = [...plots.children].filter(figure => !figure.hidden);
  if (shown.length % 2) shown[0].classList.add('whole');
}

// ---- Sections: links to those that are shown, and which of them one reads.
const shownSections = [...document.querySelectorAll('main > section')].filter(section => !section.hidden);
byId('sections').append(el('ul', {}, shownSections.map(section => el('li', {}, el('a', { href: '#' + section.id }, section.querySelector('h2').textContent)))));
const watcher = new IntersectionObserver(entries => entries.forEach(entry => {
  if (!entry.isIntersecting) return;
  for (const link of byId('sections').querySelectorAll('a')) {
    if (link.hash === '#' + entry.target.id) link.setAttribute('aria-current', 'true'); else link.removeAttribute('aria-current');
  }
}), { rootMargin: '-30% 0px -60% 0px' });
shownSections.forEach(section => watcher.observe(section));
