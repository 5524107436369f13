"""Self-contained HTML pages and the charts on them: no script that is needed, no other file, no request."""
