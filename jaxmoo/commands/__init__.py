"""The commands that people type; no logic lives here."""
