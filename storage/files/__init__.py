"""Files and batches of the gateway, in SQL."""
