"""The page: one HTML file with everything in it, which opens without a network.

[Note: nothing from outside] The page's own Content-Security-Policy forbids every request, so that not even plotly.js
could load anything; and every text that comes from a run is escaped, here or in `charts.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from dstrain.launcher.report import tables
from dstrain.launcher.report.charts import Chart, charts_of, color
from dstrain.launcher.report.costs_table import costs
from dstrain.launcher.report.read import Run, read_run
from dstrain.launcher.report.time_table import times
from dstrain.runtime.spec.errors import UsageError

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_HERE = Path(__file__).parent


def write_report(folders: Sequence[Path], output: Path) -> None:
    """Draw the runs in `folders` into the file `output`. Raises UsageError when it cannot be written."""
    html = page([read_run(folder) for folder in folders])
    try:
        output.write_text(html, encoding="utf-8")
    except OSError as error:
        found = f"{output}: {error.strerror}"
        raise UsageError.mismatch("--output", "a file that can be written", found, "name another with -o") from None


def page(runs: Sequence[Run]) -> str:
    """The runs as one HTML document."""
    charts = charts_of(runs)
    title = runs[0].id if len(runs) == 1 else f"{len(runs)} runs"
    body = "\n".join(
        [
            *_header(runs),
            *_causes(runs),
            *_summary(runs),
            *_times(runs),
            *_costs(runs),
            *_silence(runs),
            *_figures(charts),
            *_keys(runs),
        ]
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)} · dstrain</title>
<link rel="icon" href="data:,">
<style>
{(_HERE / "page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
{body}
</main>
<script type="application/json" id="charts">{_in_script([[chart.data, chart.layout] for chart in charts])}</script>
<script>{get_plotlyjs() if charts else ""}</script>
<script>
{(_HERE / "page.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def _in_script(value: Any) -> str:
    """JSON that no text in it can end early."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _header(runs: Sequence[Run]) -> Iterator[str]:
    yield "<header>"
    if len(runs) == 1:
        yield f"<h1>{escape(runs[0].id)}</h1>"
        yield f"<p>{_outcome(runs[0])}</p>"
    else:
        yield f"<h1>{len(runs)} runs</h1>"
        items = (f"<li>{_name(run, index)} {_outcome(run)}</li>" for index, run in enumerate(runs))
        yield f'<ul class="runs">{"".join(items)}</ul>'
    yield "</header>"


def _name(run: Run, index: int) -> str:
    return f'<span class="swatch" style="background:{color(index)}"></span>{escape(run.id)}'


def _outcome(run: Run) -> str:
    state = "open" if not run.report else "good" if run.report.get("exit_code") == 0 else "bad"
    return f'<span class="badge {state}">{escape(tables.outcome(run))}</span>'


def _causes(runs: Sequence[Run]) -> Iterator[str]:
    """The root cause of each run that failed, as `dstrain run` told it."""
    for run in runs:
        cause = run.report.get("cause")
        if not isinstance(cause, dict):
            continue
        whose = "" if len(runs) == 1 else f": {escape(run.id)}"
        yield f'<section class="cause"><h2>Root cause{whose}</h2>'
        yield f"<p>{escape(str(cause.get('headline', '')))}</p>"
        if detail := cause.get("detail"):
            yield f"<pre>{escape(str(detail))}</pre>"
        if remedy := cause.get("remedy"):
            yield f"<p>{escape(str(remedy))}</p>"
        yield "</section>"


def _summary(runs: Sequence[Run]) -> Iterator[str]:
    yield f"<section><h2>Summary</h2>{_table(tables.summary(runs), runs)}</section>"


def _times(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        if (table := times(run.ledger)) is not None:
            whose = "" if len(runs) == 1 else f": {escape(run.id)}"
            yield f"<section><h2>Where the time went{whose}</h2>{table}</section>"


def _costs(runs: Sequence[Run]) -> Iterator[str]:
    """Of runs with a trace."""
    for run in runs:
        if (table := costs(run.trace)) is not None:
            whose = "" if len(runs) == 1 else f": {escape(run.id)}"
            yield f"<section><h2>What actions cost{whose}</h2>{table}</section>"


def _silence(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        if not run.steps:
            yield (
                f"<section><p>{escape(run.id)} reported no steps. Curves come from step events, which the trainer of "
                "dstrain writes; a script of your own can write them too, one JSON object a line, to the file "
                "descriptor in DSTRAIN_EVENT_FD.</p></section>"
            )


def _figures(charts: Sequence[Chart]) -> Iterator[str]:
    if charts:
        yield '<p class="hint">In a chart: drag to zoom, double-click to see all, click a name to hide its line.</p>'
    for chart in charts:
        note = f" <small>{escape(chart.note)}</small>" if chart.note else ""
        yield f'<section><h2>{escape(chart.title)}{note}</h2><div class="chart"></div></section>'


def _keys(runs: Sequence[Run]) -> Iterator[str]:
    """What differs between the runs, then every key."""
    rows = tables.configuration(runs)
    if not rows:
        return
    if len(runs) > 1:
        different = [row for row in rows if row.differs]
        shown = _table(different, runs) if different else "<p>Nothing.</p>"
        yield f"<section><h2>What differs in the configuration</h2>{shown}</section>"
    summary = f"<summary><h2>Configuration</h2> <small>{len(rows)} keys</small></summary>"
    yield f"<section><details{' open' if len(runs) == 1 else ''}>{summary}{_table(rows, runs)}</details></section>"


def _table(rows: Sequence[tables.Row], runs: Sequence[Run]) -> str:
    heads = "".join(f'<th scope="col">{_name(run, index)}</th>' for index, run in enumerate(runs))
    head = f"<thead><tr><td></td>{heads}</tr></thead>" if len(runs) > 1 else ""
    lines = (
        f'<tr><th scope="row">{escape(row.name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row.cells)}</tr>'
        for row in rows
    )
    return f'<div class="wide"><table>{head}<tbody>{"".join(lines)}</tbody></table></div>'
