// What goes by steps: loss, held-out text, rates, norms; and of the machine throughput, memory, bytes.

// ---- Learning, and what of the machine goes by steps.
const along = { step: 'step', tokens: 'target tokens', hours: 'hours since the first step' };
const xs = run => {
  const kind = byId('along').value;
  if (kind === 'step') return run.column('steps', 'step');
  if (kind === 'tokens') return run.column('steps', 'target_tokens');
  const times = run.column('steps', 'unix_time'),
    seconds = run.column('steps', 'seconds')[0] || 0;
  return times.map(time => (time - times[0] + seconds) / 3600);
};
function smooth(values) {
  // Over about a thirtieth of what is drawn. The weight of what was seen divides, so that the beginning is not
  // drawn towards 0.
  const keep = 1 - 1 / Math.max(values.length / 30, 2);
  let sum = 0,
    weight = 0;
  return values.map(value => {
    if (!known(value)) return null;
    sum = keep * sum + value;
    weight = keep * weight + 1;
    return sum / weight;
  });
}
const byStep = [];
function stepChart(id, label, columns, options) {
  const drawn = runs.filter(run => columns(run).length);
  byId(id).hidden = !drawn.length;
  if (!drawn.length) return;
  byStep.push(
    lineChart(
      byId(id),
      label,
      () => drawn.flatMap(run => columns(run).map(line => ({ ...line, colour: run.colour, x: xs(run) }))),
      { xTitle: () => along[byId('along').value], ...options }
    )
  );
  legend(
    byId(id),
    drawn.flatMap(run =>
      columns(run)
        .filter(line => line.name)
        .map(line => ({ ...line, colour: run.colour }))
    )
  );
}
const place = (run, i) => named(run, 'Step ' + count(run.column('steps', 'step')[i]));
// Columns are looked up once, not at every redraw.
const cached = make => {
  const kept = new Map();
  return run => {
    if (!kept.has(run)) kept.set(run, make(run));
    return kept.get(run);
  };
};
const stepsColumn = (run, key) => run.column('steps', key).map(value => (known(value) ? value : null));
const anyOf = values => values.some(known);

stepChart(
  'loss',
  'Loss',
  cached(run => {
    const loss = stepsColumn(run, 'loss'),
      mean = smooth(loss);
    return anyOf(loss)
      ? [
          {
            name: single ? null : run.label,
            y: mean,
            raw: loss,
            low: stepsColumn(run, 'loss_low'),
            high: stepsColumn(run, 'loss_high'),
            text: i => place(run, i) + '\nloss ' + fixed(loss[i], 4) + '\nrunning mean ' + fixed(mean[i], 4)
          }
        ]
      : [];
  }),
  { height: 290 }
);
stepChart(
  'held-out',
  'Bits per byte of held-out text while training',
  cached(run => {
    const y = stepsColumn(run, 'held_out_bits_per_byte');
    return anyOf(y)
      ? [
          {
            name: single ? null : run.label,
            y,
            text: i =>
              named(run, 'After ' + count(run.column('steps', 'step')[i] + 1) + ' steps') +
              '\n' +
              fixed(y[i], 4) +
              ' bits per byte'
          }
        ]
      : [];
  })
);
const dashes = ['', 'dashed', 'dotted', 'thin', 'thin dashed'];
stepChart(
  'rates',
  'Learning rate',
  cached(run =>
    run
      .table('steps')
      .columns.filter(key => key.startsWith('lr_'))
      .map((key, i) => {
        const y = stepsColumn(run, key),
          group = key.slice(3);
        return {
          name: named(run, group),
          dash: dashes[i % dashes.length],
          y,
          text: i => place(run, i) + '\n' + group + ' ' + plain(y[i])
        };
      })
      .filter(line => anyOf(line.y))
  ),
  { zero: true, yLabel: value => (value === 0 ? '0' : Number(value.toPrecision(3)).toExponential().replace('-', '−')) }
);
stepChart(
  'norm',
  'Gradient norm',
  cached(run => {
    const y = stepsColumn(run, 'grad_norm');
    return anyOf(y)
      ? [
          {
            name: single ? null : run.label,
            y,
            dash: 'thin',
            text: i => place(run, i) + '\ngradient norm ' + plain(y[i])
          }
        ]
      : [];
  }),
  { log: true }
);
stepChart(
  'speed',
  'Tokens per second',
  cached(run => {
    const y = stepsColumn(run, 'tokens_per_second'),
      seconds = run.column('steps', 'seconds');
    return anyOf(y)
      ? [
          {
            name: single ? null : run.label,
            y,
            dash: 'thin',
            text: i => place(run, i) + '\n' + count(y[i]) + ' tokens per second\n' + fixed(seconds[i], 3) + ' s a step'
          }
        ]
      : [];
  }),
  { zero: true }
);
stepChart(
  'memory',
  'Memory',
  cached(run => {
    const y = stepsColumn(run, 'resident_bytes').map(bytes => (bytes === null ? null : bytes / 2 ** 30));
    return anyOf(y)
      ? [
          {
            name: single ? null : run.label,
            y,
            text: i => place(run, i) + '\n' + fixed(y[i], 3) + ' GiB in the largest rank'
          }
        ]
      : [];
  }),
  { zero: true }
);
stepChart(
  'sent',
  'Bytes sent in a step',
  cached(run => {
    const [sent, least] = ['bytes_sent', 'bytes_least'].map(key => stepsColumn(run, key).map(bytes => bytes / 2 ** 20));
    if (!sent.some(bytes => bytes > 0)) return [];
    const text = i =>
      place(run, i) + '\n' + fixed(sent[i], 2) + ' MiB sent\n' + fixed(least[i], 2) + ' MiB is the least';
    return [
      { name: named(run, 'sent'), y: sent, text },
      { name: named(run, 'least'), y: least, dash: 'dashed', text }
    ];
  }),
  { zero: true }
);
byId('along').addEventListener('change', () => byStep.forEach(repaint => repaint()));
byId('learning').hidden = !runs.some(run => run.table('steps').rows.length);
