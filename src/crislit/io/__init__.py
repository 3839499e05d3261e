"""Files in and out: bounded, atomic, running no code. Import from the modules."""
