"""The only code that touches upstream objects."""
