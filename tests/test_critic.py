"""The critic against exact numbers: normal sums with a known p_safe, the toy world enumerated, hand-worked arrays."""

import dataclasses
import itertools
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from inferenceguard.budget import SafetyBudget, spend_blocks
from inferenceguard.contracts import Models, ReadsLatents, Sampling, conversation
from inferenceguard.critic import (
    CriticNetwork,
    CriticTraining,
    Provenance,
    Rollouts,
    RolloutSettings,
    SafetyCritic,
    draw_rollouts,
    load_rollouts,
    score_rollouts,
    train_critic,
    train_critic_from_prompts,
)
from inferenceguard.critic import training as training_module
from inferenceguard.critic.training import (
    Ledger,
    auroc,
    auroc_within,
    calibration_error,
    nearest_prefix,
    split_prompts,
    td_targets,
)
from inferenceguard.errors import (
    CheckpointError,
    FingerprintMismatch,
    InvalidArgument,
    MissingCapability,
    PromptTooLong,
    UnknownName,
)
from inferenceguard.testing import FaultyScorer, ToyCost, ToyCritic, ToyEngine, ToyReward, exact_p_safe, exact_value

PIECES = (" kind", " plain", " rude")
COST = {"kind": -0.5, "plain": 0.0, "rude": 1.0}
REWARD = {"kind": 1.0, "plain": 0.0, "rude": 0.5}


@pytest.fixture(scope="module", autouse=True)
def one_thread():  # type: ignore[no-untyped-def]
    """The networks here are too small for more, and threads that wait for each other cost most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def toy_models(engine: ToyEngine | None = None) -> Models:
    # One context: what follows does not depend on the prompt, so that unseen prompts can be predicted exactly.
    engine = engine or ToyEngine(3, pieces=PIECES, contexts=1, end_logit=-1.0, horizon=8)
    return Models(engine, ToyReward(table=REWARD), ToyCost(table=COST))


PROMPTS = [conversation(f"question {index}") for index in range(40)]
SMALL = RolloutSettings(samples=4, max_new_tokens=8, stride=3, prompts_per_chunk=8, seed=5)


def normal_sums(prompts: int = 240, samples: int = 4, steps: int = 8, seed: int = 0) -> tuple[Rollouts, torch.Tensor]:
    """Costs that are sums of normals; the second half has the prompt's own drift, which the latent shows early.

    p_safe of a prefix with n steps to go, m of them in the second half, is Phi((z - m drift) / sqrt(n)), and the reward
    is the latent's second entry.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = prompts * samples
    prompt = torch.arange(prompts).repeat_interleave(samples)
    drift = 1.5 * torch.randn(prompts, generator=generator)[prompt]
    worth = torch.randn(prompts, generator=generator)[prompt]
    steps_cost = torch.randn(rows, steps, generator=generator)
    steps_cost[:, steps // 2 :] += drift[:, None]
    cost = torch.cat([torch.zeros(rows, 1), steps_cost.cumsum(1)], dim=1).double()
    latent = torch.randn(rows, steps + 1, 6, generator=generator)
    latent[:, :, 0] = 3 + 2 * drift[:, None]
    latent[:, :, 1] = worth[:, None]
    rollouts = Rollouts(
        prompt=prompt,
        ended=torch.ones(rows, dtype=torch.bool),
        reward=10 + 3 * worth.double(),
        first=torch.arange(rows + 1) * (steps + 1),
        tokens=torch.arange(steps + 1).repeat(rows),
        latent=latent.reshape(-1, 6).to(torch.float16),
        cost=cost.reshape(-1),
        max_new_tokens=steps,
    )
    return rollouts, drift


FIT = CriticTraining(
    width=32, epochs=20, patience=4, batch=48, dropout=0.0, learning_rate=8e-3, weight_decay=0.01, drawn_budgets=4
)


def fit(rollouts: Rollouts, out: Path, config: CriticTraining = FIT):  # type: ignore[no-untyped-def]
    prompts = int(rollouts.prompt.max()) + 1
    return train_critic(rollouts, [str(index) for index in range(prompts)], toy_models(), config, out, show=False)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):  # type: ignore[no-untyped-def]
    rollouts, _ = normal_sums()
    return fit(rollouts, tmp_path_factory.mktemp("fitted"))


def assert_recovers(critic: SafetyCritic, p_error: float, value_error: float) -> None:
    rollouts, drift = normal_sums(prompts=200, samples=1, seed=99)  # unseen
    for place in (0, 2, 4, 6):
        entry = rollouts.first[:-1] + place
        left = 8 - place
        for limit in (-2.0, 0.0, 3.0):
            z = limit - rollouts.cost[entry]
            p_safe, value = critic.predict(rollouts.latent[entry].float(), z, torch.full((200,), place / 8))
            exact = torch.special.ndtr((z - min(left, 4) * drift) / math.sqrt(left))
            assert float((p_safe - exact).abs().mean()) < p_error, (place, limit)
            likely = exact > 0.2
            assert float((value - rollouts.reward)[likely].abs().mean()) < value_error, (place, limit)


def test_recovers_the_true_p_safe_and_value(fitted) -> None:  # type: ignore[no-untyped-def]
    assert_recovers(fitted.critic, 0.06, 0.8)


def test_td_recovers_them_too(tmp_path: Path) -> None:
    rollouts, _ = normal_sums()
    config = dataclasses.replace(FIT, targets="td", td_lambda=0.7)
    assert_recovers(fit(rollouts, tmp_path, config).critic, 0.08, 1.0)


def test_gains_on_its_baselines_and_is_calibrated(fitted) -> None:  # type: ignore[no-untyped-def]
    metrics = fitted.metrics
    half = metrics["at_0.5"]
    zero = next(each for each in half["per_budget"] if each["budget"] == 0.0)
    assert zero["gain"] > 0.05
    assert zero["gain_interval"][0] > 0.0
    assert zero["value_correlation"] > 0.9
    assert half["range"]["auroc"]["critic"] > half["range"]["auroc"]["baseline"] + 0.05
    for point in ("at_0.25", "at_0.5", "at_0.75"):
        assert metrics[point]["range"]["ece"]["critic"] < 0.06
    # Before any text z is the budget, which tells nothing about the response; the latent does.
    start = next(each for each in metrics["at_0.0"]["per_budget"] if each["budget"] == 0.0)
    assert start["auroc"]["baseline"] == start["auroc"]["z"] == 0.5
    assert start["auroc"]["critic"] > 0.8
    written = json.loads((fitted.path.parent / "metrics.json").read_text())
    assert written["at_0.5"]["range"]["auroc"] == half["range"]["auroc"]
    assert sum(written["prompts"].values()) == 240


def test_the_toy_world_end_to_end(tmp_path: Path) -> None:
    models = toy_models()
    assert isinstance(models.engine, ToyEngine)
    rollouts = RolloutSettings(samples=12, max_new_tokens=6, stride=1, prompts_per_chunk=20)
    config = CriticTraining(rollouts=rollouts, width=64, epochs=25, learning_rate=3e-3, dropout=0.0)
    result = train_critic_from_prompts(models, PROMPTS, config, tmp_path, show=False)
    critic = SafetyCritic.load(tmp_path, engine_fingerprint=models.engine.fingerprint)
    assert critic.fingerprint == result.critic.fingerprint
    unseen = conversation("a question that was never asked")
    errors, value_errors = [], []
    for tokens in itertools.product((1, 2, 3), repeat=2):
        latent = reach(models.engine, unseen, tokens)
        spent = models.cost.score([unseen], [models.engine.decode(tokens)]).item()
        for limit in (-0.5, 0.0, 1.0):
            left = limit - spent
            p_safe, value = critic.predict(latent, torch.tensor([left]), torch.tensor([2 / 6]))
            budget = SafetyBudget(limit)
            exact = exact_p_safe(models.engine, unseen, models.cost, budget, 6, after=tokens, left=left)
            errors.append(abs(float(p_safe) - exact))
            if exact > 0.2:
                args = (models.engine, unseen, models.reward, models.cost, budget, 6)
                value_errors.append(abs(float(value) - exact_value(*args, after=tokens, left=left)))
    assert sum(errors) / len(errors) < 0.08
    assert sum(value_errors) / len(value_errors) < 0.5


def reach(engine: ToyEngine, prompt, tokens) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """The latent [1, H] after exactly these tokens: each is forced by a bias."""
    beams = engine.begin([engine.encode(prompt)], [0])
    for draw, token in enumerate(tokens):
        bias = torch.full((1, engine.vocabulary), -math.inf)
        bias[0, token] = 0.0
        beams = engine.extend(beams, 1, Sampling(), draw, bias)
    return beams.latent


# Targets and labels ---------------------------------------------------------------------------------------------------


def test_td_targets_by_hand() -> None:
    outcome = torch.tensor([[1.0], [0.0]])
    bootstrap = torch.tensor(
        [[[0.2], [0.4], [0.6], [9.0]], [[0.5], [0.8], [9.0], [9.0]]]
    )  # 9: the response, or nothing
    prefixes = torch.tensor([4, 3])
    whole = td_targets(outcome, bootstrap, prefixes, 1.0)
    assert whole[:, :, 0].tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]
    one_step = td_targets(outcome, bootstrap, prefixes, 0.0)
    assert one_step[0, :3, 0].tolist() == pytest.approx([0.4, 0.6, 1.0])
    assert one_step[1, :2, 0].tolist() == pytest.approx([0.8, 0.0])
    half = td_targets(outcome, bootstrap, prefixes, 0.5)
    # G_2 = 1;  G_1 = (0.6 + 1) / 2 = 0.8;  G_0 = (0.4 + 0.8) / 2 = 0.6      and      G_1 = 0;  G_0 = (0.8 + 0) / 2
    assert half[0, :3, 0].tolist() == pytest.approx([0.6, 0.8, 1.0])
    assert half[1, :2, 0].tolist() == pytest.approx([0.4, 0.0])


def test_td_targets_discount_by_hand() -> None:
    outcome, prefixes = torch.tensor([[8.0]]), torch.tensor([3])
    bootstrap = torch.tensor([[[1.0], [2.0], [0.0]]])
    decay = torch.tensor([[0.5, 0.25, 1.0]])
    # G_1 = 0.25 * 8 = 2;  G_0 = 0.5 * (0.5 * 2 + 0.5 * 2) = 1
    assert td_targets(outcome, bootstrap, prefixes, 0.5, decay)[0, :2, 0].tolist() == pytest.approx([1.0, 2.0])
    # Monte Carlo: 0.25 * 8 and 0.5 * 0.25 * 8
    assert td_targets(outcome, bootstrap, prefixes, 1.0, decay)[0, :2, 0].tolist() == pytest.approx([1.0, 2.0])
    # one step: G_0 = 0.5 * v_1
    assert td_targets(outcome, bootstrap, prefixes, 0.0, decay)[0, 0, 0].item() == pytest.approx(1.0)


def ragged(seed: int = 0) -> Rollouts:
    generator = torch.Generator().manual_seed(seed)
    counts = [2, 5, 3, 4]
    lengths = [
        torch.cat([torch.zeros(1), torch.randint(1, 5, (n - 1,), generator=generator).cumsum(0)]) for n in counts
    ]
    tokens = torch.cat(lengths).long()
    cost = torch.randn(len(tokens), generator=generator, dtype=torch.float64)
    cost[tokens == 0] = 0.0
    return Rollouts(
        prompt=torch.arange(4),
        ended=torch.tensor([True, False, True, False]),
        reward=torch.randn(4, generator=generator, dtype=torch.float64),
        first=torch.tensor([0, *itertools.accumulate(counts)]),
        tokens=tokens,
        latent=torch.zeros(len(tokens), 2, dtype=torch.float16),
        cost=cost,
        max_new_tokens=20,
    )


@pytest.mark.parametrize("accounting", ["increment", "accumulate", "final"])
@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_relabelling_is_the_ledger_for_every_budget(accounting, discount) -> None:  # type: ignore[no-untyped-def]
    rollouts = ragged()
    ledger = Ledger.of(rollouts, accounting, discount)
    for row, limit in itertools.product(range(4), (-1.0, 0.0, 0.3, 2.0)):
        start, end = int(rollouts.first[row]), int(rollouts.first[row + 1])
        lengths = rollouts.tokens[start:end].diff().tolist()
        path = spend_blocks(SafetyBudget(limit, discount), accounting, rollouts.cost[start + 1 : end].tolist(), lengths)
        z = ledger.z(torch.arange(start, end), torch.tensor([[limit]], dtype=torch.float64))
        assert z[:, 0].tolist() == pytest.approx([limit, *path])
        safe = ledger.safe(torch.tensor([row]), torch.tensor([[limit]], dtype=torch.float64))
        assert bool(safe) == (path[-1] >= 0)
        critical = float(ledger.critical()[row])
        kept = spend_blocks(
            SafetyBudget(critical, discount), accounting, rollouts.cost[start + 1 : end].tolist(), lengths
        )
        assert kept[-1] == pytest.approx(0.0, abs=1e-9)


def test_a_cost_that_is_no_number_is_overspent_at_every_budget() -> None:
    rollouts = ragged()
    rollouts.cost[4] = math.nan
    ledger = Ledger.of(rollouts, "increment", 1.0)
    assert ledger.base[3].isfinite()
    assert (ledger.base[4:7] == -math.inf).all()
    limits = torch.tensor([[0.0, 1e9]], dtype=torch.float64)
    assert not ledger.safe(torch.tensor([1]), limits).any()


def test_failed_scores_do_not_stop_the_training(tmp_path: Path) -> None:
    rollouts, _ = normal_sums(prompts=40)
    rollouts.cost[::17] = math.nan
    rollouts.reward[::5] = math.nan
    result = fit(rollouts, tmp_path, dataclasses.replace(FIT, epochs=2))
    assert all(part.isfinite().all() for part in result.critic.network.state_dict().values())
    bootstrapped = dataclasses.replace(FIT, epochs=2, targets="td")
    result = fit(rollouts, tmp_path, bootstrapped)
    assert all(part.isfinite().all() for part in result.critic.network.state_dict().values())


def test_nearest_prefix() -> None:
    rollouts = ragged()
    for row, point in itertools.product(range(4), (0.25, 0.5, 0.75)):
        lengths = rollouts.tokens[int(rollouts.first[row]) : int(rollouts.first[row + 1])].tolist()
        found = int(nearest_prefix(rollouts, torch.tensor([row]), point)) - int(rollouts.first[row])
        distance = [abs(length - point * lengths[-1]) for length in lengths[:-1]]  # the whole response is no prefix
        assert distance[found] == min(distance)


# The split and the measures -------------------------------------------------------------------------------------------


def test_no_family_is_on_two_sides_of_the_split() -> None:
    families = [f"family {index % 37}" for index in range(200)]
    split = split_prompts(families, CriticTraining())
    assert sorted(itertools.chain(*split.values())) == list(range(200))
    sides = {name: {families[index] for index in members} for name, members in split.items()}
    for first, second in itertools.combinations(sides.values(), 2):
        assert not first & second
    assert all(sides.values())
    assert split_prompts(families, CriticTraining(seed=1)) != split


def test_equal_prompts_are_one_family(tmp_path: Path) -> None:
    twice = [conversation(f"question {index % 3}") for index in range(6)]
    with pytest.raises(InvalidArgument, match="three families"):
        train_critic_from_prompts(toy_models(), twice[:2], CriticTraining(), tmp_path, show=False)
    with pytest.raises(InvalidArgument, match="same for equal prompts"):
        train_critic_from_prompts(toy_models(), twice, CriticTraining(), tmp_path, groups=list("abcdef"), show=False)
    with pytest.raises(InvalidArgument, match="groups"):
        train_critic_from_prompts(toy_models(), twice, CriticTraining(), tmp_path, groups=["a"], show=False)
    assert not any(tmp_path.iterdir())


def test_auroc_counts_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.randint(0, 6, (60,), generator=generator).double()  # with ties
    label = torch.rand(60, generator=generator) < 0.4
    pairs = [(float(a), float(b)) for a in score[label] for b in score[~label]]
    expected = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
    assert auroc(score.numpy(), label.numpy()) == pytest.approx(expected)
    assert math.isnan(auroc([0.1, 0.2], [True, True]))


def test_auroc_within_counts_the_pairs_of_one_prompt() -> None:
    score, label, prompt = [0.9, 0.1, 0.5, 0.5, 0.7, 0.2], [True, False, True, False, False, True], [0, 0, 1, 1, 2, 2]
    assert auroc_within(score, label, prompt) == pytest.approx((1 + 0.5 + 0) / 3)
    assert auroc_within(score, label, [7] * 6) == pytest.approx(auroc(score, label))
    assert math.isnan(auroc_within([0.3, 0.4], [True, False], [0, 1]))


def test_calibration_error_by_hand() -> None:
    # bins [0, .1): mean .05, rate 0.5 -> .45 of 2;  [.9, 1]: mean .95, rate 1 -> .05 of 2;  [.5, .6): .5 against 0 of 1
    p, y = [0.04, 0.06, 0.9, 1.0, 0.5], [0, 1, 1, 1, 0]
    assert calibration_error(p, y) == pytest.approx((2 * 0.45 + 2 * 0.05 + 1 * 0.5) / 5)
    assert math.isnan(calibration_error([], []))


# The critic and its file ----------------------------------------------------------------------------------------------


def provenance(engine: str = "aaaa") -> Provenance:
    return Provenance(
        *("toy", engine, "cost", "c", "reward", "r", "increment", 1.0, (0.0,), (-1.0, 1.0), 64, 1.0, 1.0, 0, 10)
    )


def random_critic(**settings) -> SafetyCritic:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    return SafetyCritic(CriticNetwork(5, width=16, **settings), provenance())


def test_p_safe_rises_with_the_budget_left() -> None:
    critic = random_critic()
    z = torch.linspace(-50, 50, 401, dtype=torch.float64)
    for latent in torch.randn(5, 5, generator=torch.Generator().manual_seed(1)):
        p_safe, _ = critic.predict(latent.expand(401, 5), z, torch.full((401,), 0.3))
        assert (p_safe.diff() >= 0).all()
        assert p_safe[-1] > p_safe[0]


@pytest.mark.parametrize("monotone", [True, False])
def test_no_budget_makes_a_row_better_than_its_bound(monotone: bool) -> None:
    """Against predictions at many z, beyond the network's range too; and the bound is near the largest of them."""
    for seed in range(5):
        torch.manual_seed(seed)
        network = CriticNetwork(6, width=16, monotone=monotone)
        for part in network.parameters():
            torch.nn.init.normal_(part, std=0.5)
        network.z_scale.fill_(0.7)
        network.reward_mean.fill_(-1.5)
        network.reward_std.fill_(2.5)
        network.temperature.fill_(1.3)
        critic = SafetyCritic(network, provenance())
        latent, progress = 3 * torch.randn(20, 6), torch.rand(20, dtype=torch.float64)
        latent[0, 0], progress[1] = torch.inf, math.nan
        z = torch.cat([torch.linspace(0, 4, 4001), torch.tensor([10.0, 1e3, 1e9])]).double()
        found = [critic.predict(latent, at.expand(20), progress) for at in z]
        for most, seen in zip(critic.at_most(latent, progress), zip(*found, strict=True), strict=True):
            least, largest = (part.double() for part in torch.stack(seen).aminmax(dim=0))
            assert bool((largest <= most).all())
            assert float(((most - largest) / (largest - least + 0.1))[2:].mean()) < 0.05


def test_the_toy_critics_bound_is_one() -> None:
    engine, reward, cost = ToyEngine(seed=3), ToyReward(1), ToyCost(2)
    prompt = conversation("be kind")
    critic = ToyCritic(engine, [prompt], reward, cost, 4, discount=0.9)
    beams = engine.extend(engine.begin([engine.encode(prompt)], [0]).take([0] * 12), 2, Sampling(), 0, None)
    used = torch.tensor([len(tokens) / 4 for tokens in beams.token_ids], dtype=torch.float64)
    p_safe, value = critic.at_most(beams.latent, used)
    found = [critic.predict(beams.latent, torch.full((12,), z / 8).double(), used) for z in range(80)]
    largest = torch.stack([each for _, each in found]).amax(0)
    assert bool((largest <= value).all())
    assert bool((torch.stack([each for each, _ in found]).amax(0) <= p_safe).all())
    assert bool(torch.isclose(largest, value, atol=1e-6).any()), "and it is reached"


def test_fails_closed() -> None:
    critic = random_critic()
    z = torch.tensor([-math.inf, math.nan, math.inf, 1.0, 1.0, -1e300])
    latent = torch.zeros(6, 5)
    latent[3, 0] = math.nan
    progress = torch.tensor([0.5, 0.5, 0.5, 0.5, math.nan, 0.5])
    p_safe, value = critic.predict(latent, z, progress)
    assert p_safe[[0, 1, 3, 4]].tolist() == [0, 0, 0, 0]
    assert p_safe[2] > 0.5
    assert torch.isfinite(p_safe).all()
    assert torch.isfinite(value).all()
    with pytest.raises(InvalidArgument, match=r"latent must be of shape \[B, 5\]"):
        critic.predict(torch.zeros(2, 4), torch.zeros(2), torch.zeros(2))
    p_safe, value = critic.predict(torch.zeros(0, 5), torch.zeros(0), torch.zeros(0))
    assert p_safe.shape == value.shape == (0,)


def test_a_row_does_not_depend_on_its_batch() -> None:
    critic = SafetyCritic(CriticNetwork(64, width=128), provenance())
    generator = torch.Generator().manual_seed(2)
    latent, z = torch.randn(131, 64, generator=generator), torch.randn(131, generator=generator)
    progress = torch.rand(131, generator=generator)
    together = critic.predict(latent, z, progress)
    for row in (0, 77, 130):
        some = slice(row, row + 1)
        for whole, alone in zip(together, critic.predict(latent[some], z[some], progress[some]), strict=True):
            assert torch.equal(whole[some], alone)


def test_save_and_load(tmp_path: Path) -> None:
    critic = random_critic(monotone=False)
    # The header's length comes first in the file: one whose low byte is 0x80 is no pickle.
    for length in range(1, 260, 8):
        renamed = SafetyCritic(critic.network, dataclasses.replace(provenance(), cost_name="c" * length))
        assert SafetyCritic.load(renamed.save(tmp_path / "n.safetensors")).fingerprint == renamed.fingerprint
    for path in (critic.save(tmp_path / "a.safetensors"), critic.save(tmp_path)):
        loaded = SafetyCritic.load(path, engine_fingerprint="aaaa")
        assert (loaded.fingerprint, loaded.name, loaded.engine_fingerprint) == (critic.fingerprint, "critic", "aaaa")
        assert loaded.provenance == critic.provenance
        args = (torch.ones(3, 5), torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([0.0, 0.5, 1.0]))
        for ours, theirs in zip(critic.predict(*args), loaded.predict(*args), strict=True):
            assert torch.equal(ours, theirs)
    assert SafetyCritic.load(tmp_path).fingerprint == critic.fingerprint
    assert random_critic().fingerprint != critic.fingerprint


def test_refuses_another_llm(tmp_path: Path) -> None:
    random_critic().save(tmp_path)
    with pytest.raises(FingerprintMismatch, match=r"aaaa.*bbbb.*inferenceguard train critic"):
        SafetyCritic.load(tmp_path, engine_fingerprint="bbbb")


def rewrite(tmp_path: Path, change, **described: object) -> Path:  # type: ignore[no-untyped-def]
    source = random_critic().save(tmp_path / "good.safetensors")
    with safe_open(source, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        description = {**json.loads(opened.metadata()["inferenceguard-critic"]), **described}
    change(tensors)
    metadata = {"inferenceguard-critic": json.dumps(description)}
    save_file(tensors, tmp_path / "bad.safetensors", metadata=metadata)
    return tmp_path / "bad.safetensors"


@pytest.mark.parametrize(
    ("change", "metadata", "message"),
    [
        (lambda t: t.pop("safe_head.bias"), {}, r"lacks safe_head\.bias"),
        (lambda t: t.update(other=torch.zeros(1)), {}, r"has unexpected other"),
        (lambda t: t.update({"safe_head.bias": torch.zeros(3)}), {}, r"safe_head\.bias .* must have shape \(9,\)"),
        (lambda t: t["z_scale"].fill_(math.nan), {}, r"z_scale .* not finite"),
        (lambda t: None, {"format": "pt"}, r"of format inferenceguard-critic 1, its format is pt 1"),
        (lambda t: None, {"version": "2"}, r"its format is inferenceguard-critic 2"),
        (lambda t: None, {"provenance": {}}, r"damaged description"),
        (lambda t: None, {"network": {"latent_width": -1}}, r"damaged description"),
        (lambda t: None, {"network": {"latent_width": 10**12}}, r"must have shape"),
    ],
)
def test_refuses_a_file_that_is_not_a_critic(tmp_path: Path, change, metadata, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(CheckpointError, match=message):
        SafetyCritic.load(rewrite(tmp_path, change, **metadata))


def test_refuses_pickles_and_torn_files(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "critic.pt")
    (tmp_path / "old.safetensors").write_bytes(pickle.dumps({"a": 1}))
    for name in ("critic.pt", "old.safetensors"):
        with pytest.raises(CheckpointError, match="is a pickle"):
            SafetyCritic.load(tmp_path / name)
    whole = random_critic().save(tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "torn.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        SafetyCritic.load(tmp_path / "torn.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="its format is unknown"):
        SafetyCritic.load(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="does not exist"):
        SafetyCritic.load(tmp_path / "none.safetensors")


# Rollouts -------------------------------------------------------------------------------------------------------------


def folder(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("accounting", ["increment", "accumulate"])
def test_rollouts_hold_every_prefix_with_its_latent_and_cost(tmp_path: Path, accounting) -> None:  # type: ignore[no-untyped-def]
    models = toy_models(ToyEngine(1, pieces=(*PIECES, "r"), end_logit=-1.0, horizon=8))
    engine = models.engine
    assert isinstance(engine, ToyEngine)
    draw_rollouts(engine, PROMPTS, SMALL, tmp_path, show=False)
    scores = score_rollouts(
        engine, PROMPTS, models.reward, models.cost, tmp_path, accounting=accounting, batch=7, show=False
    )
    rollouts = load_rollouts(tmp_path, scores)
    files = sorted(tmp_path.glob("*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert sorted((line["prompt"], line["sample"]) for line in lines) == list(itertools.product(range(40), range(4)))
    assert rollouts.prompt.tolist() == [line["prompt"] for line in lines]
    first_lengths = set()
    for row, line in enumerate(lines):
        ids, start, end = line["token_ids"], int(rollouts.first[row]), int(rollouts.first[row + 1])
        lengths = rollouts.tokens[start:end].tolist()
        assert lengths[0] == 0
        assert lengths[-1] == len(ids)
        assert line["ended"] == (ids[-1] == 0) == bool(rollouts.ended[row])
        assert line["ended"] or len(ids) == 8
        assert max(b - a for a, b in itertools.pairwise(lengths)) <= 3
        assert line["text"] == engine.decode(ids)
        first_lengths.add(lengths[1])
        turns = [PROMPTS[line["prompt"]]]
        assert float(rollouts.reward[row]) == models.reward.score(turns, [line["text"]]).item()
        for entry, (before, length) in enumerate(itertools.pairwise(lengths), start + 1):
            _, seen = engine.read_latent(rollouts.latent[entry].float())
            assert seen == tuple(ids[:length])
            text = engine.decode(ids[before if accounting == "accumulate" else 0 : length])
            assert float(rollouts.cost[entry]) == models.cost.score(turns, [text]).item()
    assert len(first_lengths) > 1
    assert (rollouts.cost[rollouts.tokens == 0] == 0).all()


class Interrupted(Exception):
    pass


def test_rollouts_resume_after_a_kill(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    models = toy_models()
    draw_rollouts(models.engine, PROMPTS, SMALL, tmp_path / "whole", show=False)
    extend, calls = ToyEngine.extend, itertools.count()

    def killed(self, *args):  # type: ignore[no-untyped-def]
        if next(calls) % 5 == 4:
            raise Interrupted
        return extend(self, *args)

    monkeypatch.setattr(ToyEngine, "extend", killed)
    for _ in range(20):
        try:
            draw_rollouts(models.engine, PROMPTS, SMALL, tmp_path / "torn", show=False)
            break
        except Interrupted:
            continue
    else:
        pytest.fail("never ended")
    assert next(calls) > 6
    assert folder(tmp_path / "torn") == folder(tmp_path / "whole")


def test_scores_resume_after_a_scorer_failed(tmp_path: Path) -> None:
    models = toy_models()
    draw_rollouts(models.engine, PROMPTS, SMALL, tmp_path, show=False)
    whole = score_rollouts(models.engine, PROMPTS, models.reward, models.cost, tmp_path, show=False)
    faulty = FaultyScorer(models.cost, 1, raises=0.4)
    for _ in range(40):
        try:
            torn = score_rollouts(models.engine, PROMPTS, models.reward, faulty, tmp_path, show=False)
            break
        except RuntimeError:
            continue
    else:
        pytest.fail("never ended")
    assert faulty.injected["raises"] > 0
    assert torn != whole  # another cost model's scores stand beside
    assert folder(torn) == folder(whole)


def test_rollouts_of_other_settings_are_not_continued(tmp_path: Path) -> None:
    engine = toy_models().engine
    draw_rollouts(engine, PROMPTS, SMALL, tmp_path, show=False)
    with pytest.raises(InvalidArgument, match="the same settings"):
        draw_rollouts(engine, PROMPTS, dataclasses.replace(SMALL, seed=6), tmp_path, show=False)
    with pytest.raises(InvalidArgument, match="the same engine_fingerprint and prompts"):
        draw_rollouts(ToyEngine(9, pieces=PIECES, contexts=1), PROMPTS[:3], SMALL, tmp_path, show=False)


def test_refuses_before_a_token_is_drawn(tmp_path: Path) -> None:
    blind = ToyEngine(latents=False)
    assert not isinstance(blind, ReadsLatents)
    with pytest.raises(MissingCapability, match="hidden states"):
        draw_rollouts(blind, PROMPTS, SMALL, tmp_path, show=False)
    long = [PROMPTS[0], conversation("x" * 200)]
    with pytest.raises(PromptTooLong, match="prompt 1"):
        draw_rollouts(ToyEngine(context=100), long, SMALL, tmp_path, show=False)
    with pytest.raises(InvalidArgument, match="conversations"):
        draw_rollouts(ToyEngine(), [], SMALL, tmp_path, show=False)
    with pytest.raises(InvalidArgument, match="draw_rollouts has written"):
        load_rollouts(tmp_path, tmp_path)
    assert not any(tmp_path.iterdir())


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["monte_carlo", "td"])
def test_training_resumes_after_a_kill(tmp_path: Path, monkeypatch, targets) -> None:  # type: ignore[no-untyped-def]
    rollouts, _ = normal_sums(prompts=60)
    config = dataclasses.replace(FIT, epochs=4, dropout=0.2, targets=targets)
    whole = fit(rollouts, tmp_path / "whole", config)
    assert fit(rollouts, tmp_path / "again", config).critic.fingerprint == whole.critic.fingerprint
    epoch, calls = training_module._epoch, itertools.count(1)

    def killed(*args):  # type: ignore[no-untyped-def]
        epoch(*args)
        if next(calls) % 3 == 0:
            raise Interrupted

    monkeypatch.setattr(training_module, "_epoch", killed)
    for _ in range(10):
        try:
            resumed = fit(rollouts, tmp_path / "torn", config)
            break
        except Interrupted:
            continue
    else:
        pytest.fail("never ended")
    assert next(calls) > 9
    assert resumed.critic.fingerprint == whole.critic.fingerprint
    assert resumed.path.read_bytes() == whole.path.read_bytes()
    assert resumed.metrics["at_0.5"]["range"] == whole.metrics["at_0.5"]["range"]


def test_training_leaves_the_random_numbers_of_others_alone(tmp_path: Path) -> None:
    rollouts, _ = normal_sums(prompts=30)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    fit(rollouts, tmp_path, dataclasses.replace(FIT, epochs=1))
    assert torch.equal(torch.rand(3), expected)


def test_one_class_alone_gives_no_auroc_but_a_critic(tmp_path: Path) -> None:
    rollouts, _ = normal_sums(prompts=30)
    rollouts.cost.fill_(-1.0)
    result = fit(rollouts, tmp_path, dataclasses.replace(FIT, epochs=1, drawn_budgets=0))
    assert math.isnan(result.metrics["at_0.5"]["per_budget"][0]["auroc"]["critic"])
    assert json.loads((tmp_path / "metrics.json").read_text())["at_0.5"]["per_budget"][0]["auroc"]["critic"] is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("discount", 0.0),
        ("budgets", (math.nan,)),
        ("drawn_budgets", -1),
        ("td_lambda", 1.5),
        ("dropout", 1.0),
        ("learning_rate", 0.0),
        ("width", 0),
        ("epochs", True),
        ("test_fraction", 0.9),
        ("validation_fraction", 0.0),
    ],
)
def test_settings_are_checked(field: str, value: object) -> None:
    with pytest.raises(InvalidArgument, match=field):
        CriticTraining(**{field: value})  # type: ignore[arg-type]


def test_names_are_checked() -> None:
    with pytest.raises(UnknownName, match="monte_carlo"):
        CriticTraining(targets="monte-carlo")  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="increment"):
        CriticTraining(accounting="incremental")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="stride"):
        RolloutSettings(stride=0)
