"""What calibrating takes, and how exact it is."""
