"""Batches of requests: checked, run as one job each, and written as the lines of OpenAI's API."""
