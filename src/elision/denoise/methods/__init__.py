"""The denoise methods, one file each; the registry finds them by their file."""
