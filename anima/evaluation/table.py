"""The ratings document as lines for a terminal. Computes nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

from anima.tracking.terminal import pad, printable, text_width

Document = Mapping[str, Any]


def rating_lines(document: Document) -> list[str]:
    """The table of ratings, best first, and what to know about them."""
    ratings: Mapping[str, float] = document["ratings"]
    ranked = sorted(ratings, key=lambda name: -ratings[name])
    columns: list[tuple[str, dict[str, str]]] = [(_title(document), _numbers(ratings))]
    if intervals := document.get("intervals"):
        columns.append(("95 %", {name: f"{low:.0f} … {high:.0f}" for name, (low, high) in intervals.items()}))
    if spread := document.get("spread"):
        columns.append(("spread", _numbers(spread)))
    if controlled := document.get("length_controlled"):
        columns.append(("equal length", _numbers(controlled["ratings"])))
    if orderings := document.get("elo_orderings"):
        mean, sd = orderings["ratings"], orderings["spread"]
        columns.append(("Elo, orders' mean ± sd", {name: f"{mean[name]:.1f} ± {sd[name]:.1f}" for name in mean}))
    if elo := document.get("elo"):
        columns.append(("Elo, one order", _numbers(elo["ratings"])))
    if rates := document.get("win_rates"):
        record = rates["all"]
        columns.append(("wins-ties-losses", {n: f"{r['wins']}-{r['ties']}-{r['losses']}" for n, r in record.items()}))
    if any(contestant.get("prefix") for contestant in document.get("contestants", ())):
        columns.append(("prefix", {c["name"]: "yes" if c.get("prefix") else "" for c in document["contestants"]}))
    return [*_aligned(ranked, columns), *_notes(document)]


def judging_lines(document: Document) -> list[str]:
    """Categories, biases, separations."""
    lines: list[str] = []
    rates: Mapping[str, Mapping[str, Mapping[str, Any]]] = document.get("win_rates", {})
    if len(rates) > 1:
        ratings = document["ratings"]
        ranked = sorted(ratings, key=lambda name: -ratings[name])
        columns = [
            (category, {n: _percent(r["rate"]) for n, r in record.items()}) for category, record in rates.items()
        ]
        lines += ["", "share won, a tie counting half, by category", *_aligned(ranked, columns)]
    facts = bias_facts(document)
    lines += ["", *(f"{label:<12}{text}" for label, text in facts)] if facts else []
    if gaps := document.get("separation"):
        lines += ["", *(separation_line(gap) for gap in gaps)]
    return lines


def bias_facts(document: Document) -> list[tuple[str, str]]:
    """What is known of the judge's biases: a word and a sentence each."""
    facts = _position_facts(document["position_bias"]) if "position_bias" in document else []
    length = document.get("length_bias", {"share": None})
    if length["share"] is not None:
        facts.append(("length", f"the longer answer wins {_percent(length['share'])} of {length['decided']:,} decided"))
    for name, words in (("length", "having all of the text of the two"), ("position", "being shown first")):
        if controlled := document.get(f"{name}_controlled"):
            facts.append((name, f"{words} is worth {controlled['effect']:+.0f} points"))
    for agreement in document.get("judge_agreement", ()):
        kappa = "" if agreement["kappa"] is None else f", kappa {agreement['kappa']:.2f}"
        one, other = agreement["judges"]
        share = _percent(agreement["agreed"] / agreement["battles"])
        facts.append(("judges", f"{one} and {other} agree on {share} of {agreement['battles']:,}{kappa}"))
    return facts


def _position_facts(position: Mapping[str, Any]) -> list[tuple[str, str]]:
    shown, facts = position["shown_first"], []
    if shown["rate"] is not None:
        record = f"wins {shown['wins']:,}, ties {shown['ties']:,}, loses {shown['losses']:,}"
        facts.append(("position", f"the answer shown first {record} ({_percent(shown['rate'])})"))
    if both := position["both_orders"]:
        share = _percent(position["consistent"] / both)
        always = f"{position['always_first']:,} always the first, {position['always_second']:,} always the second"
        facts.append(("position", f"judged in both orders, {share} of {both:,} battles end the same; {always}"))
    if position["order_unknown"]:
        facts.append(("position", f"order not known: {position['order_unknown']:,} matches"))
    return facts


def separation_line(gap: Mapping[str, Any]) -> str:
    """Whether two neighbours are told apart, and what it would take."""
    low, high = gap["interval"]
    front = f"{gap['higher']} over {gap['lower']}: {gap['difference']:.0f} ({low:.0f} … {high:.0f})"
    if gap["separated"]:
        return f"{front}, separated at 95 %"
    if gap["more_battles"] is None:
        return f"{front}, practically equal"
    return f"{front}, about {gap['more_battles']:,} more battles to separate them at 95 %"


def _title(document: Document) -> str:
    titles = {"elo": "Elo", "elo_orderings": "Elo, orders' mean"}
    return titles.get(document["method"], "Bradley-Terry")


def _notes(document: Document) -> list[str]:
    notes = [f"{name} {fate}: its rating is bounded on one side only" for name, fate in _items(document, "one_sided")]
    for contestant in document.get("contestants", ()):
        if contestant.get("prefix"):
            notes.append(f"{contestant['name']} alone got before every question: {contestant['prefix']!r}")
    if meaning := document.get("interval_meaning"):
        notes.append(f"{document['num_matches']:,} matches; intervals: {meaning}")
    return notes


def _items(document: Document, key: str) -> Sequence[tuple[str, Any]]:
    return list(document.get(key, {}).items())


def _aligned(rows: Sequence[str], columns: Sequence[tuple[str, Mapping[str, str]]]) -> list[str]:
    """Names on the left, every column as wide as its widest cell."""
    table = [["", *(title for title, _ in columns)]]
    table += [[printable(row), *(cells.get(row, "-") for _, cells in columns)] for row in rows]
    widths = [max(text_width(line[place]) for line in table) for place in range(len(columns) + 1)]
    return ["  ".join(pad(cell, width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]


def _numbers(values: Mapping[str, float]) -> dict[str, str]:
    return {name: f"{value:.2f}" for name, value in values.items()}


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
