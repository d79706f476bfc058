"""Style sheet and script of the gallery. Fonts of the system, light and dark by the reader's preference, nothing loaded."""

from vlmflow.report.style import CSS as REPORT

CSS = (
    REPORT
    + """
a{color:var(--accent)}
header.top{padding:12px 20px;display:flex;flex-wrap:wrap;gap:4px 18px;
align-items:baseline}
.top h1{font-size:19px;margin:0}.top .dim,.dim{color:var(--dim);font-size:13px}
.look{display:grid;grid-template-columns:250px minmax(0,1fr);max-width:none;margin:0;padding:0}
aside{border-right:1px solid var(--edge);padding:14px 16px;font-size:13px}
.results{padding:14px 20px 40px}
.to-filters{display:none}
@media(max-width:760px){.look{grid-template-columns:minmax(0,1fr)}aside{border-right:0;border-top:1px solid var(--edge);order:2}
.to-filters{display:inline}.results{padding:12px 14px 24px}}
aside h3{font-size:12.5px;margin:16px 0 4px;color:var(--dim);font-weight:600;overflow-wrap:anywhere}
aside form{display:grid;gap:6px}
input,select,button{font:inherit;font-size:13px;color:var(--ink);background:var(--card);border:1px solid var(--edge);border-radius:6px;
padding:5px 8px;min-width:0;max-width:100%}
button{cursor:pointer;background:var(--accent);border-color:var(--accent);color:var(--card)}
input:focus-visible,select:focus-visible,button:focus-visible,a:focus-visible{outline:2px solid var(--accent);outline-offset:1px}
.range{display:grid;grid-template-columns:1fr 1fr;gap:6px}
a.facet{display:grid;grid-template-columns:minmax(0,1fr) auto;gap:8px;padding:2px 6px;margin:0 -6px;border-radius:5px;color:var(--ink);
text-decoration:none;line-height:1.4}
a.facet span:first-child{overflow-wrap:anywhere}a.facet .n{color:var(--dim);font-variant-numeric:tabular-nums}
a.facet:hover{background:var(--faint)}a.facet.on{background:var(--faint);font-weight:600;box-shadow:inset 3px 0 var(--accent)}
.bar{display:flex;flex-wrap:wrap;gap:8px 14px;align-items:center;margin:0 0 12px;font-size:13px}
.bar form{display:flex;gap:6px;align-items:center;flex-wrap:wrap}.bar .grow{flex:1}
.pager{display:flex;gap:6px;align-items:center}
.pager a,.pager span.off{border:1px solid var(--edge);border-radius:6px;padding:3px 10px;text-decoration:none;color:var(--accent);
background:var(--card)}.pager span.off{color:var(--dim);opacity:.5}
.chips{display:flex;flex-wrap:wrap;gap:6px}
.chips a{color:inherit;text-decoration:none}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(240px,100%),1fr));gap:14px}
.card{background:var(--card);border:1px solid var(--edge);border-radius:10px;overflow:hidden;display:flex;flex-direction:column;font-size:13px}
.card:target,.card.at{outline:2px solid var(--accent)}
.card .pic{display:flex;align-items:center;justify-content:center;height:170px;background:var(--faint);position:relative}
.card .pic img{max-width:100%;max-height:170px;object-fit:contain;display:block}
.card .pic .tag{position:absolute;right:6px;bottom:6px}
.card .text-only{color:var(--dim);font-size:12.5px;padding:0 12px}
.card .in{padding:9px 12px 11px;display:flex;flex-direction:column;gap:7px;flex:1}
.card .head{display:flex;gap:6px;align-items:center;justify-content:space-between}
.card .key{font:12px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;color:var(--ink);text-decoration:none;
overflow-wrap:anywhere}
.card .why{color:var(--dim);font-size:12.5px;margin:0}
.card.dropped{border-color:var(--bad-bg)}.card.dropped .pic img{opacity:.8}
.card .words{display:grid;gap:5px}
.card .words div{overflow-wrap:anywhere}
.card .words b{font-weight:600;font-size:11px;color:var(--dim);display:block;line-height:1.3}
.card .words .clamp{display:-webkit-box;-webkit-line-clamp:4;-webkit-box-orient:vertical;overflow:hidden;white-space:pre-line}
.card .from{font-size:12px;white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.card .scores{display:flex;flex-wrap:wrap;gap:4px;margin-top:auto}
.card .scores .tag b{color:var(--ink);font-weight:600}
.tag.wrap{white-space:normal;border-radius:6px}
.plot{background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:10px 14px;margin:0 0 14px}
.plot svg.chart{width:100%;height:auto}
svg rect.undecided,.key.undecided{fill:var(--s0);background:var(--s0)!important}
svg a:hover rect{opacity:.7}
.empty{padding:40px;text-align:center;color:var(--dim)}
.one{max-width:1100px;margin:0 auto;padding:16px 20px 60px}
.one .pics{display:flex;flex-wrap:wrap;gap:12px}.one .pics img{max-width:100%;max-height:420px;border:1px solid var(--edge);border-radius:8px}
.one h2{margin-top:22px}.one th{vertical-align:top}.one .pager{margin-bottom:10px}
.one table.facts td{overflow-wrap:anywhere}
.hint{color:var(--dim);font-size:12px;margin-top:22px}
kbd{font:11px ui-monospace,monospace;border:1px solid var(--edge);border-radius:4px;padding:0 4px;background:var(--card)}
"""
)

SCRIPT = """'use strict';
// Keyboard: the page works without it, every control is a link or a form.
document.addEventListener('keydown', (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (typing) { if (event.key === 'Escape') event.target.blur(); return; }
  const link = { ArrowRight: 'next', n: 'next', ArrowLeft: 'prev', p: 'prev', Home: 'first', Escape: 'back' }[event.key];
  const anchor = link && document.querySelector('a[data-go=' + link + ']');
  if (anchor) { event.preventDefault(); anchor.click(); return; }
  if (event.key === '/') {
    const box = document.querySelector('input[name=q]');
    if (box) { event.preventDefault(); box.focus(); box.select(); }
    return;
  }
  const cards = [...document.querySelectorAll('.card')];
  const step = { j: 1, k: -1 }[event.key];
  if (!cards.length) return;
  let at = cards.findIndex((card) => card.classList.contains('at'));
  if (step) {
    if (at >= 0) cards[at].classList.remove('at');
    at = Math.max(0, Math.min(cards.length - 1, at + step));
    cards[at].classList.add('at');
    cards[at].scrollIntoView({ block: 'nearest' });
  } else if (event.key === 'Enter' && at >= 0) {
    const open = cards[at].querySelector('a.key');
    if (open) open.click();
  }
});
document.addEventListener('change', (event) => {
  if (event.target.matches('select[data-now]')) event.target.form.requestSubmit();
});
"""
