"""HTML by construction: a str is text and is escaped, only `Html` is markup. One page, no script, nothing fetched.

Colours are CSS variables, so that the page and the charts in it follow the reader's light or dark scheme.
"""

import html
from collections.abc import Iterable, Sequence

VOID = {"meta"}


class Html(str):
    """Markup that needs no escaping."""


def element(tag: str, *children: object, **attributes: str | None) -> Html:
    """<tag attributes>children</tag>. `class_` stands for class, `aria_label` for aria-label; None leaves one out."""
    opened = tag + "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in VOID:
        return Html(f"<{opened}>")
    return Html(f"<{opened}>{join(children)}</{tag}>")


def join(children: Iterable[object]) -> Html:
    """Children one after the other; text is escaped, None and "" vanish."""
    return Html("".join(c if isinstance(c, Html) else html.escape(str(c)) for c in children if c is not None))


def section(title: str, *children: object) -> Html:
    return element("section", element("h2", title), *children)


def note(*children: object) -> Html:
    """One sentence about something that is missing or that the reader must know."""
    return element("p", *children, class_="note")


def code(text: str) -> Html:
    return element("code", text)


def figure(title: str, body: Html, caption: str = "", keys: Sequence[tuple[str, str]] = (), class_: str = "") -> Html:
    """A chart with its title, legend and a sentence under it. keys: (colour variable, text)."""
    legend = element("p", *(element("span", text, class_=f"key {color}") for color, text in keys), class_="keys")
    return element(
        "figure",
        element("h3", title),
        legend if keys else None,
        body,
        element("figcaption", caption) if caption else None,
        class_=f"card {class_}".strip(),
    )


def table(
    head: Sequence[str], rows: Iterable[Sequence[object]], numeric: Sequence[int] = (), caption: str = ""
) -> Html:
    """A table; the columns in `numeric` are right-aligned. It scrolls by itself where the window is too narrow."""

    def row(tag: str, cells: Sequence[object]) -> Html:
        return element("tr", *(element(tag, c, class_="num" if i in numeric else None) for i, c in enumerate(cells)))

    return element(
        "div",
        element(
            "table",
            element("caption", caption) if caption else None,
            element("thead", row("th", head)) if any(head) else None,
            element("tbody", *(row("td", cells) for cells in rows)),
        ),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=caption or "table",
    )


def document(title: str, *children: object) -> str:
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Html(CSS)),
    )
    body = element("body", element("main", *children))
    return "<!DOCTYPE html>\n" + element("html", head, body, lang="en") + "\n"


CSS = """
:root {
  color-scheme: light dark;
  --page: #f7f7f5; --card: #ffffff; --ink: #1b1f24; --muted: #5c6670; --line: #e3e4e2; --faint: #b9bfc4;
  --c1: #2563c9; --c2: #c2571a; --c3: #0f8a7e; --c4: #7c4fc4; --c5: #b8417f; --c6: #75780f; --c7: #7d868e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #101316; --card: #181c20; --ink: #e8ebee; --muted: #9aa5af; --line: #2b3138; --faint: #626d78;
    --c1: #7fb0ff; --c2: #f0a064; --c3: #55cfc0; --c4: #b99cf5; --c5: #f08ab8; --c6: #c9cc5a; --c7: #8b959e;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%;
}
main { max-width: 1168px; margin: 0 auto; padding: 56px 24px 72px; }
h1, h2, h3, p, figure, dl, dd { margin: 0; }
h1 { font-size: clamp(30px, 5vw, 44px); line-height: 1.1; letter-spacing: -0.02em; font-weight: 650; }
h1, dd, .note, .facts, figcaption { overflow-wrap: anywhere; }
td { overflow-wrap: break-word; }
h2 { font-size: 22px; letter-spacing: -0.01em; font-weight: 620; margin: 0 0 6px; }
h3 { font-size: 15px; font-weight: 620; }
section { margin-top: 56px; }
section > p { max-width: 52em; color: var(--muted); text-wrap: pretty; }
section > .card, section > .grid, section > .scroll, section > details { margin-top: 18px; }
.eyebrow { color: var(--muted); font-size: 13px; letter-spacing: 0.08em; text-transform: uppercase; }
.facts { color: var(--muted); margin-top: 12px; }
.facts span + span::before { content: "\\b7"; margin: 0 0.55em; color: var(--faint); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px; min-width: 0; }
.grid { display: grid; gap: 18px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); }
.grid.two { grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); }
.note { color: var(--muted); margin-top: 14px; padding-left: 14px; border-left: 3px solid var(--faint); }
.ladder { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; margin-top: 36px; padding: 0; }
.ladder > div { padding: 20px 22px; border-left: 1px solid var(--line); }
.ladder > div:first-child { border-left: 0; }
dt { color: var(--muted); font-size: 14px; }
dd { font-size: 14px; color: var(--muted); }
dd.big { font-size: clamp(26px, 3.4vw, 38px); line-height: 1.2; font-weight: 620; letter-spacing: -0.02em; }
dd.big { color: var(--ink); }
.best dd.big { color: var(--c1); }
.terms dt { color: var(--ink); font-weight: 550; margin-top: 12px; }
.stats { display: grid; gap: 28px 24px; margin-top: 28px; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.stats dd.big { font-size: 24px; line-height: 1.3; letter-spacing: -0.01em; }
.keys { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 13px; color: var(--muted); }
.key::before {
  content: ""; display: inline-block; width: 12px; height: 3px; border-radius: 2px; margin-right: 7px;
  vertical-align: middle; background: currentColor;
}
.key.square::before { height: 10px; width: 10px; }
.key.dot::before { height: 8px; width: 8px; border-radius: 50%; }
.key.diamond::before { height: 8px; width: 8px; border-radius: 0; transform: rotate(45deg); }
.c1::before { background: var(--c1); } .c2::before { background: var(--c2); } .c3::before { background: var(--c3); }
.c4::before { background: var(--c4); } .c5::before { background: var(--c5); } .c6::before { background: var(--c6); }
.c7::before { background: var(--c7); } .faint::before { background: var(--faint); }
figcaption { margin-top: 8px; font-size: 13.5px; color: var(--muted); }
svg { display: block; width: 100%; height: auto; margin-top: 8px; overflow: visible; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg.narrow { display: none; }
.meter, .stack { display: flex; overflow: hidden; background: var(--line); border-radius: 4px; }
.meter { height: 6px; margin-top: 8px; }
.stack { height: 22px; margin-top: 14px; gap: 1px; }
.meter span, .stack span { background: var(--c1); min-width: 1px; }
.stack .c2 { background: var(--c2); } .stack .c3 { background: var(--c3); } .stack .c4 { background: var(--c4); }
.stack .c5 { background: var(--c5); } .stack .c6 { background: var(--c6); } .stack .c7 { background: var(--c7); }
.stack span::before { content: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; }
caption { text-align: left; color: var(--muted); font-size: 13.5px; padding-bottom: 6px; }
th { font-weight: 500; color: var(--muted); font-size: 13px; vertical-align: bottom; white-space: nowrap; }
th, td { text-align: left; padding: 7px 18px 7px 0; border-bottom: 1px solid var(--line); }
td { vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
.columns td:first-child { white-space: nowrap; }
.columns td:last-child { min-width: 17em; }
.invalid { color: var(--c5); font-weight: 550; }
.num { text-align: right; white-space: nowrap; }
tbody tr:last-child td { border-bottom: 0; }
code { font: 0.92em ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
summary { cursor: pointer; color: var(--muted); }
@media (max-width: 760px) {
  main { padding: 32px 16px 48px; }
  .ladder { grid-auto-flow: row; grid-template-columns: 1fr 1fr; }
  .ladder > div:last-child:nth-child(odd) { grid-column: 1 / -1; }
  .ladder > div { padding: 14px 16px; border-left: 0; box-shadow: 0 0 0 0.5px var(--line); }
  .stats { grid-template-columns: 1fr 1fr; gap: 20px 18px; }
  .card:not(.ladder) { padding: 14px; }
  svg.wide { display: none; }
  svg.narrow { display: block; max-width: 480px; }
}
@media print { body { background: none; } .card, tr { break-inside: avoid; } }
"""
