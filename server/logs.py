"""What is printed while the server runs: one line per event, on standard error."""

import logging
import logging.config


def configure_logs(level: str) -> None:
    """Called once, by the command line. Prompts and keys are never logged."""
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
            "handlers": {
                "stderr": {"class": "logging.StreamHandler", "formatter": "line", "stream": "ext://sys.stderr"}
            },
            "root": {"level": "WARNING", "handlers": ["stderr"]},
            "loggers": {
                "gossamer": {"level": level.upper()},
                "uvicorn": {"level": "DEBUG" if level == "debug" else "WARNING"},
            },
        }
    )
