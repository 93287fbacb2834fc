"""Masked-diffusion language models: decoding, and caches for models whose every row may change at every step.

from elision import dllm

lm = dllm.load("GSAI-ML/LLaDA-8B-Instruct")
out = dllm.generate(lm, input_ids, gen_length=128, steps=128, block_length=32)            # no cache
with elision.apply(lm, "dkv_cache", interval=8) as run:
    out = run.generate(input_ids, gen_length=128, steps=128, block_length=32)
"""

from elision.dllm.checkpoints import load
from elision.dllm.decode import Decoding
from elision.dllm.engine import DllmApplied, Measured, generate, measure
from elision.dllm.model import MaskedLM, masked_lm
from elision.dllm.report import DllmReport, DllmRun

__all__ = [
    "Decoding",
    "DllmApplied",
    "DllmReport",
    "DllmRun",
    "MaskedLM",
    "Measured",
    "generate",
    "load",
    "masked_lm",
    "measure",
]
