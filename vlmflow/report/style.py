"""The page's style sheet: light and dark by the reader's preference, fonts of the system, nothing loaded."""

CSS = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#16191d;--dim:#5c6570;--faint:#e3e7ec;--edge:#d5dae1;
--accent:#1f5fc4;--good:#0f7a4f;--good-bg:#e0f4ea;--bad:#b3261e;--bad-bg:#fce8e6;--warn:#8a5800;--warn-bg:#fdf1d8;
--kept:#1f6fd1;--gone:#b9c2cd;--s0:#1f6fd1;--s1:#d9591f;--s2:#138a63;--s3:#8a4fc9;--s4:#b8860b;--s5:#c2366f;--s6:#4a7a8c;
--s7:#6b6f76;--mark:#fff8e1}
@media(prefers-color-scheme:dark){:root{--bg:#111418;--card:#1a1e24;--ink:#e8ebef;--dim:#9aa5b1;--faint:#2a3038;
--edge:#353c46;--accent:#7fb0ff;--good:#5fd3a0;--good-bg:#143528;--bad:#ff8f87;--bad-bg:#43201e;--warn:#f2c261;
--warn-bg:#3b2f14;--kept:#5b9cf0;--gone:#4a5360;--s0:#5b9cf0;--s1:#f0834f;--s2:#3fbf92;--s3:#b48bea;--s4:#dcb13f;
--s5:#ee6fa3;--s6:#7fb3c6;--s7:#9da3ab;--mark:#2b2617}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",
"DejaVu Sans",sans-serif;-webkit-font-smoothing:antialiased}
main,header.top>div,nav>div{max-width:1140px;margin:0 auto;padding:0 20px}
header.top{background:var(--card);border-bottom:1px solid var(--edge);padding:28px 0 20px}
header.top .kicker{color:var(--dim);font-size:13px;letter-spacing:.02em}
h1{font-size:28px;line-height:1.2;margin:2px 0 10px;letter-spacing:-.01em}
.verdict{font-size:17px;line-height:1.45;margin:0 0 18px;max-width:62em}
nav{position:sticky;top:0;z-index:2;background:var(--bg);border-bottom:1px solid var(--edge)}
nav>div{display:flex;gap:18px;overflow-x:auto;padding-top:9px;padding-bottom:9px;white-space:nowrap}
nav a{color:var(--dim);text-decoration:none;font-size:13px}
nav a:hover,nav a:focus{color:var(--accent);text-decoration:underline}
section{background:var(--card);border:1px solid var(--edge);border-radius:10px;margin:18px 0;padding:18px 20px 20px;
scroll-margin-top:48px}
h2{font-size:19px;margin:0 0 4px;letter-spacing:-.005em}
h3{font-size:15px;margin:20px 0 6px}
p{margin:6px 0}
.lead{color:var(--dim);max-width:70em;margin:0 0 14px}
.note{color:var(--dim);font-size:13px;max-width:76em}
.absent{color:var(--dim);padding:10px 12px;border:1px dashed var(--edge);border-radius:8px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:12px 0}
.tile{border:1px solid var(--edge);border-radius:8px;padding:10px 12px;background:var(--card)}
.tile .label{color:var(--dim);font-size:12.5px}
.tile .value{font-size:22px;font-weight:600;line-height:1.25;letter-spacing:-.01em;overflow-wrap:anywhere}
.tile .remark{color:var(--dim);font-size:12.5px}
.scroll{overflow-x:auto;margin:8px 0;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th{font-weight:600;text-align:left;color:var(--dim);font-size:12.5px;vertical-align:bottom}
th,td{padding:6px 10px;border-bottom:1px solid var(--faint)}
td{vertical-align:top}
th.num,td.num{text-align:right;white-space:nowrap}
tr.group td{color:var(--dim);font-size:12.5px;font-weight:600;padding-top:14px;border-bottom-color:var(--edge)}
tr.chosen td{background:var(--mark)}
tbody tr:last-child td{border-bottom:0}
td small,.small{color:var(--dim);font-size:12px}
.big{font-size:15px;font-weight:600}
.nowrap{white-space:nowrap}
table.facts{width:auto;min-width:50%}table.facts th{white-space:nowrap;padding-right:28px;border-bottom:1px solid var(--faint)}
table.samples td{min-width:110px;max-width:230px;overflow-wrap:anywhere}
table.samples td:first-child,table.samples td:nth-child(6),table.samples td:nth-child(7){min-width:0}
table.samples td:nth-child(8){min-width:150px}
img.thumb{display:block;max-width:150px;max-height:84px;border:1px solid var(--edge);border-radius:4px;background:#fff}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(205px,100%),1fr));gap:12px;margin:10px 0}
.item{border:1px solid var(--edge);border-radius:8px;padding:10px;font-size:13px;overflow-wrap:anywhere}
.item img{margin-bottom:8px}
.item .q{color:var(--dim);white-space:pre-line}
.item .a{font-weight:600}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(430px,100%),1fr));gap:14px}
.tag{display:inline-block;font-size:12px;line-height:1.5;padding:0 7px;border-radius:9px;background:var(--faint);color:var(--dim);
white-space:nowrap}
.tag.good{background:var(--good-bg);color:var(--good)}
.tag.bad{background:var(--bad-bg);color:var(--bad)}
.tag.warn{background:var(--warn-bg);color:var(--warn)}
code{font:12.5px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;background:var(--faint);border-radius:4px;
padding:1px 4px;overflow-wrap:anywhere}
td code{white-space:nowrap}
pre{font:12.5px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;background:var(--bg);
border:1px solid var(--edge);border-radius:8px;padding:10px 12px;overflow-x:auto;white-space:pre-wrap}
details{margin:10px 0}summary{cursor:pointer;color:var(--accent);font-size:13.5px}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:12.5px;color:var(--dim);margin:4px 0}
.legend .key{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:6px;background:currentColor}
svg.chart{max-width:100%;height:auto;display:block}
svg.mini{display:block;margin-top:2px}
svg .t{font:11.5px system-ui,"Segoe UI","DejaVu Sans",sans-serif;fill:var(--dim)}
svg .t.strong{fill:var(--ink);font-weight:600}
svg .grid{stroke:var(--faint)}
svg .axis{stroke:var(--edge)}
svg .cut{stroke:var(--ink);stroke-width:1.5;stroke-dasharray:4 3}
svg .chance{stroke:var(--dim);stroke-width:1.5}
svg .whisker{stroke:var(--s0);stroke-width:2;opacity:.55}
svg .line{fill:none;stroke-width:1.8;stroke-linejoin:round}
svg .line.faint{opacity:.35;stroke-width:1.2}.key.faint{opacity:.35}
svg .bar{fill:var(--s0)}
svg rect.kept,.key.kept{fill:var(--kept);background:var(--kept)!important}
svg rect.gone,.key.gone{fill:var(--gone);background:var(--gone)!important}
svg rect.bad,.key.bad{fill:var(--s1);background:var(--s1)!important}
footer{color:var(--dim);font-size:12.5px;padding:6px 0 40px}
@media print{nav{display:none}section{break-inside:avoid}}
""" + "".join(
    f"svg .line.s{i}{{stroke:var(--s{i})}}svg .dot.s{i}{{fill:var(--s{i})}}.key.s{i}{{background:var(--s{i})}}\n"
    for i in range(8)
)
