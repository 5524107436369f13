"""A check as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from retina_jax.data_check.check import Check
from retina_jax.data_check.coverage import Share
from retina_jax.data_check.findings import Group
from retina_jax.data_check.views import ASPECTS, SIDES
from retina_jax.reports.charts import Stack, bar_chart
from retina_jax.reports.coverage_pictures import COVERED, RESCUED, UNCOVERED, Worst
from retina_jax.reports.page import page, paragraphs, picture, table

LISTED = 200
"""Findings of a kind that the page lists; the JSON has all."""
OPEN = 10
"""Lists of so many findings are unfolded from the start."""
ROWS = 20
"""Rows of a table that are seen from the start."""
STYLE = f"""
.error b {{ color: {UNCOVERED} }} .warning b {{ color: {RESCUED} }} summary {{ cursor: pointer; font-size: 1rem }}
details p {{ margin: .3rem 0 .6rem }} pre {{ background: var(--faint); padding: .8rem; white-space: pre-wrap }}
td {{ white-space: nowrap }} h3 {{ font-size: 1rem }}
.wide {{ display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)) }}
.list table {{ width: 100% }} .list th, .list td {{ text-align: left; white-space: normal; overflow-wrap: anywhere }}
.list td:first-child {{ min-width: 7.5rem }} .list td:nth-child(2) {{ white-space: nowrap }}
.list td:last-child {{ width: 75% }} .list th {{ min-width: 3.2rem; white-space: nowrap }}
"""


def to_html(check: Check, pictures: Sequence[Worst], title: str) -> str:
    """The page; every text of the data set is escaped."""
    sections = {
        "findings": _findings(check.groups),
        "classes": _classes(check),
        "anchors": _anchors(check),
        "suggestion": _suggestion(check),
        "pictures": _pictures(pictures),
    }
    body = _verdict(check) + "".join(f'<section id="{name}">{text}</section>\n' for name, text in sections.items())
    return page(title, body, list(sections), style=STYLE)


def verdict(check: Check) -> str:
    """One sentence: whether training makes sense."""
    errors = sum(len(group.findings) for group in check.groups if group.severity == "error")
    warnings = sum(len(group.findings) for group in check.groups if group.severity == "warning")
    if errors:
        return f"Training makes no sense yet. Errors: {errors}, warnings: {warnings}"
    return f"Training makes sense. Errors: none, warnings: {warnings or 'none'}"


def _verdict(check: Check) -> str:
    rows = [
        [
            split.name,
            f"{len(split.images)}",
            f"{len(split.labels)}",
            f"{int(split.rules['usable'].sum())}",
            str(split.annotations),
        ]
        for split in check.splits
    ]
    tone = "note" if check.makes_sense else "error"
    return f'<p class="{tone}"><b>{escape(verdict(check))}</b></p>' + table(
        ["split", "images", "boxes", "of them usable", "annotations"], rows
    )


def _findings(groups: Sequence[Group]) -> str:
    parts = ["<h2>Findings</h2>"]
    if not groups:
        parts.append(paragraphs(["Nothing was found."]))
    for group in groups:
        rows = [[f.name, f.split, f.text] for f in group.findings[:LISTED]]
        more = len(group.findings) - len(rows)
        parts.append(
            f'<details class="list {group.severity}"{" open" if len(group.findings) <= OPEN else ""}>'
            f"<summary><b>{group.severity}</b> {escape(group.title)}: {len(group.findings)}</summary>"
            f"{paragraphs([group.meaning])}{table(['which', 'split', 'what'], rows)}"
            f"{paragraphs([f'{more} more are in data_check.json.'] if more else [])}</details>"
        )
    return "".join(parts)


def _classes(check: Check) -> str:
    names = list(dict.fromkeys(count.name for counts in check.counts.values() for count in counts))
    header, rows = ["class"], {name: [name] for name in names}
    for split, counts in check.counts.items():
        header += [f"{split}: boxes", "images", "dropped"]
        for name in names:
            of_split = {count.name: count for count in counts}.get(name)  # a split may lack a class
            rows[name] += [str(getattr(of_split, field, "")) for field in ("boxes", "images", "dropped")]
    said = "Boxes that can be trained on, the images that have one, and boxes dropped: crowds, without area or outside."
    return f"<h2>Classes</h2>{paragraphs([said])}{_folded(header, list(rows.values()))}"


def _folded(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of which the first ROWS are seen, and the others when asked for."""
    rest = rows[ROWS:]
    more = f"<details><summary>{len(rest)} more</summary>{table(header, rest)}</details>" if rest else ""
    return table(header, rows[:ROWS]) + more


def _anchors(check: Check) -> str:
    config, shares = check.config, check.shares
    short = ", ".join(map(str, config.data.jitter_short_sides)) or str(config.data.short_side)
    said = [
        f"Every box after the resize to a short side of {short} pixels (the long side at most {config.data.long_side}), "
        "matched with the anchors as training does it. A box is learnt through anchors of an IoU of "
        f"{config.matching.positive_iou:g} or more; where it has none, the low-quality rule "
        + {
            "none": "does not help (matching.low_quality none).",
            "band": f"gives it its best one from an IoU of {config.matching.negative_iou:g} on (matching.low_quality band).",
            "all": "gives it its best one, whatever the IoU (matching.low_quality all).",
        }[config.matching.low_quality],
        f"Expected positive anchors an image: {shares.positives_per_image:.1f}.",
    ]
    charts = "".join(
        _histogram(of, names, label)
        for of, names, label in (
            (shares.sizes, [f"{end:.3g}" for end in SIDES], "square root of the area, pixels"),
            (shares.aspects, [f"{end:.2g}" for end in ASPECTS], "height over width"),
        )
    )
    header = [
        "",
        "boxes",
        f"IoU ≥ {config.matching.positive_iou:g}",
        "low-quality rule only",
        "no anchor",
        "outbid",
        "anchors a box",
    ]
    worst_first = sorted(
        shares.classes, key=lambda share: (not share.boxes, share.part("by_iou"), share.part("uncovered"))
    )
    rows = [_row(share) for share in (shares.total, *worst_first)]
    sizes = [_row(share) for share in shares.sizes if share.boxes]
    return (
        f'<h2>Anchor coverage</h2>{paragraphs(said)}<div class="charts">{charts}</div>{_folded(header, rows)}'
        f"<h3>By size, pixels</h3>{table(header, sizes)}"
    )


def _row(share: Share) -> list[str]:
    parts = [f"{share.part(kind):.1%}" if share.boxes else "" for kind in ("by_iou", "by_low_quality", "uncovered")]
    each = f"{share.anchors / share.boxes:.1f}" if share.boxes else ""
    return [share.name, f"{share.boxes}", *parts, f"{share.outbid}", each]


def _histogram(shares: Sequence[Share], ends: Sequence[str], label: str) -> str:
    """The bins from the first to the last with boxes; every second end is named where they are many."""
    filled = [i for i, share in enumerate(shares) if share.boxes] or [0]
    first, last = filled[0], filled[-1] + 1
    names = ["∞" if end == "inf" else end for end in ends[first : last + 1]]
    names = [name if len(names) <= 12 or i % 2 == 0 else "" for i, name in enumerate(names)]
    stacks = [
        Stack(text, [getattr(share, kind) for share in shares[first:last]], colour)
        for kind, text, colour in (
            ("by_iou", "sufficient IoU", COVERED),
            ("by_low_quality", "low-quality only", RESCUED),
            ("uncovered", "no anchor", UNCOVERED),
        )
    ]
    return bar_chart(names, stacks, label, "boxes")


def _suggestion(check: Check) -> str:
    title, suggestion = "<h2>Suggestion</h2>", check.suggestion
    if suggestion is None:
        return title + paragraphs(
            ["None: the coverage is good, or no other anchors and sizes that were tried mend it."]
        )
    everything, *classes = suggestion.pairs()
    rows = [
        [
            before.name,
            f"{before.boxes}",
            f"{before.part('by_iou'):.1%}",
            f"{after.part('by_iou'):.1%}",
            f"{after.part('uncovered'):.1%}",
        ]
        for before, after in (everything, *sorted(classes, key=lambda pair: pair[0].part("by_iou")))
    ]
    before, after = suggestion.anchors
    said = [
        f"The cheapest of the settings tried that mends it, counted anew with these anchors on all boxes. An image has "
        f"{suggestion.pixels:.2f} times the pixels, a place {before} → {after} anchors, an image "
        f"{suggestion.before.positives_per_image:.1f} → {suggestion.after.positives_per_image:.1f} positive anchors.",
    ]
    header = ["", "boxes", "sufficient IoU before", "after", "no anchor after"]
    return f"{title}{paragraphs(said)}<pre>{escape(suggestion.options)}</pre>{_folded(header, rows)}"


def _pictures(pictures: Sequence[Worst]) -> str:
    said = (
        "The images with the most boxes that lack anchors, at the size that the network sees. Green: anchors of sufficient "
        "IoU; yellow: by the low-quality rule only; red: none. The number is the largest IoU with any anchor."
        if pictures
        else "None: every box has an anchor of sufficient IoU."
    )
    shown = "".join(picture(worst.pixels, worst.caption, quality=80) for worst in pictures)
    return f'<h2>The worst pictures</h2>{paragraphs([said])}<div class="wide">{shown}</div>'
