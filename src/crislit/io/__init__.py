"""Files in and out: bounded, atomic, running no code."""
