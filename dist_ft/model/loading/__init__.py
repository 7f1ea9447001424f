"""Finding, downloading and loading models; replacing and growing heads."""
