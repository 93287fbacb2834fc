"""Workloads with known truth, a scripted upstream, and the comparison of caching policies."""
