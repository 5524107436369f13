"""An HTML page in one file: light or dark as the reader has it, readable on a phone. Every text given is escaped here."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from jaxtyping import UInt8
from PIL import Image

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --ground: #fff; --faint: #f3f4f6; --rule: #d4d7dc; --grey: #5f6670 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --ground: #15171a; --faint: #1f2226; --rule: #3a3f46; --grey: #a0a7b0 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; color: var(--ink); background: var(--ground);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.5rem }
p { max-width: 48rem; color: var(--grey) }
nav a { display: inline-block; margin-right: 1rem; color: inherit }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--rule); vertical-align: bottom }
th { font-weight: 600; min-width: 4.5rem; background: var(--faint) }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--ground); min-width: 3rem }
td.group { font-style: italic; color: var(--grey); text-align: left }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0 }
.charts svg { flex: 1 1 20rem; max-width: 34rem; min-width: 0; width: 100%; height: auto; align-self: flex-start }
figure { margin: 0 } figure img { max-width: 100%; height: auto } figcaption { font-size: .85rem; color: var(--grey) }
details { font-size: .85rem; margin: .2rem 0 } dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem }
dt { color: var(--grey) } dd { margin: 0; overflow-wrap: anywhere }
"""


POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""What the browser lets the page do: nothing but what stands in it."""


def page(title: str, body: str, sections: Sequence[str] = (), *, style: str = "") -> str:
    """The whole page around `body`, which is HTML; links to the ids named in `sections` stand under the title, and `style`
    is CSS beside the page's own."""
    links = "".join(f'<a href="#{escape(name)}">{escape(name)}</a>' for name in sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{STYLE}{style}</style></head>\n<body><h1>{escape(title)}</h1><nav>{links}</nav>\n{body}</body></html>\n"
    )


def paragraphs(texts: Sequence[str]) -> str:
    """One <p> a text."""
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts that scrolls by itself where the page is narrow."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "\n".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>\n'


def picture(pixels: UInt8[np.ndarray, "H W 3"], caption: str, *, quality: int = 85) -> str:
    """A <figure> that carries the picture in itself, as a JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    data = base64.b64encode(buffer.getvalue()).decode()
    height, width = pixels.shape[:2]
    return (
        f'<figure><img loading="lazy" width="{width}" height="{height}" alt="{escape(caption)}" '
        f'src="data:image/jpeg;base64,{data}"><figcaption>{escape(caption)}</figcaption></figure>'
    )
