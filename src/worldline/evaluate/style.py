"""How a report looks. A Python string, so that the page needs no file but itself."""

CSS = """
/* One meaning a colour, as on the play page: truth, imagination (dream), action, warning (Okabe-Ito). */
:root {
  color-scheme: light dark;
  --truth: #007d5b; --dream: #0072b2; --action: #b87a00; --warn: #c94f00;
  --back: #f2f4f7; --panel: #ffffff; --line: #d9dee5; --text: #171c22; --soft: #566270;
}
@media (prefers-color-scheme: dark) {
  :root {
    --truth: #009e73; --dream: #56b4e9; --action: #e69f00; --warn: #e0672b;
    --back: #0d1014; --panel: #151a20; --line: #262d36; --text: #e8ebf0; --soft: #9ba6b4;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--back); color: var(--text); line-height: 1.5; font-variant-numeric: tabular-nums;
  font-family: "Inter", "Segoe UI", system-ui, -apple-system, "Helvetica Neue", "Noto Sans", "DejaVu Sans", sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 36px 24px 64px; }
.kicker { color: var(--soft); margin: 0 0 10px; font-size: 14px; }
h1 { font-size: 27px; line-height: 1.32; font-weight: 600; margin: 0 0 26px; text-wrap: balance; }
h2 { font-size: 18px; margin: 0 0 4px; }
.lead { color: var(--soft); margin: 0 0 14px; max-width: 82ch; font-size: 14.5px; }
.chip {
  font-size: 14px; vertical-align: 4px; padding: 3px 11px;
  border-radius: 99px; border: 1.5px solid; margin-right: 4px;
}
.chip.valid, .pass { color: var(--truth); }
.chip.invalid, .fail { color: var(--warn); }
.pass, .fail { font-weight: 600; margin-right: 6px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px; margin-bottom: 18px; }
.card, section { background: var(--panel); border: 1px solid var(--line); border-radius: 12px; }
.card { padding: 14px 16px; display: flex; flex-direction: column; }
.card b { color: var(--soft); font-weight: 500; font-size: 14px; }
.card strong { font-size: 28px; font-weight: 600; line-height: 1.35; white-space: nowrap; }
.card span, small { color: var(--soft); font-size: 13.5px; font-weight: 400; }
section { padding: 20px 22px; margin-bottom: 18px; }
svg { width: 100%; height: auto; display: block; }
svg text { font-family: inherit !important; }
.strip { display: grid; gap: 8px; align-items: center; }
.strip img { width: 100%; display: block; border-radius: 4px; }
.strip span { font-size: 14px; }
b.truth, b.dream { font-weight: 600; font-size: 14px; border-left: 5px solid; padding-left: 8px; margin-right: 14px; }
b.truth { color: var(--truth); }
b.dream { color: var(--dream); }
.gif { display: block; margin: 22px auto 6px; max-width: 100%; border-radius: 6px; }
.under { text-align: center; margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
.text { text-align: left; white-space: normal; }
pre {
  background: var(--back); border: 1px solid var(--line); border-radius: 8px;
  padding: 12px 14px; overflow-x: auto; margin: 0 0 10px;
}
"""
