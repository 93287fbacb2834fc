"""Caches across requests: what a service computed for one request and need not compute for the next."""
