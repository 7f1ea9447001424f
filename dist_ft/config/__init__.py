"""What a run is: schema, loading, validation. Imports nothing heavy."""
