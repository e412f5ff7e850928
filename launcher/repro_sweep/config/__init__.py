"""What a sweep is made from: its typed options, its space, and the configs of its trials."""
