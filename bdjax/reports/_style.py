"""The frame of the page and how it looks: on a phone, on a screen (light and dark), on paper."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>$title</title>
<style>
$css</style>
</head>
<body>
<header>
$heading
</header>
<main>
$body
</main>
$foot
</body>
</html>
"""

CSS = """\
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --faint: #57606a; --line: #d0d7de; --soft: #f3f5f7;
  --bad: #a40e26; --before: #57606a; --after: #0a5cc2; }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #14181d; --ink: #e6eaef; --faint: #a3adb8; --line: #3a424c; --soft: #1e242b; --bad: #ff8f9c;
    --before: #a3adb8; --after: #6cb0ff; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; padding-bottom: .25rem; border-bottom: 2px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.4rem 0 .4rem; }
h4 { font-size: .95rem; margin: 1rem 0 .4rem; color: var(--faint); }
p, ul { margin: .5rem 0; }
ul { padding-left: 1.2rem; }
footer, .note { color: var(--faint); font-size: .9rem; }
footer { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: .5rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .75rem; }
.card { border: 1px solid var(--line); border-left: 5px solid var(--before); border-radius: 6px; padding: .6rem .9rem;
  background: var(--soft); }
.card.bad { border-left-color: var(--bad); }
.card h3 { margin: 0 0 .2rem; }
.card p { margin: 0; }
.big { font-size: 1.4rem; font-weight: 600; }
dl { margin: .5rem 0; }
dl > div { display: grid; grid-template-columns: 13rem 1fr; gap: 0 1rem; padding: .25rem 0;
  border-bottom: 1px solid var(--line); }
dt { color: var(--faint); }
dd { margin: 0; min-width: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); }
tbody th { font-weight: 400; color: var(--faint); min-width: 5rem; }
thead th { overflow-wrap: normal; }
td { min-width: 4.4rem; }
code, pre { font: .875rem/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem;
  white-space: pre-wrap; }
summary { cursor: pointer; padding: .4rem 0; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.2rem, 1fr)); gap: .75rem; }
figure { margin: 0; min-width: 0; }
img { display: block; width: 100%; max-width: 9rem; image-rendering: pixelated; border: 1px solid var(--line); }
figcaption { font-size: .8rem; line-height: 1.3; margin-top: .25rem; }
.bar { display: grid; grid-template-columns: 4rem 1fr; align-items: center; gap: .5rem; margin: .3rem 0; }
svg { width: 100%; height: 1.4rem; }
.track { fill: var(--soft); }
rect.before { fill: var(--before); }
rect.after { fill: var(--after); }
.whisker { stroke: var(--ink); stroke-width: 2px; fill: none; vector-effect: non-scaling-stroke; }
@media (max-width: 36rem) {
  dl > div { grid-template-columns: 1fr; }
  th, td { padding-right: .5rem; }
}
@media print {
  @page { margin: 16mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .scroll { overflow: visible; }
  h2, h3, h4 { break-after: avoid; }
  figure, tr, .scroll, .card, .bar, pre, dl > div { break-inside: avoid; }
  footer { break-before: avoid; margin-top: 1rem; }
  .cards { grid-template-columns: repeat(3, 1fr); }
  thead { display: table-header-group; }
  .gallery { grid-template-columns: repeat(8, 1fr); }
  .card, pre, .track, rect { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
}
"""
