"""What a run is: sections with their checks, loading, error messages, identity.

Imports no heavy package.
"""
