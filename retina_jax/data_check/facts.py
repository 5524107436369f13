"""A check as JSON: every finding, every count."""

from __future__ import annotations

from typing import Any

from retina_jax.config_files import flatten
from retina_jax.data_check.check import Check
from retina_jax.data_check.shares import Shares


def facts_of(check: Check) -> dict[str, Any]:
    """What the page shows, all of it, in JSON's own types."""
    settings = {name: value for name, value in flatten(check.config).items() if name.split(".")[0] in CONCERNED}
    return {
        "makes_sense": check.makes_sense,
        "splits": {
            split.name: {
                "annotations": str(split.annotations),
                "images_folder": str(split.folder),
                "images": len(split.images),
                "boxes": len(split.labels),
                "usable_boxes": int(split.rules["usable"].sum()),
                "classes": [count._asdict() for count in check.counts[split.name]],
            }
            for split in check.splits
        },
        "findings": [
            {
                "kind": group.kind,
                "severity": group.severity,
                "title": group.title,
                "count": len(group.findings),
                "found": [{"split": f.split, "name": f.name, "text": f.text} for f in group.findings],
            }
            for group in check.groups
        ],
        "coverage": _shares(check.shares),
        "suggestion": check.suggestion
        and {
            "options": check.suggestion.options,
            "changes": check.suggestion.changes,
            "pixels_factor": check.suggestion.pixels,
            "anchors_per_cell": list(check.suggestion.anchors),
            "coverage": _shares(check.suggestion.after),
        },
        "settings": settings,
    }


CONCERNED = ("data", "anchors", "matching")
"""Parts of the config that the check depends on."""


def _shares(shares: Shares) -> dict[str, Any]:
    return {
        "all": shares.total.as_dict(),
        "positives_per_image": round(shares.positives_per_image, 3),
        **{key: [share.as_dict() for share in getattr(shares, key)] for key in ("classes", "sizes", "aspects")},
    }
