"""Using models without training them: generate, predict, pseudo-labels, evaluation."""
