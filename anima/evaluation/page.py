"""The report as one HTML page that needs nothing from outside: drawings, tables, and every battle to look through.

Computes nothing; page.css and page.js beside this file are put into the page.
"""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anima.evaluation.charts import heat, heat_map, rating_plot
from anima.evaluation.table import bias_facts, separation_line
from anima.evaluation.verdicts import Answers, Verdict

HERE = Path(__file__).resolve().parent
Document = Mapping[str, Any]

_FILTERS = """
<div class="filters">
<label>Model<select id="one"><option value="">any</option></select></label>
<label>against<select id="other"><option value="">any</option></select></label>
<label>Result<select id="result"><option value="">any</option><option value="won">the model won</option>
<option value="lost">the model lost</option><option value="tie">tie</option>
<option value="disagree">orders disagree</option><option value="unread">not scored</option></select></label>
<label>Category<select id="category"><option value="">any</option></select></label>
<label>Judge<select id="judge"><option value="">any</option></select></label>
<label>Words<input id="search" type="search" placeholder="in question, answers, verdicts"></label>
</div>
<p id="count"></p><div id="battles"></div><button id="more" hidden>Show more</button>
"""


def report_page(document: Document, verdicts: Sequence[Verdict], answers: Answers, accounts: Sequence[str]) -> str:
    """The whole page.

    Args:
        document: What `rate` wrote, with contestants.
        verdicts: The verdicts it rests on.
        answers: By contestant and question id.
        accounts: Lines on what judging took.
    """
    ratings = document["ratings"]
    ranked = sorted(ratings, key=lambda name: -ratings[name])
    facts = f"{len(ranked)} models, {len(verdicts):,} verdicts, ratings from {document['num_matches']:,} matches"
    below = _note("Share won by the row, a tie half; below it the number of battles.")
    sections = [
        ("Ratings", _ratings(document)),
        ("Who beats whom", heat_map(document["head_to_head"], ranked) + below),
        ("By category", _categories(document["win_rates"], ranked)),
        ("The judge's biases", _biases(document)),
        ("Contestants", _contestants(document["contestants"]) + _list(accounts)),
        ("Battles", _FILTERS),
    ]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections)
    data = json.dumps(battle_data(verdicts, answers, ranked), ensure_ascii=False)
    # "<" must not end the script element early, whatever a model wrote.
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Arena report</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{(HERE / 'page.css').read_text(encoding='utf-8')}</style></head><body><main>"
        f'<h1>Arena report</h1><p class="lead">{html.escape(facts)}</p>{body}</main>'
        f'<script type="application/json" id="data">{data}</script>'
        f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script></body></html>\n"
    )


def battle_data(verdicts: Sequence[Verdict], answers: Answers, ranked: Sequence[str]) -> dict[str, object]:
    """What page.js draws: every battle with both orders, each text once."""
    groups: dict[tuple[str, str, str, str], list[Verdict]] = {}
    # Without a rating, and so behind all others: judged after the ratings, or never in a way that can be read.
    models = [*ranked, *sorted({name for v in verdicts for name in (v.first, v.second)} - set(ranked))]
    for verdict in verdicts:
        one, other = sorted((verdict.first, verdict.second), key=models.index)
        groups.setdefault((verdict.question_id, one, other, verdict.judge), []).append(verdict)
    battles = []
    for (question, one, other, judge), group in groups.items():
        battles.append(
            {
                "question": question,
                "one": one,
                "other": other,
                "judge": judge,
                "category": group[0].category,
                "result": _result(group),
                "verdicts": [
                    {
                        "first": v.first,
                        "second": v.second,
                        "outcome": v.reading.outcome,
                        "scores": v.reading.scores,
                        "text": v.text,
                    }
                    for v in group
                ],
            }
        )
    asked = {verdict.question_id: answers[verdict.first][verdict.question_id].question for verdict in verdicts}
    said = {
        name: {question: given[question].answer for question in asked if question in given}
        for name, given in ((name, answers.get(name, {})) for name in models)
    }
    return {"models": models, "questions": asked, "answers": said, "battles": battles}


def _result(group: Sequence[Verdict]) -> str:
    """The winner's name, tie, disagree (the two orders differ), or unread (an order is missing or unparsable)."""
    winners = {
        {"first": v.first, "second": v.second, "tie": "tie"}[v.reading.outcome] if v.reading.outcome else "unread"
        for v in group
    }
    if len(group) < 2 or "unread" in winners:
        return "unread"
    return winners.pop() if len(winners) == 1 else "disagree"


def _ratings(document: Document) -> str:
    others = {}
    if controlled := document.get("length_controlled"):
        others["at equal length"] = controlled["ratings"]
    if orderings := document.get("elo_orderings"):
        others["Elo, mean over orders"] = orderings["ratings"]
    legend = "<span><i></i>Bradley-Terry with 95 % interval</span>"
    legend += "".join(f'<span><i class="mark{kind}"></i>{name}</span>' for kind, name in enumerate(others))
    notes = [f"{name} {fate}: bounded on one side only." for name, fate in document["one_sided"].items()]
    notes += [separation_line(gap) for gap in document["separation"]]
    plot = rating_plot(document["ratings"], document["intervals"], others)
    return f'{plot}<div class="legend">{legend}</div>{_list(notes)}'


def _biases(document: Document) -> str:
    rows = "".join(
        f'<tr><th scope="row">{html.escape(label)}</th><td>{html.escape(text)}</td></tr>'
        for label, text in bias_facts(document)
    )
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def _categories(win_rates: Mapping[str, Mapping[str, Mapping[str, Any]]], ranked: Sequence[str]) -> str:
    heads = "".join(f'<th scope="col">{html.escape(category)}</th>' for category in win_rates)
    rows = []
    for name in ranked:
        cells = []
        for records in win_rates.values():
            record = records.get(name)
            rate = record["rate"] if record is not None else None
            if record is None or rate is None:
                cells.append("<td>-</td>")
                continue
            title = f"{record['wins']} won, {record['ties']} tied, {record['losses']} lost"
            cells.append(f'<td style="{heat(rate)}" title="{title}">{rate:.0%}</td>')
        rows.append(f'<tr><th scope="row">{html.escape(name)}</th>{"".join(cells)}</tr>')
    return f"<table><thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _contestants(contestants: Sequence[Mapping[str, Any]]) -> str:
    heads = "<th>model</th><th>kind</th><th>path</th><th>extra text before every question</th>"
    rows = "".join(
        f'<tr><th scope="row">{html.escape(str(entry["name"]))}</th><td>{html.escape(str(entry["kind"]))}</td>'
        f'<td class="path">{html.escape(str(entry["path"]))}</td>'
        f"<td>{html.escape(str(entry.get('prefix') or 'none'))}</td></tr>"
        for entry in contestants
    )
    return f'<table class="facts"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f'<li class="note">{html.escape(line)}</li>' for line in lines) + "</ul>" if lines else ""


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'
