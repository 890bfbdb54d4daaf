"""Diffusion processes and samplers as plain functions."""
