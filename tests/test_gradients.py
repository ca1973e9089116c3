"""Encoder gradients by hand: what is measured, disturbed and put aside. Scaling and refusals: methods/test_balm.py."""

from __future__ import annotations

import torch
from methods.test_balm import Foreign, stream

from mmlib.gradients import EncoderGradients, Withheld, only_gradient


def test_the_deviation_of_one_value_is_zero() -> None:
    audio, image, _ = next(stream())
    net = Foreign().double()
    single = EncoderGradients(net, {"a": [(net.ears[0].bias, slice(0, 1))], "b": net.eyes})
    net(audio, image).sum().backward()
    assert single.spreads()[0][0] == 0  # not NaN
    assert single.names == {"a": ["ears.0.bias[slice(0, 1, None)]"], "b": ["eyes.0.weight", "eyes.0.bias"]}


def test_gradients_are_put_aside_and_come_back() -> None:
    audio, image, _ = next(stream())
    net = Foreign().double()
    net(audio, image).sum().backward()
    own = net.out.weight.grad
    aside = Withheld(net.out)
    aside.hold()
    assert net.out.weight.grad is None
    assert net.mix.weight.grad is not None
    aside.give_back()
    assert net.out.weight.grad is own


def test_only_gradient_is_zero_with_a_gradient() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = only_gradient((3 * x).sum())
    y.backward()
    assert y == 0
    assert x.grad.tolist() == [3, 3]
