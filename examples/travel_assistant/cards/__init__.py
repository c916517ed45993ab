"""The agent cards: their configuration, where they listen included."""

from pathlib import Path

WEATHER_CARD = Path(__file__).parent / "weather.json"
TRAVEL_CARD = Path(__file__).parent / "travel.json"
SUPERVISOR_CARD = Path(__file__).parent / "supervisor.json"
"""The supervisor's, where it is a service behind gateways."""
