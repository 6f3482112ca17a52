// The table of languages: its columns, sorting, and the rows as CSV.

// ---- The table.
const number = (key, heading, unitText, of, show, mark) => ({ key, heading, unitText, of, show, mark });
function columnsOfTable() {
  const name = unitName(),
    d = digits();
  const columns = [
    { key: 'language', heading: 'Language', of: it => it.language, first: true },
    { key: 'name', heading: 'Name', of: it => it.name, css: 'text name' },
    { key: 'script', heading: 'Script', of: it => it.script, css: 'text' },
    { key: 'family', heading: 'Family', of: it => it.family, css: 'text' },
    { key: 'group', heading: 'Group', of: it => it.group, css: 'text' }
  ];
  const gain = v => (known(v) && v !== 0 ? (v < 0 ? 'gain' : 'loss') : '');
  runs.forEach((run, at) => {
    const of = single ? '' : run.label,
      sub = text => [of, text].filter(Boolean).join(': ');
    const cell = (it, key) => (it.of[at] ? it.of[at][key] : null);
    if (hasBefore)
      columns.push(
        number(
          'before' + at,
          'Before',
          sub(name),
          it => value(it, at, 'before'),
          v => fixed(v, d)
        )
      );
    if (hasAfter)
      columns.push(
        number(
          'after' + at,
          'After',
          sub(name),
          it => value(it, at, 'after'),
          v => fixed(v, d)
        )
      );
    if (hasBoth) {
      columns.push(
        number(
          'difference' + at,
          'Difference',
          sub(name),
          it => delta(it, at),
          v => signed(v, d),
          gain
        )
      );
      columns.push(
        number(
          'change' + at,
          'Change',
          sub('per cent'),
          it => {
            const v = delta(it, at);
            return known(v) ? v / value(it, at, 'before') : null;
          },
          v => percent(v),
          gain
        )
      );
    }
    if (single && unit() === 'bits_per_byte' && all.some(it => known(cell(it, 'after_low')))) {
      columns.push({
        ...number(
          'interval',
          'After, 95 %',
          name,
          it => cell(it, 'after_low'),
          v => fixed(v, d)
        ),
        both: it =>
          known(cell(it, 'after_low'))
            ? fixed(cell(it, 'after_low'), d) + ' – ' + fixed(cell(it, 'after_high'), d)
            : '–'
      });
    }
    if (single && hasBefore && hasAfter)
      columns.push(
        number(
          'fb' + at,
          'Tokens',
          'per byte, before',
          it => perByte(it, at, 'before'),
          v => fixed(v, 3)
        )
      );
    if (hasBefore || hasAfter)
      columns.push(
        number(
          'fa' + at,
          'Tokens',
          sub(hasAfter ? 'per byte, after' : 'per byte'),
          it => perByte(it, at, hasAfter ? 'after' : 'before'),
          v => fixed(v, 3)
        )
      );
    if (single)
      columns.push(
        number('documents', 'Documents', 'measured', it => cell(it, 'documents'), count),
        number('corpus', 'Tokens', 'in the corpus', it => cell(it, 'corpus_tokens'), count)
      );
    columns.push(number('planned' + at, 'Tokens', sub('planned'), it => cell(it, 'planned_tokens'), count));
    columns.push(number('read' + at, 'Tokens', sub('read'), it => cell(it, 'realised_tokens'), count));
    if (single)
      columns.push(
        number(
          'epochs',
          'Epochs',
          'read',
          it => cell(it, 'epochs'),
          v => fixed(v, 2)
        )
      );
  });
  if (runs.length === 2 && hasAfter)
    columns.splice(
      5,
      0,
      number(
        'apart',
        'Apart',
        runs[1].label + ' less ' + runs[0].label,
        it => difference(value(it, 0, 'after'), value(it, 1, 'after')),
        v => signed(v, d),
        gain
      )
    );
  return columns.filter(
    column =>
      column.first ||
      all.some(it => {
        const v = column.of(it);
        return column.show ? known(v) : v;
      })
  );
}
const table = byId('table'),
  body = el('tbody');
let columns = [],
  sorted = { key: null, up: true };
function fillTable() {
  columns = columnsOfTable();
  if (!columns.some(column => column.key === sorted.key)) {
    sorted = {
      key: ['apart', 'difference0', 'after0', 'before0', 'language'].find(key =>
        columns.some(column => column.key === key)
      ),
      up: true
    };
  }
  table.replaceChildren(
    el('caption', { class: 'unseen' }, "All languages; a column's button sorts by it"),
    el(
      'thead',
      {},
      el(
        'tr',
        {},
        columns.map(column => {
          const button = el('button', { type: 'button' }, column.heading);
          button.addEventListener('click', () => {
            sorted = { key: column.key, up: sorted.key === column.key ? !sorted.up : true };
            sortTable();
          });
          return el(
            'th',
            { scope: 'col', class: column.first ? 'first text' : column.css, 'data-key': column.key },
            button,
            column.unitText && el('small', {}, column.unitText)
          );
        })
      )
    ),
    body
  );
  body.replaceChildren(
    ...all.map(it => {
      const row = el(
        'tr',
        {},
        columns.map(column => {
          const v = column.of(it);
          if (!column.show)
            return el(
              'td',
              { class: column.first ? 'first text' : column.css, title: column.css === 'text name' ? v : null },
              el('bdi', {}, v || '–')
            );
          return el(
            'td',
            { class: column.mark ? column.mark(v) : null },
            column.both ? column.both(it) : column.show(v)
          );
        })
      );
      row.of = it;
      return row;
    })
  );
  sortTable();
}
function sortTable() {
  const column = columns.find(column => column.key === sorted.key),
    sign = sorted.up ? 1 : -1;
  for (const head of table.tHead.rows[0].cells) {
    if (head.dataset.key === sorted.key) head.setAttribute('aria-sort', sorted.up ? 'ascending' : 'descending');
    else head.removeAttribute('aria-sort');
  }
  // What is not known comes last either way.
  const order = [...body.rows]
    .map(row => ({ row, v: column.of(row.of) }))
    .sort(({ v: a }, { v: b }) =>
      column.show
        ? known(b) - known(a) || (known(a) ? sign * (a - b) : 0)
        : !a - !b || sign * String(a).localeCompare(String(b))
    );
  body.append(...order.map(({ row }) => row));
}
byId('save-csv').addEventListener('click', () => {
  const quote = text => (/[",\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text);
  const cell = v => (v == null ? '' : quote(String(v)));
  const lines = [
    columns.map(column => cell([column.heading, column.unitText].filter(Boolean).join(', '))),
    ...[...body.rows].filter(row => !row.hidden).map(row => columns.map(column => cell(column.of(row.of))))
  ];
  const link = el('a', {
    download: 'languages.csv',
    href: URL.createObjectURL(new Blob([lines.map(line => line.join(',')).join('\r\n') + '\r\n'], { type: 'text/csv' }))
  });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});
