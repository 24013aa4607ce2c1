"""What it costs to save, copy, pause and wake sandboxes, and whether anything gets lost on the way."""
