"""What tests stand on: a stand-in Hub, a browser, tiny models."""
