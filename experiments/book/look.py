"""How the logbook's page looks in a light and a dark browser, and what answers to the pointer."""

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c2430; --quiet: #657080;
  --line: #dfe3e8; --card: #f5f7f9; --main: #2f6db5; --held: #d9730d; --lost: #d64545;
  --good: #2f8f5b; --change: #8050b8; --note: #0f8a8a; --gap: #59647322;
  --productive: #2f6db5; --t-lost: #d64545; --down: #59626e; --paused: #c9ced6; --start: #8050b8;
  --restore: #b79bd9; --compile: #c08a12; --data: #e5c35c; --checkpoint: #2f8f5b;
  --evaluation: #8cc7a1; --other: #a5adb8; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --ink: #e4e8ee; --quiet: #97a2b0;
  --line: #2d353f; --card: #1c2229; --main: #69a8ee; --held: #f2a65a; --lost: #ef6f6c;
  --good: #5cc48b; --change: #b58df0; --note: #4cc3c3; --gap: #a0acbb26; --productive: #5b9be0;
  --t-lost: #e36562; --down: #7b8694; --paused: #3c4653; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink);
  background: var(--paper); margin: 0 auto; max-width: 70rem; padding: 1.6rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 1.1rem; margin: 2.4rem 0 .6rem; }
p { margin: .3rem 0; overflow-wrap: anywhere; } .quiet { color: var(--quiet); }
.bad { color: var(--lost); } .state { font-size: 1.05rem; }
.alarm { border-left: 4px solid var(--lost); background: var(--card); padding: .5rem .9rem;
  margin: 1rem 0; overflow-wrap: anywhere; }
.cards { display: grid; gap: .7rem; margin: 1.3rem 0 .4rem;
  grid-template-columns: repeat(auto-fill, minmax(9.6rem, 1fr)); }
.card { background: var(--card); border-radius: 8px; padding: .65rem .8rem; min-width: 0; }
.card b { display: block; font-size: 1.35rem; font-weight: 650; line-height: 1.25;
  font-variant-numeric: tabular-nums; }
.card span, .card small { display: block; color: var(--quiet); font-size: 12.5px;
  line-height: 1.35; overflow-wrap: anywhere; }
figure { margin: 0; } figcaption { color: var(--quiet); font-size: 13px; }
svg { display: block; width: 100%; height: auto; font-size: 12px; overflow: visible;
  touch-action: pan-y; }
svg text { fill: var(--quiet); } svg .end { text-anchor: end; } svg .mid { text-anchor: middle; }
svg path { fill: none; stroke-linejoin: round; }
.grid { stroke: var(--line); } .axis { stroke: var(--quiet); }
.main { stroke: var(--main); stroke-width: 1.6; }
.lost { stroke: var(--lost); stroke-width: 1.2; opacity: .45; }
.again { stroke: var(--lost); stroke-width: 2.4; }
.held { fill: var(--paper); stroke: var(--held); stroke-width: 2; }
.leap { stroke: var(--held); stroke-width: 1.4; opacity: .8; }
.hair { stroke: var(--quiet); stroke-dasharray: 2 4; opacity: .45; }
.hair.changes { stroke: var(--change); stroke-dasharray: none; opacity: .6; }
.gap { fill: var(--down); opacity: .4; } .room { fill: transparent; }
svg .restarts, svg .notes, svg .changes, svg .rewinds, svg .spikes, svg .evals { stroke: none; }
svg path.restarts { fill: var(--down); } svg path.rewinds { fill: var(--held); }
svg path.spikes { fill: var(--held); } svg path.changes { fill: var(--change); }
svg path.notes { fill: var(--note); } svg path.evals { fill: var(--main); opacity: .8; }
svg path.saves { stroke: var(--good); stroke-width: 1.6; }
svg path.faults { stroke: var(--lost); stroke-width: 2; }
svg path.restarts.bad, svg path.rewinds.bad, svg path.spikes.bad { fill: var(--lost); }
svg path.saves.bad { stroke: var(--lost); stroke-width: 2.6; }
svg path.hair { fill: none; } svg path.hair.restarts { stroke: var(--quiet); }
svg path.hair.changes { stroke: var(--change); fill: none; }
.m:hover path, .m:hover circle { stroke: var(--ink); stroke-width: 1.5; }
.narrow { display: none; }
@media (max-width: 640px) { .wide { display: none; } .narrow { display: block; } }
.small-ones { display: grid; gap: 1.2rem 1.6rem;
  grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); }
.small-ones figcaption { font-weight: 600; color: var(--ink); }
.bar { display: flex; height: 2.2rem; background: var(--line); border-radius: 6px;
  overflow: hidden; }
.bar span { display: block; min-width: 1px; }
.legend { display: flex; flex-wrap: wrap; gap: .15rem 1.2rem; margin: .5rem 0; font-size: 13px; }
.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: 3px;
  margin-right: .4rem; vertical-align: -1px; }
.legend i.stroke { height: .25rem; vertical-align: .2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { color: var(--quiet); font-weight: 500; white-space: nowrap; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td:first-child, th:first-child { padding-left: 0; } td:not(.text) { white-space: nowrap; }
td.text { overflow-wrap: anywhere; min-width: 14rem; }
td.text:empty { min-width: 0; }
summary { cursor: pointer; }
.line { list-style: none; margin: 0; padding: 0; font-size: 13.5px; }
.line li { display: grid; grid-template-columns: 12.6rem 8.4rem 1fr; gap: 0 .8rem;
  padding: .22rem 0; border-bottom: 1px solid var(--line); }
.line time, .line .who { color: var(--quiet); white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis; font-variant-numeric: tabular-nums; }
.line .what { overflow-wrap: anywhere; white-space: pre-line; }
.line b { font-size: 11.5px; letter-spacing: .03em; margin-right: .3rem; }
.line .warn b { color: var(--held); } .line .error b, .line .page b { color: var(--lost); }
@media (max-width: 640px) { .line li { grid-template-columns: 1fr auto; }
  .line .what { grid-column: 1 / 3; } .line { font-size: 13px; } }
#tip { position: fixed; z-index: 9; pointer-events: none; max-width: min(27rem, 92vw);
  background: var(--ink); color: var(--paper); border-radius: 6px; padding: .4rem .65rem;
  font-size: 13px; line-height: 1.4; white-space: pre-line; overflow-wrap: anywhere;
  box-shadow: 0 4px 18px #0005; display: none; }
#dot { fill: var(--main); stroke: var(--paper); stroke-width: 2; }
@media print { .scroll { overflow: visible; } }
"""

# The pointer, or a finger, finds the nearest point of a curve, or the text of a mark.
SCRIPT = """
(() => {
  const tip = document.createElement('div');
  tip.id = 'tip';
  document.body.append(tip);
  const dot = document.createElementNS('http://www.w3.org/2000/svg', 'circle');
  dot.id = 'dot';
  dot.setAttribute('r', 4.5);
  for (const mark of document.querySelectorAll('.m')) {
    const title = mark.querySelector('title');
    mark.dataset.text = title.textContent;
    title.remove();
  }
  const hide = () => { tip.style.display = 'none'; dot.remove(); };
  const show = (text, x, y) => {
    tip.textContent = text;
    tip.style.display = 'block';
    const box = tip.getBoundingClientRect();
    const left = x + 14 + box.width < innerWidth ? x + 14 : x - 14 - box.width;
    tip.style.left = Math.max(6, Math.min(left, innerWidth - box.width - 6)) + 'px';
    tip.style.top = (y - box.height - 12 > 4 ? y - box.height - 12 : y + 18) + 'px';
  };
  for (const svg of document.querySelectorAll('svg')) {
    const points = JSON.parse(svg.dataset.points || '[]');
    const answer = event => {
      const mark = event.target.closest('.m');
      if (mark) {
        dot.remove();
        return show(mark.dataset.text, event.clientX, event.clientY);
      }
      const box = svg.getBoundingClientRect();
      const scale = svg.viewBox.baseVal.width / box.width;
      const x = (event.clientX - box.left) * scale;
      let near = null;
      for (const point of points) {
        if (!near || Math.abs(point[0] - x) < Math.abs(near[0] - x)) near = point;
      }
      if (!near || Math.abs(near[0] - x) > 30) return hide();
      dot.setAttribute('cx', near[0]);
      dot.setAttribute('cy', near[1]);
      svg.append(dot);
      show(near[2], box.left + near[0] / scale, box.top + near[1] / scale);
    };
    svg.addEventListener('pointermove', answer);
    svg.addEventListener('pointerdown', answer);
    svg.addEventListener('pointerleave', hide);
  }
  addEventListener('scroll', hide, {passive: true});
})();
"""
