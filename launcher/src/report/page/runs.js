// The runs as columns of their tables, and all their languages once each. The page's head, and its figures.

const report = JSON.parse(byId('report').textContent);
const runs = report.runs.map((run, colour) => {
  const table = name => run[name] || { columns: [], rows: [] };
  const kept = new Map();
  const column = (name, key) => {
    if (!kept.has(name + ' ' + key)) {
      const at = table(name).columns.indexOf(key);
      kept.set(
        name + ' ' + key,
        table(name).rows.map(row => (at < 0 ? null : row[at]))
      );
    }
    return kept.get(name + ' ' + key);
  };
  const objects = name =>
    table(name).rows.map(row => Object.fromEntries(table(name).columns.map((key, i) => [key, row[i]])));
  return { label: run.label, folder: run.folder, colour, table, column, objects };
});
const single = runs.length === 1;
const named = (run, text) => (single ? text : text + ', ' + run.label);

// ---- Languages of all runs, once each.
const languages = new Map();
runs.forEach((run, at) => {
  for (const row of run.objects('languages')) {
    const seen = languages.get(row.language) || {
      language: row.language,
      name: '',
      script: row.script,
      family: row.family,
      group: '',
      of: []
    };
    seen.name ||= row.name;
    seen.group ||= row.group;
    if (known(row.latitude) && known(row.longitude)) seen.place ||= [row.longitude, row.latitude];
    seen.of[at] = row;
    languages.set(row.language, seen);
  }
});
const all = [...languages.values()];
for (const it of all)
  it.words = [it.language, it.name, it.script, it.family, it.group]
    .join(' ')
    .normalize('NFKD')
    .replace(/\p{M}/gu, '')
    .toLowerCase();
const title = it => (it.name ? it.name + ' (' + it.language + ')' : it.language);

const unit = () => byId('unit').value;
const value = (it, run, when) => {
  const row = it.of[run];
  return row ? row[unit() + '_' + when] : null;
};
const difference = (a, b) => (known(a) && known(b) ? b - a : null);
const delta = (it, run) => difference(value(it, run, 'before'), value(it, run, 'after'));
const measured = when => all.some(it => runs.some((_, run) => known(value(it, run, when))));
const hasBefore = measured('before'),
  hasAfter = measured('after'),
  hasBoth = all.some(it => runs.some((_, run) => known(delta(it, run))));

// ---- Header.
byId('lead').textContent = single ? runs[0].folder : runs.length + ' runs side by side';
byId('made').textContent =
  'Made by panglot ' +
  report.panglot +
  ' on ' +
  clockTime(report.unix_time) +
  '. Everything is in this file: nothing is fetched.';
if (!single)
  byId('runs').append(
    ...runs.map(run =>
      el('li', {}, el('span', { class: 'key c' + run.colour }), el('b', {}, el('bdi', {}, run.label)), ' ', run.folder)
    )
  );
// Auto is as the reader's system is, and changes with it; paper is light.
const system = matchMedia('(prefers-color-scheme: dark)');
function colourScheme(printing) {
  const chosen = byId('themes').querySelector('input:checked').value || (system.matches ? 'dark' : 'light');
  document.documentElement.dataset.theme = printing ? 'light' : chosen;
}
byId('themes').addEventListener('change', () => colourScheme(false));
system.addEventListener('change', () => colourScheme(false));
addEventListener('beforeprint', () => colourScheme(true));
addEventListener('afterprint', () => colourScheme(false));
colourScheme(false);

// ---- At a glance.
const whats = [...new Set(runs.flatMap(run => run.column('figures', 'what')))];
byId('figures').append(
  el(
    'div',
    { class: 'figures' },
    whats.map(what => {
      const figures = runs.map(run => run.objects('figures').find(figure => figure.what === what));
      return el(
        'div',
        { class: 'figure' },
        el('h3', {}, what),
        single
          ? [el('b', {}, figures[0].value), el('p', {}, figures[0].more)]
          : figures.map((figure, at) =>
              el(
                'div',
                { class: 'of' },
                el('i', { class: 'c' + at, title: runs[at].label }),
                el(
                  'div',
                  {},
                  el('span', { class: 'unseen' }, runs[at].label + ': '),
                  el('b', {}, figure ? figure.value : '–'),
                  el('p', {}, figure ? figure.more : '')
                )
              )
            )
      );
    })
  )
);
