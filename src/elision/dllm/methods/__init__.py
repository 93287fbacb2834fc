"""Methods for masked-diffusion language models, one file each."""
