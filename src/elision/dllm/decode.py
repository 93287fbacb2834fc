"""How a masked-diffusion language model is sampled: which positions may be decided at a call, which are, and to what.

The sampler owns masks, blocks, window and commits, and asks a function for the logits of a few positions; it knows no
cache. LLaDA's decoding (blocks from left to right, a fixed number of tokens per call by confidence or at random),
Fast-dLLM's (all tokens above a threshold), Elastic-Cache's (a window that slides) and Dream's (outputs shifted by one,
commits along a time grid) are settings of one loop.

Different from the released samplers: the [MASK] token is never chosen, so that no position is decided to stay one; a
block ends as soon as nothing in it is left to decide, where LLaDA makes its remaining scheduled calls for nothing. Of
Dream's sampler, top-p, top-k, alg_temp and the rule "origin" are not offered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elision.errors import OptionError, UnknownName
from elision.tensors.slots import Rows

REMASKING = ("low_confidence", "random", "random_order", "entropy", "maskgit_plus", "topk_margin")
_DREAM = ("entropy", "maskgit_plus", "topk_margin")
# what the same settings are called in transformers, Dream and elsewhere
_ELSEWHERE = {"max_new_tokens": "gen_length", "alg": "remasking", "confidence_threshold": "threshold"}


@dataclass(frozen=True)
class Decoding:
    """Settings of the sampler.

    Attributes:
        gen_length: tokens to generate.
        steps: model calls over all blocks where the number of commits is scheduled; None makes it `gen_length`.
        block_length: length of the blocks that are decoded from left to right; None makes one block of everything.
        remasking: which tokens are committed first. low_confidence: the most probable (LLaDA; float64). random: drawn
            at every call. random_order: the order is drawn once per block. entropy, maskgit_plus, topk_margin: Dream's
            (float32): least entropy, greatest probability, greatest distance between the first two.
        schedule: tokens per call. uniform: equal parts, the first calls one more (LLaDA). time_grid: a share
            1 − s/t of the masks along linspace(1, 1e-3) (Dream). None chooses by `remasking`.
        threshold: commit every candidate of at least this probability instead, at least one per call.
        window: candidates are only the left-most `window` masks.
        temperature: of the token choice; 0 takes the most probable.
        cfg_scale: weight s of classifier-free guidance, logits = l₀ + (s + 1)(l − l₀), the prompt masked in l₀.
        first_call: what the first call of a block commits. normal, or the first position of the block and nothing else
            (Fast-dLLM on Dream).
        min_calls: calls that a block gets even if nothing is left to commit (Fast-dLLM's released code: 2).
        missing: a candidate whose logits were not computed is skipped, or committed first as token 0 (zero), which the
            released code of dKV-Cache does under shift_type="right".
    """

    gen_length: int = 128
    steps: int | None = None
    block_length: int | None = None
    remasking: str = "low_confidence"
    schedule: str | None = None
    threshold: float | None = None
    window: int | None = None
    temperature: float = 0.0
    cfg_scale: float = 0.0
    first_call: str = "normal"
    min_calls: int = 1
    missing: str = "skip"

    @classmethod
    def of(cls, **asked: Any) -> Decoding:
        """The settings that were asked for; unknown names raise with the nearest one."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in asked:
            if name in _ELSEWHERE:
                raise UnknownName(f"unknown setting of the sampler {name!r}: here it is called {_ELSEWHERE[name]!r}")
            if name not in known:
                raise UnknownName.of("setting of the sampler", name, known)
        return cls(**asked)

    def __post_init__(self) -> None:
        """Check every setting and how they fit together."""
        for name in ("gen_length", "steps", "block_length", "window", "min_calls"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise OptionError(f"{name}={value!r} is not a whole number of at least 1")
        for name, choices in (
            ("remasking", REMASKING),
            ("schedule", (None, "uniform", "time_grid")),
            ("first_call", ("normal", "first_position")),
            ("missing", ("skip", "zero")),
        ):
            if getattr(self, name) not in choices:
                raise OptionError(f"{name}={getattr(self, name)!r} is not one of {', '.join(map(repr, choices))}")
        for name in ("temperature", "cfg_scale", "threshold"):
            value = getattr(self, name)
            if name == "threshold" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise OptionError(f"{name}={value!r} is out of range; it must be a number of at least 0")
        if self.gen_length % self.block:
            raise OptionError(
                f"gen_length={self.gen_length} is no multiple of block_length={self.block}: choose one that divides it"
            )
        if self.calls % self.blocks:
            raise OptionError(
                f"steps={self.calls} cannot be shared equally by {self.blocks} blocks: choose a multiple of "
                f"{self.blocks}"
            )
        if self.window is not None and self.block_length is not None:
            raise OptionError("window and block_length are two ways to go from left to right: give one of them")
        self._check_schedule()

    def _check_schedule(self) -> None:
        if self.threshold is not None:
            if self.remasking == "random_order":
                raise OptionError("remasking='random_order' fixes the order beforehand, a threshold does not: give one")
            return
        most = -(-self.block // (self.calls // self.blocks))  # tokens that the first call commits
        if self.window is not None and self.window < most and not self.time_grid:
            raise OptionError(
                f"window={self.window} is smaller than the {most} tokens that a call commits "
                f"(gen_length={self.gen_length} in steps={self.calls}): raise window or steps"
            )

    @property
    def block(self) -> int:
        """Length of a block."""
        return self.block_length or self.gen_length

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.gen_length // self.block

    @property
    def calls(self) -> int:
        """Scheduled calls over all blocks."""
        return self.steps or self.gen_length

    @property
    def time_grid(self) -> bool:
        """Whether commits follow Dream's time grid."""
        return (self.schedule or ("time_grid" if self.remasking in _DREAM else "uniform")) == "time_grid"


@dataclass(frozen=True, slots=True)
class Step:
    """One model call, as methods see it. Sets are boolean [B, N] and must not be written to.

    Attributes:
        n: number of the call in the run.
        i: number of the call in its block.
        calls: scheduled calls of the block; None where a threshold decides how many there are.
        start, end: the block.
        prompt: P, length of the prompt.
        ids: [B, N] tokens before the call.
        masked: positions still to be decided.
        committed: positions that the previous call decided.
        eligible: positions that may be decided now.
        need: where the logits of the eligible positions come from.
        next: positions that will be decided now, where the order is known.
        order: [B, N] that order, the largest number first.
    """

    n: int
    i: int
    calls: int | None
    start: int
    end: int
    prompt: int
    ids: Tensor
    masked: Tensor
    committed: Tensor
    eligible: Tensor
    need: Rows
    next: Tensor | None
    order: Tensor | None = None

    @property
    def before(self) -> Tensor:
        """Positions that were masked before the previous call."""
        return self.masked | self.committed

    @property
    def overtime(self) -> bool:
        """Whether the schedule of the block is used up and something is left to decide."""
        return self.calls is not None and self.i >= self.calls and self.need.pos.shape[1] > 0


Call = Callable[
    [Step], tuple[Tensor, Tensor | None]
]  # logits [B, m, V] at `need`, and which of them exist [B, m] or None


class Noise:
    """Where random numbers come from; all are uniform on [0, 1)."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def draw(
        self, purpose: str, number: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Numbers for `purpose`: confidence (per call), order (per block) or token (per call)."""
        where = device if self.generator is None else self.generator.device
        return torch.rand(shape, generator=self.generator, device=where, dtype=dtype).to(device)


class Sampler:
    """One generation.

    Args:
        prompt: [B, P] token ids, left-padded where the rows differ.
        decoding: the settings.
        mask_id: the [MASK] token.
        shift: whether the output at position t predicts token t + 1.
        noise: random numbers.
    """

    def __init__(
        self, prompt: Tensor, decoding: Decoding, mask_id: int, shift: bool, noise: Noise | None = None
    ) -> None:
        if prompt.ndim != 2 or prompt.shape[1] < 1:
            raise OptionError(f"prompt of shape {tuple(prompt.shape)}: give token ids [B, P] with at least one token")
        self.decoding, self.mask_id, self.shift = decoding, mask_id, shift
        self.noise = noise or Noise()
        batch, self.prompt = prompt.shape
        tail = torch.full((batch, decoding.gen_length), mask_id, dtype=prompt.dtype, device=prompt.device)
        self.ids = torch.cat((prompt, tail), dim=1)
        self.masked = torch.zeros_like(self.ids, dtype=torch.bool)
        self.masked[:, self.prompt :] = True
        self.committed = torch.zeros_like(self.masked)
        self.n = 0

    def run(self, call: Call) -> Tensor:
        """Generate; returns the token ids [B, P + gen_length]."""
        d = self.decoding
        grid = torch.linspace(1, 1e-3, d.calls // d.blocks + 1)
        for b in range(d.blocks):
            self._block(call, b, self.prompt + b * d.block, grid)
        return self.ids

    def _block(self, call: Call, number: int, start: int, grid: Tensor) -> None:
        d, end = self.decoding, start + self.decoding.block
        calls = d.calls // d.blocks
        order = None
        if d.remasking == "random_order":
            order = self.noise.draw("order", number, tuple(self.ids.shape), self.ids.device, torch.float32)
        left, i = [d.block] * len(self.ids), 0  # masks that every row still has in this block
        while any(left) or i < d.min_calls:
            eligible = self._eligible(start, end, i)
            quota = self._quota(i, calls, left, grid)
            following = self._following(order, eligible, quota)
            need = self._need(eligible if following is None else following)
            step = Step(
                self.n,
                i,
                calls if d.threshold is None else None,
                start,
                end,
                self.prompt,
                self.ids,
                self.masked,
                self.committed,
                eligible,
                need,
                following,
                order,
            )
            logits, exists = call(step)
            self._commit(step, logits, exists, quota)
            left = self.masked[:, start:end].sum(dim=1).tolist()
            self.n, i = self.n + 1, i + 1

    def _quota(self, i: int, calls: int, left: list[int], grid: Tensor) -> int | None:
        """How many tokens call i of a block commits in every row; None where a threshold says."""
        d = self.decoding
        if d.first_call == "first_position" and i == 0:
            return 1
        if d.threshold is not None:
            return None
        if i >= calls or (
            i == calls - 1 and d.time_grid
        ):  # beyond the schedule only if a candidate could not be decided
            return d.block
        if d.time_grid:
            mean = torch.tensor(sum(left) / len(left))
            return int(mean * (1 - grid[i + 1] / grid[i]))
        share, rest = divmod(d.block, calls)
        return share + (i < rest)

    def _eligible(self, start: int, end: int, i: int) -> Tensor:
        d = self.decoding
        out = self.masked.clone()
        out[:, end:] = False
        if d.window is not None:
            out &= out.cumsum(dim=1) <= d.window
        if d.first_call == "first_position" and i == 0:
            out[:, start + 1 :] = False
        return out

    def _following(self, order: Tensor | None, eligible: Tensor, quota: int | None) -> Tensor | None:
        """The positions to be decided now under a known order: the `quota` eligible ones of the largest numbers."""
        if order is None:
            return None
        assert quota is not None
        return _top(order.masked_fill(~eligible, -torch.inf), quota) & eligible

    def _need(self, wanted: Tensor) -> Rows:
        if self.shift:
            wanted = torch.cat((wanted[:, 1:], torch.zeros_like(wanted[:, :1])), dim=1)
        return Rows.where(wanted)

    def _commit(self, step: Step, logits: Tensor, exists: Tensor | None, quota: int | None) -> None:
        """Decide tokens at the positions that `step.need` predicts."""
        before = self.masked
        if step.need.pos.shape[1] == 0:
            self.committed = torch.zeros_like(before)
            return
        where = step.need.pos + int(self.shift)  # [B, m]
        wanted = step.eligible if step.next is None else step.next
        live = wanted.gather(1, where)
        live &= step.need.real()
        tokens, confidence = self._choose(step, logits, where)
        if exists is not None:
            lost = live & ~exists
            if self.decoding.missing == "zero":
                tokens, confidence = tokens.masked_fill(lost, 0), confidence.masked_fill(lost, torch.inf)
            else:
                live &= exists
        confidence = confidence.masked_fill(~live, -torch.inf)
        # ranked over the whole sequence: ties then fall as they do in the released samplers
        everywhere = torch.full(before.shape, -torch.inf, dtype=confidence.dtype, device=before.device)
        everywhere.scatter_reduce_(1, where, confidence, "amax")
        chosen = _top(everywhere, 1 if quota is None else quota).gather(1, where)
        if quota is None:
            assert self.decoding.threshold is not None
            chosen |= confidence >= self.decoding.threshold
        chosen &= live
        flat = chosen.nonzero(as_tuple=True)
        spots = (flat[0], where[flat])
        self.ids = self.ids.index_put(spots, tokens[flat])
        self.committed = torch.zeros_like(before).index_put(spots, chosen[flat])
        self.masked = before & ~self.committed

    def _choose(self, step: Step, logits: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, m] and their confidence; the [MASK] token is never chosen."""
        d = self.decoding
        if d.remasking in _DREAM:
            return self._choose_dream(step, logits)
        allowed = logits.index_fill(-1, torch.tensor([self.mask_id], device=logits.device), -torch.inf)
        if d.temperature > 0:
            # exp(l) / (−log u)^τ in logarithms: Gumbel noise of scale τ
            u = self.noise.draw("token", step.n, tuple(logits.shape), logits.device, torch.float64)
            allowed = allowed.double() - d.temperature * (-u.log()).log()
        tokens = allowed.argmax(dim=-1)
        if d.remasking == "low_confidence" or d.threshold is not None:
            logits = logits.double()
            picked = logits.gather(-1, tokens[..., None])[..., 0]
            return tokens, (picked - logits.logsumexp(dim=-1)).exp()
        if step.next is not None:
            return tokens, torch.ones_like(tokens, dtype=torch.float32)
        drawn = self.noise.draw("confidence", step.n, tuple(self.ids.shape), logits.device, torch.float32)
        return tokens, drawn.gather(1, where)

    def _choose_dream(self, step: Step, logits: Tensor) -> tuple[Tensor, Tensor]:
        d = self.decoding
        scaled = logits.float() / d.temperature if d.temperature > 0 else logits.float()
        p = scaled.softmax(dim=-1)
        allowed = scaled.index_fill(-1, torch.tensor([self.mask_id], device=logits.device), -torch.inf)
        if d.temperature > 0:
            u = self.noise.draw("token", step.n, tuple(logits.shape), logits.device, torch.float64)
            allowed = allowed.double() - (-u.log()).log()
        tokens = allowed.argmax(dim=-1)
        if d.threshold is not None or d.remasking == "maskgit_plus":
            return tokens, p.gather(-1, tokens[..., None])[..., 0]
        if d.remasking == "topk_margin":
            first, second = p.topk(2, dim=-1).values.unbind(-1)
            return tokens, first - second
        return tokens, (p * (p + 1e-10).log()).sum(dim=-1)


def _top(values: Tensor, count: int) -> Tensor:
    """True at the `count` largest entries of every row [B, m]."""
    count = min(count, values.shape[1])
    best = values.topk(count, dim=1).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, best, True)
