"""Measures the network's parameters, speed and memory.

Nothing is exported: only the command uses the modules, and measured processes load few of them.
"""
