"""Comparisons of methods for masked-diffusion language models."""
