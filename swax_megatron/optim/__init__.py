"""Optimizer backends behind one interface, and the learning-rate schedule."""
