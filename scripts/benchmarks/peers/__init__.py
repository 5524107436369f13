"""The same work done by other libraries. Each module imports its library, which may be absent."""
