"""The folder of a run: its reader, its writer, its lock."""
