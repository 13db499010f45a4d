"""What this process does and did: events, the flight recorder, heartbeats, the watchdog."""
