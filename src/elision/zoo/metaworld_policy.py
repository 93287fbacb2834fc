"""`metaworld-policy`: a transformer diffusion policy for four Meta-World tasks, learnt from scripted experts.

As in Diffusion Policy (RSS 2023), its transformer variant: the latent is a chunk of 16 actions, denoised by DDPM in 100
steps; the decoder's layers look at a memory of one token for the denoising time and one for each of the last two
states; 8 actions are executed before the next chunk is sampled. States say which task it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, DDPMScheduler, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from elision.zoo import _training
from elision.zoo.metaworld import (
    ACTION,
    LIMIT,
    STATE,
    TASKS,
    Demonstration,
    Episode,
    World,
    demonstrations,
    play,
    task_number,
)

HORIZON, OBSERVED, EXECUTED, STEPS = 16, 2, 8, 100
# Ranges of hand, gripper, object and its orientation, goal in the demonstrations; differences are seen apart.
LOW = (-0.5, 0.4, 0.0, 0.0, -0.5, 0.4, 0.0, -1.0, -1.0, -1.0, -1.0, -0.5, 0.4, 0.0)
HIGH = (0.5, 1.0, 0.4, 1.0, 0.5, 1.0, 0.4, 1.0, 1.0, 1.0, 1.0, 0.5, 1.0, 0.4)
NEAR = 0.02  # metres; differences well below are seen linearly, those well above by their logarithm


class TransformerForDiffusion(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Noise in an action chunk [B, horizon, 4], by pre-norm decoder layers that look at time and states."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        width: int = 96,
        layers: int = 6,
        heads: int = 4,
        hidden: int = 384,
        tasks: int = len(TASKS),
        horizon: int = HORIZON,
        observed: int = OBSERVED,
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(ACTION, width)
        self.place = nn.Parameter(0.02 * torch.randn(1, horizon, width))
        self.observe = nn.Linear(STATE + 9 + tasks, width)
        self.moment = nn.Parameter(0.02 * torch.randn(1, 1 + observed, width))
        self.encoder = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        layer = nn.TransformerDecoderLayer(width, heads, hidden, 0.0, "gelu", batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, layers)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, ACTION))
        for name, weight in self.decoder.named_parameters():
            if weight.ndim == 2:  # the decoder starts out as copies of one layer
                nn.init.xavier_uniform_(weight, 0.5 if name.endswith(("out_proj.weight", "linear2.weight")) else 1.0)

    def features(self, states: Tensor) -> Tensor:
        """States [..., 14] as the model sees them, [..., 23]: scaled, with how far hand, object and goal are apart."""
        low, high = states.new_tensor(LOW), states.new_tensor(HIGH)
        hand, thing, goal = states[..., :3], states[..., 4:7], states[..., 11:14]
        apart = torch.cat([thing - hand, goal - hand, goal - thing], dim=-1)
        return torch.cat([2 * (states - low) / (high - low) - 1, torch.asinh(apart / NEAR)], dim=-1)

    def forward(self, sample: Tensor, timestep: Tensor, cond: Tensor) -> Tensor:
        """Predict the noise.

        Args:
            sample: noisy actions [B, horizon, 4].
            timestep: denoising time, a number or [B], from 99 down to 0.
            cond: the last states with the task as a one-hot, [B, 2, 14 + tasks].
        """
        half = self.config.width // 2
        rate = torch.exp(torch.arange(half, device=sample.device) * (-math.log(1e4) / (half - 1)))
        angle = timestep.float().reshape(-1, 1) * rate  # [1 or B, width / 2]
        time = torch.cat([angle.sin(), angle.cos()], dim=-1).to(sample.dtype)[:, None].expand(len(sample), -1, -1)
        seen = self.observe(torch.cat([self.features(cond[..., :STATE]), cond[..., STATE:]], dim=-1))
        memory = torch.cat([time, seen], dim=1) + self.moment  # [B, 3, width]
        memory = memory + self.encoder(memory)
        mask = None
        if self.config.causal:
            n = sample.shape[1]
            mask = torch.full((n, n), -math.inf, device=sample.device, dtype=sample.dtype).triu(1)
        # said outright: torch would otherwise look through the mask at every call
        h = self.decoder(self.embed(sample) + self.place, memory, tgt_mask=mask, tgt_is_causal=mask is not None)
        out: Tensor = self.head(h)
        return out


class PolicyPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Samples action chunks from states, in the manner of diffusers' pipelines."""

    transformer: TransformerForDiffusion
    scheduler: DDPMScheduler

    def __init__(self, transformer: TransformerForDiffusion, scheduler: DDPMScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Never: rows that begin from the same noise are different requests."""
        return False

    @torch.no_grad()
    def __call__(
        self,
        states: Tensor | np.ndarray[Any, Any],
        task: str | Sequence[str],
        num_inference_steps: int = STEPS,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """One chunk of actions per row of states.

        Args:
            states: the last two states of every episode, [B, 2, 14] or [2, 14].
            task: what is to be done, one for all rows or one per row.
            num_inference_steps: denoising steps.
            generator: source of the noise, or one per row, which makes rows independent of the batch they are in.

        Returns:
            Actions [B, 8, 4] in [-1, 1], the first for the present.
        """
        seen = torch.as_tensor(states, dtype=torch.float32, device=self._execution_device)
        seen = seen[None] if seen.ndim == 2 else seen
        names = [task] * len(seen) if isinstance(task, str) else list(task)
        cond = condition(seen, torch.tensor([task_number(name) for name in names], device=seen.device))
        cond = cond.to(self.transformer.dtype)
        shape = (len(seen), self.transformer.config.horizon, ACTION)
        x = randn_tensor(shape, generator=generator, device=seen.device, dtype=cond.dtype)
        self.scheduler.set_timesteps(num_inference_steps)
        with self.progress_bar(total=num_inference_steps) as bar:
            for t in self.scheduler.timesteps:
                noise = self.transformer(x, t, cond)
                x = self.scheduler.step(noise, t, x, generator=generator).prev_sample
                bar.update()
        self.maybe_free_model_hooks()
        first = self.transformer.config.observed - 1
        chunk: Tensor = x[:, first : first + EXECUTED]
        return chunk.float().clamp(-1, 1)


def condition(states: Tensor, tasks: Tensor) -> Tensor:
    """States [B, 2, 14] with their task's one-hot, [B, 2, 14 + tasks]."""
    hot = nn.functional.one_hot(tasks, len(TASKS)).to(states)
    return torch.cat([states, hot[:, None].expand(-1, states.shape[1], -1)], dim=-1)


def scheduler() -> DDPMScheduler:
    """The noise schedule of Diffusion Policy."""
    return DDPMScheduler(
        num_train_timesteps=STEPS, beta_schedule="squaredcos_cap_v2", clip_sample=True, prediction_type="epsilon"
    )


def windows(shown: Sequence[Demonstration]) -> tuple[Tensor, Tensor, Tensor]:
    """Every place of every demonstration as the policy meets it.

    Returns:
        States [N, 2, 14], actions [N, 16, 4] that begin at the earlier state, task numbers [N]. Before the beginning
        the first state and action repeat, behind the end the last action.
    """
    states, actions, tasks = [], [], []
    for one in shown:
        n = np.arange(len(one.states))[:, None]
        first = n - OBSERVED + 1
        states.append(one.states[np.clip(first + np.arange(OBSERVED), 0, len(n) - 1)])
        actions.append(one.actions[np.clip(first + np.arange(HORIZON), 0, len(n) - 1)])
        tasks += [one.task] * len(n)
    return torch.from_numpy(np.concatenate(states)), torch.from_numpy(np.concatenate(actions)), torch.tensor(tasks)


def train_pipeline(
    steps: int = 2500,
    batch: int = 128,
    lr: float = 1e-3,
    muon: float | None = 4e-3,
    shown: Sequence[Demonstration] | int = 200,
    seed: int = 0,
    config: dict[str, Any] | None = None,
    start: nn.Module | None = None,
    folder: Path | None = None,
    every: int = 100,
) -> PolicyPipeline:
    """The recipe of `metaworld-policy`: noise prediction at uniform times.

    Args:
        steps: optimiser steps.
        batch: windows of a step.
        lr: peak learning rate of AdamW.
        muon: peak learning rate of the matrices, or None for AdamW throughout.
        shown: demonstrations, or how many of each task to record.
        seed: of weights and noise.
        config: what differs from the shipped model.
        start: a model to go on from, instead of a new one.
        folder: where the average so far is kept during training, if anywhere.
        every: steps between lines of progress.
    """
    states, actions, tasks = windows(demonstrations(shown) if isinstance(shown, int) else shown)
    torch.manual_seed(seed)
    model, noising = start or TransformerForDiffusion(**(config or {})), scheduler()

    def loss(step: int) -> Tensor:
        del step
        rows = torch.randint(len(states), (batch,))
        x0, noise, t = actions[rows], torch.randn(batch, HORIZON, ACTION), torch.randint(STEPS, (batch,))
        cond = condition(states[rows], tasks[rows])
        return nn.functional.mse_loss(model(noising.add_noise(x0, noise, t), t, cond), noise)

    def keep(done: int, averaged: nn.Module) -> None:
        if folder is not None and done % (10 * every) == 0:
            torch.save(averaged.state_dict(), folder / "partial.pt")

    averaged: Any = _training.fit(model, loss, steps=steps, lr=lr, muon=muon, keep=keep, every=every)
    return PolicyPipeline(averaged, scheduler())


def load(folder: Path) -> PolicyPipeline:
    """The trained pipeline, in float32."""
    where = {"local_files_only": True}
    transformer = TransformerForDiffusion.from_pretrained(
        folder / "transformer", variant="fp16", dtype=torch.float32, **where
    )
    pipe = PolicyPipeline(transformer.eval(), DDPMScheduler.from_pretrained(folder / "scheduler", **where))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def train(folder: Path, **options: Any) -> None:
    """Train and write a diffusers folder with float16 weights."""
    save(train_pipeline(**options), folder)


def save(pipe: PolicyPipeline, folder: Path) -> None:
    """Write the pipeline with float16 weights."""
    pipe.transformer.half()
    pipe.save_pretrained(folder, variant="fp16")
    config = folder / "transformer" / "config.json"
    entries = {key: value for key, value in json.loads(config.read_text()).items() if key != "_name_or_path"}
    config.write_text(json.dumps(entries, indent=2) + "\n")  # where it was loaded from is left out
    pipe.transformer.float()


def noise_of(seeds: Sequence[int], chunk: int) -> list[torch.Generator]:
    """The noise of a chunk in episodes: one generator per row, the same whatever else is in the batch."""
    states = [np.random.SeedSequence([seed, chunk]).generate_state(2) for seed in seeds]
    return [torch.Generator().manual_seed(int(a) << 31 ^ int(b)) for a, b in states]


def episodes(
    pipe: PolicyPipeline, worlds: Sequence[World], seeds: Sequence[int], steps: int = STEPS, limit: int = LIMIT
) -> list[Episode]:
    """Let the policy work on one task; noise depends on the episode's seed and the number of the chunk alone.

    Args:
        pipe: the policy, with whatever is applied to it.
        worlds: environments of the task, as many as episodes are run at a time.
        seeds: of the episodes.
        steps: denoising steps.
        limit: control steps after which an episode has failed.
    """

    def act(states: np.ndarray[Any, Any], rows: Sequence[int], chunk: int) -> np.ndarray[Any, Any]:
        return pipe(states, worlds[0].task, steps, noise_of(rows, chunk)).numpy()

    return play(act, worlds, seeds, limit)


def check(
    pipe: PolicyPipeline,
    count: int = 50,
    tasks: Sequence[str] = TASKS,
    steps: int = STEPS,
    seed: int = 0,
    together: int = 25,
) -> dict[str, Any]:
    """Share of solved episodes by task, with places of object and goal that no demonstration had.

    Args:
        pipe: what `load` returns.
        count: episodes per task.
        tasks: which tasks.
        steps: denoising steps.
        seed: of the first episode; those of the demonstrations begin at a million.
        together: how many episodes run at a time.
    """
    solved, used = {}, {}
    for task in tasks:
        worlds = [World(task) for _ in range(min(together, count))]
        played = episodes(pipe, worlds, range(seed, seed + count), steps)
        solved[task] = round(sum(e.solved for e in played) / count, 4)
        used[task] = round(sum(e.steps for e in played) / count, 1)
    return {
        "episodes_per_task": count,
        "seed_of_the_first": seed,
        "denoising_steps": steps,
        "success": solved,
        "control_steps": used,
        "parameters": sum(p.numel() for p in pipe.transformer.parameters()),
    }
