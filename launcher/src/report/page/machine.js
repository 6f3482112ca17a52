// The run by the clock, what its time went to, all events; the plan and the environment.

// ---- The clock.
const lanes = [
  ['attempt', 'attempts'],
  ['checkpoint', 'checkpoints'],
  ['held-out text', 'held-out text'],
  ['stall', 'stalls']
];
const lane = kind =>
  ['attempt', 'checkpoint', 'held-out text'].includes(kind) ? kind : kind === 'not saved' ? 'checkpoint' : 'stall';
function paintClock(width) {
  const narrow = width < 620,
    left = narrow ? 8 : 110,
    right = width - 12,
    row = 22,
    nodes = [],
    points = [];
  const lists = runs.map(run => run.objects('timeline')),
    starts = lists.map(list => Math.min(...list.map(event => event.begin)));
  const longest = Math.max(...lists.flatMap((list, at) => list.map(event => event.end - starts[at])), 1);
  const [per, name] = longest > 5400 ? [3600, 'hours'] : longest > 180 ? [60, 'minutes'] : [1, 'seconds'];
  const x = linear(0, longest / per, left, right, { marks: narrow ? 4 : 8, exact: true });
  let y = 4;
  runs.forEach((run, at) => {
    if (!lists[at].length) return;
    if (!single) {
      nodes.push(draw('text', { class: 'name', x: 0, y: y + 14 }, run.label));
      y += 22;
    }
    for (const [kind, label] of lanes) {
      const events = lists[at].filter(event => lane(event.kind) === kind);
      if (!events.length) continue;
      if (narrow) {
        nodes.push(draw('text', { x: left, y: y + 13 }, label));
        y += 18;
      } else nodes.push(draw('text', { class: 'end', x: left - 12, y: y + 15 }, label));
      nodes.push(draw('line', { class: 'grid', x1: left, x2: right, y1: y + row, y2: y + row }));
      // Of thousands the longest are drawn; the table has them all.
      const drawn = [...events]
        .sort((a, b) => b.end - b.begin - (a.end - a.begin))
        .slice(0, 800)
        .sort((a, b) => a.begin - b.begin);
      drawn.forEach((event, i) => {
        const from = x((event.begin - starts[at]) / per),
          to = x((event.end - starts[at]) / per),
          bad = event.kind === 'not saved' || kind === 'stall';
        nodes.push(
          draw(
            'g',
            { class: 'c' + at },
            draw('rect', {
              class: bad ? 'bar-worse' : kind === 'attempt' ? 'c' + (i % 2 ? ' area' : '') : 'c',
              rx: 2,
              style: kind === 'attempt' ? 'opacity:' + (i % 2 ? 0.28 : 0.5) : '',
              x: from.toFixed(1),
              width: Math.max(to - from, 2.2).toFixed(1),
              y: y + 5,
              height: 12
            })
          )
        );
        points.push({
          x: (from + to) / 2,
          y: y + 11,
          text:
            event.kind[0].toUpperCase() +
            event.kind.slice(1) +
            (event.end - event.begin >= 0.05 ? ', ' + duration(event.end - event.begin) : '') +
            '\n' +
            event.text +
            '\n' +
            clockTime(event.begin)
        });
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
  return el(
    'div',
    { class: 'c' + run.colour },
    !single && el('h3', {}, el('bdi', {}, run.label)),
    el(
      'div',
      {
        class: 'stack',
        role: 'img',
        'aria-label':
          'Where the time went: ' + parts.map(part => part.what + ' ' + fixed(100 * part.share, 1) + ' %').join(', ')
      },
      parts.map(
        (part, i) =>
          part.share > 0.001 && el('i', { style: `flex:${part.share} 1 0;opacity:${strength[i]}`, title: part.what })
      )
    ),
    el(
      'dl',
      { class: 'spent' },
      parts.map((part, i) => [
        el(
          'dt',
          { style: 'color:var(--ink)' },
          el('span', { class: 'key', style: `opacity:${strength[i]};color:var(--s${run.colour})` }),
          part.what
        ),
        el('dd', {}, fixed(100 * part.share, 1) + ' %, ' + part.more)
      ])
    )
  );
}

// ---- Plan and environment.
function settings() {
  const rows = [
    ['environment', 'Environment'],
    ['plan', 'Plan']
  ].flatMap(([table, heading]) => {
    const keys = [...new Set(runs.flatMap(run => run.column(table, 'key')))];
    const values = runs.map(run => new Map(run.table(table).rows));
    return keys.length
      ? [
          el('tr', { class: 'part' }, el('th', { colspan: runs.length + 1, scope: 'colgroup' }, heading)),
          ...keys.map(key => {
            const of = values.map(map => (map.has(key) ? map.get(key) : '–')),
              differs = new Set(of).size > 1;
            const row = el(
              'tr',
              { class: differs ? 'differs' : null },
              el('td', { class: 'first' }, key),
              of.map(text => el('td', { class: 'value' }, el('bdi', {}, text)))
            );
            row.words = [key, ...of].join(' ').toLowerCase();
            row.differs = differs;
            return row;
          })
        ]
      : [];
  });
  byId('settings').append(
    el('caption', { class: 'unseen' }, 'Plan and environment'),
    el(
      'thead',
      {},
      el(
        'tr',
        {},
        el('th', { class: 'first', scope: 'col' }, 'Key'),
        runs.map(run => el('th', { scope: 'col' }, single ? 'Value' : el('bdi', {}, run.label)))
      )
    ),
    el('tbody', {}, rows)
  );
  byId('only-label').hidden = single;
  const choose = () =>
    rows.forEach(row => {
      if (row.words)
        row.hidden =
          !row.words.includes(byId('search-plan').value.toLowerCase()) || (byId('only').checked && !row.differs);
    });
  byId('search-plan').addEventListener('input', choose);
  byId('only').addEventListener('change', choose);
}
function events() {
  const list = runs.flatMap(run => run.objects('timeline').map(event => [event, run]));
  byId('events').hidden = !list.length;
  byId('events')
    .querySelector('table')
    .append(
      el(
        'thead',
        {},
        el(
          'tr',
          {},
          ['When', 'What', ...(single ? [] : ['Run']), 'Lasted', 'More'].map(text => el('th', { scope: 'col' }, text))
        )
      ),
      el(
        'tbody',
        {},
        list
          .slice(0, 4000)
          .map(([event, run]) =>
            el(
              'tr',
              {},
              el('td', { class: 'first' }, clockTime(event.begin)),
              el('td', {}, event.kind),
              !single && el('td', {}, run.label),
              el('td', {}, duration(event.end - event.begin)),
              el('td', {}, event.text)
            )
          )
      )
    );
}
