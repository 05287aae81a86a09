"""`report.html`: one file that can be read without a network, in dark and in light."""

from __future__ import annotations

import base64
import re
import shlex
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from worldline.core.files import write_bytes
from worldline.evaluate.charts import bound_chart, latent_chart, long_chart, reliability_chart, trust_chart
from worldline.evaluate.figures import headline
from worldline.evaluate.pictures import MARKS, Scene, as_png, filmstrip, moving_picture, scaled
from worldline.evaluate.ranking import nearest_multiple
from worldline.evaluate.style import CSS

_BOUND_LEAD = (
    "The imagined state errs by at most the sum of the one-step errors, each times the gains of the steps after it. A "
    "gain is the largest singular value of a step's Jacobian (latent and memory together) found at three points "
    "between the true state and the imagined one. Between these points it can be larger: what is drawn is an "
    "estimate of the bound, from below, and no promise for other episodes. Unit: root mean squared distance of real "
    "latents from their mean."
)

_TRUST_LEAD = (
    "Which imagined latents are wrong, told without the truth. Wrong: the squared error in whitened units, mean over "
    "directions, is above half the variance of real latents. AUROC: how often a wrong window reads higher than a right "
    "one at the same horizon (a clock has 0.5); thick where 10 to 90% are wrong, and only these horizons count. On the "
    "right, the chance that the world's own estimator gave, and how many were wrong; the area is the number of windows."
)


def write_report(out: Path, figures: dict[str, Any], scene: Scene) -> None:
    """Write `report.html`, `filmstrip.png` and `rollout.gif` into `out`."""
    write_bytes(out / "filmstrip.png", as_png(filmstrip(scene)))
    gif = moving_picture(scene)
    write_bytes(out / "rollout.gif", gif)
    write_bytes(out / "report.html", render(figures, scene, gif).encode())


def render(figures: dict[str, Any], scene: Scene, gif: bytes) -> str:
    """Return the page."""
    verdict = figures["verdict"]
    name = escape(figures["dataset"]["name"])
    sections = [
        _cards(verdict),
        _section(
            "How far to trust it",
            "Skill R at every horizon, on the windows in which the factor really moved: 1 is exact, 0 is no better "
            "than the training mean. The filled area is the credit that counts: it needs an error of at most "
            "1.1 times the best naive forecast's in 95% of bootstrap draws, and less than standing still has.",
            reliability_chart(figures, scene.step_seconds),
        ),
        _section(
            "Truth beside imagination",
            f"Test episode {scene.episode}, from frame {scene.start}: of the windows in which most factors moved, the "
            "one of median latent error. After h = 0 the model sees actions only."
            + ("" if scene.drawn else " It has no decoder: shown are the frames of other test episodes nearest to it."),
            _pictures(scene, gif),
        ),
        _section("By factor", "", _factor_table(figures)),
        _section(
            "Gates",
            "G1: the encoder keeps the factor (probe R² at least 0.8 of the canonical supervised encoder's), else its "
            "credit is 0. G2: credit with the true actions minus credit with those of other episodes. G3: share of "
            "distractors, different in this factor and alike in the others, that lie farther away than the truth; "
            "chance is 0.5. The headline is invalid if G2 or G3 fails for every factor.",
            _gate_table(figures),
        ),
        _section("The latent itself", "", latent_chart(figures) + long_chart(figures) + _latent_table(figures)),
    ]
    if figures.get("trust"):
        sections.append(_section("When not to believe it", _TRUST_LEAD, trust_chart(figures) + _trust_table(figures)))
    if "bound" in figures:
        sections.append(_section("What is bounded", _BOUND_LEAD, bound_chart(figures) + _bound_table(figures["bound"])))
    if "compare" in figures:
        sections.append(_section("Beside another model", "", _compare_table(figures)))
    sections.append(
        _section("Again", "Everything in result.json but timing and provenance repeats.", _reproduce(figures))
    )
    state = "valid" if verdict["valid"] else "invalid"
    sentence = escape(headline(figures).removeprefix("Invalid: "))
    sentence = re.sub(r"HRI_(\d+)", r"HRI<sub>\1</sub>", sentence[0].upper() + sentence[1:])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>worldline: {name}</title><style>{CSS}</style></head><body><main>"
        f'<p class="kicker">worldline &middot; evaluation &middot; {name} &middot; weights '
        f"{figures['model']['weights_sha256'][:12]} "
        f"{_size(figures['model']['parameters'])}</p>"
        f'<h1><span class="chip {state}">{state}</span> {sentence}</h1>'
        f"{''.join(sections)}</main></body></html>\n"
    )


def _section(title: str, lead: str, body: str) -> str:
    lead = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{body}</section>"


def _cards(verdict: dict[str, Any]) -> str:
    cards = []
    for horizon, hri in verdict["hri"].items():
        value = "n/a" if hri is None else f"{hri['value']:.2f}"
        between = "nothing moved enough to be scored" if hri is None else f"{hri['low']:.2f} to {hri['high']:.2f}"
        cards.append(
            (f"HRI<sub>{horizon}</sub>", value, between, "area under the credit curve, mean over factors; 0 to 1")
        )
    star = verdict["h_star"]
    sign = "&ge;&thinsp;" if star["censored"] else ""
    by = "no factor ends it" if star["censored"] else f"ended by {escape(str(star['ended_by']))}"
    cards.append(
        (
            "H*",
            f"{sign}{star['steps']} <small>steps &middot; {star['seconds']:.1f} s</small>",
            f"{star['low']} to {star['high']}; {by}",
            "largest step up to which every factor keeps a credit of 0.5",
        )
    )
    cards.append(
        (
            "judged on",
            f"{verdict['num_windows']} <small>windows</small>",
            f"of {verdict['num_episodes']} held-out episodes",
            "95% intervals are bootstraps over episodes",
        )
    )
    boxes = "".join(
        f'<div class="card" title="{escape(title)}"><b>{label}</b><strong>{value}</strong><span>{below}</span></div>'
        for label, value, below, title in cards
    )
    return f'<div class="cards">{boxes}</div>'


def _pictures(scene: Scene, gif: bytes) -> str:
    marks = [h for h in MARKS if h < len(scene.truth)]
    cells = ["<i></i>"]
    cells += [f"<span>h = {h} <small>{h * scene.step_seconds:.1f} s</small></span>" for h in marks]
    for kind, label, frames in (("truth", "truth", scene.truth), ("dream", "imagination", scene.imagined)):
        cells.append(f'<b class="{kind}">{label}</b>')
        cells += [f'<img alt="{label} at h = {h}" src="{_uri("png", as_png(scaled(frames[h], 256)))}">' for h in marks]
    columns = f"style='grid-template-columns: auto repeat({len(marks)}, 1fr)'"
    return (
        f'<div class="strip" {columns}>{"".join(cells)}</div>'
        f'<img class="gif" src="{_uri("gif", gif)}" alt="truth (left) beside imagination (right), moving">'
        '<p class="under"><b class="truth">truth</b> <b class="dream">imagination</b></p>'
    )


def _factor_table(figures: dict[str, Any]) -> str:
    factors = figures["factors"]
    last = figures["windows"]["horizon"]
    every = figures["windows"]["every"]
    marks = sorted({nearest_multiple(h, every) for h in (10, 25, 50, 75, 100, last)})
    marks = [h for h in marks if h <= last]
    rows = []
    for name, factor in factors.items():
        credit = _value(factor["mean_credit"])
        rows.append([f"<b>{escape(name)}</b>", "imagination", *(_value(factor["r"][h]) for h in marks), credit])
        rows.append(["", "encoder's limit", *(_value(factor["r_real_latents"][h]) for h in marks), ""])
        for kind in ("persistence", "standing still", "constant velocity", "actions only", "action-free twin"):
            curve = factor["r_naive"].get(kind)
            rows.append(["", kind, *("n/a" if curve is None else _value(curve[h]) for h in marks), ""])
        rows.append(["", "windows that moved", *(f"{factor['num_moved'][h]}" for h in marks), ""])
    table = _table(["factor", "skill R of", *(f"h = {h}" for h in marks), "mean credit"], rows, text_columns=2)
    excluded = figures["verdict"]["excluded"]
    if excluded:
        items = "".join(f"<li><b>{escape(k)}</b>: {escape(v)}</li>" for k, v in excluded.items())
        table += f"<p>Excluded:</p><ul>{items}</ul>"
    return table


def _gate_table(figures: dict[str, Any]) -> str:
    rows = []
    for name, factor in figures["factors"].items():
        g1, g2, g3 = (factor["gates"][key] for key in ("g1", "g2", "g3"))
        rows.append(
            [
                f"<b>{escape(name)}</b>",
                _passed(g1["passed"]) + f" {_value(g1['probe_r2'])} of {_value(g1['canonical_r2'])}",
                _passed(g2["passed"]) + f" {_between(g2['credit_of_true_actions'])}",
                _passed(g3["passed"]) + f" {_between(g3['ranks_above'])}",
            ]
        )
    return _table(["factor", "G1 encoded", "G2 actions matter", "G3 points at the future"], rows, text_columns=4)


def _latent_table(figures: dict[str, Any]) -> str:
    latents, long, gauge = figures["latents"], figures["long_rollouts"], figures["gauge"]
    rows = [
        ["one-step error, whitened", _value(latents["error_one_step"], 3)],
        ["growth e<sub>100</sub> / e<sub>10</sub>", _value(latents["growth_e100_e10"])],
        ["effective rank", f"{_value(latents['effective_rank'], 1)} of {latents['dimensions']}"],
        [
            f"inside the real region after {long['steps']} steps"
            + ("" if long["steps"] >= long["wanted_steps"] else f" (no test episode has {long['wanted_steps']:,})"),
            f"{100 * long['inside'][-1]:.0f} %, median radius {long['median_radius'][-1]:.2f} of real "
            f"(the {long['episodes']} real latents there: {100 * long['inside_real'][-1]:.0f} %, "
            f"{long['median_radius_real'][-1]:.2f})",
        ],
    ]
    if gauge is None:
        rows.append(["drift gauge", "this world has none fitted"])
    else:
        for kind, label in (("region", "radius"), ("cycle", "cycle distance")):
            found = ", ".join(f"{_value(c)} at {h}" for h, c in zip(gauge["at"], gauge[kind], strict=True))
            rows.append([f"rank correlation of the gauge's {label} with true error, within a horizon", found])
    return _table(["figure", "value"], [*rows, _twin_row(figures["twins"])], text_columns=1)


def _twin_row(twins: dict[str, Any]) -> list[str]:
    label = "the world itself: twins' distance, standard deviations of the state (median)"
    if "left_out" in twins:
        return [label, f"n/a: {escape(twins['left_out'])}"]
    apart = twins["apart"]
    shown = ", ".join(f"{apart[h - 1]:.2g} at {h}" for h in (1, 10, 25, 50, 100, 200) if h <= len(apart))
    return [f"{label} after an action that differs by {twins['nudge']:g} of its own", shown]


def _trust_table(figures: dict[str, Any]) -> str:
    trust = figures["trust"]
    marks = [i for i, h in enumerate(trust["at"]) if h in (10, 25, 50, 75, 100)]
    rows = [["share of windows that are wrong", *(_value(trust["share_wrong"][i]) for i in marks), ""]]
    for name, label in (
        ("estimator", "the estimator of the error"),
        ("region", "the radius"),
        ("cycle", "the cycle distance"),
    ):
        area = trust["auroc"].get(name)
        cells = ["n/a"] * len(marks) if area is None else [_value(area[i]) for i in marks]
        rows.append([f"AUROC of {label}", *cells, _between(trust["mean_auroc"].get(name))])
    if "reliability" in trust:
        for key, label in (("error", "mean error"), ("expected_error", "mean error, as expected")):
            rows.append([label, *(_value(trust[key][i]) for i in marks), ""])
        gap = f"<p>Mean gap between chance and share: {trust['reliability']['mean_gap']:.3f}.</p>"
    else:
        gap = "<p>This world has no error estimator; <code>scripts/fit_gauge</code> fits one.</p>"
    header = ["", *(f"h = {trust['at'][i]}" for i in marks), "mean over horizons that count"]
    return _table(header, rows, text_columns=1) + gap


def _bound_table(bound: dict[str, Any]) -> str:
    def median(rows: list[list[float | None]]) -> str:
        known = [value for row in rows for value in row if value is not None]
        return _value(float(np.median(known)) if known else None, 3)

    length, gain_held = len(bound["bound"][0]), bound["gain_held"]
    rows = [
        ["steps on which the bound held", f"{100 * bound['held']:.1f} %"],
        [
            "steps whose gain was within the measured one",
            _value(None) if gain_held is None else f"{100 * gain_held:.1f} %",
        ],
        [
            "the bound's median is under that of two random latents",
            f"for {bound['says_something_up_to']} of {length} steps",
        ],
        ["one-step error, median", median(bound["residual"])],
        ["gain of the whole state; what steps did", f"{median(bound['gain'])}; {median(bound['gain_seen'])}"],
    ]
    for name, rows_of_name in bound["split"].items():
        rows.append(
            [
                f"gain of the latent, {name} (real latents vary along {bound['tangent_dim']:.1f} directions)"
                if name == "tangent"
                else f"gain of the latent, {name}",
                median(rows_of_name),
            ]
        )
    return _table(["figure", "value"], rows, text_columns=1)


def _compare_table(figures: dict[str, Any]) -> str:
    compare, ours = figures["compare"], figures["verdict"]
    rows = [
        [f"HRI<sub>{t}</sub>", _between(ours["hri"][t]), _between(compare["verdict"]["hri"][t]), _between(difference)]
        for t, difference in compare["hri_difference"].items()
    ]
    a, b = ours["h_star"], compare["verdict"]["h_star"]
    rows.append(["H*, steps", *(f"{s['steps']} [{s['low']}, {s['high']}]" for s in (a, b)), ""])
    for name, factor in figures["factors"].items():
        other = compare["factors"][name]
        rows.append([f"mean credit, {escape(name)}", _value(factor["mean_credit"]), _value(other["mean_credit"]), ""])
    valid = (
        "" if compare["verdict"]["valid"] else f"<p>The other is invalid: {escape(compare['verdict']['invalid'])}.</p>"
    )
    header = ["", "this model", escape(compare["checkpoint"]), "difference, paired"]
    return _table(header, rows, text_columns=1) + valid


def _reproduce(figures: dict[str, Any]) -> str:
    config = figures["config"]
    words = ["worldline", "evaluate", config["checkpoint"], f"data={config['data']}"]
    words += [
        f"{key}={config[key]}"
        for key in ("horizon", "windows", "seed", "twins", "twin", "compare")
        if config[key] is not None
    ]
    words += [f"{key}=true" for key in ("bounds", "allow_pickled_code") if config[key]]
    return (
        f"<pre>{escape(shlex.join(words))}</pre>"
        f'<p class="lead">dataset {figures["dataset"]["fingerprint"][:12]} &middot; reference pack '
        f"{figures['dataset']['references'][:12]}</p>"
    )


def _table(header: list[str], rows: Iterable[list[str]], text_columns: int) -> str:
    def line(cells: list[str], tag: str) -> str:
        marks = ['class="text"' if i < text_columns else "" for i in range(len(cells))]
        return "<tr>" + "".join(f"<{tag} {m}>{c}</{tag}>" for m, c in zip(marks, cells, strict=True)) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table><thead>{line(header, "th")}</thead><tbody>{body}</tbody></table></div>'


def _passed(passed: bool) -> str:
    return '<span class="pass">pass</span>' if passed else '<span class="fail">fail</span>'


def _between(interval: dict[str, float] | None) -> str:
    if interval is None:
        return "n/a"
    return f"{interval['value']:.2f} <small>[{interval['low']:.2f}, {interval['high']:.2f}]</small>"


def _size(parameters: int | None) -> str:
    return "" if parameters is None else f"&middot; {parameters / 1e6:.2f} M parameters"


def _value(value: float | None, digits: int = 2) -> str:
    return "&ndash;" if value is None else f"{value:.{digits}f}"


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
