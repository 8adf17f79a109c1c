"""What an iteration learns from: the end of turn counts, padding does not, and scores are what the
settings say.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from align.algorithms.online import Calibration, announce, calibrated, calibration_questions
from align.algorithms.ppo.advantages import Estimated
from align.algorithms.ppo.experience import (
    POLICY,
    VALUE,
    Experience,
    Passes,
    estimate,
    final_scores,
    last_value,
    passes,
    sampler_weights,
)
from align.algorithms.ppo.learner import MEASURED, lesson_of
from align.algorithms.ppo.measures import measures, same_rewards
from align.algorithms.ppo.rollout import Rollouts, mask_of, rollout, samples_of, sampling
from align.algorithms.ppo.run import made
from align.algorithms.ppo.seeds import derived
from align.algorithms.ppo.trainer import Trainer
from align.artifacts import read_json, write_json
from align.errors import StageError
from align.models.adapters import CONFIG
from align.models.load import load_model
from align.models.logprobs import Row, last_hidden, token_logprobs
from align.models.roles import Head, Roles
from align.models.settings import Lora, Model
from align.process_group import Ranks
from align.rewards.role import RoleReward
from align.rewards.source import Sample
from tests.algorithms.ppo.running import likely_to_end, online, prompts, settings
from tests.conftest import model_settings, save_tiny
from tests.models.test_classifier import trained

ALONE = Ranks(index=0, count=1, device=torch.device("cpu"))


def trainer(model: Model, out: Path, given: Any = None, **changes: Any) -> Trainer:
    run = made(given or online(model), settings=settings(**changes), out=out, ranks=ALONE)
    run.begin()
    return run


def given(**changes: Any) -> Experience:
    """Four answers to two prompts, of 3, 1, 2 and 3 tokens; the last one was cut."""
    lengths = [3, 1, 2, 3]
    mask = mask_of(lengths)
    draw = torch.Generator().manual_seed(0)

    def drawn() -> torch.Tensor:
        return -torch.rand(mask.shape, generator=draw) * mask

    made_up = Experience(
        rollouts=Rollouts(
            rows=[Row(prompt=(5, 6), completion=(7,) * n) for n in lengths],
            groups=torch.tensor([0, 0, 1, 1]),
            ended=torch.tensor([True, True, True, False]),
            sampler_logprobs=drawn(),
        ),
        passes=Passes(
            logprobs=drawn(),
            reference_logprobs=drawn(),
            values=drawn(),
            entropies=-drawn(),
            behind=torch.tensor([9.0, 9.0, 9.0, 0.5]),
        ),
        scores=torch.tensor([1.0, -1.0, 0.5, -2.0]),
        raw=torch.tensor([1.0, -1.0, 0.5, -2.0]),
        taught=torch.ones(4).bool(),
    )
    return replace(made_up, **changes)


def wider(experience: Experience, filler: float) -> Experience:
    """The same with three more columns of padding, full of what must not be read."""

    def pad(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, 3), value=filler)

    seen, rollouts = experience.passes, experience.rollouts
    longest = Row(prompt=(5, 6), completion=(7,) * 6)
    return replace(
        experience,
        rollouts=replace(
            rollouts,
            rows=[*rollouts.rows, longest],
            groups=torch.cat([rollouts.groups, torch.tensor([2])]),
            ended=torch.cat([rollouts.ended, torch.tensor([True])]),
            sampler_logprobs=torch.cat([pad(rollouts.sampler_logprobs), torch.zeros(1, 6)]),
        ),
        passes=Passes(
            logprobs=torch.cat([pad(seen.logprobs), torch.zeros(1, 6)]),
            reference_logprobs=torch.cat([pad(seen.reference_logprobs), torch.zeros(1, 6)]),
            values=torch.cat([pad(seen.values), torch.zeros(1, 6)]),
            entropies=torch.cat([pad(seen.entropies), torch.zeros(1, 6)]),
            behind=torch.cat([seen.behind, torch.zeros(1)]),
        ),
        scores=torch.cat([experience.scores, torch.zeros(1)]),
        raw=torch.cat([experience.raw, torch.zeros(1)]),
        taught=torch.cat([experience.taught, torch.tensor([False])]),
    )


@pytest.mark.parametrize("value", ["trunk", "none"])
def test_padding_and_answers_without_a_score_change_no_advantage(value: str) -> None:
    config = settings(value=value)
    plain = estimate(given(), beta=0.1, settings=config)
    padded = estimate(wider(given(), 50.0), beta=0.1, settings=config)
    assert torch.allclose(padded.advantages[:4, :3], plain.advantages, atol=1e-6)
    assert not padded.advantages[4].any() and not padded.advantages[:, 3:].any()
    assert torch.allclose(padded.returns[:4, :3], plain.returns, atol=1e-6)


def test_padding_changes_no_measure() -> None:
    """Behind the end stands what no statistic may read."""
    experience, config = given(), settings()
    spoilt = replace(
        experience,
        passes=replace(
            experience.passes,
            entropies=experience.passes.entropies + 70.0 * ~experience.mask(),
            logprobs=experience.passes.logprobs - 70.0 * ~experience.mask(),
        ),
    )
    options: dict[str, Any] = {"calibration": Calibration(), "settings": config}
    plain = measures(experience, experience.passes.values, **options)
    assert measures(spoilt, experience.passes.values, **options) == pytest.approx(plain)
    assert plain["length"] == 2.25 and plain["eos_rate"] == 0.75


def test_answers_that_count_the_same_tell_nothing_whatever_they_were_given() -> None:
    clipped = given(raw=torch.tensor([3.0, 4.0, 0.5, 0.5]), scores=torch.tensor([1.5, 1.5, 0, -1]))
    assert same_rewards(clipped) == 0.5
    alone = replace(clipped, taught=torch.tensor([True, True, True, False]))
    assert same_rewards(alone) == 1


def test_a_cut_answer_scores_exactly_the_penalty_or_its_own_or_goes_on() -> None:
    raw, ended = torch.tensor([3.0, 5.0, 99.0]), torch.tensor([True, False, True])
    options: dict[str, Any] = {"mean": 1.0, "std": 2.0}
    penalty = final_scores(raw, ended, settings=settings(truncated="penalty"), **options)
    assert penalty.tolist() == [1.0, -1.0, 5.0]  # the last one is clipped
    own = final_scores(raw, ended, settings=settings(truncated="score"), **options)
    assert own.tolist() == [1.0, 2.0, 5.0]
    goes_on = final_scores(raw, ended, settings=settings(truncated="bootstrap"), **options)
    assert goes_on.tolist() == [1.0, 0.0, 5.0]


def test_bootstrapping_adds_the_value_behind_a_cut_answer_and_no_other() -> None:
    config = settings(truncated="bootstrap", whiten=False, lam=1.0, critic_warmup=0)
    found = estimate(given(), beta=0.0, settings=config)
    without = estimate(
        given(), beta=0.0, settings=settings(truncated="score", whiten=False, lam=1.0)
    )
    difference = found.returns - without.returns
    assert difference[:3].abs().max() == 0
    assert difference[3].tolist() == pytest.approx([0.5, 0.5, 0.5])
    silent = given(taught=torch.tensor([True, False, True, True]))
    beside = estimate(silent, beta=0.0, settings=config)
    assert not beside.returns[1].any() and torch.equal(beside.returns[3], found.returns[3])


def test_sampler_and_trainer_that_agree_weigh_1_and_a_gap_is_measured() -> None:
    experience = given()
    agreed = replace(
        experience,
        rollouts=replace(experience.rollouts, sampler_logprobs=experience.passes.logprobs),
    )
    config = settings(importance_cap=2.0)
    assert torch.equal(sampler_weights(agreed, settings=config), torch.ones(4, 3))
    weights = sampler_weights(experience, settings=config)[experience.mask()]
    assert float(weights.max()) <= 2 and float(weights.std()) > 0
    assert not (sampler_weights(experience, settings=settings()) - 1).any()
    found = measures(
        experience, experience.passes.values, calibration=Calibration(), settings=config
    )
    assert found["sampler_gap"] > 0.1


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_sampler_that_pads_on_the_left_and_the_scorer_that_pads_on_the_right_agree(
    tmp_path: Path, architecture: str
) -> None:
    run = trainer(model_settings(save_tiny(tmp_path / "model", architecture)), tmp_path)
    questions = run.online.questions
    assert len({len(q.ids) for q in questions}) > 1
    with run.roles.role(POLICY) as model:
        drawn = rollout(
            model, run.online.tokenizer, questions,
            settings=sampling(run.settings, n=2), seed=0,
        )  # fmt: skip
    scored = passes(run.roles, drawn, settings=run.settings)
    assert torch.allclose(scored.logprobs, drawn.sampler_logprobs, atol=2e-5)
    # And each row alone, without any padding.
    for i in (0, 7):
        row = drawn.rows[i]
        ids = torch.tensor([[*row.prompt, *row.completion]])
        mask = torch.arange(ids.shape[1])[None] >= len(row.prompt)
        with run.roles.role(POLICY) as model, torch.no_grad():
            alone = token_logprobs(model, input_ids=ids, response_mask=mask)[0, len(row.prompt) :]
        assert torch.allclose(scored.logprobs[i, : len(row.completion)], alone, atol=2e-5)


def test_the_end_of_turn_counts_whether_it_is_the_padding_or_not(
    tiny: Model, tmp_path: Path
) -> None:
    """Same rollouts, same numbers, a gradient; nothing stands behind an end of turn."""
    found, gradients = [], []
    for pad in ("<|pad|>", None):
        run = trainer(tiny, tmp_path / str(pad), max_new_tokens=12)
        tokenizer = run.online.tokenizer
        tokenizer.pad_token = tokenizer.eos_token if pad is None else tokenizer.pad_token
        likely_to_end(run.roles.model, tokenizer.eos_token_id)
        experience, samples = run.experience(run.questions(0), 0)
        found.append(experience)
        assert 2 < int(experience.rollouts.ended.sum()) < len(samples)
        for row, ended in zip(
            experience.rollouts.rows, experience.rollouts.ended.tolist(), strict=True
        ):
            assert (row.completion[-1] == tokenizer.eos_token_id) == ended
            assert tokenizer.eos_token_id not in row.completion[:-1]
        assert all(tokenizer.eos_token not in s.text for s in samples)
        counted = experience.rollouts.response_mask().sum(-1).tolist()
        assert counted == [len(row.completion) for row in experience.rollouts.rows]
        # Only the end of turn of the first answer that has one is learnt from.
        i = experience.rollouts.ended.tolist().index(True)
        mask = torch.zeros_like(experience.mask())
        mask[i, len(experience.rollouts.rows[i].completion) - 1] = True
        alone = Estimated(advantages=mask.float(), returns=mask.float())
        lesson = lesson_of(experience, alone, settings=run.settings)
        flat = lesson.of([i], experience.mask(), device=torch.device("cpu"))
        run.learner.totals = {key: torch.zeros(()) for key in MEASURED}
        run.learner.accumulate([experience.rollouts.rows[i]], flat, warming=False)
        gradients.append([p.grad for p in run.roles.parameters(POLICY)])
    one, other = found
    assert torch.equal(one.passes.logprobs, other.passes.logprobs)
    assert torch.equal(one.scores, other.scores)
    assert any(g is not None and bool(g.any()) for g in gradients[0])
    assert all(map(torch.equal, *gradients))


def reward_folder(model: Model, lora: Lora, folder: Path, *, mean: float, std: float) -> Path:
    trained(model, lora).save_pretrained(folder)
    write_json(folder / "reward.json", {"mean": mean, "std": std})
    return folder


@pytest.mark.parametrize("told", [{}, {"mean": "high", "std": 1.0}, {"mean": 0.0, "std": None}])
def test_a_reward_model_that_does_not_say_how_its_scores_spread_is_one_line(
    tiny: Model, lora: Lora, tmp_path: Path, told: dict[str, Any]
) -> None:
    folder = reward_folder(tiny, lora, tmp_path / "reward", mean=0.0, std=1.0)
    write_json(folder / "reward.json", told)
    with pytest.raises(StageError, match=r"reward\.json: no calibration .*remove its artifact"):
        trainer(tiny, tmp_path, online(tiny, reward_model=folder), reward="role")


def test_a_value_that_starts_as_the_reward_gives_its_score_behind_the_end(
    tiny: Model, lora: Lora, tmp_path: Path
) -> None:
    folder = reward_folder(tiny, lora, tmp_path / "reward", mean=0.7, std=2.5)
    run = trainer(tiny, tmp_path, online(tiny, reward_model=folder), reward="role", value="adapter")
    experience, samples = run.experience(run.questions(0), 0)
    rows = experience.rollouts.rows
    with torch.no_grad():
        behind = last_value(run.roles, rows)
    raw = torch.tensor(RoleReward(run.roles).scores(samples))
    assert torch.allclose(behind, (raw - 0.7) / 2.5, atol=1e-4)
    # Rewards that are left as they are, are foreseen as they are.
    plain = trainer(
        tiny, tmp_path / "raw", online(tiny, reward_model=folder), reward="role", value="adapter",
        calibrate=False,
    )  # fmt: skip
    with torch.no_grad():
        assert torch.allclose(last_value(plain.roles, rows), raw, atol=1e-4)
    # Beside it stands the policy's adapter, and its file names the base all the same.
    run.roles.save(POLICY, tmp_path / "saved")
    assert read_json(tmp_path / "saved" / CONFIG)["base_model_name_or_path"] == tiny.name
    assert len(run.roles.parameters(VALUE)) > 2 and run.roles.parameters("reward") == []


@pytest.mark.parametrize("reader", ["reward", "value"])
def test_the_end_of_a_row_is_told_by_its_length_whatever_token_stands_there(
    tiny: Model, lora: Lora, reader: str
) -> None:
    """Rows are padded with token 0, and one of their own may end in it, or hold it."""
    draw = torch.Generator().manual_seed(0)
    roles = Roles(load_model(tiny))
    roles.add(VALUE, settings=lora, seed=0, head=Head(torch.randn(64, generator=draw), bias=0.5))
    for parameter in roles.adapter_parameters(VALUE):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    answers = [(9, 1), (9, 0), (8, 0, 0), (0, 8, 1), (9, 0, 0, 8, 7, 1)]
    rows = [Row(prompt=(5, 0, 6, 7), completion=answer) for answer in answers]
    with torch.no_grad():
        if reader == "reward":
            samples = [given_ids(row) for row in rows]
            found = torch.tensor(RoleReward(roles, role=VALUE).scores(samples))
        else:
            found = last_value(roles, rows)
        for row, value in zip(rows, found.tolist(), strict=True):
            with roles.role(VALUE) as model:
                hidden = last_hidden(model, torch.tensor([[*row.prompt, *row.completion]]))[0]
            *elsewhere, end = roles.head(VALUE)(hidden).tolist()
            assert value == pytest.approx(end, abs=1e-4)
            assert min(abs(other - value) for other in elsewhere) > 0.01


def given_ids(row: Row) -> Sample:
    return Sample(
        prompt=prompts(1)[0], text="", prompt_ids=tuple(row.prompt),
        completion_ids=tuple(row.completion), finish="eos",
    )  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_an_implicit_reward_is_the_same_whoever_asked_the_base(
    tiny: Model, lora: Lora, tmp_path: Path, temperature: float
) -> None:
    """At temperature 1 the reference has said what the reward needs, else it is asked again."""
    run = trainer(tiny, tmp_path, temperature=temperature)
    run.roles.add("reward", settings=lora, seed=3)
    for parameter in run.roles.parameters("reward"):
        parameter.data += 0.1
    run.source = RoleReward(run.roles, beta=0.5)
    experience, samples = run.experience(run.questions(0), 0)
    assert all(s.base_logprob is None for s in samples)
    assert experience.raw.tolist() == pytest.approx(run.source.scores(samples), abs=1e-4)
    assert float(experience.raw.std()) > 0.01


def test_the_calibration_is_measured_once_on_the_reference_and_frozen(
    tiny: Model, lora: Lora, tmp_path: Path
) -> None:
    run = trainer(tiny, tmp_path, iterations=2)
    first = run.calibration
    few = calibration_questions(run.online, samples=2)
    assert len(few) == len(run.online.questions)
    with run.roles.role("reference") as model:
        drawn = rollout(
            model, run.online.tokenizer, few, settings=sampling(run.settings, n=2),
            seed=derived(
                0, "calibrate"
            ),
        )  # fmt: skip
    raw = run.source.scores(samples_of(drawn, few, run.online.tokenizer))
    scored = (torch.tensor(raw) - first.mean) / first.std
    assert float(scored.mean()) == pytest.approx(0, abs=1e-5)
    assert float(scored.std()) == pytest.approx(1, abs=1e-5)
    run.iterate(0)
    assert run.calibration == first
    again = trainer(tiny, tmp_path, iterations=2)  # goes on from the checkpoint
    assert again.iteration == 1 and again.calibration == first
    saved = reward_folder(tiny, lora, tmp_path / "reward", mean=0.7, std=2.5)
    by_role = trainer(
        tiny, tmp_path / "role", online(tiny, reward_model=saved), reward="role"
    ).calibration
    assert (by_role.mean, by_role.std) == (0.7, 2.5)


def test_rewards_that_never_differ_are_one_line() -> None:
    with pytest.raises(StageError, match="all 1, so there is nothing to learn from"):
        calibrated([1.0, 1.0, None, 1.0], name="x:y")
    with pytest.raises(StageError, match="only 1"):
        calibrated([1.0, None], name="x:y")


def test_ranks_sample_disjoint_prompts_and_together_what_one_would(
    tiny: Model, tmp_path: Path
) -> None:
    whole = trainer(tiny, tmp_path)
    asked = whole.questions(0)
    alone, _ = whole.experience(asked, 0)
    parts = []
    for index in range(2):
        run = trainer(tiny, tmp_path / str(index))
        run.ranks = Ranks(index=index, count=2, device=torch.device("cpu"))
        part, samples = run.experience(asked, 0)
        parts.append((part, {s.prompt.id for s in samples}))
    assert not parts[0][1] & parts[1][1]
    together = [row for part, _ in parts for row in part.rollouts.rows]
    assert together == list(alone.rollouts.rows)
    groups = torch.cat([part.rollouts.groups for part, _ in parts])
    assert torch.equal(groups, alone.rollouts.groups)


def test_an_answer_that_is_empty_is_scored_and_learnt_from(tiny: Model, tmp_path: Path) -> None:
    run = trainer(tiny, tmp_path)
    experience, _ = run.experience(run.questions(0), 0)
    rows = list(experience.rollouts.rows)
    rows[0] = Row(prompt=rows[0].prompt, completion=(run.online.tokenizer.eos_token_id,))
    drawn = replace(experience.rollouts, rows=rows)
    assert samples_of(drawn, run.questions(0), run.online.tokenizer)[0].text == ""
    seen = passes(run.roles, drawn, settings=run.settings)
    again = replace(experience, rollouts=drawn, passes=seen)
    assert estimate(again, beta=0.1, settings=run.settings).advantages.isfinite().all()


def test_a_part_of_the_distribution_is_warned_of(
    tiny: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trainer(tiny, tmp_path, top_p=0.9)
    announce(run.online, run.source, run.calibration, settings=run.settings)
    assert "the ratio is biased" in capsys.readouterr().err
