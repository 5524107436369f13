"""The same work done by others. Each file imports its library, which need not be installed, and nothing of this project's
but `inputs` and `work`."""
