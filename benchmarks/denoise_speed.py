"""Speed and memory of the denoise engine, paired in one process on a model in which computing dominates.

    python benchmarks/denoise_speed.py --rounds 5 --out results/denoise_speed.jsonl
    python benchmarks/denoise_speed.py --rounds 1 --steps 8 --only bac        # a quick look

The model is a `FluxTransformer2DModel` of 12 blocks and width 512 with random weights, 256 image and 64 text tokens,
in an Euler loop of one call per step. Every round runs every row once, in rotating order; figures are medians over
rounds of ratios within a round: to the uncached run, to the ideal of the same computed parts (`denoise_ideals.py`), and
to the same schedule in diffusers or cache-dit. Operations are counted in the warm-up round, by taps below everything.

Asked of the methods: at equal operations not slower than diffusers or cache-dit; 95 % of the ideal speed-up where whole
calls, heads or runs of blocks are left out, 90 % where branches or tokens are.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import elision
from denoise_ideals import Bench, EditBench, Run, build, ideal_calls, ideal_modules, ideal_tokens
from elision.bench.environment import processor
from elision.bench.peers import Peer, Stage, as_found
from elision.bench.peers._watch import Watch
from elision.bench.peers.cache_dit import DBCache
from elision.bench.peers.diffusers import FirstBlock
from elision.bench.peers.diffusers import TaylorSeer as TheirTaylorSeer
from elision.denoise.adapters import adapter_for
from elision.denoise.fit.bac import listed
from elision.denoise.methods.bac import BAC
from elision.denoise.methods.easycache import EasyCache
from elision.denoise.methods.ertacache import ERTACache
from elision.denoise.methods.first_block import FirstBlock as OurFirstBlock
from elision.denoise.methods.profilingdit import ProfilingDiT
from elision.denoise.methods.regione import RegionE
from elision.denoise.methods.taylorseer import TaylorSeer
from elision.denoise.methods.uniform import Uniform
from elision.denoise.methods.worldcache import WorldCache
from elision.denoise.policy import Host
from elision.denoise.sites import Site
from elision.errors import MissingDependency
from elision.method import Method
from elision.profile import Profile
from elision.session import storage_bytes

BASE = "uncached"


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        run: gives the sample, its seconds, and what else is known.
        level: what is left out: "call", "run", "branch", "token"; empty for rows that are no method.
        ideal: name of the row that it is held against, and
        peer: of the same schedule elsewhere.
        base: name of the uncached row.
    """

    run: Run
    level: str = ""
    ideal: str = ""
    peer: str = ""
    base: str = BASE


def ours(pipe: Bench, steps: int, method: Method, profile: Profile | None = None) -> Run:
    """One of our methods; the seconds of its own books come with it."""

    def run() -> dict[str, Any]:
        given: dict[str, Any] = {} if profile is None else {"profile": profile}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", elision.ElisionWarning)
            with elision.apply(pipe, method, **given) as applied:
                out = pipe.timed(steps)
        report: Any = applied.report()
        s = report.seconds
        return out | {
            "bytes": report.bytes_peak,
            "states": report.strip(),
            "own_flops": report.flops_computed,
            **{key: value for shown in report.last.extra.values() for key, value in shown.items() if key == "mask"},
            "deciding_share": s.deciding / s.total,
            "standing_in_share": s.standing_in / s.total,
        }

    return run


def theirs(pipe: Bench, steps: int, peer: Peer) -> Run:
    """A cache of diffusers or cache-dit, and the bytes that it keeps at the end."""

    def run() -> dict[str, Any]:
        stage = Stage([pipe.transformer], steps, 1, False, False, lambda: 0.0, lambda: 0, lambda: None, {})
        with as_found(pipe, [pipe.transformer]), peer.on(stage) as kept:
            return pipe.timed(steps) | {"bytes": storage_bytes(kept())}

    return run


def computed_by(pipe: Bench, steps: int, method: Method) -> list[int]:
    """Steps that a method computes on this model, by running it once."""
    states: str = ours(pipe, steps, method)()["states"]
    return [n for n, letter in enumerate(states) if letter == "C"]


def official_steps(steps: int, interval: int, first: int) -> list[int]:
    """Steps that TaylorSeer's own schedule computes."""
    return [*range(first), *range(first - 1 + interval, steps, interval)]


def diffusers_steps(steps: int, interval: int, before: int) -> list[int]:
    """Steps that diffusers' schedule computes."""
    return [n for n in range(steps) if n < before or (n - before - 1) % interval == 0]


@dataclass
class Layout:
    """The parts of the model, for ideals: branches with their feeders, and blocks in order."""

    pipe: Bench

    def __post_init__(self) -> None:
        model = self.pipe.transformer
        self.branches: list[Site] = Host(model, adapter_for(model)).site("branch", "the benchmark")
        self.feeders = [path for site in self.branches for path in site.feeders]
        self.blocks = [
            f"{name}.{i}"
            for name in ("transformer_blocks", "single_transformer_blocks")
            for i in range(len(model.get_submodule(name)))
        ]

    def ideal_branches(self, steps: int, full: Callable[[Site], set[int]]) -> Run:
        """Every branch at its own steps."""
        plan = {path: full(site) for site in self.branches for path in (site.tail, *site.feeders)}
        return ideal_modules(self.pipe, steps, plan, self.feeders)

    def ideal_blocks(self, steps: int, full: Sequence[int], chosen: Sequence[int]) -> Run:
        """These blocks at these steps only."""
        return ideal_modules(self.pipe, steps, {self.blocks[i]: set(full) for i in chosen})


def taylor_rows(pipe: Bench, steps: int, layout: Layout) -> dict[str, Row]:
    """Overheads of taps, and TaylorSeer in its schedule and in diffusers'."""
    taylor: dict[str, Any] = {"interval": 5, "first_enhance": 3, "max_order": 1}
    same = TaylorSeer(schedule="diffusers", factors_dtype="float32", **taylor)
    full = set(official_steps(steps, 5, 3))
    return {
        "model tap, nothing elided (easycache, threshold 0)": Row(ours(pipe, steps, EasyCache(threshold=0.0))),
        "20 branch sites, nothing elided (uniform, interval 1)": Row(ours(pipe, steps, Uniform(interval=1))),
        "taylorseer, nothing elided (interval 1)": Row(ours(pipe, steps, TaylorSeer(interval=1))),
        "taylorseer N=5": Row(ours(pipe, steps, TaylorSeer(**taylor)), "branch", "ideal for its steps"),
        "ideal for its steps": Row(layout.ideal_branches(steps, lambda site: full)),
        "taylorseer N=5, diffusers' schedule": Row(
            ours(pipe, steps, same), "branch", peer="diffusers' TaylorSeer N=5, same sites"
        ),
        "diffusers' TaylorSeer N=5, same sites": Row(
            theirs(pipe, steps, TheirTaylorSeer(interval=5, sites="branches"))
        ),
        "taylorseer N=5, site stack": Row(
            ours(pipe, steps, TaylorSeer(site="stack", **taylor)),
            "run",
            peer="cache-dit DBCache + TaylorSeer, same steps",
        ),
        "cache-dit DBCache + TaylorSeer, same steps": Row(
            theirs(pipe, steps, DBCache(steps=tuple(sorted(full)), calibrator="taylorseer"))
        ),
    }


def bac_rows(pipe: Bench, steps: int, layout: Layout) -> dict[str, Row]:
    """BAC with diffusers' steps at all branches, and with those that it finds itself."""
    full = set(diffusers_steps(steps, 5, 3))
    keys = {site.key: sorted(full) for site in layout.branches}
    fitted = BAC(num_caches=max(2, steps // 4), union_blocks=3)
    profile = elision.fit(pipe, fitted, calls=[lambda p: p(steps)])
    found = fitted.steps_of(Host(pipe.transformer, adapter_for(pipe.transformer)), layout.branches, profile)
    return {
        "bac, diffusers' steps at all branches": Row(
            ours(pipe, steps, BAC(), listed(pipe.transformer, keys, steps, pipe.scheduler)),
            "branch",
            "ideal for bac, diffusers' steps",
            "diffusers' TaylorSeer order 0, same sites",
        ),
        "ideal for bac, diffusers' steps": Row(layout.ideal_branches(steps, lambda site: full)),
        "diffusers' TaylorSeer order 0, same sites": Row(
            theirs(pipe, steps, TheirTaylorSeer(interval=5, sites="branches", order=0))
        ),
        f"bac, M = {fitted.num_caches}": Row(ours(pipe, steps, fitted, profile), "branch", "ideal for bac's own steps"),
        "ideal for bac's own steps": Row(layout.ideal_branches(steps, lambda site: found[site.key])),
    }


def run_rows(pipe: Bench, steps: int, layout: Layout) -> dict[str, Row]:
    """ProfilingDiT on runs of blocks, beside DBCache that computes the same blocks at the same steps."""
    full = diffusers_steps(steps, 5, 3)
    warmup = next(n for n in range(steps) if n not in full) - 1  # the first refresh is the last of the first steps
    refresh = tuple(n for n in full if n >= warmup)
    rows: dict[str, Row] = {}
    for first, last in ((1, 0), (3, 2)):
        chosen = tuple(range(first, len(layout.blocks) - last))
        name = f"blocks {chosen[0]} to {chosen[-1]}"
        method = ProfilingDiT(blocks=chosen, warmup_steps=warmup, refresh=refresh)
        rows |= {
            f"profilingdit, {name}": Row(
                ours(pipe, steps, method), "run", f"ideal for {name}", f"cache-dit DBCache F{first}B{last}, same steps"
            ),
            f"ideal for {name}": Row(layout.ideal_blocks(steps, full, chosen)),
            f"cache-dit DBCache F{first}B{last}, same steps": Row(
                theirs(pipe, steps, DBCache(first=first, last=last, steps=tuple(full)))
            ),
        }
    method, every = OurFirstBlock(threshold=0.1), range(1, len(layout.blocks))
    return rows | {
        "first_block": Row(ours(pipe, steps, method), "run", "ideal for first_block", "diffusers' first-block cache"),
        "ideal for first_block": Row(layout.ideal_blocks(steps, computed_by(pipe, steps, method), every)),
        "diffusers' first-block cache": Row(theirs(pipe, steps, FirstBlock(threshold=0.1))),
    }


def call_rows(pipe: Bench, steps: int, layout: Layout) -> dict[str, Row]:
    """Methods that leave whole calls out, or all blocks between embedding and head."""
    full = diffusers_steps(steps, 5, 3)
    erta = ERTACache(reused=tuple(sorted(set(range(steps)) - set(full))), phi=0.9, rectify="off")
    easy, world = EasyCache(threshold=1.0), WorldCache(n_max=4, threshold=1e9)
    whole = WorldCache(n_max=4, threshold=1e9, site="model")
    return {
        "ertacache, diffusers' steps": Row(
            ours(pipe, steps, erta), "call", "ideal for ertacache", "cache-dit DBCache F1B0, same steps"
        ),
        "ideal for ertacache": Row(ideal_calls(pipe, steps, full)),
        "worldcache, head": Row(ours(pipe, steps, world), "call", "ideal for worldcache, head"),
        "ideal for worldcache, head": Row(
            layout.ideal_blocks(steps, computed_by(pipe, steps, world), range(len(layout.blocks)))
        ),
        "worldcache, model": Row(ours(pipe, steps, whole), "call", "ideal for worldcache, model"),
        "ideal for worldcache, model": Row(ideal_calls(pipe, steps, computed_by(pipe, steps, whole))),
        "easycache": Row(ours(pipe, steps, easy), "call", "ideal for easycache"),
        "ideal for easycache": Row(ideal_calls(pipe, steps, computed_by(pipe, steps, easy))),
    }


def token_rows(pipe: Bench, steps: int, layout: Layout) -> dict[str, Row]:
    """RegionE on the layout of FLUX.1 Kontext: every region step computed, and with velocities that decay."""
    del layout
    warmup, base = min(6, steps // 4), "uncached, editing"
    edit = EditBench(pipe.transformer, steps, warmup)
    _counted(edit, lambda: edit.timed(2))
    common: dict[str, Any] = {"eta": 0.0, "warmup_steps": warmup, "forced": (steps // 2 + 2,)}
    rows: dict[str, Row] = {base: Row(lambda: edit.timed(steps), base=base)}
    for name, method in {
        "regione, no decay": RegionE(delta=0, **common),
        "regione": RegionE(gammas=(1.0,) * (steps - 1), delta=0.25, **common),
    }.items():
        found = ours(edit, steps, method)()
        live = torch.tensor(found["mask"]).flatten().nonzero().flatten()
        rows |= {
            name: Row(ours(edit, steps, method), "token", f"ideal for {name}", base=base),
            f"ideal for {name}": Row(ideal_tokens(edit, steps, found["states"], live), base=base),
        }
    return rows


def measure(pipe: Bench, rows: dict[str, Row], rounds: int) -> list[dict[str, Any]]:
    """All rows, interleaved; medians of the paired ratios."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    facts: dict[str, dict[str, Any]] = {}
    missing: list[str] = []
    for turn in range(rounds + 1):
        names = [name for name in rows if name not in missing]
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            gc.collect()
            try:
                if turn:
                    seconds[name].append(rows[name].run()["seconds"])
                else:  # the first round warms up
                    facts[name] = _counted(pipe, rows[name].run)
            except MissingDependency as error:
                print(json.dumps({"row": name, "left out": str(error)}))
                missing.append(name)
    return [_entry(name, rows[name], seconds, facts) for name in rows if name not in missing]


def _counted(pipe: Bench, run: Run) -> dict[str, Any]:
    """A run, with the operations that it computed."""
    watch = Watch(pipe)
    watch.start()
    try:
        found = run()
    finally:
        watch.stop()
    return found | {"flops": sum(watch.cost(call)[0] for call in watch.calls)}


def _entry(name: str, row: Row, seconds: dict[str, list[float]], facts: dict[str, Any]) -> dict[str, Any]:
    whole, mine = facts[row.base], dict(facts[name])
    out, _, mask = mine.pop("out"), mine.pop("seconds"), mine.pop("mask", None)
    if mask is not None:
        mine["tokens_edited"] = int(torch.tensor(mask).sum())
    flops, own = mine.pop("flops"), mine.pop("own_flops", None)
    if row.base != BASE and name != row.base:  # the taps count rows, and cannot tell how many tokens there are
        flops = own
    ratios = [b / s for b, s in zip(seconds[row.base], seconds[name], strict=True)]
    entry = {
        "row": name,
        "level": row.level,
        "seconds": statistics.median(seconds[name]),
        "speedup": statistics.median(ratios),
        "speedup_low": min(ratios),
        "speedup_high": max(ratios),
        "relative_error": float((out - whole["out"]).norm() / whole["out"].norm()),
        "flops_share": None if flops is None else flops / whole["flops"],
        **mine,
    }
    for key, other in (("ideal", row.ideal), ("peer", row.peer)):
        if seconds.get(other):
            entry[key] = other
            entry[f"of_{key}"] = statistics.median(b / s for b, s in zip(seconds[other], seconds[name], strict=True))
    return entry


def environment() -> dict[str, Any]:
    """Where the figures come from."""
    packages = ("torch", "diffusers", "cache-dit")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "elision": elision.__version__,
    } | {p: version(p) for p in packages if _installed(p)}


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except ImportError:
        return False


def table(pipe: Bench, steps: int, only: str) -> dict[str, Row]:
    """Every row whose name contains `only`, with what it is held against, and the uncached one."""
    layout = Layout(pipe)
    rows = {BASE: Row(lambda: pipe.timed(steps))}
    for make in (taylor_rows, bac_rows, run_rows, call_rows, token_rows):
        rows |= make(pipe, steps, layout)
    wanted = {name for name in rows if only in name or name == BASE}
    wanted |= {other for name in wanted for other in (rows[name].ideal, rows[name].peer, rows[name].base)}
    return {name: row for name, row in rows.items() if name in wanted}


def main() -> None:
    """Run, print, and append to a JSONL file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--heads", type=int, default=8, help="attention heads of 64; fewer for a quick look")
    parser.add_argument("--only", default="", help="rows whose name contains this, and those they are held against")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    pipe = Bench(build(heads=given.heads))
    _counted(pipe, lambda: pipe.timed(2))  # shows which modules compute
    found = measure(pipe, table(pipe, given.steps, given.only), given.rounds)
    for row in found:
        print(json.dumps(row))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        with given.out.open("a") as file:
            about = {"benchmark": "denoise_speed", "steps": given.steps, "rounds": given.rounds, **environment()}
            file.write(json.dumps({"environment": about, "table": found}) + "\n")


if __name__ == "__main__":
    main()
