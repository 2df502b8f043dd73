"""The page of demo.py: layout, answers, visitors and what they are shown."""
