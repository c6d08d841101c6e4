"""Each file here holds polarity against one real package and runs where that package is: `make test` has two places."""

from importlib.util import find_spec

_FILES = {
    "verl": ["test_verl_advantages.py", "test_verl_losses.py", "test_verl_mismatch.py"],
    "trl": ["test_trl_losses.py"],
}
collect_ignore = [file for package, files in _FILES.items() if find_spec(package) is None for file in files]
