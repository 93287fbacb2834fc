"""An OpenAI-compatible proxy around the semantic cache."""
