"""Models: the loop equals the model's own pass, checkpoints load, what cannot be served is refused with the reason."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

import elision
from elision import dllm
from elision.dllm.checkpoints import from_llada, llada_name
from elision.errors import OptionError, UnsupportedTarget
from tests.dllm.support import KINDS, MASK, lm_of, prompts, tiny

SMALL: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def own_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """The model's own pass with the causal mask taken away."""
    n = ids.shape[1]
    out: Tensor = model(input_ids=ids, attention_mask=torch.zeros(1, 1, n, n), use_cache=False).logits
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_equals_the_own_forward(kind: str) -> None:
    ids = prompts(3, 11)
    assert torch.allclose(lm_of(kind).logits(ids), own_logits(tiny(kind), ids), atol=2e-5)
    assert (lm_of(kind).heads, lm_of(kind).kv_heads) == (4, 4 if kind == "mha" else 2)


def test_eager_and_moe_models() -> None:
    config = transformers.Qwen3MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ids = prompts(2, 7)
    with torch.no_grad():
        own = own_logits(model, ids)
    assert torch.allclose(dllm.masked_lm(model, mask_id=MASK).logits(ids), own, atol=2e-5)


def test_scaled_rotation() -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, rope_parameters=rope)).eval()
    ids = prompts(1, 9)
    with torch.no_grad():
        assert torch.allclose(dllm.masked_lm(model, mask_id=3).logits(ids), own_logits(model, ids), atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_left_padded_row_equals_its_single_run(kind: str) -> None:
    lm, ids = lm_of(kind), prompts(1, 7)
    padded = torch.cat((torch.full((1, 4), 46), ids), dim=1)
    other = prompts(1, 11, seed=5)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    both = lm.logits(torch.cat((padded, other)), mask)
    assert torch.allclose(both[0, 4:], lm.logits(ids)[0], atol=2e-5)
    assert torch.allclose(both[1], lm.logits(other)[0], atol=2e-5)


def config_of(name: str) -> Any:
    made = {
        "causal": lambda: transformers.LlamaConfig(**SMALL),
        "sliding": lambda: transformers.MistralConfig(**SMALL, sliding_window=8),
        "hybrid": lambda: transformers.Gemma3TextConfig(**SMALL, head_dim=8),
        "multipliers": lambda: transformers.GraniteConfig(**SMALL, residual_multiplier=0.5),
        "norms": lambda: transformers.Olmo2Config(**SMALL),
        "parallel": lambda: transformers.CohereConfig(**SMALL),
        "layout": lambda: transformers.PhiConfig(**SMALL),
    }
    return made[name]()


@pytest.mark.parametrize(
    ("name", "mask_id", "words"),
    [
        ("causal", None, r"declares no mask token.*masked_lm\(model, mask_id=\.\.\.\)"),
        ("sliding", 3, "sliding_window=8.*set sliding_window=None"),
        ("hybrid", 3, "sliding_attention"),
        ("multipliers", 3, "computes something else than a Llama layer"),
        ("norms", 3, "post_feedforward_layernorm"),
        ("parallel", 3, "CohereDecoderLayer has the parts"),
        ("layout", 3, "not in the Llama layout"),
    ],
)
def test_refused(name: str, mask_id: int | None, words: str) -> None:
    model = transformers.AutoModelForCausalLM.from_config(config_of(name)).eval()
    with pytest.raises(UnsupportedTarget, match=words):
        dllm.masked_lm(model, mask_id=mask_id)
    if mask_id is None:
        with pytest.raises(UnsupportedTarget, match=words):
            elision.apply(model, "dkv_cache")


def test_encoder_decoder_is_refused() -> None:
    config = transformers.T5Config(d_model=16, d_kv=4, num_layers=1, num_heads=2, d_ff=8, vocab_size=16)
    for mask_id in (3, None):
        with pytest.raises(UnsupportedTarget, match="encoder–decoder"):
            dllm.masked_lm(transformers.T5ForConditionalGeneration(config), mask_id=mask_id)


def test_a_model_in_training_mode_is_compared_without_dropout() -> None:
    model = copy.deepcopy(tiny("mha")).train()
    model.model.norm.eval()  # a mixed state is left as it was
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    before = [module.training for module in model.modules()]
    dllm.masked_lm(model)
    assert [module.training for module in model.modules()] == before


def test_known_models_that_cannot_be_served_are_refused_by_name() -> None:
    from diffusers import LLaDA2Pipeline

    pipe = LLaDA2Pipeline.__new__(LLaDA2Pipeline)
    with pytest.raises(UnsupportedTarget, match="LLaDA2Pipeline is not supported: LLaDA-2 attends causally between"):
        elision.apply(pipe, "dkv_cache")
    remote = type("LLaDA2MoeModelLM", (nn.Module,), {})()
    with pytest.raises(UnsupportedTarget, match="prefix cache"):
        dllm.masked_lm(remote, mask_id=3)
    gemma = type("DiffusionGemmaForBlockDiffusion", (nn.Module,), {})()
    with pytest.raises(UnsupportedTarget, match=r"DiffusionGemma has no \[MASK\] token"):
        elision.apply(gemma, "elastic_cache_dllm")
    assert transformers.DiffusionGemmaForBlockDiffusion.__name__ == type(gemma).__name__


def test_other_targets_are_refused() -> None:
    with pytest.raises(UnsupportedTarget, match="is no language model"):
        elision.apply(object(), "dkv_cache")
    with pytest.raises(UnsupportedTarget, match=r"elision\.dllm\.load"):
        elision.apply("some/model", "dkv_cache")


def test_mask_id_must_be_in_the_vocabulary() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).eval()
    with pytest.raises(OptionError, match="mask_id=48 is outside the vocabulary of 48"):
        dllm.masked_lm(model, mask_id=48)
    assert dllm.masked_lm(model, mask_id=0).mask_id == 0
    lm = dllm.masked_lm(model, mask_id=1)
    assert dllm.masked_lm(lm) is dllm.masked_lm(lm, mask_id=1, shift=False) is lm
    for other in ({"mask_id": 2}, {"shift": True}):
        with pytest.raises(OptionError, match="was taken in with mask_id=1 and shift=False"):
            dllm.masked_lm(lm, **other)


LLADA = {
    "model.layers.": "model.transformer.blocks.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "self_attn.o_proj": "attn_out",
    "self_attn.": "",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
    "model.embed_tokens": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out",
}
LLADA_CONFIG: dict[str, Any] = {
    "model_type": "llada",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "attention_layer_norm": False,
    "alibi": False,
    "rope": True,
    "d_model": 32,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 2,
    "mlp_hidden_size": 48,
    "vocab_size": 40,
    "embedding_size": 48,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_sequence_length": 128,
    "include_bias": False,
    "include_qkv_bias": False,
    "weight_tying": False,
    "mask_token_id": 47,
}


def llada(bias: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    """A Llama model, and its weights under LLaDA's names."""
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    config = transformers.LlamaConfig(**SMALL, rope_parameters=rope, rms_norm_eps=1e-5, attention_bias=bias)
    model = transformers.LlamaForCausalLM(config).eval()
    renamed = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in LLADA.items():
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    return model, renamed


def test_llada_names() -> None:
    assert llada_name("model.transformer.blocks.3.ff_out.weight") == "model.layers.3.mlp.down_proj.weight"
    assert llada_name("model.transformer.ff_out.weight") == "lm_head.weight"
    assert llada_name("transformer.wte.weight") == "model.embed_tokens.weight"
    for stranger in ("model.transformer.blocks.0.att_proj.weight", "model.transformer.wpe.weight"):
        with pytest.raises(UnsupportedTarget, match=stranger):
            llada_name(stranger)


def write(folder: Path, config: dict[str, Any], weights: dict[str, Tensor], parts: int = 1) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    if parts == 1:
        save_file(weights, folder / "model.safetensors")
        return
    listed = sorted(weights)
    where = {name: f"model-{i % parts}.safetensors" for i, name in enumerate(listed)}
    for file in set(where.values()):
        save_file({name: weights[name] for name in listed if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("parts", [1, 2])
def test_llada_loads_by_path(tmp_path: Path, parts: int) -> None:
    model, weights = llada()
    write(tmp_path, LLADA_CONFIG, weights, parts)
    lm = dllm.load(tmp_path)
    assert (lm.mask_id, lm.shift, lm.vocab) == (47, False, 48)
    ids = prompts(2, 9)
    with torch.no_grad():
        assert torch.allclose(lm.logits(ids), own_logits(model, ids), atol=2e-5)
    assert dllm.load(str(tmp_path), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_llada_object_of_its_own_code() -> None:
    """It is driven through a Llama decoder that shares its weights; the session holds the user's object."""
    model, weights = llada()

    class LLaDAModelLM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(to_dict=lambda: LLADA_CONFIG, mask_token_id=47, model_type="llada")
            self.model = nn.Module()
            self.model.transformer = nn.Module()
            self.model.transformer.blocks = nn.ModuleList()
            self.weights = weights

        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return self.weights

    theirs = LLaDAModelLM()
    lm = dllm.masked_lm(theirs)
    ids = prompts(2, 9)
    with torch.no_grad():
        assert torch.allclose(lm.logits(ids), own_logits(model, ids), atol=2e-5)
    assert lm.model is theirs
    assert lm.embed.weight.data_ptr() == weights["model.transformer.wte.weight"].data_ptr()
    with elision.apply(theirs, "dkv_cache", interval=2) as run:
        run.generate(ids, gen_length=4, steps=4)
    assert run.report().target == "LLaDAModelLM"


def test_llada_with_biases_of_its_projections() -> None:
    model, weights = llada(bias=True)
    names = [name for name in weights if name.endswith("attn_out.bias")]
    for name in names:
        weights.pop(name).zero_()
    made = from_llada({**LLADA_CONFIG, "include_qkv_bias": True}, weights)
    ids = prompts(1, 6)
    with torch.no_grad():
        assert torch.allclose(dllm.masked_lm(made).logits(ids), own_logits(model, ids), atol=2e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block_type": "sequential"}, "block_type='sequential'"),
        ({"attention_layer_norm": True}, "attention_layer_norm=True"),
        ({"alibi": True}, "alibi=True"),
        ({"n_layers": 3}, "lacking model.layers.2"),
        ({"n_layers": 1}, "unknown model.layers.1"),
    ],
)
def test_llada_with_a_twist_is_refused(change: dict[str, Any], words: str) -> None:
    _, weights = llada()
    with pytest.raises(UnsupportedTarget, match=words):
        from_llada({**LLADA_CONFIG, **change}, weights)


def test_dream_loads_by_path(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 1000000.0}
    config = transformers.Qwen2Config(**SMALL, rope_parameters=rope, rms_norm_eps=1e-6)
    model = transformers.Qwen2ForCausalLM(config).eval()
    about = {k: v for k, v in SMALL.items() if v is not None}
    about |= {"model_type": "Dream", "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "mask_token_id": 45}
    write(tmp_path, {**about, "architectures": ["DreamModel"], "use_cache": True}, model.state_dict())
    lm = dllm.load(tmp_path)
    assert (lm.mask_id, lm.shift) == (45, True)
    ids = prompts(2, 9)
    with torch.no_grad():
        assert torch.allclose(lm.logits(ids), own_logits(model, ids), atol=2e-5)
    assert dllm.load(tmp_path, shift=False).shift is False


def test_any_other_checkpoint_loads_with_a_mask_id(tmp_path: Path) -> None:
    model = tiny("qk_norm")
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    lm = dllm.load(tmp_path)
    assert lm.mask_id == MASK
    assert torch.equal(lm.logits(prompts(1, 5)), lm_of("qk_norm").logits(prompts(1, 5)))
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).save_pretrained(tmp_path / "causal")
    with pytest.raises(UnsupportedTarget, match="declares no mask token"):
        dllm.load(tmp_path / "causal")
    assert dllm.load(tmp_path / "causal", mask_id=5).mask_id == 5


@pytest.mark.parametrize("kind", ["llada2_moe", "diffusion_gemma"])
def test_refused_checkpoints(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UnsupportedTarget, match=f"is a {kind} model, which is not supported"):
        dllm.load(tmp_path)


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedTarget, match=r"has no config\.json"):
        dllm.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLADA_CONFIG))
    with pytest.raises(UnsupportedTarget, match=r"has no model\.safetensors"):
        dllm.load(tmp_path)
