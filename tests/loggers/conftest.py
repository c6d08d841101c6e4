"""Each file here needs real packages and runs where they are. trackio is an extra that `make test` does not install."""

from importlib.util import find_spec

_FILES = {
    "test_loggers.py": ("tensorboard", "wandb"),
    "test_logger_trackio.py": ("tensorboard", "wandb", "trackio"),
}
collect_ignore = [file for file, packages in _FILES.items() if not all(map(find_spec, packages))]
