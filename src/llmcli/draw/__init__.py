"""Figures for the terminal, SVG and HTML."""
