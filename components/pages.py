"""Reports as web pages: one file each that asks for nothing from elsewhere, in a common style, light or dark."""

from pathlib import Path
from typing import Any

STYLE = """
  :root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #e1e6ec; --page: #f6f8fa; --card: #fff;
    --good: #1a7f4b; --bad: #b3261e; --warn: #9a6700; --on: #fff; --hint: #fff8e6; }
  @media screen and (prefers-color-scheme: dark) {
    :root { --ink: #e4e9f0; --soft: #a0acba; --line: #2c3644; --page: #10151c; --card: #18202a;
      --good: #4cc38a; --bad: #ff8a80; --warn: #e0b341; --on: #10151c; --hint: #2a2415; }
    figure img { filter: invert(1) hue-rotate(180deg) brightness(1.2); }
  }
  * { box-sizing: border-box; }
  body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
  main { max-width: 1100px; margin: 0 auto; padding: 32px 24px 64px; }
  h1 { font-size: 26px; margin: 0 0 4px; }
  h2 { font-size: 18px; margin: 36px 0 10px; }
  p { margin: 4px 0; color: var(--soft); }
  h2 + p { margin: -6px 0 10px; }
  section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; overflow-x: auto; }
  section + p { margin: 16px 0 10px; }
  table { border-collapse: collapse; width: 100%; }
  th, td { text-align: left; vertical-align: top; padding: 8px 14px; border-top: 1px solid var(--line); }
  tr:first-child th { border-top: 0; color: var(--soft); font-weight: 600; font-size: 13px; white-space: nowrap; }
  .number, tr:first-child th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
  .tag { display: inline-block; padding: 1px 9px; border-radius: 10px; font-size: 13px; font-weight: 600;
    color: var(--on); white-space: nowrap; }
  .passed { background: var(--good); } .failed, .error { background: var(--bad); } .warn { background: var(--warn); }
  .good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
  .small { color: var(--soft); font-size: 13px; font-weight: 400; }
  .note { border-left: 4px solid var(--warn); background: var(--hint); border-radius: 4px; padding: 8px 14px;
    margin: 10px 0; color: var(--ink); }
  .empty { padding: 14px; }
  .plots { display: grid; grid-template-columns: repeat(2, 1fr); gap: 14px; }
  figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: 0; padding: 12px;
    break-inside: avoid; }
  figure.wide { grid-column: 1 / -1; }
  figure img { width: 100%; display: block; }
  figcaption { color: var(--soft); font-size: 13px; padding: 4px 4px 0; }
  @media (max-width: 760px) { .plots { grid-template-columns: 1fr; } }
  @media print { body { background: none; } main { max-width: none; padding: 0; } tr { break-inside: avoid; } }
"""
"""The rules that every page has; pictures are drawn for a light page and turned into dark ones."""


def render(template: Path, **values: Any) -> str:
    """The page that a Jinja template makes of the values, each of which it has to be given.

    The template has `style` and `number` besides. Texts come from data, models and settings that nobody has vetted:
    all of them are escaped.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"style": Markup(STYLE), "number": number}
    return environment.from_string(template.read_text(encoding="utf-8")).render(values)


def number(value: float | None) -> str:
    """A number as a reader wants it: three decimals, one for large ones, an exponent for tiny ones, – for none."""
    if value is None or value != value:
        return "–"
    if value and abs(value) < 0.0005:
        return f"{value:.1e}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3f}"
