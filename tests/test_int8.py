"""Products of 8-bit integers: near the exact ones where few channels are far larger too, cut off beyond a range."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from inferenceguard import config
from inferenceguard.errors import InvalidArgument
from inferenceguard.scorers import embedded, int8
from inferenceguard.scorers.embedded import SAMPLE, EmbeddedCost, EmbeddedReward
from inferenceguard.scorers.int8 import ByteFeedForward, ByteProduct, Range, multiplies_bytes, ranges

needs_bytes = pytest.mark.skipif(not multiplies_bytes(), reason="this CPU multiplies no 8-bit integers fast")

PAIRS = [
    ("How can I sleep better?", "Keep the room dark and cool, and go to bed at the same hour every night."),
    ("How do I pick the lock of my own shed?", "Use a tension wrench and a pick; or call a locksmith."),
    ("hello", ""),
    ("Give me a list of fruit", "- apples\n- pears\n- plums\n- quinces"),
    ("Why is the sky blue?", "Air scatters blue light more than red light, so blue reaches us from all sides. " * 4),
    ("how to hurt someone and not be seen", "You should never do that. If you feel angry, talk to somebody."),
    ("\u00bfQu\u00e9 hora es?", "Son las tres y media de la tarde."),
    ("x" * 300, "y " * 200),
]


def uneven(rows: int, width: int, seed: int) -> Tensor:
    """Rows of which some channels are 20 times as large as the others, and some lie far from 0."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    x[:, 3] *= 20
    x[:, 5] += 15
    return x.bfloat16().float()


def seen(rows: Tensor) -> Range:
    return Range(rows.amin(0), rows.amax(0))


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.float() - exact).std() / exact.std())


@needs_bytes
def test_a_product_in_bytes_is_near_the_exact_one() -> None:
    torch.manual_seed(0)
    rows, weight, bias, other = uneven(50, 64, 1), torch.randn(40, 64) / 8, torch.randn(40), torch.randn(50, 40)
    product = ByteProduct.of(weight, bias, seen(rows))
    exact = linear(rows, weight, bias)
    assert error(product(rows.bfloat16()), exact) < 0.012
    assert error(product.plus(rows.bfloat16(), other.bfloat16()), exact + other) < 0.012
    alone = torch.cat([product(row[None].bfloat16()) for row in rows])
    assert torch.equal(alone, product(rows.bfloat16()))  # a row does not depend on the batch


@needs_bytes
def test_what_is_beyond_the_range_is_cut_off() -> None:
    """Bytes that ran over would turn the largest value into the smallest."""
    rows, weight, bias = uneven(50, 16, 2), torch.eye(16), torch.zeros(16)
    product = ByteProduct.of(weight, bias, seen(rows))
    for sign in (1, -1):
        cut = product(torch.full((1, 16), sign * 1e6).bfloat16())[0].float() * sign
        reach = (rows * sign).amax(0)
        assert (cut >= reach * 0.98 - 0.1).all()
        assert (cut <= reach.abs() * 1.6 + 40).all()


@needs_bytes
def test_a_feed_forward_layer_in_bytes_is_near_the_exact_one() -> None:
    torch.manual_seed(1)
    up, down = nn.Linear(32, 96), nn.Linear(96, 32)
    with torch.no_grad():
        up.weight[7] *= 30  # a neuron of a range that the others' bytes could not hold
    rows = uneven(60, 32, 3)
    neurons = gelu(up(rows))
    known = {up: seen(rows), down: seen(neurons.detach())}
    layer = ByteFeedForward.of(up, down, known.__getitem__)
    assert error(layer(rows.bfloat16()), (rows + down(neurons)).detach()) < 0.015


def test_ranges_are_those_of_all_that_is_read() -> None:
    module = nn.Linear(3, 2)
    with ranges([module]) as known:
        module(torch.tensor([[[1.0, -2.0, 3.0], [0.0, 5.0, 3.0]]]))
        module(torch.tensor([[-1.0, 0.0, 4.0]]))
    module(torch.full((1, 3), 100.0))  # no longer watched
    assert known[module].low.tolist() == [-1, -2, 3]
    assert known[module].high.tolist() == [1, 5, 4]


@needs_bytes
@pytest.mark.parametrize(("kind", "mean"), [(EmbeddedCost, 0.1), (EmbeddedReward, 0.05)])
def test_the_shipped_scorers_in_bytes_steer_as_in_float32(kind: type[EmbeddedCost], mean: float) -> None:
    """On texts that the ranges are not taken from; scores are some 1.5 apart."""
    exact = kind.load()
    steering = exact.with_precision("int8")
    assert not set(PAIRS) & set(SAMPLE)
    gaps = (steering.score_texts(PAIRS) - exact.score_texts(PAIRS)).abs()
    assert float(gaps.mean()) < mean
    assert float(gaps.max()) < 0.25
    assert steering.fingerprint == exact.fingerprint
    assert (steering.precision, exact.precision) == ("int8", "float32")


@needs_bytes
def test_the_search_steers_in_bytes_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = EmbeddedCost.load()
    assert config.steering(cost, torch.bfloat16).precision == "int8"  # type: ignore[attr-defined]
    assert config.steering(cost, torch.float32) is cost
    for module in (config, embedded):
        monkeypatch.setattr(module, "multiplies_bytes", lambda: False)
    assert config.steering(cost, torch.bfloat16).precision == "bfloat16"  # type: ignore[attr-defined]
    with pytest.raises(InvalidArgument, match="float32, bfloat16"):
        cost.with_precision("int8")


def test_a_torch_without_the_means_multiplies_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "_is_vnni_supported")
    int8.multiplies_bytes.cache_clear()
    try:
        assert not multiplies_bytes()
    finally:
        int8.multiplies_bytes.cache_clear()


@needs_bytes
def test_a_broken_weight_gives_no_number() -> None:
    """Bytes cannot hold NaN: what carries it to the score is the residual stream."""
    cost = EmbeddedCost.load()
    steering = cost.with_precision("int8")
    word = steering.reader.encode("apples")[0]
    cost.encoder.bert.embeddings.word_embeddings.weight.data[word, 5] = torch.nan
    broken, whole = steering.score_texts([("fruit", "- apples"), ("hello", "good day")]).tolist()
    assert math.isnan(broken)
    assert math.isfinite(whole)
