"""K/V caches of autoregressive transformers: what to keep, at which precision, and where."""
