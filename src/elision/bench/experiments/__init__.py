"""Experiments behind the claims, one file per method or group of controls; each enrols itself by `claims.claim`."""
