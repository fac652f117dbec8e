"""Weights of 4-bit checkpoints, told again from bfloat16: the gguf package makes them, float64 multiplies them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from inferenceguard import embedded, product
from inferenceguard.four_bits import FourBits
from inferenceguard.product import FEW, Product

OUT, IN = 48, 160


def four_bit(kind: str, out: int = OUT, inputs: int = IN, seed: int = 0) -> Tensor:
    """A random matrix as a GGUF of this type holds it, loaded in bfloat16."""
    own = gguf.GGMLQuantizationType[kind]
    weight = np.random.default_rng(seed).normal(0, 0.05, (out, inputs)).astype(np.float32)
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight, own), own)).bfloat16()


def rows(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, IN, generator=torch.Generator().manual_seed(seed)).bfloat16()


def made(weight: Tensor) -> FourBits:
    found = FourBits.of(weight)
    assert found is not None
    return found


def read_back(four_bits: FourBits) -> Tensor:
    """The weights [out, in] that it multiplies with: its products with the unit vectors."""
    inputs = 32 * four_bits.steps.shape[0]
    return torch.cat([four_bits(part) for part in torch.eye(inputs).bfloat16().split(4)]).T.float()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_the_weights_of_a_4_bit_gguf_are_told_within_the_bound_that_is_stated(kind: str) -> None:
    weight = four_bit(kind)
    error = (read_back(made(weight)) - weight.float()).view(OUT, -1, 32)
    largest = weight.float().view(OUT, -1, 32).abs().amax(-1)
    # 2^-7 of a group's largest; reading back rounds to bfloat16 once more, by 2^-9 of the weight at most
    assert bool((error.abs().amax(-1) <= (2.0**-7 + 2.0**-9) * largest).all())
    assert float((error.square().mean(-1).sqrt() / largest).mean()) < 2.0**-9


@pytest.mark.parametrize("count", range(1, FEW + 1))
def test_a_product_is_that_of_the_weights(count: int) -> None:
    weight, x = four_bit("Q4_1"), rows(count)
    four_bits = made(weight)
    exact = x.double() @ read_back(four_bits).double().T
    assert four_bits(x[:, None]).shape == (count, 1, OUT)
    torch.testing.assert_close(four_bits(x).double(), exact, rtol=2**-7, atol=2**-8 * float(exact.std()))
    theirs = x.double() @ weight.double().T
    assert float((four_bits(x).double() - theirs).std() / theirs.std()) < 2.0**-7


def test_a_group_that_uses_few_levels_or_one_is_told() -> None:
    weight = four_bit("Q4_1")
    weight[0, :32] = 0.25
    weight[1, :32] = torch.tensor([0.5, -0.5]).repeat(16)
    weight[2, :32] = torch.tensor([0.0, 0.125, 0.25, 0.875]).repeat(8)  # 0, 1, 2 and 7 of eight levels
    weight[3, :32] = 0.0
    torch.testing.assert_close(read_back(made(weight))[:4], weight[:4].float(), rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("row", [0, OUT - 1])
def test_one_weight_on_no_grid_is_enough_to_leave_a_matrix_alone(row: int) -> None:
    weight = four_bit("Q4_1")
    low, high = weight[row, -32:].float().aminmax()
    weight[row, -3] = low + (high - low) * 7.5 / 15
    assert FourBits.of(weight) is None


def test_weights_that_were_never_of_4_bits_are_left_alone() -> None:
    torch.manual_seed(0)
    assert FourBits.of(torch.randn(64, 64).bfloat16()) is None
    assert FourBits.of(four_bit("Q8_0")) is None


def test_other_shapes_and_types_are_left_alone() -> None:
    weight = four_bit("Q4_1", 64, 64)
    assert FourBits.of(weight) is not None
    assert FourBits.of(weight.float()) is None
    assert FourBits.of(weight[:40]) is None
    assert FourBits.of(weight[:, :48]) is None


def test_a_torch_without_the_product_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise AttributeError("_weight_int4pack_mm_for_cpu")

    monkeypatch.setattr(FourBits, "__call__", missing)
    assert FourBits.of(four_bit("Q4_1")) is None


def test_products_of_few_rows_read_4_bits_and_those_of_more_do_not() -> None:
    weight = four_bit("Q4_1")
    whole = Product.of(weight)
    assert whole.four_bits is not None
    few, many, other = rows(FEW), rows(FEW + 1), torch.ones(FEW, OUT).bfloat16()
    assert torch.equal(whole(few), whole.four_bits(few))
    assert torch.equal(whole.plus(few, other), whole.four_bits(few) + other)
    assert torch.equal(whole(many), product.Product(weight, None, whole.packed)(many))
    assert Product.of(weight, torch.ones(OUT).bfloat16()).four_bits is None
    assert Product.of(weight, any_bits=True).four_bits is None


def test_the_embedded_llm_reads_4_bits_and_is_about_as_near_to_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of 48 tokens that are read one by one, against float32's: with 4 bits and without."""
    exact_engine, ours = embedded.load_engine("float32"), embedded.load_engine("bfloat16")
    monkeypatch.setattr(FourBits, "of", classmethod(lambda cls, weight: None))
    without = embedded.load_engine("bfloat16")
    assert ours.transformer.fused is not None
    assert without.transformer.fused is not None
    assert all(layer.down.four_bits and layer.qkv.four_bits for layer in ours.transformer.fused.layers)
    assert not any(layer.down.four_bits for layer in without.transformer.fused.layers)
    ids = ours.tokenizer.encode(
        "The quick brown fox jumps over the lazy dog. In 1969 two people walked on the moon, and a third flew around "
        "it alone; what did he see there? Grey dust, a blue marble and the black of space, he said."
    )[:49]  # fmt: skip

    def read(engine: embedded.TransformersEngine) -> Tensor:
        cache, states = engine.transformer.prefill([ids[:1]])[0], []
        with torch.inference_mode():
            for token in ids[1:]:
                cache, hidden = engine.transformer.read(cache, torch.tensor([[token]]))
                states.append(engine.logits(hidden[:, 0]))
        return torch.cat(states)

    exact, with_bits, plain = read(exact_engine), read(ours), read(without)
    far = [float((logits - exact).std() / exact.std()) for logits in (with_bits, plain)]
    assert far[0] < 0.04, far
    assert far[0] < 1.3 * far[1], far
    assert float((with_bits - plain).std() / exact.std()) < 0.05
