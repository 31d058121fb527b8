"""Samples and figures as self-contained HTML pages: no script, no network, readable in the dark and on paper.

Every text of the data is escaped. Knows nothing of how samples and figures were made.
"""

import html
from collections.abc import Sequence
from itertools import groupby

from anima.inspection.samples import TEMPLATE, Piece, Sample, learned_share
from anima.inspection.stats import Stats, facts, table

_STYLE = """
:root { color-scheme: light dark; --bg: #fbfbf9; --card: #fff; --ink: #1d2125; --dim: #6b7280; --line: #e2e4e8;
  --learned: #d9f2e1; --learned-ink: #10512b; --special: #f3e3fb; --special-ink: #6b2190; --cut: #b42318;
  --user: #1d5fa8; --system: #8a4b08; --tool: #7a5c00; --bar: #4c7fd0; --over: #d0574c; }
@media (prefers-color-scheme: dark) { :root { --bg: #16181b; --card: #1f2226; --ink: #e6e8ea; --dim: #9aa2ad;
  --line: #343a41; --learned: #17402a; --learned-ink: #b8f0cd; --special: #41224f; --special-ink: #e7c5f7;
  --cut: #ff9b8f; --user: #8fc0f5; --system: #f0b878; --tool: #e8cf74; --bar: #5f93e6; --over: #e2736a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; background: var(--bg); color: var(--ink);
  font: 15px/1.55 system-ui, "Noto Sans", "Noto Sans CJK SC", sans-serif; }
h1 { font-size: 1.35rem; margin: 0 0 .3rem; } h2 { font-size: 1rem; margin: 2rem 0 .6rem; }
p { margin: .3rem 0; } .dim { color: var(--dim); }
.legend { display: flex; flex-wrap: wrap; gap: .4rem 1rem; align-items: center; margin: .8rem 0 1.2rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; margin: 1rem 0;
  overflow: hidden; }
.card header { display: flex; flex-wrap: wrap; gap: .2rem .9rem; padding: .55rem .9rem; align-items: baseline;
  border-bottom: 1px solid var(--line); }
.card header b { overflow-wrap: anywhere; }
.badge { border-radius: 1rem; padding: 0 .6rem; border: 1px solid currentColor; font-size: .85em; }
.ok { color: var(--learned-ink); } .warn { color: var(--cut); }
.text { padding: .8rem .9rem; margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 14px/1.75 ui-monospace, "DejaVu Sans Mono", "Noto Sans Mono CJK SC", monospace; }
.learned { background: var(--learned); color: var(--learned-ink); border-radius: .15rem; }
.template { color: var(--dim); } .user { color: var(--user); } .system { color: var(--system); }
.tool { color: var(--tool); }
.special { background: var(--special); color: var(--special-ink); border-radius: .2rem; padding: 0 .15rem;
  font-weight: 600; }
.special.learned { background: var(--learned); color: var(--learned-ink); outline: 1px solid currentColor;
  outline-offset: -1px; }
.role { font: 600 .72rem system-ui, sans-serif; text-transform: uppercase; letter-spacing: .04em; margin-right: .35rem;
  border: 1px solid currentColor; border-radius: .3rem; padding: 0 .35rem; vertical-align: .08em; user-select: none; }
.role.assistant { color: var(--learned-ink); }
.cut { color: var(--cut); text-decoration: line-through; }
#tokens:checked ~ main .t { box-shadow: inset -1px 0 0 var(--dim), inset 0 -1px 0 var(--line); }
#tokens:checked ~ main .t[data-n]::after { content: attr(data-n); font-size: .65em; vertical-align: super;
  color: var(--dim); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .15rem .7rem; align-items: center;
  font-variant-numeric: tabular-nums; font-size: .9rem; }
.bars span:nth-child(3n+1) { text-align: right; color: var(--dim); }
.bar { background: var(--bar); height: .95rem; border-radius: 0 .2rem .2rem 0; min-width: 1px; }
.bar.over { background: var(--over); }
"""
_NAMES = {"\n": "⏎\n", "\t": "⇥\t"}


def samples_page(samples: Sequence[Sample], *, title: str, note: str, boundaries: bool) -> str:
    """A page of samples, with a switch for the borders of tokens.

    Args:
        samples: What to show.
        title: Head of the page.
        note: A line below it, such as the template.
        boundaries: Whether the switch is on at first.
    """
    legend = (
        '<div class="legend"><span class="learned">learned: carries loss</span><span class="template">template</span>'
        '<span class="system">system</span><span class="user">user</span><span class="tool">tool</span>'
        '<span class="special">special token</span><span class="cut">cut</span></div>'
    )
    switch = (
        f'<input type="checkbox" id="tokens"{" checked" if boundaries else ""}> <label for="tokens">show where tokens '
        "end (a raised number: so many tokens for one character)</label>"
    )
    body = "\n".join(map(_card, samples))
    head = f'<h1>{html.escape(title)}</h1><p class="dim">{html.escape(note)}</p>{legend}'
    return _page(title, f"{head}{switch}\n<main>\n{body}\n</main>")


def stats_page(stats: Stats, *, title: str, notes: Sequence[str]) -> str:
    """A page of quantiles, figures and the histogram."""
    head, *rows = table(stats)
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    said = "".join(f"<p>{html.escape(fact)}</p>" for fact in facts(stats))
    noted = "".join(f'<p class="dim">{html.escape(note)}</p>' for note in notes)
    return _page(
        title,
        f"<h1>{html.escape(title)}</h1>{noted}<h2>Tokens of a row, before anything is cut</h2>"
        f"<table><tr>{cells}</tr>{lines}</table><h2>Training</h2>{said}<h2>Rows by total tokens</h2>{_bars(stats)}",
    )


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _card(sample: Sample) -> str:
    clean = sample.kept and sample.status == "kept"
    head = (
        f'<header><b>{html.escape(sample.source)}</b><span class="badge {"ok" if clean else "warn"}">'
        f'{html.escape(sample.status)}</span><span class="dim">{html.escape(sample.layout)} · {sample.tokens:,} tokens'
        f" · {sample.learned:,} learned ({learned_share(sample):.0%})</span></header>"
    )
    cut = f'<span class="cut">{html.escape(sample.cut)}</span>' if sample.cut else ""
    text = ""
    for (role, learned), group in groupby(sample.pieces, key=lambda piece: (piece.role, piece.learned)):
        text += _role(role, learned)
        if role == "user":  # trimming cuts the users' texts, the earliest first
            text, cut = text + cut, ""
        text += "".join(map(_piece, group))
    return f'<article class="card">{head}<pre class="text">{text}</pre></article>'


def _role(role: str, learned: bool) -> str:
    if role in (TEMPLATE, "raw"):
        return ""
    return f'<span class="role {role}">{role}{" · learned" if learned else ""}</span>'


def _piece(piece: Piece) -> str:
    kinds = ["t", "learned" if piece.learned else piece.role, *(["special"] if piece.special else [])]
    number = f' data-n="{len(piece.ids)}"' if len(piece.ids) > 1 else ""
    hint = f' title="{", ".join(map(str, piece.ids))}"' if piece.ids else ""
    text = html.escape(piece.text)
    if piece.learned:
        text = "".join(_NAMES.get(letter, letter) for letter in text)
    return f'<span class="{" ".join(kinds)}"{number}{hint}>{_visible(text)}</span>'


def _visible(text: str) -> str:
    """Control characters by their number, because a browser shows nothing."""
    return "".join(f"[U+{ord(c):04X}]" if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 else c for c in text)


def _bars(stats: Stats) -> str:
    found, limit = stats.histogram, stats.limits["total"]
    most, total = max(1, *found.counts), max(1, sum(found.counts))
    lines = []
    for start, end, count in zip(found.edges, found.edges[1:], found.counts, strict=False):
        over = " over" if limit is not None and start > limit else ""
        lines.append(
            f"<span>{start:,} to {end - 1:,}</span><span>"
            + (f'<div class="bar{over}" style="width:{count / most:.2%}"></div>' if count else "")
            + f"</span><span>{count:,} ({count / total:.1%}){over}</span>"
        )
    return f'<div class="bars">{"".join(lines)}</div>'
