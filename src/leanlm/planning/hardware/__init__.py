"""Devices: how much memory one has and how fast it is, from data sheets or measured here."""
