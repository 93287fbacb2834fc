"""Offline parts of denoise methods, and the recorder they share."""
