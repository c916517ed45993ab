"""The agent cards of the two workers: their configuration, where they listen included."""

from pathlib import Path

WEATHER_CARD = Path(__file__).parent / "weather.json"
TRAVEL_CARD = Path(__file__).parent / "travel.json"
