"""Comparisons and claims on robot policies: episodes in a simulator instead of images."""
