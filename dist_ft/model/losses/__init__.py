"""Losses as sums over target tokens or samples."""
