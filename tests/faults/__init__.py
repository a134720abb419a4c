"""Kills, full disks and second runs: nothing half-written, and the next start goes on."""
