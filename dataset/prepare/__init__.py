"""Lays archives as they are downloaded out as training reads them: `python -m dataset.prepare`."""
