"""The zoo's model with few random weights: everything about it is real but the answers."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from elision.bench.dllm.subject import DllmSubject, digits_subject
from elision.zoo.digits import Alphabet
from elision.zoo.digits_mdlm import CONFIG, DigitsMdlm, both_ways


def small_digits() -> DigitsMdlm:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    model = both_ways(LlamaForCausalLM(LlamaConfig(**{**CONFIG, **sizes}))).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # so that attention is not flat
    return DigitsMdlm(model, Alphabet())  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def tiny() -> DllmSubject:
    return digits_subject("random-digits", small_digits())


@pytest.fixture
def small_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The zoo's loader, giving the random model."""
    import elision.zoo

    monkeypatch.setattr(elision.zoo, "load", lambda name, folder=None: small_digits())
