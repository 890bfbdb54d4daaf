"""Generating samples, measuring them, and drawing what was measured."""
