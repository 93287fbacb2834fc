"""Tensor parts that families share."""
