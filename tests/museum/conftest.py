"""Exhibits are subjects, which only a worker imports."""

collect_ignore_glob = ["*.py"]
