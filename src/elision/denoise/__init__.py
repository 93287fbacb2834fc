"""Reuse across denoising steps: clock, sites, schedules, predictors, and the methods made of them."""
