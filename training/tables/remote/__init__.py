"""Tables and pictures that lie elsewhere: at addresses the user allows, and at no other."""
