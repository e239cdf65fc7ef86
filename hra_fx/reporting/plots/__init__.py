"""Plots of what adapters did, by matplotlib, which is an optional dependency."""
