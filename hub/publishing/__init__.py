"""Models, adapters, data sets and the app on their way to the Hub."""
