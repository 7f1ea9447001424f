"""Runs made of runs: stages and hyper-parameter search."""
