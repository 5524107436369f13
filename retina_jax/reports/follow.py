"""Follows a run: rewrites its page when the run's files change; the page reloads itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from retina_jax.config import ConfigError
from retina_jax.console import log
from retina_jax.reports import render
from retina_jax.reports.run_page import run_page, stamp

POLL_SECONDS, RELOAD_SECONDS = 5, 10  # between two looks at the run's files; between two reloads of the page
FILES = ("config.json", "metrics.jsonl", "summary.json")


def follow(folder: Path, write: Callable[[str], None]) -> None:
    """Writes the page of the run in `folder`, again when its files change, and logs each new state of the scores. Waits for
    a run that has not started. Returns when the run is finished, or at Ctrl-C; the last page no longer reloads itself.

    Raises ConfigError if a file of the run is malformed, or if `folder` holds sweeps.
    """
    if (folder / "sweeps").is_dir():
        raise ConfigError(f"--watch: {folder} holds sweeps; give the folder of one run")
    known, seen, scored, page, finished = {}, None, None, "", False

    def write_following(seconds: int) -> None:
        write(page.replace("</head>", f"{render('follow.html', seconds=seconds)}</head>", 1))

    log(f"watching {folder}; Ctrl-C stops it")
    try:
        while not finished:
            evaluations = sorted((folder / "evaluation").glob("*.json"))
            now = [stamp(file) for file in [*(folder / name for name in FILES), *evaluations]]
            if now[0] is None:
                log("waiting for the run to start ...") if seen is None else None
            elif now != seen:
                finished = now[2] is not None
                page, line = run_page(folder, known)
                write_following(RELOAD_SECONDS)
                if scored != evaluations or finished:
                    log(line)
                scored = evaluations
            seen = now
            if not finished:
                time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        log("stopped watching")
    finally:
        if page:
            write_following(0)
