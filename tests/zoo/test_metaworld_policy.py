"""The policy: its model and pipeline without a simulator, tasks and demonstrations with one."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import elision
from elision import zoo
from elision.denoise.adapters import adapter_for
from elision.errors import ElisionError, ElisionWarning, MissingDependency, OptionError
from elision.zoo import metaworld, metaworld_policy
from elision.zoo.metaworld import TASKS, Demonstration, World, demonstrations, play, state_of
from elision.zoo.metaworld_policy import PolicyPipeline, TransformerForDiffusion, condition, noise_of, windows

needs_simulator = pytest.mark.skipif(importlib.util.find_spec("metaworld") is None, reason="needs metaworld and mujoco")
SMALL = {"width": 16, "layers": 2, "heads": 2, "hidden": 32}


def small() -> PolicyPipeline:
    torch.manual_seed(0)
    pipe = PolicyPipeline(TransformerForDiffusion(**SMALL).eval(), metaworld_policy.scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def states(rows: int) -> torch.Tensor:
    return torch.rand(rows, 2, 14, generator=torch.Generator().manual_seed(rows)) * 0.3


def shown(length: int = 5, task: int = 2) -> Demonstration:
    n = np.arange(length, dtype=np.float32)[:, None]
    return Demonstration(task, n + np.zeros((1, 14), np.float32), n / 10 + np.zeros((1, 4), np.float32))


def test_windows_begin_at_the_earlier_state_and_repeat_the_ends() -> None:
    seen, actions, tasks = windows([shown(), shown(3, 0)])
    assert seen.shape == (8, 2, 14)
    assert actions.shape == (8, 16, 4)
    assert tasks.tolist() == [2] * 5 + [0] * 3
    assert seen[0, :, 0].tolist() == [0, 0]
    assert seen[3, :, 0].tolist() == [2, 3]
    np.testing.assert_allclose(actions[3, :5, 0], [0.2, 0.3, 0.4, 0.4, 0.4])
    np.testing.assert_allclose(actions[0, :3, 0], [0.0, 0.0, 0.1])


def test_the_model_sees_causally_and_feels_time_states_and_task() -> None:
    model = small().transformer
    x, cond = torch.randn(2, 16, 4), condition(states(2), torch.tensor([0, 3]))
    out = model(x, torch.tensor(50), cond)
    later = x.clone()
    later[:, 9] += 1
    changed = (model(later, torch.tensor(50), cond) - out).abs().amax((0, 2))
    assert changed[:9].max() == 0
    assert changed[9:].min() > 0
    assert not torch.equal(model(x, torch.tensor(51), cond), out)
    assert not torch.equal(model(x, torch.tensor(50), condition(states(2), torch.tensor([1, 3])))[0], out[0])
    both = model(x, torch.tensor([50, 50]), cond)  # a time per row, as in training
    torch.testing.assert_close(both, out, rtol=0, atol=0)


def test_without_the_mask_early_actions_see_later_ones() -> None:
    torch.manual_seed(0)
    model = TransformerForDiffusion(**SMALL, causal=False).eval()
    x, cond = torch.randn(1, 16, 4), condition(states(1), torch.tensor([0]))
    later = x.clone()
    later[:, 9] += 1
    assert (model(later, torch.tensor(5), cond) - model(x, torch.tensor(5), cond))[:, 0].abs().max() > 0


def test_differences_of_positions_do_not_depend_on_where_all_is() -> None:
    model = small().transformer
    here = states(1)[:, 0]
    there = here.clone()
    for start in (0, 4, 11):
        there[:, start : start + 3] += 0.1
    torch.testing.assert_close(model.features(there)[..., 14:], model.features(here)[..., 14:])
    assert model.features(here).shape == (1, 23)


def test_a_row_does_not_depend_on_its_batch() -> None:
    pipe, seeds = small(), [5, 6, 7]
    whole = pipe(states(3), TASKS[1], 6, noise_of(seeds, 2))
    assert whole.shape == (3, 8, 4)
    assert whole.abs().max() <= 1
    for row, seed in enumerate(seeds):
        alone = pipe(states(3)[row].numpy(), TASKS[1], 6, noise_of([seed], 2))
        torch.testing.assert_close(alone[0], whole[row], rtol=0, atol=1e-4)
    assert not torch.equal(pipe(states(3), TASKS[1], 6, noise_of(seeds, 3)), whole)
    several = pipe(states(3), [TASKS[1], TASKS[0], TASKS[1]], 6, noise_of(seeds, 2))
    torch.testing.assert_close(several[[0, 2]], whole[[0, 2]], rtol=0, atol=1e-4)
    assert not torch.allclose(several[1], whole[1])


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(OptionError, match="pick-place-v3"):
        small()(states(1), "pick-place")


def test_it_is_a_policy_to_the_library() -> None:
    """Every branch of the decoder is a site, and the limit setting changes no bit."""
    pipe = small()
    assert len(adapter_for(pipe.transformer).sites(pipe.transformer, "branch", "test")) == 6
    noise = lambda: noise_of([1, 2], 0)  # noqa: E731
    plain = pipe(states(2), TASKS[0], 8, noise())
    run = elision.apply(pipe, "uniform", interval=1)
    with pytest.warns(ElisionWarning, match="elided nothing"), run:
        assert torch.equal(pipe(states(2), TASKS[0], 8, noise()), plain)
    assert run.report().flops_computed  # type: ignore[union-attr]
    profile = elision.fit(pipe, "bac", calls=[lambda p: p(states(2), TASKS[0], 8, noise())])
    assert profile.facts["steps"] == 8
    whole = elision.apply(pipe, "bac", profile=profile, num_caches=8)
    with pytest.warns(ElisionWarning, match="elided nothing"), whole:
        assert torch.equal(pipe(states(2), TASKS[0], 8, noise()), plain)
    with elision.apply(pipe, "bac", profile=profile, num_caches=2, union_blocks=0) as run:
        first = pipe(states(2), TASKS[0], 8, noise())
        assert not torch.equal(first, plain)
        assert torch.equal(pipe(states(2), TASKS[0], 8, noise()), first)  # a chunk leaves nothing behind
        assert run.report().outputs_computed == 2 * 2 * 6
    assert torch.equal(pipe(states(2), TASKS[0], 8, noise()), plain)


def test_training_learns_and_is_read_back(tmp_path: Path) -> None:
    pipe = metaworld_policy.train_pipeline(30, 16, 3e-3, 1e-2, [shown(12)], config=SMALL, folder=tmp_path, every=3)
    assert (tmp_path / "partial.pt").exists()
    losses = []
    for model in (small().transformer, pipe.transformer):
        torch.manual_seed(1)
        x0, noise = windows([shown(12)])[1], torch.randn(12, 16, 4)
        t = torch.randint(100, (12,))
        cond = condition(windows([shown(12)])[0], torch.full((12,), 2))
        with torch.no_grad():
            losses.append(float((model(pipe.scheduler.add_noise(x0, noise, t), t, cond) - noise).square().mean()))
    assert losses[1] < 0.9 * losses[0]
    metaworld_policy.save(pipe, tmp_path / "p")
    again = metaworld_policy.load(tmp_path / "p")
    assert again.transformer.config.width == 16
    assert "_name_or_path" not in json.loads((tmp_path / "p" / "transformer" / "config.json").read_text())
    torch.testing.assert_close(
        again(states(1), TASKS[0], 4, noise_of([1], 0)),
        pipe(states(1), TASKS[0], 4, noise_of([1], 0)),
        rtol=0,
        atol=0.05,
    )


class Counter:
    """A world that is solved after as many steps as its seed says."""

    task = TASKS[0]

    def reset(self, seed: int) -> Any:
        self.left = seed
        return np.zeros(14, np.float32)

    def step(self, action: Any) -> tuple[Any, bool]:
        self.left -= 1
        return np.full(14, self.left, np.float32), self.left == 0


def test_episodes_end_when_solved_or_at_the_limit() -> None:
    asked: list[list[int]] = []

    def act(seen: Any, seeds: Any, chunk: int) -> Any:
        asked.append(list(seeds))
        return np.zeros((len(seen), 4, 4), np.float32)

    played = play(act, [Counter(), Counter()], [3, 9, 50], limit=10)  # type: ignore[list-item]
    assert [(e.seed, e.solved, e.steps, e.chunks) for e in played] == [
        (3, True, 3, 1),
        (9, True, 9, 3),
        (50, False, 10, 3),
    ]
    assert asked == [[3, 9], [9], [9], [50], [50], [50]]


def test_without_the_simulator_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"metaworld and mujoco.*elision\[policy\]"):
        World(TASKS[0])


@needs_simulator
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_seed_alone_decides_an_episode() -> None:
    def roll(world: World, seed: int) -> Any:
        seen = [world.reset(seed)]
        seen += [world.step(world.expert())[0] for _ in range(6)]
        return np.stack(seen)

    world = World("push-v3")
    first = roll(world, 7)
    other = roll(world, 8)
    assert np.array_equal(roll(world, 7), first)
    assert np.array_equal(roll(World("push-v3"), 7), first)
    assert not np.array_equal(other[0], first[0])
    assert np.array_equal(state_of(world.observation), roll(world, 7)[-1])


@needs_simulator
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_demonstrations_are_experts_that_succeed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = demonstrations(2, ["push-v3"])
    assert [d.task for d in found] == [2, 2]
    for one in found:
        assert one.states.shape == (len(one.actions), 14)
        assert np.abs(one.actions).max() <= 1
    assert not np.array_equal(found[0].states[0], found[1].states[0])
    again = demonstrations(2, ["push-v3"])
    assert np.array_equal(again[1].actions, found[1].actions)
    monkeypatch.setattr(metaworld, "demonstrate", lambda *a: None)
    with pytest.raises(ElisionError, match="solved 0 of"):
        demonstrations(1, ["push-v3"])


shipped = pytest.mark.skipif(not (zoo.WEIGHTS / "metaworld-policy").is_dir(), reason="not shipped yet")


@shipped
def test_the_shipped_policy_is_small_and_has_a_card() -> None:
    folder = zoo.WEIGHTS / "metaworld-policy"
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= 8e6
    card = zoo.card("metaworld-policy")
    assert card["quality"]["episodes_per_task"] >= 50
    assert min(card["quality"]["success"].values()) >= 0.8
    assert card["quality"]["success"].keys() == set(TASKS)


@shipped
@needs_simulator
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_shipped_policy_presses_a_button() -> None:
    """A small version of the card's measurement, with ten denoising steps instead of a hundred."""
    found = zoo.check("metaworld-policy", count=3, tasks=["button-press-topdown-v3"], steps=10)
    assert found["success"]["button-press-topdown-v3"] >= 2 / 3
