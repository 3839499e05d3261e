"""Measures the network's parameters, speed and memory."""
