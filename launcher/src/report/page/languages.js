// Plots of languages: what they show and in which colour, the filters that dim them, rows of dots, the map.

// ---- What plots of languages show.
const perByte = (it, run, when) => (it.of[run] ? it.of[run]['tokens_per_byte_' + when] : null);
const measures = [];
const unitName = () => (unit() === 'bits_per_byte' ? 'bits per byte' : 'nats per document');
const digits = () => (unit() === 'bits_per_byte' ? 3 : 1);
runs.forEach((run, at) => {
  const has = of => all.some(it => known(of(it)));
  const add = (name, of, diverging, show) => has(of) && measures.push({ name: named(run, name), of, diverging, show });
  add(
    'Change, after less before',
    it => delta(it, at),
    true,
    v => signed(v, digits()) + ' ' + unitName()
  );
  add(
    'Change in per cent',
    it => {
      const d = delta(it, at);
      return known(d) ? (100 * d) / value(it, at, 'before') : null;
    },
    true,
    v => signed(v, 1) + ' %'
  );
  add(
    'After',
    it => value(it, at, 'after'),
    false,
    v => fixed(v, digits()) + ' ' + unitName()
  );
  add(
    'Before',
    it => value(it, at, 'before'),
    false,
    v => fixed(v, digits()) + ' ' + unitName()
  );
  add(
    'Tokens per byte after',
    it => perByte(it, at, 'after'),
    false,
    v => fixed(v, 3) + ' tokens per byte'
  );
  add(
    'Change of tokens per byte in per cent',
    it => {
      const [a, b] = [perByte(it, at, 'before'), perByte(it, at, 'after')];
      return known(a) && known(b) ? (100 * (b - a)) / a : null;
    },
    true,
    v => signed(v, 1) + ' %'
  );
});
if (runs.length === 2) {
  const of = it => difference(value(it, 0, 'after'), value(it, 1, 'after'));
  if (all.some(it => known(of(it))))
    measures.unshift({
      name: runs[1].label + ' less ' + runs[0].label + ', after',
      of,
      diverging: true,
      show: v => signed(v, digits()) + ' ' + unitName()
    });
}
byId('measure').append(...measures.map((measure, i) => el('option', { value: i }, measure.name)));
const measure = () => measures[byId('measure').value] || null;

// ---- Filters, for the table and every plot of languages.
const options = key => [...new Set(all.map(it => it[key]).filter(Boolean))].sort();
for (const [id, key] of [
  ['by-script', 'script'],
  ['by-group', 'group'],
  ['by-family', 'family']
]) {
  const counts = new Map();
  for (const it of all) counts.set(it[key], (counts.get(it[key]) || 0) + 1);
  byId(id).append(
    el('option', { value: '' }, 'all'),
    ...options(key).map(name => el('option', { value: name }, name + ' (' + counts.get(name) + ')'))
  );
}
let passing = new Set(all);
function filter() {
  const words = byId('search')
    .value.normalize('NFKD')
    .replace(/\p{M}/gu, '')
    .toLowerCase()
    .split(/\s+/)
    .filter(Boolean);
  const is = (id, text) => !byId(id).value || byId(id).value === text;
  passing = new Set(
    all.filter(
      it =>
        words.every(word => it.words.includes(word)) &&
        is('by-script', it.script) &&
        is('by-group', it.group) &&
        is('by-family', it.family)
    )
  );
  for (const row of body.rows) row.hidden = !passing.has(row.of);
  byId('shown').textContent = count(passing.size) + ' of ' + count(all.length) + ' languages';
  byLanguage.forEach(repaint => repaint());
}
const byLanguage = [];
const faded = it => (passing.has(it) ? '' : ' dim');
const dotText = it => {
  const lines = [title(it), [it.script, it.family, it.group].filter(Boolean).join(' · ')];
  runs.forEach((run, at) => {
    const [before, after] = [value(it, at, 'before'), value(it, at, 'after')];
    if (known(before) || known(after))
      lines.push(
        named(
          run,
          known(before) && known(after)
            ? fixed(before, digits()) + ' → ' + fixed(after, digits()) + ' ' + unitName()
            : fixed(known(after) ? after : before, digits()) + ' ' + unitName()
        )
      );
  });
  return lines.join('\n');
};

// What a plot over languages from left to right is made of.
function framed([height, left, right, y], points, nodes, below) {
  points.sort((a, b) => a.x - b.x);
  const text = draw('text', { class: 'end', x: right, y: height - 12 }, below);
  return { height, points, nodes: [grid(y, left, right), nodes, text] };
}

// ---- Every change.
function paintChanges(width) {
  const height = 230,
    [left, right, top, bottom] = [54, width - 12, 8, height - 36];
  const lists = runs.map((run, at) =>
    all.filter(it => known(delta(it, at))).sort((a, b) => delta(a, at) - delta(b, at))
  );
  const [low, high] = bounds([0, ...lists.flatMap((list, at) => list.map(it => delta(it, at)))]);
  const y = linear(low, high, bottom, top),
    points = [];
  const most = Math.max(...lists.map(list => list.length), 1);
  const nodes = lists.map((list, at) => {
    const x = i => left + ((i + 0.5) / list.length) * (right - left),
      room = (right - left) / most;
    list.forEach((it, i) =>
      points.push({
        x: x(i),
        y: y(delta(it, at)),
        text:
          title(it) +
          '\n' +
          named(
            runs[at],
            signed(delta(it, at), digits()) +
              ' ' +
              unitName() +
              ' (' +
              percent(delta(it, at) / value(it, at, 'before')) +
              ')'
          )
      })
    );
    if (!single)
      return draw(
        'g',
        { class: 'c' + at },
        draw('path', { class: 'line', d: pathOf(list.map((it, i) => [x(i), y(delta(it, at))])) })
      );
    return list.map((it, i) =>
      draw('rect', {
        class: (delta(it, at) < 0 ? 'bar-better' : 'bar-worse') + faded(it),
        x: (x(i) - room * 0.4).toFixed(2),
        width: (room * 0.8).toFixed(2),
        y: Math.min(y(0), y(delta(it, at))).toFixed(1),
        height: Math.abs(y(0) - y(delta(it, at))).toFixed(1)
      })
    );
  });
  const zero = draw('line', { class: 'zero', x1: left, x2: right, y1: y(0), y2: y(0) });
  return framed([height, left, right, y], points, [nodes, zero], 'languages, by change in ' + unitName());
}

// ---- By script, family, resource group.
const ORDER = ['high', 'medium-high', 'medium', 'medium-low', 'low', 'unseen'];
function paintStrip(width) {
  const shown = measure();
  if (!shown) return null;
  byId('strip-title').textContent = shown.name + ' by ' + byId('rows-by').selectedOptions[0].textContent;
  const key = byId('rows-by').value,
    groups = new Map();
  for (const it of all)
    if (known(shown.of(it))) {
      const name = it[key] || 'unknown';
      if (!groups.has(name)) groups.set(name, []);
      groups.get(name).push(it);
    }
  let rows = [...groups].sort((a, b) => b[1].length - a[1].length);
  if (key === 'group') rows.sort((a, b) => ((ORDER.indexOf(a[0]) + 9) % 9) - ((ORDER.indexOf(b[0]) + 9) % 9));
  const most = 12,
    many = rows.length > most;
  byId('all-rows').parentNode.hidden = !many;
  if (many && !byId('all-rows').checked) {
    const rest = rows.slice(most - 1);
    rows = [...rows.slice(0, most - 1), [rest.length + ' others', rest.flatMap(([, list]) => list)]];
  }
  const narrow = width < 620,
    left = narrow ? 14 : 170,
    right = width - 14,
    top = 6;
  const [low, high] = bounds([...(shown.diverging ? [0] : []), ...rows.flatMap(([, list]) => list.map(shown.of))]);
  const x = linear(low, high, left, right, { marks: narrow ? 4 : 7 });
  const nodes = [],
    points = [];
  let y = top;
  for (const [name, list] of rows) {
    // Dots that would lie on one another are stacked about the row's middle.
    const sorted = [...list].sort((a, b) => shown.of(a) - shown.of(b)),
      columns = new Map();
    for (const it of sorted) {
      const at = Math.round(x(shown.of(it)) / 5);
      if (!columns.has(at)) columns.set(at, []);
      columns.get(at).push(it);
    }
    const tallest = Math.max(...[...columns.values()].map(list => list.length)),
      step = Math.min(5, 64 / tallest);
    const height = Math.max(24, tallest * step + 14) + (narrow ? 16 : 0),
      middle = y + (narrow ? 16 : 0) + (height - (narrow ? 16 : 0)) / 2;
    const mean = list.reduce((sum, it) => sum + shown.of(it), 0) / list.length;
    nodes.push(
      draw('line', { class: 'grid', x1: narrow ? 0 : 0, x2: width, y1: y + height, y2: y + height }),
      draw(
        'text',
        { class: 'name' + (narrow ? '' : ' end'), x: narrow ? 2 : left - 14, y: narrow ? y + 14 : middle + 4 },
        (name.length > 22 ? name.slice(0, 21) + '…' : name) + '  ' + count(list.length)
      )
    );
    const dots = new Map();
    for (const [at, pile] of columns)
      pile.forEach((it, i) => dots.set(it, [at * 5, middle + (i - (pile.length - 1) / 2) * step]));
    for (const it of sorted) {
      const [cx, cy] = dots.get(it);
      nodes.push(draw('circle', { class: 'dot ' + shade(shown.of(it)) + faded(it), r: 3.4, cx, cy: cy.toFixed(1) }));
      if (passing.has(it)) points.push({ x: cx, y: cy, text: dotText(it) + '\n' + shown.show(shown.of(it)) });
    }
    nodes.push(draw('line', { class: 'mean', x1: x(mean), x2: x(mean), y1: middle - 9, y2: middle + 9 }));
    points.push({
      x: x(mean),
      y: middle - 9,
      text: name + '\nmean of ' + count(list.length) + ': ' + shown.show(mean)
    });
    y += height;
  }
  const lines = x.marks.map(mark =>
    draw('line', { class: mark === 0 ? 'zero' : 'grid', x1: x(mark), x2: x(mark), y1: top, y2: y })
  );
  return {
    height: y + 26,
    points,
    nodes: [lines, nodes, x.marks.map(mark => draw('text', { class: 'middle', x: x(mark), y: y + 18 }, x.label(mark)))]
  };
}

// ---- Colour by value: blue-green is better, orange is worse; blue from light to dark where there is no better.
let shade = () => 'd3';
let steps = [];
function setShades() {
  const shown = measure();
  if (!shown) return;
  const values = all
      .map(shown.of)
      .filter(known)
      .sort((a, b) => a - b),
    at = share => values[Math.min(values.length - 1, Math.floor(share * values.length))];
  if (shown.diverging) {
    const far = Math.max(
      ...values
        .map(Math.abs)
        .sort((a, b) => a - b)
        .slice(0, Math.ceil(values.length * 0.95))
        .slice(-1),
      1e-9
    );
    steps = [-0.6, -0.25, -0.02, 0.02, 0.25, 0.6].map(share => share * far);
    shade = value => 'd' + steps.filter(step => value > step).length;
  } else {
    steps = [0.2, 0.4, 0.6, 0.8].map(at);
    shade = value => 'q' + steps.filter(step => value > step).length;
  }
}
function shadeLegend() {
  const shown = measure(),
    kind = shown.diverging ? 'd' : 'q';
  const text = i =>
    i === 0 ? 'up to ' + shown.show(steps[0]) : i === steps.length ? 'above ' + shown.show(steps[i - 1]) : '';
  return el(
    'ul',
    { class: 'legend' },
    Array.from({ length: steps.length + 1 }, (_, i) =>
      el(
        'li',
        {},
        draw(
          'svg',
          { viewBox: '0 0 12 10', style: 'width:12px', 'aria-hidden': 'true' },
          draw('circle', { class: 'dot ' + kind + i, r: 5, cx: 6, cy: 5 })
        ),
        text(i) || el('span', { class: 'unseen' }, 'up to ' + shown.show(steps[i]))
      )
    )
  );
}

// ---- The map.
// Nobody lives south of the map: what a corpus puts there has no place.
const places = all.filter(it => it.place && it.place[1] > -58 && it.place[1] < 84);
function paintMap(width) {
  const shown = measure();
  if (!shown) return null;
  byId('map-title').textContent = shown.name;
  // From 60° south to 84° north.
  const size = width / 5.46,
    top = equalEarth(0, 84)[1],
    height = Math.round((top - equalEarth(0, -58)[1]) * size);
  const at = (longitude, latitude) => {
    const [x, y] = equalEarth(longitude, latitude);
    return [width / 2 + x * size, (top - y) * size];
  };
  const walk = (points, close) => pathOf(points) + (close ? 'Z' : '');
  const range = (from, to, by) => Array.from({ length: Math.round((to - from) / by) + 1 }, (_, i) => from + i * by);
  const graticule = [
    ...range(-180, 180, 30).map(longitude =>
      walk(range(-58, 84, 4).map(latitude => at(longitude, Math.min(latitude, 84))))
    ),
    ...range(-30, 60, 30).map(latitude => walk([at(-180, latitude), at(180, latitude)]))
  ].join('');
  const land = report.land
    .map(ring =>
      walk(
        Array.from({ length: ring.length / 2 }, (_, i) => at(ring[2 * i] / 10, Math.max(ring[2 * i + 1] / 10, -58))),
        true
      )
    )
    .join('');
  const dots = places.filter(it => known(shown.of(it))).sort((a, b) => Math.abs(shown.of(a)) - Math.abs(shown.of(b)));
  const points = [],
    radius = width < 620 ? 3 : 4.4;
  const nodes = dots.map(it => {
    const [x, y] = at(...it.place);
    if (passing.has(it)) points.push({ x, y, text: dotText(it) + '\n' + shown.show(shown.of(it)) });
    return draw('circle', {
      class: 'dot ' + shade(shown.of(it)) + faded(it),
      r: radius,
      cx: x.toFixed(1),
      cy: y.toFixed(1)
    });
  });
  points.sort((a, b) => a.x - b.x);
  return {
    height,
    points,
    nodes: [draw('path', { class: 'graticule', d: graticule }), draw('path', { class: 'land', d: land }), nodes]
  };
}

// ---- Before across, after upwards.
function scatter(of, digits, unitText) {
  return width => {
    const height = Math.min(width, 420),
      [left, right, top, bottom] = [54, width - 12, 8, height - 52];
    const pairs = runs.flatMap((run, at) =>
      all
        .map(it => ({ it, at, x: of(it, at, 'before'), y: of(it, at, 'after') }))
        .filter(pair => known(pair.x) && known(pair.y))
    );
    const [low, high] = bounds(pairs.flatMap(pair => [pair.x, pair.y])),
      from = low < high / 3 ? 0 : low;
    const x = linear(from, high, left, right),
      y = linear(from, high, bottom, top),
      points = [];
    const nodes = pairs.map(pair => {
      if (passing.has(pair.it))
        points.push({
          x: x(pair.x),
          y: y(pair.y),
          text:
            title(pair.it) +
            '\n' +
            named(
              runs[pair.at],
              fixed(pair.x, digits()) +
                ' → ' +
                fixed(pair.y, digits()) +
                ' ' +
                unitText() +
                ' (' +
                percent(pair.y / pair.x - 1) +
                ')'
            )
        });
      return draw(
        'g',
        { class: 'c' + pair.at },
        draw('circle', { class: 'c dot' + faded(pair.it), r: 3.2, cx: x(pair.x).toFixed(1), cy: y(pair.y).toFixed(1) })
      );
    });
    points.sort((a, b) => a.x - b.x);
    return {
      height,
      points,
      nodes: [
        grid(y, left, right),
        across(x, bottom, 'before, ' + unitText(), right, left),
        draw('line', { class: 'zero dashed', x1: x(x.low), y1: y(x.low), x2: x(x.high), y2: y(x.high) }),
        nodes
      ]
    };
  };
}

// ---- Tokens planned and read.
function paintTokens(width) {
  const height = 300,
    [left, right, top, bottom] = [54, width - 12, 8, height - 36];
  const row = (it, at) => it.of[at] || {};
  const order = all
    .filter(it => runs.some((_, at) => row(it, at).planned_tokens || row(it, at).realised_tokens))
    .sort(
      (a, b) =>
        (row(b, 0).planned_tokens || 0) - (row(a, 0).planned_tokens || 0) ||
        (row(b, 0).realised_tokens || 0) - (row(a, 0).realised_tokens || 0)
    );
  const numbers = order
    .flatMap(it =>
      runs.flatMap((_, at) => [row(it, at).planned_tokens, row(it, at).realised_tokens, row(it, at).corpus_tokens])
    )
    .filter(n => n > 0);
  const y = logarithmic(...bounds(numbers), bottom, top),
    points = [],
    room = (right - left) / Math.max(order.length, 1);
  const nodes = runs.map((run, at) => {
    const planned = order.flatMap((it, i) =>
      row(it, at).planned_tokens > 0
        ? [
            [left + i * room, y(row(it, at).planned_tokens)],
            [left + (i + 1) * room, y(row(it, at).planned_tokens)]
          ]
        : []
    );
    return draw(
      'g',
      { class: 'c' + at },
      at === 0 &&
        order.map(
          (it, i) =>
            row(it, 0).corpus_tokens > 0 &&
            draw('circle', {
              class: 'grey' + faded(it),
              r: 1.6,
              cx: (left + (i + 0.5) * room).toFixed(1),
              cy: y(row(it, 0).corpus_tokens).toFixed(1)
            })
        ),
      planned.length > 0 && draw('path', { class: 'line', d: pathOf(planned) }),
      order.map((it, i) => {
        const { planned_tokens: plan, realised_tokens: read, corpus_tokens: has } = row(it, at);
        if (!known(read)) return null;
        const [cx, cy] = [left + (i + 0.5) * room, y(Math.max(read, 1))];
        if (passing.has(it))
          points.push({
            x: cx,
            y: cy,
            text:
              title(it) +
              '\n' +
              named(run, count(read) + ' tokens read of ' + count(plan) + ' planned') +
              '\n' +
              count(has) +
              ' in the corpus'
          });
        return draw('circle', { class: 'c dot' + faded(it), r: 2.4, cx: cx.toFixed(1), cy: cy.toFixed(1) });
      })
    );
  });
  return framed([height, left, right, y], points, nodes, 'languages, by planned tokens');
}
