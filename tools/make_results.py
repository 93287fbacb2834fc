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
    held = any("of_ideal" in row for row in rows)
    body = [
        (
            row["row"],
            f"{row['seconds']:.2f}",
            f"{row['speedup']:.3f}",
            f"{row['speedup_low']:.3f} to {row['speedup_high']:.3f}",
            *_held_against(row, held),
            f"{row['relative_error']:.2g}",
            f"{row['bytes'] / 2**20:.1f}" if "bytes" in row else "–",
            f"{row['deciding_share']:.2%}" if "deciding_share" in row else "–",
            f"{row['standing_in_share']:.2%}" if "standing_in_share" in row else "–",
        )
        for row in rows
    ]
    more = ("FLOPs", "of the ideal", "against a peer") if held else ()
    columns = (
        "row",
        "seconds",
        "speed-up",
        "over rounds",
        *more,
        "relative error",
        "MiB held",
        "deciding",
        "standing in",
    )
    facts = ", ".join(f"{key} {value}" for key, value in about.items() if key not in ("benchmark", "date"))
    return (
        "## Speed of the denoise engine\n\n12 Flux blocks of width 512, random weights, "
        f"{about['steps']} steps of one call; `benchmarks/denoise_speed.py`. Ratios are paired with the uncached run "
        "of the same round. *Deciding* is taps, schedule and book-keeping; *standing in* is predictor arithmetic.\n\n"
        f"{table(columns, body)}\n\n{_asked(rows)}\n\n*{about['date'][:10]}; {facts}*\n"
    )


def _held_against(row: Mapping[str, Any], held: bool) -> tuple[str, ...]:
    """Operations, the share of the ideal speed-up, and the speed against the same schedule elsewhere."""
    if not held:
        return ()
    ideal = f"{row['of_ideal']:.1%}" if "of_ideal" in row else "–"
    peer = f"{row['of_peer']:.2f}× {row['peer']}" if "of_peer" in row else "–"
    return "–" if row["flops_share"] is None else f"{row['flops_share']:.1%}", ideal, peer


ASKED = {"call": 0.95, "run": 0.95, "branch": 0.90, "token": 0.90}  # share of the ideal speed-up


def _asked(rows: Sequence[Mapping[str, Any]]) -> str:
    """What is asked of the methods, and which do not reach it."""
    by_name = {row["row"]: row["speedup"] for row in rows}
    if not any("of_ideal" in row for row in rows):
        share = by_name["taylorseer N=5"] / by_name["ideal for its steps"]
        return f"TaylorSeer at N = 5 reaches {share:.1%} of the speed-up that its computed branches allow."
    against = [row for row in rows if "of_ideal" in row]
    below = [row for row in against if row["of_ideal"] < ASKED[row["level"]]]
    peers = [row for row in rows if "of_peer" in row]
    slower = [row for row in peers if row["of_peer"] < 1]
    return (
        "Asked of the methods: 95 % of the speed-up that their computed parts allow where whole calls, heads or runs "
        "of blocks are left out, 90 % where branches or tokens are: "
        f"{len(against) - len(below)} of {len(against)} reach it{_named(below)}. "
        f"At the same schedule not slower than diffusers or cache-dit: {len(peers) - len(slower)} of "
        f"{len(peers)}{_named(slower)}."
    )


def _named(rows: Sequence[Mapping[str, Any]]) -> str:
    return f" (not {', '.join(row['row'] for row in rows)})" if rows else ""


def interval(value: Mapping[str, Any] | None) -> str:
    """A number with its interval."""
    if value is None:
        return "–"
    text = f"{value['mean']:.3g}"
    return text if value.get("low") is None else f"{text} [{value['low']:.3g}, {value['high']:.3g}]"


def dllm_quality() -> str:
    """The last `elision compare dllm` that was kept as `results/dllm_compare.jsonl`."""
    found = lines("dllm_compare.jsonl")
    rows = [row["row"] for row in found if row.get("kind") == "row"]
    if not rows:
        return ""
    body = [
        (
            row["length"],
            f"`{row['label']}`",
            interval(row["exact"]),
            f"{row['speed']:.1f}",
            interval(row["speedup"]),
            f"{row['calls']:.3g}",
            f"{row['layers_ratio']:.2f}",
            f"{row['bytes_peak'] / 2**20:.1f}" if row["bytes_peak"] else "–",
            interval(row["lead"]),
        )
        for row in rows
    ]
    columns = (
        "length",
        "arm",
        "exact match",
        "tokens/s",
        "speed-up",
        "calls",
        "fewer rows",
        "MiB peak",
        "Δ fewer steps",
    )
    setting = found[0]["setting"]
    return (
        f"## Caches of masked-diffusion models\n\n`elision compare dllm` on {setting['model']}, tasks "
        f"{', '.join(setting['tasks'])}, one question at a time. *Fewer rows* is the factor of token-layers, *Δ* exact "
        "match minus that of plain decoding with as few calls as cost at least as much.\n\n"
        f"{table(columns, body)}\n\n*{found[0]['environment'].get('date', '')[:10]}*\n"
    )


def dllm_speed() -> str:
    """The last run of `benchmarks/dllm_speed.py` for every model and batch."""
    last = {(run["environment"]["model"], run["environment"]["batch"]): run for run in lines("dllm_speed.jsonl")}
    body = []
    for (model, batch), run in last.items():
        for row in run["table"]:
            mean, low, high = row["speedup"]
            met = [row[key] for key in ("faster_than_no_cache", "at_least_three_times_within_one_point") if key in row]
            body.append(
                (
                    f"{model}, batch {batch}",
                    f"`{row['row']}`",
                    f"{row['tokens_per_second']:.1f}",
                    f"{mean:.2f}" if low is None else f"{mean:.2f} [{low:.2f}, {high:.2f}]",
                    f"{row['token_layers_fewer']:.2f}",
                    f"{row['exact_match']:.0%}" if "exact_match" in row else "–",
                    ", ".join("yes" if one else "no" for one in met) or "–",
                )
            )
    if not body:
        return ""
    about = next(iter(last.values()))["environment"]
    columns = ("model", "row", "tokens/s", "over no cache", "fewer rows", "exact match", "criteria met")
    return (
        f"## Speed of caches of masked-diffusion models\n\nPrompt and answer of {about['length']} tokens; "
        "`benchmarks/dllm_speed.py`. Asked of every method: faster than no cache; of Elastic-Cache also: at least "
        f"three times as fast at an exact match within one point.\n\n{table(columns, body)}\n\n*{about['date'][:10]}; "
        f"{about['cpu']}, {about['threads']} threads*\n"
    )


def claims() -> str:
    """Every run of `elision reproduce` that is kept in `results/reproduce.jsonl`."""
    runs: list[tuple[Any, list[Any]]] = []
    for line in lines("reproduce.jsonl"):
        if line["kind"] == "head":
            runs.append((line, []))
        elif line["kind"] == "finding":
            runs[-1][1].append(line)
    if not runs:
        return ""
    intro = (
        "## What the papers say, measured here\n\nThe verdict is computed: a claim holds where the whole 95 % interval "
        "lies on the claimed side.\n\n"
    )
    return intro + "\n\n".join(_run(head, rows) for head, rows in runs) + "\n"


def _run(head: Any, rows: list[Any]) -> str:
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
    prompts = f", {setting['prompts']} prompts per task" if setting.get("prompts") else ""
    prompts += f", {setting['episodes']} episodes per task" if setting.get("episodes") else ""
    seeds = f", seeds {setting['seeds']}" if setting.get("seeds") else ""
    names = ", ".join(setting.get("names", []))
    return (
        f"### {names} on `{setting.get('model')}`{seeds}{prompts}\n\n{summary}.\n\n"
        + table(("claim", "paper", "T", "setting", "ours", "verdict"), body)
        + f"\n\n*{head['environment'].get('date', '')[:10]}*"
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


def kv_speed() -> str:
    """The last run of `benchmarks/kv_speed.py`."""
    found = lines("kv_speed.jsonl")
    if not found:
        return ""
    about, rows = found[-1]["environment"], found[-1]["table"]

    def ratio(ends: Sequence[float]) -> str:
        return f"{ends[0]:.2f}" if ends[1] is None else f"{ends[0]:.3f} [{ends[1]:.3f}, {ends[2]:.3f}]"

    body = [
        (
            f"`{row['row']}`",
            f"{row['prefill_seconds']:.2f}",
            ratio(row["prefill_ratio"]),
            f"{row['decode_ms']:.1f}",
            ratio(row["decode_ratio"]),
            f"{row['bytes_held'] / 2**20:.1f}" if row["bytes_held"] else "–",
            f"{row['bytes_peak'] / 2**20:.1f}" if row["bytes_peak"] else "–",
        )
        for row in rows
    ]
    columns = ("cache", "prompt, s", "over the full cache", "token, ms", "over the full cache", "MiB held", "MiB peak")
    facts = ", ".join(f"{key} {value}" for key, value in about.items() if key not in ("benchmark", "date"))
    return (
        f"## Speed of K/V caches\n\n{about['model']}, a prompt of {about['length']} tokens, {about['steps']} tokens "
        "decoded in every round; `benchmarks/kv_speed.py`. Ratios are paired with `DynamicCache` in the same round; "
        f"below 1 is faster.\n\n{table(columns, body)}\n\n*{about['date'][:10]}; {facts}*\n"
    )


def kv_quality() -> str:
    """The last `elision compare kv` that was kept as `results/kv_compare.jsonl`."""
    found = lines("kv_compare.jsonl")
    if not found:
        return ""
    head, rows = found[0], [record["row"] for record in found[1:] if record["kind"] == "row"]
    setting = head["setting"]
    body = [
        (
            f"`{row['label']}`",
            f"{row['share']['mean']:.1%}",
            *(interval(row["scores"].get(task)) for task in setting["tasks"]),
            interval(row["nll"]),
            interval(row["kl"]),
        )
        for row in rows
        if row["share"] is not None
    ]
    columns = ("cache", "bytes", *setting["tasks"], "Δ nats", "KL")
    missing = [f"`{row['label']}`: {row['why']}" for row in rows if row["share"] is None]
    return (
        f"## Quality of K/V caches\n\n{setting['model']}, {len(setting['seeds'])} prompts of {setting['length']} "
        "tokens per task; `elision compare kv`. Tasks: share of right answers, continuation: perplexity of what the "
        "full cache says; Δ nats: answer tokens' negative log-likelihood minus the full cache's; intervals over "
        "prompts.\n\n"
        f"{table(columns, body)}\n\n{'; '.join(missing)}\n\n*{head['environment'].get('date', '')[:10]}*\n"
    )


def policies() -> str:
    """The last `elision compare denoise` on a policy that was kept as `results/policy_compare.jsonl`."""
    found = lines("policy_compare.jsonl")
    if not found:
        return ""
    head, rows = found[0], [record["row"] for record in found[1:] if record["kind"] == "row"]
    setting = head["setting"]
    body = [
        (
            f"`{row['label']}`",
            interval(row["success"]),
            *(f"{row['tasks'][task]['mean']:.0%}" for task in setting["tasks"]),
            interval(row["error"]),
            f"{row['hz']:.2f}" if row["hz"] else "–",
            f"{row['control_hz']:.1f}" if row["control_hz"] else "–",
            interval(row["speedup"]),
            f"{row['share']:.1%}" if row["share"] is not None else "–",
            f"{row['bytes_peak'] / 2**10:.0f}" if row["bytes_peak"] else "–",
            interval(row["lead"]),
        )
        for row in rows
    ]
    tasks = [task.removesuffix("-v3") for task in setting["tasks"]]
    columns = ("arm", "success", *tasks, "action error", "chunk Hz", "control Hz", "speed-up", "FLOPs", "KiB peak")
    return (
        f"## A policy\n\n`elision compare denoise --model {setting['model']}`, {len(setting['seeds'])} episodes per "
        "task, the same for every arm. *Action error* is the root mean square difference to the uncached policy's "
        "actions for the same observation and noise (for other noise: "
        f"{sum(setting['spread']) / len(setting['spread']):.3f}); Hz are of one robot without the simulator; *Δ* is "
        "success minus that of DDIM with as few steps as cost at least as much.\n\n"
        f"{table((*columns, 'Δ fewer steps'), body)}\n\n*{head['environment'].get('date', '')[:10]}; "
        f"{head['environment'].get('cpu')}, {head['environment'].get('threads')} threads*\n"
    )


def main() -> None:
    """Write the page."""
    parts = [
        part
        for part in (speed(), claims(), policies(), kv_quality(), kv_speed(), dllm_quality(), dllm_speed(), serving())
        if part
    ]
    intro = "# Results\n\nMade by `tools/make_results.py` from the files in `results/`.\n\n"
    (ROOT / "docs" / "results.md").write_text(intro + "\n".join(parts))


if __name__ == "__main__":
    main()
