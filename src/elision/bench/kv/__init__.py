"""Comparisons of KV methods: language tasks, real bytes, paired times."""
