"""The kinds of inputs: one module each, with a function that draws an input."""
