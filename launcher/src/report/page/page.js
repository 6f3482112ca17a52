// Puts the page together, and keeps it together: what is there is shown, and a choice repaints what follows from it.

// ---- All together.
function languageChart(id, label, has, paint) {
  byId(id).hidden = !has;
  if (has) byLanguage.push(chart(byId(id), label, paint));
}
setShades();
languageChart('changes', "Every language's change", hasBoth, paintChanges);
languageChart('strip', 'Languages by script, family or resource group', measures.length > 0, paintStrip);
languageChart('map', 'Languages on a map of the world', measures.length > 0 && places.length > 0, paintMap);
languageChart('scatter', 'Every language before and after', hasBoth, scatter(value, digits, unitName));
languageChart(
  'fertility',
  'Tokens per byte before and after',
  hasBoth,
  scatter(
    perByte,
    () => 3,
    () => 'tokens per byte'
  )
);
languageChart(
  'tokens',
  'Tokens by language, planned and read',
  all.some(it => it.of.some(row => row && (row.planned_tokens > 0 || row.realised_tokens > 0))),
  paintTokens
);
byId('data').hidden = byId('tokens').hidden;
if (!single)
  for (const id of ['changes', 'scatter', 'fertility', 'tokens'])
    if (!byId(id).hidden)
      legend(
        byId(id),
        runs.map(run => ({ name: run.label, colour: run.colour }))
      );
const colours = () => {
  for (const id of ['strip', 'map'])
    if (!byId(id).hidden) {
      byId(id).querySelector('ul.legend')?.remove();
      byId(id).append(shadeLegend());
    }
};
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
byId('languages-why').textContent = hasBoth
  ? 'Held-out text before and after training: the negative log-likelihood in bits per byte is the same measure ' +
    'whatever the tokenizer. Search and filters hold for every plot here and for the table.'
  : 'Search and filters hold for every plot here and for the table.';
for (const id of ['unit', 'measure', 'rows-by', 'all-rows']) byId(id).closest('label').hidden = !measures.length;
byId('all-rows').closest('label').hidden =
  byId('all-rows').closest('label').hidden || new Set(all.map(it => it[byId('rows-by').value])).size <= 12;
for (const id of ['search', 'by-script', 'by-group', 'by-family']) byId(id).addEventListener('input', filter);
byId('reset').addEventListener('click', () => {
  for (const id of ['search', 'by-script', 'by-group', 'by-family']) byId(id).value = '';
  filter();
});
byId('unit').addEventListener('change', () => {
  setShades();
  fillTable();
  filter();
  colours();
});
byId('measure').addEventListener('change', () => {
  setShades();
  byLanguage.forEach(repaint => repaint());
  colours();
});
for (const id of ['rows-by', 'all-rows'])
  byId(id).addEventListener('change', () => byLanguage.forEach(repaint => repaint()));

// An odd one takes the whole width.
for (const plots of document.querySelectorAll('.plots')) {
  const shown = [...plots.children].filter(figure => !figure.hidden);
  if (shown.length % 2) shown[0].classList.add('whole');
}

// ---- Sections: links to those that are shown, and which of them one reads.
const shownSections = [...document.querySelectorAll('main > section')].filter(section => !section.hidden);
byId('sections').append(
  el(
    'ul',
    {},
    shownSections.map(section =>
      el('li', {}, el('a', { href: '#' + section.id }, section.querySelector('h2').textContent))
    )
  )
);
const watcher = new IntersectionObserver(
  entries =>
    entries.forEach(entry => {
      if (!entry.isIntersecting) return;
      for (const link of byId('sections').querySelectorAll('a')) {
        if (link.hash === '#' + entry.target.id) link.setAttribute('aria-current', 'true');
        else link.removeAttribute('aria-current');
      }
    }),
  { rootMargin: '-30% 0px -60% 0px' }
);
shownSections.forEach(section => watcher.observe(section));
