"""Writes `docs/results.md` from the files in `results/`: no figure in it is typed.

python tools/make_results.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"


def lines(name: str) -> list[dict[str, Any]]:
    """The records of a result file, none if it is not there."""
    path = RESULTS / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    out = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    out += ["| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join(out)


def speed() -> str:
    """The last run of `benchmarks/denoise_speed.py`."""
    found = lines("denoise_speed.jsonl")
    if not found:
        return ""
    about, rows = found[-1]["environment"], found[-1]["table"]
    body = [
        (
            row["row"],
            f"{row['seconds']:.2f}",
            f"{row['speedup']:.3f}",
            f"{row['speedup_low']:.3f} to {row['speedup_high']:.3f}",
            f"{row['relative_error']:.2g}",
            f"{row['bytes'] / 2**20:.1f}" if "bytes" in row else "–",
            f"{row['deciding_share']:.2%}" if "deciding_share" in row else "–",
            f"{row['standing_in_share']:.2%}" if "standing_in_share" in row else "–",
        )
        for row in rows
    ]
    columns = ("row", "seconds", "speed-up", "over rounds", "relative error", "MiB held", "deciding", "standing in")
    by_name = {row["row"]: row["speedup"] for row in rows}
    share = by_name["taylorseer N=5"] / by_name["ideal for its steps"]
    facts = ", ".join(f"{key} {value}" for key, value in about.items() if key not in ("benchmark", "date"))
    return (
        "## Speed of the denoise engine\n\n12 Flux blocks of width 512, random weights, "
        f"{about['steps']} steps of one call; `benchmarks/denoise_speed.py`. Ratios are paired with the uncached run "
        "of the same round. *Deciding* is taps, schedule and book-keeping; *standing in* is predictor arithmetic.\n\n"
        f"{table(columns, body)}\n\nTaylorSeer at N = 5 reaches {share:.1%} of the speed-up that its computed branches "
        f"allow.\n\n*{about['date'][:10]}; {facts}*\n"
    )


def interval(value: Mapping[str, Any] | None) -> str:
    """A number with its interval."""
    if value is None:
        return "–"
    text = f"{value['mean']:.3g}"
    return text if value.get("low") is None else f"{text} [{value['low']:.3g}, {value['high']:.3g}]"


def claims() -> str:
    """The last run of `elision reproduce all`."""
    found = lines("reproduce.jsonl")
    if not found:
        return ""
    head, rows = found[0], [row for row in found[1:] if row.get("kind") == "finding"]
    seen: set[str] = set()
    body = []
    for row in rows:
        new = row["claim"] not in seen
        seen.add(row["claim"])
        statement = (
            f"**{row['claim']}** {row['statement']} *({row['metric']}; against {row['baseline']})*" if new else ""
        )
        ours = interval(row["ours"]) if row["ours"] is not None else row["why"]
        paper = row["paper"] if new else ""
        body.append((statement, paper, row["steps"] or "", row["setting"], ours, row["verdict"]))
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["verdict"]] = counts.get(row["verdict"], 0) + 1
    summary = ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items(), key=lambda item: -item[1]))
    setting = head["setting"]
    return (
        f"## What the papers say, measured here\n\n`elision reproduce all` on `{setting.get('model')}`, seeds "
        f"{setting.get('seeds')}: {summary}. The verdict is computed: a claim holds where the whole 95 % interval lies "
        "on the claimed side.\n\n"
        + table(("claim", "paper", "T", "setting", "ours", "verdict"), body)
        + f"\n\n*{head['environment'].get('date', '')[:10]}*\n"
    )


def serving() -> str:
    """The serving comparison and its speed."""
    rows = [row for row in lines("serving_compare.jsonl") if row.get("kind") == "row"]
    if not rows:
        return ""
    body = [
        (
            row["workload"],
            row["system"],
            f"{row['hit_rate']:.1%}",
            f"{row['right']:.1%}",
            f"{row['false_of_hits']:.1%}",
            f"{row['stale']:.1%}",
            f"{row['saved_s']:,.0f}",
        )
        for row in rows
    ]
    fast = [
        (
            row["part"],
            row.get("what", row.get("system", row.get("encoder", ""))),
            ", ".join(f"{k} {v}" for k, v in row.items() if k not in ("kind", "part", "what", "system", "encoder")),
        )
        for row in lines("serving_speed.jsonl")
        if row.get("kind") == "row"
    ]
    columns = ("workload", "system", "hits", "right hits", "false of hits", "stale", "model seconds saved")
    return (
        "## The semantic cache\n\n`benchmarks/serving_compare.py`; thresholds were fitted on another seed.\n\n"
        f"{table(columns, body)}\n\nSpeed, `benchmarks/serving_speed.py`:\n\n"
        f"{table(('part', 'what', 'figures'), fast)}\n"
    )


def main() -> None:
    """Write the page."""
    parts = [part for part in (speed(), claims(), serving()) if part]
    intro = "# Results\n\nMade by `tools/make_results.py` from the files in `results/`.\n\n"
    (ROOT / "docs" / "results.md").write_text(intro + "\n".join(parts))


if __name__ == "__main__":
    main()
