from __future__ import annotations


def commands(folder, models):
    return {}
