"""`elision reproduce`: run the claims of methods and put paper, ours and verdict side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elision.bench import claims, results
from elision.bench.claims import Claim, Finding
from elision.errors import MissingDependency, OptionError, UnknownName

if TYPE_CHECKING:
    from rich.table import Table

    from elision.bench.subject import Subject

USUAL = "garments-flux"  # of denoise experiments that name no model
POLICIES = ("metaworld-policy",)  # experiments on these need episodes instead of images
_STYLES = {"holds": "green", "does not hold": "red", "not testable here": "yellow"}


def _silent(done: int, total: int, what: str) -> None:
    del done, total, what


@dataclass
class Reproduction:
    """What `run_claims` returns.

    Attributes:
        names: of the methods.
        model: what was tested on; the models that claims are written for, joined by commas.
        steps, seeds, images: of the denoise methods; samples per run, the most of any model.
        prompts, length: of the methods on K/V caches: prompts per task, and their tokens.
        questions, total: of the methods for masked-diffusion models: questions per task, tokens of prompt and answer.
        episodes: of the claims on policies: of each task; `images` then counts tasks.
        findings: in the order of the claims.
    """

    names: list[str]
    model: str = ""
    steps: list[int] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    images: int = 0
    prompts: int = 0
    length: int = 0
    questions: int = 0
    total: int = 0
    episodes: int = 0
    findings: list[Finding] = field(default_factory=list)

    def setting(self) -> dict[str, Any]:
        """What was asked for."""
        names = ("names", "model", "steps", "seeds", "images", "prompts", "length", "questions", "total")
        return {name: getattr(self, name) for name in (*names, *(("episodes",) if self.episodes else ()))}

    def to_dict(self) -> dict[str, Any]:
        """Setting and findings, for JSON."""
        return results.plain({**self.setting(), "findings": self.findings})  # type: ignore[no-any-return]

    def save(self, path: str | Path) -> Path:
        """Write a result file."""
        records = [{"kind": "finding", **results.plain(finding)} for finding in self.findings]
        return results.write(path, "reproduce", self.setting(), records)

    def verdicts(self) -> Counter[str]:
        """How many findings have each verdict."""
        return Counter(finding.verdict for finding in self.findings)

    def _size(self) -> str:
        parts = [f"{self.images} images per run, {len(self.seeds)} seeds"] if self.images else []
        parts += [f"{self.prompts} prompts of {self.length} tokens per task"] if self.prompts else []
        parts += [f"{self.questions} questions of {self.total} tokens per task"] if self.questions else []
        parts += [f"{self.episodes} episodes per task of a policy"] if self.episodes else []
        return "".join(f", {part}" for part in parts)

    def table(self) -> Table:
        """A rich table: claim, paper, ours with its interval, verdict."""
        from rich.table import Table

        counts = self.verdicts()
        several = len({f.model for f in self.findings}) > 1
        table = Table(
            title=f"claims on {self.model}{self._size()}",
            caption=", ".join(f"{counts[verdict]} {verdict}" for verdict in _STYLES if counts[verdict])
            + " · intervals are 95 % over seeds, of language models over prompts",
            title_style="bold",
            caption_style="dim",
            show_lines=False,
        )
        for name in ("claim", "paper", "T", "setting", "ours", "verdict"):
            table.add_column(name, justify="right" if name == "T" else "left", no_wrap=name in ("T", "verdict"))
        last = ""
        for f in self.findings:
            new = f.claim != last
            if new and last:
                table.add_section()
            last = f.claim
            ours = "–" if f.ours is None else f.ours.interval(".3g")
            table.add_row(
                f"[bold]{f.claim}[/]\n{f.statement} [dim]({f.metric}; against {f.baseline})[/]"
                + (f"\n[dim]on {f.model}[/]" if several else "")
                if new
                else "",
                f.paper if new else "",
                "" if f.steps is None else str(f.steps),
                f.setting,
                ours if f.ours is not None else f.why,
                f"[{_STYLES[f.verdict]}]{f.verdict}[/]",
            )
        return table


def run_claims(
    names: Sequence[str],
    *,
    model: Any = None,
    family: str | None = None,
    steps: Sequence[int] | None = None,
    seeds: int | Sequence[int] = 6,
    prompts: int | Sequence[int] | None = None,
    length: int | None = None,
    episodes: int | Sequence[int] = 50,
    progress: Callable[[int, int, str], None] = _silent,
) -> Reproduction:
    """Test the claims of methods, each on the model that it is written for.

    Args:
        names: methods, or `all`.
        model: a zoo name, a hub id, a local path, a loaded pipeline or (model, tokenizer), a `Subject` or
            `LanguageSubject`; by default the one that an experiment names, else `garments-flux` for denoise methods,
            `smollm2` for those on K/V caches and `digits-mdlm` for those for masked-diffusion models.
        family: only methods of this family; needed beside a `model` where names belong to several.
        steps: numbers of steps to test denoise methods at; by default those of the model (28 and 50 of most).
        seeds: how many, or which, for denoise methods; at least two, or there is no interval to judge by.
        prompts: the same for methods on language models: prompts of every task, by default 12, or 6 where each is
            decoded without a cache first.
        length: tokens of such a prompt, by default 320; of masked-diffusion models prompt and answer, by default 128.
        episodes: the same for policies, in the place of `seeds`: of every task.
        progress: told how many of how many experiments are done, and what runs next.
    """
    chosen = _choose(names, family or _family_of(model))
    families = list(dict.fromkeys(claim.family for claim in chosen))
    if model is not None and len(families) > 1:
        raise OptionError(f"one model cannot serve {' and '.join(families)}: name the family")
    out = Reproduction(list(dict.fromkeys(claim.method for claim in chosen)))
    models: list[str] = []
    for name in families:
        mine = [claim for claim in chosen if claim.family == name]
        if name == "kv":
            models.append(_kv(out, mine, model, _numbers(_or(prompts, 12), "prompt"), length or 320, progress))
        elif name == "dllm":
            models.append(_dllm(out, mine, model, _numbers(_or(prompts, 6), "prompt"), length or 128, progress))
        else:
            numbers = {"image": _numbers(seeds, "seed"), "policy": _numbers(episodes, "episode")}
            models += _denoise(out, mine, model, numbers, steps, progress)
    out.model = ", ".join(models)
    return out


def _choose(names: Sequence[str], family: str | None) -> list[Claim]:
    known = claims.claims()
    chosen: list[str] = []
    for name in names:
        key = name.replace("-", "_")
        if name != "all" and key not in known:
            raise UnknownName.of("method with claims", name, [*known, "all"])
        chosen += [n for n in (known if name == "all" else [key]) if n not in chosen]
    found = [claim for name in chosen for claim in known[name] if family in (None, claim.family)]
    if not found:
        raise OptionError(f"none of {', '.join(names)} is a method of the family {family!r}")
    return found


def _family_of(model: Any) -> str | None:
    """The family that a model is for, where that can be told without loading it."""
    if model is None:
        return None
    if isinstance(model, str):
        known = {"smollm2": "kv", "digits-mdlm": "dllm", USUAL: "denoise", **dict.fromkeys(POLICIES, "denoise")}
        return known.get(model)
    if type(model).__name__ in ("DllmSubject", "DigitsMdlm", "MaskedLM"):
        return "dllm"
    return "kv" if isinstance(model, tuple) or (hasattr(model, "tokenizer") and hasattr(model, "frame")) else "denoise"


def _numbers(given: int | Sequence[int], what: str) -> list[int]:
    numbers = list(range(given)) if isinstance(given, int) else list(given)
    if len(numbers) < 2:
        raise OptionError(f"{len(numbers)} {what} gives no confidence interval to judge by; give at least 2")
    return numbers


def _or(given: int | Sequence[int] | None, usual: int) -> int | Sequence[int]:
    return usual if given is None else given


Progress = Callable[[int, int, str], None]


def _denoise(
    out: Reproduction,
    mine: Sequence[Claim],
    model: Any,
    numbers: Mapping[str, list[int]],
    steps: Sequence[int] | None,
    progress: Progress,
) -> list[str]:
    """Each claim on its model, model by model, so that only one is in memory; `numbers` are seeds by kind of model."""
    if steps is not None and (not steps or min(steps) < 2):
        raise OptionError(f"steps={list(steps)} is out of range; each must be at least 2")
    wanted = [model] if model is not None else list(dict.fromkeys(claim.model or USUAL for claim in mine))
    findings: dict[str, list[Finding]] = {claim.key: [] for claim in mine}
    names: list[str] = []
    for place, name in enumerate(wanted):
        some = [claim for claim in mine if model is not None or (claim.model or USUAL) == name]
        told = _scaled(progress, place, len(wanted))
        try:
            subject, found = _on_model(some, name, numbers, steps, told)
        except MissingDependency as error:
            if model is not None or name == USUAL:
                raise
            missing = [claims.Measured("", None, str(error))]
            found, subject = [f for claim in some for f in claims.judged(claim, missing, None, name)], None
        for finding in found:
            findings[finding.claim].append(finding)
        names.append(name if subject is None else subject.name)
        if subject is not None:
            out.images = max(out.images, len(subject.prompts))
            out.steps = sorted({*out.steps, *_steps(subject, steps)})
            if subject.kind == "policy":
                out.episodes = len(numbers["policy"])
            else:
                out.seeds = numbers["image"]
    out.findings += [finding for found in findings.values() for finding in found]
    return names


def _steps(subject: Subject, steps: Sequence[int] | None) -> Sequence[int]:
    """The model's own where none are asked for; a policy is always tested at its own."""
    return subject.grids if steps is None or subject.kind == "policy" else steps


def _on_model(
    mine: Sequence[Claim],
    model: Any,
    numbers: Mapping[str, list[int]],
    steps: Sequence[int] | None,
    progress: Progress,
) -> tuple[Subject, list[Finding]]:
    from elision.bench.lab import lab_for
    from elision.bench.subject import load_subject

    subject = load_subject(model)
    on_policy = subject.kind == "policy"
    mine = [claim for claim in mine if (claim.model in POLICIES) == on_policy]
    if not mine:
        raise OptionError(f"none of the claims asked for is about {'policies' if on_policy else 'this kind of model'}")
    chosen = _steps(subject, steps)
    tests = [(claim, total) for claim in mine for total in _grids(claim, chosen)]
    place = [0]
    lab = lab_for(
        subject, numbers["policy" if on_policy else "image"], lambda what: progress(place[0], len(tests), what)
    )
    lab.warm_up(chosen[0])
    found: list[Finding] = []
    for place[0], (claim, total) in enumerate(tests):
        progress(place[0], len(tests), claim.key)
        found += claims.examine(claim, lab, total)
    return subject, found


def _scaled(progress: Progress, place: int, of: int) -> Progress:
    return lambda done, total, what: progress(place * total + done, of * total, what)


def _kv(out: Reproduction, mine: Sequence[Claim], model: Any, seeds: list[int], length: int, progress: Progress) -> str:
    from elision.bench.kv.lab import KVLab
    from elision.bench.kv.subject import load_language

    if length < 192:
        raise OptionError(f"length={length} is out of range; prompts for K/V methods have at least 192 tokens")
    subject = load_language("smollm2" if model is None else model)
    place = [0]
    lab = KVLab(subject, seeds, lambda what: progress(place[0], len(mine), what))
    out.prompts, out.length = len(seeds), length
    for place[0], claim in enumerate(mine):
        progress(place[0], len(mine), claim.key)
        out.findings += claims.examine(claim, lab, length, stepped=False)
    return subject.name


def _dllm(
    out: Reproduction, mine: Sequence[Claim], model: Any, seeds: list[int], length: int, progress: Progress
) -> str:
    from elision.bench.dllm.lab import DllmLab
    from elision.bench.dllm.subject import load_dllm

    subject = load_dllm("digits-mdlm" if model is None else model)
    place = [0]
    lab = DllmLab(subject, seeds, lambda what: progress(place[0], len(mine), what))
    out.questions, out.total = len(seeds), length
    for place[0], claim in enumerate(mine):
        progress(place[0], len(mine), claim.key)
        out.findings += claims.examine(claim, lab, length, stepped=False)
    return subject.name


def _grids(claim: Claim, steps: Sequence[int]) -> Sequence[int]:
    return steps[:1] if claim.once else steps
