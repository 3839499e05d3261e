"""Hostile input by topic, and the sandbox in which it is read; test_hostile.py runs it."""
