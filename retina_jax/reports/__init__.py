"""HTML pages and charts: a run, a data check, a sweep."""
